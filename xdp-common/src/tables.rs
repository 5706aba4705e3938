//! The state the decision works on: the values of the BPF maps, and the trait that hands them out.
//!
//! Layouts are shared with pinned maps of older agents: a change here raises [`LAYOUT_VERSION`].

use crate::{
    answer::AnswerFrame,
    frame::Packet,
    net::{Address, Family, FlowKey, Port},
    plain,
    verdict::Counter,
};

/// Version of every layout in this file; pinned maps live in a directory of this number.
pub const LAYOUT_VERSION: u32 = 8;

mod flags;
mod peers;
mod specs;

pub use flags::*;
pub use peers::*;
pub use specs::*;

plain! {
    /// One direction of a flow: everything needed to send its next packet on.
    ///
    /// With its key it is a slot of 80 bytes for IPv4 and of 128 for IPv6: two cache lines.
    pub struct Flow<A> {
        /// New source address.
        pub src: A,
        /// New destination address.
        pub dst: A,
        /// New source port.
        pub sport: Port,
        /// New destination port.
        pub dport: Port,
        /// Checksum delta of the addresses.
        pub addr_delta: u16,
        /// Checksum delta of addresses and ports.
        pub l4_delta: u16,
        /// Next hop: destination MAC.
        pub dmac: [u8; 6],
        /// Next hop: source MAC.
        pub smac: [u8; 6],
        /// Next hop: interface index, 0 while unknown.
        pub ifindex: u32,
        /// Routing tag under which the next hop was resolved (see [`Tables::routing_tag`]); 0 means never.
        pub routing: u32,
        /// Clock of the last packet, in seconds of agent time.
        pub seen: u32,
        /// Backend id.
        pub backend: u32,
        /// Generation of the backend when the flow was made.
        pub generation: u32,
        /// Service id, for attribution.
        pub service: u32,
        /// MTU of the route, in bytes of IP packet.
        pub mtu: u16,
        /// One of [`kind`].
        pub kind: u8,
        /// One of [`exit`].
        pub exit: u8,
        /// Bits of [`closing`], set by packets of this direction (and by a reset of the other).
        pub closing: u8,
        /// 1 once the other direction has been seen.
        pub replied: u8,
        /// Sum of the packets' addresses and protocol as they come in, folded ([`FlowKey::pseudo_sum`]).
        pub pseudo_sum: u16,
        /// Zero.
        pub zero: [u8; 4],
    }

    /// Where flows are put together: the stack of a program, 512 bytes, is too small for it.
    pub struct Work<A> {
        /// The flow of the packet at hand.
        pub flow: Flow<A>,
        /// The reply's half, while a flow is opened or established.
        pub reply: Flow<A>,
        /// The key of an entry that is written along with the packet's own: of that half, or of the way up the stack.
        pub other_key: FlowKey<A>,
    }

    /// Key of a frontend: where clients connect to.
    pub struct FrontendKey<A> {
        /// Address.
        pub addr: A,
        /// Port.
        pub port: Port,
        /// IP protocol number.
        pub proto: u8,
        /// Zero.
        pub zero: u8,
    }

    /// A frontend: which rings answer for it, and how.
    ///
    /// Under port 0 and protocol 0 stands an address as such ([`frontend::ADDRESS`], [`frontend::ECHO`]).
    pub struct Frontend {
        /// Service id; 0 for an address as such.
        pub service: u32,
        /// First slot in the ring array of the ring for clients outside the cluster.
        pub ring: u32,
        /// Number of its slots: a prime, 1 for a single backend, 0 without endpoints.
        pub slots: u32,
        /// First slot of the ring for clients inside the cluster, which may be the same ring.
        pub inner_ring: u32,
        /// Number of its slots.
        pub inner_slots: u32,
        /// Bits of [`frontend`].
        pub flags: u32,
        /// Client-IP affinity in seconds, 0 for none.
        pub affinity_seconds: u32,
    }

    /// Key of the networks: whose they are, and an address in them. In the kernel a prefix length stands before it
    /// (`struct bpf_lpm_trie_key_u8`); it counts the 32 bits of the owner too.
    pub struct NetworkKey<A> {
        /// One of [`network`], or the index of an interface, big-endian so that it comes first bit by bit.
        pub owner: [u8; 4],
        /// Address.
        pub addr: A,
    }

    /// An address that packets are translated to.
    pub struct Source<A> {
        /// It.
        pub addr: A,
    }

    /// Key of an affinity: all frontends of a service port share it.
    pub struct AffinityKey<A> {
        /// Source address of the client.
        pub client: A,
        /// Service id.
        pub service: u32,
    }

    /// Which backend a client has met.
    pub struct Affinity {
        /// Backend id.
        pub backend: u32,
        /// Its generation then.
        pub generation: u32,
        /// Clock of the client's last new connection, in seconds of agent time.
        pub seen: u32,
    }

    /// Where answers are put together, and how many there may still be, on one CPU.
    pub struct Answers {
        /// Period of the kernel's clock that this is about.
        pub period: u32,
        /// Answers to refused packets sent in it.
        pub spent: u32,
        /// Answers to echo requests sent in it: whoever pings much must not keep others from being refused at once.
        pub echoed: u32,
        /// A frame in the making.
        pub frame: AnswerFrame,
    }

    /// How far the ring of fragments has been read.
    pub struct Reader {
        /// The consumer's position at the last look.
        pub position: u64,
        /// The kernel's clock in nanoseconds when that was new, or nothing waited.
        pub since: u64,
    }

    /// What a service port has carried in either direction, on one CPU.
    pub struct Account {
        /// Packets.
        pub packets: u64,
        /// Bytes of IP packets.
        pub bytes: u64,
    }

    /// A backend: an endpoint's address and port.
    pub struct Backend<A> {
        /// Address.
        pub addr: A,
        /// Port.
        pub port: Port,
        /// IP protocol number; 0 marks a free slot.
        pub proto: u8,
        /// Bits of [`backend`].
        pub flags: u8,
        /// Raised whenever the id is given to another endpoint, or the endpoint is gone.
        pub generation: u32,
        /// Service id: every service port has backends of its own, so that an endpoint may leave one and stay with another.
        pub service: u32,
        /// Address of its node, if that is another that takes packets in packets; else unspecified.
        pub node: A,
    }

    /// Where packets of new flows are sent.
    pub struct BackendKey<A> {
        /// Address.
        pub addr: A,
        /// Port.
        pub port: Port,
        /// IP protocol number.
        pub proto: u8,
        /// Zero.
        pub zero: u8,
    }

    /// A managed interface, by its index.
    pub struct Device<A> {
        /// Source address of translated packets that leave here.
        pub snat: A,
        /// Bits of [`device`].
        pub flags: u32,
        /// MTU in bytes of IP packet.
        pub mtu: u32,
        /// Its own MAC address.
        pub mac: [u8; 6],
        /// Zero.
        pub zero: [u8; 2],
    }

    /// A next hop that this CPU has been told before.
    pub struct KnownHop<A> {
        /// Destination it leads to.
        pub dst: A,
        /// Interface the packet came in by.
        pub from: u32,
        /// Routing tag of the answer; 0 marks a free slot.
        pub routing: u32,
        /// Interface to leave by.
        pub ifindex: u32,
        /// Destination MAC.
        pub dmac: [u8; 6],
        /// Source MAC.
        pub smac: [u8; 6],
        /// MTU of the route, 0 when the kernel did not say.
        pub mtu: u16,
        /// Zero.
        pub zero: [u8; 2],
    }

    /// A slot of a flow table.
    pub struct Slot<A> {
        /// Its key.
        pub key: FlowKey<A>,
        /// Its flow.
        pub flow: Flow<A>,
    }

    /// What the agent tells the datapath, in one array slot.
    pub struct Config {
        /// Routing epoch: raised on every change of routes, neighbours or links.
        pub epoch: u32,
        /// Seconds that an agent has been running over these maps; stands still while none does, so nothing ages then.
        pub clock: u32,
        /// First source port of the SNAT range, in host order.
        pub snat_port_min: u16,
        /// Last source port of the SNAT range, in host order.
        pub snat_port_max: u16,
        /// Buckets of the embryonic table.
        pub embryonic_buckets: u32,
        /// Slots of the established table that the places of a key may begin at: all but the last [`PLACES`] - 1.
        pub established_homes: u32,
        /// 1 when packets that come in by wire get an address of this node as their source whenever their backend is
        /// elsewhere, also where the masquerade rules of Services do not ask for it: their answers could not come back here.
        pub masquerade_wire: u32,
        /// 1 when rules of the routing policy or routes look at more than the destination: next hops are then not shared
        /// between flows.
        pub policy_routing: u32,
        /// 1 when echo requests to the addresses of Services are answered.
        pub echo: u32,
        /// Bits of [`direct`].
        pub direct: u32,
    }
}

