//! What the pinned maps say, without the ids and places that differ from one agent to the next.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hash;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;

use anyhow::{Context, Result};
use aya::Pod;
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData};
use xdp_agent_tests::lab::agent::PIN_DIR;
use xdp_agent_tests::lab::netns::PrivateBpffs;
use xdp_common::net::Plain;
use xdp_common::tables::{
    self, BACKENDS_V4, Backend, FRONTENDS_V4, Frontend, FrontendKey, GATE_EGRESS_V4, GATE_INGRESS_V4,
    MapSpec, NETWORKS_V4, NetworkKey, RINGS_V4, network,
};

type Addr = [u8; 4];

/// Unused ids in a row after which no more are looked at: ids are given out from the lowest.
const UNUSED_MAX: usize = 4_096;

/// A plain value of the shared crate as aya wants it.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Raw<T>(T);

// SAFETY: `Plain` has proven at compile time that the type has no padding, and holds no invalid bit patterns.
unsafe impl<T: Plain> Pod for Raw<T> {}

/// What is served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Image {
    /// By address, port and protocol.
    pub(crate) frontends: BTreeMap<(SocketAddrV4, u8), Served>,
    /// Networks of pods and of Services, with whether they are in or excepted.
    networks: BTreeSet<(u32, Ipv4Addr, u32, u32)>,
    /// Backends there are.
    backends: BTreeSet<Endpoint>,
    /// Words of the gates that are not zero.
    gates: [BTreeMap<u32, u64>; 2],
}

/// What is served at a frontend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Served {
    flags: u32,
    affinity_seconds: u32,
    /// Backends of clients from outside.
    pub(crate) outer: BTreeSet<Endpoint>,
    /// Backends of clients from inside.
    inner: BTreeSet<Endpoint>,
    sources: BTreeSet<(Ipv4Addr, u32, u32)>,
}

/// Address, protocol and flags.
type Endpoint = (SocketAddrV4, u8, u8);

impl Image {
    /// Reads the maps that an agent has pinned.
    pub(crate) fn read(bpffs: &PrivateBpffs) -> Result<Self> {
        Maps::open(bpffs)?.read()
    }

    /// Whether a frontend is served: one look instead of a whole image.
    pub(crate) fn has(bpffs: &PrivateBpffs, at: SocketAddrV4, proto: u8) -> Result<bool> {
        let key = FrontendKey { addr: at.ip().octets(), port: at.port().to_be_bytes(), proto, zero: 0 };
        Ok(Maps::open(bpffs)?.frontends.get(&Raw(key), 0).is_ok())
    }

    /// What new connections can meet. Further backends, and what the gates hold for them and for frontends that are gone, are
    /// there for flows of the past, of which a fresh agent knows nothing.
    pub(crate) fn for_new_flows(mut self) -> Self {
        self.backends.clear();
        self.gates = Default::default();
        self
    }

    /// Whether the gates take everything that they take in the other.
    pub(crate) fn takes_what(&self, other: &Self) -> bool {
        let all = |own: &BTreeMap<u32, u64>, others: &BTreeMap<u32, u64>| {
            others.iter().all(|(word, bits)| own.get(word).is_some_and(|own| own & bits == *bits))
        };
        self.gates.iter().zip(&other.gates).all(|(own, others)| all(own, others))
    }

    /// Says what is not in the other; a whole image would fill the screen.
    pub(crate) fn difference(&self, other: &Self) -> String {
        let mut text = String::new();
        let keys: BTreeSet<_> = self.frontends.keys().chain(other.frontends.keys()).collect();
        for key in keys {
            let (one, two) = (self.frontends.get(key), other.frontends.get(key));
            if one != two {
                text += &format!("frontend {key:?}: {one:?}, not {two:?}\n");
            }
        }
        for (what, one, two) in [
            ("networks", format!("{:?}", self.networks), format!("{:?}", other.networks)),
            ("backends", format!("{:?}", self.backends), format!("{:?}", other.backends)),
            ("gates", format!("{:x?}", self.gates), format!("{:x?}", other.gates)),
        ] {
            if one != two {
                text += &format!("{what}: {one}, not {two}\n");
            }
        }
        text
    }
}

