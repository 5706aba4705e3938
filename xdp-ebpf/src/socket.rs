//! The context of a socket hook, and the maps that only these hooks have.
//!
//! The verifier lets a context be read and written by whole fields only, so every access here is one volatile word.

use core::{arch::asm, ffi::c_void};

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_ANY, bpf_sock_addr},
    helpers,
    macros::map,
    maps::{LruHashMap, PerCpuArray},
    programs::{SockAddrContext, SockContext},
};
use xdp_common::{
    decide::socket::Sockets,
    net::{Address, Ip6, Port, TCP, UDP, V4},
    tables::{self, Connected, Peer, PeerKey, SocketSettings},
};

use crate::{family::Maps, maps::Kernel, tcp_sockets};

type AddrV4 = [u8; 4];

#[map]
static UDP_PEERS: LruHashMap<PeerKey, Peer> = LruHashMap::with_max_entries(tables::UDP_PEERS.entries, 0);
#[map]
static UDP_CONNECTED: LruHashMap<u64, Connected> =
    LruHashMap::with_max_entries(tables::UDP_CONNECTED.entries, 0);
#[map]
static SOCKET_COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(tables::SOCKET_COUNTERS.entries, 0);

/// 1 where hooks may name the error that a call ends with (kernel 6.0); set by the agent when it loads the programs. The
/// verifier knows the value and does not look at the helper where it is not to be called.
#[unsafe(no_mangle)]
static NAMES_ERRORS: u32 = 0;

/// The socket of a call.
#[derive(Clone, Copy)]
pub(crate) struct Socket(*mut bpf_sock_addr);

/// Reads or writes one field of the context.
macro_rules! field {
    ($socket:expr, $($field:tt)+) => {
        // SAFETY: the context is valid for as long as the program runs, and so is every field of it.
        unsafe { (&raw const (*$socket.0).$($field)+).read_volatile() }
    };
}
macro_rules! set_field {
    ($socket:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: as for reads; the kernel lets these fields be written.
        unsafe { (&raw mut (*$socket.0).$($field)+).write_volatile($value) }
    };
}

impl Socket {
    #[inline(always)]
    pub(crate) fn new(ctx: &SockAddrContext) -> Self {
        Self(ctx.sock_addr)
    }

    /// The context, for helpers.
    #[inline(always)]
    pub(crate) fn context(self) -> *mut c_void {
        self.0.cast()
    }

    /// IP protocol of the socket.
    #[inline(always)]
    pub(crate) fn proto(self) -> u8 {
        field!(self, protocol) as u8
    }

    /// The port of the address.
    #[inline(always)]
    pub(crate) fn port(self) -> Port {
        (field!(self, user_port) as u16).to_ne_bytes()
    }

    #[inline(always)]
    pub(crate) fn set_port(self, port: Port) {
        set_field!(self, u16::from_ne_bytes(port) as u32, user_port);
    }

    /// The address, in hooks of IPv4.
    #[inline(always)]
    pub(crate) fn address_v4(self) -> AddrV4 {
        field!(self, user_ip4).to_ne_bytes()
    }

    #[inline(always)]
    pub(crate) fn set_address_v4(self, addr: AddrV4) {
        set_field!(self, u32::from_ne_bytes(addr), user_ip4);
    }

    /// The address, in hooks of IPv6.
    #[inline(always)]
    pub(crate) fn address_v6(self) -> Ip6 {
        ip6([
            field!(self, user_ip6[0]),
            field!(self, user_ip6[1]),
            field!(self, user_ip6[2]),
            field!(self, user_ip6[3]),
        ])
    }

    #[inline(always)]
    pub(crate) fn set_address_v6(self, addr: Ip6) {
        let [a, b, c, d] = addr.words();
        set_field!(self, a, user_ip6[0]);
        set_field!(self, b, user_ip6[1]);
        set_field!(self, c, user_ip6[2]);
        set_field!(self, d, user_ip6[3]);
    }

    /// The address that the socket is bound to, unspecified for none.
    #[inline(always)]
    pub(crate) fn source_v4(self) -> AddrV4 {
        let sk = field!(self, __bindgen_anon_1.sk);
        if sk.is_null() {
            return AddrV4::UNSPECIFIED;
        }
        // SAFETY: the kernel gives the hooks a full socket here.
        unsafe { (&raw const (*sk).src_ip4).read_volatile() }.to_ne_bytes()
    }

    /// The same of IPv6.
    #[inline(always)]
    pub(crate) fn source_v6(self) -> Ip6 {
        let sk = field!(self, __bindgen_anon_1.sk);
        if sk.is_null() {
            return Ip6::UNSPECIFIED;
        }
        // SAFETY: as for IPv4; the verifier takes single words.
        let word = |at: usize| unsafe { (&raw const (*sk).src_ip6[at]).read_volatile() };
        ip6([word(0), word(1), word(2), word(3)])
    }

    /// Cookie of the network namespace.
    #[inline(always)]
    pub(crate) fn namespace(self) -> u64 {
        // SAFETY: the context is valid.
        unsafe { helpers::bpf_get_netns_cookie(self.context()) }
    }

