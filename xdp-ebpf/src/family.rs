//! What each address family has of its own in the kernel: its maps, and its question to the routing table.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_fib_lookup as FibParams},
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray},
};
use xdp_common::{
    fragment::{FragmentKey, FragmentPorts, Fragmented},
    frame::{Frame, Headers, Packet, Parsed},
    icmp::{Message, Translation},
    net::{Family, FlowKey, Ip6, V4, V6},
    tables::{
        Account, Affinity, AffinityKey, Backend, BackendKey, Device, Flow, Frontend, FrontendKey, KnownHop,
        Mapped, NetworkKey, Slot, SocketSettings, Source, Work,
    },
    verdict::{Counter, Event},
};

use crate::{embryonic::Tags, maps::count, routes};

#[cfg(feature = "trace")]
pub(crate) use crate::trace::Traced as Logged;

/// What can be logged: anything, where nothing is.
#[cfg(not(feature = "trace"))]
pub(crate) trait Logged {}
#[cfg(not(feature = "trace"))]
impl<F> Logged for F {}

/// The maps of a family, and the form of its addresses in kernel structures.
pub(crate) trait Maps: Fragmented<Addr: Mapped> + Logged {
    fn established() -> &'static Array<Slot<Self::Addr>>;
    fn overflow() -> &'static HashMap<FlowKey<Self::Addr>, Flow<Self::Addr>>;
    fn known() -> &'static Array<u64>;
    fn embryonic() -> &'static Array<Slot<Self::Addr>>;
    fn tags() -> &'static Array<Tags>;
    fn frontends() -> &'static HashMap<FrontendKey<Self::Addr>, Frontend>;
    fn backends() -> &'static Array<Backend<Self::Addr>>;
    fn rings() -> &'static Array<u32>;
    fn networks() -> &'static LpmTrie<NetworkKey<Self::Addr>, u32>;
    fn affinity() -> &'static LruHashMap<AffinityKey<Self::Addr>, Affinity>;
    fn accounts() -> &'static PerCpuArray<Account>;
    fn exhausted() -> &'static LruHashMap<BackendKey<Self::Addr>, u64>;
    fn devices() -> &'static HashMap<u32, Device<Self::Addr>>;
    fn sources() -> &'static LpmTrie<NetworkKey<Self::Addr>, Source<Self::Addr>>;
    fn gate_ingress() -> &'static Array<u64>;
    fn gate_egress() -> &'static Array<u64>;
    fn work() -> &'static PerCpuArray<Work<Self::Addr>>;
    fn hops() -> &'static PerCpuArray<KnownHop<Self::Addr>>;
    fn packets() -> &'static PerCpuArray<Packet<Self::Addr>>;
    fn messages() -> &'static PerCpuArray<Message<Self::Addr>>;
    fn translations() -> &'static PerCpuArray<Translation<Self::Addr>>;
    fn sockets() -> &'static Array<SocketSettings<Self::Addr>>;
    fn pods() -> &'static HashMap<u64, Self::Addr>;
    fn fragments() -> &'static LruHashMap<FragmentKey<Self::Addr>, FragmentPorts>;
    /// Reads the headers of a frame.
    fn parse_into<R: Frame>(frame: &R, ifindex: u32, packet: &mut Packet<Self::Addr>) -> Found;
    /// Writes family, addresses and type of service into a question to the routing table.
    fn ask(params: &mut FibParams, src: Self::Addr, dst: Self::Addr, tos: u8);
    /// The address that chooses a packet's source: in IPv4 that of the next hop, which `asked` answers with, in IPv6 the
    /// destination.
    fn chooses_source(dst: Self::Addr, asked: impl FnOnce(&mut FibParams)) -> Self::Addr;
}

/// Declares the maps of a family and hands them out.
macro_rules! family_maps {
    ($family:ident { $($item:item)* } $($name:ident: $map:ident: $type:ident<$($of:ty),*> $flags:expr;)*) => {
        $(
            #[map]
            static $map: $type<$($of),*> =
                $type::with_max_entries(<<$family as Family>::Addr as Mapped>::MAPS.$name.entries, $flags);
        )*

        impl Maps for $family {
            $(
                #[inline(always)] // an address
                fn $name() -> &'static $type<$($of),*> {
                    &$map
                }
            )*

            $($item)*
        }
    };
}

