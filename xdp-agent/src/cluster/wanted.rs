//! What this node should serve, per address family: what `cluster` computes and `plan` brings into the maps.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

pub use xdp_common::net::Ip6;
use xdp_common::{
    net::{self, Address},
    tables::Mapped,
};

/// An address of one family, as Kubernetes writes it and as the maps hold it.
pub trait IpAddress: Address + Mapped {
    /// The bytes of an address, if it is of this family.
    fn from_ip(ip: IpAddr) -> Option<Self>;
    /// The address for people.
    fn to_ip(self) -> IpAddr;
    /// What Kubernetes calls the family in `ipFamilies` and in metric labels.
    const FAMILY: &'static str;
}

impl IpAddress for [u8; 4] {
    const FAMILY: &'static str = "IPv4";

    fn from_ip(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V4(ip) => Some(ip.octets()),
            IpAddr::V6(_) => None,
        }
    }

    fn to_ip(self) -> IpAddr {
        Ipv4Addr::from(self).into()
    }
}

impl IpAddress for Ip6 {
    const FAMILY: &'static str = "IPv6";

    fn from_ip(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V4(_) => None,
            IpAddr::V6(ip) => Some(ip.octets().into()),
        }
    }

    fn to_ip(self) -> IpAddr {
        Ipv6Addr::from(self.octets()).into()
    }
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
    /// RFC 9260.
    Sctp,
}

/// What identifies a service port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServicePortName {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub service: String,
    /// Name of the port, empty when it has none.
    pub port: String,
    /// Protocol of the port.
    pub protocol: Protocol,
}

/// What sort of address a frontend has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FrontendKind {
    /// `spec.clusterIP`.
    ClusterIp,
    /// `spec.externalIPs`.
    ExternalIp,
    /// `status.loadBalancer.ingress`.
    LoadBalancer,
    /// `spec.ports[].nodePort` on an address of the node; on the unspecified one, of another node, which sends on to this
    /// one what has come to it.
    NodePort,
}

/// Which endpoint list a frontend uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Policy {
    /// Every usable endpoint.
    #[default]
    Cluster,
    /// Only usable endpoints on this node.
    Local,
}

/// Whose flows get an address of this node as their source, by where they come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Masquerade {
    /// Clients outside the cluster.
    pub external: bool,
    /// Pods that the detect-local mode takes for this node's.
    pub pod: bool,
    /// Processes of this node.
    pub host: bool,
}

/// An address and port where clients connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DesiredFrontend<A> {
    /// Address.
    pub addr: A,
    /// Port.
    pub port: u16,
    /// What sort of address.
    pub kind: FrontendKind,
    /// Which list clients outside the cluster get.
    pub external: Policy,
    /// Which list pods and processes of this node get.
    pub internal: Policy,
    /// Who is masqueraded.
    pub masquerade: Masquerade,
    /// Whether only [`ServicePort::sources`] may open flows.
    pub is_restricted: bool,
    /// Whether the address is one of the node's own.
    pub is_node_address: bool,
}

/// An endpoint of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint<A> {
    /// Address.
    pub addr: A,
    /// Port.
    pub port: u16,
    /// Whether it is on this node.
    pub local: bool,
    /// Address of its node, if that is another one to which packets may go as they are; else unspecified.
    pub node: A,
}

/// A network: an address and how many of its leading bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Network<A> {
    /// Address; its other bits are zero.
    pub addr: A,
    /// Prefix length in bits.
    pub len: u8,
}

/// A service port as it should be served in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort<A> {
    /// Its identity.
    pub name: ServicePortName,
    /// Where clients connect to, sorted; no address, port and protocol is in two service ports.
    pub frontends: Vec<DesiredFrontend<A>>,
    /// Endpoints for policy Cluster, sorted; empty when no frontend needs them.
    pub cluster: Vec<Endpoint<A>>,
    /// Endpoints for policy Local, sorted; empty when no frontend needs them.
    pub local: Vec<Endpoint<A>>,
    /// Every endpoint that still serves, whether or not new flows may choose it, sorted: their flows stay.
    pub serving: Vec<Endpoint<A>>,
    /// Whether any endpoint in the cluster is usable: without one clients are refused, otherwise an empty list drops.
    pub any_endpoint: bool,
    /// Client-IP affinity in seconds, 0 for none.
    pub affinity_seconds: u32,
    /// Sources that may open flows to restricted frontends, sorted; empty when none is restricted, or nobody may.
    pub sources: Vec<Network<A>>,
}

