//! From what should be to an ordered list of map changes: pure, incremental, and never half a service.
//!
//! An update costs in proportion to what has changed. What does not fit is kept aside and tried again when there is room.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    ops::Range,
};

use xdp_common::{
    gate::{address_bit, frontend_bit, service_network_bit, snat_bit},
    tables::{Backend, Frontend, FrontendKey, frontend, network::sources_of},
};

use self::{
    adopted::AdoptedRings,
    backends::Backends,
    gates::Gate,
    networks::NetworkTable,
    pass::Pass,
    refused::{Refused, Room},
    service::{Claims, Planned},
    slices::Slices,
};
pub use self::{
    change::{Adopted, Change, Fill, InUse, Limits, Update},
    slices::QUARANTINE_MS,
};
use crate::{
    cluster::wanted::{Delta, IpAddress, Network, ServicePortName},
    problem::{Problem, ProblemKind},
};

mod adopted;
mod backends;
mod change;
mod gates;
pub mod maglev;
mod networks;
mod pass;
mod refused;
mod rings;
mod service;
mod slices;
#[cfg(test)]
mod tests;

/// A frontend as the map holds it once the changes given out so far are applied.
#[derive(Clone, Copy, Debug)]
struct Placed {
    value: Frontend,
    owner: Owner,
}

/// Whose an entry in the map of frontends is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// A previous agent's.
    Adopted,
    /// A service port's, by its id.
    Service(u32),
    /// An address of Services as such.
    Address,
}

/// The state of the maps of one family as planned.
///
/// What is given up rests twice: until the next call, because only then its changes have surely been applied, and for
/// [`QUARANTINE_MS`] from there, because a program may still be running on what it read before.
#[derive(Debug)]
pub struct Plan<A> {
    limits: Limits,
    frontends: HashMap<FrontendKey<A>, Placed>,
    /// By service id.
    services: HashMap<u32, Planned<A>>,
    ids: HashMap<ServicePortName, u32>,
    /// Service ids given up in the current update, which are not given out in it.
    left_ids: HashSet<u32>,
    last_id: u32,
    /// Whose addresses as such are.
    addresses: HashMap<A, Claims>,
    backends: Backends<A>,
    slices: Slices,
    /// How many backends all rings together should have room for.
    ring_room: u64,
    /// Service ports with a ring that is smaller than it should be.
    reduced: u32,
    networks: NetworkTable<A>,
    /// Whether pods are known by their network.
    knows_pods: bool,
    ingress: Gate,
    egress: Gate,
    snat_addresses: BTreeSet<A>,
    refused: Refused<A>,
    /// Room that came since the refused were last tried.
    room: Room,
    adopted: AdoptedRings,
    /// Frontends of a previous agent that nobody has claimed.
    unclaimed: HashSet<FrontendKey<A>>,
    /// Whether everything wanted was known once, so that what nobody has claimed may go.
    is_complete: bool,
    /// Whether frontends of UDP have come that nobody has asked about.
    has_new_udp_frontends: bool,
}

impl<A: IpAddress> Plan<A> {
    /// A plan for empty maps.
    pub fn new(limits: Limits) -> Self {
        Self::adopt(limits, Adopted::default())
    }

    /// A plan for the maps of a previous agent: nothing of theirs changes until [`Plan::update`] says so. What the previous
    /// agent gave up may be used at once, because starting an agent takes longer than any run of a program.
    pub fn adopt(limits: Limits, found: Adopted<A>) -> Self {
        let (mut ingress, mut egress) = (Gate::new(found.ingress_gate), Gate::new(found.egress_gate));
        let mut slices = Slices::new(limits.ring_slots);
        let adopted = AdoptedRings::new(found.frontends.iter().map(|(_, value)| value), found.rings);
        adopted.ranges().for_each(|(offset, len)| slices.occupy(offset, len));
        let owners = found.backends.iter().map(|(_, backend)| backend.service);
        let services = owners.chain(found.frontends.iter().map(|(_, value)| value.service));
        let networks = NetworkTable::adopt(limits.networks, found.networks);
        let restricted = networks.owners().filter(|owner| owner & sources_of(0) != 0);
        let last_id = services.chain(restricted.map(|owner| owner & !sources_of(0))).max().unwrap_or(0);
        let backends = Backends::adopt(limits.backends, found.backends, &mut egress);
        let mut frontends = HashMap::with_capacity(found.frontends.len());
        for (key, value) in found.frontends {
            gate_bits(&key, &value).into_iter().for_each(|bit| ingress.need(bit));
            frontends.insert(key, Placed { value, owner: Owner::Adopted });
        }
        let unclaimed = frontends.keys().copied().collect();
        Self {
            limits,
            frontends,
            services: HashMap::new(),
            ids: HashMap::new(),
            left_ids: HashSet::new(),
            last_id,
            addresses: HashMap::new(),
            backends,
            slices,
            ring_room: 0,
            reduced: 0,
            networks,
            knows_pods: false,
            ingress,
            egress,
            snat_addresses: BTreeSet::new(),
            refused: Refused::new(),
            room: Room::default(),
            adopted,
            unclaimed,
            is_complete: false,
            has_new_udp_frontends: false,
        }
    }

