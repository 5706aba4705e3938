//! The tables as ordinary maps, and a wire on which packets are sent and translated.

use std::{
    cell::{Cell, RefCell, RefMut},
    collections::{HashMap, HashSet},
    ops::Deref,
    rc::Rc,
};

use xdp_common::{
    checksum,
    decide::{self, Hook},
    fragment::{FragmentKey, FragmentPorts},
    frame::{Packet, tcp},
    gate,
    net::{Address, Family, FlowKey, TCP, UDP, V4},
    select,
    tables::{
        Affinity, AffinityKey, Backend, BackendKey, Config, Device, Entry, Flow, Frontend, FrontendKey,
        Insertion, Route, Table, Tables, Work, backend, device, frontend,
    },
    verdict::{Action, Counter, Event, Reason, Rewrite, Verdict},
};

#[path = "fragment_table.rs"] // as below
mod fragment_table;
#[path = "told.rs"] // the lane that shares this file looks elsewhere
mod told;

use told::Told;

pub(crate) type Addr = [u8; 4];
pub(crate) type Key = FlowKey<Addr>;
/// Address, port and protocol of a frontend.
pub(crate) type Place<A = Addr> = (A, [u8; 2], u8);
type Flows<A> = RefCell<HashMap<FlowKey<A>, Rc<Cell<Flow<A>>>>>;

pub(crate) const CLIENT: Addr = [198, 51, 100, 2];
pub(crate) const VIP: Addr = [203, 0, 113, 10];
pub(crate) const VIP_TOO: Addr = [203, 0, 113, 20];
pub(crate) const NODE: Addr = [192, 168, 50, 10];
pub(crate) const LOCAL: Addr = [10, 244, 1, 2];
pub(crate) const REMOTE: Addr = [10, 244, 2, 2];
pub(crate) const REMOTE_TOO: Addr = [10, 244, 2, 3];
pub(crate) const HTTP: [u8; 2] = [0, 80];
pub(crate) const TARGET: [u8; 2] = [0x1f, 0x90]; // 8080
/// The cookie of the node's own network namespace.
pub(crate) const HOST_NAMESPACE: u64 = 1;
pub(crate) const UPLINK: u32 = 2;
pub(crate) const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub(crate) const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// The maps of a node.
pub(crate) struct Model<F: Family = V4> {
    pub(crate) config: Cell<Config>,
    pub(crate) established: Flows<F::Addr>,
    pub(crate) embryonic: Flows<F::Addr>,
    pub(crate) known: RefCell<HashSet<u32>>,
    pub(crate) established_max: Cell<usize>,
    pub(crate) frontends: RefCell<HashMap<Place<F::Addr>, Frontend>>,
    pub(crate) rings: RefCell<Vec<u32>>,
    pub(crate) backends: RefCell<Vec<Backend<F::Addr>>>,
    pub(crate) devices: RefCell<HashMap<u32, Device<F::Addr>>>,
    pub(crate) route: Cell<Route>,
    pub(crate) routes: RefCell<HashMap<F::Addr, Route>>,
    pub(crate) refuse: Cell<u32>,
    pub(crate) fragments: RefCell<HashMap<FragmentKey<F::Addr>, FragmentPorts>>,
    /// Whether every key is another flow's, and which were asked for.
    pub(crate) taken: Cell<bool>,
    pub(crate) asked: RefCell<HashSet<FlowKey<F::Addr>>>,
    /// Single addresses that are in the networks of an owner.
    pub(crate) networks: RefCell<HashSet<(u32, F::Addr)>>,
    /// Addresses of devices in several networks, by destination.
    pub(crate) sources: RefCell<HashMap<F::Addr, F::Addr>>,
    pub(crate) affinities: RefCell<HashMap<AffinityKey<F::Addr>, Affinity>>,
    /// Affinity of the frontends that are added from here on.
    pub(crate) affinity_seconds: Cell<u32>,
    /// Packets and bytes by service id.
    pub(crate) accounts: RefCell<HashMap<u32, (u64, u64)>>,
    pub(crate) exhausted: RefCell<HashMap<BackendKey<F::Addr>, u64>>,
    pub(crate) counters: RefCell<HashMap<u32, u64>>,
    /// What sockets know and have been told.
    pub(crate) sockets: Told,
    ingress_gate: RefCell<HashMap<u32, u64>>,
    egress_gate: RefCell<HashMap<u32, u64>>,
    work: RefCell<Work<F::Addr>>,
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

impl Model {
    /// A node with one uplink and a gateway; no services.
    pub(crate) fn new() -> Self {
        Self::of(NODE)
    }

