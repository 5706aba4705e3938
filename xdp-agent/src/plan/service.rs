//! One service port in the plan: its rings, its backends and the values of its frontends.

use std::sync::Arc;

use xdp_common::tables::{Frontend, FrontendKey, frontend};

use super::{
    Addr, Refusal,
    backends::Backends,
    maglev::{self, Member},
    slices::Slices,
};
use crate::cluster::{DesiredFrontend, Endpoint, Policy, ServicePort, ServicePortName};

/// A service port as it is in the maps once the changes given out so far are applied.
#[derive(Debug)]
pub(super) struct Planned {
    /// Service id; 0 until it has one.
    pub(super) id: u32,
    /// What it was planned from.
    pub(super) port: Arc<ServicePort>,
    /// Number of the last update that wanted it.
    pub(super) round: u64,
    /// Whether a later wish did not fit.
    pub(super) is_behind: bool,
    /// Rings of the lists in use; one serves both policies when their lists are the same.
    rings: Vec<Ring>,
    /// Backends that no list names but that still serve: their flows stay.
    kept: Vec<(u32, bool)>,
}

/// A ring and what it is made of.
#[derive(Debug)]
struct Ring {
    offset: u32,
    slots: u32,
    /// Endpoints with their backend ids, sorted.
    members: Vec<(Endpoint, u32)>,
    /// Whether its slice was taken over from the planned state before.
    is_reused: bool,
}

/// The key of a frontend; this version serves clients outside the cluster.
pub(super) fn key(name: &ServicePortName, frontend: &DesiredFrontend) -> FrontendKey<Addr> {
    FrontendKey {
        addr: frontend.addr,
        port: frontend.port.to_be_bytes(),
        proto: name.protocol.number(),
        zero: 0,
    }
}

impl Ring {
    fn slots(&self, proto: u8) -> Vec<u32> {
        let member =
            |&(endpoint, id): &(Endpoint, u32)| Member { addr: endpoint.addr, port: endpoint.port, id };
        maglev::ring(&self.members.iter().map(member).collect::<Vec<_>>(), proto)
    }

    fn is_of(&self, list: &[Endpoint]) -> bool {
        let same =
            |(one, _): &(Endpoint, u32), other: &Endpoint| (one.addr, one.port) == (other.addr, other.port);
        self.members.len() == list.len() && self.members.iter().zip(list).all(|(one, other)| same(one, other))
    }
}

impl Planned {
    /// Takes what a service port needs, from the state before where nothing changed; on refusal nothing is taken.
    pub(super) fn build(
        port: &Arc<ServicePort>,
        before: Option<&Self>,
        backends: &mut Backends,
        slices: &mut Slices,
    ) -> Result<Self, Refusal> {
        let (rings, kept) = (Vec::new(), Vec::new());
        let mut new = Self { id: 0, port: Arc::clone(port), round: 0, is_behind: false, rings, kept };
        let proto = port.name.protocol.number();
        for policy in [Policy::Cluster, Policy::Local] {
            let list = endpoints(port, policy);
            let is_used = port.frontends.iter().any(|frontend| frontend.policy == policy);
            if !is_used || list.is_empty() || new.ring(list).is_some() {
                continue;
            }
            let reused = before.and_then(|before| before.ring(list));
            if let Err(why) = new.add_ring(list, reused, proto, backends, slices) {
                new.undo(backends, slices);
                return Err(why);
            }
        }
        for endpoint in &port.serving {
            if let Some(id) = backends.acquire_known(endpoint, proto) {
                new.kept.push((id, endpoint.local));
            }
        }
        Ok(new)
    }

    fn add_ring(
        &mut self,
        list: &[Endpoint],
        reused: Option<&Ring>,
        proto: u8,
        backends: &mut Backends,
        slices: &mut Slices,
    ) -> Result<(), Refusal> {
        let mut ring =
            Ring { offset: 0, slots: 0, members: Vec::with_capacity(list.len()), is_reused: false };
        for endpoint in list {
            let Some(id) = backends.acquire(endpoint, proto) else {
                // Without slots the ring gives back only its backends.
                self.rings.push(ring);
                return Err(Refusal::Backends { wanted: list.len() });
            };
            ring.members.push((*endpoint, id));
        }
        if let Some(reused) = reused {
            (ring.offset, ring.slots, ring.is_reused) = (reused.offset, reused.slots, true);
            self.rings.push(ring);
            return Ok(());
        }
        let wanted = maglev::slots(list.len());
        let offset = slices.allocate(wanted);
        if let Some(offset) = offset {
            (ring.offset, ring.slots) = (offset, wanted);
        }
        self.rings.push(ring);
        offset.map(|_| ()).ok_or(Refusal::Rings { wanted })
    }

    /// The ring of a list, if it has one.
    fn ring(&self, list: &[Endpoint]) -> Option<&Ring> {
        self.rings.iter().find(|ring| ring.is_of(list))
    }

    /// Rings that have to be written, each with its first slot.
    pub(super) fn new_rings(&self) -> impl Iterator<Item = (u32, Vec<u32>)> {
        self.rings.iter().filter(|ring| !ring.is_reused).map(|ring| (ring.offset, ring.slots(self.proto())))
    }

    /// Every ring, each with its first slot.
    pub(super) fn rings(&self) -> impl Iterator<Item = (u32, Vec<u32>)> {
        self.rings.iter().map(|ring| (ring.offset, ring.slots(self.proto())))
    }

    /// The value of one of its frontends.
    pub(super) fn frontend(&self, wanted: &DesiredFrontend) -> Frontend {
        let list = endpoints(&self.port, wanted.policy);
        let (ring, slots) = self.ring(list).map_or((0, 0), |ring| (ring.offset, ring.slots));
        let mut flags = frontend::MASQUERADE_EXTERNAL | frontend::MASQUERADE_POD | frontend::MASQUERADE_HOST;
        if wanted.node_address {
            flags |= frontend::NODE_ADDRESS;
        }
        if list.is_empty() && self.port.any_endpoint {
            flags |= frontend::HAS_ENDPOINTS;
        }
        Frontend {
            service: self.id,
            ring,
            slots,
            inner_ring: ring,
            inner_slots: slots,
            flags,
            affinity_seconds: 0,
        }
    }

    /// Gives everything back but the slices that `after` goes on with.
    pub(super) fn release(self, after: Option<&Self>, backends: &mut Backends, slices: &mut Slices) {
        for ring in &self.rings {
            let goes_on = after.is_some_and(|after| {
                after.rings.iter().any(|new| new.is_reused && new.offset == ring.offset)
            });
            if !goes_on {
                slices.release(ring.offset, ring.slots);
            }
        }
        self.release_backends(backends);
    }

    /// Gives everything back of a state that was never given out.
    fn undo(self, backends: &mut Backends, slices: &mut Slices) {
        for ring in self.rings.iter().filter(|ring| !ring.is_reused && ring.slots > 0) {
            slices.undo(ring.offset, ring.slots);
        }
        self.release_backends(backends);
    }

    fn release_backends(&self, backends: &mut Backends) {
        for (endpoint, id) in self.rings.iter().flat_map(|ring| &ring.members) {
            backends.release(*id, endpoint.local);
        }
        for &(id, local) in &self.kept {
            backends.release(id, local);
        }
    }

    fn proto(&self) -> u8 {
        self.port.name.protocol.number()
    }
}

/// The endpoints that a policy chooses from.
fn endpoints(port: &ServicePort, policy: Policy) -> &[Endpoint] {
    match policy {
        Policy::Cluster => &port.cluster,
        Policy::Local => &port.local,
    }
}
