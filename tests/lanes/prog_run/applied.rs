//! What a verdict makes of the bytes of a frame, computed another way than the programs do; and what must hold of every
//! frame that a program has changed, whatever the verdict was.

use etherparse::{IpDscp, IpNumber, IpSlice, Ipv4Header, Ipv6FlowLabel, Ipv6Header};
use xdp_common::{
    answer::{self, Answer, Finisher},
    frame::{Packet, TCP_CHECK, UDP_CHECK},
    net::{Address, Family as _, SCTP, TCP, UDP, V4},
    sctp,
    verdict::{Action, Hop, Reason, Verdict},
};

use crate::{
    family::{Family, Hosts},
    frames::{ETHERNET, words_sum},
    node::Hook,
    sctp::{crc32c, repaired},
};

/// Longest part of a frame that answers look at: Ethernet, IPv6 and TCP headers, in whole words.
const HEAD: usize = 80;

/// The frame after a verdict, and whether a refused packet is answered.
pub(crate) fn applied<F: Hosts + Answer>(
    hook: Hook,
    frame: &[u8],
    packet: &Packet<F::Addr>,
    verdict: &Verdict<F::Addr>,
) -> (Vec<u8>, bool) {
    match verdict.action {
        Action::Pass | Action::Drop(_) => (frame.to_vec(), false),
        Action::Reject(reason) => match answered::<F>(hook, frame, packet, verdict.mtu, reason) {
            Some(answer) => (answer, true),
            None => (frame.to_vec(), false),
        },
        Action::Stack => (rewritten::<F>(frame, packet, verdict), false),
        Action::Tunnel => (around::<F>(hook, frame, packet, verdict), false),
        Action::Transmit | Action::Redirect => {
            let mut out = rewritten::<F>(frame, packet, verdict);
            send::<F>(&mut out, packet.ttl, &verdict.hop);
            (out, false)
        }
    }
}

/// Addresses a frame to its next hop, and takes one from its time to live.
pub(crate) fn send<F: Hosts>(frame: &mut [u8], ttl: u8, hop: &Hop) {
    frame[0..6].copy_from_slice(&hop.dmac);
    frame[6..12].copy_from_slice(&hop.smac);
    set_ttl::<F>(frame, ttl - 1);
}

/// Writes the time to live, or hop limit.
pub(crate) fn set_ttl<F: Hosts>(frame: &mut [u8], ttl: u8) {
    let at = ETHERNET + if F::FAMILY == Family::V4 { 8 } else { 7 };
    replace(frame, at, &[ttl], ip_check::<F>(ETHERNET).as_slice());
}

/// Offset of the checksum of an IP header that is at an offset, where it has one.
pub(crate) fn ip_check<F: Hosts>(header: usize) -> Option<usize> {
    (F::FAMILY == Family::V4).then_some(header + 10)
}

/// Offset of both addresses in an IP header that is at an offset.
pub(crate) fn addrs_at<F: Hosts>(header: usize) -> usize {
    header + if F::FAMILY == Family::V4 { 12 } else { 8 }
}

/// Two addresses as they stand in a header.
pub(crate) fn pair<F: Hosts>(src: F::Addr, dst: F::Addr) -> Vec<u8> {
    let len = F::Addr::LEN;
    [&octets::<F>(src)[..len], &octets::<F>(dst)[..len]].concat()
}

/// The packet around a client's, and what a hop takes from that.
pub(crate) fn around<F: Hosts>(
    hook: Hook,
    frame: &[u8],
    packet: &Packet<F::Addr>,
    verdict: &Verdict<F::Addr>,
) -> Vec<u8> {
    let mut inner = frame.to_vec();
    set_ttl::<F>(&mut inner, packet.ttl - 1);
    let (from, to) = (octets::<F>(verdict.rewrite.src), octets::<F>(verdict.rewrite.dst));
    let len = usize::from(packet.total_len);
    let outer = surrounding(F::FAMILY, packet.tos, len, &from[..F::Addr::LEN], &to[..F::Addr::LEN]);
    // At tc the kernel addresses the frame.
    let mac = match hook {
        Hook::Xdp | Hook::XdpFrags => [verdict.hop.dmac, verdict.hop.smac].concat(),
        Hook::TcIngress | Hook::TcEgress => frame[..12].to_vec(),
    };
    [&mac[..], &frame[12..ETHERNET], &outer[..], &inner[ETHERNET..]].concat()
}

