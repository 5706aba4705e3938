//! The maps of the object, by their names and types.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    os::fd::{AsFd as _, OwnedFd},
};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, PerCpuValues, RingBuf, lpm_trie},
    util::nr_cpus,
};
use xdp_common::{
    answer::AnswerFrame,
    fragment::{FragmentKey, FragmentPorts},
    frame::Parsed,
    gate,
    net::{Address, FlowKey, Plain},
    tables::{
        self, Account, Affinity, AffinityKey, Answers, Backend, BackendKey, Config, Device, Flow, Frontend,
        FrontendKey, Mapped, NetworkKey, WAYS, exit, frontend, kind,
    },
    verdict::{COUNTERS, Counter, Event, Reason, SNAT_ATTEMPTS_MAX},
};

use crate::{
    batch,
    established::Established,
    family::{Addr, Hosts},
    spare,
};

/// A plain value of the shared crate as aya wants it.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct Raw<T>(pub(crate) T);

// SAFETY: `Plain` has proven at compile time that the type has no padding, and holds no invalid bit patterns.
unsafe impl<T: Plain> Pod for Raw<T> {}

/// A bucket of the embryonic table: its lock, then the tag of each slot.
type Tags = [u64; WAYS as usize + 1];

/// The maps of a family and those of both: what the agent writes, and what tests look into. Hosts are called by their
/// names.
pub(crate) trait Maps {
    /// Writes the agent's settings.
    fn configure(&mut self, config: Config);
    /// Makes an interface a managed one.
    fn device(&mut self, ifindex: u32, device: Device<Addr>);
    /// Makes an interface one that is not managed.
    fn forget_device(&mut self, ifindex: u32);
    /// Writes a backend, and opens the gates for it.
    fn backend(&mut self, id: u32, backend: Backend<Addr>);
    /// How often no source port was free toward a backend.
    fn exhausted(&self, addr: Addr, port: u16, proto: u8) -> u64;
    /// Writes a slot of the rings.
    fn slot(&mut self, slot: u32, backend: u32);
    /// Makes an address and port a frontend, and opens the gate for it.
    fn frontend(&mut self, addr: Addr, port: u16, proto: u8, frontend: Frontend);
    /// Makes an address one of a service as such, with flags of a frontend.
    fn service_address(&mut self, addr: Addr, flags: u32);
    /// Opens the gate for everything that is addressed to where an address is.
    fn service_network(&mut self, addr: Addr);
    /// Puts a network into an owner's, or excepts it (value 0).
    fn network(&mut self, owner: u32, addr: Addr, bits: u32, value: u32);
    /// Empties the table of affinities.
    fn forget_affinities(&self);
    /// Packets and bytes of a service port.
    fn account(&self, service: u32) -> (u64, u64);
    /// The routing tag of the established flow that a frame belongs to.
    fn routing(&self, frame: &[u8]) -> Option<u32>;
    /// Kind and clock of every established entry.
    fn clocks(&self) -> Vec<(u8, u32)>;
    /// How many entries the established table has.
    fn established_entries(&self) -> usize;
    /// How many of them have found no place among its slots.
    fn overflowed(&self) -> usize;
    /// Empties the established table.
    fn forget_established(&mut self);
    /// Marks every established connection as the agent does when its endpoint is gone.
    fn mark_removed(&mut self);
    /// Takes or frees the lock of a bucket of the embryonic table, as a program on another processor would.
    fn hold_bucket(&mut self, bucket: u32, hold: bool);
    /// All counters, each summed up over the processors.
    fn counts(&self) -> Vec<u64>;
    /// Gives every processor all its answers back.
    fn allow_answers(&mut self);
    /// Empties all tables of flows, affinities and fragments.
    fn forget_all(&mut self);
    /// Every established entry as text, without what depends on the kernel's clock.
    fn established_dump(&self) -> BTreeMap<String, String>;
    /// Notes the ports of a packet's fragments.
    fn note_fragment(&mut self, key: FragmentKey<Addr>, ports: FragmentPorts);
    /// The next record of the ring of early fragments: an interface and a frame.
    fn held(&self) -> Option<(u32, Vec<u8>)>;
}

type AffinityMap<A> = HashMap<MapData, Raw<AffinityKey<A>>, Raw<Affinity>>;