    /// A packet through XDP and, where it goes up and is routed, through tc egress; a reply of the backend on this node
    /// through tc egress alone. Returns the packet that leaves.
    pub(crate) fn through(&self, packet: &Packet<Addr>) -> Packet<Addr> {
        if packet.key.src == LOCAL {
            return rewritten(packet, &self.egress(packet));
        }
        let first = self.xdp(packet);
        let half = rewritten(packet, &first);
        match first.action {
            Action::Transmit | Action::Redirect => half,
            Action::Stack => rewritten(&half, &self.egress(&half)),
            Action::Pass | Action::Tunnel | Action::Drop(_) | Action::Reject(_) => {
                panic!("not forwarded: {:?}", first.action)
            }
        }
    }
}

impl<F: Family> Model<F> {
    /// The same at another address.
    pub(crate) fn of(node: F::Addr) -> Self {
        let uplink = Device {
            snat: node,
            flags: device::TRANSMIT | device::REDIRECT | device::ETHERNET,
            mtu: 1500,
            mac: OUR_MAC,
            zero: [0; 2],
        };
        let model = Self {
            config: Cell::new(Config {
                epoch: 1,
                clock: 100,
                snat_port_min: 1024,
                snat_port_max: 29_999,
                embryonic_buckets: 1,
                established_homes: 1,
                masquerade_wire: 0,
                policy_routing: 0,
                echo: 1,
                direct: 0,
            }),
            established: Flows::<F::Addr>::default(),
            embryonic: Flows::<F::Addr>::default(),
            known: RefCell::default(),
            established_max: Cell::new(usize::MAX),
            frontends: RefCell::default(),
            rings: RefCell::default(),
            backends: RefCell::new(vec![Backend {
                addr: F::Addr::UNSPECIFIED,
                port: [0; 2],
                proto: 0,
                flags: 0,
                generation: 0,
                service: 0,
                node: F::Addr::UNSPECIFIED,
            }]),
            devices: RefCell::new(HashMap::from([(UPLINK, uplink)])),
            route: Cell::new(gateway()),
            routes: RefCell::default(),
            refuse: Cell::new(0),
            fragments: RefCell::default(),
            taken: Cell::new(false),
            asked: RefCell::default(),
            networks: RefCell::default(),
            sources: RefCell::default(),
            affinities: RefCell::default(),
            affinity_seconds: Cell::new(0),
            accounts: RefCell::default(),
            exhausted: RefCell::default(),
            counters: RefCell::default(),
            sockets: Told::default(),
            ingress_gate: RefCell::default(),
            egress_gate: RefCell::default(),
            work: RefCell::new(Work { flow: Flow::ZERO, reply: Flow::ZERO, other_key: FlowKey::ZERO }),
        };
        open(&model.ingress_gate, gate::snat_bit(node));
        model
    }

    /// Adds a backend and returns its id.
    pub(crate) fn backend(&self, addr: F::Addr, proto: u8, is_local: bool) -> u32 {
        let lists = backend::IN_CLUSTER_LIST | backend::IN_LOCAL_LIST;
        let flags = if is_local { backend::LOCAL | lists } else { backend::IN_CLUSTER_LIST };
        let id = self.backends.borrow().len() as u32;
        let node = F::Addr::UNSPECIFIED;
        self.set_backend(id, Backend { addr, port: TARGET, proto, flags, generation: 1, service: 1, node });
        id
    }

    /// Makes an address a frontend whose ring holds these backends in turn.
    pub(crate) fn frontend(&self, addr: F::Addr, proto: u8, backends: &[u32], flags: u32) {
        let mut rings = self.rings.borrow_mut();
        let ring = rings.len() as u32;
        rings.extend(backends);
        let slots = backends.len() as u32;
        let flags = flags | frontend::MASQUERADE_EXTERNAL | frontend::MASQUERADE_HOST;
        let frontend = Frontend {
            service: 1,
            ring,
            slots,
            inner_ring: ring,
            inner_slots: slots,
            flags,
            affinity_seconds: self.affinity_seconds.get(),
        };
        self.set_frontend((addr, HTTP, proto), frontend);
    }

