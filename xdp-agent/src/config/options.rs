//! What the cluster's picture depends on beside its objects.

use std::net::IpAddr;

/// What of the flags decides what is served, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Name of this node.
    pub node: String,
    /// How pods of this node are recognised.
    pub detect_local: DetectLocal,
    /// Whether everything sent to ClusterIPs is masqueraded.
    pub masquerade_all: bool,
    /// Where NodePorts are served.
    pub nodeport_addresses: NodePortAddresses,
    /// Ranges of ClusterIPs, beside those of ServiceCIDR objects.
    pub service_cidrs: Vec<(IpAddr, u8)>,
    /// Zone of this node; the Node's label without it.
    pub zone: Option<String>,
}

/// How pods of this node are recognised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    /// Not at all.
    None,
    /// By addresses of the cluster's pods.
    ClusterCidr(Vec<(IpAddr, u8)>),
    /// By the podCIDRs of the own Node.
    NodeCidr,
    /// By the bridge they come in by.
    BridgeInterface(String),
    /// By the name of the interface they come in by.
    InterfaceNamePrefix(String),
}

/// Where NodePorts are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// On the primary address of each family.
    Primary,
    /// On addresses in these networks; a family without networks is served on all of its addresses.
    Cidrs(Vec<(IpAddr, u8)>),
}