/// The maps of a family by their types.
pub(crate) struct Typed<F: Hosts> {
    pub(crate) config: Array<MapData, Raw<Config>>,
    pub(crate) devices: HashMap<MapData, u32, Raw<Device<F::Addr>>>,
    pub(crate) frontends: HashMap<MapData, Raw<FrontendKey<F::Addr>>, Raw<Frontend>>,
    pub(crate) backends: Array<MapData, Raw<Backend<F::Addr>>>,
    pub(crate) rings: Array<MapData, u32>,
    pub(crate) established: Established<F>,
    pub(crate) networks: LpmTrie<MapData, Raw<NetworkKey<F::Addr>>, u32>,
    pub(crate) affinities: RefCell<AffinityMap<F::Addr>>,
    accounts: PerCpuArray<MapData, Raw<Account>>,
    exhausted: HashMap<MapData, Raw<BackendKey<F::Addr>>, u64>,
    fragments: HashMap<MapData, Raw<FragmentKey<F::Addr>>, Raw<FragmentPorts>>,
    held: RefCell<RingBuf<MapData>>,
    pub(crate) tags: Array<MapData, Tags>,
    ingress_gate: Array<MapData, u64>,
    egress_gate: Array<MapData, u64>,
    answers: PerCpuArray<MapData, Raw<Answers>>,
    counters: PerCpuArray<MapData, u64>,
    counters_fd: OwnedFd,
    tags_fd: OwnedFd,
    processors: usize,
}

impl<F: Hosts> Typed<F> {
    /// The maps of an object.
    pub(crate) fn of(object: &Ebpf) -> Self {
        let maps = F::Addr::MAPS;
        let counters_fd = descriptor(object, tables::COUNTERS.name);
        let tags_fd = descriptor(object, maps.tags.name);
        Self {
            counters_fd,
            tags_fd,
            processors: nr_cpus().expect("the number of processors"),
            answers: map(object, &tables::ANSWERS),
            config: map(object, &tables::CONFIG),
            devices: map(object, &maps.devices),
            frontends: map(object, &maps.frontends),
            backends: map(object, &maps.backends),
            rings: map(object, &maps.rings),
            established: Established::of(object),
            networks: map(object, &maps.networks),
            affinities: RefCell::new(map(object, &maps.affinity)),
            accounts: map(object, &maps.accounts),
            tags: map(object, &maps.tags),
            ingress_gate: map(object, &maps.gate_ingress),
            egress_gate: map(object, &maps.gate_egress),
            exhausted: map(object, &maps.exhausted),
            fragments: map(object, &maps.fragments),
            held: RefCell::new(map(object, &tables::HELD)),
            counters: map(object, &tables::COUNTERS),
        }
    }
}

impl<F: Hosts> Maps for Typed<F> {
    fn configure(&mut self, config: Config) {
        self.config.set(0, Raw(config), 0).expect("the one slot of the settings");
    }

    fn device(&mut self, ifindex: u32, device: Device<Addr>) {
        let Device { snat, flags, mtu, mac, zero } = device;
        let device = Device { snat: F::addr(snat), flags, mtu, mac, zero };
        self.devices.insert(ifindex, Raw(device), 0).expect("room for a device");
        open(&mut self.ingress_gate, gate::snat_bit(device.snat));
    }

    fn forget_device(&mut self, ifindex: u32) {
        self.devices.remove(&ifindex).expect("a managed interface");
    }

    fn backend(&mut self, id: u32, backend: Backend<Addr>) {
        let Backend { addr, port, proto, flags, generation, service, node } = backend;
        let node = if node == Addr::UNSPECIFIED { F::Addr::UNSPECIFIED } else { F::addr(node) };
        let backend = Backend { addr: F::addr(addr), port, proto, flags, generation, service, node };
        self.backends.set(id, Raw(backend), 0).expect("room for a backend");
        let addr = backend.addr;
        open(&mut self.egress_gate, gate::backend_source_bit(addr, port, proto));
        if flags & tables::backend::LOCAL == 0 {
            open(&mut self.egress_gate, gate::backend_destination_bit(addr, port, proto));
        }
    }

