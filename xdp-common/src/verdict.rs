//! What is to be done with a frame, and what is counted.

use crate::net::{Address, Port};

/// What to do with a frame.
///
/// A structure whose fields always hold something, rather than an enum with payloads: the verifier refuses programs that
/// move a payload which one branch has left undefined. Without an action that sends, the other fields are zero.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict<A> {
    /// What becomes of it.
    pub action: Action,
    /// The new addresses and ports.
    pub rewrite: Rewrite<A>,
    /// The next hop, for [`Action::Transmit`], [`Action::Redirect`] and [`Action::Tunnel`].
    pub hop: Hop,
    /// The longest packet that gets through, in bytes, for [`Reason::TunnelMtu`]; 0 for [`Reason::TunnelHops`].
    pub mtu: u16,
}

/// What becomes of a frame.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing is touched; the kernel goes on with it.
    Pass,
    /// Dropped, for one counted reason.
    Drop(Reason),
    /// Refused, for one counted reason: answered with a TCP reset or an ICMP error where that is possible, else dropped.
    Reject(Reason),
    /// Rewritten and passed up the stack of this node: to a backend here, or on the slow path.
    Stack,
    /// Rewritten and sent out of the interface it came in by.
    Transmit,
    /// Rewritten and sent out of another interface.
    Redirect,
    /// Sent as it is in a packet with the addresses of the rewrite: back out where the next hop is behind the interface it
    /// came in by, else out of another.
    Tunnel,
}

/// The new addresses and ports of a frame, with what they do to its checksums.
#[repr(C, align(4))] // copied by words
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite<A> {
    /// New source address.
    pub src: A,
    /// New destination address.
    pub dst: A,
    /// New source port.
    pub sport: Port,
    /// New destination port.
    pub dport: Port,
    /// Checksum delta of the addresses: what the IPv4 header changes by.
    pub addr_delta: u16,
    /// Checksum delta of addresses and ports: what TCP and UDP change by.
    pub l4_delta: u16,
}

/// The next hop of a frame.
#[repr(C, align(4))] // copied by words
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Destination MAC address.
    pub dmac: [u8; 6],
    /// Source MAC address: our interface's.
    pub smac: [u8; 6],
    /// Index of the interface to leave by.
    pub ifindex: u32,
}

/// Declares a closed list once: the counter index, the metric label, the text for people and the documentation.
macro_rules! counted {
    ($(#[$meta:meta])* $name:ident { $($(#[doc = $doc:literal])* $variant:ident = $label:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum $name { $($(#[doc = $doc])* $variant,)* }

        impl $name {
            /// Every one of them, in counter order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The metric label.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)* }
            }

            /// What it means, for people.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),*),)* }
            }
        }
    };
}

counted! {
    /// Why a frame was dropped. Every drop counts exactly one.
    Reason {
        /// The service has no usable endpoint anywhere, and its address is not one of the node's own.
        NoEndpoint = "no_endpoint",
        /// The traffic policy is Local and no endpoint of the service is on this node.
        NoLocalEndpoint = "no_local_endpoint",
        /// The source is not in `loadBalancerSourceRanges`.
        SourceRange = "source_range",
        /// A port of a ClusterIP that no service has.
        UnknownPort = "unknown_port",
        /// An address of a ServiceCIDR that no service has.
        UnknownServiceAddress = "unknown_service_address",
        /// No free source port was found toward the backend within the limit of attempts.
        SnatExhausted = "snat_exhausted",
        /// The table of new flows refused the entry: other CPUs held its bucket, however often it was tried.
        FlowInsert = "flow_insert",
        /// The ring named a backend that does not exist: the agent's image and the maps disagree.
        NoBackend = "no_backend",
        /// The endpoint of a TCP connection is gone, and `--reset-on-endpoint-removal` says that nobody waits for it.
        EndpointRemoved = "endpoint_removed",
        /// Too long for the tunnel to the backend's node; its sender is told how long it may be.
        TunnelMtu = "tunnel_mtu",
        /// No hops are left to the backend's node, and what is addressed to this node itself its kernel would take for its own.
        TunnelHops = "tunnel_hops",
        /// There is no way to the backend's node, and what is addressed to this node itself its kernel would take for its own.
        TunnelWay = "tunnel_way",
        /// An echo request to the address of a service, beyond those that are answered in a second.
        EchoLimit = "echo_limit",
    }
}