impl<A: Address> Flow<A> {
    /// All zeros: the start of every flow.
    pub const ZERO: Self = Self {
        src: A::UNSPECIFIED,
        dst: A::UNSPECIFIED,
        sport: [0; 2],
        dport: [0; 2],
        addr_delta: 0,
        l4_delta: 0,
        dmac: [0; 6],
        smac: [0; 6],
        ifindex: 0,
        routing: 0,
        seen: 0,
        backend: 0,
        generation: 0,
        service: 0,
        mtu: 0,
        kind: 0,
        exit: 0,
        closing: 0,
        replied: 0,
        pseudo_sum: 0,
        zero: [0; 4],
    };
}

/// Which flow table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Never evicts.
    Established,
    /// Evicts the least recently used.
    Embryonic,
}

/// How an insertion that must not replace anything ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Insertion {
    /// The entry is in.
    Done,
    /// The key is taken.
    Exists,
    /// The table refused: full, out of memory, or a bucket lock was contended.
    Refused,
}

/// The answer of the routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// A next hop with a neighbour.
    Hop {
        /// Egress interface index.
        ifindex: u32,
        /// Destination MAC.
        dmac: [u8; 6],
        /// Source MAC.
        smac: [u8; 6],
        /// MTU of the route, 0 when the kernel does not say.
        mtu: u16,
    },
    /// A next hop whose neighbour is not resolved yet.
    NoNeighbour {
        /// Egress interface index.
        ifindex: u32,
    },
    /// The address is one of this node's.
    Local,
    /// Anything else (unreachable, encapsulating route, forwarding off): the kernel knows what to do with it.
    Kernel,
}