    /// Plans the way from what is to what should be; `now_ms` is any clock that only grows. Once `is_complete` says that
    /// everything wanted has been given, what is left of a previous agent goes.
    pub fn update(
        &mut self,
        delta: &Delta<A>,
        is_complete: bool,
        snat_addresses: &[A],
        now_ms: u64,
    ) -> Update<A> {
        self.tick(now_ms);
        self.is_complete |= is_complete;
        self.set_snat_addresses(snat_addresses);
        let mut changes = Vec::new();
        let mut pass = Pass::default();
        if let Some(networks) = &delta.networks {
            self.networks.set_common(
                networks,
                &mut self.ingress,
                &mut pass.networks,
                &mut pass.left_networks,
            );
            self.set_knows_pods(!networks.pods.is_empty(), &mut pass);
        }
        self.note_wishes(delta);
        for (name, port) in &delta.ports {
            match port {
                Some(port) => self.apply(port, &mut pass),
                None => self.drop_service(name, &mut pass),
            }
        }
        self.leave_unclaimed(&mut pass);
        self.finish(pass, &mut changes);
        self.try_again(&mut changes);
        self.left_ids.clear();
        Update { changes, retry_in_ms: self.retry_in_ms() }
    }

    /// Frees what no flow uses any more, after a walk over the flow tables.
    pub fn collect(&mut self, in_use: &InUse, now_ms: u64) -> Update<A> {
        // What a previous agent's entries need is not known before.
        if !self.is_complete {
            return Update::default();
        }
        self.tick(now_ms);
        // A ring of the previous agent may name any backend, and what it names is not known.
        let may_free = self.adopted.is_empty();
        let mut changes = if may_free { self.backends.collect(in_use, &mut self.egress) } else { Vec::new() };
        self.room.backends |= !changes.is_empty();
        self.ingress.collect(&in_use.ingress_bits, in_use.started_ms);
        self.egress.collect(&in_use.egress_bits, in_use.started_ms);
        self.take_gates(&mut changes);
        let may_fit = self.room.backends && self.refused.waits_for_backends();
        Update { changes, retry_in_ms: if may_fit { Some(0) } else { self.retry_in_ms() } }
    }

