//! The maps: created or adopted at their pins, and written through typed handles.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::{Map, MapData, MapError, MapInfo, PerCpuArray, lpm_trie},
};
use tracing::{info, warn};
use xdp_common::{
    net::{FlowKey, Plain},
    tables::{
        self, Account, Affinity, AffinityKey, Backend, Config, Device, Embryo, Flow, Frontend, FrontendKey,
        MapSpec, NetworkKey, WAYS,
    },
};

use crate::{attach::Programs, config::Sizes, preflight::KernelVersion};

pub use accounts::Accounts;
pub use embryonic::EmbryonicTable;
pub use established::EstablishedTable;
pub use image::ImageMaps;
pub use sockets::{PeerMaps, PodMaps, SocketCounters, SocketMaps};

mod accounts;
mod batch;
pub mod embryonic;
pub mod established;
mod handles;
pub mod image;
mod known;
mod mapping;
mod sockets;

type Addr = [u8; 4];

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

/// From this version on socket hooks may name the error that a call ends with (`bpf_set_retval`, kernel commit
/// dea6a4e17013).
const NAMES_ERRORS_SINCE: KernelVersion = KernelVersion(6, 0);

/// The BPF object that the build has embedded; empty when there was none.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/xdp-ebpf"));

/// Everything that loading yields.
#[derive(Debug)]
pub struct Loaded {
    /// The maps that say what is served.
    pub image: ImageMaps,
    /// Flows that have been answered.
    pub established: EstablishedTable,
    /// New flows.
    pub embryonic: EmbryonicTable,
    /// Counters of the programs.
    pub counters: Counters,
    /// Accounts of service ports.
    pub accounts: Accounts,
    /// What the socket hooks are told.
    pub sockets: SocketMaps,
    /// What they have told UDP sockets.
    pub peers: PeerMaps,
    /// Addresses of pods, for them.
    pub pods: PodMaps,
    /// Their counters.
    pub socket_counters: SocketCounters,
    /// The programs, not yet loaded.
    pub programs: Programs,
    /// Sizes as the maps have them, which are those of an earlier agent where its maps were adopted.
    pub sizes: Sizes,
    /// Whether an earlier agent's maps were adopted.
    pub is_adopted: bool,
    /// Pins that were made, until the start succeeds.
    pub pins: NewPins,
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

/// Maps that outlive the agent. The others hold nothing that the next packet could not make again.
const PINNED: [(&MapSpec, Layout); 15] = [
    (&tables::ESTABLISHED_V4, of::<FlowKey<Addr>, Flow<Addr>>()),
    (&tables::KNOWN_V4, of::<u32, u64>()),
    (&tables::EMBRYONIC_V4, of::<u32, Embryo<Addr>>()),
    (&tables::TAGS_V4, of::<u32, [u64; embryonic::TAG_WORDS]>()),
    (&tables::FRONTENDS_V4, of::<FrontendKey<Addr>, Frontend>()),
    (&tables::BACKENDS_V4, of::<u32, Backend<Addr>>()),
    (&tables::RINGS, of::<u32, u32>()),
    (&tables::NETWORKS_V4, of::<lpm_trie::Key<Raw<NetworkKey<Addr>>>, u32>()),
    (&tables::AFFINITY_V4, of::<AffinityKey<Addr>, Affinity>()),
    (&tables::ACCOUNTS, of::<u32, Account>()),
    (&tables::DEVICES_V4, of::<u32, Device<Addr>>()),
    (&tables::GATE_INGRESS, of::<u32, u64>()),
    (&tables::GATE_EGRESS, of::<u32, u64>()),
    (&tables::CONFIG, of::<u32, Config>()),
    (&tables::COUNTERS, of::<u32, u64>()),
];

/// Creates the maps, or adopts those an earlier agent has pinned.
///
/// # Errors
/// When the kernel refuses, or pinned maps do not fit this agent.
pub fn load(object: &[u8], dir: &Path, wanted: &Sizes) -> anyhow::Result<Loaded> {
    let mut pins = NewPins::default();
    let mut loader = EbpfLoader::new();
    loader.verifier_log_level(VerifierLogLevel::DEBUG);
    let mut is_adopted = false;
    for (spec, layout) in PINNED.into_iter().chain(sockets::PINNED) {
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
    let names_errors = u32::from(KernelVersion::current()? >= NAMES_ERRORS_SINCE);
    loader.override_global("NAMES_ERRORS", &names_errors, true);
    let mut ebpf = loader.load(object).map_err(refused)?;
    let image = ImageMaps::open(|spec| take(&mut ebpf, spec))?;
    let established = EstablishedTable::open(&mut ebpf)?;
    let embryonic = EmbryonicTable::open(&ebpf)?;
    let accounts = Accounts::open(&mut ebpf)?;
    let sockets = SocketMaps::open(&mut ebpf)?;
    let peers = PeerMaps::open(&mut ebpf, &dir.join(tables::BACKENDS_V4.name))?;
    let pods = PodMaps::open(&mut ebpf)?;
    let socket_counters = SocketCounters::open(&mut ebpf)?;
    let counters = Counters(PerCpuArray::try_from(take(&mut ebpf, &tables::COUNTERS)?)?);
    let sizes = Sizes {
        established: established.capacity(),
        embryonic: embryonic.capacity(),
        frontends: image.frontends_capacity(),
        backends: image.backends_capacity(),
        ring_slots: image.rings_capacity(),
        networks: image.networks_capacity(),
    };
    if is_adopted {
        info!(dir = %dir.display(), "adopting the maps of an earlier agent");
    }
    let programs = Programs::new(ebpf);
    Ok(Loaded {
        image,
        established,
        embryonic,
        counters,
        accounts,
        sockets,
        peers,
        pods,
        socket_counters,
        programs,
        sizes,
        is_adopted,
        pins,
    })
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
    match spec.name {
        name if name == tables::ESTABLISHED_V4.name => sizes.established,
        name if name == tables::EMBRYONIC_V4.name => buckets(sizes) * WAYS,
        name if name == tables::TAGS_V4.name => buckets(sizes),
        name if name == tables::FRONTENDS_V4.name => sizes.frontends,
        name if name == tables::BACKENDS_V4.name => sizes.backends,
        name if name == tables::RINGS.name => sizes.ring_slots,
        name if name == tables::NETWORKS_V4.name => sizes.networks,
        _ => spec.entries,
    }
}

/// Buckets of the table of new flows.
fn buckets(sizes: &Sizes) -> u32 {
    (sizes.embryonic / WAYS).max(1)
}

fn take(ebpf: &mut Ebpf, spec: &MapSpec) -> anyhow::Result<Map> {
    ebpf.take_map(spec.name).with_context(|| missing(spec))
}

fn missing(spec: &MapSpec) -> String {
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
        _ => "cannot load the BPF object; it needs kernel 5.12 or later with CONFIG_BPF_SYSCALL",
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
