//! The maps: created or adopted at their pins, and written through typed handles.

use std::{
    ffi::OsStr,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::{Map, MapData, MapError, MapInfo, PerCpuArray, lpm_trie},
};
use tracing::{info, warn};
use xdp_common::{
    fragment::{FragmentKey, FragmentPorts},
    net::{FlowKey, Ip6, Plain},
    tables::{
        self, Account, Affinity, AffinityKey, Backend, BackendKey, Config, Device, Flow, Frontend,
        FrontendKey, MapSpec, Mapped, NetworkKey, OVERFLOW_SHARE, Slot, SocketSettings, Source, WAYS,
    },
};

use crate::{attach::Programs, cluster::wanted::IpAddress, config::Sizes, preflight::KERNEL_MIN};

pub use accounts::Accounts;
pub use constants::Constants;
pub use embryonic::EmbryonicTable;
pub use established::EstablishedTable;
pub use exhausted::ExhaustedMap;
pub use fragments::{FragmentMap, HeldFragment, HeldFragments};
pub use generations::Generations;
pub use image::{ImageMaps, Settings};
pub use reserved::ReservedPorts;
pub use sockets::{PeerMaps, PodMaps, SocketCounters, SocketMaps};

mod accounts;
mod batch;
mod constants;
pub mod embryonic;
pub mod established;
mod exhausted;
mod fragments;
pub mod generations;
mod handles;
pub mod image;
mod known;
mod mapping;
mod reserved;
mod slots;
mod sockets;

/// Inserts, and replaces nothing (include/uapi/linux/bpf.h).
const BPF_NOEXIST: u64 = 1;

/// A value of a map as the loader wants it.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct Raw<T>(pub(crate) T);

// SAFETY: `Plain` is implemented by its macro only, for `repr(C)` structures of numbers and arrays of them, so that every
// pattern of bits is a value; `PROOF`, evaluated in `raw` and `prove`, shows that none of their bytes is padding.
unsafe impl<T: Plain> aya::Pod for Raw<T> {}

pub(crate) fn raw<T: Plain>(value: T) -> Raw<T> {
    const { T::PROOF };
    Raw(value)
}

/// The value whose bytes are all zero.
pub(crate) fn zero<T: Plain>() -> Raw<T> {
    const { T::PROOF };
    // SAFETY: any bytes are a value of a `Plain` type.
    Raw(unsafe { std::mem::zeroed() })
}

/// The BPF object that the build has embedded; empty when there was none.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/xdp-ebpf"));

/// Everything that loading yields.
#[derive(Debug)]
pub struct Loaded {
    /// The settings of the programs.
    pub settings: Settings,
    /// The maps of IPv4.
    pub v4: FamilyMaps<[u8; 4]>,
    /// The maps of IPv6.
    pub v6: FamilyMaps<Ip6>,
    /// Counters of the programs.
    pub counters: Counters,
    /// What the socket hooks are told.
    pub sockets: SocketMaps,
    /// What they have told UDP sockets.
    pub peers: PeerMaps,
    /// Addresses of pods, for them.
    pub pods: PodMaps,
    /// Their counters.
    pub socket_counters: SocketCounters,
    /// Fragments that wait for their first.
    pub held: HeldFragments,
    /// Which ports are kept from the kernel's choice.
    pub reserved_ports: ReservedPorts,
    /// The programs, not yet loaded.
    pub programs: Programs,
    /// Whether an earlier agent's maps were adopted.
    pub is_adopted: bool,
    /// Pins that were made, until the start succeeds.
    pub pins: NewPins,
}

/// The maps of an address family.
#[derive(Debug)]
pub struct FamilyMaps<A: IpAddress> {
    /// Those that say what is served.
    pub image: ImageMaps<A>,
    /// Flows that have been answered.
    pub established: EstablishedTable<A>,
    /// New flows.
    pub embryonic: EmbryonicTable<A>,
    /// Accounts of service ports.
    pub accounts: Accounts,
    /// Toward which backends source ports have run out.
    pub exhausted: ExhaustedMap<A>,
    /// Ports of fragmented packets.
    pub fragments: FragmentMap<A>,
    /// Which backends are still those that flows were made for.
    pub generations: Generations<A>,
}

