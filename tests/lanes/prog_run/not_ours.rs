//! What is not ours, or cannot be understood, comes out as it went in and counts nothing it should not.

use std::net::Ipv4Addr;

use xdp_agent_tests::lab::packets::{EXPERIMENTAL, Ends};
use xdp_common::{
    net::{TCP, UDP},
    verdict::{
        Counter::{self, Event, SnatAttempt},
        Event as E,
    },
};

use crate::{
    family::Family,
    frames::*,
    here::{answer, delivered, restored},
    node::*,
};

const MALFORMED: &[Counter] = &[Event(E::Malformed)];
const UNCLAIMED: &[Counter] = &[Event(E::Unclaimed)];
/// Offset of the IPv4 header's fields in a frame (RFC 791).
const VERSION_IHL: usize = ETHERNET;
const TOTAL_LEN: usize = ETHERNET + 2;
pub(crate) const FRAGMENT_FIELD: usize = ETHERNET + 6;
const IP_CHECK: usize = ETHERNET + 10;

/// A frame, with what it counts at every hook and what at XDP alone.
type Stranger = (&'static str, Vec<u8>, &'static [Counter], &'static [Counter]);

/// A node with a backend here and one elsewhere behind each frontend.
fn busy(node: &mut Node) {
    for proto in [TCP, UDP] {
        let ids = [node.backend(LOCAL, proto, true), node.backend(REMOTE, proto, false)];
        node.frontend(VIP, proto, &ids, 0);
    }
}

fn untouched(node: &Node, strangers: &[Stranger]) {
    for (name, frame, everywhere, at_xdp) in strangers {
        let both = [*everywhere, *at_xdp].concat();
        for (hook, counts) in
            [(node.entry, &both[..]), (Hook::TcIngress, *everywhere), (Hook::TcEgress, *everywhere)]
        {
            node.check(name, hook, frame, Action::Pass, frame, counts);
        }
    }
    assert_eq!(node.maps.established_entries(), 0);
}

/// A frame with other bytes at an offset, and the checksum of an IPv4 header made right again.
fn patched(frame: &Frame, at: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = frame.bytes();
    bytes[at..at + value.len()].copy_from_slice(value);
    if frame.family == Family::V4 {
        bytes[IP_CHECK..IP_CHECK + 2].fill(0);
        let check = !words_sum(&bytes[ETHERNET..ETHERNET + 20]);
        bytes[IP_CHECK..IP_CHECK + 2].copy_from_slice(&check.to_be_bytes());
    }
    bytes
}

#[test]
fn what_is_addressed_to_nobodys_service_is_not_touched() {
    Node::each(|node| {
        busy(node);
        let ends = Ends { mac: (GATEWAY_MAC, node.mac), ip: (Ipv4Addr::from(CLIENT), Ipv4Addr::from(NODE)) };
        let to_vip = Ends { ip: (ends.ip.0, Ipv4Addr::from(VIP)), ..ends };
        let from = |proto, port: u16, dst| node.opener(proto, port, VIP).with(|frame| frame.dst = dst);
        let ssh = from(TCP, 50_000, (NODE, 22));
        let of_no_flow = from(TCP, 50_000, (NODE, 8080)).flags(ACK).payload(b"x");
        let strangers = [
            ("SSH to the node", ssh.bytes(), &[][..], &[][..]),
            ("SSH data", ssh.flags(ACK).payload(b"SSH-2.0-anything").bytes(), &[], &[]),
            ("DNS to the node", from(UDP, 50_000, (NODE, 53)).payload(b"question").bytes(), &[], &[]),
            ("another port of a frontend", from(TCP, 40_000, (VIP, 8080)).bytes(), &[], &[]),
            ("a port of the SNAT range that no flow has", of_no_flow.bytes(), &[], UNCLAIMED),
            ("ping of the node", ends.ping(1, 2, b"payload"), &[], &[]),
            ("ping of a frontend", to_vip.ping(1, 2, b"payload"), &[], &[]),
            ("SCTP to a frontend", to_vip.other_protocol(132, &[0; 32]), &[], &[]),
            ("ARP", ends.arp_request(), &[], &[]),
            ("IPv6 between other hosts", ends.ipv6_udp((50_000, 80), b"hello"), &[], &[]),
            ("an unknown EtherType", ends.ethertype(EXPERIMENTAL, &[7; 64]), &[], &[]),
        ];
        untouched(node, &strangers);
        // The same address and port, but in the other family.
        let other = match node.family {
            Family::V4 => Family::V6,
            Family::V6 => Family::V4,
        };
        for proto in [TCP, UDP] {
            let stranger = node.opener(proto, 40_000, VIP).with(|frame| frame.family = other).bytes();
            untouched(node, &[("the other family", stranger, &[], &[])]);
        }
    });
}

#[test]
fn tagged_frames_are_not_touched() {
    Node::each(|node| {
        busy(node);
        let tagged = |tags: &[u8]| {
            let mut frame = node.opener(TCP, 40_000, VIP).bytes();
            frame.splice(12..12, tags.iter().copied());
            frame
        };
        untouched(
            node,
            &[
                ("one tag", tagged(&[0x81, 0, 0, 5]), &[], &[]),
                ("two tags", tagged(&[0x88, 0xa8, 0, 9, 0x81, 0, 0, 5]), &[], &[]),
            ],
        );
    });
}

#[test]
fn frames_for_another_station_and_from_impossible_sources_are_not_touched() {
    Node::each(|node| {
        busy(node);
        for proto in [TCP, UDP] {
            let opener = node.opener(proto, 40_000, VIP);
            let elsewhere = opener.with(|frame| frame.mac.1 = [2, 9, 9, 9, 9, 9]);
            let everybody = opener.with(|frame| frame.mac.1 = [0xff; 6]);
            let from = |addr| opener.with(|frame| frame.src.0 = addr).bytes();
            untouched(
                node,
                &[
                    ("another station", elsewhere.bytes(), &[], &[]),
                    ("broadcast", everybody.bytes(), &[], &[]),
                    ("from the unspecified address", from([0, 0, 0, 0]), &[], &[]),
                    ("from loopback", from([127, 0, 0, 1]), &[], &[]),
                    ("from a multicast group", from([224, 0, 0, 5]), &[], &[]),
                    ("from broadcast", from([255, 255, 255, 255]), &[], &[]),
                ],
            );
        }
    });
}

#[test]
fn frames_of_flows_for_another_station_are_not_touched() {
    Node::each(|node| {
        let stray = |node: &Node, name: &str, frame: &Frame| {
            // From another in its first bytes, or its last.
            for station in [[6, 0, 0, 0, 0, 9], node.mac.map(|byte| byte ^ 1)] {
                let bytes = frame.with(|frame| frame.mac.1 = station).bytes();
                node.check(name, node.entry, &bytes, Action::Pass, &bytes, &[]);
            }
        };
        for proto in [TCP, UDP] {
            let here = [node.backend(LOCAL, proto, true)];
            let elsewhere = [node.backend(REMOTE, proto, false)];
            node.frontend(VIP, proto, &here, 0);
            node.frontend(VIP_TOO, proto, &elsewhere, 0);

            let opener = node.opener(proto, 40_000, VIP);
            let data = opener.flags(ACK).payload(b"request");
            delivered(node, "the opener", &opener, 40_000, &[Event(E::FlowNew), SnatAttempt(0)]);
            stray(node, "a new flow to here", &data);
            let answer = answer(node, &opener, 40_000).flags(SYN | ACK);
            restored(node, "the answer", &opener, &answer);
            delivered(node, "the handshake's end", &opener.flags(ACK), 40_000, &[Event(E::FlowEstablished)]);
            stray(node, "a flow to here", &data);
            delivered(node, "a packet for this one", &data, 40_000, &[]);

            let flow = node.open("a flow", &node.opener(proto, 40_000, VIP_TOO), REMOTE);
            stray(node, "an answer to a new flow", &flow.answer(node).flags(SYN | ACK));
            flow.answers(node, "the answer", SYN | ACK, &[]);
            stray(node, "a new flow to elsewhere", &flow.opener.flags(ACK));
            flow.sends(node, "the handshake's end", ACK, &[Event(E::FlowEstablished)]);
            for _ in 0..2 {
                stray(node, "a flow to elsewhere", &flow.opener.flags(ACK).payload(b"request"));
                stray(node, "an answer from elsewhere", &flow.answer(node).flags(ACK).payload(b"response"));
                flow.sends(node, "a packet for this one", ACK, &[]);
                flow.answers(node, "an answer for this one", ACK, &[]);
            }
        }
    });
}

#[test]
fn headers_that_contradict_themselves_or_their_frame_are_not_touched() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        busy(node);
        for proto in [TCP, UDP] {
            let opener = node.opener(proto, 40_000, VIP).payload(b"some payload of the packet");
            let total = (opener.bytes().len() - ETHERNET) as u16;
            let header_only = 20u16 + if proto == TCP { 20 } else { 8 };
            let version = |value: u8| patched(&opener, VERSION_IHL, &[value]);
            let length = |value: u16| patched(&opener, TOTAL_LEN, &value.to_be_bytes());
            untouched(
                node,
                &[
                    ("a header length of 4 words", version(0x44), MALFORMED, &[]),
                    ("a header length of 0", version(0x40), MALFORMED, &[]),
                    ("a header longer than the packet", version(0x4f), MALFORMED, &[]),
                    ("version 5", version(0x55), MALFORMED, &[]),
                    ("version 6 under the EtherType of IPv4", version(0x65), MALFORMED, &[]),
                    ("a packet longer than its frame", length(total + 1), MALFORMED, &[]),
                    ("the longest packet", length(u16::MAX), MALFORMED, &[]),
                    ("a packet shorter than its headers", length(header_only - 1), MALFORMED, &[]),
                    ("a packet shorter than its IP header", length(19), MALFORMED, &[]),
                    ("a packet of no length", length(0), MALFORMED, &[]),
                ],
            );
        }
    });
}

