//! The objects that are read, and their names.

use std::{collections::BTreeMap, fmt, sync::Arc};

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};

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
    pub slices: BTreeMap<ObjectName, Arc<EndpointSlice>>,
    /// Nodes.
    pub nodes: BTreeMap<ObjectName, Arc<Node>>,
}

/// The kinds that matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Service,
    EndpointSlice,
    Node,
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

impl Kind {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
        }
    }

    pub(super) const fn api_version(self) -> &'static str {
        match self {
            Self::Service | Self::Node => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        [Self::Service, Self::EndpointSlice, Self::Node].into_iter().find(|kind| kind.name() == text)
    }

    /// The full name of an object of this kind, as the API server would store it.
    pub(super) fn object_name(self, namespace: Option<&str>, name: &str) -> ObjectName {
        let namespace = match (self, namespace) {
            (Self::Node, _) => "",
            (_, None | Some("")) => "default",
            (_, Some(namespace)) => namespace,
        };
        ObjectName { namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

impl Objects {
    pub(super) fn contains(&self, kind: Kind, name: &ObjectName) -> bool {
        match kind {
            Kind::Service => self.services.contains_key(name),
            Kind::EndpointSlice => self.slices.contains_key(name),
            Kind::Node => self.nodes.contains_key(name),
        }
    }

    pub(super) fn copy(&mut self, from: &Self, kind: Kind, name: &ObjectName) {
        match kind {
            Kind::Service => copy(&mut self.services, &from.services, name),
            Kind::EndpointSlice => copy(&mut self.slices, &from.slices, name),
            Kind::Node => copy(&mut self.nodes, &from.nodes, name),
        }
    }
}

fn copy<T>(to: &mut BTreeMap<ObjectName, Arc<T>>, from: &BTreeMap<ObjectName, Arc<T>>, name: &ObjectName) {
    if let Some(object) = from.get(name) {
        to.insert(name.clone(), Arc::clone(object));
    }
}
