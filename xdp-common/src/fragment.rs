//! Fragments: only the first one has the ports, the others are decided on by what it has left behind.
//!
//! XDP leaves them all to tc ingress, and everything that is decided there takes the kernel's way. So all fragments of a
//! packet go one way, whoever puts them together or takes them apart on it: connection tracking on this node, which
//! gathers whole packets and takes them apart again when they leave, or the router behind it.
//!
//! A later fragment that comes before its first is kept by the agent, and leaves word that it waits. The first, finding
//! that, tells the agent, which gives back what it has kept.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    frame::{
        ETHERTYPE, EXTENSION_LEN_MIN, EXTENSIONS_LEN_MAX, EXTENSIONS_MAX, Frame, Headers, Packet, View,
        address, dmac, extension, l4_len_min, parse_l4, tcp,
    },
    gate,
    net::{Address, Family, FlowKey, Ip6, Port, TCP, UDP, V4, V6},
    plain,
    tables::Tables,
    tunnel,
    verdict::{Counter, Event},
};

plain! {
    /// What all fragments of a packet have in common (RFC 791, RFC 8200).
    pub struct FragmentKey<A> {
        /// Source address.
        pub src: A,
        /// Destination address.
        pub dst: A,
        /// Identification, as on the wire; that of IPv4 comes first, with zeros behind it.
        pub id: [u8; 4],
        /// IP protocol number.
        pub proto: u8,
        /// Zero.
        pub zero: [u8; 3],
    }

    /// What is known of the first fragment.
    pub struct FragmentPorts {
        /// Source port, once it has come.
        pub sport: Port,
        /// Destination port, once it has come.
        pub dport: Port,
        /// Clock of the last change, in seconds of agent time.
        pub seen: u32,
        /// Where it is: one of [`first`].
        pub first: u32,
    }

    /// Where a fragment is made ready for the agent.
    pub struct Hold {
        /// Index of the interface that it came in by; 0 for a first one, which is not kept, but awaited by those that are.
        pub ifindex: u32,
        /// Its frame, as far as it goes.
        pub frame: [u8; HELD_LEN_MAX],
    }
}

/// Where the first fragment of a packet is.
pub mod first {
    /// No fragment of the packet has come.
    pub const UNKNOWN: u32 = 0;
    /// It has come.
    pub const COME: u32 = 1;
    /// Others came before it and wait for it.
    pub const AWAITED: u32 = 2;
    /// It never came.
    pub const GIVEN_UP: u32 = 3;
}

/// Longest frame that is kept, in bytes: the kernel gives back no more than fits into a page of 4 KiB beside its own
/// (`bpf_test_init`, net/bpf/test_run.c). Longer ones, of devices with jumbo frames, are left to the kernel.
pub const HELD_LEN_MAX: usize = 3584;

/// For how long ports are good: the kernel's own patience with fragments (`net.ipv4.ipfrag_time`), in seconds.
pub const SECONDS_MAX: u32 = 30;

impl FragmentPorts {
    /// Whether they are those of this packet, not of one with the same identification long ago.
    #[inline(always)] // a comparison
    pub fn is_current(&self, clock: u32) -> bool {
        clock.wrapping_sub(self.seen) <= SECONDS_MAX
    }

    /// Of a first fragment that has not come.
    #[inline(always)] // moves
    pub fn without(first: u32, clock: u32) -> Self {
        Self { sport: [0; 2], dport: [0; 2], seen: clock, first }
    }
}

/// Which hook asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A fragment has come in.
    Ingress,
    /// A fragment is about to leave.
    Egress,
}

/// What is to be done with a fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Left alone.
    Pass,
    /// Decided on like any packet: its ports are known.
    Decide,
    /// The same, and the agent is told that the first has come which others wait for.
    Tell,
    /// Kept until its first fragment has come.
    Hold,
}

/// The tables, with that of fragments.
pub trait FragmentTables<F: Family>: Tables<F> {
    /// What is known of the first fragment: [`first::UNKNOWN`] when nothing is.
    fn ports(self, key: &FragmentKey<F::Addr>) -> FragmentPorts;
    /// Notes what the first fragment says. Refused, the others are taken for early ones.
    fn set_ports(self, key: &FragmentKey<F::Addr>, ports: &FragmentPorts);
    /// Notes that the first fragment is awaited, unless something is noted.
    fn await_first(self, key: &FragmentKey<F::Addr>, ports: &FragmentPorts);
}

