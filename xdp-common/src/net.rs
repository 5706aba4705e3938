//! Addresses, protocols and the flow key: what names a packet.

use core::{
    cmp::Ordering,
    fmt::{self, Debug},
    hash::Hash,
    net::Ipv6Addr,
};

use network_types::ip::IpProto;

use crate::checksum;

/// A value that crosses the border between the kernel and the agent as bytes.
///
/// Only [`plain!`](crate::plain) implements it, and proves at compile time that the fields leave no padding; all-zero
/// bytes are a valid value of every such type, because none of them holds an enum, a bool or a pointer.
pub trait Plain: Copy + 'static {
    /// Fails to compile when the type has padding.
    const PROOF: ();
}

/// Defines a `#[repr(C)]` structure of a BPF map and proves that it has no padding.
#[macro_export]
macro_rules! plain {
    ($($(#[$meta:meta])* pub struct $name:ident $(<$a:ident>)? {
        $($(#[$fmeta:meta])* pub $field:ident: $ty:ty,)*
    })*) => {$(
        $(#[$meta])*
        #[repr(C, align(4))] // whole words on the stack and in maps, though addresses are bytes
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name $(<$a>)? {
            $($(#[$fmeta])* pub $field: $ty,)*
        }
        impl $(<$a: $crate::net::Address>)? $crate::net::Plain for $name $(<$a>)? {
            const PROOF: () = assert!(
                size_of::<Self>() == 0 $(+ size_of::<$ty>())*,
                concat!(stringify!($name), " has padding")
            );
        }
    )*};
}

/// An address family: the type parameter that every path through the program carries.
pub trait Family: Copy + 'static {
    /// Its address, big-endian bytes as on the wire.
    type Addr: Address;
    /// EtherType of its packets (IEEE 802 numbers).
    const ETHERTYPE: u16;
    /// Whether its header carries a checksum of its own (RFC 791 does, RFC 8200 does not).
    const HEADER_CHECKSUM: bool;
    /// Length of its header without options or extension headers, in bytes.
    const HEADER_LEN: u16;
}

/// An IP address of either family, as bytes in network order.
pub trait Address: Copy + Eq + Ord + Hash + Debug + Default + 'static {
    /// Length in bytes.
    const LEN: usize;
    /// The unspecified address: all zeros.
    const UNSPECIFIED: Self;
    /// The sum of its 16-bit words in native order, not folded (RFC 1071: the sum is the same in either order).
    fn sum(self) -> u32;
    /// Its bytes in 64 bits, for hashing; equal addresses give equal values.
    fn word(self) -> u64;
    /// Its bytes in 64 bits, in native order: for hashing on one machine.
    fn folded(self) -> u64;
    /// Zero if and only if both are the same; compared by words, where the compiler would go byte by byte.
    fn differs(self, other: Self) -> u32;
    /// Length in bits of the leading part that [`Address::network`] keeps.
    const NETWORK_BITS: u8;
    /// Its leading bits, by which the gate knows where ClusterIPs are.
    fn network(self) -> u64;
    /// Whether a unicast packet that is routed can come from it: neither unspecified, multicast, broadcast, loopback nor
    /// link-local (of IPv6, where every interface has such an address and none of them is routed).
    fn is_unicast(self) -> bool;
    /// Whether it is the node's own loopback.
    fn is_loopback(self) -> bool;
    /// What stands for a network namespace where clients are known by address: an address that no client has.
    fn of_namespace(cookie: u64) -> Self;
    /// It as an address of IPv6: that of IPv4 as IPv6 maps it (RFC 4291, 2.5.5.2).
    fn wide(self) -> Ip6;
    /// The address of [`Address::wide`].
    fn from_wide(wide: Ip6) -> Self;
}

impl Address for [u8; 4] {
    const LEN: usize = 4;
    const UNSPECIFIED: Self = [0; 4];

    #[inline(always)] // a few instructions, and the verifier follows no calls for free
    fn sum(self) -> u32 {
        let word = u32::from_ne_bytes(self);
        (word >> 16) + (word & 0xffff)
    }

    #[inline(always)]
    fn word(self) -> u64 {
        u32::from_be_bytes(self) as u64
    }

    #[inline(always)]
    fn folded(self) -> u64 {
        u32::from_ne_bytes(self) as u64
    }

    #[inline(always)]
    fn differs(self, other: Self) -> u32 {
        u32::from_ne_bytes(self) ^ u32::from_ne_bytes(other)
    }

    const NETWORK_BITS: u8 = 16;

    #[inline(always)]
    fn network(self) -> u64 {
        u16::from_be_bytes([self[0], self[1]]) as u64
    }

    #[inline(always)]
    fn is_unicast(self) -> bool {
        self[0] != 0 && self[0] != 127 && self[0] < 224
    }

    #[inline(always)]
    fn is_loopback(self) -> bool {
        self[0] == 127
    }

    #[inline(always)]
    fn of_namespace(cookie: u64) -> Self {
        // 0.0.0.0/8 is nobody's (RFC 6890). Cookies count up; two that share 24 bits share an affinity, no more.
        (cookie as u32 & 0x00ff_ffff).to_be_bytes()
    }

    #[inline(always)]
    fn wide(self) -> Ip6 {
        Ip6::from_quads([[0; 4], [0; 4], [0, 0, 0xff, 0xff], self])
    }

    #[inline(always)]
    fn from_wide(wide: Ip6) -> Self {
        let [_, _, _, quad] = wide.0;
        quad.to_ne_bytes()
    }
}

/// An IPv6 address: words whose bytes are in network order, so that it is handled by words.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Ip6([u32; 4]);

impl From<[u8; 16]> for Ip6 {
    fn from(octets: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = octets;
        Self::from_quads([[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]])
    }
}

impl Ip6 {
    /// An address by its words, whose bytes are in network order.
    #[inline(always)] // moves only
    pub const fn from_quads(quads: [[u8; 4]; 4]) -> Self {
        let [a, b, c, d] = quads;
        Self([u32::from_ne_bytes(a), u32::from_ne_bytes(b), u32::from_ne_bytes(c), u32::from_ne_bytes(d)])
    }

    /// Its words, whose bytes are in network order.
    #[inline(always)] // loads only
    pub const fn words(self) -> [u32; 4] {
        self.0
    }

    /// [`Address::folded`] of an address that is these words of 64 bits in native order.
    #[inline(always)]
    pub const fn fold(network: u64, host: u64) -> u64 {
        network ^ host.rotate_left(31)
    }

    /// Its bytes in network order.
    pub fn octets(self) -> [u8; 16] {
        let mut octets = [0; 16];
        for (quad, word) in octets.chunks_exact_mut(4).zip(self.0) {
            quad.copy_from_slice(&word.to_ne_bytes());
        }
        octets
    }
}

impl Ord for Ip6 {
    fn cmp(&self, other: &Self) -> Ordering {
        self.octets().cmp(&other.octets())
    }
}

impl PartialOrd for Ip6 {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Debug for Ip6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Debug::fmt(&Ipv6Addr::from(self.octets()), f)
    }
}

impl Address for Ip6 {
    const LEN: usize = 16;
    const UNSPECIFIED: Self = Self([0; 4]);

    #[inline(always)]
    fn sum(self) -> u32 {
        let [a, b, c, d] = self.0;
        // Four words of 32 bits leave room for the carries.
        let sum = a as u64 + b as u64 + c as u64 + d as u64;
        (sum & 0xffff) as u32 + (sum >> 16 & 0xffff) as u32 + (sum >> 32) as u32
    }

    #[inline(always)]
    fn word(self) -> u64 {
        let [_, _, c, d] = self.0;
        let low = (u32::from_be(c) as u64) << 32 | u32::from_be(d) as u64;
        self.network() ^ low.rotate_left(31)
    }

    #[inline(always)]
    fn folded(self) -> u64 {
        let [a, b, c, d] = self.0;
        Self::fold(a as u64 | (b as u64) << 32, c as u64 | (d as u64) << 32)
    }

    #[inline(always)]
    fn differs(self, other: Self) -> u32 {
        let ([a, b, c, d], [e, f, g, h]) = (self.0, other.0);
        (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h)
    }

    const NETWORK_BITS: u8 = 64;

    #[inline(always)]
    fn network(self) -> u64 {
        let [a, b, _, _] = self.0;
        (u32::from_be(a) as u64) << 32 | u32::from_be(b) as u64
    }

    #[inline(always)]
    fn is_unicast(self) -> bool {
        let [a, b, c, d] = self.0;
        let is_low = a | b | c == 0 && u32::from_be(d) <= 1;
        let is_link_local = u32::from_be(a) >> 22 == 0xfe80 >> 6;
        u32::from_be(a) >> 24 != 0xff && !is_low && !is_link_local
    }

    #[inline(always)]
    fn is_loopback(self) -> bool {
        let [a, b, c, d] = self.0;
        a | b | c == 0 && u32::from_be(d) == 1
    }

    #[inline(always)]
    fn of_namespace(cookie: u64) -> Self {
        // Of ::/64 nothing but ::1 is anybody's any more (RFC 4291, 2.5.5.1).
        let [high, low] = [(cookie >> 32) as u32 | 1 << 31, cookie as u32];
        Self([0, 0, high.to_be(), low.to_be()])
    }

    #[inline(always)]
    fn wide(self) -> Ip6 {
        self
    }

    #[inline(always)]
    fn from_wide(wide: Ip6) -> Self {
        wide
    }
}

/// IPv4 (RFC 791).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V4;

impl Family for V4 {
    type Addr = [u8; 4];
    const ETHERTYPE: u16 = 0x0800;
    const HEADER_CHECKSUM: bool = true;
    const HEADER_LEN: u16 = 20;
}

/// IPv6 (RFC 8200).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V6;

impl Family for V6 {
    type Addr = Ip6;
    const ETHERTYPE: u16 = 0x86dd;
    const HEADER_CHECKSUM: bool = false;
    const HEADER_LEN: u16 = 40;
}

/// IP protocol number of TCP (RFC 9293).
pub const TCP: u8 = IpProto::Tcp as u8;
/// IP protocol number of UDP (RFC 768).
pub const UDP: u8 = IpProto::Udp as u8;
/// IP protocol number of SCTP (RFC 9260).
pub const SCTP: u8 = IpProto::Sctp as u8;

/// A port in network byte order.
pub type Port = [u8; 2];

// Words of keys are put together in one order.
const _: () = assert!(
    cfg!(target_endian = "little"),
    "x86_64 and arm64 are little-endian, and so are BPF programs there"
);

plain! {
    /// Key of a flow table: a packet's addresses and ports as they are on the wire in one direction.
    pub struct FlowKey<A> {
        /// Source address.
        pub src: A,
        /// Destination address.
        pub dst: A,
        /// Source port.
        pub sport: Port,
        /// Destination port.
        pub dport: Port,
        /// IP protocol number.
        pub proto: u8,
        /// Zero.
        pub zero: [u8; 3],
    }
}

impl<A: Address> FlowKey<A> {
    /// All zeros.
    pub const ZERO: Self = Self {
        src: A::UNSPECIFIED,
        dst: A::UNSPECIFIED,
        sport: [0; 2],
        dport: [0; 2],
        proto: 0,
        zero: [0; 3],
    };

    /// The key of packets in the other direction, when nothing is translated.
    #[inline(always)]
    pub fn reversed(&self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
            proto: self.proto,
            zero: [0; 3],
        }
    }

    /// Both ports as one word, in native order.
    #[inline(always)]
    pub fn ports(&self) -> u32 {
        let ([a, b], [c, d]) = (self.sport, self.dport);
        u32::from_ne_bytes([a, b, c, d])
    }

    /// The ports, the protocol and what is behind it as one word, in native order.
    #[inline(always)]
    pub fn end(&self) -> u64 {
        self.ports() as u64 | (self.proto_word() as u64) << 32
    }

    /// The protocol and what is behind it as one word, in native order.
    #[inline(always)]
    fn proto_word(&self) -> u32 {
        let [a, b, c] = self.zero;
        u32::from_ne_bytes([self.proto, a, b, c])
    }

    /// Zero if and only if both are the same; compared by words, where the compiler would go byte by byte.
    #[inline(always)]
    pub fn differs(&self, other: &Self) -> u32 {
        self.src.differs(other.src)
            | self.dst.differs(other.dst)
            | (self.ports() ^ other.ports())
            | (self.proto_word() ^ other.proto_word())
    }

    /// The sum of both addresses and both ports, not folded (see [`Address::sum`]).
    #[inline(always)]
    pub fn addresses_sum(&self) -> u32 {
        self.src.sum() + self.dst.sum()
    }

    /// The sum of both addresses and the protocol, folded: what a pseudo-header has beside the length (RFC 9293, section 3.1).
    /// Never 0.
    #[inline(always)]
    pub fn pseudo_sum(&self) -> u16 {
        checksum::pseudo_sum(self.addresses_sum(), self.proto)
    }

    /// The sum of both ports in native order, not folded.
    #[inline(always)]
    pub fn ports_sum(&self) -> u32 {
        u16::from_ne_bytes(self.sport) as u32 + u16::from_ne_bytes(self.dport) as u32
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_have_the_size_the_flow_tables_count_on() {
        assert_eq!(size_of::<FlowKey<[u8; 4]>>(), 16);
        assert_eq!(size_of::<FlowKey<Ip6>>(), 40);
    }

    #[test]
    fn an_address_sums_its_words_in_native_order() {
        let expected = u16::from_ne_bytes([192, 168]) as u32 + u16::from_ne_bytes([1, 2]) as u32;
        assert_eq!([192u8, 168, 1, 2].sum(), expected);
        let mut v6 = [0u8; 16];
        v6[0] = 0x20;
        v6[15] = 1;
        let v6 = Ip6::from(v6);
        let expected = u16::from_ne_bytes([0x20, 0]) as u32 + u16::from_ne_bytes([0, 1]) as u32;
        assert_eq!(v6.sum(), expected);
    }

    #[test]
    fn only_unicast_sources_are_clients() {
        assert!([10u8, 0, 0, 1].is_unicast());
        for bad in [[0u8, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [255, 255, 255, 255]] {
            assert!(!bad.is_unicast(), "{bad:?}");
        }
        let v6 = |text: &str| Ip6::from(text.parse::<Ipv6Addr>().expect("an address").octets());
        assert!(v6("2001:db8::1").is_unicast() && v6("fd00::1").is_unicast() && v6("::2").is_unicast());
        for bad in ["::", "::1", "ff02::1", "fe80::1", "febf::1"] {
            assert!(!v6(bad).is_unicast(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn addresses_by_words_are_those_by_bytes(a: [u8; 16], b: [u8; 16]) {
            let (value, words) = (u128::from_be_bytes(a), a.chunks(2));
            let sum: u32 = words.map(|pair| u16::from_ne_bytes([pair[0], pair[1]]) as u32).sum();
            let (a, b) = (Ip6::from(a), Ip6::from(b));
            prop_assert_eq!(checksum::fold(a.sum()), checksum::fold(sum));
            prop_assert_eq!(a.network(), (value >> 64) as u64);
            prop_assert_eq!(a.word(), (value >> 64) as u64 ^ (value as u64).rotate_left(31));
            prop_assert_eq!(a.differs(b) == 0, a == b);
            prop_assert_eq!(a.differs(a), 0);
        }
    }
}
