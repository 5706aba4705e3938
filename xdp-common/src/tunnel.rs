//! Direct server return: a client's packet goes on to the node of its backend as it is, in a packet to that node (RFC 2003,
//! RFC 2473), and the backend answers the client itself.
//!
//! The other node takes the packet out, decides on it as if the client had sent it there, and chooses the same backend,
//! because all nodes fill their rings alike. Where it does not, the packet takes the way of any other flow, and so never
//! goes through a second tunnel. What has come out of a tunnel is known by the source address of its Ethernet header,
//! which programs at tc see too.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    answer::Answer as _,
    checksum,
    frame::{Frame, Packet, View, address, dmac},
    icmp::{Icmp, Patch},
    net::{Address, Family, FlowKey, Ip6, SCTP, TCP, UDP, V4, V6},
    tables::{FrontendKey, Table, Tables, frontend, network},
};

pub mod relay;

/// Source address of the Ethernet header of a packet that has come out of a tunnel: locally administered (IEEE 802), so that
/// no card has it.
pub const MARK: [u8; 6] = [0x02, 0x00, b'D', b'S', b'R', 0x00];
/// Offset of the source address in an Ethernet header.
const SMAC: usize = 6;
/// Offset of the IP header in a frame.
const IP: usize = EthHdr::LEN;
/// Time to live of the packet around a client's (RFC 1700).
const TTL: u8 = 64;
/// Of the type of service only the code point is copied: a router that marks congestion on the packet around would have to
/// be told to the one inside; unmarked, it drops instead (RFC 6040, compatibility mode).
const CODE_POINT: u8 = 0xfc;

/// Whether an Ethernet header is that of a packet that has come out of a tunnel.
#[inline(always)] // one load and one comparison on every path
pub fn is_marked<W: View>(eth: &W) -> bool {
    let [_, _, a, b, c, d] = MARK;
    eth.quad(SMAC + 2) == [a, b, c, d]
}

/// Families whose packets go through tunnels.
pub trait Tunnel: Icmp {
    /// IP protocol number of a packet of the family in another (IANA): 4 and 41.
    const IN_IP: u8;
    /// The shortest MTU that is believed, in bytes: what every link has (RFC 8200, section 5), of IPv4 what the kernel takes for that
    /// (`DEFAULT_MIN_PMTU` in net/ipv4/route.c).
    const MTU_MIN: u16;
    /// The MTU that an error of this type and code tells, with the word behind its checksum.
    fn told_mtu(what: [u8; 2], word: [u8; 4]) -> Option<u32>;
    /// Where a packet goes whose header [`Icmp::read`] does not read: a later fragment.
    fn later<R: Frame + ?Sized>(frame: &R, at: usize) -> Option<Self::Addr>;
    /// Writes the IP header of a packet that holds one of so many bytes.
    fn surround<P: Patch>(frame: &P, tos: u8, len: u16, src: Self::Addr, dst: Self::Addr);
}

impl Tunnel for V4 {
    const IN_IP: u8 = 4;
    const MTU_MIN: u16 = 552;

    #[inline(always)] // a comparison
    fn told_mtu(what: [u8; 2], word: [u8; 4]) -> Option<u32> {
        (what == Self::TOO_BIG).then(|| u32::from_be_bytes(word) & 0xffff)
    }

    #[inline(always)] // bounds proofs do not survive a call
    fn later<R: Frame + ?Sized>(frame: &R, at: usize) -> Option<[u8; 4]> {
        let ip = frame.view::<{ Ipv4Hdr::LEN }>(at)?;
        (ip.u8(0) >> 4 == 4).then(|| ip.quad(offset_of!(Ipv4Hdr, dst_addr)))
    }

    #[inline(always)] // stores
    fn surround<P: Patch>(frame: &P, tos: u8, len: u16, src: [u8; 4], dst: [u8; 4]) {
        let [high, low] = (len + Self::HEADER_LEN).to_be_bytes();
        let (first, fragment, life) = ([0x45, tos & CODE_POINT], [0x40, 0], [TTL, Self::IN_IP]);
        let sum = [first, [high, low], fragment, life]
            .iter()
            .fold(src.sum() + dst.sum(), |sum, pair| sum + u16::from_ne_bytes(*pair) as u32);
        let [check_high, check_low] = (!checksum::fold(sum)).to_ne_bytes();
        frame.put_quad(IP, [first[0], first[1], high, low]);
        frame.put_quad(IP + 4, [0, 0, fragment[0], fragment[1]]);
        frame.put_quad(IP + 8, [life[0], life[1], check_high, check_low]);
        Self::put_addr(frame, IP + 12, src);
        Self::put_addr(frame, IP + 16, dst);
    }
}

impl Tunnel for V6 {
    const IN_IP: u8 = 41;
    const MTU_MIN: u16 = 1280;

    #[inline(always)] // a comparison
    fn told_mtu(what: [u8; 2], word: [u8; 4]) -> Option<u32> {
        // Its code says nothing (RFC 4443, section 3.2).
        (what[0] == Self::TOO_BIG[0]).then(|| u32::from_be_bytes(word))
    }

