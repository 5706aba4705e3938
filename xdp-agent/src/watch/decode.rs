//! Takes apart what the API server says, so that one object that cannot be read stays alone.

use std::{borrow::Cow, sync::Arc, time::Duration};

use k8s_openapi::{
    Metadata,
    api::{core::v1, discovery::v1 as discovery, networking::v1 as networking},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use super::client::{Failure, refusal};
use crate::{
    objects::{self, Change, ObjectName},
    problem::without_place,
    source::Kind,
};

/// A page of a list.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) items: Vec<Item>,
    /// Where the next page begins.
    pub(super) continue_token: Option<String>,
    /// From where to watch.
    pub(super) version: Option<String>,
}

/// An object, or what can be told of it.
#[derive(Debug)]
pub(super) struct Item {
    /// Empty when not even that can be read.
    pub(super) name: ObjectName,
    pub(super) version: Option<String>,
    /// The object, or why it is none.
    pub(super) content: Result<Change, String>,
}

/// A line of a watch.
#[derive(Debug)]
pub(super) enum Line {
    /// An object is new or has changed, or has come into the selection.
    Applied(Item),
    /// An object is gone, or has left the selection.
    Deleted { name: ObjectName, version: Option<String> },
    /// Everything up to a version has been told.
    Bookmark(String),
}

/// What is read of an object whose form is otherwise unknown.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Head {
    metadata: HeadMeta,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct HeadMeta {
    name: String,
    namespace: String,
    resource_version: Option<String>,
}

#[derive(Debug, Deserialize)]
struct RawPage<'a> {
    #[serde(default)]
    metadata: PageMeta,
    #[serde(borrow, default)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct PageMeta {
    resource_version: Option<String>,
    #[serde(rename = "continue")]
    continue_token: Option<String>,
}

#[derive(Debug, Deserialize)]
struct RawLine<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    object: &'a RawValue,
}

/// The `Status` in an ERROR event.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Error {
    code: u16,
    message: String,
    details: ErrorDetails,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ErrorDetails {
    retry_after_seconds: Option<u32>,
}

/// Reads a page.
pub(super) fn page(kind: Kind, bytes: &[u8]) -> Result<Page, Failure> {
    let text = String::from_utf8_lossy(bytes);
    let page: RawPage<'_> = serde_json::from_str(&text).map_err(unreadable)?;
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    Ok(Page {
        items: page.items.iter().flatten().map(|item| self::item(kind, item.get())).collect(),
        continue_token: given(page.metadata.continue_token),
        version: given(page.metadata.resource_version),
    })
}

/// Reads a line of a watch.
pub(super) fn line(kind: Kind, bytes: &[u8]) -> Result<Line, Failure> {
    // What is no UTF-8 is most likely in a text that nobody here reads.
    let text = String::from_utf8_lossy(bytes);
    let line: RawLine<'_> = serde_json::from_str(&text).map_err(unreadable)?;
    let object = line.object.get();
    match &*line.kind {
        "ADDED" | "MODIFIED" => Ok(Line::Applied(item(kind, object))),
        "DELETED" => {
            let head: Head = serde_json::from_str(object).map_err(unreadable)?;
            if head.metadata.name.is_empty() {
                return Err(Failure::Unreadable("an object without a name is gone".to_owned()));
            }
            Ok(Line::Deleted {
                name: head.metadata.object_name(kind),
                version: head.metadata.resource_version,
            })
        }
        "BOOKMARK" => {
            let head: Head = serde_json::from_str(object).map_err(unreadable)?;
            let version = head.metadata.resource_version;
            version
                .map(Line::Bookmark)
                .ok_or_else(|| Failure::Unreadable("a bookmark without a version".to_owned()))
        }
        "ERROR" => {
            let error: Error = serde_json::from_str(object).map_err(unreadable)?;
            let retry_after =
                error.details.retry_after_seconds.map(|seconds| Duration::from_secs(seconds.into()));
            Err(refusal(error.code, &error.message, retry_after))
        }
        other => Err(Failure::Unreadable(format!("events of the type {other:.40} are not known"))),
    }
}

fn unreadable(error: serde_json::Error) -> Failure {
    Failure::Unreadable(error.to_string())
}

fn item(kind: Kind, text: &str) -> Item {
    match kind {
        Kind::Service => read(kind, text, |name, object| {
            Change::Service(name, Some(Arc::new(objects::Service::read(object))))
        }),
        Kind::EndpointSlice => read(kind, text, |name, object: &discovery::EndpointSlice| {
            Change::Slice(name, Some(Arc::new(objects::Slice::read(object))))
        }),
        Kind::Node => read(kind, text, |name, object: &v1::Node| {
            Change::Node(name.name, Some(Arc::new(objects::Node::read(object))))
        }),
        Kind::ServiceCidr => read(kind, text, |name, object: &networking::ServiceCIDR| {
            Change::ServiceCidr(name.name, Some(Arc::new(objects::ServiceCidr::read(object))))
        }),
    }
}

/// Reads an object and keeps what matters of it; the rest is gone before the next one is read.
fn read<K>(kind: Kind, text: &str, change: impl FnOnce(ObjectName, &K) -> Change) -> Item
where
    K: DeserializeOwned + Metadata<Ty = ObjectMeta>,
{
    let error = match serde_json::from_str::<K>(text) {
        Ok(object) => {
            let meta = object.metadata();
            let head = HeadMeta {
                name: meta.name.clone().unwrap_or_default(),
                namespace: meta.namespace.clone().unwrap_or_default(),
                resource_version: meta.resource_version.clone(),
            };
            let name = head.object_name(kind);
            let content = if name.name.is_empty() {
                Err("metadata.name is missing".to_owned())
            } else {
                Ok(change(name.clone(), &object))
            };
            return Item { name, version: head.resource_version, content };
        }
        Err(error) => error,
    };
    let head: Head = serde_json::from_str(text).unwrap_or_default();
    Item {
        name: head.metadata.object_name(kind),
        version: head.metadata.resource_version,
        content: Err(named::<K>(text).unwrap_or_else(|| without_place(&error))),
    }
}

/// What does not fit in an object, with the field it is in: a second, slower look at what has failed already.
fn named<K: DeserializeOwned>(text: &str) -> Option<String> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let error = serde_path_to_error::deserialize::<_, K>(&mut deserializer).err()?;
    Some(format!("{}: {}", error.path(), without_place(error.inner())))
}

impl HeadMeta {
    fn object_name(&self, kind: Kind) -> ObjectName {
        kind.object_name(&self.namespace, &self.name)
    }
}
