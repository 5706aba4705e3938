//! The maps of the datapath in memory, so that the decision runs without a kernel.

use std::{
    cell::{Cell, RefCell, RefMut},
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Deref,
    rc::Rc,
};

use xdp_common::{
    frame::Packet,
    net::{Address, Family, FlowKey},
    tables::{
        Affinity, AffinityKey, Backend, BackendKey, Config, Device, Entry, Flow, Frontend, FrontendKey,
        GATE_WORDS, Insertion, Route, Table, Tables, Work, device,
    },
    verdict::{Counter, Event},
};

use crate::{
    cluster::wanted::{IpAddress, Network},
    plan::{Adopted, Change},
};

/// Index of the one interface there is.
pub(super) const UPLINK: u32 = 1;
/// Its MAC address.
pub(super) const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The MAC address of the gateway behind it.
const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

type Flows<A> = RefCell<HashMap<FlowKey<A>, Rc<Cell<Flow<A>>>>>;

/// The maps of one family, written by the plan's changes, and the flows that the decision makes.
pub(crate) struct Maps<A> {
    pub(super) frontends: BTreeMap<FrontendKey<A>, Frontend>,
    pub(super) backends: BTreeMap<u32, Backend<A>>,
    pub(super) rings: Vec<u32>,
    /// Networks by owner, and whether they are in or an exception.
    pub(super) networks: BTreeMap<u32, BTreeMap<Network<A>, bool>>,
    pub(super) ingress_gate: Vec<u64>,
    pub(super) egress_gate: Vec<u64>,
    /// Address of this node, for what is masqueraded.
    pub(super) snat: A,
    /// [`Config::direct`].
    pub(super) direct: u32,
    established: Flows<A>,
    embryonic: Flows<A>,
    /// Bits of the keys that the established table may hold.
    known: RefCell<BTreeSet<u32>>,
    affinities: RefCell<HashMap<AffinityKey<A>, Affinity>>,
    events: RefCell<Vec<Event>>,
    /// The ring slot that was asked for last, and the backend id to answer with.
    asked_slot: Cell<Option<u32>>,
    answer: Cell<Option<u32>>,
    work: RefCell<Work<A>>,
}

/// An entry that shares its place with the table; it is read as it was when it was found.
pub(crate) struct Live<A>(Rc<Cell<Flow<A>>>, Flow<A>);

impl<A> Deref for Live<A> {
    type Target = Flow<A>;

    fn deref(&self) -> &Flow<A> {
        &self.1
    }
}

impl<A: Address> Entry<A> for Live<A> {
    fn set_seen(&self, clock: u32) {
        self.0.set(Flow { seen: clock, ..self.0.get() });
    }

    fn set_replied(&self) {
        self.0.set(Flow { replied: 1, ..self.0.get() });
    }

    fn set_closing(&self, bits: u8) {
        self.0.set(Flow { closing: bits, ..self.0.get() });
    }
}

impl<A: IpAddress> Maps<A> {
    /// Empty maps of a node with this address.
    pub(super) fn new(snat: A, direct: u32) -> Self {
        Self {
            frontends: BTreeMap::new(),
            backends: BTreeMap::new(),
            rings: Vec::new(),
            networks: BTreeMap::new(),
            ingress_gate: vec![0; GATE_WORDS as usize],
            egress_gate: vec![0; GATE_WORDS as usize],
            snat,
            direct,
            established: Flows::default(),
            embryonic: Flows::default(),
            known: RefCell::default(),
            affinities: RefCell::default(),
            events: RefCell::default(),
            asked_slot: Cell::new(None),
            answer: Cell::new(None),
            work: RefCell::new(Work { flow: Flow::ZERO, reply: Flow::ZERO, other_key: FlowKey::ZERO }),
        }
    }

