//! Where objects come from: what a source says to the writer of the maps, whichever source it is.

pub use self::files::{Files, files};
use crate::{
    objects::{Change, ObjectName},
    problem::Problem,
};

mod files;

/// Largest number of changes that are handed on at once.
pub(crate) const BATCH_MAX: usize = 4096;

/// What a source says; a consumer removes nothing before [`Event::Synced`].
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Objects are new, have changed or are gone.
    Changes(Vec<Change>),
    /// Every problem that the source has now.
    Problems(Vec<Problem>),
    /// Everything that exists has been sent; said once.
    Synced,
}

/// The kinds of objects that matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Services.
    Service,
    /// EndpointSlices.
    EndpointSlice,
    /// Nodes.
    Node,
    /// ServiceCIDRs.
    ServiceCidr,
}

impl Kind {
    /// Every one of them.
    pub const ALL: [Self; 4] = [Self::Service, Self::EndpointSlice, Self::Node, Self::ServiceCidr];

    /// The name in manifests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
        }
    }

    /// The API group and version in manifests.
    pub const fn api_version(self) -> &'static str {
        match self {
            Self::Service | Self::Node => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::ServiceCidr => "networking.k8s.io/v1",
        }
    }

    /// The metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::EndpointSlice => "endpointslice",
            Self::Node => "node",
            Self::ServiceCidr => "servicecidr",
        }
    }

    /// Whether objects live in namespaces.
    pub const fn is_namespaced(self) -> bool {
        match self {
            Self::Service | Self::EndpointSlice => true,
            Self::Node | Self::ServiceCidr => false,
        }
    }

    /// The full name of an object of this kind, as the API server would store it.
    pub fn object_name(self, namespace: &str, name: &str) -> ObjectName {
        let namespace = match (self.is_namespaced(), namespace) {
            (false, _) => "",
            (true, "") => "default",
            (true, namespace) => namespace,
        };
        ObjectName::new(namespace, name)
    }

    /// The kind of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// An object of this kind is gone.
    pub fn gone(self, name: ObjectName) -> Change {
        match self {
            Self::Service => Change::Service(name, None),
            Self::EndpointSlice => Change::Slice(name, None),
            Self::Node => Change::Node(name.name, None),
            Self::ServiceCidr => Change::ServiceCidr(name.name, None),
        }
    }
}
