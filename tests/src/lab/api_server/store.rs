//! Objects with their versions, and what has happened to them.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use serde_json::{Value, json};

/// What can be listed and watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// Services.
    Services,
    /// EndpointSlices.
    EndpointSlices,
    /// Nodes.
    Nodes,
    /// ServiceCIDRs.
    ServiceCidrs,
}

/// Something said in a watch that is no change of an object.
#[derive(Clone, Debug)]
pub enum Injection {
    /// A bookmark, in watches that asked for bookmarks.
    Bookmark,
    /// An ERROR event with a code.
    Error(u16),
    /// Bytes as they are; a line needs its own end.
    Bytes(Vec<u8>),
    /// The end of the stream, as when the time of a watch is over.
    End,
    /// The end of the connection in the middle of a line.
    Disconnect,
}

/// Namespace and name.
pub(super) type Key = (String, String);

/// What has happened.
#[derive(Clone, Debug)]
pub(super) enum Entry {
    /// An object was created, changed or deleted.
    Change { version: u64, resource: Resource, before: Option<Arc<Value>>, after: Option<Arc<Value>> },
    /// Something was said in all open watches of a kind, or of all.
    Injected { resource: Option<Resource>, injection: Injection },
}

#[derive(Default)]
pub(super) struct Store {
    version: u64,
    /// No watch can be resumed before it.
    oldest: u64,
    objects: BTreeMap<(Resource, Key), Arc<Value>>,
    history: Vec<Entry>,
}

impl Resource {
    /// Every one of them.
    pub const ALL: [Self; 4] = [Self::Services, Self::EndpointSlices, Self::Nodes, Self::ServiceCidrs];

    /// Returns the kind in manifests.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Services => "Service",
            Self::EndpointSlices => "EndpointSlice",
            Self::Nodes => "Node",
            Self::ServiceCidrs => "ServiceCIDR",
        }
    }

    /// Returns the API group and version.
    pub fn api_version(self) -> &'static str {
        match self {
            Self::Services | Self::Nodes => "v1",
            Self::EndpointSlices => "discovery.k8s.io/v1",
            Self::ServiceCidrs => "networking.k8s.io/v1",
        }
    }

    pub(super) fn of_path(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|resource| {
            path == match resource {
                Self::Services => "/api/v1/services",
                Self::EndpointSlices => "/apis/discovery.k8s.io/v1/endpointslices",
                Self::Nodes => "/api/v1/nodes",
                Self::ServiceCidrs => "/apis/networking.k8s.io/v1/servicecidrs",
            }
        })
    }

    /// An object without content and without a name, as bookmarks hold it.
    pub(super) fn bookmark(self, version: u64, ends_initial_events: bool) -> Value {
        let mut metadata = json!({ "resourceVersion": version.to_string() });
        if ends_initial_events {
            metadata["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
        }
        let mut object =
            json!({ "kind": self.kind(), "apiVersion": self.api_version(), "metadata": metadata });
        match self {
            Self::Services => {
                object["spec"] = json!({});
                object["status"] = json!({ "loadBalancer": {} });
            }
            Self::EndpointSlices => {
                object["addressType"] = json!("");
                object["endpoints"] = Value::Null;
                object["ports"] = Value::Null;
            }
            Self::Nodes | Self::ServiceCidrs => {
                object["spec"] = json!({});
                object["status"] = json!({});
            }
        }
        object
    }
}

impl Store {
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Whether changes since a version are still known.
    pub(super) fn remembers(&self, version: u64) -> bool {
        version >= self.oldest
    }

    pub(super) fn objects(&self, resource: Resource) -> impl Iterator<Item = &Arc<Value>> {
        self.after(resource, None).map(|(_, object)| object)
    }

    /// The objects of a kind with their keys, those after a key when there is one.
    pub(super) fn after(
        &self,
        resource: Resource,
        key: Option<Key>,
    ) -> impl Iterator<Item = (&Key, &Arc<Value>)> {
        let from = match key {
            Some(key) => Bound::Excluded((resource, key)),
            None => Bound::Included((resource, Key::default())),
        };
        let objects = self.objects.range((from, Bound::Unbounded));
        let of_resource = objects.take_while(move |((other, _), _)| *other == resource);
        of_resource.map(|((_, key), object)| (key, object))
    }

    pub(super) fn history(&self) -> &[Entry] {
        &self.history
    }

    pub(super) fn put(&mut self, mut object: Value) -> u64 {
        let version = self.version + 1;
        let metadata = &mut object["metadata"];
        metadata["resourceVersion"] = version.to_string().into();
        if metadata["uid"].is_null() {
            metadata["uid"] = format!("00000000-0000-4000-8000-{version:012}").into();
        }
        self.put_as_it_is(object);
        version
    }

    pub(super) fn put_as_it_is(&mut self, object: Value) {
        let version = version_of(&object);
        let (resource, key) = (resource_of(&object), key_of(&object));
        let after = Arc::new(object);
        let before = self.objects.insert((resource, key), Arc::clone(&after));
        self.version = version;
        self.history.push(Entry::Change { version, resource, before, after: Some(after) });
    }

    pub(super) fn delete(&mut self, resource: Resource, namespace: &str, name: &str) -> bool {
        let removed = self.objects.remove(&(resource, (namespace.to_string(), name.to_string())));
        let Some(before) = removed else { return false };
        self.version += 1;
        let version = self.version;
        self.history.push(Entry::Change { version, resource, before: Some(before), after: None });
        true
    }

    pub(super) fn delete_all(&mut self) {
        let keys: Vec<_> = self.objects.keys().cloned().collect();
        for (resource, (namespace, name)) in keys {
            self.delete(resource, &namespace, &name);
        }
    }

    pub(super) fn advance(&mut self, version: u64) {
        self.version = self.version.max(version);
    }

    pub(super) fn forget(&mut self) {
        self.version += 1;
        self.oldest = self.version;
    }

    pub(super) fn inject(&mut self, entry: Entry) {
        self.history.push(entry);
    }
}

/// The object with the version of what happened to it last.
pub(super) fn at_version(object: &Value, version: u64) -> Value {
    let mut object = object.clone();
    object["metadata"]["resourceVersion"] = version.to_string().into();
    object
}

fn version_of(object: &Value) -> u64 {
    let version = object["metadata"]["resourceVersion"].as_str().and_then(|text| text.parse().ok());
    version.expect("versions of recorded objects are numbers")
}

fn resource_of(object: &Value) -> Resource {
    let known = Resource::ALL.into_iter().find(|resource| object["kind"] == resource.kind());
    known.unwrap_or_else(|| panic!("objects of the kind {} are not served", object["kind"]))
}

fn key_of(object: &Value) -> Key {
    let text = |field: &str| match &object["metadata"][field] {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        // Whatever else it is, the object has to be kept somewhere.
        other @ (Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => other.to_string(),
    };
    (text("namespace"), text("name"))
}
