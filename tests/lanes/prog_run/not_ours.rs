//! What is not ours, or cannot be understood, comes out as it went in and counts nothing it should not.

use std::net::Ipv4Addr;

use xdp_agent_tests::lab::packets::{EXPERIMENTAL, Ends};
use xdp_common::{
    net::{TCP, UDP},
    verdict::{
        Counter::{self, Event},
        Event as E,
    },
};

use crate::{frames::*, node::*};

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

/// A frame with other bytes at an offset, and the IPv4 header checksum made right again.
fn patched(frame: &Frame, at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut frame = frame.bytes();
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame[IP_CHECK..IP_CHECK + 2].fill(0);
    let words = frame[ETHERNET..ETHERNET + 20].chunks(2);
    let check = !folded(words.map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum());
    frame[IP_CHECK..IP_CHECK + 2].copy_from_slice(&check.to_be_bytes());
    frame
}

#[test]
fn what_is_addressed_to_nobodys_service_is_not_touched() {
    Node::each(|node| {
        busy(node);
        let ends = Ends { mac: (GATEWAY_MAC, node.mac), ip: (Ipv4Addr::from(CLIENT), Ipv4Addr::from(NODE)) };
        let to_vip = Ends { ip: (ends.ip.0, Ipv4Addr::from(VIP)), ..ends };
        let vip_8080 = node.opener(TCP, 40_000, VIP).with(|frame| frame.dst.1 = 8080);
        untouched(
            node,
            &[
                ("SSH to the node", ends.tcp((50_000, 22), 0, b""), &[], &[]),
                ("SSH data", ends.tcp((50_000, 22), 7, b"SSH-2.0-anything"), &[], &[]),
                ("DNS to the node", ends.udp((50_000, 53), b"question"), &[], &[]),
                ("ping of the node", ends.ping(1, 2, b"payload"), &[], &[]),
                ("ping of a frontend", to_vip.ping(1, 2, b"payload"), &[], &[]),
                ("SCTP to a frontend", to_vip.other_protocol(132, &[0; 32]), &[], &[]),
                ("ARP", ends.arp_request(), &[], &[]),
                ("IPv6", ends.ipv6_udp((50_000, 80), b"hello"), &[], &[]),
                ("an unknown EtherType", ends.ethertype(EXPERIMENTAL, &[7; 64]), &[], &[]),
                ("another port of a frontend", vip_8080.bytes(), &[], &[]),
                (
                    "a port of the SNAT range that no flow has",
                    ends.tcp((50_000, 8080), 7, b"x"),
                    &[],
                    UNCLAIMED,
                ),
            ],
        );
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
fn headers_that_contradict_themselves_or_their_frame_are_not_touched() {
    Node::each(|node| {
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
    Node::each(|node| {
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
                            let shortest = if hook == node.entry { ETHERNET } else { SKB_MIN };
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
