//! From bytes to a packet: Ethernet, IP, TCP and UDP headers, with every length checked.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{
    checksum,
    net::{Address, Family, FlowKey, Ip6, Port, TCP, UDP, V4, V6},
    tunnel,
};

/// A frame, as far as a program can see it.
pub trait Frame {
    /// Proof that `N` bytes are in sight.
    type View<const N: usize>: View;

    /// `N` bytes from an offset, if the frame has them where they can be read.
    fn view<const N: usize>(&self, offset: usize) -> Option<Self::View<N>>;
    /// Whether the whole frame, from the Ethernet header on, has at least so many bytes, in sight or not.
    fn reaches(&self, length: usize) -> bool;
}

/// Bytes in sight; offsets are constants below its length.
pub trait View {
    /// The byte at an offset.
    fn u8(&self, at: usize) -> u8;
    /// Two bytes, as on the wire.
    fn pair(&self, at: usize) -> [u8; 2];
    /// Four bytes, as on the wire.
    fn quad(&self, at: usize) -> [u8; 4];
}

impl Frame for [u8] {
    type View<const N: usize> = [u8; N];

    fn view<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..offset.checked_add(N)?)?.try_into().ok()
    }

    fn reaches(&self, length: usize) -> bool {
        self.len() >= length
    }
}

impl<const N: usize> View for [u8; N] {
    fn u8(&self, at: usize) -> u8 {
        self[at]
    }

    fn pair(&self, at: usize) -> [u8; 2] {
        [self[at], self[at + 1]]
    }

    fn quad(&self, at: usize) -> [u8; 4] {
        [self[at], self[at + 1], self[at + 2], self[at + 3]]
    }
}

/// What the headers of a frame say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<A> {
    /// Addresses, ports and protocol.
    pub key: FlowKey<A>,
    /// Destination MAC address.
    pub dmac: [u8; 6],
    /// Offset of the TCP or UDP header in the frame; 0 in a later fragment, which has none.
    pub l4_offset: u8,
    /// Length of TCP or UDP header and payload, in bytes.
    pub l4_len: u16,
    /// Length of the IP packet, in bytes.
    pub total_len: u16,
    /// TCP or UDP checksum as it is in the frame, in native order.
    pub check: u16,
    /// Type of service, or traffic class (RFC 2474).
    pub tos: u8,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Bits of [`tcp`], 0 for UDP.
    pub tcp_flags: u8,
    /// Whether it has come in a packet of another node, to which its client had sent it ([`crate::tunnel`]).
    pub is_tunnelled: bool,
    /// Interface it came in by.
    pub ifindex: u32,
}

/// TCP flags (RFC 9293, section 3.1).
pub mod tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgement field is significant.
    pub const ACK: u8 = 0x10;
}

/// What a frame turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed<A> {
    /// TCP or UDP with both headers in sight.
    Packet(Packet<A>),
    /// Another protocol, or headers out of sight: the kernel's.
    Other,
    /// A fragment of a TCP or UDP packet ([`crate::fragment`]).
    Fragment,
    /// Headers that contradict themselves or the frame's length.
    Malformed,
}

impl<A: Address> Packet<A> {
    /// Whether the checksum field holds what a sender leaves for its device to finish: the sum of the pseudo-header.
    ///
    /// One finished checksum in 65,536 looks the same. Only the kernel can tell them apart (`skb->ip_summed`), so such
    /// frames are left to the tc programs, which use helpers that know.
    #[inline(always)] // some ten instructions on the hot path
    pub fn looks_offloaded(&self) -> bool {
        self.check == checksum::pseudo_header(self.key.addresses_sum(), self.key.proto, self.l4_len)
    }
}

impl<A: Address> Packet<A> {
    /// All zeros.
    pub const ZERO: Self = Self {
        key: FlowKey::ZERO,
        dmac: [0; 6],
        l4_offset: 0,
        l4_len: 0,
        total_len: 0,
        check: 0,
        tos: 0,
        ttl: 0,
        tcp_flags: 0,
        is_tunnelled: false,
        ifindex: 0,
    };

    /// Makes it another. The zeros of its key stay as they are: for three of them the compiler calls a function in BPF.
    #[inline(always)] // moves
    pub fn set(&mut self, to: Self) {
        let Self {
            key,
            dmac,
            l4_offset,
            l4_len,
            total_len,
            check,
            tos,
            ttl,
            tcp_flags,
            is_tunnelled,
            ifindex,
        } = to;
        let FlowKey { src, dst, sport, dport, proto, zero: _ } = key;
        self.key.src = src;
        self.key.dst = dst;
        self.key.sport = sport;
        self.key.dport = dport;
        self.key.proto = proto;
        self.dmac = dmac;
        self.l4_offset = l4_offset;
        self.l4_len = l4_len;
        self.total_len = total_len;
        self.check = check;
        self.tos = tos;
        self.ttl = ttl;
        self.tcp_flags = tcp_flags;
        self.is_tunnelled = is_tunnelled;
        self.ifindex = ifindex;
    }

