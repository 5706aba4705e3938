//! Objects of Kubernetes, as much of them as matters here: read once, small enough to keep a hundred thousand.

use std::{collections::BTreeMap, fmt, sync::Arc};

use k8s_openapi::api::{core::v1, discovery::v1 as discovery, networking::v1 as networking};

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

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

/// What matters of a Service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Service {}

impl Service {
    /// Reads an object; values that cannot be used are kept as such, for `cluster` to report.
    pub fn read(_object: &v1::Service) -> Self {
        Self {}
    }
}

/// What matters of an EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Slice {}

impl Slice {
    /// Reads an object; values that cannot be used are kept as such, for `cluster` to report.
    pub fn read(_object: &discovery::EndpointSlice) -> Self {
        Self {}
    }
}

/// What matters of a Node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Node {}

impl Node {
    /// Reads an object; values that cannot be used are kept as such, for `cluster` to report.
    pub fn read(_object: &v1::Node) -> Self {
        Self {}
    }
}

/// What matters of a ServiceCIDR.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServiceCidr {}

impl ServiceCidr {
    /// Reads an object; values that cannot be used are kept as such, for `cluster` to report.
    pub fn read(_object: &networking::ServiceCIDR) -> Self {
        Self {}
    }
}
