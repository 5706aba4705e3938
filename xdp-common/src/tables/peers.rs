//! What the socket hooks work on, beside the tables of the packets.

use super::MapSpec;
use crate::{
    net::{Ip6, Port},
    plain,
    verdict::Reason,
};

plain! {
    /// Key of what a UDP socket has been told: the socket, and an address on one side of a translation.
    pub struct PeerKey {
        /// Cookie of the socket.
        pub cookie: u64,
        /// Address; of IPv4 as IPv6 maps it (RFC 4291, 2.5.5.2), so that one table serves both.
        pub addr: Ip6,
        /// Port.
        pub port: Port,
        /// One of [`side`].
        pub side: u8,
        /// Zero.
        pub zero: [u8; 5],
    }

    /// The address on the other side.
    pub struct Peer {
        /// Address, as in the key.
        pub addr: Ip6,
        /// Port.
        pub port: Port,
        /// Zero.
        pub zero: [u8; 2],
        /// Backend id.
        pub backend: u32,
        /// Its generation then.
        pub generation: u32,
        /// Service id.
        pub service: u32,
    }

    /// What a socket has been told when it was connected: by its cookie, so that connecting again replaces it.
    pub struct Connected {
        /// Address of the backend, as in a [`PeerKey`].
        pub addr: Ip6,
        /// Its port.
        pub port: Port,
        /// Zero.
        pub zero: [u8; 2],
        /// The address that the process has named, and the backend.
        pub told: Peer,
    }

    /// What the agent tells the socket hooks about one family.
    pub struct SocketSettings<A> {
        /// Cookie of the node's network namespace; 0 for the first one of the kernel.
        pub host_namespace: u64,
        /// The node's primary address, unspecified when it has none: where its packets come from.
        pub node: A,
        /// An address that serves NodePorts; unspecified when none does.
        pub node_ports: A,
        /// Bits of [`socket`].
        pub flags: u32,
        /// Zero.
        pub zero: [u8; 4],
    }
}

/// Which side of a translation a key names.
pub mod side {
    /// The address that the process names.
    pub const SERVICE: u8 = 1;
    /// The backend that it has been led to.
    pub const BACKEND: u8 = 2;
}

/// Flags of the settings.
pub mod socket {
    /// Only processes of the node itself are served; pods are left to the programs on their devices.
    pub const HOST_ONLY: u32 = 1;
    /// Processes of the node reach NodePorts on the loopback too.
    pub const ON_LOOPBACK: u32 = 1 << 1;
}

/// What UDP sockets have been told that name an address with each datagram; the least recently used goes first, and a client
/// then sees the backend's address.
pub const UDP_PEERS: MapSpec = MapSpec { name: "UDP_PEERS", entries: 1 << 16 };
/// What UDP sockets have been told that are connected: an entry until its process closes it. (The kernel's own sockets stay until
/// they are the least recently used.)
pub const UDP_CONNECTED: MapSpec = MapSpec { name: "UDP_CONNECTED", entries: 1 << 16 };
/// Cookies of TCP sockets that have been told something, for `getpeername`: buckets of [`SOCKET_WAYS`], by the cookie's remainder.
/// An entry until its process closes the socket, or until another takes its place in a bucket that is full.
pub const TCP_COOKIES: MapSpec = MapSpec { name: "TCP_COOKIES", entries: 1 << 13 };
/// What they have been told, by bucket and way.
pub const TCP_TOLD: MapSpec = MapSpec { name: "TCP_TOLD", entries: TCP_COOKIES.entries * SOCKET_WAYS };
/// Sockets of a bucket, whose cookies are a cache line.
pub const SOCKET_WAYS: u32 = 8;
/// Counters of the socket hooks, per CPU.
pub const SOCKET_COUNTERS: MapSpec = MapSpec { name: "SOCKET_COUNTERS", entries: SocketCall::COUNTERS };

/// A call that the socket hooks decide on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum SocketCall {
    /// A TCP socket connects.
    TcpConnect,
    /// A UDP socket is given its one peer.
    UdpConnect,
    /// A UDP socket sends to an address that it names.
    UdpSend,
    /// A socket of the node is bound to a port.
    Bind,
}

impl SocketCall {
    /// All of them, in counter order.
    pub const ALL: [Self; 4] = [Self::TcpConnect, Self::UdpConnect, Self::UdpSend, Self::Bind];

    /// Results of a call: a translation, then the reasons of refusals.
    const RESULTS: u32 = 1 + Reason::ALL.len() as u32;

    /// Slots of the counters of all calls.
    pub const COUNTERS: u32 = Self::ALL.len() as u32 * Self::RESULTS;

    /// The metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::TcpConnect => "tcp_connect",
            Self::UdpConnect => "udp_connect",
            Self::UdpSend => "udp_send",
            Self::Bind => "bind",
        }
    }

    /// Index of the counter of this call's translations (of a bind: of its refusals), or of its refusals for a reason.
    #[inline(always)] // an addition
    pub const fn counter(self, refused: Option<Reason>) -> u32 {
        let result = match refused {
            None => 0,
            Some(reason) => 1 + reason as u32,
        };
        self as u32 * Self::RESULTS + result
    }
}
