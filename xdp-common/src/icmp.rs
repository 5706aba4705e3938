//! ICMP about packets of ours: errors quote a packet in one of the forms that a flow gives it, and are translated into
//! the other (RFC 5508, section 4.2); echo requests to the addresses of Services are answered (RFC 792, RFC 4443).

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{
    answer, checksum,
    frame::{EXTENSIONS_LEN_MAX, Frame, Packet, TCP_CHECK, UDP_CHECK, View, dmac, extension},
    net::{Address, SCTP, TCP, UDP, V4, V6},
    tunnel::{self, Tunnel},
    verdict::{Hop, Rewrite},
};

mod header;

pub use self::header::{Header, Icmp};

/// Bytes of a frame that can be written to; what is written lies where they have been read.
pub trait Patch {
    /// Writes two bytes.
    fn put_pair(&self, at: usize, bytes: [u8; 2]);
    /// Writes four bytes.
    fn put_quad(&self, at: usize, bytes: [u8; 4]);
}

/// An ICMP message that may be ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<A> {
    /// What the headers say. The key is that of packets which answer the one that an error quotes; that of an echo request
    /// has no ports. Offset, length and checksum are those of the ICMP message.
    pub packet: Packet<A>,
    /// Who sends the message. Whom it is sent to is the key's destination.
    pub from: A,
    /// Offset of the TCP, UDP or SCTP header in the quote.
    pub ports_at: u8,
    /// Offset of its checksum, 0 when the quote is too short for it, the datagram went without, or it is SCTP's.
    pub check_at: u8,
    /// Whether it says that a packet had no hops left, and so where it was.
    pub is_time_exceeded: bool,
}

/// What an ICMP message turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing that concerns packets of ours.
    Other,
    /// An error that quotes a TCP, UDP or SCTP packet.
    Error,
    /// An error that quotes a packet with another one in it ([`tunnel::relay`]).
    Around,
    /// An echo request.
    Echo,
}

/// What becomes of an error whose quote is of a known flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation<A> {
    /// Its new source. Its destination becomes the source of the quote.
    pub source: A,
    /// The new addresses and ports of the quote; for [`Action::Tunnel`](crate::verdict::Action::Tunnel), which changes none, the
    /// addresses of the packet around.
    pub quote: Rewrite<A>,
    /// The next hop, where it is sent on.
    pub hop: Hop,
}

/// Offset of the IP header in a frame.
const IP: usize = EthHdr::LEN;
/// Length of an ICMP header, behind which the quote begins.
const HEADER: usize = 8;
/// Offset of the checksum in an ICMP header.
const CHECK: usize = 2;
/// How much of a TCP or UDP packet every quote has (RFC 792): ports, and the checksum of UDP.
const PORTS: usize = 8;

/// The longest way through headers to the end of what is read or written, in bytes.
pub const REACH: usize = IP + 2 * (Ipv6Hdr::LEN + EXTENSIONS_LEN_MAX) + HEADER + TCP_CHECK + 2;
const _: () = assert!(REACH <= u8::MAX as usize, "offsets are bytes");
const _: () = assert!(Ipv4Hdr::LEN + 40 <= Ipv6Hdr::LEN + EXTENSIONS_LEN_MAX, "the longest is of IPv6");
const _: () = assert!(TcpHdr::LEN >= TCP_CHECK + 2 && UdpHdr::LEN == PORTS);

/// Whether a frame of the family holds ICMP right behind its IP header.
#[inline(always)] // one comparison
pub fn is_plain<F: Icmp, R: Frame + ?Sized>(frame: &R) -> bool {
    frame.view::<1>(IP + F::PROTO).is_some_and(|proto| proto.u8(0) == F::ICMP)
}