    /// What does not fit as it should.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = self.refused.problems(self.fill(), self.limits);
        problems.extend(self.networks.problems().iter().cloned());
        if self.reduced > 0 {
            let message = format!(
                "{} service ports have fewer than {} ring slots per backend ({} of {} in use), so that shares of their \
                 backends may differ by up to a tenth; raise --max-ring-slots",
                self.reduced,
                maglev::SLOTS_PER_BACKEND,
                self.slices.used(),
                self.limits.ring_slots
            );
            problems.push(Problem::general(ProblemKind::RingsReduced, message));
        }
        problems
    }

    /// How full the maps are.
    pub fn fill(&self) -> Fill {
        Fill {
            frontends: self.frontends.len() as u32,
            backends: self.backends.count(),
            ring_slots: self.slices.used(),
            networks: self.networks.len() as u32,
        }
    }

    /// Service ports that are served.
    pub fn services(&self) -> usize {
        self.services.len()
    }

    /// Whether frontends of UDP have come since this was last asked, with the maps of a previous agent counted as known.
    pub fn take_new_udp_frontends(&mut self) -> bool {
        std::mem::take(&mut self.has_new_udp_frontends)
    }

    /// Every frontend as it should be, with the addresses as such; there must be no other.
    pub fn frontends(&self) -> impl Iterator<Item = (FrontendKey<A>, Frontend)> {
        self.frontends.iter().map(|(key, placed)| (*key, placed.value))
    }

    /// The NodePorts of this node, some more than once.
    pub fn node_ports(&self) -> impl Iterator<Item = u16> {
        let is_node_port = |flags| flags & frontend::NODE_PORT != 0;
        let placed = self.frontends.iter().filter(move |(_, placed)| is_node_port(placed.value.flags));
        placed.map(|(key, _)| u16::from_be_bytes(key.port))
    }

    /// Every backend slot that was ever used, of these ids; all others are zero.
    pub fn backends(&self, ids: Range<u32>) -> impl Iterator<Item = (u32, Backend<A>)> {
        self.backends.written(ids)
    }

    /// Every network with its owner and value; there must be no other.
    pub fn networks(&self) -> impl Iterator<Item = (u32, Network<A>, u32)> {
        self.networks.written()
    }

    /// Every word of the ingress gate.
    pub fn ingress_gate(&self) -> &[u64] {
        self.ingress.words()
    }

    /// Every word of the egress gate.
    pub fn egress_gate(&self) -> &[u64] {
        self.egress.words()
    }

    /// The rings of a part of the services with their first slots, computed one by one (they are too big to keep twice);
    /// `part` counts to `parts`.
    pub fn rings(&self, part: u32, parts: u32) -> impl Iterator<Item = (u32, Vec<u32>)> {
        let chosen = self.services.iter().filter(move |(id, _)| **id % parts == part);
        chosen.flat_map(|(id, planned)| planned.contents(*id, &self.backends))
    }

    /// The service id of a service port that is served.
    pub fn service_id(&self, name: &ServicePortName) -> Option<u32> {
        self.ids.get(name).copied()
    }

    /// Plans what did not fit before, as long as that leads anywhere.
    fn try_again(&mut self, changes: &mut Vec<Change<A>>) {
        let mut room = std::mem::take(&mut self.room);
        loop {
            let waiting = self.refused.len();
            let mut pass = Pass::default();
            for port in self.refused.worth_trying(room) {
                self.apply(&port, &mut pass);
            }
            self.finish(pass, changes);
            room = room.or(std::mem::take(&mut self.room));
            if self.refused.len() == waiting {
                return;
            }
        }
    }

    /// When a service port that did not fit may fit.
    fn retry_in_ms(&self) -> Option<u64> {
        (self.slices.is_resting() && self.refused.waits_for_rings()).then_some(QUARANTINE_MS)
    }

    fn tick(&mut self, now_ms: u64) {
        self.room.rings |= self.slices.tick(now_ms);
        self.backends.tick(now_ms);
        self.ingress.tick(now_ms);
        self.egress.tick(now_ms);
    }

    fn set_snat_addresses(&mut self, addresses: &[A]) {
        let addresses: BTreeSet<A> = addresses.iter().copied().collect();
        for &addr in addresses.difference(&self.snat_addresses) {
            self.ingress.need(snat_bit(addr));
        }
        for &addr in self.snat_addresses.difference(&addresses) {
            self.ingress.leave(snat_bit(addr));
        }
        self.snat_addresses = addresses;
    }

    fn take_gates(&mut self, changes: &mut Vec<Change<A>>) {
        let ingress = self.ingress.take_changes().into_iter();
        changes.extend(ingress.map(|(word, bits)| Change::IngressGate { word, bits }));
        let egress = self.egress.take_changes().into_iter();
        changes.extend(egress.map(|(word, bits)| Change::EgressGate { word, bits }));
    }
}

/// The bits of the ingress gate that an entry needs.
fn gate_bits<A: IpAddress>(key: &FrontendKey<A>, value: &Frontend) -> [u32; 2] {
    let bit = match value.flags & frontend::ADDRESS {
        0 => frontend_bit(key.addr, key.port, key.proto),
        _ => service_network_bit(key.addr.network()),
    };
    [bit, address_bit(key.addr)]
}
