//! Refusals that tell their sender: resets and ICMP errors, byte for byte.

use std::net::IpAddr;

use etherparse::{
    Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpNumber, Ipv4Header, Ipv6Header, TcpHeader,
    icmpv4::{self, DestUnreachableHeader},
    icmpv6,
};
use xdp_common::{
    frame::{TCP_CHECK, UDP_CHECK},
    net::{SCTP, TCP, UDP},
    tables::{ANSWERS_PER_PERIOD_MAX, Device, frontend, network},
    verdict::{
        Counter::{Drop, Event},
        Event as E, Reason,
    },
};

use crate::{family::Family, frames::*, node::*, sctp};

/// Sequence number of every frame that the builders make.
const SEQUENCE: u32 = 0x0102_0304;

/// Protocols that no service has (IANA protocol numbers), and those that hold a packet.
const GRE: u8 = 47;
const ESP: u8 = 50;
const IP_IN_IP: u8 = 4;
const IPV6_IN_IP: u8 = 41;
/// Time to live of answers.
const TTL: u8 = 64;
/// Length of what precedes the quote of an ICMP error.
const ICMP: usize = 8;

/// A frame back to the client, with a header and payload of its own.
pub(crate) fn back(node: &Node, vip: Addr, proto: IpNumber, rest: &[u8]) -> Vec<u8> {
    let (ethertype, ip) = match (node.family.ip(vip), node.family.ip(CLIENT)) {
        (IpAddr::V6(vip), IpAddr::V6(client)) => {
            let ip = Ipv6Header {
                payload_length: rest.len() as u16,
                next_header: proto,
                hop_limit: TTL,
                source: vip.octets(),
                destination: client.octets(),
                ..Ipv6Header::default()
            };
            ([0x86, 0xdd], ip.to_bytes().to_vec())
        }
        _ => {
            let mut ip =
                Ipv4Header::new(rest.len() as u16, TTL, proto, vip, CLIENT).expect("frames are short");
            ip.dont_fragment = true;
            ip.header_checksum = ip.calc_header_checksum();
            ([0x08, 0x00], ip.to_bytes().to_vec())
        }
    };
    [&GATEWAY_MAC[..], &node.mac[..], &ethertype[..], &ip[..], rest].concat()
}

/// The reset for a segment without payload.
pub(crate) fn reset(node: &Node, sent: &Frame) -> Vec<u8> {
    let mut tcp = TcpHeader::new(sent.dst.1, sent.src.1, 0, 0);
    tcp.rst = true;
    if sent.flags & ACK == 0 {
        tcp.ack = true;
        tcp.acknowledgment_number = SEQUENCE + u32::from(sent.flags & SYN != 0) + sent.payload.len() as u32;
    }
    let checksum = match (node.family.ip(sent.dst.0), node.family.ip(CLIENT)) {
        (IpAddr::V6(vip), IpAddr::V6(client)) => {
            tcp.calc_checksum_ipv6_raw(vip.octets(), client.octets(), &[])
        }
        _ => tcp.calc_checksum_ipv4_raw(sent.dst.0, CLIENT, &[]),
    };
    tcp.checksum = checksum.expect("frames are short");
    back(node, sent.dst.0, IpNumber::TCP, &tcp.to_bytes())
}

/// The ICMP error for a datagram.
fn unreachable(node: &Node, sent: &Frame) -> Vec<u8> {
    let kind = Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port);
    let quoted = if sent.options.is_empty() { 8 } else { 16 };
    error(node, sent, kind, Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port), quoted)
}

/// The ICMP error for a packet that is longer than so many bytes.
pub(crate) fn too_big(node: &Node, sent: &Frame, mtu: u16) -> Vec<u8> {
    let next_hop_mtu = mtu;
    let kind =
        Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded { next_hop_mtu });
    error(node, sent, kind, Icmpv6Type::PacketTooBig { mtu: mtu.into() }, 16)
}