    /// Whether it is a fragment behind the first, without a TCP or UDP header.
    #[inline(always)] // one comparison
    pub fn is_later_fragment(&self) -> bool {
        self.l4_offset == 0
    }
}

/// Families whose frames can be read.
pub trait Headers: Family {
    /// Length of the IP header without options or extension headers, in bytes.
    const LEN: usize = Self::HEADER_LEN as usize;
    /// Parses a frame.
    fn parse<R: Frame + ?Sized>(frame: &R, ifindex: u32) -> Parsed<Self::Addr>;
}

/// The EtherType of a frame (IEEE 802 numbers), 0 when it has none.
#[inline(always)] // bounds proofs do not survive a call
pub fn ethertype<R: Frame + ?Sized>(frame: &R) -> u16 {
    match frame.view::<{ EthHdr::LEN }>(0) {
        Some(eth) => u16::from_be_bytes(eth.pair(ETHERTYPE)),
        None => 0,
    }
}

const _: () = assert!(V4::HEADER_LEN as usize == Ipv4Hdr::LEN && V6::HEADER_LEN as usize == Ipv6Hdr::LEN);

impl Headers for V4 {
    #[inline(always)] // bounds proofs do not survive a call
    fn parse<R: Frame + ?Sized>(frame: &R, ifindex: u32) -> Parsed<[u8; 4]> {
        let Some(eth) = frame.view::<{ EthHdr::LEN }>(0) else { return Parsed::Other };
        if u16::from_be_bytes(eth.pair(ETHERTYPE)) != V4::ETHERTYPE {
            return Parsed::Other;
        }
        let Some(ip) = frame.view::<{ Ipv4Hdr::LEN }>(EthHdr::LEN) else { return Parsed::Malformed };
        let proto = ip.u8(offset_of!(Ipv4Hdr, proto));
        if proto != TCP && proto != UDP {
            return Parsed::Other;
        }
        let vihl = ip.u8(offset_of!(Ipv4Hdr, vihl));
        let header_len = ((vihl & 0x0f) as usize) << 2;
        if vihl >> 4 != 4 || header_len < Ipv4Hdr::LEN {
            return Parsed::Malformed;
        }
        // More-fragments or an offset; don't-fragment and the reserved bit do not matter (RFC 791, section 3.1).
        if u16::from_be_bytes(ip.pair(offset_of!(Ipv4Hdr, frags))) & 0x3fff != 0 {
            return Parsed::Fragment;
        }
        let total_len = u16::from_be_bytes(ip.pair(offset_of!(Ipv4Hdr, tot_len)));
        if (total_len as usize) < header_len + l4_len_min(proto)
            || !frame.reaches(EthHdr::LEN + total_len as usize)
        {
            return Parsed::Malformed;
        }
        let l4_offset = EthHdr::LEN + header_len;
        let Some((sport, dport, check, tcp_flags)) = parse_l4(frame, l4_offset, proto) else {
            return Parsed::Other;
        };
        Parsed::Packet(Packet {
            key: FlowKey {
                src: ip.quad(offset_of!(Ipv4Hdr, src_addr)),
                dst: ip.quad(offset_of!(Ipv4Hdr, dst_addr)),
                sport,
                dport,
                proto,
                zero: [0; 3],
            },
            dmac: dmac(&eth),
            l4_offset: l4_offset as u8,
            l4_len: total_len - header_len as u16,
            total_len,
            check,
            tos: ip.u8(offset_of!(Ipv4Hdr, tos)),
            ttl: ip.u8(offset_of!(Ipv4Hdr, ttl)),
            tcp_flags,
            is_tunnelled: tunnel::is_marked(&eth),
            ifindex,
        })
    }
}

/// Extension headers (RFC 8200, section 4) that can stand between the IPv6 header and what is translated. A routing header
/// names another destination than the packet's, and an authentication header forbids translation: such packets are the
/// kernel's.
pub(crate) mod extension {
    pub(crate) const HOP_BY_HOP: u8 = 0;
    pub(crate) const ROUTING: u8 = 43;
    pub(crate) const FRAGMENT: u8 = 44;
    pub(crate) const DESTINATION: u8 = 60;
}

/// Extension headers that are walked; a packet with more is the kernel's.
pub const EXTENSIONS_MAX: usize = 4;
/// How far extension headers may reach, from the IPv6 header on, in bytes.
pub const EXTENSIONS_LEN_MAX: usize = 64;
const _: () =
    assert!(EthHdr::LEN + Ipv6Hdr::LEN + EXTENSIONS_LEN_MAX <= u8::MAX as usize, "offsets are bytes");