/// Families whose fragments can be read.
pub trait Fragmented: Headers {
    /// Parses a fragment, and writes what its own headers tell: a later one has no ports. False when it is none, is of
    /// another protocol, contradicts itself or its frame, or is a first one without all of its TCP or UDP header.
    fn parse_fragment<R: Frame + ?Sized>(
        frame: &R,
        ifindex: u32,
        packet: &mut Packet<Self::Addr>,
        key: &mut FragmentKey<Self::Addr>,
    ) -> bool;
}

/// Says what is to be done with a fragment, and gives a later one its ports.
#[inline(always)] // one caller per hook
pub fn step<F: Family, T: FragmentTables<F>>(
    tables: T,
    packet: &mut Packet<F::Addr>,
    key: &FragmentKey<F::Addr>,
    side: Side,
) -> Step {
    let clock = tables.config().clock;
    let may_be_ours = || {
        // Another node's NodePort is known by its port alone, which the first fragment has.
        gate::admits_address(tables, key.dst)
            || (packet.is_tunnelled && gate::admits_address(tables, F::Addr::UNSPECIFIED))
    };
    if side == Side::Ingress && !may_be_ours() {
        return Step::Pass;
    }
    let is_first = !packet.is_later_fragment();
    if is_first && side == Side::Egress && !gate::admits_egress(tables, &packet.key) {
        return Step::Pass;
    }
    let known = tables.ports(key);
    let state = if known.is_current(clock) { known.first } else { first::UNKNOWN };
    if is_first {
        let FlowKey { sport, dport, .. } = packet.key;
        tables.set_ports(key, &FragmentPorts { sport, dport, seen: clock, first: first::COME });
        tables.count(Counter::Event(Event::Fragment));
        return if state == first::AWAITED && side == Side::Ingress { Step::Tell } else { Step::Decide };
    }
    if state == first::COME {
        (packet.key.sport, packet.key.dport) = (known.sport, known.dport);
        tables.count(Counter::Event(Event::Fragment));
        return Step::Decide;
    }
    if state == first::GIVEN_UP {
        tables.count(Counter::Event(Event::FragmentLost));
        return Step::Pass;
    }
    if side == Side::Egress {
        return Step::Pass;
    }
    let awaited = FragmentPorts::without(first::AWAITED, clock);
    if known.first == first::UNKNOWN {
        // The first may come at this moment, on another CPU: its word goes before ours, but not that of an old packet.
        tables.await_first(key, &awaited);
    } else {
        tables.set_ports(key, &awaited);
    }
    Step::Hold
}

impl<A: Address> FragmentKey<A> {
    /// All zeros.
    pub const ZERO: Self =
        Self { src: A::UNSPECIFIED, dst: A::UNSPECIFIED, id: [0; 4], proto: 0, zero: [0; 3] };
}

impl Fragmented for V4 {
    #[inline(always)] // bounds proofs do not survive a call
    fn parse_fragment<R: Frame + ?Sized>(
        frame: &R,
        ifindex: u32,
        packet: &mut Packet<[u8; 4]>,
        key: &mut FragmentKey<[u8; 4]>,
    ) -> bool {
        let Some(eth) = frame.view::<{ EthHdr::LEN }>(0) else { return false };
        let Some(ip) = frame.view::<{ Ipv4Hdr::LEN }>(EthHdr::LEN) else { return false };
        let vihl = ip.u8(offset_of!(Ipv4Hdr, vihl));
        let header_len = ((vihl & 0x0f) as usize) << 2;
        let field = u16::from_be_bytes(ip.pair(offset_of!(Ipv4Hdr, frags)));
        if u16::from_be_bytes(eth.pair(ETHERTYPE)) != V4::ETHERTYPE
            || vihl >> 4 != 4
            || header_len < Ipv4Hdr::LEN
            || field & 0x3fff == 0
        {
            return false;
        }
        let total_len = u16::from_be_bytes(ip.pair(offset_of!(Ipv4Hdr, tot_len)));
        if (total_len as usize) < header_len || !frame.reaches(EthHdr::LEN + total_len as usize) {
            return false;
        }
        let [high, low] = ip.pair(offset_of!(Ipv4Hdr, id));
        key.src = ip.quad(offset_of!(Ipv4Hdr, src_addr));
        key.dst = ip.quad(offset_of!(Ipv4Hdr, dst_addr));
        key.id = [high, low, 0, 0];
        key.proto = ip.u8(offset_of!(Ipv4Hdr, proto));
        packet.dmac = dmac(&eth);
        packet.is_tunnelled = tunnel::is_marked(&eth);
        packet.ifindex = ifindex;
        packet.l4_len = total_len - header_len as u16;
        packet.total_len = total_len;
        packet.tos = ip.u8(offset_of!(Ipv4Hdr, tos));
        packet.ttl = ip.u8(offset_of!(Ipv4Hdr, ttl));
        parse_body(frame, EthHdr::LEN + header_len, field & 0x1fff == 0, key, packet)
    }
}