    #[inline(always)] // bounds proofs do not survive a call
    fn later<R: Frame + ?Sized>(frame: &R, at: usize) -> Option<Ip6> {
        let ip = frame.view::<{ Ipv6Hdr::LEN }>(at)?;
        (ip.u8(0) >> 4 == 6).then(|| address(&ip, offset_of!(Ipv6Hdr, dst_addr)))
    }

    #[inline(always)] // stores
    fn surround<P: Patch>(frame: &P, tos: u8, len: u16, src: Ip6, dst: Ip6) {
        let ([high, low], class) = (len.to_be_bytes(), tos & CODE_POINT);
        frame.put_quad(IP, [0x60 | class >> 4, class << 4, 0, 0]);
        frame.put_quad(IP + 4, [high, low, Self::IN_IP, TTL]);
        Self::put_addr(frame, IP + 8, src);
        Self::put_addr(frame, IP + 24, dst);
    }
}

/// A packet in a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunnelled<A> {
    /// Destination MAC address of its frame.
    pub dmac: [u8; 6],
    /// Interface it came in by.
    pub ifindex: u32,
    /// Whence the one around it comes.
    pub from: A,
    /// Where it goes.
    pub to: A,
    /// Addresses, protocol and ports of the one inside; without ports where those are not in sight, or there are none.
    pub key: FlowKey<A>,
}

/// Reads a packet of the family in another one, if that is what a frame holds.
#[inline(always)] // bounds proofs do not survive a call
pub fn parse<F: Tunnel, R: Frame + ?Sized>(frame: &R, ifindex: u32) -> Option<Tunnelled<F::Addr>> {
    let eth = frame.view::<{ EthHdr::LEN }>(0)?;
    let outer = F::read(frame, IP)?;
    let at = IP + F::LEN;
    if outer.proto != F::IN_IP || outer.len != F::LEN || outer.is_fragment {
        return None;
    }
    let end = IP + outer.total_len as usize;
    if !frame.reaches(end) {
        return None;
    }
    let mut key = FlowKey::ZERO;
    match F::read(frame, at) {
        Some(inner) => {
            if at + inner.total_len as usize != end {
                return None;
            }
            (key.src, key.dst, key.proto) = (inner.src, inner.dst, inner.proto);
            let has_ports = !inner.is_fragment && matches!(inner.proto, TCP | UDP | SCTP);
            if has_ports && let Some(ports) = frame.view::<4>(at + inner.len) {
                (key.sport, key.dport) = (ports.pair(0), ports.pair(2));
            }
        }
        None => key.dst = F::later(frame, at)?,
    }
    Some(Tunnelled { dmac: dmac(&eth), ifindex, from: outer.src, to: outer.dst, key })
}

/// Whether a frame may hold a packet of the family in another one.
#[inline(always)] // one comparison
pub fn is_plain<F: Tunnel, R: Frame + ?Sized>(frame: &R) -> bool {
    frame.view::<1>(IP + F::PROTO).is_some_and(|proto| proto.u8(0) == F::IN_IP)
}

/// Whether a packet is to be taken out of the one around it: that goes from another node to this one, and the one inside from
/// a client outside the cluster to a Service or a NodePort of another node, or is of a known flow. All other packets in
/// packets are somebody else's.
#[inline(always)] // one caller
pub fn is_ours<F: Tunnel, T: Tables<F>>(tables: T, packet: &Tunnelled<F::Addr>) -> bool {
    let address = FrontendKey { addr: packet.key.dst, port: [0; 2], proto: 0, zero: 0 };
    tables.config().direct != 0
        // A promiscuous interface picks up frames for others.
        && tables.device(packet.ifindex).is_some_and(|entry| entry.mac == packet.dmac)
        && tables.network(network::SELF, packet.to)
        && tables.network(network::NODES, packet.from)
        && ![network::PODS, network::NODES, network::SELF]
            .into_iter()
            .any(|owner| tables.network(owner, packet.key.src))
        && (tables
            .frontend(&address)
            .is_some_and(|address| address.flags & (frontend::ADDRESS | frontend::ECHO) != 0)
            || is_node_port(tables, &packet.key)
            || tables.flow(Table::Established, &packet.key).is_some()
            || tables.flow(Table::Embryonic, &packet.key).is_some())
}

/// Whether a packet goes to a NodePort of another node, as far as its ports are in sight.
#[inline(always)] // one caller
fn is_node_port<F: Family, T: Tables<F>>(tables: T, key: &FlowKey<F::Addr>) -> bool {
    let at = FrontendKey { addr: F::Addr::UNSPECIFIED, port: key.dport, proto: key.proto, zero: 0 };
    tables.network(network::NODES, key.dst) && (key.dport == [0; 2] || tables.frontend(&at).is_some())
}

/// Writes the IP header around a client's packet, in front of which there is room.
#[inline(always)] // the fast path
pub fn surround<F: Tunnel, P: Patch>(frame: &P, packet: &Packet<F::Addr>, src: F::Addr, dst: F::Addr) {
    F::surround(frame, packet.tos, packet.total_len, src, dst);
}
