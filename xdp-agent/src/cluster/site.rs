//! What of this node decides how Services are served on it, for one address family.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use super::{
    DetectLocal, Forwarding, NodeFacts, NodePortAddresses, Options,
    nodes::addresses,
    wanted::{IpAddress, Network, Networks},
};
use crate::objects::{Node, ServiceCidr};

/// This node, as far as one address family goes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Site<A> {
    /// Every address that is its own.
    pub(super) own: BTreeSet<A>,
    /// What concerns every Service at once.
    pub(super) rules: Rules<A>,
}

/// What concerns every Service of a family at once.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rules<A> {
    /// The addresses that Kubernetes knows the node by.
    pub(super) node_ips: Vec<A>,
    /// Where NodePorts are served.
    pub(super) node_ports: Vec<A>,
    /// Whether other nodes send on what comes to their NodePorts as it is.
    pub(super) is_direct: bool,
    /// Whether anything tells this node's pods from other clients.
    pub(super) has_detector: bool,
    /// Whether every flow to a ClusterIP is masqueraded.
    pub(super) masquerade_all: bool,
}

impl<A: Copy> Rules<A> {
    /// The primary address, and the first that NodePorts are served on.
    pub(super) fn first(&self) -> [Option<A>; 2] {
        [self.node_ips.first().copied(), self.node_ports.first().copied()]
    }
}

impl<A> Default for Site<A> {
    fn default() -> Self {
        let rules = Rules {
            node_ips: Vec::new(),
            node_ports: Vec::new(),
            is_direct: false,
            has_detector: false,
            masquerade_all: false,
        };
        Self { own: BTreeSet::new(), rules }
    }
}

impl<A: IpAddress> Site<A> {
    pub(super) fn of(options: &Options, facts: &NodeFacts, node: Option<&Node>) -> Self {
        let listed = |ips: fn(&Node) -> &[IpAddr]| {
            let ips = node.map(ips).unwrap_or_default();
            of_family::<A>(ips).collect::<Vec<_>>()
        };
        let internal = listed(|node| &node.internal_ips);
        let external = listed(|node| &node.external_ips);
        let given: Vec<A> = of_family(&facts.addresses).collect();
        let chosen: Vec<A> = of_family(&options.node_ips).collect();
        // `GetNodeHostIPs` in Kubernetes' pkg/util/node.
        let first = chosen.first().or(internal.first()).or(external.first()).copied();
        let node_ips = first.map_or_else(|| given.clone(), |first| vec![first]);
        let mut own: BTreeSet<A> = facts.own.iter().copied().filter_map(A::from_ip).collect();
        own.extend(chosen.iter().chain(&internal).chain(&external).chain(&given));
        let node_ports = match &options.nodeport_addresses {
            NodePortAddresses::Primary => node_ips.clone(),
            NodePortAddresses::Cidrs(cidrs) => within(&own, &networks(cidrs)),
        };
        let has_detector = match &options.detect_local {
            DetectLocal::None => false,
            DetectLocal::ClusterCidr(_) | DetectLocal::NodeCidr => !pods::<A>(options, node).is_empty(),
            DetectLocal::BridgeInterface(_) | DetectLocal::InterfaceNamePrefix(_) => true,
        };
        let (is_direct, masquerade_all) = (options.forwarding != Forwarding::Snat, options.masquerade_all);
        Self { own, rules: Rules { node_ips, node_ports, is_direct, has_detector, masquerade_all } }
    }

    /// The networks that go with this node.
    pub(super) fn networks<'a>(
        &self,
        options: &Options,
        node: Option<&Node>,
        nodes: &BTreeMap<Box<str>, Vec<A>>,
        service_cidrs: impl Iterator<Item = &'a ServiceCidr>,
    ) -> Networks<A> {
        let mut services: BTreeSet<Network<A>> = networks(&options.service_cidrs).into_iter().collect();
        services.extend(service_cidrs.flat_map(|object| networks(&object.cidrs)));
        Networks {
            pods: pods(options, node),
            services: services.into_iter().collect(),
            own: self.own.iter().copied().collect(),
            nodes: sorted(nodes.values().flatten().copied()),
            // The others know what the Node object names.
            this: match node {
                _ if !self.rules.is_direct => Vec::new(),
                Some(_) => sorted(addresses(node).into_iter()),
                None => sorted(self.rules.node_ips.iter().copied()),
            },
        }
    }
}

/// Each address once.
fn sorted<A: IpAddress>(addresses: impl Iterator<Item = A>) -> Vec<A> {
    addresses.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Addresses of one family.
pub(super) fn of_family<A: IpAddress>(ips: &[IpAddr]) -> impl Iterator<Item = A> {
    ips.iter().copied().filter_map(A::from_ip)
}

/// Networks of one family, sorted.
pub(super) fn networks<A: IpAddress>(cidrs: &[(IpAddr, u8)]) -> Vec<Network<A>> {
    let of_family = |&(ip, len): &(IpAddr, u8)| Some(Network::of(A::from_ip(ip)?, len));
    let networks: BTreeSet<_> = cidrs.iter().filter_map(of_family).collect();
    networks.into_iter().collect()
}

/// The networks by which pods are told from other clients.
fn pods<A: IpAddress>(options: &Options, node: Option<&Node>) -> Vec<Network<A>> {
    match &options.detect_local {
        DetectLocal::ClusterCidr(cidrs) => networks(cidrs),
        DetectLocal::NodeCidr => node.map_or_else(Vec::new, |node| networks(&node.pod_cidrs)),
        DetectLocal::None | DetectLocal::BridgeInterface(_) | DetectLocal::InterfaceNamePrefix(_) => {
            Vec::new()
        }
    }
}

/// The own addresses that serve NodePorts (`NodePortAddresses` in Kubernetes' pkg/proxy/util/nodeport_addresses.go):
/// no list for a family means all of them, and loopback is never one, as in kube-proxy's nftables mode.
fn within<A: IpAddress>(own: &BTreeSet<A>, networks: &[Network<A>]) -> Vec<A> {
    let is_all = networks.is_empty() || networks.iter().any(|network| network.len == 0);
    let serves = |addr: &&A| {
        let ip = addr.to_ip();
        // The kernel gives every veth of a pod such an address: nobody means them, and they would be thousands.
        let is_link_local = matches!(ip, IpAddr::V6(ip) if Ipv6Addr::is_unicast_link_local(&ip));
        let is_named = networks.iter().any(|network| network.len > 0 && network.contains(**addr));
        !ip.is_loopback() && (is_named || (is_all && !is_link_local))
    };
    own.iter().filter(serves).copied().collect()
}