    /// Makes a place a frontend, and opens the gate for it.
    pub(crate) fn set_frontend(&self, place: Place<F::Addr>, frontend: Frontend) {
        let (addr, port, proto) = place;
        self.frontends.borrow_mut().insert(place, frontend);
        open(&self.ingress_gate, gate::frontend_bit(addr, port, proto));
        open(&self.ingress_gate, gate::address_bit(addr));
    }

    /// Writes what stands for an address as such.
    pub(crate) fn address(&self, addr: F::Addr, value: Frontend) {
        self.frontends.borrow_mut().insert((addr, [0; 2], 0), value);
        open(&self.ingress_gate, gate::frontend_bit(addr, [0; 2], 0));
    }

    /// Writes a backend under an id, and opens the gates for it.
    pub(crate) fn set_backend(&self, id: u32, backend: Backend<F::Addr>) {
        let mut backends = self.backends.borrow_mut();
        let (at, free) = (id as usize, backends[0]);
        if backends.len() <= at {
            backends.resize(at + 1, free);
        }
        backends[at] = backend;
        let Backend { addr, port, proto, flags, .. } = backend;
        open(&self.egress_gate, gate::backend_source_bit(addr, port, proto));
        if flags & backend::LOCAL == 0 {
            open(&self.egress_gate, gate::backend_destination_bit(addr, port, proto));
        }
    }

    /// Makes an interface a managed one.
    pub(crate) fn device(&self, ifindex: u32, device: Device<F::Addr>) {
        self.devices.borrow_mut().insert(ifindex, device);
        open(&self.ingress_gate, gate::snat_bit(device.snat));
    }

    /// Opens the gate for everything that is addressed to where an address is.
    pub(crate) fn service_network(&self, addr: F::Addr) {
        open(&self.ingress_gate, gate::service_network_bit(addr.network()));
    }

    /// What XDP does with a packet.
    pub(crate) fn xdp(&self, packet: &Packet<F::Addr>) -> Verdict<F::Addr> {
        sound(packet, decide::ingress::<F, _>(self, packet, Hook::Xdp))
    }

    /// What tc ingress does with a packet.
    pub(crate) fn tc(&self, packet: &Packet<F::Addr>) -> Verdict<F::Addr> {
        sound(packet, decide::ingress::<F, _>(self, packet, Hook::Tc))
    }

    /// What a pod's device does with a packet that the pod sends.
    pub(crate) fn pod(&self, packet: &Packet<F::Addr>) -> Verdict<F::Addr> {
        sound(packet, decide::ingress::<F, _>(self, packet, Hook::Pod))
    }

    /// What tc egress does with a packet of the node's own, without socket hooks.
    pub(crate) fn out(&self, packet: &Packet<F::Addr>) -> Verdict<F::Addr> {
        sound(packet, decide::ingress::<F, _>(self, packet, Hook::Out))
    }

    /// What tc egress does with a packet.
    pub(crate) fn egress(&self, packet: &Packet<F::Addr>) -> Verdict<F::Addr> {
        sound(packet, decide::egress::<F, _>(self, packet))
    }

    /// How often something was counted.
    pub(crate) fn count_of(&self, counter: Counter) -> u64 {
        self.counters.borrow().get(&counter.index()).copied().unwrap_or(0)
    }

    pub(crate) fn drops(&self, reason: Reason) -> u64 {
        self.count_of(Counter::Drop(reason))
    }

    pub(crate) fn events(&self, event: Event) -> u64 {
        self.count_of(Counter::Event(event))
    }

    pub(crate) fn all_drops(&self) -> u64 {
        Reason::ALL.iter().map(|&reason| self.drops(reason)).sum()
    }

    fn table(&self, table: Table) -> &Flows<F::Addr> {
        match table {
            Table::Established => &self.established,
            Table::Embryonic => &self.embryonic,
        }
    }