/// The ICMP error for a packet that has no hops left.
pub(crate) fn too_far(node: &Node, sent: &Frame) -> Vec<u8> {
    let kind = Icmpv4Type::TimeExceeded(icmpv4::TimeExceededCode::TtlExceededInTransit);
    error(node, sent, kind, Icmpv6Type::TimeExceeded(icmpv6::TimeExceededCode::HopLimitExceeded), 16)
}

/// The ICMP error for a packet whose host cannot be reached.
pub(crate) fn no_host(node: &Node, sent: &Frame) -> Vec<u8> {
    let kind = Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Host);
    let code = icmpv6::DestUnreachableCode::Address;
    error(node, sent, kind, Icmpv6Type::DestinationUnreachable(code), 16)
}

/// An ICMP error that quotes so many bytes behind the IP header.
fn error(node: &Node, sent: &Frame, kind_v4: Icmpv4Type, kind_v6: Icmpv6Type, quoted: usize) -> Vec<u8> {
    let quote = &sent.bytes()[ETHERNET..][..node.family.header_len() + quoted];
    let (proto, header) = match (node.family.ip(sent.dst.0), node.family.ip(CLIENT)) {
        (IpAddr::V6(vip), IpAddr::V6(client)) => {
            let icmp = Icmpv6Header::with_checksum(kind_v6, vip.octets(), client.octets(), quote);
            (IpNumber::IPV6_ICMP, icmp.expect("quotes are short").to_bytes().to_vec())
        }
        _ => (IpNumber::ICMP, Icmpv4Header::with_checksum(kind_v4, quote).to_bytes().to_vec()),
    };
    back(node, sent.dst.0, proto, &[&header[..], quote].concat())
}

fn answer_to(node: &Node, sent: &Frame) -> Vec<u8> {
    match sent.proto {
        TCP => reset(node, sent),
        SCTP => back(node, sent.dst.0, IpNumber::SCTP, &sctp::abort(sent)),
        _ => unreachable(node, sent),
    }
}

/// Checks that XDP refuses a frame with the right answer.
fn refuses(node: &Node, name: &str, sent: &Frame, reason: Reason) {
    let counts = [Drop(reason), Event(E::Answered)];
    let expected = answer_to(node, sent);
    node.check(name, node.entry, &sent.bytes(), Action::Transmit, &expected, &counts);
}

#[test]
fn a_service_without_endpoints_refuses_at_once() {
    Node::each(|node| {
        for proto in [TCP, UDP, SCTP] {
            node.frontend(VIP, proto, &[], 0);
            let opener = node.opener(proto, 40_000, VIP);
            let forms: [Form; 4] = [
                ("plain", &|_| {}),
                ("a payload", &|frame| frame.payload = b"early data".to_vec()),
                ("padding", &|frame| frame.padding = vec![0xee; 6]),
                ("a long frame", &|frame| frame.payload = vec![7; 1_400]),
            ];
            for (name, form) in forms {
                refuses(node, name, &opener.with(form), Reason::NoEndpoint);
            }
        }
        for (proto, flags) in [(TCP, ACK), (TCP, SYN | ACK), (TCP, FIN | ACK), (SCTP, ACK), (SCTP, FIN | ACK)]
        {
            let segment = node.opener(proto, 40_000, VIP).flags(flags);
            refuses(node, "an acknowledgement", &segment, Reason::NoEndpoint);
        }
    });
}

#[test]
fn options_and_extension_headers_do_not_keep_a_refusal_from_its_sender() {
    Node::each(|node| {
        for proto in [TCP, UDP] {
            node.frontend(VIP, proto, &[], 0);
            let opener = node
                .opener(proto, 40_000, VIP)
                .with(|frame| (frame.options, frame.payload) = (vec![1; 4], vec![7; 4]));
            refuses(node, "options", &opener, Reason::NoEndpoint);
            refuses(node, "more", &opener.with(|frame| frame.payload = vec![7; 100]), Reason::NoEndpoint);
        }
        let segment = node.opener(TCP, 40_000, VIP).with(|frame| frame.options = vec![1; 24]);
        refuses(node, "a reset quotes nothing", &segment, Reason::NoEndpoint);
    });
}