impl<A: IpAddress> FamilyMaps<A> {
    fn open(ebpf: &mut Ebpf, dir: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            generations: Generations::open(dir)?,
            image: ImageMaps::open(|spec| take(ebpf, spec))?,
            established: EstablishedTable::open(ebpf)?,
            embryonic: EmbryonicTable::open(ebpf)?,
            accounts: Accounts::open(ebpf, &A::MAPS.accounts)?,
            exhausted: ExhaustedMap::open(ebpf)?,
            fragments: FragmentMap::open(ebpf)?,
        })
    }

    /// Sizes of the maps.
    pub fn sizes(&self) -> Sizes {
        Sizes {
            established: self.established.capacity(),
            embryonic: self.embryonic.capacity(),
            frontends: self.image.frontends_capacity(),
            backends: self.image.backends_capacity(),
            ring_slots: self.image.rings_capacity(),
            networks: self.image.networks_capacity(),
        }
    }
}

/// Pins that are removed again unless they are kept.
#[derive(Debug, Default)]
pub struct NewPins(Vec<PathBuf>);

impl NewPins {
    /// Leaves them for good.
    pub fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for NewPins {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = std::fs::remove_file(path)
                && error.kind() != io::ErrorKind::NotFound
            {
                warn!(pin = %path.display(), %error, "cannot remove a pin");
            }
        }
    }
}

/// The programs' counters.
pub struct Counters(PerCpuArray<MapData, u64>);

impl std::fmt::Debug for Counters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Counters").finish_non_exhaustive()
    }
}

impl Counters {
    /// The sum over all CPUs of every counter, by its index.
    ///
    /// # Errors
    /// When the kernel refuses a read.
    pub fn read(&self) -> io::Result<Vec<u64>> {
        self.0
            .iter()
            .map(|values| values.map(|values| values.iter().sum()))
            .collect::<Result<_, _>>()
            .map_err(io_error)
    }
}

/// Sizes of a map's key and value in bytes.
#[derive(Clone, Copy, Debug)]
struct Layout {
    key: usize,
    value: usize,
}

const fn of<K, V>() -> Layout {
    Layout { key: size_of::<K>(), value: size_of::<V>() }
}

/// Maps that outlive the agent, with their layouts. The others hold nothing that the next packet could not make again.
fn pinned() -> Vec<(&'static MapSpec, Layout)> {
    let shared = [(&tables::CONFIG, of::<u32, Config>()), (&tables::COUNTERS, of::<u32, u64>())];
    let shared = shared
        .into_iter()
        .chain([(&tables::HELD, Layout { key: 0, value: 0 }), reserved::PINNED])
        .chain([(&tables::XDP_NEXT, of::<u32, u32>()), (&tables::XDP_NEXT_FRAGS, of::<u32, u32>())])
        .chain(sockets::PINNED);
    pinned_of::<[u8; 4]>().into_iter().chain(pinned_of::<Ip6>()).chain(shared).collect()
}

fn pinned_of<A: IpAddress>() -> [(&'static MapSpec, Layout); 19] {
    let maps = A::MAPS;
    [
        (&maps.established, of::<u32, Slot<A>>()),
        (&maps.overflow, of::<FlowKey<A>, Flow<A>>()),
        (&maps.known, of::<u32, u64>()),
        (&maps.embryonic, of::<u32, Slot<A>>()),
        (&maps.tags, of::<u32, [u64; embryonic::TAG_WORDS]>()),
        (&maps.frontends, of::<FrontendKey<A>, Frontend>()),
        (&maps.backends, of::<u32, Backend<A>>()),
        (&maps.rings, of::<u32, u32>()),
        (&maps.networks, of::<lpm_trie::Key<Raw<NetworkKey<A>>>, u32>()),
        (&maps.affinity, of::<AffinityKey<A>, Affinity>()),
        (&maps.fragments, of::<FragmentKey<A>, FragmentPorts>()),
        (&maps.accounts, of::<u32, Account>()),
        (&maps.exhausted, of::<BackendKey<A>, u64>()),
        (&maps.devices, of::<u32, Device<A>>()),
        (&maps.sources, of::<lpm_trie::Key<Raw<NetworkKey<A>>>, Source<A>>()),
        (&maps.gate_ingress, of::<u32, u64>()),
        (&maps.gate_egress, of::<u32, u64>()),
        (&maps.sockets, of::<u32, SocketSettings<A>>()),
        (&maps.pods, of::<u64, A>()),
    ]
}

/// Every map of the datapath.
pub fn specs() -> impl Iterator<Item = &'static MapSpec> {
    <[u8; 4]>::MAPS.all().into_iter().chain(Ip6::MAPS.all()).chain(tables::SHARED)
}