/// A live entry of a flow table, read in place: the fast path needs half of it, and the stack has no room for the rest.
pub trait Entry<A: Address>: core::ops::Deref<Target = Flow<A>> {
    /// Sets [`Flow::seen`].
    fn set_seen(&self, clock: u32);
    /// Sets [`Flow::replied`].
    fn set_replied(&self);
    /// Sets [`Flow::closing`] to `bits`.
    fn set_closing(&self, bits: u8);
}

/// The maps, as the decision sees them.
/// Handed around by value: in the kernel it has no size, on the host it is a reference.
pub trait Tables<F: Family>: Copy {
    /// A reference to an entry of a flow table.
    type Entry: Entry<F::Addr>;
    /// A reference to the work area.
    type Work: core::ops::DerefMut<Target = Work<F::Addr>>;

    /// The agent's settings.
    fn config(self) -> Config;
    /// A number that changes whenever a cached next hop may be stale: the routing epoch of the settings plus a coarse kernel clock, so
    /// that next hops are asked for again now and then even while no agent runs. Both only grow, so their sum never
    /// repeats; 0 is never returned.
    fn routing_tag(self, epoch: u32) -> u32;
    /// A word of the ingress gate; all ones beyond its end.
    fn ingress_gate(self, word: u32) -> u64;
    /// A word of the egress gate; all ones beyond its end.
    fn egress_gate(self, word: u32) -> u64;
    /// The work area of this CPU; programs of one CPU do not interrupt each other (they run with bottom halves off).
    fn work(self) -> Option<Self::Work>;
    /// Whether the established table may hold a key with this bit ([`known_bit`](crate::select::known_bit)); never false
    /// for one that it holds.
    fn may_know(self, bit: u32) -> bool;
    /// Notes that the established table holds a key with this bit: before it is inserted, so that nobody misses it, and
    /// after, in case the agent has begun anew between the two.
    fn note_known(self, bit: u32);
    /// Looks a flow up.
    fn flow(self, table: Table, key: &FlowKey<F::Addr>) -> Option<Self::Entry>;
    /// Looks an established flow up where every packet is: the same as [`Tables::flow`].
    #[inline(always)]
    fn established(self, _config: &Config, key: &FlowKey<F::Addr>) -> Option<Self::Entry> {
        self.flow(Table::Established, key)
    }
    /// Inserts an embryonic flow that must not exist.
    fn insert(self, key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) -> Insertion;
    /// Inserts or replaces a flow, so that nobody goes by half of one; false when the table refused.
    fn store(self, table: Table, key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) -> bool;
    /// Removes a flow if it is there.
    fn remove(self, table: Table, key: &FlowKey<F::Addr>);
    /// Looks a frontend up.
    fn frontend(self, key: &FrontendKey<F::Addr>) -> Option<Frontend>;
    /// The backend id in a ring slot, 0 when there is none.
    fn ring(self, slot: u32) -> u32;
    /// A backend by its id.
    fn backend(self, id: u32) -> Option<Backend<F::Addr>>;
    /// Whether an address is in a network of an owner ([`network`]).
    fn network(self, owner: u32, addr: F::Addr) -> bool;
    /// Which backend a client has met.
    fn affinity(self, key: &AffinityKey<F::Addr>) -> Option<Affinity>;
    /// Notes which backend a client meets; false when the table refused.
    fn set_affinity(self, key: &AffinityKey<F::Addr>, affinity: &Affinity) -> bool;
    /// Adds a packet to the account of a service port.
    fn account(self, service: u32, bytes: u16);
    /// A managed interface by its index.
    fn device(self, ifindex: u32) -> Option<Device<F::Addr>>;
    /// Asks the routing table for the way of a packet that came in by `ifindex`.
    fn route(self, ifindex: u32, src: F::Addr, dst: F::Addr, tos: u8, proto: u8) -> Route;
    /// The address that a packet gets when it leaves by an interface toward a destination, if that is not the usual one: the
    /// first whose network holds the next hop (`inet_select_addr` in net/ipv4/devinet.c), in IPv6 the one that suits the
    /// destination (RFC 6724, section 5).
    fn source(self, packet: &Packet<F::Addr>, ifindex: u32, dst: F::Addr) -> Option<F::Addr>;
    /// Counts.
    fn count(self, counter: Counter);
    /// Counts that a new flow has found no source port toward a backend.
    fn count_exhausted(self, backend: &BackendKey<F::Addr>);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{Ip6, Plain};