    fn exhausted(&self, addr: Addr, port: u16, proto: u8) -> u64 {
        let key = BackendKey { addr: F::addr(addr), port: port.to_be_bytes(), proto, zero: 0 };
        self.exhausted.get(&Raw(key), 0).unwrap_or(0)
    }

    fn slot(&mut self, slot: u32, backend: u32) {
        self.rings.set(slot, backend, 0).expect("room for a slot of a ring");
    }

    fn frontend(&mut self, addr: Addr, port: u16, proto: u8, frontend: Frontend) {
        let (addr, port) = (F::addr(addr), port.to_be_bytes());
        let key = FrontendKey { addr, port, proto, zero: 0 };
        self.frontends.insert(Raw(key), Raw(frontend), 0).expect("room for a frontend");
        open(&mut self.ingress_gate, gate::frontend_bit(addr, port, proto));
        open(&mut self.ingress_gate, gate::address_bit(addr));
    }

    fn service_address(&mut self, addr: Addr, flags: u32) {
        let key = FrontendKey { addr: F::addr(addr), port: [0; 2], proto: 0, zero: 0 };
        let value = Frontend {
            service: 0,
            ring: 0,
            slots: 0,
            inner_ring: 0,
            inner_slots: 0,
            flags,
            affinity_seconds: 0,
        };
        self.frontends.insert(Raw(key), Raw(value), 0).expect("room for an address");
        if flags & frontend::ADDRESS == 0 {
            open(&mut self.ingress_gate, gate::frontend_bit(key.addr, [0; 2], 0));
        }
    }

    fn service_network(&mut self, addr: Addr) {
        open(&mut self.ingress_gate, gate::service_network_bit(F::addr(addr).network()));
    }

    fn network(&mut self, owner: u32, addr: Addr, bits: u32, value: u32) {
        let key = Raw(NetworkKey { owner: owner.to_be_bytes(), addr: F::addr(addr) });
        let whole = 8 * size_of::<Addr>() as u32;
        let bits = if bits == whole { 8 * F::Addr::LEN as u32 } else { F::FAMILY.prefix(bits as u8).into() };
        self.networks.insert(&lpm_trie::Key::new(32 + bits, key), value, 0).expect("room for a network");
    }

    fn forget_affinities(&self) {
        let mut affinities = self.affinities.borrow_mut();
        let keys: Vec<_> = affinities.keys().flatten().collect();
        for key in keys {
            affinities.remove(&key).expect("a client that is there");
        }
    }

    fn account(&self, service: u32) -> (u64, u64) {
        let accounts = self.accounts.get(&service, 0).expect("an account");
        accounts
            .iter()
            .fold((0, 0), |(packets, bytes), account| (packets + account.0.packets, bytes + account.0.bytes))
    }

    fn routing(&self, frame: &[u8]) -> Option<u32> {
        let Parsed::Packet(packet) = F::read_frame(frame, 0) else { return None };
        self.established.get(&packet.key).map(|flow| flow.routing)
    }

    fn clocks(&self) -> Vec<(u8, u32)> {
        self.established.entries().into_iter().map(|(_, flow)| (flow.kind, flow.seen)).collect()
    }

    fn established_entries(&self) -> usize {
        self.established.entries().len()
    }

    fn overflowed(&self) -> usize {
        self.established.overflowed()
    }

    fn forget_established(&mut self) {
        self.established.clear();
    }

    fn mark_removed(&mut self) {
        let entries = self.established.entries().into_iter();
        for (key, flow) in entries.filter(|(_, flow)| flow.kind == kind::FORWARD) {
            self.established.replace(&key, Flow { exit: flow.exit | exit::RESET, ..flow });
        }
    }

    fn hold_bucket(&mut self, bucket: u32, hold: bool) {
        let mut tags = self.tags.get(&bucket, 0).expect("a bucket");
        tags[0] = hold.into();
        self.tags.set(bucket, tags, 0).expect("a bucket that was read can be written");
    }

    fn note_fragment(&mut self, key: FragmentKey<Addr>, ports: FragmentPorts) {
        let FragmentKey { src, dst, id, proto, zero } = key;
        let key = FragmentKey { src: F::addr(src), dst: F::addr(dst), id, proto, zero };
        self.fragments.insert(Raw(key), Raw(ports), 0).expect("room for a packet");
    }