struct Maps {
    frontends: HashMap<MapData, Raw<FrontendKey<Addr>>, Raw<Frontend>>,
    backends: Array<MapData, Raw<Backend<Addr>>>,
    rings: Array<MapData, u32>,
    networks: LpmTrie<MapData, Raw<NetworkKey<Addr>>, u32>,
    gates: [Array<MapData, u64>; 2],
}

impl Maps {
    fn open(bpffs: &PrivateBpffs) -> Result<Self> {
        bpffs.run(|| {
            Ok(Self {
                frontends: HashMap::try_from(Map::HashMap(pinned(&FRONTENDS_V4)?))?,
                backends: Array::try_from(Map::Array(pinned(&BACKENDS_V4)?))?,
                rings: Array::try_from(Map::Array(pinned(&RINGS_V4)?))?,
                networks: LpmTrie::try_from(Map::LpmTrie(pinned(&NETWORKS_V4)?))?,
                gates: [
                    Array::try_from(Map::Array(pinned(&GATE_INGRESS_V4)?))?,
                    Array::try_from(Map::Array(pinned(&GATE_EGRESS_V4)?))?,
                ],
            })
        })?
    }

    fn read(&self) -> Result<Image> {
        let mut image = Image::default();
        let mut sources: BTreeMap<u32, BTreeSet<_>> = BTreeMap::new();
        for entry in self.networks.iter() {
            let (key, value) = entry?;
            let NetworkKey { owner, addr } = key.data().0;
            let (owner, network) = (u32::from_be_bytes(owner), (Ipv4Addr::from(addr), key.prefix_len() - 32));
            if owner == network::PODS || owner == network::SERVICES {
                image.networks.insert((owner, network.0, network.1, value));
            } else {
                sources.entry(owner).or_default().insert((network.0, network.1, value));
            }
        }
        let mut owners = BTreeSet::new();
        for entry in self.frontends.iter() {
            let (Raw(key), Raw(value)) = entry?;
            let at = SocketAddrV4::new(key.addr.into(), u16::from_be_bytes(key.port));
            owners.insert(network::sources_of(value.service));
            let served = Served {
                flags: value.flags,
                affinity_seconds: value.affinity_seconds,
                outer: self.ring(value.ring, value.slots)?,
                inner: self.ring(value.inner_ring, value.inner_slots)?,
                sources: sources.get(&network::sources_of(value.service)).cloned().unwrap_or_default(),
            };
            image.frontends.insert((at, key.proto), served);
        }
        let ownerless = sources.keys().filter(|owner| !owners.contains(owner)).copied();
        image.networks.extend(ownerless.map(|owner| (owner, Ipv4Addr::UNSPECIFIED, 0, 0)));
        let mut unused = 0;
        for backend in self.backends.iter() {
            let Raw(backend) = backend?;
            unused = if backend.proto == 0 { unused + 1 } else { 0 };
            if unused > UNUSED_MAX {
                break;
            }
            if backend.proto != 0 {
                image.backends.insert(endpoint(&backend));
            }
        }
        for (gate, words) in self.gates.iter().zip(&mut image.gates) {
            for (word, bits) in (0..).zip(gate.iter()) {
                let bits = bits?;
                if bits != 0 {
                    words.insert(word, bits);
                }
            }
        }
        Ok(image)
    }

    fn ring(&self, offset: u32, slots: u32) -> Result<BTreeSet<Endpoint>> {
        let mut ids = BTreeSet::new();
        for slot in offset..offset + slots {
            ids.insert(self.rings.get(&slot, 0)?);
        }
        let backend = |id: u32| Ok(endpoint(&self.backends.get(&id, 0)?.0));
        ids.into_iter().map(backend).collect()
    }
}

fn endpoint(backend: &Backend<Addr>) -> Endpoint {
    let at = SocketAddrV4::new(backend.addr.into(), u16::from_be_bytes(backend.port));
    (at, backend.proto, backend.flags)
}

fn pinned(spec: &MapSpec) -> Result<MapData> {
    let version = format!("v{}", tables::LAYOUT_VERSION);
    let path: PathBuf = [PIN_DIR, &version, "maps", spec.name].iter().collect();
    MapData::from_pin(&path).with_context(|| format!("no map at {}", path.display()))
}