impl Fragmented for V6 {
    #[inline(always)] // bounds proofs do not survive a call
    fn parse_fragment<R: Frame + ?Sized>(
        frame: &R,
        ifindex: u32,
        packet: &mut Packet<Ip6>,
        key: &mut FragmentKey<Ip6>,
    ) -> bool {
        let Some(eth) = frame.view::<{ EthHdr::LEN }>(0) else { return false };
        let Some(ip) = frame.view::<{ Ipv6Hdr::LEN }>(EthHdr::LEN) else { return false };
        let first = ip.quad(0);
        let payload_len = u16::from_be_bytes(ip.pair(offset_of!(Ipv6Hdr, payload_len)));
        if u16::from_be_bytes(eth.pair(ETHERTYPE)) != V6::ETHERTYPE
            || first[0] >> 4 != 6
            || !frame.reaches(EthHdr::LEN + Ipv6Hdr::LEN + payload_len as usize)
        {
            return false;
        }
        let (mut header, mut walked, mut step) = (ip.u8(offset_of!(Ipv6Hdr, next_hdr)), 0, 0);
        let is_first = loop {
            let Some(view) = frame.view::<EXTENSION_LEN_MIN>(EthHdr::LEN + Ipv6Hdr::LEN + walked) else {
                return false;
            };
            let next = view.u8(0);
            let field = u16::from_be_bytes(view.pair(2));
            let is_fragment = header == extension::FRAGMENT;
            // Hop-by-hop options come first or not at all (RFC 8200, section 4.1).
            let is_option =
                (header == extension::HOP_BY_HOP && step == 0) || header == extension::DESTINATION;
            if step == EXTENSIONS_MAX || !(is_fragment || is_option) {
                return false;
            }
            let units = if is_fragment { 0 } else { view.u8(1) as usize };
            walked += (units + 1) * EXTENSION_LEN_MIN;
            if walked > EXTENSIONS_LEN_MAX {
                return false;
            }
            if is_fragment && field & 0xfff9 != 0 {
                key.id = view.quad(4);
                key.proto = next;
                break field & 0xfff8 == 0;
            }
            (header, step) = (next, step + 1);
        };
        if (payload_len as usize) < walked {
            return false;
        }
        key.src = address(&ip, offset_of!(Ipv6Hdr, src_addr));
        key.dst = address(&ip, offset_of!(Ipv6Hdr, dst_addr));
        packet.dmac = dmac(&eth);
        packet.is_tunnelled = tunnel::is_marked(&eth);
        packet.ifindex = ifindex;
        packet.l4_len = payload_len - walked as u16;
        packet.total_len = payload_len.saturating_add(Ipv6Hdr::LEN as u16);
        packet.tos = first[0] << 4 | first[1] >> 4;
        packet.ttl = ip.u8(offset_of!(Ipv6Hdr, hop_limit));
        parse_body(frame, EthHdr::LEN + Ipv6Hdr::LEN + walked, is_first, key, packet)
    }
}

/// Parses what follows the IP headers of a fragment, at an offset.
#[inline(always)] // bounds proofs do not survive a call
fn parse_body<A: Address, R: Frame + ?Sized>(
    frame: &R,
    at: usize,
    is_first: bool,
    key: &FragmentKey<A>,
    packet: &mut Packet<A>,
) -> bool {
    if key.proto != TCP && key.proto != UDP {
        return false;
    }
    let is_tcp = key.proto == TCP;
    packet.key.src = key.src;
    packet.key.dst = key.dst;
    packet.key.proto = key.proto;
    packet.key.zero = [0; 3];
    if is_first {
        if (packet.l4_len as usize) < l4_len_min(key.proto) {
            return false;
        }
        if !parse_l4(frame, at, key.proto, packet) {
            return false;
        }
        packet.l4_offset = at as u8;
    } else {
        packet.key.sport = [0; 2];
        packet.key.dport = [0; 2];
        packet.check = 0;
        // What goes on in the middle of a connection.
        packet.tcp_flags = if is_tcp { tcp::ACK } else { 0 };
        packet.l4_offset = 0;
    }
    true
}

#[cfg(test)]
mod tests;
