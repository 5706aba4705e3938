//! The maps of the socket hooks.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use aya::{
    Ebpf, Pod,
    maps::{HashMap, MapData, PerCpuArray},
};
use xdp_common::{
    net::{Address, Ip6, Port, UDP},
    tables::{
        self, Backend, Connected, Frontend, FrontendKey, MapSpec, Peer, PeerKey, SocketCall, SocketSettings,
        frontend,
    },
    verdict::Reason,
};

use super::{
    BPF_NOEXIST, Layout, Raw, batch, descriptor,
    handles::{Slots, absent_is_fine, absent_is_none, present_is_fine},
    image::open_pinned,
    io_error, of, raw, take, zero,
};
use crate::bpf::map_take;

/// Maps that outlive the agent: what sockets have been told has to be undone as long as they live.
pub(super) const PINNED: [(&MapSpec, Layout); 5] = [
    (&tables::UDP_PEERS, of::<PeerKey, Peer>()),
    (&tables::UDP_CONNECTED, of::<u64, Connected>()),
    (&tables::TCP_COOKIES, of::<u32, [u64; tables::SOCKET_WAYS as usize]>()),
    (&tables::TCP_TOLD, of::<u32, Connected>()),
    (&tables::SOCKET_COUNTERS, of::<u32, u64>()),
];

/// What the agent writes for the socket hooks.
pub struct SocketMaps {
    v4: Slots<Raw<SocketSettings<[u8; 4]>>>,
    v6: Slots<Raw<SocketSettings<Ip6>>>,
}

/// What connected UDP sockets have been told, beside the backends of now.
pub struct PeerMaps {
    fd: OwnedFd,
    connected: HashMap<MapData, u64, Raw<Connected>>,
    v4: Slots<Raw<Backend<[u8; 4]>>>,
    v6: Slots<Raw<Backend<Ip6>>>,
    frontends_v4: Frontends<[u8; 4]>,
    frontends_v6: Frontends<Ip6>,
}

type Frontends<A> = HashMap<MapData, Raw<FrontendKey<A>>, Raw<Frontend>>;

/// Addresses of pods by network namespace, for the source ranges.
pub struct PodMaps {
    v4: HashMap<MapData, u64, [u8; 4]>,
    v6: HashMap<MapData, u64, [u32; 4]>,
}

impl std::fmt::Debug for PodMaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PodMaps").finish_non_exhaustive()
    }
}

impl PodMaps {
    pub(super) fn open(ebpf: &mut Ebpf) -> anyhow::Result<Self> {
        let v4 = HashMap::try_from(take(ebpf, &tables::PODS_V4)?)?;
        Ok(Self { v4, v6: HashMap::try_from(take(ebpf, &tables::PODS_V6)?)? })
    }

    /// Makes these the addresses of IPv4, by cookies of namespaces; those that do not fit are not known.
    ///
    /// # Errors
    /// When the kernel refuses a write.
    pub fn set_v4(&mut self, pods: &[(u64, [u8; 4])]) -> io::Result<()> {
        fill(&mut self.v4, pods)
    }

    /// Makes these the addresses of IPv6.
    ///
    /// # Errors
    /// When the kernel refuses a write.
    pub fn set_v6(&mut self, pods: &[(u64, Ip6)]) -> io::Result<()> {
        let pods: Vec<_> = pods.iter().map(|(cookie, addr)| (*cookie, addr.words())).collect();
        fill(&mut self.v6, &pods)
    }
}

fn fill<V: Pod>(map: &mut HashMap<MapData, u64, V>, pods: &[(u64, V)]) -> io::Result<()> {
    let there: Vec<u64> = map.keys().collect::<Result<_, _>>().map_err(io_error)?;
    for gone in there.iter().filter(|there| !pods.iter().any(|(cookie, _)| cookie == *there)) {
        map.remove(gone).map_err(io_error)?;
    }
    for (cookie, addr) in pods.iter().take(tables::PODS_V4.entries as usize) {
        map.insert(cookie, addr, 0).map_err(io_error)?;
    }
    Ok(())
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
        Ok(Self {
            v4: Slots::of(take(ebpf, &tables::SOCKETS_V4)?)?,
            v6: Slots::of(take(ebpf, &tables::SOCKETS_V6)?)?,
        })
    }

    /// Tells the hooks of IPv4.
    ///
    /// # Errors
    /// When the kernel refuses the write.
    pub fn set_v4(&mut self, settings: SocketSettings<[u8; 4]>) -> io::Result<()> {
        self.v4.set(0, raw(settings))
    }

    /// Tells the hooks of IPv6.
    ///
    /// # Errors
    /// When the kernel refuses the write.
    pub fn set_v6(&mut self, settings: SocketSettings<Ip6>) -> io::Result<()> {
        self.v6.set(0, raw(settings))
    }
}