counted! {
    /// What happened to frames of ours, and to the flow tables.
    Event {
        /// Rewritten and sent out of the interface it came in by.
        Transmitted = "transmitted",
        /// Rewritten and sent out of another interface.
        Redirected = "redirected",
        /// Rewritten and passed up to a backend on this node.
        Delivered = "delivered",
        /// Rewritten in half and passed up for the kernel to route (no neighbour yet, no redirect, over the MTU, TTL).
        SlowPath = "slow_path",
        /// A reply of a backend on this node, restored at egress.
        Restored = "restored",
        /// The second half of a slow-path translation, done at egress.
        Finished = "finished",
        /// A refused packet was answered with a TCP reset or an ICMP port unreachable.
        Answered = "answered",
        /// A refused packet was not answered: too many were in this second, or its headers are not plain ones.
        Unanswered = "unanswered",
        /// Left to the tc program, because its checksum looks like a pseudo-header sum.
        Deferred = "deferred",
        /// Left alone though addressed to a frontend without endpoints, because the address is the node's own.
        NoEndpointPassed = "no_endpoint_passed",
        /// Addressed to our SNAT address and range, but of no known flow: left alone.
        Unclaimed = "unclaimed",
        /// A header that contradicts itself or its frame: left alone.
        Malformed = "malformed",
        /// A fragment to an address of ours, or from a backend: decided on by the ports of its first fragment.
        Fragment = "fragment",
        /// A fragment to an address of ours that came before its first: kept by the agent, which gives it back after that.
        FragmentHeld = "fragment_held",
        /// A fragment to an address of ours that came before its first and could not be kept, or whose first never came:
        /// left alone.
        FragmentLost = "fragment_lost",
        /// Sent to the backend's node in a packet of ours, to be answered there (direct server return).
        Tunnelled = "tunnelled",
        /// Taken out of the packet of another node, to be answered here (direct server return).
        Untunnelled = "untunnelled",
        /// A new flow was made.
        FlowNew = "flow_new",
        /// A new flow's backend is on another node, behind an interface without our programs: it was sent there under the
        /// client's address, and is answered only if its replies come back through this node.
        UnmanagedEgress = "unmanaged_egress",
        /// A flow was answered, spoke again and moved to the established table.
        FlowEstablished = "flow_established",
        /// A flow could not move to the established table, because it is full; it stays embryonic.
        EstablishedFull = "established_full",
        /// A flow left a backend that is gone, or a closed tuple was used again.
        FlowRenewed = "flow_renewed",
        /// A new flow took the source port of another that had got no further than its first packets and was idle.
        PortTakenOver = "port_taken_over",
        /// The next hop of a flow was asked for again, because routes or neighbours had changed.
        HopRefreshed = "hop_refreshed",
        /// A client could not be remembered for its session affinity; its next connection may meet another endpoint.
        AffinityRefused = "affinity_refused",
        /// Another CPU held the bucket of a new entry, and the insert was repeated.
        InsertRetried = "insert_retried",
        /// An ICMP error about a packet of ours was translated, and goes to the client or to the backend.
        Related = "related",
        /// An echo request to the address of a service was answered.
        EchoAnswered = "echo_answered",
    }
}

/// Slots of the per-CPU counter array: drops first, then events, then the SNAT port attempts.
pub const COUNTERS: u32 = (Reason::ALL.len() + Event::ALL.len()) as u32 + SNAT_ATTEMPTS_MAX;

/// How many source ports are tried before a new flow is dropped.
pub const SNAT_ATTEMPTS_MAX: u32 = 16;

/// A slot of the counter array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// A dropped frame.
    Drop(Reason),
    /// Something that happened.
    Event(Event),
    /// A source port found at this attempt, counted from zero.
    SnatAttempt(u32),
}

impl Counter {
    /// Its index in the counter array.
    #[inline(always)] // a constant at nearly every call
    pub const fn index(self) -> u32 {
        match self {
            Self::Drop(reason) => reason as u32,
            Self::Event(event) => Reason::ALL.len() as u32 + event as u32,
            Self::SnatAttempt(attempt) => (Reason::ALL.len() + Event::ALL.len()) as u32 + attempt,
        }
    }
}

impl<A: Address> Verdict<A> {
    /// Leaves the frame alone.
    pub const PASS: Self = Self {
        action: Action::Pass,
        rewrite: Rewrite {
            src: A::UNSPECIFIED,
            dst: A::UNSPECIFIED,
            sport: [0; 2],
            dport: [0; 2],
            addr_delta: 0,
            l4_delta: 0,
        },
        hop: Hop { dmac: [0; 6], smac: [0; 6], ifindex: 0 },
        mtu: 0,
    };
}

impl<A: Address> Rewrite<A> {
    /// What the ports alone change the TCP or UDP checksum by.
    #[inline(always)]
    pub fn port_delta(&self) -> u16 {
        crate::checksum::add(self.l4_delta, !self.addr_delta)
    }
}
