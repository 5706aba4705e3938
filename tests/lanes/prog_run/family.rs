//! Both address families by one set of names: every host of the lane is called by an IPv4 address, and has an IPv6
//! address that follows from it.

use xdp_common::{
    fragment::Fragmented,
    frame::{Headers, Packet, Parsed},
    icmp::Icmp,
    net::{Address, Ip6, V4, V6},
    sctp,
    tables::Mapped,
};

/// The name of a host: its IPv4 address.
pub(crate) type Addr = [u8; 4];

/// An address family, as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Length of the IP header without options or extension headers.
    pub(crate) const fn header_len(self) -> usize {
        match self {
            Self::V4 => V4::LEN,
            Self::V6 => V6::LEN,
        }
    }

    /// The address of a host, in network order.
    pub(crate) fn octets(self, name: Addr) -> Vec<u8> {
        match self {
            Self::V4 => name.to_vec(),
            Self::V6 => V6::addr(name).octets().to_vec(),
        }
    }

    /// The address of a host.
    pub(crate) fn ip(self, name: Addr) -> std::net::IpAddr {
        match self {
            Self::V4 => name.into(),
            Self::V6 => V6::addr(name).octets().into(),
        }
    }

    /// The length of a prefix that is so long in names.
    pub(crate) const fn prefix(self, bits: u8) -> u8 {
        match self {
            Self::V4 => bits,
            Self::V6 => 8 * SITE.len() as u8 + bits,
        }
    }
}

/// A family of which there are hosts.
pub(crate) trait Hosts: Icmp<Addr: Mapped + Send> + Fragmented {
    const FAMILY: Family;
    /// The address of a host.
    fn addr(name: Addr) -> Self::Addr;

    /// Reads a frame as the programs do.
    fn read_frame(frame: &[u8], ifindex: u32) -> Parsed<Packet<Self::Addr>> {
        let (parsed, mut packet) = (Self::parse(frame, ifindex), Packet::ZERO);
        if parsed == Parsed::Other && sctp::parse::<Self, _>(frame, ifindex, &mut packet) {
            return Parsed::Packet(packet);
        }
        parsed
    }
}

impl Hosts for V4 {
    const FAMILY: Family = Family::V4;

    fn addr(name: Addr) -> Addr {
        name
    }
}

/// What the IPv6 addresses of all hosts begin with; then comes the name, so that prefixes of names are prefixes.
const SITE: [u8; 6] = [0xfd, 0, 0x0d, 0xb8, 0, 0];

impl Hosts for V6 {
    const FAMILY: Family = Family::V6;

    fn addr(name: Addr) -> Ip6 {
        match name {
            [0, 0, 0, 0] => Ip6::UNSPECIFIED,
            [127, ..] => Ip6::from_quads([[0; 4], [0; 4], [0; 4], [0, 0, 0, 1]]),
            // Groups, as broadcast is one in IPv6.
            [224..=255, _, _, last] => Ip6::from_quads([[0xff, 2, 0, 0], [0; 4], [0; 4], [0, 0, 0, last]]),
            [a, b, c, d] => {
                // The rest differs from host to host too, so that no word of two addresses can be mistaken for the
                // other's; the odd factor is the 64-bit golden ratio.
                let mixed = u64::from(u32::from_be_bytes(name)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let [e, f, g, h, i, j, _, _] = mixed.to_be_bytes();
                let [s0, s1, s2, s3, s4, s5] = SITE;
                Ip6::from([s0, s1, s2, s3, s4, s5, a, b, c, d, e, f, g, h, i, j])
            }
        }
    }
}