impl PeerMaps {
    /// Handles; those of the backends are second ones, by their pins.
    pub(super) fn open(ebpf: &mut Ebpf, dir: &Path) -> anyhow::Result<Self> {
        let connected = take(ebpf, &tables::UDP_CONNECTED)?;
        let fd = descriptor(&connected)?;
        let v4 = Slots::of(open_pinned(dir, &tables::BACKENDS_V4)?)?;
        let v6 = Slots::of(open_pinned(dir, &tables::BACKENDS_V6)?)?;
        let frontends_v4 = HashMap::try_from(open_pinned(dir, &tables::FRONTENDS_V4)?)?;
        let frontends_v6 = HashMap::try_from(open_pinned(dir, &tables::FRONTENDS_V6)?)?;
        Ok(Self { fd, connected: HashMap::try_from(connected)?, v4, v6, frontends_v4, frontends_v6 })
    }

    /// Whether a UDP socket is connected to a frontend itself, which the hooks would lead to a backend or refuse. An address of
    /// the node is left out, unless the port is a NodePort: a process of the node may serve it.
    ///
    /// # Errors
    /// When the kernel refuses a read.
    pub fn is_stranded(&self, cookie: u64, addr: Ip6, port: Port) -> io::Result<bool> {
        let v4 = <[u8; 4]>::from_wide(addr);
        let flags = if v4.wide() == addr {
            flags_of(&self.frontends_v4, v4, port)?
        } else {
            flags_of(&self.frontends_v6, addr, port)?
        };
        let is_served = flags
            .is_some_and(|flags| flags & frontend::NODE_ADDRESS == 0 || flags & frontend::NODE_PORT != 0);
        if !is_served {
            return Ok(false);
        }
        // A backend can be a frontend itself.
        let told = absent_is_none(self.connected.get(&cookie, 0))?;
        Ok(told.is_none_or(|told| (told.addr, told.port) != (addr, port)))
    }

    /// Sockets, by their cookies, and the backends that they are connected to and that do not serve any more.
    ///
    /// # Errors
    /// When the kernel refuses a read.
    pub fn stale(&self) -> io::Result<std::collections::HashMap<u64, Connected>> {
        let mut all = Vec::new();
        let zero = (0u64, zero::<Connected>());
        match batch::walk(&self.fd, zero, |cookie, Raw(connected)| all.push((cookie, connected))) {
            Err(error) if batch::is_missing(&error) => {
                for entry in self.connected.iter().take(2 * tables::UDP_CONNECTED.entries as usize) {
                    let (cookie, Raw(connected)) = entry.map_err(io_error)?;
                    all.push((cookie, connected));
                }
            }
            result => result?,
        }
        let mut generations = std::collections::HashMap::new();
        let mut stale = std::collections::HashMap::new();
        for (cookie, connected) in all {
            let Connected { addr, told, .. } = connected;
            let is_v4 = <[u8; 4]>::from_wide(addr).wide() == addr;
            let now = match generations.get(&(is_v4, told.backend)) {
                Some(now) => *now,
                None => {
                    let now = self.generation(is_v4, told.backend)?;
                    generations.insert((is_v4, told.backend), now);
                    now
                }
            };
            if now != Some(told.generation) {
                stale.insert(cookie, connected);
            }
        }
        Ok(stale)
    }

    /// The generation of a backend that serves.
    fn generation(&self, is_v4: bool, id: u32) -> io::Result<Option<u32>> {
        let (proto, generation) = if is_v4 {
            let Raw(backend) = self.v4.map.get(&id, 0).map_err(io_error)?;
            (backend.proto, backend.generation)
        } else {
            let Raw(backend) = self.v6.map.get(&id, 0).map_err(io_error)?;
            (backend.proto, backend.generation)
        };
        Ok((proto == UDP).then_some(generation))
    }

    /// Forgets what a socket has been told, unless it has been told something else since; whether that was there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn forget(&mut self, cookie: u64, seen: &Connected) -> io::Result<bool> {
        let mut taken = zero::<Connected>();
        // SAFETY: the map was opened with these types, and any bytes are such a value.
        let result =
            unsafe { map_take(self.fd.as_fd(), (&raw const cookie).cast(), (&raw mut taken).cast()) };
        match result {
            // A process has connected it again meanwhile.
            Ok(()) if taken.0 != *seen => {
                let put = self.connected.insert(cookie, taken, BPF_NOEXIST).map_err(io_error);
                present_is_fine(put).map(|()| false)
            }
            Ok(()) => Ok(true),
            Err(error) if batch::is_missing(&error) => self.forget_unguarded(cookie, seen),
            Err(error) => absent_is_fine(Err(error)).map(|()| false),
        }
    }

    /// The same before kernel 5.14, where an entry may have become another by the time that it is removed.
    fn forget_unguarded(&mut self, cookie: u64, seen: &Connected) -> io::Result<bool> {
        let is_there = self.connected.get(&cookie, 0).is_ok_and(|Raw(now)| now == *seen);
        if is_there {
            absent_is_fine(self.connected.remove(&cookie).map_err(io_error))?;
        }
        Ok(is_there)
    }
}

/// The flags of a frontend of UDP.
fn flags_of<A: Address>(frontends: &Frontends<A>, addr: A, port: Port) -> io::Result<Option<u32>> {
    let at = FrontendKey { addr, port, proto: UDP, zero: 0 };
    Ok(absent_is_none(frontends.get(&raw(at), 0))?.map(|found| found.flags))
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
