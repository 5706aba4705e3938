//! One service port: what it needs in the maps.

use std::{collections::BTreeMap, sync::Arc};

use xdp_common::tables::{Frontend, FrontendKey, backend, frontend};

use super::{
    backends::{Backends, Identity},
    maglev::{self, Member},
    slices::Slice,
};
use crate::cluster::wanted::{DesiredFrontend, Endpoint, FrontendKind, IpAddress, Policy, ServicePort};

/// Both lists, in the order in which their rings are made.
pub(super) const POLICIES: [Policy; 2] = [Policy::Cluster, Policy::Local];

/// A service port as it is in the maps once the changes given out so far are applied.
#[derive(Debug)]
pub(super) struct Planned<A> {
    /// What it was planned from.
    pub(super) port: Arc<ServicePort<A>>,
    pub(super) rings: Rings,
}

/// The rings of the lists in use; the same one twice when their lists are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rings {
    cluster: Slice,
    local: Slice,
}

impl Rings {
    pub(super) fn of(&self, policy: Policy) -> Slice {
        match policy {
            Policy::Cluster => self.cluster,
            Policy::Local => self.local,
        }
    }

    pub(super) fn set(&mut self, policy: Policy, slice: Slice) {
        match policy {
            Policy::Cluster => self.cluster = slice,
            Policy::Local => self.local = slice,
        }
    }

    /// Every ring once, with the list that it is of.
    pub(super) fn each(self) -> impl Iterator<Item = (Policy, Slice)> {
        let is_shared = self.local == self.cluster;
        POLICIES
            .into_iter()
            .map(move |policy| (policy, self.of(policy)))
            .filter(move |(policy, slice)| slice.slots > 0 && !(is_shared && *policy == Policy::Local))
    }
}

impl<A: IpAddress> Planned<A> {
    /// The value of one of its frontends; `knows_pods` says whether pods are told from other clients by their network.
    pub(super) fn frontend(&self, id: u32, wanted: &DesiredFrontend<A>, knows_pods: bool) -> Frontend {
        let (outer, inner) = (self.rings.of(wanted.external), self.rings.of(wanted.internal));
        let masquerade = wanted.masquerade;
        let treats_pods_otherwise =
            masquerade.pod != masquerade.external || wanted.internal != wanted.external;
        let flags = [
            (wanted.is_node_address, frontend::NODE_ADDRESS),
            (wanted.kind == FrontendKind::NodePort, frontend::NODE_PORT),
            (self.port.any_endpoint, frontend::HAS_ENDPOINTS),
            (wanted.is_restricted, frontend::RESTRICTED),
            (treats_pods_otherwise && knows_pods, frontend::DISTINGUISHES_PODS),
            (masquerade.external, frontend::MASQUERADE_EXTERNAL),
            (masquerade.pod, frontend::MASQUERADE_POD),
            (masquerade.host, frontend::MASQUERADE_HOST),
            (wanted.external == Policy::Local, frontend::LOCAL),
            (wanted.internal == Policy::Local, frontend::INNER_LOCAL),
        ];
        Frontend {
            service: id,
            ring: outer.offset,
            slots: outer.slots,
            inner_ring: inner.offset,
            inner_slots: inner.slots,
            flags: flags.into_iter().filter(|(is_set, _)| *is_set).fold(0, |all, (_, flag)| all | flag),
            affinity_seconds: self.port.affinity_seconds,
        }
    }

    /// Whether a ring is smaller than it should be.
    pub(super) fn is_reduced(&self) -> bool {
        self.rings.each().any(|(policy, slice)| {
            slice.slots < maglev::slots(list(&self.port, policy).len(), maglev::SLOTS_PER_BACKEND)
        })
    }

    /// Every ring with its first slot.
    pub(super) fn contents(&self, id: u32, backends: &Backends<A>) -> impl Iterator<Item = (u32, Vec<u32>)> {
        self.rings.each().filter_map(move |(policy, slice)| {
            Some((slice.offset, content(&self.port, policy, slice.slots, id, backends)?))
        })
    }
}

/// The key of a frontend.
pub(super) fn key<A: IpAddress>(port: &ServicePort<A>, frontend: &DesiredFrontend<A>) -> FrontendKey<A> {
    let proto = port.name.protocol.number();
    FrontendKey { addr: frontend.addr, port: frontend.port.to_be_bytes(), proto, zero: 0 }
}

/// Under which an address stands as such.
pub(super) fn address_key<A: IpAddress>(addr: A) -> FrontendKey<A> {
    FrontendKey { addr, port: [0; 2], proto: 0, zero: 0 }
}

/// How many service ports have frontends at an address that is none of the node's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Claims {
    all: u32,
    /// Those whose ClusterIP it is.
    cluster_ips: u32,
}

impl Claims {
    pub(super) fn add(&mut self, is_cluster_ip: bool) {
        self.all += 1;
        self.cluster_ips += u32::from(is_cluster_ip);
    }