    /// Whether the socket is one of the node itself, not of a pod.
    #[inline(always)]
    pub(crate) fn is_host(self) -> bool {
        let told = V4::sockets().get(0).map_or(0, |settings| settings.host_namespace);
        let host = if told != 0 {
            told
        } else {
            // SAFETY: without a context the helper answers for the first namespace of the kernel.
            unsafe { helpers::bpf_get_netns_cookie(core::ptr::null_mut()) }
        };
        self.namespace() == host
    }

    /// Cookie of the socket.
    #[inline(always)]
    pub(crate) fn cookie(self) -> u64 {
        // SAFETY: the context is valid.
        unsafe { helpers::bpf_get_socket_cookie(self.context()) }
    }

    /// A random number.
    #[inline(always)]
    pub(crate) fn random() -> u32 {
        // SAFETY: the helper takes nothing.
        unsafe { helpers::bpf_get_prandom_u32() }
    }

    /// Sets the error that the call ends with, where the kernel lets it be named; elsewhere it is `EPERM`.
    #[inline(always)]
    pub(crate) fn fail(errno: i32) {
        // SAFETY: a static of this object, which nobody writes once it is loaded.
        if unsafe { (&raw const NAMES_ERRORS).read_volatile() } != 0 {
            // SAFETY: the helper takes a number.
            unsafe { helpers::bpf_set_retval(-errno) };
        }
    }
}

impl<F: Maps> Sockets<F> for Kernel<F> {
    #[inline(always)]
    fn settings(self) -> SocketSettings<F::Addr> {
        // The one slot is always there.
        F::sockets().get(0).copied().unwrap_or(SocketSettings {
            host_namespace: 0,
            node: F::Addr::UNSPECIFIED,
            node_ports: F::Addr::UNSPECIFIED,
            flags: 0,
            zero: [0; 4],
        })
    }

    #[inline(always)]
    fn peer(self, key: &PeerKey) -> Option<Peer> {
        // SAFETY: copied at once; the kernel replaces elements as a whole.
        unsafe { UDP_PEERS.get(key) }.copied()
    }

    #[inline(always)]
    fn set_peer(self, key: &PeerKey, peer: &Peer) -> bool {
        UDP_PEERS.insert(key, peer, BPF_ANY as u64).is_ok()
    }

    #[inline(always)]
    fn connected(self, proto: u8, cookie: u64) -> Option<Connected> {
        if proto == TCP {
            return tcp_sockets::get(cookie);
        }
        // SAFETY: as above.
        unsafe { UDP_CONNECTED.get(cookie) }.copied()
    }

    #[inline(always)]
    fn set_connected(self, proto: u8, cookie: u64, connected: &Connected) -> bool {
        if proto == TCP {
            return tcp_sockets::set(cookie, connected);
        }
        UDP_CONNECTED.insert(cookie, connected, BPF_ANY as u64).is_ok()
    }

    #[inline(always)]
    fn forget_connected(self, proto: u8, cookie: u64) {
        if proto == TCP {
            return tcp_sockets::remove(cookie);
        }
        // Most have not been told anything.
        let _ = UDP_CONNECTED.remove(cookie);
    }

    #[inline(always)]
    fn forget_peer(self, key: &PeerKey) {
        // Fails where another thread has done so.
        let _ = UDP_PEERS.remove(key);
    }

    #[inline(always)]
    fn pod_address(self, namespace: u64) -> F::Addr {
        // SAFETY: copied at once.
        unsafe { F::pods().get(namespace) }.copied().unwrap_or(F::Addr::UNSPECIFIED)
    }
}

/// Forgets what a socket has been told that is being closed. Most have never asked for a Service.
#[inline(always)] // one caller
pub(crate) fn forget(ctx: &SockContext) {
    // SAFETY: the helper takes the context of this type of programs.
    let cookie = || unsafe { helpers::bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the context is valid for as long as the program runs.
    match unsafe { (&raw const (*ctx.sock).protocol).read_volatile() } {
        proto if proto == TCP as u32 => tcp_sockets::remove(cookie()),
        proto if proto == UDP as u32 => drop(UDP_CONNECTED.remove(cookie())),
        _ => {}
    }
}

/// Counts; a process may be interrupted here by another on the same CPU.
#[inline(always)]
pub(crate) fn count(counter: u32) {
    if let Some(slot) = SOCKET_COUNTERS.get_ptr_mut(counter) {
        // SAFETY: an aligned word of the map, which programs change by such additions only.
        unsafe {
            asm!("{one} = atomic_fetch_add((u64 *)({slot} + 0), {one})", slot = in(reg) slot,
                one = inout(reg) 1u64 => _)
        }
    }
}

/// An address by its words as the kernel has them.
#[inline(always)]
fn ip6(words: [u32; 4]) -> Ip6 {
    let [a, b, c, d] = words;
    Ip6::from_quads([a.to_ne_bytes(), b.to_ne_bytes(), c.to_ne_bytes(), d.to_ne_bytes()])
}