    fn held(&self) -> Option<(u32, Vec<u8>)> {
        let mut ring = self.held.borrow_mut();
        let record = ring.next()?;
        let (ifindex, frame) = record.split_first_chunk::<4>().expect("a record names its interface");
        Some((u32::from_ne_bytes(*ifindex), frame.to_vec()))
    }

    fn counts(&self) -> Vec<u64> {
        let processors = self.processors;
        let mut values = vec![0u64; COUNTERS as usize * processors];
        if batch::read(self.counters_fd.as_fd(), &mut values, COUNTERS) {
            return values.chunks(processors).map(|of| of.iter().sum()).collect();
        }
        let sum = |index| self.counters.get(&index, 0).expect("a counter").iter().sum();
        (0..COUNTERS).map(sum).collect()
    }

    fn allow_answers(&mut self) {
        let none = Raw(Answers { period: 0, spent: 0, echoed: 0, frame: [0; size_of::<AnswerFrame>()] });
        let everywhere = PerCpuValues::try_from(vec![none; self.processors]).expect("one for each processor");
        self.answers.set(0, everywhere, 0).expect("the one slot of the answers");
    }

    fn forget_all(&mut self) {
        self.forget_established();
        self.forget_affinities();
        let keys: Vec<_> = self.fragments.keys().flatten().collect();
        for key in keys {
            self.fragments.remove(&key).expect("a packet that is there");
        }
        let buckets = self.tags.len();
        if !batch::clear(self.tags_fd.as_fd(), buckets, WAYS as usize + 1) {
            for bucket in 0..buckets {
                self.tags.set(bucket, Tags::default(), 0).expect("a bucket");
            }
        }
    }

    fn established_dump(&self) -> BTreeMap<String, String> {
        let entries = self.established.entries();
        let count = entries.len();
        let texts: BTreeMap<_, _> = entries.iter().map(|(key, flow)| entry_text(key, flow)).collect();
        assert_eq!(texts.len(), count, "a key has one entry");
        texts
    }
}

/// An entry of a flow table as text, without what depends on the kernel's clock.
pub(crate) fn entry_text<A: Address>(key: &FlowKey<A>, flow: &Flow<A>) -> (String, String) {
    (format!("{key:?}"), format!("{:?}", Flow { routing: 0, ..*flow }))
}

/// Every counter, in the order of its index.
pub(crate) fn all() -> impl Iterator<Item = Counter> {
    let drops = Reason::ALL.iter().copied().map(Counter::Drop);
    let events = Event::ALL.iter().copied().map(Counter::Event);
    drops.chain(events).chain((0..SNAT_ATTEMPTS_MAX).map(Counter::SnatAttempt))
}

/// The name of a counter in messages.
pub(crate) fn name(index: u32) -> String {
    match all().find(|counter| counter.index() == index) {
        Some(Counter::Drop(reason)) => format!("drop {}", reason.label()),
        Some(Counter::Event(event)) => event.label().to_string(),
        Some(Counter::SnatAttempt(attempt)) => format!("attempt {attempt}"),
        None => format!("counter {index}"),
    }
}

/// The descriptor of an array.
pub(crate) fn descriptor(object: &Ebpf, name: &str) -> OwnedFd {
    let map = object.map(name).unwrap_or_else(|| panic!("the object has no map {name}"));
    spare::descriptor(map).expect("a descriptor can be duplicated")
}

pub(crate) fn map<T>(object: &Ebpf, spec: &tables::MapSpec) -> T
where
    T: TryFrom<Map, Error = MapError>,
{
    let map = object.map(spec.name).unwrap_or_else(|| panic!("the object has no map {}", spec.name));
    // The object keeps its own descriptor, for the next test.
    let copy = spare::descriptor(map).and_then(|fd| Ok(Map::from_map_data(MapData::from_fd(fd)?)?));
    let typed = copy.and_then(|map| Ok(T::try_from(map)?));
    typed.unwrap_or_else(|error| panic!("{} is another kind of map: {error}", spec.name))
}

pub(crate) fn open(gate: &mut Array<MapData, u64>, bit: u32) {
    let word = gate.get(&(bit / 64), 0).expect("a bit lies within the gate");
    gate.set(bit / 64, word | 1 << (bit % 64), 0).expect("a word that was read can be written");
}
