//! Extension headers of IPv6: what is walked, what is left to the kernel, and what contradicts itself.

use xdp_common::{
    net::{SCTP, TCP, UDP},
    verdict::{
        Counter::{self, Event},
        Event as E,
    },
};

use crate::{family::Family, forwarding::one_remote, frames::*, node::*};

/// Numbers of extension headers (RFC 8200, RFC 4302).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const NO_NEXT: u8 = 59;
const DESTINATION: u8 = 60;
/// Offset of the IPv6 header's fields in a frame.
const PAYLOAD_LEN: usize = ETHERNET + 4;

type Chain = Vec<(u8, Vec<u8>)>;

/// A header of so many units of eight bytes beyond the first, which hold padding alone.
fn padded(number: u8, units: u8) -> (u8, Vec<u8>) {
    let mut body = vec![0; 7 + 8 * usize::from(units)];
    body[0] = units;
    (number, body)
}

/// A fragment header with this offset and flag field.
fn fragment(field: u16) -> (u8, Vec<u8>) {
    let [high, low] = field.to_be_bytes();
    (FRAGMENT, vec![0, high, low, 0, 0, 0, 9])
}

fn each(test: impl Fn(&mut Node)) {
    Node::each_of(Family::V6, Sizes::default(), test);
}

#[test]
fn packets_behind_extension_headers_are_translated_and_the_headers_kept() {
    each(|node| {
        one_remote(node);
        let chains: [(&str, Chain); 6] = [
            ("hop-by-hop options", vec![padded(HOP_BY_HOP, 0)]),
            ("destination options", vec![padded(DESTINATION, 0)]),
            ("both", vec![padded(HOP_BY_HOP, 0), padded(DESTINATION, 1)]),
            ("a fragment that is the whole packet", vec![fragment(0)]),
            ("as long as may be", vec![padded(DESTINATION, 7)]),
            ("as many as may be", (0..4).map(|_| padded(DESTINATION, 1)).collect()),
        ];
        for proto in [TCP, UDP] {
            let flow = node.connect("a flow", &node.opener(proto, 40_000, VIP), REMOTE);
            for (at, (name, chain)) in chains.iter().enumerate() {
                let name = format!("protocol {proto}, {name}");
                let long = |frame: &Frame| {
                    frame.flags(ACK).payload(b"odd").with(|frame| frame.extensions = chain.clone())
                };
                flow.forwards(node, &name, &long(&flow.opener), &[]);
                flow.returns(node, &name, &long(&flow.answer(node)), &[]);
                let opener = node.opener(proto, 41_000 + at as u16, VIP);
                node.open(&name, &opener.with(|frame| frame.extensions = chain.clone()), REMOTE);
            }
        }
    });
}

#[test]
fn packets_behind_other_extension_headers_are_not_touched() {
    each(|node| {
        one_remote(node);
        let others: [(&str, Chain, &[Counter]); 10] = [
            (
                "hop-by-hop options that do not come first",
                vec![padded(DESTINATION, 0), padded(HOP_BY_HOP, 0)],
                &[],
            ),
            ("a routing header", vec![padded(ROUTING, 0)], &[]),
            ("an authentication header", vec![padded(AUTHENTICATION, 2)], &[]),
            ("nothing behind them", vec![(NO_NEXT, Vec::new())], &[]),
            ("longer than is walked", vec![padded(DESTINATION, 8)], &[]),
            ("more than are walked", (0..5).map(|_| padded(DESTINATION, 0)).collect(), &[]),
            (
                "one that reaches beyond the frame",
                vec![(DESTINATION, [&[6][..], &[0; 6]].concat())],
                &[Event(E::Malformed)],
            ),
            ("a first fragment", vec![fragment(1)], &[]),
            ("a last fragment", vec![fragment(0x10)], &[]),
            ("a fragment behind options", vec![padded(HOP_BY_HOP, 0), fragment(9)], &[]),
        ];
        for proto in [TCP, UDP] {
            let flow = node.connect("a flow", &node.opener(proto, 40_000, VIP), REMOTE);
            for (name, chain, counts) in &others {
                for frame in [&flow.opener, &flow.answer(node)] {
                    let frame = frame.flags(ACK).with(|frame| frame.extensions = chain.clone()).bytes();
                    // What tc does with fragments is another story.
                    let hooks = if name.contains("fragment") {
                        &[node.entry][..]
                    } else {
                        &[node.entry, Hook::TcIngress, Hook::TcEgress]
                    };
                    for &hook in hooks {
                        let name = format!("protocol {proto}, {name}");
                        node.check(&name, hook, &frame, Action::Pass, &frame, counts);
                    }
                }
            }
        }
    });
}

#[test]
fn hop_by_hop_options_come_first_before_sctp_too() {
    each(|node| {
        one_remote(node);
        let flow = node.connect("a flow", &node.opener(SCTP, 40_000, VIP), REMOTE);
        let twice = vec![padded(HOP_BY_HOP, 1), padded(HOP_BY_HOP, 1)];
        for chain in [twice, vec![padded(DESTINATION, 0), padded(HOP_BY_HOP, 0)]] {
            let frame = flow.opener.flags(ACK).with(|frame| frame.extensions = chain.clone()).bytes();
            node.check("out of order", node.entry, &frame, Action::Pass, &frame, &[]);
        }
        let first = flow.opener.flags(ACK).with(|frame| frame.extensions = vec![padded(HOP_BY_HOP, 1)]);
        flow.forwards(node, "in order", &first, &[]);
    });
}

#[test]
fn ipv6_headers_that_contradict_themselves_or_their_frame_are_not_touched() {
    each(|node| {
        one_remote(node);
        for proto in [TCP, UDP] {
            let opener = node.opener(proto, 40_000, VIP).payload(b"some payload of the packet");
            let len = (opener.bytes().len() - ETHERNET - 40) as u16;
            let least = l4_header_len(proto) as u16;
            let with = |at: usize, value: &[u8]| {
                let mut bytes = opener.bytes();
                bytes[at..at + value.len()].copy_from_slice(value);
                bytes
            };
            let length = |value: u16| with(PAYLOAD_LEN, &value.to_be_bytes());
            let malformed: &[Counter] = &[Event(E::Malformed)];
            for (name, frame, counts) in [
                ("version 4 under the EtherType of IPv6", with(ETHERNET, &[0x45]), malformed),
                ("version 0", with(ETHERNET, &[0x00]), malformed),
                ("a packet longer than its frame", length(len + 1), malformed),
                ("the longest packet", length(u16::MAX), malformed),
                ("a packet shorter than its headers", length(least - 1), malformed),
                ("a packet of one byte", length(1), malformed),
                ("a jumbogram", length(0), &[]),
            ] {
                let name = format!("protocol {proto}, {name}");
                for hook in [node.entry, Hook::TcIngress, Hook::TcEgress] {
                    node.check(&name, hook, &frame, Action::Pass, &frame, counts);
                }
            }
        }
    });
}