impl Headers for V6 {
    #[inline(always)] // bounds proofs do not survive a call
    fn parse<R: Frame + ?Sized>(frame: &R, ifindex: u32) -> Parsed<Ip6> {
        let Some(eth) = frame.view::<{ EthHdr::LEN }>(0) else { return Parsed::Other };
        if u16::from_be_bytes(eth.pair(ETHERTYPE)) != V6::ETHERTYPE {
            return Parsed::Other;
        }
        let Some(ip) = frame.view::<{ Ipv6Hdr::LEN }>(EthHdr::LEN) else { return Parsed::Malformed };
        let (mut proto, mut walked, mut step) = (ip.u8(offset_of!(Ipv6Hdr, next_hdr)), 0, 0);
        while proto != TCP && proto != UDP {
            // Hop-by-hop options come first or not at all (RFC 8200, section 4.1).
            let is_known = (proto == extension::HOP_BY_HOP && step == 0)
                || proto == extension::FRAGMENT
                || proto == extension::DESTINATION;
            if step == EXTENSIONS_MAX || !is_known {
                return Parsed::Other;
            }
            let Some(header) = frame.view::<EXTENSION_LEN_MIN>(EthHdr::LEN + Ipv6Hdr::LEN + walked) else {
                return Parsed::Other;
            };
            let next = header.u8(0);
            // More-fragments or an offset; a header with neither says nothing (RFC 6946).
            let is_fragment =
                proto == extension::FRAGMENT && u16::from_be_bytes(header.pair(2)) & 0xfff9 != 0;
            if is_fragment {
                return if next == TCP || next == UDP { Parsed::Fragment } else { Parsed::Other };
            }
            let units = if proto == extension::FRAGMENT { 0 } else { header.u8(1) as usize };
            walked += (units + 1) * EXTENSION_LEN_MIN;
            if walked > EXTENSIONS_LEN_MAX {
                return Parsed::Other;
            }
            proto = next;
            step += 1;
        }
        let first = ip.quad(0);
        let payload_len = u16::from_be_bytes(ip.pair(offset_of!(Ipv6Hdr, payload_len)));
        // Without a length here it is elsewhere (RFC 2675, and what the kernel joins to more than 64 KiB): the kernel's.
        if payload_len == 0 {
            return Parsed::Other;
        }
        if first[0] >> 4 != 6
            || (payload_len as usize) < walked + l4_len_min(proto)
            || !frame.reaches(EthHdr::LEN + Ipv6Hdr::LEN + payload_len as usize)
        {
            return Parsed::Malformed;
        }
        let l4_offset = EthHdr::LEN + Ipv6Hdr::LEN + walked;
        let Some((sport, dport, check, tcp_flags)) = parse_l4(frame, l4_offset, proto) else {
            return Parsed::Other;
        };
        Parsed::Packet(Packet {
            key: FlowKey {
                src: address(&ip, offset_of!(Ipv6Hdr, src_addr)),
                dst: address(&ip, offset_of!(Ipv6Hdr, dst_addr)),
                sport,
                dport,
                proto,
                zero: [0; 3],
            },
            dmac: dmac(&eth),
            l4_offset: l4_offset as u8,
            l4_len: payload_len - walked as u16,
            total_len: payload_len.saturating_add(Ipv6Hdr::LEN as u16),
            check,
            tos: first[0] << 4 | first[1] >> 4,
            ttl: ip.u8(offset_of!(Ipv6Hdr, hop_limit)),
            tcp_flags,
            is_tunnelled: tunnel::is_marked(&eth),
            ifindex,
        })
    }
}

/// The shortest extension header, and the unit of their lengths, in bytes (RFC 8200, section 4.3).
pub(crate) const EXTENSION_LEN_MIN: usize = 8;

/// The shortest header of a transport, in bytes.
#[inline(always)]
pub(crate) fn l4_len_min(proto: u8) -> usize {
    if proto == TCP { TcpHdr::LEN } else { UdpHdr::LEN }
}

#[inline(always)]
pub(crate) fn dmac<W: View>(eth: &W) -> [u8; 6] {
    let ([d0, d1], [d2, d3, d4, d5]) = (eth.pair(0), eth.quad(2));
    [d0, d1, d2, d3, d4, d5]
}

/// The IPv6 address at an offset.
#[inline(always)]
pub(crate) fn address<W: View>(ip: &W, at: usize) -> Ip6 {
    Ip6::from_quads([ip.quad(at), ip.quad(at + 4), ip.quad(at + 8), ip.quad(at + 12)])
}

/// Offset of the EtherType (IEEE 802.3).
pub(crate) const ETHERTYPE: usize = 12;

/// Ports, checksum and TCP flags, if the header is in sight.
#[inline(always)]
pub(crate) fn parse_l4<R: Frame + ?Sized>(
    frame: &R,
    offset: usize,
    proto: u8,
) -> Option<(Port, Port, u16, u8)> {
    if proto == TCP {
        let tcp = frame.view::<{ TcpHdr::LEN }>(offset)?;
        Some((tcp.pair(0), tcp.pair(2), u16::from_ne_bytes(tcp.pair(TCP_CHECK)), tcp.u8(TCP_FLAGS)))
    } else {
        let udp = frame.view::<{ UdpHdr::LEN }>(offset)?;
        Some((udp.pair(0), udp.pair(2), u16::from_ne_bytes(udp.pair(UDP_CHECK)), 0))
    }
}

/// Offset of the flags in a TCP header (RFC 9293).
const TCP_FLAGS: usize = 13;
/// Offset of the checksum in a TCP header (RFC 9293).
pub const TCP_CHECK: usize = 16;
/// Offset of the checksum in a UDP header (RFC 768).
pub const UDP_CHECK: usize = 6;
