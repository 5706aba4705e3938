//! Addresses, protocols and the flow key: what names a packet.

use core::{fmt::Debug, hash::Hash};

use network_types::ip::IpProto;

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
    /// Length in bits of the leading part that [`Address::network`] keeps.
    const NETWORK_BITS: u8;
    /// Its leading bits, by which the gate knows where ClusterIPs are.
    fn network(self) -> u64;
    /// Whether a unicast packet can come from it: neither unspecified, multicast, broadcast nor loopback.
    fn is_unicast(self) -> bool;
    /// Whether it is the node's own loopback.
    fn is_loopback(self) -> bool;
    /// What stands for a network namespace where clients are known by address: an address that no client has.
    fn of_namespace(cookie: u64) -> Self;
    /// It as 16 bytes: IPv4 as IPv6 maps it (RFC 4291, 2.5.5.2).
    fn wide(self) -> [u8; 16];
    /// The address of [`Address::wide`].
    fn from_wide(wide: [u8; 16]) -> Self;
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
    fn wide(self) -> [u8; 16] {
        let [a, b, c, d] = self;
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
    }

    #[inline(always)]
    fn from_wide(wide: [u8; 16]) -> Self {
        [wide[12], wide[13], wide[14], wide[15]]
    }
}

impl Address for [u8; 16] {
    const LEN: usize = 16;
    const UNSPECIFIED: Self = [0; 16];

    #[inline(always)]
    fn sum(self) -> u32 {
        let value = u128::from_ne_bytes(self);
        let mut sum = 0;
        let mut word = 0;
        while word < 8 {
            sum += (value >> (16 * word)) as u32 & 0xffff;
            word += 1;
        }
        sum
    }

    #[inline(always)]
    fn word(self) -> u64 {
        let value = u128::from_be_bytes(self);
        (value >> 64) as u64 ^ (value as u64).rotate_left(31)
    }

    const NETWORK_BITS: u8 = 64;

    #[inline(always)]
    fn network(self) -> u64 {
        (u128::from_be_bytes(self) >> 64) as u64
    }

    #[inline(always)]
    fn is_unicast(self) -> bool {
        let value = u128::from_be_bytes(self);
        self[0] != 0xff && value != 0 && value != 1
    }

    #[inline(always)]
    fn is_loopback(self) -> bool {
        u128::from_be_bytes(self) == 1
    }

    #[inline(always)]
    fn of_namespace(cookie: u64) -> Self {
        // ::/64 but for ::1 is nobody's any more (RFC 4291, 2.5.5.1).
        (1 << 63 | cookie as u128).to_be_bytes()
    }

    #[inline(always)]
    fn wide(self) -> [u8; 16] {
        self
    }

    #[inline(always)]
    fn from_wide(wide: [u8; 16]) -> Self {
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
}

/// IPv6 (RFC 8200).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V6;

impl Family for V6 {
    type Addr = [u8; 16];
    const ETHERTYPE: u16 = 0x86dd;
    const HEADER_CHECKSUM: bool = false;
}

/// IP protocol number of TCP (RFC 9293).
pub const TCP: u8 = IpProto::Tcp as u8;
/// IP protocol number of UDP (RFC 768).
pub const UDP: u8 = IpProto::Udp as u8;
/// IP protocol number of SCTP (RFC 9260).
pub const SCTP: u8 = IpProto::Sctp as u8;

/// A port in network byte order.
pub type Port = [u8; 2];

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

    /// The sum of both addresses and both ports, not folded (see [`Address::sum`]).
    #[inline(always)]
    pub fn addresses_sum(&self) -> u32 {
        self.src.sum() + self.dst.sum()
    }

    /// The sum of both ports in native order, not folded.
    #[inline(always)]
    pub fn ports_sum(&self) -> u32 {
        u16::from_ne_bytes(self.sport) as u32 + u16::from_ne_bytes(self.dport) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_the_size_the_flow_tables_count_on() {
        assert_eq!(size_of::<FlowKey<[u8; 4]>>(), 16);
        assert_eq!(size_of::<FlowKey<[u8; 16]>>(), 40);
    }

    #[test]
    fn an_address_sums_its_words_in_native_order() {
        let expected = u16::from_ne_bytes([192, 168]) as u32 + u16::from_ne_bytes([1, 2]) as u32;
        assert_eq!([192u8, 168, 1, 2].sum(), expected);
        let mut v6 = [0u8; 16];
        v6[0] = 0x20;
        v6[15] = 1;
        let expected = u16::from_ne_bytes([0x20, 0]) as u32 + u16::from_ne_bytes([0, 1]) as u32;
        assert_eq!(v6.sum(), expected);
    }

    #[test]
    fn only_unicast_sources_are_clients() {
        assert!([10u8, 0, 0, 1].is_unicast());
        for bad in [[0u8, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [255, 255, 255, 255]] {
            assert!(!bad.is_unicast(), "{bad:?}");
        }
    }
}