#[test]
fn resets_long_options_and_a_device_that_cannot_transmit_get_no_answer() {
    Node::each(|node| {
        node.frontend(VIP, TCP, &[], 0);
        node.frontend(VIP, UDP, &[], 0);
        node.frontend(VIP, SCTP, &[], 0);
        let counts = [Drop(Reason::NoEndpoint), Event(E::Unanswered)];
        for proto in [TCP, SCTP] {
            let reset = node.opener(proto, 40_000, VIP).flags(RST).bytes();
            node.check("a reset", node.entry, &reset, Action::Drop, &reset, &counts);
        }
        for (proto, length) in [(UDP, 16), (SCTP, 8)] {
            let optional =
                node.opener(proto, 40_000, VIP).with(|frame| frame.options = vec![1; length]).bytes();
            node.check("options", node.entry, &optional, Action::Drop, &optional, &counts);
        }
        for proto in [TCP, UDP] {
            // The device would sum up what is behind them, and not the answer.
            let optional = node.opener(proto, 40_000, VIP).with(|frame| frame.options = vec![1; 4]);
            let optional = optional.looking_offloaded().bytes();
            node.check("options at tc", Hook::TcIngress, &optional, Action::Drop, &optional, &counts);
        }
        node.device(node.ifindex, Device { snat: NODE, flags: 0, mtu: 1500, mac: node.mac, zero: [0; 2] });
        let plain = node.opener(TCP, 40_000, VIP).bytes();
        node.check("no way", node.entry, &plain, Action::Drop, &plain, &[Drop(Reason::NoEndpoint)]);
    });
}

#[test]
fn tc_answers_frames_whose_checksum_is_left_to_the_device_in_kind() {
    Node::each(|node| {
        for proto in [TCP, UDP] {
            node.frontend(VIP, proto, &[], 0);
            let sent = node.opener(proto, 40_000, VIP).looking_offloaded();
            let mut expected = answer_to(node, &sent);
            // What the device is to add is not there yet: what it starts from is, where the packet had its checksum. ICMP
            // has its own elsewhere, and the sum comes out right all the same.
            let l4 = ETHERNET + node.family.header_len();
            if proto == TCP {
                let header = node.frame(TCP, (node.mac, GATEWAY_MAC), sent.dst, sent.src);
                expected[l4 + TCP_CHECK..][..2].copy_from_slice(&header.pseudo_sum().to_be_bytes());
            } else {
                expected[l4 + 2..][..2].fill(0);
                let start = match node.family {
                    Family::V4 => 0,
                    Family::V6 => {
                        let addrs = [sent.src.0, sent.dst.0].map(|name| node.family.octets(name)).concat();
                        let len = (ICMP + node.family.header_len() + 8) as u16;
                        let rest = [0, IpNumber::IPV6_ICMP.0];
                        words_sum(&[&addrs[..], &len.to_be_bytes()[..], &rest[..]].concat())
                    }
                };
                expected[l4 + UDP_CHECK..][..2].copy_from_slice(&start.to_be_bytes());
            }
            let counts = [Drop(Reason::NoEndpoint), Event(E::Answered)];
            let hook = Hook::TcIngress;
            node.check("at tc", hook, &sent.bytes(), Action::Redirect, &expected, &counts);
        }
    });
}

