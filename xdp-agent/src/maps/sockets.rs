//! The maps of the socket hooks.

use std::{
    io,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context;
use aya::{
    Ebpf,
    maps::{HashMap, Map, MapData, PerCpuArray},
};
use xdp_common::{
    net::UDP,
    tables::{self, Backend, MapSpec, Peer, PeerKey, SocketCall, SocketSettings},
    verdict::Reason,
};

use super::{Addr, Layout, Raw, batch, descriptor, handles::Slots, io_error, of, raw, take};

/// Maps that outlive the agent: what sockets have been told has to be undone as long as they live.
pub(super) const PINNED: [(&MapSpec, Layout); 5] = [
    (&tables::UDP_PEERS, of::<PeerKey, Peer>()),
    (&tables::TCP_PEERS, of::<PeerKey, Peer>()),
    (&tables::SOCKETS_V4, of::<u32, SocketSettings<Addr>>()),
    (&tables::PODS_V4, of::<u64, Addr>()),
    (&tables::SOCKET_COUNTERS, of::<u32, u64>()),
];

/// What the agent writes for the socket hooks.
pub struct SocketMaps {
    settings: Slots<Raw<SocketSettings<Addr>>>,
}

/// What UDP sockets have been told, beside the backends of now.
pub struct PeerMaps {
    fd: OwnedFd,
    peers: HashMap<MapData, Raw<PeerKey>, Raw<Peer>>,
    backends: Slots<Raw<Backend<Addr>>>,
}

/// Addresses of pods by network namespace, for the source ranges.
pub struct PodMaps(HashMap<MapData, u64, Addr>);

impl std::fmt::Debug for PodMaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PodMaps").finish_non_exhaustive()
    }
}

impl PodMaps {
    pub(super) fn open(ebpf: &mut Ebpf) -> anyhow::Result<Self> {
        Ok(Self(HashMap::try_from(take(ebpf, &tables::PODS_V4)?)?))
    }

    /// Makes these the addresses, by cookies of namespaces; those that do not fit are not known.
    ///
    /// # Errors
    /// When the kernel refuses a write.
    pub fn set(&mut self, pods: &std::collections::HashMap<u64, Addr>) -> io::Result<()> {
        let there: Vec<u64> = self.0.keys().collect::<Result<_, _>>().map_err(io_error)?;
        for gone in there.iter().filter(|cookie| !pods.contains_key(cookie)) {
            self.0.remove(gone).map_err(io_error)?;
        }
        for (cookie, addr) in pods.iter().take(tables::PODS_V4.entries as usize) {
            self.0.insert(cookie, addr, 0).map_err(io_error)?;
        }
        Ok(())
    }
}

/// The counters of the socket hooks.
#[derive(Clone)]
pub struct SocketCounters(Arc<Mutex<PerCpuArray<MapData, u64>>>);

impl std::fmt::Debug for SocketMaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SocketMaps").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for PeerMaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerMaps").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for SocketCounters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SocketCounters").finish_non_exhaustive()
    }
}

impl SocketMaps {
    pub(super) fn open(ebpf: &mut Ebpf) -> anyhow::Result<Self> {
        Ok(Self { settings: Slots::of(take(ebpf, &tables::SOCKETS_V4)?)? })
    }

    /// Tells the hooks.
    ///
    /// # Errors
    /// When the kernel refuses the write.
    pub fn set(&mut self, settings: SocketSettings<Addr>) -> io::Result<()> {
        self.settings.set(0, raw(settings))
    }
}

impl PeerMaps {
    /// Handles; that of the backends is a second one, by its pin.
    pub(super) fn open(ebpf: &mut Ebpf, backends: &Path) -> anyhow::Result<Self> {
        let peers = take(ebpf, &tables::UDP_PEERS)?;
        let fd = descriptor(&peers)?;
        let backends = MapData::from_pin(backends).and_then(Map::from_map_data);
        let backends = backends.context("cannot open the pinned map of backends")?;
        Ok(Self { fd, peers: HashMap::try_from(peers)?, backends: Slots::of(backends)? })
    }

    /// Backends, by the sockets that have been led to them, that do not serve any more.
    ///
    /// # Errors
    /// When the kernel refuses a read.
    pub fn stale(&self) -> io::Result<Vec<PeerKey>> {
        let mut told = Vec::new();
        let zero = (raw(ZERO_KEY), raw(ZERO_PEER));
        match batch::walk(&self.fd, zero, |Raw(key), Raw(peer)| told.push((key, peer))) {
            Err(error) if batch::is_missing(&error) => {
                for entry in self.peers.iter().take(2 * tables::UDP_PEERS.entries as usize) {
                    let (Raw(key), Raw(peer)) = entry.map_err(io_error)?;
                    told.push((key, peer));
                }
            }
            result => result?,
        }
        let mut generations = std::collections::HashMap::new();
        let mut stale = Vec::new();
        for (key, peer) in told.iter().filter(|(key, _)| key.side == tables::side::BACKEND) {
            let now = match generations.get(&peer.backend) {
                Some(now) => *now,
                None => {
                    let Raw(backend) = self.backends.map.get(&peer.backend, 0).map_err(io_error)?;
                    let now = (backend.proto == UDP).then_some(backend.generation);
                    generations.insert(peer.backend, now);
                    now
                }
            };
            if now != Some(peer.generation) {
                stale.push(*key);
            }
        }
        Ok(stale)
    }

    /// Forgets what a socket has been told.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn forget(&mut self, key: &PeerKey) -> io::Result<()> {
        match self.peers.remove(&raw(*key)).map_err(io_error) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

impl SocketCounters {
    pub(super) fn open(ebpf: &mut Ebpf) -> anyhow::Result<Self> {
        let map = PerCpuArray::try_from(take(ebpf, &tables::SOCKET_COUNTERS)?)?;
        Ok(Self(Arc::new(Mutex::new(map))))
    }

    /// How often each call has ended how, over all CPUs: none for a translation, or a refusal's reason.
    ///
    /// # Errors
    /// When the kernel refuses a read.
    pub fn read(&self) -> io::Result<Vec<(SocketCall, Option<Reason>, u64)>> {
        let map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let results = || std::iter::once(None).chain(Reason::ALL.iter().copied().map(Some));
        let all = SocketCall::ALL.into_iter().flat_map(|call| results().map(move |result| (call, result)));
        all.map(|(call, result)| {
            let values = map.get(&call.counter(result), 0).map_err(io_error)?;
            Ok((call, result, values.iter().sum()))
        })
        .collect()
    }
}

const ZERO_KEY: PeerKey = PeerKey { cookie: 0, addr: [0; 16], port: [0; 2], side: 0, zero: [0; 5] };
const ZERO_PEER: Peer =
    Peer { addr: [0; 16], port: [0; 2], zero: [0; 2], backend: 0, generation: 0, service: 0 };