    pub(super) fn remove(&mut self, is_cluster_ip: bool) {
        self.all -= 1;
        self.cluster_ips -= u32::from(is_cluster_ip);
    }

    pub(super) fn is_none(self) -> bool {
        self.all == 0
    }

    /// The value of the address as such. The other ports of an external address are somebody else's, perhaps.
    pub(super) fn value(self) -> Frontend {
        let flags = if self.cluster_ips > 0 { frontend::ADDRESS } else { frontend::ECHO };
        Frontend { service: 0, ring: 0, slots: 0, inner_ring: 0, inner_slots: 0, flags, affinity_seconds: 0 }
    }
}

/// The addresses of a service that are none of the node's own, and whether each is a ClusterIP.
pub(super) fn addresses<A: IpAddress>(port: &ServicePort<A>) -> BTreeMap<A, bool> {
    let mut addresses = BTreeMap::new();
    let is_own =
        |frontend: &&DesiredFrontend<A>| frontend.is_node_address || frontend.kind == FrontendKind::NodePort;
    for frontend in port.frontends.iter().filter(|frontend| !is_own(frontend)) {
        *addresses.entry(frontend.addr).or_default() |= frontend.kind == FrontendKind::ClusterIp;
    }
    addresses
}

/// The endpoints that a policy chooses from, if a frontend asks for them.
pub(super) fn list<A: IpAddress>(port: &ServicePort<A>, policy: Policy) -> &[Endpoint<A>] {
    let is_used = port.frontends.iter().any(|f| f.external == policy || f.internal == policy);
    match policy {
        Policy::Cluster if is_used => &port.cluster,
        Policy::Local if is_used => &port.local,
        Policy::Cluster | Policy::Local => &[],
    }
}

/// Whether two lists name the same addresses and ports, so that one ring serves for both.
pub(super) fn is_same<A: IpAddress>(one: &[Endpoint<A>], other: &[Endpoint<A>]) -> bool {
    let place = |endpoint: &Endpoint<A>| (endpoint.addr, endpoint.port);
    one.len() == other.len() && one.iter().map(place).eq(other.iter().map(place))
}

/// How many backends its rings have to have room for.
pub(super) fn room<A: IpAddress>(port: &ServicePort<A>) -> u64 {
    let (cluster, local) = (list(port, Policy::Cluster), list(port, Policy::Local));
    let local = if is_same(cluster, local) { 0 } else { local.len() };
    [cluster.len(), local].into_iter().filter(|len| *len > 1).map(|len| u64::from(maglev::room(len))).sum()
}

/// What an endpoint is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Use<A> {
    /// Flags of its backend.
    pub(super) flags: u8,
    /// Address of its node, as in [`Endpoint::node`].
    pub(super) node: A,
}

/// Every endpoint with the flags of its backend; those without a list serve flows that they have, and get no others.
pub(super) fn endpoints<A: IpAddress>(port: &ServicePort<A>) -> BTreeMap<(A, u16), Use<A>> {
    let lists = [
        (list(port, Policy::Cluster), backend::IN_CLUSTER_LIST),
        (list(port, Policy::Local), backend::IN_LOCAL_LIST),
        (&port.serving, 0),
    ];
    let mut endpoints = BTreeMap::new();
    for (list, flag) in lists {
        for endpoint in list {
            let at = (endpoint.addr, endpoint.port);
            let used = endpoints.entry(at).or_insert(Use { flags: 0, node: endpoint.node });
            used.flags |= flag | if endpoint.local { backend::LOCAL } else { 0 };
        }
    }
    endpoints
}

/// What stands for an endpoint of a service port.
pub(super) fn identity<A: IpAddress>(
    port: &ServicePort<A>,
    service: u32,
    (addr, number): (A, u16),
) -> Identity<A> {
    Identity { service, addr, port: number, proto: port.name.protocol.number() }
}

/// The ring of a list, unless one of its endpoints has no id.
pub(super) fn content<A: IpAddress>(
    port: &ServicePort<A>,
    policy: Policy,
    slots: u32,
    id: u32,
    backends: &Backends<A>,
) -> Option<Vec<u32>> {
    let member = |endpoint: &Endpoint<A>| {
        let identity = identity(port, id, (endpoint.addr, endpoint.port));
        Some(Member { addr: endpoint.addr, port: endpoint.port, id: backends.serving_id(&identity)? })
    };
    let members: Option<Vec<_>> = list(port, policy).iter().map(member).collect();
    Some(maglev::ring(&members?, port.name.protocol.number(), slots))
}

/// The sizes that the ring of so many backends may have, largest first.
pub(super) fn sizes(backends: usize) -> impl Iterator<Item = u32> {
    let per_backend = std::iter::once(maglev::SLOTS_PER_BACKEND).chain(maglev::SCARCE_SLOTS_PER_BACKEND);
    per_backend.map(move |per_backend| maglev::slots(backends, per_backend))
}
