//! From Kubernetes objects to what this node should serve: pure, and the same on every node but for what is local.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    fmt,
    net::Ipv4Addr,
    sync::Arc,
};

use k8s_openapi::api::core::v1::Service;

use self::{
    endpoints::{Slices, categorize},
    frontends::{Claimant, NodeAddresses},
};
use crate::{
    manifests::{ObjectName, Objects},
    problem::{Problem, ProblemKind},
};

pub mod address;
mod endpoints;
#[cfg(test)]
mod flows;
mod frontends;
#[cfg(test)]
mod tests;
pub mod wanted;

const LABEL_ZONE: &str = "topology.kubernetes.io/zone";

/// What is known of this node beside its Node object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its name, as in `nodeName` of endpoints.
    pub name: String,
    /// Where NodePorts are served when there is no Node object of that name with an address.
    pub addresses: Vec<Ipv4Addr>,
    /// Every address of the node's interfaces: nothing addressed to them is ever dropped.
    pub own: BTreeSet<Ipv4Addr>,
}

/// A transport protocol that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
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
    /// `spec.ports[].nodePort` on an address of the node.
    NodePort,
}

/// Which endpoint list a frontend uses for clients outside the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Policy {
    /// Every usable endpoint.
    Cluster,
    /// Only usable endpoints on this node.
    Local,
}

/// An address and port where clients connect to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DesiredFrontend {
    /// Address.
    pub addr: [u8; 4],
    /// Port.
    pub port: u16,
    /// What sort of address.
    pub kind: FrontendKind,
    /// Which list it uses.
    pub policy: Policy,
    /// Whether the address is one of the node's own.
    pub node_address: bool,
}

/// An endpoint of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// Address.
    pub addr: [u8; 4],
    /// Port.
    pub port: u16,
    /// Whether it is on this node.
    pub local: bool,
}

/// A service port as it should be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its identity.
    pub name: ServicePortName,
    /// Where clients connect to, sorted; no address, port and protocol is in two service ports.
    pub frontends: Vec<DesiredFrontend>,
    /// Endpoints for policy Cluster, sorted; empty when no frontend needs them.
    pub cluster: Vec<Endpoint>,
    /// Endpoints for policy Local, sorted; empty when no frontend needs them.
    pub local: Vec<Endpoint>,
    /// Every endpoint that still serves, whether or not new flows may choose it: their flows stay.
    pub serving: Vec<Endpoint>,
    /// Whether any endpoint in the cluster is usable: without one clients are refused, otherwise an empty list drops.
    pub any_endpoint: bool,
}

/// What this node should serve.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Service ports, sorted by name.
    pub services: Vec<Arc<ServicePort>>,
    /// What could not be served as asked.
    pub problems: Vec<Problem>,
}

/// Computes what this node should serve.
pub fn desired(objects: &Objects, node: &NodeFacts) -> Desired {
    let mut problems = Vec::new();
    let own = objects.nodes.get(&ObjectName { namespace: String::new(), name: node.name.clone() });
    let labels = own.and_then(|own| own.metadata.labels.as_ref());
    let zone =
        labels.and_then(|labels| labels.get(LABEL_ZONE)).map(String::as_str).filter(|zone| !zone.is_empty());
    let addresses = NodeAddresses::of(own.map(|own| own.as_ref()), node);
    let slices = Slices::index(objects, node, zone, &mut problems);
    let mut drafts = BTreeMap::new();
    for (name, service) in &objects.services {
        draft(name, service, &addresses, &mut drafts, &mut problems);
    }
    let mut drafts: Vec<_> = drafts.into_iter().collect();
    settle_duplicates(&mut drafts, &mut problems);
    let services = drafts.into_iter().filter(|(_, draft)| !draft.frontends.is_empty());
    let services = services.map(|(name, draft)| Arc::new(serve(name, draft.frontends, &slices))).collect();
    Desired { services, problems }
}

/// A service port with what it claims, before claims are settled.
struct Draft {
    /// Creation time of the Service in seconds; a Service without one is younger than all.
    created: i64,
    frontends: Vec<DesiredFrontend>,
}