/// The IP header of a packet that holds one of so many bytes (RFC 2003, RFC 2473); of the type of service it has the code
/// point only.
pub(crate) fn surrounding(family: Family, tos: u8, len: usize, from: &[u8], to: &[u8]) -> Vec<u8> {
    let class = tos & 0xfc;
    match family {
        Family::V4 => {
            let mut ip = Ipv4Header::new(
                len as u16,
                64,
                IpNumber::IPV4,
                from.try_into().expect("an address of IPv4"),
                to.try_into().expect("an address of IPv4"),
            )
            .expect("frames are short");
            ip.dont_fragment = true;
            ip.dscp = IpDscp::try_new(class >> 2).expect("six bits");
            ip.header_checksum = ip.calc_header_checksum();
            ip.to_bytes().to_vec()
        }
        Family::V6 => Ipv6Header {
            traffic_class: class,
            flow_label: Ipv6FlowLabel::ZERO,
            payload_length: len as u16,
            next_header: IpNumber::IPV6,
            hop_limit: 64,
            source: from.try_into().expect("an address of IPv6"),
            destination: to.try_into().expect("an address of IPv6"),
        }
        .to_bytes()
        .to_vec(),
    }
}

fn answered<F: Hosts + Answer>(
    hook: Hook,
    frame: &[u8],
    packet: &Packet<F::Addr>,
    mtu: u16,
    reason: Reason,
) -> Option<Vec<u8>> {
    let l4 = usize::from(packet.l4_offset);
    let (is_too_long, has_options) =
        (matches!(reason, Reason::TunnelMtu | Reason::TunnelHops), l4 != ETHERNET + F::LEN);
    let mut head = [0; HEAD];
    let seen = frame.len().min(HEAD);
    head[..seen].copy_from_slice(&frame[..seen]);
    let finisher = match hook {
        Hook::TcIngress | Hook::TcEgress if packet.looks_offloaded() => Finisher::Device,
        // What XDP has, and of what tc has fragments, is finished.
        Hook::Xdp | Hook::XdpFrags | Hook::TcIngress | Hook::TcEgress => Finisher::Nobody,
    };
    let reach = match packet.key.proto {
        SCTP if !is_too_long => ETHERNET + F::LEN,
        TCP if !is_too_long => usize::MAX,
        _ => answer::too_big_reach::<F>(),
    };
    if packet.is_later_fragment() || l4 > reach {
        return None;
    }
    // A quote of 16 bytes behind the IP header, of a frame that is shorter than any on a wire.
    let is_long_quote = is_too_long || (packet.key.proto == UDP && has_options);
    if is_long_quote && frame.len() < ETHERNET + F::LEN + 16 {
        return None;
    }
    if is_too_long {
        let mut out = vec![0; answer::too_big_len::<F>()];
        answer::too_big::<F, _>(&head, mtu, &mut out);
        Some(out)
    } else if packet.key.proto == SCTP {
        let mut out = vec![0; sctp::abort_len::<F>()];
        let initiate = frame[sctp::abort_len::<F>()..].first_chunk().copied().unwrap_or_default();
        sctp::abort::<F, _>(&head, initiate, finisher, &mut out).then_some(out)
    } else if packet.key.proto == TCP {
        let mut out = vec![0; answer::reset_len::<F>()];
        let header: [u8; 20] = *frame[l4..].first_chunk()?;
        let is_possible = !has_options || finisher == Finisher::Nobody;
        let is_answered = answer::reset::<F, _, _>(&head, &header, packet.l4_len, finisher, &mut out);
        (is_possible && is_answered).then_some(out)
    } else if has_options {
        let mut out = vec![0; answer::too_big_len::<F>()];
        answer::unreachable_behind_options::<F, _>(&head, &mut out);
        (finisher == Finisher::Nobody).then_some(out)
    } else {
        let mut out = vec![0; answer::unreachable_len::<F>()];
        answer::unreachable::<F, _>(&head, finisher, &mut out);
        Some(out)
    }
}

fn rewritten<F: Hosts>(frame: &[u8], packet: &Packet<F::Addr>, verdict: &Verdict<F::Addr>) -> Vec<u8> {
    let (mut out, to) = (frame.to_vec(), verdict.rewrite);
    let (addrs_at, addrs) = (addrs_at::<F>(ETHERNET), pair::<F>(to.src, to.dst));
    let ip_check = ip_check::<F>(ETHERNET);
    if packet.is_later_fragment() {
        replace(&mut out, addrs_at, &addrs, ip_check.as_slice());
        return out;
    }
    let l4 = usize::from(packet.l4_offset);
    if packet.key.proto == SCTP {
        replace(&mut out, addrs_at, &addrs, ip_check.as_slice());
        let end = l4 + usize::from(packet.l4_len);
        repaired(&mut out[l4..end], &[to.sport, to.dport].concat());
        return out;
    }
    let is_udp = packet.key.proto == UDP;
    let check_at = l4 + if is_udp { UDP_CHECK } else { TCP_CHECK };
    let has_check = !is_udp || frame[check_at..check_at + 2] != [0, 0];
    let mut checks: Vec<usize> = has_check.then_some(check_at).into_iter().collect();
    replace(&mut out, l4, &[to.sport, to.dport].concat(), &checks);
    checks.extend(ip_check);
    replace(&mut out, addrs_at, &addrs, &checks);
    if is_udp && has_check && out[check_at..check_at + 2] == [0, 0] {
        out[check_at..check_at + 2].fill(0xff);
    }
    out
}