#[test]
fn fragments_to_nobodys_address_are_not_touched() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        busy(node);
        for proto in [TCP, UDP] {
            let opener = node.opener(proto, 40_000, [203, 0, 113, 99]).payload(&[1; 64]);
            let fragment = |field: u16| patched(&opener, FRAGMENT_FIELD, &field.to_be_bytes());
            untouched(
                node,
                &[
                    ("a first fragment", fragment(0x2000), &[], &[]),
                    ("a middle fragment", fragment(0x2010), &[], &[]),
                    ("a last fragment", fragment(0x0010), &[], &[]),
                    ("the last fragment of the longest packet", fragment(0x1fff), &[], &[]),
                ],
            );
        }
    });
}

#[test]
fn runts_of_every_length_are_not_touched() {
    Node::each(|node| {
        busy(node);
        let hooks = [node.entry, Hook::TcIngress, Hook::TcEgress];
        for proto in [TCP, UDP] {
            let whole = node.opener(proto, 40_000, VIP).bytes();
            for len in 0..whole.len() {
                for hook in hooks {
                    match node.try_run(hook, &whole[..len]) {
                        Ok(outcome) => {
                            let name = format!("protocol {proto} cut to {len} bytes, at {hook:?}");
                            outcome.check(&name, Action::Pass, &whole[..len], MALFORMED);
                        }
                        Err(error) => {
                            let shortest = if hook == node.entry { ETHERNET } else { node.skb_min() };
                            assert!(len < shortest, "{len} bytes at {hook:?}: {error}");
                        }
                    }
                }
            }
        }
        for len in ETHERNET..=60 {
            for hook in hooks {
                let zeros = vec![0; len];
                node.check(&format!("{len} zeros"), hook, &zeros, Action::Pass, &zeros, &[]);
            }
        }
    });
}