    fn has_room(&self, table: Table, key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) -> bool {
        assert_eq!(flow.pseudo_sum, key.pseudo_sum(), "of the packets that the entry is for");
        let (flows, max) = (self.table(table).borrow(), self.established_max.get());
        table == Table::Embryonic || flows.contains_key(key) || flows.len() < max
    }

    fn refuses(&self) -> bool {
        self.refuse.replace(self.refuse.get().saturating_sub(1)) > 0
    }
}

impl<'a, F: Family> Tables<F> for &'a Model<F> {
    type Entry = Live<F::Addr>;
    type Work = RefMut<'a, Work<F::Addr>>;

    fn config(self) -> Config {
        self.config.get()
    }
    fn routing_tag(self, epoch: u32) -> u32 {
        epoch
    }
    fn ingress_gate(self, word: u32) -> u64 {
        self.ingress_gate.borrow().get(&word).copied().unwrap_or(0)
    }
    fn egress_gate(self, word: u32) -> u64 {
        self.egress_gate.borrow().get(&word).copied().unwrap_or(0)
    }
    fn work(self) -> Option<RefMut<'a, Work<F::Addr>>> {
        Some(self.work.borrow_mut())
    }
    fn may_know(self, bit: u32) -> bool {
        self.known.borrow().contains(&bit)
    }
    fn note_known(self, bit: u32) {
        self.known.borrow_mut().insert(bit);
    }
    fn flow(self, table: Table, key: &FlowKey<F::Addr>) -> Option<Live<F::Addr>> {
        self.table(table).borrow().get(key).map(|place| Live(place.clone(), place.get()))
    }
    fn insert(self, key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) -> Insertion {
        if self.taken.get() {
            self.asked.borrow_mut().insert(*key);
            return Insertion::Exists;
        }
        if self.refuses() || !self.has_room(Table::Embryonic, key, flow) {
            return Insertion::Refused;
        }
        let mut flows = self.table(Table::Embryonic).borrow_mut();
        if flows.contains_key(key) {
            return Insertion::Exists;
        }
        flows.insert(*key, Rc::new(Cell::new(*flow)));
        Insertion::Done
    }
    fn store(self, table: Table, key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) -> bool {
        if table == Table::Established {
            assert!(self.known.borrow().contains(&select::known_bit(key)), "noted before it is there");
        }
        if self.refuses() || !self.has_room(table, key, flow) {
            return false;
        }
        self.table(table).borrow_mut().insert(*key, Rc::new(Cell::new(*flow)));
        true
    }
    fn remove(self, table: Table, key: &FlowKey<F::Addr>) {
        self.table(table).borrow_mut().remove(key);
    }
    fn frontend(self, key: &FrontendKey<F::Addr>) -> Option<Frontend> {
        self.frontends.borrow().get(&(key.addr, key.port, key.proto)).copied()
    }
    fn ring(self, slot: u32) -> u32 {
        self.rings.borrow().get(slot as usize).copied().unwrap_or(0)
    }
    fn backend(self, id: u32) -> Option<Backend<F::Addr>> {
        self.backends.borrow().get(id as usize).copied().filter(|backend| backend.proto != 0)
    }
    fn network(self, owner: u32, addr: F::Addr) -> bool {
        self.networks.borrow().contains(&(owner, addr))
    }
    fn affinity(self, key: &AffinityKey<F::Addr>) -> Option<Affinity> {
        self.affinities.borrow().get(key).copied()
    }
    fn set_affinity(self, key: &AffinityKey<F::Addr>, affinity: &Affinity) -> bool {
        self.affinities.borrow_mut().insert(*key, *affinity);
        true
    }
    fn account(self, service: u32, bytes: u16) {
        let mut accounts = self.accounts.borrow_mut();
        let (packets, sum) = accounts.entry(service).or_default();
        (*packets, *sum) = (*packets + 1, *sum + u64::from(bytes));
    }
    fn device(self, ifindex: u32) -> Option<Device<F::Addr>> {
        self.devices.borrow().get(&ifindex).copied()
    }
    fn route(self, _ifindex: u32, _src: F::Addr, dst: F::Addr, _tos: u8, _proto: u8) -> Route {
        self.routes.borrow().get(&dst).copied().unwrap_or(self.route.get())
    }
    fn source(self, _packet: &Packet<F::Addr>, _ifindex: u32, dst: F::Addr) -> Option<F::Addr> {
        self.sources.borrow().get(&dst).copied()
    }
    fn count(self, counter: Counter) {
        *self.counters.borrow_mut().entry(counter.index()).or_default() += 1;
    }
    fn count_exhausted(self, backend: &BackendKey<F::Addr>) {
        *self.exhausted.borrow_mut().entry(*backend).or_default() += 1;
    }
}