/// Reads the ICMP message in a frame of the family.
#[inline(always)] // bounds proofs do not survive a call
pub fn parse<F: Tunnel, R: Frame + ?Sized>(frame: &R, ifindex: u32, message: &mut Message<F::Addr>) -> Found {
    if !is_plain::<F, R>(frame) {
        return Found::Other;
    }
    let (Some(eth), Some(outer)) = (frame.view::<{ EthHdr::LEN }>(0), F::read(frame, IP)) else {
        return Found::Other;
    };
    if outer.is_fragment {
        return Found::Other;
    }
    let at = IP + outer.len;
    let end = IP + outer.total_len as usize;
    if end < at + HEADER || !frame.reaches(end) {
        return Found::Other;
    }
    let Some(icmp) = frame.view::<HEADER>(at) else { return Found::Other };
    let kind = icmp.u8(0);
    message.from = outer.src;
    message.packet.key.dst = outer.dst;
    message.packet.dmac = dmac(&eth);
    message.packet.is_tunnelled = tunnel::is_marked(&eth);
    message.packet.l4_offset = at as u8;
    message.packet.l4_len = (end - at) as u16;
    message.packet.total_len = outer.total_len;
    message.packet.check = u16::from_ne_bytes(icmp.pair(CHECK));
    message.packet.tos = outer.tos;
    message.packet.ttl = outer.ttl;
    message.packet.tcp_flags = 0;
    message.packet.ifindex = ifindex;
    message.packet.key.zero = [0; 3];
    if kind == F::ECHO_REQUEST && icmp.u8(1) == 0 {
        message.packet.key.src = outer.src;
        message.packet.key.sport = [0; 2];
        message.packet.key.dport = [0; 2];
        message.packet.key.proto = F::ICMP;
        return Found::Echo;
    }
    if !F::is_error(kind) {
        return Found::Other;
    }
    let quote_at = at + HEADER;
    let Some(quote) = F::read(frame, quote_at) else { return Found::Other };
    let ports_at = quote_at + quote.len;
    if quote.proto == F::IN_IP {
        return Found::Around;
    }
    // An error goes to the source of what it quotes.
    if (quote.proto != TCP && quote.proto != UDP && quote.proto != SCTP)
        || quote.src.differs(outer.dst) != 0
        || ports_at + PORTS > end
    {
        return Found::Other;
    }
    let Some(ports) = frame.view::<PORTS>(ports_at) else { return Found::Other };
    message.packet.key.src = quote.dst;
    message.packet.key.sport = ports.pair(2);
    message.packet.key.dport = ports.pair(0);
    message.packet.key.proto = quote.proto;
    message.ports_at = ports_at as u8;
    message.is_time_exceeded = kind == F::HOPS_USED_UP;
    let check_at = if quote.proto == TCP { ports_at + TCP_CHECK } else { ports_at + UDP_CHECK };
    let has_check = match quote.proto {
        TCP => check_at + 2 <= end && frame.view::<{ TCP_CHECK + 2 }>(ports_at).is_some(),
        UDP => ports.pair(UDP_CHECK) != [0; 2],
        // Of SCTP nobody can update it without the length, nor checks it in a quote.
        _ => false,
    };
    message.check_at = if has_check { check_at as u8 } else { 0 };
    Found::Error
}

/// Protocols that may hold TCP, UDP or SCTP, farther behind or out of sight: their frames are left to tc and the kernel.
const HOLDERS: [u8; 9] = [
    TCP,
    UDP,
    SCTP,
    extension::HOP_BY_HOP,
    extension::ROUTING,
    extension::FRAGMENT,
    extension::DESTINATION,
    V4::IN_IP,
    V6::IN_IP,
];

/// Reads for whom a frame is, of a protocol that no service has; false for others, and for ICMP, which has answers of its own.
#[inline(always)] // one caller
pub fn addressed<F: Icmp, R: Frame + ?Sized>(
    frame: &R,
    ifindex: u32,
    message: &mut Message<F::Addr>,
) -> bool {
    let (Some(eth), Some(proto), Some(dst)) =
        (frame.view::<{ EthHdr::LEN }>(0), frame.view::<1>(IP + F::PROTO), F::destination(frame, IP))
    else {
        return false;
    };
    let proto = proto.u8(0);
    if proto == F::ICMP || HOLDERS.contains(&proto) {
        return false;
    }
    message.packet.key.dst = dst;
    message.packet.dmac = dmac(&eth);
    message.packet.ifindex = ifindex;
    true
}