/// Networks that matter to all service ports of a family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks<A> {
    /// Pods, as the detect-local mode says; empty when it goes by interface or there is none.
    pub pods: Vec<Network<A>>,
    /// ServiceCIDRs.
    pub services: Vec<Network<A>>,
    /// The node's own addresses, to which nothing is ever dropped though a ServiceCIDR may hold them.
    pub own: Vec<A>,
    /// The other nodes of the cluster, if packets go to them as they are; sorted.
    pub nodes: Vec<A>,
    /// What these know this node by; sorted.
    pub this: Vec<A>,
}

/// What has changed in one family since the last update.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta<A> {
    /// Service ports that changed, or none where they are not to be served any more.
    pub ports: BTreeMap<ServicePortName, Option<Arc<ServicePort<A>>>>,
    /// Networks, when they changed.
    pub networks: Option<Networks<A>>,
}

impl<A> Default for Delta<A> {
    fn default() -> Self {
        Self { ports: BTreeMap::new(), networks: None }
    }
}

impl<A> Networks<A> {
    /// None.
    pub const NONE: Self =
        Self { pods: Vec::new(), services: Vec::new(), own: Vec::new(), nodes: Vec::new(), this: Vec::new() };
}

impl<A> Delta<A> {
    /// Whether nothing has changed.
    pub fn is_empty(&self) -> bool {
        self.ports.is_empty() && self.networks.is_none()
    }
}

impl<A: IpAddress> Network<A> {
    /// The network of so many leading bits that an address is in.
    pub fn of(addr: A, len: u8) -> Self {
        let bits = |longest: u32| longest.saturating_sub(u32::from(len));
        let masked: IpAddr = match addr.to_ip() {
            IpAddr::V4(ip) => {
                let mask = u32::MAX.checked_shl(bits(32)).unwrap_or(0);
                Ipv4Addr::from_bits(ip.to_bits() & mask).into()
            }
            IpAddr::V6(ip) => {
                let mask = u128::MAX.checked_shl(bits(128)).unwrap_or(0);
                Ipv6Addr::from_bits(ip.to_bits() & mask).into()
            }
        };
        // Masking keeps the family.
        Self { addr: A::from_ip(masked).unwrap_or(addr), len }
    }

    /// Whether an address is in it.
    pub fn contains(&self, addr: A) -> bool {
        Self::of(addr, self.len).addr == self.addr
    }
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// Reads a `protocol` field; none for one that is not served.
    pub fn parse(text: Option<&str>) -> Option<Self> {
        match text {
            // What the API server fills in.
            None | Some("") => Some(Self::Tcp),
            Some(text) => Self::ALL.into_iter().find(|protocol| protocol.name() == text),
        }
    }

    /// The one of an IP protocol number.
    pub fn of_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|protocol| protocol.number() == number)
    }

    /// The IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => net::TCP,
            Self::Udp => net::UDP,
            Self::Sctp => net::SCTP,
        }
    }

    /// Its name in Kubernetes objects.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

impl ServicePortName {
    /// `namespace/name:port`, and `namespace/name` where the port has no name.
    pub fn without_protocol(&self) -> String {
        let Self { namespace, service, port, .. } = self;
        if port.is_empty() {
            format!("{namespace}/{service}")
        } else {
            format!("{namespace}/{service}:{port}")
        }
    }
}

impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.without_protocol(), self.protocol.name())
    }
}

impl<A: IpAddress> fmt::Display for Network<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr.to_ip(), self.len)
    }
}
