//! The maps of the object, by their names and types.

use std::cell::RefCell;

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, LpmTrie, MapData, PerCpuArray, RingBuf, lpm_trie},
};
use xdp_common::{
    fragment::{FragmentKey, FragmentPorts},
    net::{FlowKey, Plain},
    tables::{
        self, Account, Affinity, AffinityKey, Backend, Config, Device, Flow, Frontend, FrontendKey,
        NetworkKey, WAYS, frontend,
    },
    verdict::{COUNTERS, Counter, Event, Reason, SNAT_ATTEMPTS_MAX},
};

use crate::node::Addr;

/// A plain value of the shared crate as aya wants it.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct Raw<T>(pub(crate) T);

// SAFETY: `Plain` has proven at compile time that the type has no padding, and holds no invalid bit patterns.
unsafe impl<T: Plain> Pod for Raw<T> {}

/// A bucket of the embryonic table: its lock, then the tag of each slot.
type Tags = [u64; WAYS as usize + 1];

/// The maps that the agent writes, and those that tests look into.
pub(crate) struct Maps {
    pub(crate) config: Array<MapData, Raw<Config>>,
    pub(crate) devices: HashMap<MapData, u32, Raw<Device<Addr>>>,
    pub(crate) frontends: HashMap<MapData, Raw<FrontendKey<Addr>>, Raw<Frontend>>,
    pub(crate) backends: Array<MapData, Raw<Backend<Addr>>>,
    pub(crate) rings: Array<MapData, u32>,
    pub(crate) fragments: RefCell<HashMap<MapData, Raw<FragmentKey<Addr>>, Raw<FragmentPorts>>>,
    held: RefCell<RingBuf<MapData>>,
    pub(crate) established: HashMap<MapData, Raw<FlowKey<Addr>>, Raw<Flow<Addr>>>,
    networks: LpmTrie<MapData, Raw<NetworkKey<Addr>>, u32>,
    affinities: RefCell<HashMap<MapData, Raw<AffinityKey<Addr>>, Raw<Affinity>>>,
    accounts: PerCpuArray<MapData, Raw<Account>>,
    tags: Array<MapData, Tags>,
    ingress_gate: Array<MapData, u64>,
    egress_gate: Array<MapData, u64>,
    counters: PerCpuArray<MapData, u64>,
}

impl Maps {
    /// Takes the maps out of an object.
    pub(crate) fn take(object: &mut Ebpf) -> Self {
        Self {
            config: map(object, &tables::CONFIG),
            devices: map(object, &tables::DEVICES_V4),
            frontends: map(object, &tables::FRONTENDS_V4),
            backends: map(object, &tables::BACKENDS_V4),
            rings: map(object, &tables::RINGS_V4),
            fragments: RefCell::new(map(object, &tables::FRAGMENTS_V4)),
            held: RefCell::new(map(object, &tables::HELD)),
            established: map(object, &tables::ESTABLISHED_V4),
            networks: map(object, &tables::NETWORKS_V4),
            affinities: RefCell::new(map(object, &tables::AFFINITY_V4)),
            accounts: map(object, &tables::ACCOUNTS_V4),
            tags: map(object, &tables::TAGS_V4),
            ingress_gate: map(object, &tables::GATE_INGRESS_V4),
            egress_gate: map(object, &tables::GATE_EGRESS_V4),
            counters: map(object, &tables::COUNTERS),
        }
    }

    pub(crate) fn open_ingress(&mut self, bit: u32) {
        open(&mut self.ingress_gate, bit);
    }

    pub(crate) fn open_egress(&mut self, bit: u32) {
        open(&mut self.egress_gate, bit);
    }

    /// Puts a network into an owner's, or excepts it (value 0).
    pub(crate) fn network(&mut self, owner: u32, addr: Addr, bits: u32, value: u32) {
        let key = Raw(NetworkKey { owner: owner.to_be_bytes(), addr });
        self.networks.insert(&lpm_trie::Key::new(32 + bits, key), value, 0).expect("room for a network");
    }

    /// Makes an address one whose other ports are refused.
    pub(crate) fn service_address(&mut self, addr: Addr) {
        let key = FrontendKey { addr, port: [0; 2], proto: 0, zero: 0 };
        let value = Frontend {
            service: 0,
            ring: 0,
            slots: 0,
            inner_ring: 0,
            inner_slots: 0,
            flags: frontend::ADDRESS,
            affinity_seconds: 0,
        };
        self.frontends.insert(Raw(key), Raw(value), 0).expect("room for an address");
    }

    /// Empties the table of affinities.
    pub(crate) fn forget_affinities(&self) {
        let mut affinities = self.affinities.borrow_mut();
        let keys: Vec<_> = affinities.keys().flatten().collect();
        for key in keys {
            affinities.remove(&key).expect("a client that is there");
        }
    }

    /// Packets and bytes of a service port.
    pub(crate) fn account(&self, service: u32) -> (u64, u64) {
        let accounts = self.accounts.get(&service, 0).expect("an account");
        accounts
            .iter()
            .fold((0, 0), |(packets, bytes), account| (packets + account.0.packets, bytes + account.0.bytes))
    }

    /// An established flow, as it is now.
    pub(crate) fn flow(&self, key: &FlowKey<Addr>) -> Option<Flow<Addr>> {
        self.established.get(&Raw(*key), 0).ok().map(|flow| flow.0)
    }

    /// How many entries the established table has.
    pub(crate) fn established_entries(&self) -> usize {
        self.established.keys().count()
    }

    /// Empties the established table.
    pub(crate) fn forget_established(&mut self) {
        let keys: Vec<_> = self.established.keys().flatten().collect();
        for key in keys {
            self.established.remove(&key).expect("a flow that is there");
        }
    }

    /// Takes or frees the lock of a bucket of the embryonic table, as a program on another processor would.
    pub(crate) fn hold_bucket(&mut self, bucket: u32, hold: bool) {
        let mut tags = self.tags.get(&bucket, 0).expect("a bucket");
        tags[0] = hold.into();
        self.tags.set(bucket, tags, 0).expect("a bucket that was read can be written");
    }

    /// The next record of the ring of early fragments: an interface and a frame.
    pub(crate) fn held(&self) -> Option<(u32, Vec<u8>)> {
        let mut ring = self.held.borrow_mut();
        let record = ring.next()?;
        let (ifindex, frame) = record.split_first_chunk::<4>().expect("a record names its interface");
        Some((u32::from_ne_bytes(*ifindex), frame.to_vec()))
    }

    /// All counters, each summed up over the processors.
    pub(crate) fn counts(&self) -> Vec<u64> {
        let sum = |index| self.counters.get(&index, 0).expect("a counter").iter().sum();
        (0..COUNTERS).map(sum).collect()
    }
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

pub(crate) fn map<T>(object: &mut Ebpf, spec: &tables::MapSpec) -> T
where
    T: TryFrom<aya::maps::Map, Error = aya::maps::MapError>,
{
    let map = object.take_map(spec.name).unwrap_or_else(|| panic!("the object has no map {}", spec.name));
    T::try_from(map).unwrap_or_else(|error| panic!("{} is another kind of map: {error}", spec.name))
}

pub(crate) fn open(gate: &mut Array<MapData, u64>, bit: u32) {
    let word = gate.get(&(bit / 64), 0).expect("a bit lies within the gate");
    gate.set(bit / 64, word | 1 << (bit % 64), 0).expect("a word that was read can be written");
}