/// The usual answer of the routing table: out of the uplink, to the gateway.
pub(crate) fn gateway() -> Route {
    Route::Hop { ifindex: UPLINK, dmac: GATEWAY_MAC, smac: OUR_MAC, mtu: 1500 }
}

/// A TCP packet with these flags.
pub(crate) fn segment(src: Addr, sport: u16, dst: Addr, dport: [u8; 2], flags: u8) -> Packet<Addr> {
    packet(src, sport.to_be_bytes(), dst, dport, TCP, flags)
}

/// A UDP packet.
pub(crate) fn datagram(src: Addr, sport: u16, dst: Addr, dport: [u8; 2]) -> Packet<Addr> {
    packet(src, sport.to_be_bytes(), dst, dport, UDP, 0)
}

/// The opener of a connection to a frontend.
pub(crate) fn syn(sport: u16, vip: Addr) -> Packet<Addr> {
    segment(CLIENT, sport, vip, HTTP, tcp::SYN)
}

/// A packet of a connection to a frontend.
pub(crate) fn ack(sport: u16, vip: Addr) -> Packet<Addr> {
    segment(CLIENT, sport, vip, HTTP, tcp::ACK)
}

/// What a backend answers to a packet that has reached it.
pub(crate) fn answer(packet: &Packet<Addr>, flags: u8) -> Packet<Addr> {
    let key = packet.key.reversed();
    self::packet(key.src, key.sport, key.dst, key.dport, key.proto, flags)
}

fn packet(src: Addr, sport: [u8; 2], dst: Addr, dport: [u8; 2], proto: u8, tcp_flags: u8) -> Packet<Addr> {
    let key = FlowKey { src, dst, sport, dport, proto, zero: [0; 3] };
    let mut packet = Packet {
        key,
        dmac: OUR_MAC,
        l4_offset: 34,
        l4_len: 60,
        total_len: 80,
        check: 0,
        tos: 0,
        ttl: 64,
        tcp_flags,
        is_tunnelled: false,
        ifindex: UPLINK,
    };
    packet.check = finished(&packet);
    packet
}

/// The finished checksum of a packet whose payload sums up to a constant.
fn finished<A: Address>(packet: &Packet<A>) -> u16 {
    const PAYLOAD: u32 = 0x1234;
    let pseudo = checksum::pseudo_header(packet.key.addresses_sum(), packet.key.proto, packet.l4_len);
    !checksum::fold(checksum::fold(pseudo as u32 + packet.key.ports_sum()) as u32 + PAYLOAD)
}

/// The packet after a verdict, its checksum updated by the verdict's deltas.
pub(crate) fn rewritten<A: Address>(packet: &Packet<A>, verdict: &Verdict<A>) -> Packet<A> {
    if matches!(verdict.action, Action::Pass | Action::Tunnel | Action::Drop(_) | Action::Reject(_)) {
        return *packet;
    }
    let Rewrite { src, dst, sport, dport, l4_delta, .. } = verdict.rewrite;
    let key = FlowKey { src, dst, sport, dport, ..packet.key };
    Packet { key, check: checksum::update(packet.check, l4_delta), ..*packet }
}

/// Checks what must hold of every verdict: its deltas are those of its translation.
fn sound<A: Address>(packet: &Packet<A>, verdict: Verdict<A>) -> Verdict<A> {
    let after = rewritten(packet, &verdict);
    if packet.check == finished(packet) {
        assert_eq!(after.check, finished(&after), "checksum after {verdict:?} of {packet:?}");
    }
    verdict
}

fn open(gate: &RefCell<HashMap<u32, u64>>, bit: u32) {
    *gate.borrow_mut().entry(bit / 64).or_default() |= 1 << (bit % 64);
}
