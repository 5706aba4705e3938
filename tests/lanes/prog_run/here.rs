//! Flows to backends on this node: the client's address survives, and egress restores the answer.

use xdp_common::{
    net::{SCTP, TCP, UDP},
    verdict::{
        Counter::{self, Event, SnatAttempt},
        Event as E,
    },
};

use crate::{frames::*, node::*};

pub(crate) fn one_local(node: &mut Node) {
    for proto in [TCP, UDP, SCTP] {
        let id = node.backend(LOCAL, proto, true);
        node.frontend(VIP, proto, &[id], 0);
        node.frontend(VIP_TOO, proto, &[id], 0);
    }
}

/// Checks a packet of the client: the backend sees it from this port.
pub(crate) fn delivered(node: &Node, name: &str, sent: &Frame, port: u16, counts: &[Counter]) {
    let expected = sent.with(|frame| {
        frame.src.1 = port;
        frame.dst = (LOCAL, TARGET);
    });
    let counts = [counts, &[Event(E::Delivered)]].concat();
    node.check(name, node.entry, &sent.bytes(), Action::Pass, &expected.bytes(), &counts);
}

/// What the backend answers, on its way out of the uplink.
pub(crate) fn answer(node: &Node, opener: &Frame, port: u16) -> Frame {
    opener.with(|frame| {
        frame.mac = (node.mac, GATEWAY_MAC);
        frame.src = (LOCAL, TARGET);
        frame.dst = (opener.src.0, port);
        frame.ttl = 63;
    })
}

/// Checks a packet of the backend at egress.
pub(crate) fn restored(node: &Node, name: &str, opener: &Frame, sent: &Frame) {
    let expected = sent.with(|frame| (frame.src, frame.dst) = (opener.dst, opener.src));
    node.check(name, Hook::TcEgress, &sent.bytes(), Action::Pass, &expected.bytes(), &[Event(E::Restored)]);
}

#[test]
fn a_backend_on_this_node_sees_the_client_and_the_client_sees_the_frontend() {
    Node::each(|node| {
        one_local(node);
        for proto in [TCP, UDP, SCTP] {
            let opener = node.opener(proto, 40_000, VIP);
            let reply = answer(node, &opener, 40_000);
            delivered(node, "the opener", &opener, 40_000, &[Event(E::FlowNew), SnatAttempt(0)]);
            restored(node, "the answer", &opener, &reply.flags(SYN | ACK));
            delivered(node, "the handshake's end", &opener.flags(ACK), 40_000, &[Event(E::FlowEstablished)]);
            for _ in 0..2 {
                delivered(node, "data", &opener.flags(ACK).payload(b"request"), 40_000, &[]);
                restored(node, "data of the backend", &opener, &reply.flags(ACK).payload(b"response"));
            }
            // Nothing is routed here, so neither the hops to live nor the length matter.
            let last = opener.flags(ACK).with(|frame| (frame.ttl, frame.payload) = (1, vec![7; 2_000]));
            delivered(node, "long and on its last hop", &last, 40_000, &[]);
        }
    });
}

#[test]
fn answers_of_every_form_are_restored() {
    Node::each(|node| {
        one_local(node);
        for proto in [TCP, UDP, SCTP] {
            let opener = node.opener(proto, 40_000, VIP);
            delivered(node, "the opener", &opener, 40_000, &[Event(E::FlowNew), SnatAttempt(0)]);
            let reply = answer(node, &opener, 40_000);
            let forms: [Form; 4] = [
                ("an odd payload", &|frame| frame.payload = b"odd".to_vec()),
                ("padding", &|frame| frame.padding = vec![0xee; 6]),
                ("options", &|frame| frame.options = vec![1; 40]),
                ("a length over the MTU", &|frame| frame.payload = vec![3; 3_000]),
            ];
            for (name, form) in forms {
                restored(node, name, &opener, &reply.flags(ACK).with(form));
            }
        }
    });
}

#[test]
fn one_client_port_reaches_one_backend_here_by_two_frontends() {
    Node::each(|node| {
        one_local(node);
        for proto in [TCP, UDP, SCTP] {
            let (first, second) = (node.opener(proto, 2_000, VIP), node.opener(proto, 2_000, VIP_TOO));
            delivered(node, "the first", &first, 2_000, &[Event(E::FlowNew), SnatAttempt(0)]);
            let port = source_port(&node.run(node.entry, &second.bytes()).frame);
            assert_ne!(port, 2_000);
            delivered(node, "the second, once more", &second, port, &[]);
            restored(node, "the first's answer", &first, &answer(node, &first, 2_000));
            restored(node, "the second's answer", &second, &answer(node, &second, port));
        }
    });
}

#[test]
fn what_only_looks_like_an_answer_is_not_touched() {
    Node::each(|node| {
        one_local(node);
        let opener = node.opener(TCP, 40_000, VIP);
        delivered(node, "the opener", &opener, 40_000, &[Event(E::FlowNew), SnatAttempt(0)]);
        let answer = answer(node, &opener, 40_000);
        for (name, hook, frame) in [
            ("an answer that comes in from outside", node.entry, answer.clone()),
            ("traffic of the backend's own", Hook::TcEgress, answer.with(|frame| frame.dst.1 = 40_001)),
            ("the opener on its way out", Hook::TcEgress, opener),
        ] {
            node.check(name, hook, &frame.bytes(), Action::Pass, &frame.bytes(), &[]);
        }
    });
}