/// Creates the maps, or adopts those an earlier agent has pinned.
///
/// # Errors
/// When the kernel refuses, or pinned maps do not fit this agent.
pub fn load(object: &[u8], dir: &Path, wanted: &Sizes) -> anyhow::Result<Loaded> {
    let mut pins = NewPins::default();
    let mut loader = EbpfLoader::new();
    loader.verifier_log_level(VerifierLogLevel::DEBUG);
    let mut is_adopted = false;
    for (spec, layout) in pinned() {
        let path = dir.join(spec.name);
        let wanted = entries(spec, wanted);
        let pinned = pinned_entries(spec, layout, &path, wanted)?;
        match pinned {
            Some(_) => is_adopted = true,
            None => pins.0.push(path.clone()),
        }
        loader.map_max_entries(spec.name, pinned.unwrap_or(wanted));
        loader.map_pin_path(spec.name, path);
    }
    remove_others(dir);
    let constants = Constants::of_this_machine()?;
    let mut ebpf = constants.set(&mut loader).load(object).map_err(refused)?;
    let settings = Settings::of(take(&mut ebpf, &tables::CONFIG)?)?;
    let v4 = FamilyMaps::open(&mut ebpf, dir)?;
    let v6 = FamilyMaps::open(&mut ebpf, dir)?;
    ensure!(
        (v4.established.homes(), v4.embryonic.buckets()) == (v6.established.homes(), v6.embryonic.buckets()),
        "the pinned tables of flows of IPv4 and of IPv6 have different sizes; start with --fresh"
    );
    let sockets = SocketMaps::open(&mut ebpf)?;
    let peers = PeerMaps::open(&mut ebpf, dir)?;
    let pods = PodMaps::open(&mut ebpf)?;
    let socket_counters = SocketCounters::open(&mut ebpf)?;
    let held = HeldFragments::open(&mut ebpf)?;
    let reserved_ports = ReservedPorts::of(&mut ebpf)?;
    let counters = Counters(PerCpuArray::try_from(take(&mut ebpf, &tables::COUNTERS)?)?);
    if is_adopted {
        info!(dir = %dir.display(), "adopting the maps of an earlier agent");
    }
    let programs = Programs::new(ebpf);
    Ok(Loaded {
        settings,
        v4,
        v6,
        counters,
        sockets,
        peers,
        pods,
        socket_counters,
        held,
        reserved_ports,
        programs,
        is_adopted,
        pins,
    })
}

/// Removes pinned maps of earlier agents that this one does not have.
fn remove_others(dir: &Path) {
    let is_known = |name: &OsStr| pinned().iter().any(|(spec, _)| *spec.name == *name);
    for path in std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()) {
        if path.file_name().is_some_and(is_known) {
            continue;
        }
        match std::fs::remove_file(&path) {
            Ok(()) => info!(pin = %path.display(), "removed a map of an earlier agent"),
            Err(error) => warn!(pin = %path.display(), %error, "cannot remove a map of an earlier agent"),
        }
    }
}

/// Entries of the pinned map, if there is one that can be adopted.
fn pinned_entries(spec: &MapSpec, layout: Layout, path: &Path, wanted: u32) -> anyhow::Result<Option<u32>> {
    if !path.exists() {
        return Ok(None);
    }
    let info =
        MapInfo::from_pin(path).with_context(|| format!("cannot open the pinned map {}", path.display()))?;
    if (layout.key, layout.value) != (info.key_size() as usize, info.value_size() as usize) {
        bail!(
            "the pinned map {} has another layout than this agent's; start with --fresh, which ends the flows in it",
            path.display()
        );
    }
    if info.max_entries() == wanted {
        return Ok(Some(wanted));
    }
    // Another agent may know other counters. They may start anew; nothing depends on them.
    if spec.name == tables::COUNTERS.name {
        std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
        return Ok(None);
    }
    warn!(
        map = spec.name,
        entries = info.max_entries(),
        wanted,
        "a pinned map has another size than the flags ask for; it stays as it is until a start with --fresh"
    );
    Ok(Some(info.max_entries()))
}