fn octets<F: Hosts>(addr: F::Addr) -> [u8; 16] {
    let wide = addr.wide().octets();
    if F::FAMILY == Family::V6 {
        return wide;
    }
    let mut octets = [0; 16];
    octets[..4].copy_from_slice(&wide[12..]);
    octets
}

/// Writes bytes and updates the checksums at these offsets by the words around them (RFC 1624, equation 3).
pub(crate) fn replace(frame: &mut [u8], at: usize, bytes: &[u8], checks: &[usize]) {
    let (from, to) = (at & !1, (at + bytes.len()).next_multiple_of(2));
    let before = words_sum(&frame[from..to]);
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    let after = words_sum(&frame[from..to]);
    for &check in checks {
        let old = u16::from_be_bytes([frame[check], frame[check + 1]]);
        let new = !words_sum(&[!old, !before, after].map(u16::to_be_bytes).concat());
        frame[check..check + 2].copy_from_slice(&new.to_be_bytes());
    }
}

/// Whether a frame holds a whole ICMP message, of either version.
pub(crate) fn is_icmp(frame: &[u8]) -> bool {
    let ip = frame.get(ETHERNET..).and_then(|ip| IpSlice::from_slice(ip).ok());
    ip.is_some_and(|ip| matches!(ip.payload().ip_number.0, 1 | 58))
}

/// Where a frame has its checksums, and which of them are right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Checked {
    /// That of the IPv4 header; right where there is none.
    pub(crate) ip: bool,
    /// That of TCP, UDP, ICMP or SCTP; right where a UDP datagram or an SCTP packet goes without, and in fragments, which
    /// have none of their own.
    pub(crate) l4: bool,
}

/// Looks at an IP packet in a frame; nothing when lengths contradict each other or the frame, or it carries something
/// else.
pub(crate) fn checked(frame: &[u8]) -> Option<Checked> {
    let ip = IpSlice::from_slice(frame.get(ETHERNET..)?).ok()?;
    let payload = ip.payload();
    let proto = payload.ip_number.0;
    let (ip_sum, addrs) = match &ip {
        IpSlice::Ipv4(v4) => {
            let header = v4.header();
            let addrs = [header.source(), header.destination()].concat();
            (words_sum(header.slice()), addrs)
        }
        IpSlice::Ipv6(v6) => {
            let header = v6.header();
            (u16::MAX, [header.source(), header.destination()].concat())
        }
    };
    if payload.fragmented {
        return Some(Checked { ip: ip_sum == u16::MAX, l4: true });
    }
    if proto == 4 || proto == 41 {
        let inner = checked(&[&frame[..ETHERNET], payload.payload].concat())?;
        return Some(Checked { ip: ip_sum == u16::MAX && inner.ip, l4: inner.l4 });
    }
    if proto == SCTP {
        let packet = payload.payload;
        let check = packet.get(8..12)?;
        return Some(Checked { ip: ip_sum == u16::MAX, l4: check == [0; 4] || check == crc32c(packet) });
    }
    let at = match proto {
        TCP => TCP_CHECK,
        UDP => UDP_CHECK,
        1 | 58 => 2,
        _ => return None,
    };
    let bytes = payload.payload;
    let check = bytes.get(at..at + 2)?;
    let has_pseudo_header = proto != 1;
    let mut sum = words_sum(bytes);
    if has_pseudo_header {
        let len = (bytes.len() as u16).to_be_bytes();
        sum = words_sum(&[&addrs[..], &len[..], &[0, proto], &sum.to_be_bytes()].concat());
    }
    let is_absent = proto == UDP && check == [0, 0];
    Some(Checked { ip: ip_sum == u16::MAX, l4: is_absent || sum == u16::MAX })
}

/// Whether two frames are the same but for the checksums of IP and these, whose zero has two forms (RFC 1071): all zeros and
/// all ones.
pub(crate) fn same(a: &[u8], b: &[u8], checks: &[usize]) -> bool {
    if a == b {
        return true;
    }
    if a.len() != b.len() {
        return false;
    }
    let ip_check = ETHERNET + 10;
    let is_v4 = a.get(12..14) == Some(&V4::ETHERTYPE.to_be_bytes()[..]);
    let inner_check = (is_v4 && a.get(ETHERNET + 9) == Some(&4)).then_some(ETHERNET + 20 + 10);
    let ip_checks = [is_v4.then_some(ip_check), inner_check];
    let mut a = a.to_vec();
    for at in ip_checks.into_iter().flatten().chain(checks.iter().copied()) {
        let pair = |frame: &[u8]| frame.get(at..at + 2).map(|pair| [pair[0], pair[1]]);
        let zeros = [Some([0, 0]), Some([0xff, 0xff])];
        if zeros.contains(&pair(&a)) && zeros.contains(&pair(b)) {
            a[at..at + 2].copy_from_slice(&b[at..at + 2]);
        }
    }
    a == b
}