    /// Maps as they are found.
    pub(super) fn of(found: Adopted<A>, snat: A, direct: u32) -> Self {
        let mut networks = BTreeMap::<u32, BTreeMap<Network<A>, bool>>::new();
        for (owner, network, value) in found.networks {
            networks.entry(owner).or_default().insert(network, value != 0);
        }
        Self {
            frontends: found.frontends.into_iter().collect(),
            backends: found.backends.into_iter().collect(),
            rings: found.rings,
            networks,
            ingress_gate: found.ingress_gate,
            egress_gate: found.egress_gate,
            ..Self::new(snat, direct)
        }
    }

    /// Makes one change of a plan.
    pub(super) fn apply(&mut self, change: Change<A>) {
        match change {
            Change::Backend { id, value } if value.proto == 0 => drop(self.backends.remove(&id)),
            Change::Backend { id, value } => drop(self.backends.insert(id, value)),
            Change::Ring { offset, slots } => self.write_ring(offset, &slots),
            Change::IngressGate { word, bits } => self.ingress_gate[word as usize] = bits,
            Change::EgressGate { word, bits } => self.egress_gate[word as usize] = bits,
            Change::Frontend { key, value } => drop(self.frontends.insert(key, value)),
            Change::RemoveFrontend { key } => drop(self.frontends.remove(&key)),
            Change::Network { owner, network, value: Some(value) } => {
                self.networks.entry(owner).or_default().insert(network, value != 0);
            }
            Change::Network { owner, network, value: None } => {
                self.networks.entry(owner).or_default().remove(&network);
            }
        }
    }

    /// Writes ring slots from an offset on.
    pub(super) fn write_ring(&mut self, offset: u32, slots: &[u32]) {
        let (start, end) = (offset as usize, offset as usize + slots.len());
        if self.rings.len() < end {
            self.rings.resize(end, 0);
        }
        self.rings[start..end].copy_from_slice(slots);
    }

    /// The different backend ids in the ring that holds a slot, of the two that a frontend has.
    pub(super) fn ring_of(&self, frontend: &Frontend, slot: u32) -> BTreeSet<u32> {
        let rings = [(frontend.ring, frontend.slots), (frontend.inner_ring, frontend.inner_slots)];
        let ring =
            rings.into_iter().find(|(start, len)| (*start..start.saturating_add(*len)).contains(&slot));
        ring.map(|(start, len)| self.ring_ids(start, len)).unwrap_or_default()
    }

    /// The different backend ids in a ring.
    pub(super) fn ring_ids(&self, start: u32, len: u32) -> BTreeSet<u32> {
        (start..start.saturating_add(len)).map(|slot| self.slot(slot)).collect()
    }

    /// Lets every ring lookup from here on answer with one backend id, or again with what the ring holds.
    pub(super) fn answer_with(&self, id: Option<u32>) {
        self.answer.set(id);
    }

    /// The ring slot that the decision has asked for since the last call.
    pub(super) fn take_asked_slot(&self) -> Option<u32> {
        self.asked_slot.take()
    }

    /// What has been counted since the last call, but drops.
    pub(super) fn take_events(&self) -> Vec<Event> {
        self.events.take()
    }

    /// Takes the new flows out, and forgets every flow and client.
    pub(super) fn take_flows(&self) -> Vec<(FlowKey<A>, Flow<A>)> {
        self.affinities.take();
        self.established.take();
        self.embryonic.take().into_iter().map(|(key, flow)| (key, flow.get())).collect()
    }

    fn slot(&self, slot: u32) -> u32 {
        self.rings.get(slot as usize).copied().unwrap_or(0)
    }

    fn flows(&self, table: Table) -> &Flows<A> {
        match table {
            Table::Established => &self.established,
            Table::Embryonic => &self.embryonic,
        }
    }
}

impl<'a, F: Family<Addr: IpAddress>> Tables<F> for &'a Maps<F::Addr> {
    type Entry = Live<F::Addr>;
    type Work = RefMut<'a, Work<F::Addr>>;