family_maps! {
    V4 {
    #[inline(always)] // the established path
    fn parse_into<R: Frame>(frame: &R, ifindex: u32, packet: &mut Packet<[u8; 4]>) -> Found {
        parse::<V4, R>(frame, ifindex, packet)
    }

    #[inline(always)] // one caller a program
    fn ask(params: &mut FibParams, src: [u8; 4], dst: [u8; 4], tos: u8) {
        params.family = AF_INET;
        params.__bindgen_anon_2.tos = tos;
        params.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(src);
        params.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(dst);
    }

    #[inline(always)] // one caller
    fn chooses_source(dst: [u8; 4], asked: impl FnOnce(&mut FibParams)) -> [u8; 4] {
        routes::next_hop(asked).unwrap_or(dst)
    }
    }
    established: ESTABLISHED_V4: Array<Slot<[u8; 4]>> BPF_F_MMAPABLE;
    overflow: OVERFLOW_V4: HashMap<FlowKey<[u8; 4]>, Flow<[u8; 4]>> 0;
    known: KNOWN_V4: Array<u64> BPF_F_MMAPABLE;
    embryonic: EMBRYONIC_V4: Array<Slot<[u8; 4]>> BPF_F_MMAPABLE;
    tags: TAGS_V4: Array<Tags> BPF_F_MMAPABLE;
    frontends: FRONTENDS_V4: HashMap<FrontendKey<[u8; 4]>, Frontend> 0;
    backends: BACKENDS_V4: Array<Backend<[u8; 4]>> 0;
    rings: RINGS_V4: Array<u32> 0;
    networks: NETWORKS_V4: LpmTrie<NetworkKey<[u8; 4]>, u32> BPF_F_NO_PREALLOC;
    fragments: FRAGMENTS_V4: LruHashMap<FragmentKey<[u8; 4]>, FragmentPorts> 0;
    affinity: AFFINITY_V4: LruHashMap<AffinityKey<[u8; 4]>, Affinity> 0;
    accounts: ACCOUNTS_V4: PerCpuArray<Account> 0;
    exhausted: EXHAUSTED_V4: LruHashMap<BackendKey<[u8; 4]>, u64> 0;
    devices: DEVICES_V4: HashMap<u32, Device<[u8; 4]>> 0;
    sources: SOURCES_V4: LpmTrie<NetworkKey<[u8; 4]>, Source<[u8; 4]>> BPF_F_NO_PREALLOC;
    gate_ingress: GATE_INGRESS_V4: Array<u64> 0;
    gate_egress: GATE_EGRESS_V4: Array<u64> 0;
    work: WORK_V4: PerCpuArray<Work<[u8; 4]>> 0;
    hops: HOPS_V4: PerCpuArray<KnownHop<[u8; 4]>> 0;
    packets: PACKETS_V4: PerCpuArray<Packet<[u8; 4]>> 0;
    messages: MESSAGES_V4: PerCpuArray<Message<[u8; 4]>> 0;
    translations: TRANSLATIONS_V4: PerCpuArray<Translation<[u8; 4]>> 0;
    sockets: SOCKETS_V4: Array<SocketSettings<[u8; 4]>> 0;
    pods: PODS_V4: HashMap<u64, [u8; 4]> 0;
}

family_maps! {
    V6 {
    #[inline(never)] // a frame of its own on a stack of 512 bytes
    fn parse_into<R: Frame>(frame: &R, ifindex: u32, packet: &mut Packet<Ip6>) -> Found {
        parse::<V6, R>(frame, ifindex, packet)
    }

    #[inline(always)] // one caller a program
    fn ask(params: &mut FibParams, src: Ip6, dst: Ip6, tos: u8) {
        params.family = AF_INET6;
        // Where rules look for the traffic class (fl6.flowlabel, net/core/filter.c).
        params.__bindgen_anon_2.flowinfo = ((tos as u32) << 20).to_be();
        params.__bindgen_anon_3.ipv6_src = src.words();
        params.__bindgen_anon_4.ipv6_dst = dst.words();
    }

    #[inline(always)] // one caller
    fn chooses_source(dst: Ip6, _: impl FnOnce(&mut FibParams)) -> Ip6 {
        dst
    }
    }
    established: ESTABLISHED_V6: Array<Slot<Ip6>> BPF_F_MMAPABLE;
    overflow: OVERFLOW_V6: HashMap<FlowKey<Ip6>, Flow<Ip6>> 0;
    known: KNOWN_V6: Array<u64> BPF_F_MMAPABLE;
    embryonic: EMBRYONIC_V6: Array<Slot<Ip6>> BPF_F_MMAPABLE;
    tags: TAGS_V6: Array<Tags> BPF_F_MMAPABLE;
    frontends: FRONTENDS_V6: HashMap<FrontendKey<Ip6>, Frontend> 0;
    backends: BACKENDS_V6: Array<Backend<Ip6>> 0;
    rings: RINGS_V6: Array<u32> 0;
    networks: NETWORKS_V6: LpmTrie<NetworkKey<Ip6>, u32> BPF_F_NO_PREALLOC;
    fragments: FRAGMENTS_V6: LruHashMap<FragmentKey<Ip6>, FragmentPorts> 0;
    affinity: AFFINITY_V6: LruHashMap<AffinityKey<Ip6>, Affinity> 0;
    accounts: ACCOUNTS_V6: PerCpuArray<Account> 0;
    exhausted: EXHAUSTED_V6: LruHashMap<BackendKey<Ip6>, u64> 0;
    devices: DEVICES_V6: HashMap<u32, Device<Ip6>> 0;
    sources: SOURCES_V6: LpmTrie<NetworkKey<Ip6>, Source<Ip6>> BPF_F_NO_PREALLOC;
    gate_ingress: GATE_INGRESS_V6: Array<u64> 0;
    gate_egress: GATE_EGRESS_V6: Array<u64> 0;
    work: WORK_V6: PerCpuArray<Work<Ip6>> 0;
    hops: HOPS_V6: PerCpuArray<KnownHop<Ip6>> 0;
    packets: PACKETS_V6: PerCpuArray<Packet<Ip6>> 0;
    messages: MESSAGES_V6: PerCpuArray<Message<Ip6>> 0;
    translations: TRANSLATIONS_V6: PerCpuArray<Translation<Ip6>> 0;
    sockets: SOCKETS_V6: Array<SocketSettings<Ip6>> 0;
    pods: PODS_V6: HashMap<u64, Ip6> 0;
}

/// What is in a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nothing to decide on.
    Nothing,
    /// A packet, in the place for it.
    Packet,
    /// A fragment.
    Fragment,
}

/// Reads the headers of a frame, and counts what they should not be.
#[inline(always)] // bounds proofs do not survive a call
fn parse<F: Headers, R: Frame>(frame: &R, ifindex: u32, packet: &mut Packet<F::Addr>) -> Found {
    match F::parse_to(frame, ifindex, packet) {
        Parsed::Packet(()) => Found::Packet,
        Parsed::Other => Found::Nothing,
        Parsed::Fragment => Found::Fragment,
        Parsed::Malformed => {
            count(Counter::Event(Event::Malformed));
            Found::Nothing
        }
    }
}

pub(crate) const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
