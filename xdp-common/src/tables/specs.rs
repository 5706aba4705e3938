//! Every map: its name, its default size, and what happens when it is full.

use crate::verdict;

/// A map of the datapath: its name in the object and in bpffs, and its size when no flag says otherwise.
pub struct MapSpec {
    /// Name of the static in the eBPF crate.
    pub name: &'static str,
    /// Default number of entries.
    pub entries: u32,
}

/// Words of 64 bits in each gate.
pub const GATE_WORDS: u32 = 1 << 14;

/// Established flows; two entries a flow, 128 bytes each for IPv4.
pub const ESTABLISHED_V4: MapSpec = MapSpec { name: "ESTABLISHED_V4", entries: 1 << 18 };
/// Bits that say which keys the established table may hold, in two halves and a last word that names the one in use.
/// Most packets that open a flow have no other way to learn cheaply that they do: a lookup that finds nothing costs as
/// much as one that does, and beside many flows it is two cache misses. Programs set the bits of what they insert in both
/// halves; the agent, who removes, fills one half anew now and then and switches to it.
pub const KNOWN_V4: MapSpec = MapSpec { name: "KNOWN_V4", entries: 2 * KNOWN_WORDS + 1 };
/// Words of 64 bits in each half: 128 KiB, which stays in a core's second-level cache. Beside 65,536 flows one bit in eight is
/// set, and so many lookups are made for nothing.
pub const KNOWN_WORDS: u32 = 1 << 14;
/// Embryonic flows, [`WAYS`] to a bucket: an array, because new flows come at the rate of a flood and a kernel LRU costs
/// each of them 400 to 500 ns. Answered flows are evicted after unanswered ones, older before newer.
pub const EMBRYONIC_V4: MapSpec = MapSpec { name: "EMBRYONIC_V4", entries: 7 << 13 };
/// What the slots of each bucket hold: a lock, then a tag per way.
pub const TAGS_V4: MapSpec = MapSpec { name: "TAGS_V4", entries: 1 << 13 };
/// Slots in a bucket of the embryonic table: with the lock, their tags fill a cache line.
pub const WAYS: u32 = 7;
const _: () = assert!(EMBRYONIC_V4.entries == TAGS_V4.entries * WAYS);
/// Frontends.
pub const FRONTENDS_V4: MapSpec = MapSpec { name: "FRONTENDS_V4", entries: 1 << 16 };
/// Backends, by id; id 0 is never used.
pub const BACKENDS_V4: MapSpec = MapSpec { name: "BACKENDS_V4", entries: 1 << 17 };
/// Maglev rings: backend ids, 4 bytes a slot.
pub const RINGS: MapSpec = MapSpec { name: "RINGS", entries: 1 << 22 };
/// Networks: pods, ServiceCIDRs, sources that load-balancer addresses are restricted to.
pub const NETWORKS_V4: MapSpec = MapSpec { name: "NETWORKS_V4", entries: 1 << 14 };
/// Which client has met which backend; the least recently used goes first.
pub const AFFINITY_V4: MapSpec = MapSpec { name: "AFFINITY_V4", entries: 1 << 16 };
/// Accounts of service ports, per CPU, by service id; ids beyond its end share slot 0.
pub const ACCOUNTS: MapSpec = MapSpec { name: "ACCOUNTS", entries: 1 << 15 };
/// Per-CPU area of answers.
pub const ANSWERS: MapSpec = MapSpec { name: "ANSWERS", entries: 1 };
/// Answers that each CPU sends in a period of about a second: resets and ICMP errors to packets that are refused. The
/// kernel's own limit for all CPUs is as high (`net.ipv4.icmp_msgs_per_sec`).
pub const ANSWERS_PER_PERIOD_MAX: u32 = 1000;
/// Managed interfaces.
pub const DEVICES_V4: MapSpec = MapSpec { name: "DEVICES_V4", entries: 256 };
/// Filter in front of ingress.
pub const GATE_INGRESS: MapSpec = MapSpec { name: "GATE_INGRESS", entries: GATE_WORDS };
/// Filter in front of egress.
pub const GATE_EGRESS: MapSpec = MapSpec { name: "GATE_EGRESS", entries: GATE_WORDS };
/// One slot of [`Config`](super::Config).
pub const CONFIG: MapSpec = MapSpec { name: "CONFIG", entries: 1 };
/// Per-CPU work area.
pub const WORK_V4: MapSpec = MapSpec { name: "WORK_V4", entries: 1 };
/// Per-CPU next hops, found by a hash of their destination.
pub const HOPS_V4: MapSpec = MapSpec { name: "HOPS_V4", entries: 1 << 10 };
/// Per-CPU counters.
pub const COUNTERS: MapSpec = MapSpec { name: "COUNTERS", entries: verdict::COUNTERS };

/// Every map, in the order the agent opens them.
pub const MAPS: [&MapSpec; 18] = [
    &ESTABLISHED_V4,
    &KNOWN_V4,
    &EMBRYONIC_V4,
    &TAGS_V4,
    &FRONTENDS_V4,
    &BACKENDS_V4,
    &RINGS,
    &NETWORKS_V4,
    &AFFINITY_V4,
    &ACCOUNTS,
    &ANSWERS,
    &DEVICES_V4,
    &GATE_INGRESS,
    &GATE_EGRESS,
    &CONFIG,
    &WORK_V4,
    &HOPS_V4,
    &COUNTERS,
];