    #[test]
    fn a_slot_is_two_cache_lines() {
        // Slots of IPv4 begin at multiples of 16 bytes.
        assert_eq!((size_of::<Slot<[u8; 4]>>(), size_of::<Slot<Ip6>>()), (80, 128));
    }

    #[test]
    fn no_map_value_has_padding() {
        // Reading the constant is the test: it fails to compile.
        fn prove<T: Plain>() {
            const { T::PROOF };
        }
        prove::<Flow<[u8; 4]>>();
        prove::<Flow<Ip6>>();
        prove::<FlowKey<[u8; 4]>>();
        prove::<FlowKey<Ip6>>();
        prove::<FrontendKey<[u8; 4]>>();
        prove::<FrontendKey<Ip6>>();
        prove::<Frontend>();
        prove::<NetworkKey<[u8; 4]>>();
        prove::<NetworkKey<Ip6>>();
        prove::<AffinityKey<[u8; 4]>>();
        prove::<AffinityKey<Ip6>>();
        prove::<Affinity>();
        prove::<Account>();
        prove::<Answers>();
        prove::<Reader>();
        prove::<Backend<[u8; 4]>>();
        prove::<Backend<Ip6>>();
        prove::<BackendKey<[u8; 4]>>();
        prove::<BackendKey<Ip6>>();
        prove::<Device<[u8; 4]>>();
        prove::<Device<Ip6>>();
        prove::<KnownHop<[u8; 4]>>();
        prove::<KnownHop<Ip6>>();
        prove::<Slot<[u8; 4]>>();
        prove::<Slot<Ip6>>();
        prove::<Config>();
        prove::<PeerKey>();
        prove::<Peer>();
        prove::<SocketSettings<[u8; 4]>>();
        prove::<SocketSettings<Ip6>>();
    }
}