fn draft(
    name: &ObjectName,
    service: &Service,
    addresses: &NodeAddresses,
    drafts: &mut BTreeMap<ServicePortName, Draft>,
    problems: &mut Vec<Problem>,
) {
    let object = format!("Service {name}");
    let Some(claimant) = Claimant::read(service, &object, problems) else { return };
    let created = service.metadata.creation_timestamp.as_ref().map_or(i64::MAX, |time| time.0.as_second());
    for port in claimant.ports {
        let Some(protocol) = frontends::protocol(port, &object, problems) else { continue };
        let id = ServicePortName {
            namespace: name.namespace.clone(),
            service: name.name.clone(),
            port: port.name.clone().unwrap_or_default(),
            protocol,
        };
        if drafts.contains_key(&id) {
            let message =
                format!("port {} has the same name and protocol as another; it is left out", port.port);
            problems.push(Problem::of(ProblemKind::Invalid, &object, message));
            continue;
        }
        let frontends = claimant.frontends(port, addresses, &object, problems);
        drafts.insert(id, Draft { created, frontends });
    }
}

/// Gives every address, port and protocol to one service port: to one that names the address before a NodePort (as
/// kube-proxy's nftables mode does), then to the oldest, then to the first by name.
fn settle_duplicates(drafts: &mut [(ServicePortName, Draft)], problems: &mut Vec<Problem>) {
    let mut claims = Vec::new();
    for (at, (_, draft)) in drafts.iter().enumerate() {
        for frontend in &draft.frontends {
            claims.push((
                frontend.kind == FrontendKind::NodePort,
                draft.created,
                at,
                frontend.addr,
                frontend.port,
            ));
        }
    }
    claims.sort_unstable();
    let mut owners: HashMap<([u8; 4], u16, Protocol), usize> = HashMap::with_capacity(claims.len());
    let mut lost = Vec::new();
    for (_, _, at, addr, port) in claims {
        match owners.entry((addr, port, drafts[at].0.protocol)) {
            Entry::Vacant(free) => {
                free.insert(at);
            }
            Entry::Occupied(owner) => lost.push((at, addr, port, *owner.get())),
        }
    }
    lost.sort_unstable();
    for (at, addr, port, owner) in lost {
        let (winner, (name, draft)) = (drafts[owner].0.clone(), &mut drafts[at]);
        draft.frontends.retain(|frontend| (frontend.addr, frontend.port) != (addr, port));
        let message = format!(
            "{}:{port} is already served for Service {winner}; give one of the two another address or port",
            Ipv4Addr::from(addr)
        );
        problems.push(Problem::of(ProblemKind::DuplicateFrontend, format!("Service {name}"), message));
    }
}

fn serve(name: ServicePortName, mut frontends: Vec<DesiredFrontend>, slices: &Slices<'_>) -> ServicePort {
    let candidates = slices.of((&name.namespace, &name.service), &name.port, name.protocol);
    let mut lists = categorize(&candidates);
    let uses = |policy| frontends.iter().any(|frontend| frontend.policy == policy);
    if !uses(Policy::Cluster) {
        lists.cluster.clear();
    }
    if !uses(Policy::Local) {
        lists.local.clear();
    }
    frontends.sort_unstable();
    ServicePort {
        name,
        frontends,
        cluster: lists.cluster,
        local: lists.local,
        serving: lists.serving,
        any_endpoint: lists.any,
    }
}

fn port_number(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|&number| number != 0)
}

impl Protocol {
    /// The IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => xdp_common::net::TCP,
            Self::Udp => xdp_common::net::UDP,
        }
    }

    /// Reads a `protocol` field; none for one that is not served.
    fn parse(text: Option<&str>) -> Option<Self> {
        match text {
            None | Some("TCP") => Some(Self::Tcp),
            Some("UDP") => Some(Self::Udp),
            Some(_) => None,
        }
    }
}

impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.service)?;
        if !self.port.is_empty() {
            write!(f, ":{}", self.port)?;
        }
        f.write_str(match self.protocol {
            Protocol::Tcp => "/TCP",
            Protocol::Udp => "/UDP",
        })
    }
}