fn entries(spec: &MapSpec, sizes: &Sizes) -> u32 {
    of_family::<[u8; 4]>(spec, sizes).or_else(|| of_family::<Ip6>(spec, sizes)).unwrap_or(spec.entries)
}

/// Entries of a map of a family whose size the flags decide.
fn of_family<A: IpAddress>(spec: &MapSpec, sizes: &Sizes) -> Option<u32> {
    let maps = A::MAPS;
    let sized = [
        (&maps.established, sizes.established),
        (&maps.overflow, (sizes.established / OVERFLOW_SHARE).max(1)),
        (&maps.embryonic, buckets(sizes) * WAYS),
        (&maps.tags, buckets(sizes)),
        (&maps.frontends, sizes.frontends),
        (&maps.backends, sizes.backends),
        (&maps.rings, sizes.ring_slots),
        (&maps.networks, sizes.networks),
    ];
    sized.into_iter().find(|(sized, _)| sized.name == spec.name).map(|(_, entries)| entries)
}

/// Buckets of the table of new flows.
fn buckets(sizes: &Sizes) -> u32 {
    (sizes.embryonic / WAYS).max(1)
}

fn take(ebpf: &mut Ebpf, spec: &MapSpec) -> anyhow::Result<Map> {
    ebpf.take_map(spec.name).with_context(|| missing(spec))
}

pub(crate) fn missing(spec: &MapSpec) -> String {
    format!(
        "the BPF object has no map {}; it is of another version, build it with `cargo xtask build`",
        spec.name
    )
}

fn refused(error: aya::EbpfError) -> anyhow::Error {
    let errno = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source())
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .find_map(io::Error::raw_os_error);
    let context = match errno {
        Some(libc::EPERM) => {
            "the kernel does not permit BPF maps here; run in the first user namespace with CAP_BPF and CAP_NET_ADMIN, and \
             before kernel 5.11 with a raised RLIMIT_MEMLOCK"
        }
        Some(libc::ENOMEM | libc::E2BIG) => {
            "the kernel has no memory for the maps; choose smaller ones by --max-established and its like"
        }
        _ => {
            return anyhow::Error::new(error).context(format!(
                "cannot load the BPF object; it needs kernel {KERNEL_MIN} or later with CONFIG_BPF_SYSCALL"
            ));
        }
    };
    anyhow::Error::new(error).context(context)
}

/// The errno inside a map's error.
pub(crate) fn io_error(error: MapError) -> io::Error {
    if let MapError::SyscallError(error) = error {
        return error.io_error;
    }
    if let MapError::KeyNotFound | MapError::ElementNotFound = error {
        return io::Error::from_raw_os_error(libc::ENOENT);
    }
    io::Error::other(error)
}

/// A descriptor of a map, for calls that the typed handles do not offer.
fn descriptor(map: &Map) -> anyhow::Result<OwnedFd> {
    data(map)?.fd().as_fd().try_clone_to_owned().context("cannot keep a map open")
}

fn capacity(map: &Map) -> anyhow::Result<u32> {
    Ok(data(map)?.info().context("cannot look at a map")?.max_entries())
}

fn data(map: &Map) -> anyhow::Result<&MapData> {
    let (Map::Array(data)
    | Map::HashMap(data)
    | Map::LruHashMap(data)
    | Map::LpmTrie(data)
    | Map::PerCpuArray(data)) = map
    else {
        bail!("the BPF object is of another version, build it with `cargo xtask build`");
    };
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_that_nobody_has_any_more_are_removed_and_the_others_stay() {
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["TCP_PEERS", tables::CONFIG.name, tables::UDP_PEERS.name] {
            std::fs::write(dir.path().join(name), []).expect("written");
        }
        remove_others(dir.path());
        let left = std::fs::read_dir(dir.path()).expect("a directory").flatten();
        let mut left: Vec<_> = left.map(|entry| entry.file_name()).collect();
        left.sort();
        assert_eq!(left, [tables::CONFIG.name, tables::UDP_PEERS.name]);
    }
}
