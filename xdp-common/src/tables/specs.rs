//! Every map: its name, its default size, and what happens when it is full.

use super::{SOCKET_COUNTERS, TCP_COOKIES, TCP_TOLD, UDP_CONNECTED, UDP_PEERS};
use crate::{net::Ip6, verdict};

/// A map of the datapath: its name in the object and in bpffs, and its size when no flag says otherwise.
#[derive(Debug)]
pub struct MapSpec {
    /// Name of the static in the eBPF crate.
    pub name: &'static str,
    /// Default number of entries.
    pub entries: u32,
}

/// Declares the maps that each address family has of its own.
macro_rules! per_family {
    ($($(#[doc = $doc:literal])* $field:ident: $v4:ident, $v6:ident = $entries:expr;)*) => {
        $(
            $(#[doc = $doc])*
            pub const $v4: MapSpec = MapSpec { name: stringify!($v4), entries: $entries };
            #[doc = concat!("[`", stringify!($v4), "`] of IPv6.")]
            pub const $v6: MapSpec = MapSpec { name: stringify!($v6), entries: $entries };
        )*

        /// The maps of one address family.
        #[derive(Debug)]
        pub struct Specs {
            $($(#[doc = $doc])* pub $field: MapSpec,)*
        }

        impl Specs {
            /// All of them.
            pub const fn all(&self) -> [&MapSpec; PER_FAMILY] {
                [$(&self.$field,)*]
            }
        }

        impl Mapped for [u8; 4] {
            const MAPS: &'static Specs = &Specs { $($field: $v4,)* };
        }

        impl Mapped for Ip6 {
            const MAPS: &'static Specs = &Specs { $($field: $v6,)* };
        }

        /// How many each family has.
        pub const PER_FAMILY: usize = [$(stringify!($field),)*].len();
    };
}

/// Addresses of a family that has maps.
pub trait Mapped {
    /// Their names and sizes.
    const MAPS: &'static Specs;
}

/// Words of 64 bits in each gate.
pub const GATE_WORDS: u32 = 1 << 14;
/// Words of 64 bits in each half of the known keys: 128 KiB, which stays in a core's second-level cache. Beside 65,536 flows
/// one bit in eight is set, and so many lookups are made for nothing.
pub const KNOWN_WORDS: u32 = 1 << 14;
/// Slots of the established table that a key may be in, one behind the other.
pub const PLACES: u32 = 4;
/// Last key word of a slot of the established table that holds nothing.
pub const FREE: u64 = 0;
/// A bit of that word while the slot is being written, the only one then; no key has it.
pub const CLAIMED: u64 = 1 << 63;
/// For so many slots of the established table there is one entry in the hash behind it: even with every slot taken, no more than
/// a quarter of the keys have found all their places taken.
pub const OVERFLOW_SHARE: u32 = 4;
/// Slots in a bucket of the embryonic table: with the lock, their tags fill a cache line.
pub const WAYS: u32 = 7;

per_family! {
    /// Established flows; two entries a flow, 80 bytes each for IPv4 and 128 for IPv6. An array, in which a key has [`PLACES`].
    established: ESTABLISHED_V4, ESTABLISHED_V6 = 1 << 18;
    /// Those whose places were all taken: a kernel hash, 128 bytes an entry for IPv4 and 176 for IPv6.
    overflow: OVERFLOW_V4, OVERFLOW_V6 = ESTABLISHED_V4.entries / OVERFLOW_SHARE;
    /// Bits that say which keys the established table may hold, in two halves and a last word that names the one in use.
    /// Most packets that open a flow have no other way to learn cheaply that they do: a lookup that finds nothing costs as
    /// much as one that does, and beside many flows it is two cache misses. Programs set the bits of what they insert in both
    /// halves; the agent, who removes, fills one half anew now and then and switches to it.
    known: KNOWN_V4, KNOWN_V6 = 2 * KNOWN_WORDS + 1;
    /// Embryonic flows, [`WAYS`] to a bucket: an array, because new flows come at the rate of a flood and a kernel LRU costs
    /// each of them 400 to 500 ns. Answered flows are evicted after unanswered ones,
    /// but for three of a bucket; older before newer.
    embryonic: EMBRYONIC_V4, EMBRYONIC_V6 = 7 << 13;
    /// What the slots of each bucket hold: a lock, then a tag per way.
    tags: TAGS_V4, TAGS_V6 = 1 << 13;
    /// Frontends.
    frontends: FRONTENDS_V4, FRONTENDS_V6 = 1 << 16;
    /// Backends, by id; id 0 is never used.
    backends: BACKENDS_V4, BACKENDS_V6 = 1 << 17;
    /// Maglev rings: backend ids, 4 bytes a slot.
    rings: RINGS_V4, RINGS_V6 = 1 << 22;
    /// Networks: pods, ServiceCIDRs, sources that load-balancer addresses are restricted to.
    networks: NETWORKS_V4, NETWORKS_V6 = 1 << 14;
    /// Which client has met which backend; the least recently used goes first.
    affinity: AFFINITY_V4, AFFINITY_V6 = 1 << 16;
    /// Ports of fragmented packets, by what all their fragments say; the least recently used goes first.
    fragments: FRAGMENTS_V4, FRAGMENTS_V6 = 1 << 14;
    /// Accounts of service ports, per CPU, by service id; ids beyond its end share slot 0.
    accounts: ACCOUNTS_V4, ACCOUNTS_V6 = 1 << 15;
    /// How often new flows have found no source port, by backend; the least recently used goes first.
    exhausted: EXHAUSTED_V4, EXHAUSTED_V6 = 1 << 10;
    /// Managed interfaces.
    devices: DEVICES_V4, DEVICES_V6 = 256;
    /// Addresses that packets leaving an interface in several networks are translated to, by the interface and the network of
    /// the next hop, in IPv6 of the destination.
    sources: SOURCES_V4, SOURCES_V6 = 1 << 10;
    /// Filter in front of ingress.
    gate_ingress: GATE_INGRESS_V4, GATE_INGRESS_V6 = GATE_WORDS;
    /// Filter in front of egress.
    gate_egress: GATE_EGRESS_V4, GATE_EGRESS_V6 = GATE_WORDS;
    /// Per-CPU work area.
    work: WORK_V4, WORK_V6 = 1;
    /// Per-CPU next hops, found by a hash of their destination.
    hops: HOPS_V4, HOPS_V6 = 1 << 10;
    /// Per-CPU place of the packet at hand.
    packets: PACKETS_V4, PACKETS_V6 = 1;
    /// Per-CPU place of the ICMP message at hand.
    messages: MESSAGES_V4, MESSAGES_V6 = 1;
    /// Per-CPU place of what becomes of it.
    translations: TRANSLATIONS_V4, TRANSLATIONS_V6 = 1;
    /// One slot of [`SocketSettings`](super::SocketSettings).
    sockets: SOCKETS_V4, SOCKETS_V6 = 1;
    /// Addresses of pods by the cookie of their network namespace, as far as source ranges ask for them.
    pods: PODS_V4, PODS_V6 = 1 << 12;
}

const _: () = assert!(EMBRYONIC_V4.entries == TAGS_V4.entries * WAYS);

/// Per-CPU area of answers.
pub const ANSWERS: MapSpec = MapSpec { name: "ANSWERS", entries: 1 };
/// Answers that each CPU sends in a period of about a second: resets and ICMP errors to packets that are refused. The
/// kernel's own limit for all CPUs is as high (`net.ipv4.icmp_msgs_per_sec`).
pub const ANSWERS_PER_PERIOD_MAX: u32 = 1000;
/// One slot of [`Config`](super::Config).
pub const CONFIG: MapSpec = MapSpec { name: "CONFIG", entries: 1 };
/// Per-CPU counters.
pub const COUNTERS: MapSpec = MapSpec { name: "COUNTERS", entries: verdict::COUNTERS };

/// Ring of fragments that came before their first, in bytes; when it is full, further ones are left to the kernel.
pub const HELD: MapSpec = MapSpec { name: "HELD", entries: 1 << 20 };
/// Per-CPU area in which they are made ready for it.
pub const HOLDS: MapSpec = MapSpec { name: "HOLDS", entries: 1 };
/// One slot that says whether it is read.
pub const READERS: MapSpec = MapSpec { name: "READERS", entries: 1 };
/// Nanoseconds after which a ring of which nothing is taken is read by nobody: an agent takes what comes within milliseconds, and
/// as long as this a fragment waits for its first.
pub const READ_WITHIN_NS: u64 = 1_000_000_000;

/// A bit for each port that the agent keeps from the kernel's choice; for agents only.
pub const RESERVED_PORTS: MapSpec = MapSpec { name: "RESERVED_PORTS", entries: 1 << 10 };

/// Programs that XDP goes on to. Pinned, because the kernel empties such a table once no process has it open, whatever is
/// attached.
pub const XDP_NEXT: MapSpec = MapSpec { name: "XDP_NEXT", entries: next::ALL.len() as u32 };
/// Those for drivers that hand over long frames in several buffers: a table takes programs of one kind.
pub const XDP_NEXT_FRAGS: MapSpec = MapSpec { name: "XDP_NEXT_FRAGS", entries: XDP_NEXT.entries };

/// Slots of [`XDP_NEXT`].
pub mod next {
    /// TCP and UDP over IPv6.
    pub const V6: u32 = 0;
    /// What is neither.
    pub const OTHERS: u32 = 1;
    /// What another node has sent on in a packet of its own.
    pub const TUNNEL: u32 = 2;
    /// The first program again, for what was in such a packet.
    pub const INGRESS: u32 = 3;
    /// All of them.
    pub const ALL: [u32; 4] = [V6, OTHERS, TUNNEL, INGRESS];
}

/// The maps that both families share.
pub const SHARED: [&MapSpec; 14] = [
    &ANSWERS,
    &CONFIG,
    &COUNTERS,
    &HELD,
    &HOLDS,
    &READERS,
    &UDP_PEERS,
    &UDP_CONNECTED,
    &TCP_COOKIES,
    &TCP_TOLD,
    &SOCKET_COUNTERS,
    &RESERVED_PORTS,
    &XDP_NEXT,
    &XDP_NEXT_FRAGS,
];
