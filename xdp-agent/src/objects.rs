//! Objects of Kubernetes, as much of them as matters here: read once, small enough to keep a hundred thousand.
//!
//! Reading applies what Kubernetes says of one object alone: defaults, fields that depend on each other, objects that no
//! proxy serves. Values that cannot be used are left out, and the object keeps a sentence about each as its flaws.
//! Everything that takes a second object or the node is the business of [`cluster`](crate::cluster).

use std::{collections::BTreeMap, fmt, sync::Arc};

pub use self::{
    node::{Node, ServiceCidr},
    service::{Service, ServicePort},
    slice::{HintsId, NameId, Slice, SliceEndpoint, SlicePort},
};
use crate::problem::ProblemKind;

mod changes;
mod node;
mod service;
mod slice;
#[cfg(test)]
mod tests;

/// Sentences that are kept about one object; of further flaws only their number is.
const FLAWS_MAX: usize = 8;
/// Characters of a text that are quoted in a sentence.
const QUOTED_MAX: usize = 80;

/// Namespace and name of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    /// Namespace, empty for kinds that have none.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// The objects that decide what is served; the same for files and for an API server.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Objects {
    /// Services.
    pub services: BTreeMap<ObjectName, Arc<Service>>,
    /// EndpointSlices.
    pub slices: BTreeMap<ObjectName, Arc<Slice>>,
    /// Nodes, by name.
    pub nodes: BTreeMap<String, Arc<Node>>,
    /// ServiceCIDRs, by name.
    pub service_cidrs: BTreeMap<String, Arc<ServiceCidr>>,
}

/// An object is new, has changed, or (without a value) is gone.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A Service.
    Service(ObjectName, Option<Arc<Service>>),
    /// An EndpointSlice.
    Slice(ObjectName, Option<Arc<Slice>>),
    /// A Node.
    Node(String, Option<Arc<Node>>),
    /// A ServiceCIDR.
    ServiceCidr(String, Option<Arc<ServiceCidr>>),
}

impl ObjectName {
    /// A name from its two parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

/// Something of an object that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw {
    /// What sort of problem it is.
    pub kind: ProblemKind,
    /// What is wrong, and what becomes of it.
    pub sentence: Box<str>,
}

/// Collects what cannot be used of one object.
#[derive(Debug, Default)]
struct Flaws {
    kept: Vec<Flaw>,
    more: usize,
}

impl Flaws {
    /// A value that Kubernetes' API does not allow.
    fn push(&mut self, sentence: impl FnOnce() -> String) {
        self.keep(ProblemKind::Invalid, sentence);
    }

    /// A value that it allows, and that no proxy serves.
    fn unsupported(&mut self, sentence: impl FnOnce() -> String) {
        self.keep(ProblemKind::Unsupported, sentence);
    }

    fn keep(&mut self, kind: ProblemKind, sentence: impl FnOnce() -> String) {
        if self.kept.len() < FLAWS_MAX {
            self.kept.push(Flaw { kind, sentence: sentence().into() });
        } else {
            self.more += 1;
        }
    }

    fn finish(mut self) -> Box<[Flaw]> {
        if self.more > 0 {
            let sentence = format!("{} more values cannot be used", self.more).into();
            self.kept.push(Flaw { kind: ProblemKind::Invalid, sentence });
        }
        self.kept.into()
    }
}

/// A text of an object for people: quoted, and not longer than a line.
fn quoted(text: &str) -> String {
    match text.char_indices().nth(QUOTED_MAX) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?} and so on", &text[..end]),
    }
}