#[test]
fn other_ports_of_a_cluster_ip_are_refused_and_free_addresses_of_a_service_network_drop() {
    Node::each(|node| {
        node.frontend(VIP, TCP, &[], 0);
        node.maps.service_address(VIP, frontend::ADDRESS);
        node.maps.service_network(VIP);
        node.maps.network(network::SERVICES, VIP, 24, 1);
        let own = [VIP[0], VIP[1], VIP[2], 99];
        node.maps.network(network::SERVICES, own, 32, 0);
        for proto in [TCP, UDP] {
            let to = |addr, port| node.opener(proto, 40_000, VIP).with(|frame| frame.dst = (addr, port));
            refuses(node, "another port", &to(VIP, 81), Reason::UnknownPort);
            let free = to(VIP_TOO, 81).bytes();
            let dropped = [Drop(Reason::UnknownServiceAddress)];
            node.check("a free address", node.entry, &free, Action::Drop, &free, &dropped);
            let own = to(own, 81).bytes();
            node.check("the node's own", node.entry, &own, Action::Pass, &own, &[Event(E::Unclaimed)]);
            let beyond = to([VIP[0], VIP[1], VIP[2] + 1, 1], 81).bytes();
            let unclaimed = [Event(E::Unclaimed)];
            node.check("beyond the network", node.entry, &beyond, Action::Pass, &beyond, &unclaimed);
            let far = to([VIP[0], VIP[1] + 1, 0, 1], 81).bytes();
            node.check("another network", node.entry, &far, Action::Pass, &far, &[]);
        }
    });
}

#[test]
fn protocols_without_services_are_kept_from_their_addresses_and_from_free_ones() {
    Node::each(|node| {
        if node.entry == Hook::TcIngress {
            return;
        }
        node.maps.service_address(VIP, frontend::ADDRESS);
        node.maps.service_network(VIP);
        node.maps.network(network::SERVICES, VIP, 24, 1);
        let own = [VIP[0], VIP[1], VIP[2], 99];
        node.maps.network(network::SERVICES, own, 32, 0);
        let external = [VIP[0], VIP[1], VIP[2], 98];
        node.maps.service_address(external, frontend::ECHO);
        let of = |node: &Node, proto: u8, to| {
            let mut bytes = node.opener(UDP, 40_000, VIP).with(|frame| frame.dst = (to, 80)).bytes();
            bytes[if node.family == Family::V4 { 23 } else { 20 }] = proto;
            bytes
        };
        for proto in [GRE, ESP] {
            for (to, reason) in [(VIP, Reason::UnknownPort), (VIP_TOO, Reason::UnknownServiceAddress)] {
                let frame = of(node, proto, to);
                node.check("kept away", node.entry, &frame, Action::Drop, &frame, &[Drop(reason)]);
                let mut other = frame;
                other[5] ^= 1;
                node.check("another station's", node.entry, &other, Action::Pass, &other, &[]);
            }
            for to in [own, external, NODE, [VIP[0], VIP[1] + 1, 0, 1]] {
                let frame = of(node, proto, to);
                node.check("not ours", node.entry, &frame, Action::Pass, &frame, &[]);
            }
        }
        // What may hold TCP, UDP or SCTP farther behind.
        for proto in [IP_IN_IP, IPV6_IN_IP] {
            let frame = of(node, proto, VIP_TOO);
            node.check("in a tunnel", node.entry, &frame, Action::Pass, &frame, &[]);
        }
    });
}

#[test]
fn answers_are_limited_and_refusals_are_not() {
    for family in Family::ALL {
        limited(&mut Node::new(family, Hook::Xdp, Sizes::default()));
    }
}

fn limited(node: &mut Node) {
    node.frontend(VIP, TCP, &[], 0);
    let frame = node.opener(TCP, 40_000, VIP).bytes();
    let mut outcomes = (0u32, 0u32);
    for _ in 0..4 * ANSWERS_PER_PERIOD_MAX {
        match node.run(node.entry, &frame).action {
            Action::Transmit => outcomes.0 += 1,
            Action::Drop => outcomes.1 += 1,
            other @ (Action::Pass | Action::Redirect) => panic!("{other:?}"),
        }
    }
    // Test runs may move between processors and periods, each of which has an allowance.
    assert!(outcomes.0 >= ANSWERS_PER_PERIOD_MAX, "{outcomes:?}");
    let counts = node.maps.counts();
    let count = |counter: xdp_common::verdict::Counter| counts[counter.index() as usize];
    assert_eq!(count(Drop(Reason::NoEndpoint)), u64::from(4 * ANSWERS_PER_PERIOD_MAX));
    assert_eq!(
        (count(Event(E::Answered)), count(Event(E::Unanswered))),
        (outcomes.0.into(), outcomes.1.into())
    );
}
