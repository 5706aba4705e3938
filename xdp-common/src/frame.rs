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
    net::{Address, Family, FlowKey, Ip6, TCP, UDP, V4, V6},
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

    /// Copies the ports that the header of a transport begins with, and sets the protocol beside them.
    fn copy_ports<A>(&self, proto: u8, to: &mut FlowKey<A>) {
        (to.sport, to.dport, to.proto) = (self.pair(0), self.pair(2), proto);
    }

    /// Copies the destination MAC address, which a frame begins with.
    fn copy_dmac(&self, to: &mut [u8; 6])
    where
        Self: Sized,
    {
        *to = dmac(self);
    }

    /// Copies the IPv6 address at an offset.
    fn copy_address(&self, at: usize, to: &mut Ip6)
    where
        Self: Sized,
    {
        *to = address(self, at);
    }
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
///
/// The key comes first and aligned, so that it is stored by whole words.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<A> {
    /// Addresses, ports and protocol.
    pub key: FlowKey<A>,
    /// Destination MAC address.
    pub dmac: [u8; 6],
    /// Length of TCP or UDP header and payload, in bytes.
    pub l4_len: u16,
    /// Interface it came in by.
    pub ifindex: u32,
    /// Length of the IP packet, in bytes.
    pub total_len: u16,
    /// TCP or UDP checksum as it is in the frame, in native order.
    pub check: u16,
    /// Offset of the TCP or UDP header in the frame; 0 in a later fragment, which has none.
    pub l4_offset: u8,
    /// Type of service, or traffic class (RFC 2474).
    pub tos: u8,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Bits of [`tcp`], 0 for UDP.
    pub tcp_flags: u8,
    /// Whether it has come in a packet of another node, to which its client had sent it ([`crate::tunnel`]).
    pub is_tunnelled: bool,
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

/// What a frame turned out to be. The packet is in a place of its caller's, or goes along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed<P = ()> {
    /// TCP or UDP with both headers in sight.
    Packet(P),
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
        self.looks_offloaded_by(self.key.pseudo_sum())
    }

    /// The same by the sum that the packet's flow knows ([`FlowKey::pseudo_sum`]).
    #[inline(always)] // as above
    pub fn looks_offloaded_by(&self, pseudo_sum: u16) -> bool {
        self.check == checksum::with_length(pseudo_sum, self.l4_len)
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
    /// Reads the headers of a frame of this family's EtherType to a place, which holds nothing of use unless it finds a packet.
    ///
    /// Addresses go there as they are read: what is read first and stored later does not fit into ten registers.
    fn parse_ip<R: Frame + ?Sized>(frame: &R, ifindex: u32, packet: &mut Packet<Self::Addr>) -> Parsed;

    /// The same of any frame.
    #[inline(always)] // as `parse_ip`
    fn parse_to<R: Frame + ?Sized>(frame: &R, ifindex: u32, packet: &mut Packet<Self::Addr>) -> Parsed {
        if ethertype(frame) == Self::ETHERTYPE {
            Self::parse_ip(frame, ifindex, packet)
        } else {
            Parsed::Other
        }
    }

    /// The packet in a frame, by value: for the host. In BPF its zeros are a call of `memset`.
    #[inline(always)] // as `parse_ip`
    fn parse<R: Frame + ?Sized>(frame: &R, ifindex: u32) -> Parsed<Packet<Self::Addr>> {
        let mut packet = Packet::ZERO;
        match Self::parse_to(frame, ifindex, &mut packet) {
            Parsed::Packet(()) => Parsed::Packet(packet),
            Parsed::Other => Parsed::Other,
            Parsed::Fragment => Parsed::Fragment,
            Parsed::Malformed => Parsed::Malformed,
        }
    }
}

/// The EtherType of a frame (IEEE 802 numbers), 0 when it has none.
#[inline(always)] // bounds proofs do not survive a call
pub fn ethertype<R: Frame + ?Sized>(frame: &R) -> u16 {
    match frame.view::<{ EthHdr::LEN }>(0) {
        Some(eth) => u16::from_be_bytes(eth.pair(ETHERTYPE)),
        None => 0,
    }
}