/// Writes a translation into the frame of an error, with every checksum updated by what has changed (RFC 1624), so that one
/// that was wrong is still wrong.
#[inline(always)] // one caller per hook
pub fn translate<F: Icmp, P: Frame + Patch>(
    frame: &P,
    message: &Message<F::Addr>,
    translation: &Translation<F::Addr>,
) {
    let (key, quote) = (&message.packet.key, &translation.quote);
    let at = message.packet.l4_offset as usize;
    let quote_at = at + HEADER;
    let before = message.from.sum() + key.dst.sum();
    let outer_delta = checksum::delta(before, translation.source.sum() + quote.src.sum());
    put_addrs::<F, P>(frame, IP, translation.source, quote.src);
    put_addrs::<F, P>(frame, quote_at, quote.src, quote.dst);
    if let Some(check) = F::CHECK {
        update(frame, IP + check, outer_delta);
        update(frame, quote_at + check, quote.addr_delta);
    }
    frame.put_pair(message.ports_at as usize, quote.sport);
    frame.put_pair(message.ports_at as usize + 2, quote.dport);
    // What the quoted addresses change is undone by the checksum of the quoted header, where there is one.
    let mut icmp_delta = if F::HEADER_CHECKSUM { quote.port_delta() } else { quote.l4_delta };
    if message.check_at != 0 {
        let check_at = message.check_at as usize;
        if let Some(check) = frame.view::<2>(check_at) {
            let check = u16::from_ne_bytes(check.pair(0));
            let check = if key.proto == UDP {
                checksum::update_udp(check, quote.l4_delta)
            } else {
                checksum::update(check, quote.l4_delta)
            };
            frame.put_pair(check_at, check.to_ne_bytes());
            icmp_delta = checksum::add(icmp_delta, !quote.l4_delta);
        }
    }
    if F::ICMP_PSEUDO_HEADER {
        icmp_delta = checksum::add(icmp_delta, outer_delta);
    }
    let check = checksum::update(message.packet.check, icmp_delta);
    frame.put_pair(at + CHECK, check.to_ne_bytes());
}

/// Turns an echo request into the reply to it, to be sent out where it came in. Swapped addresses change no sum.
#[inline(always)] // one caller
pub fn reply<F: Icmp, P: Frame + Patch>(frame: &P, message: &Message<F::Addr>) {
    let Some(eth) = frame.view::<{ EthHdr::LEN }>(0) else { return };
    let ([d0, d1, d2, d3], [d4, d5]) = (eth.quad(0), eth.pair(4));
    let ([s0, s1], [s2, s3, s4, s5]) = (eth.pair(6), eth.quad(8));
    frame.put_quad(0, [s0, s1, s2, s3]);
    frame.put_quad(4, [s4, s5, d0, d1]);
    frame.put_quad(8, [d2, d3, d4, d5]);
    put_addrs::<F, P>(frame, IP, message.packet.key.dst, message.packet.key.src);
    let (before, after) = (F::ttl(message.packet.ttl), F::ttl(answer::TTL));
    frame.put_pair(IP + F::TTL, after);
    if let Some(check) = F::CHECK {
        update(frame, IP + check, word_delta(before, after));
    }
    let at = message.packet.l4_offset as usize;
    frame.put_pair(at, [F::ECHO_REPLY, 0]);
    let delta = word_delta([F::ECHO_REQUEST, 0], [F::ECHO_REPLY, 0]);
    frame.put_pair(at + CHECK, checksum::update(message.packet.check, delta).to_ne_bytes());
}

#[inline(always)]
fn word_delta(before: [u8; 2], after: [u8; 2]) -> u16 {
    checksum::delta(u16::from_ne_bytes(before) as u32, u16::from_ne_bytes(after) as u32)
}

/// Writes both addresses of an IP header.
#[inline(always)]
fn put_addrs<F: Icmp, P: Patch>(frame: &P, header: usize, src: F::Addr, dst: F::Addr) {
    F::put_addr(frame, header + F::ADDRS, src);
    F::put_addr(frame, header + F::ADDRS + F::Addr::LEN, dst);
}

/// Updates the checksum at an offset.
#[inline(always)]
fn update<P: Frame + Patch>(frame: &P, at: usize, delta: u16) {
    let Some(check) = frame.view::<2>(at) else { return };
    let check = checksum::update(u16::from_ne_bytes(check.pair(0)), delta);
    frame.put_pair(at, check.to_ne_bytes());
}

impl<A: Address> Message<A> {
    /// A message with nothing in it.
    pub const ZERO: Self = Self {
        packet: Packet::ZERO,
        from: A::UNSPECIFIED,
        ports_at: 0,
        check_at: 0,
        is_time_exceeded: false,
    };
}

#[cfg(test)]
mod tests;