    fn config(self) -> Config {
        Config {
            epoch: 1,
            clock: 1,
            snat_port_min: 32_768,
            snat_port_max: 65_535,
            embryonic_buckets: 1,
            established_homes: 1,
            // Answers are by the rules of Services, not by what a wire needs beside them.
            masquerade_wire: 0,
            policy_routing: 0,
            echo: 1,
            direct: self.direct,
        }
    }

    fn routing_tag(self, _: u32) -> u32 {
        1
    }

    fn ingress_gate(self, word: u32) -> u64 {
        self.ingress_gate.get(word as usize).copied().unwrap_or(u64::MAX)
    }

    fn egress_gate(self, word: u32) -> u64 {
        self.egress_gate.get(word as usize).copied().unwrap_or(u64::MAX)
    }

    fn work(self) -> Option<Self::Work> {
        self.work.try_borrow_mut().ok()
    }

    fn may_know(self, bit: u32) -> bool {
        self.known.borrow().contains(&bit)
    }

    fn note_known(self, bit: u32) {
        self.known.borrow_mut().insert(bit);
    }

    fn flow(self, table: Table, key: &FlowKey<F::Addr>) -> Option<Self::Entry> {
        self.flows(table).borrow().get(key).map(|place| Live(Rc::clone(place), place.get()))
    }

    fn insert(self, key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) -> Insertion {
        let mut flows = self.embryonic.borrow_mut();
        if flows.contains_key(key) {
            return Insertion::Exists;
        }
        flows.insert(*key, Rc::new(Cell::new(*flow)));
        Insertion::Done
    }

    fn store(self, table: Table, key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) -> bool {
        self.flows(table).borrow_mut().insert(*key, Rc::new(Cell::new(*flow)));
        true
    }

    fn remove(self, table: Table, key: &FlowKey<F::Addr>) {
        self.flows(table).borrow_mut().remove(key);
    }

    fn frontend(self, key: &FrontendKey<F::Addr>) -> Option<Frontend> {
        self.frontends.get(key).copied()
    }

    fn ring(self, slot: u32) -> u32 {
        self.asked_slot.set(Some(slot));
        self.answer.get().unwrap_or_else(|| self.slot(slot))
    }

    fn backend(self, id: u32) -> Option<Backend<F::Addr>> {
        self.backends.get(&id).copied().filter(|backend| backend.proto != 0)
    }

    fn network(self, owner: u32, addr: F::Addr) -> bool {
        let networks = self.networks.get(&owner).into_iter().flatten();
        let longest =
            networks.filter(|(network, _)| network.contains(addr)).max_by_key(|(network, _)| network.len);
        longest.is_some_and(|(_, is_in)| *is_in)
    }

    fn affinity(self, key: &AffinityKey<F::Addr>) -> Option<Affinity> {
        self.affinities.borrow().get(key).copied()
    }

    fn set_affinity(self, key: &AffinityKey<F::Addr>, affinity: &Affinity) -> bool {
        self.affinities.borrow_mut().insert(*key, *affinity);
        true
    }

    fn account(self, _service: u32, _bytes: u16) {}

    fn device(self, ifindex: u32) -> Option<Device<F::Addr>> {
        (ifindex == UPLINK).then_some(Device {
            snat: self.snat,
            flags: device::TRANSMIT | device::REDIRECT | device::ETHERNET,
            mtu: 1500,
            mac: UPLINK_MAC,
            zero: [0; 2],
        })
    }

    fn route(self, _ifindex: u32, _src: F::Addr, _dst: F::Addr, _tos: u8, _proto: u8) -> Route {
        Route::Hop { ifindex: UPLINK, dmac: GATEWAY_MAC, smac: UPLINK_MAC, mtu: 1500 }
    }

    fn source(self, _packet: &Packet<F::Addr>, _ifindex: u32, _dst: F::Addr) -> Option<F::Addr> {
        None
    }

    fn count(self, counter: Counter) {
        match counter {
            Counter::Event(event) => self.events.borrow_mut().push(event),
            Counter::Drop(_) | Counter::SnatAttempt(_) => {}
        }
    }

    fn count_exhausted(self, _backend: &BackendKey<F::Addr>) {}
}