/// Offset of the IP header.
const IP: usize = EthHdr::LEN;
const _: () = assert!(V4::HEADER_LEN as usize == Ipv4Hdr::LEN && V6::HEADER_LEN as usize == Ipv6Hdr::LEN);

impl Headers for V4 {
    #[inline(always)] // bounds proofs do not survive a call
    fn parse_ip<R: Frame + ?Sized>(frame: &R, ifindex: u32, packet: &mut Packet<[u8; 4]>) -> Parsed {
        let Some(ip) = frame.view::<{ IP + Ipv4Hdr::LEN }>(0) else { return Parsed::Malformed };
        ip.copy_dmac(&mut packet.dmac);
        packet.is_tunnelled = tunnel::is_marked(&ip);
        let proto = ip.u8(IP + offset_of!(Ipv4Hdr, proto));
        if proto != TCP && proto != UDP {
            return Parsed::Other;
        }
        let vihl = ip.u8(IP + offset_of!(Ipv4Hdr, vihl));
        let header_len = ((vihl & 0x0f) as usize) << 2;
        if vihl >> 4 != 4 || header_len < Ipv4Hdr::LEN {
            return Parsed::Malformed;
        }
        // More-fragments or an offset; don't-fragment and the reserved bit do not matter (RFC 791, section 3.1).
        if u16::from_be_bytes(ip.pair(IP + offset_of!(Ipv4Hdr, frags))) & 0x3fff != 0 {
            return Parsed::Fragment;
        }
        let total_len = u16::from_be_bytes(ip.pair(IP + offset_of!(Ipv4Hdr, tot_len)));
        if (total_len as usize) < header_len + l4_len_min(proto)
            || !frame.reaches(EthHdr::LEN + total_len as usize)
        {
            return Parsed::Malformed;
        }
        let l4_offset = EthHdr::LEN + header_len;
        if !parse_l4(frame, l4_offset, proto, packet) {
            return Parsed::Other;
        }
        packet.key.src = ip.quad(IP + offset_of!(Ipv4Hdr, src_addr));
        packet.key.dst = ip.quad(IP + offset_of!(Ipv4Hdr, dst_addr));
        packet.l4_offset = l4_offset as u8;
        packet.l4_len = total_len - header_len as u16;
        packet.total_len = total_len;
        packet.tos = ip.u8(IP + offset_of!(Ipv4Hdr, tos));
        packet.ttl = ip.u8(IP + offset_of!(Ipv4Hdr, ttl));
        packet.ifindex = ifindex;
        Parsed::Packet(())
    }
}

/// Walks the extension headers of a packet, from the one that its header names: says which protocol comes next and how far they
/// reach, from the IPv6 header on, as `protocol << 8 | length`, or one of `WALKED_TO_`: a function of BPF
/// returns one number.
#[inline(never)] // most packets have none
fn walk<R: Frame + ?Sized>(frame: &R, first: u8) -> u32 {
    let (mut proto, mut walked, mut step) = (first, 0, 0);
    while proto != TCP && proto != UDP {
        // Hop-by-hop options come first or not at all (RFC 8200, section 4.1).
        let is_known = (proto == extension::HOP_BY_HOP && step == 0)
            || proto == extension::FRAGMENT
            || proto == extension::DESTINATION;
        if step == EXTENSIONS_MAX || !is_known {
            return WALKED_TO_OTHER;
        }
        let Some(header) = frame.view::<EXTENSION_LEN_MIN>(IP + Ipv6Hdr::LEN + walked) else {
            return WALKED_TO_OTHER;
        };
        let next = header.u8(0);
        // More-fragments or an offset; a header with neither says nothing (RFC 6946).
        let is_fragment = proto == extension::FRAGMENT && u16::from_be_bytes(header.pair(2)) & 0xfff9 != 0;
        if is_fragment {
            return if next == TCP || next == UDP { WALKED_TO_FRAGMENT } else { WALKED_TO_OTHER };
        }
        let units = if proto == extension::FRAGMENT { 0 } else { header.u8(1) as usize };
        walked += (units + 1) * EXTENSION_LEN_MIN;
        if walked > EXTENSIONS_LEN_MAX {
            return WALKED_TO_OTHER;
        }
        proto = next;
        step += 1;
    }
    (proto as u32) << 8 | walked as u32
}

/// A walk that has ended at what is the kernel's.
const WALKED_TO_OTHER: u32 = 1 << 16;
/// A walk that has ended at a fragment of a TCP or UDP packet.
const WALKED_TO_FRAGMENT: u32 = 2 << 16;

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
    fn parse_ip<R: Frame + ?Sized>(frame: &R, ifindex: u32, packet: &mut Packet<Ip6>) -> Parsed {
        let Some(ip) = frame.view::<{ IP + Ipv6Hdr::LEN }>(0) else { return Parsed::Malformed };
        ip.copy_dmac(&mut packet.dmac);
        packet.is_tunnelled = tunnel::is_marked(&ip);
        ip.copy_address(IP + offset_of!(Ipv6Hdr, src_addr), &mut packet.key.src);
        ip.copy_address(IP + offset_of!(Ipv6Hdr, dst_addr), &mut packet.key.dst);
        let next = ip.u8(IP + offset_of!(Ipv6Hdr, next_hdr));
        let end = if next == TCP || next == UDP { (next as u32) << 8 } else { walk(frame, next) };
        match end {
            WALKED_TO_OTHER => return Parsed::Other,
            WALKED_TO_FRAGMENT => return Parsed::Fragment,
            _ => {}
        }
        let (proto, walked) = ((end >> 8) as u8, end as u8 as usize);
        let first = ip.quad(IP);
        let payload_len = u16::from_be_bytes(ip.pair(IP + offset_of!(Ipv6Hdr, payload_len)));
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
        if !parse_l4(frame, l4_offset, proto, packet) {
            return Parsed::Other;
        }
        packet.l4_offset = l4_offset as u8;
        packet.l4_len = payload_len - walked as u16;
        packet.total_len = payload_len.saturating_add(Ipv6Hdr::LEN as u16);
        packet.tos = first[0] << 4 | first[1] >> 4;
        packet.ttl = ip.u8(IP + offset_of!(Ipv6Hdr, hop_limit));
        packet.ifindex = ifindex;
        Parsed::Packet(())
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
    let ([d0, d1, d2, d3], [d4, d5]) = (eth.quad(0), eth.pair(4));
    [d0, d1, d2, d3, d4, d5]
}

/// The IPv6 address at an offset.
#[inline(always)]
pub(crate) fn address<W: View>(ip: &W, at: usize) -> Ip6 {
    Ip6::from_quads([ip.quad(at), ip.quad(at + 4), ip.quad(at + 8), ip.quad(at + 12)])
}

/// Offset of the EtherType (IEEE 802.3).
pub(crate) const ETHERTYPE: usize = 12;

/// Reads ports, checksum and TCP flags, if the header is in sight.
#[inline(always)]
pub(crate) fn parse_l4<A: Address, R: Frame + ?Sized>(
    frame: &R,
    offset: usize,
    proto: u8,
    packet: &mut Packet<A>,
) -> bool {
    if proto == TCP {
        let Some(tcp) = frame.view::<{ TcpHdr::LEN }>(offset) else { return false };
        tcp.copy_ports(proto, &mut packet.key);
        packet.check = u16::from_ne_bytes(tcp.pair(TCP_CHECK));
        packet.tcp_flags = tcp.u8(TCP_FLAGS);
    } else {
        let Some(udp) = frame.view::<{ UdpHdr::LEN }>(offset) else { return false };
        udp.copy_ports(proto, &mut packet.key);
        packet.check = u16::from_ne_bytes(udp.pair(UDP_CHECK));
        packet.tcp_flags = 0;
    }
    true
}

/// Offset of the flags in a TCP header (RFC 9293).
const TCP_FLAGS: usize = 13;
/// Offset of the checksum in a TCP header (RFC 9293).
pub const TCP_CHECK: usize = 16;
/// Offset of the checksum in a UDP header (RFC 768).
pub const UDP_CHECK: usize = 6;
