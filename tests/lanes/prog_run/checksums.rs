//! Checksum fields with a meaning of their own: absent, zero, and left for a device to finish.

use xdp_common::{
    net::{TCP, UDP},
    verdict::{
        Counter::{self, Event, SnatAttempt},
        Event as E,
    },
};

use crate::{forwarding::one_remote, frames::*, node::*};

const NEW: [Counter; 2] = [Event(E::FlowNew), SnatAttempt(0)];

#[test]
fn udp_without_a_checksum_stays_without() {
    Node::each(|node| {
        one_remote(node);
        let bare = |frame: &Frame| frame.payload(b"bare").with(|frame| frame.check = Check::Absent);
        let flow = node.open("the first", &bare(&node.opener(UDP, 40_000, VIP)), REMOTE);
        node.establish("a flow", &flow);
        flow.answers(node, "an answer", 0, &[]);
        let last = flow.opener.with(|frame| frame.ttl = 1);
        let half = last.with(|frame| (frame.src.1, frame.dst) = (flow.seen.src.1, flow.seen.dst));
        node.check("up", node.entry, &last.bytes(), Action::Pass, &half.bytes(), &[Event(E::SlowPath)]);
        let whole = half.with(|frame| frame.src = flow.seen.src);
        let finished = [Event(E::Finished)];
        node.check("out", Hook::TcEgress, &half.bytes(), Action::Pass, &whole.bytes(), &finished);
    });
}

#[test]
fn a_udp_checksum_that_becomes_zero_is_written_as_all_ones() {
    Node::each(|node| {
        one_remote(node);
        let flow = node.connect("a flow", &node.opener(UDP, 40_000, VIP), REMOTE);
        let translated =
            |sent: &Frame| sent.with(|frame| (frame.src, frame.dst) = (flow.seen.src, flow.seen.dst));
        let sent = flow.opener.tuned(|sent| translated(sent).full_check() == 0xffff);
        flow.forwards(node, "at XDP", &sent, &[]);
        let half =
            |sent: &Frame| sent.with(|frame| (frame.src.1, frame.dst) = (flow.seen.src.1, flow.seen.dst));
        let last = sent.with(|frame| frame.ttl = 1);
        node.check(
            "up",
            node.entry,
            &last.bytes(),
            Action::Pass,
            &half(&last).bytes(),
            &[Event(E::SlowPath)],
        );
        let whole = translated(&last);
        node.check(
            "at egress",
            Hook::TcEgress,
            &half(&last).bytes(),
            Action::Pass,
            &whole.bytes(),
            &[Event(E::Finished)],
        );
        assert_eq!(whole.full_check(), 0xffff);
        // All ones on the way in, which is zero too.
        let ones = flow.opener.tuned(|sent| sent.full_check() == 0xffff);
        flow.forwards(node, "all ones before", &ones, &[]);
    });
}

#[test]
fn a_checksum_left_to_the_device_is_left_alone_by_xdp() {
    Node::each(|node| {
        one_remote(node);
        for proto in [TCP, UDP] {
            let flow = node.connect("a flow", &node.opener(proto, 40_000, VIP), REMOTE);
            let other = node.opener(proto, 40_001, VIP);
            for (name, frame) in [
                ("of a flow", flow.opener.flags(ACK)),
                ("of an answer", flow.answer(node).flags(ACK)),
                ("of a new flow", other.clone()),
            ] {
                let frame = frame.payload(b"payload").with(|frame| frame.check = Check::Offloaded).bytes();
                node.check(name, node.entry, &frame, Action::Pass, &frame, &[Event(E::Deferred)]);
            }
            node.open("no flow has been made", &other, REMOTE);
        }
    });
}

#[test]
fn tc_translates_what_xdp_has_deferred_and_the_flow_is_the_same() {
    Node::each(|node| {
        one_remote(node);
        for proto in [TCP, UDP] {
            let opener = node.opener(proto, 2_000, VIP).looking_offloaded();
            let half = opener.with(|frame| frame.dst = (REMOTE, TARGET));
            let deferred = [Event(E::Deferred)];
            node.check("XDP", node.entry, &opener.bytes(), Action::Pass, &opener.bytes(), &deferred);
            let slow = [&NEW[..], &[Event(E::SlowPath)]].concat();
            node.check("tc", Hook::TcIngress, &opener.bytes(), Action::Pass, &half.bytes(), &slow);
            let whole = half.with(|frame| frame.src.0 = NODE);
            let finished = [Event(E::Finished)];
            node.check("egress", Hook::TcEgress, &half.bytes(), Action::Pass, &whole.bytes(), &finished);
            let plain = node.opener(proto, 2_000, VIP);
            let seen = plain.with(|frame| {
                frame.mac = (node.mac, GATEWAY_MAC);
                frame.ttl -= 1;
                (frame.src, frame.dst) = (whole.src, whole.dst);
            });
            let transmitted = [Event(E::Transmitted)];
            node.check(
                "the same flow at XDP",
                node.entry,
                &plain.bytes(),
                Action::Transmit,
                &seen.bytes(),
                &transmitted,
            );
        }
    });
}

#[test]
fn tc_delivers_to_a_backend_on_this_node_what_xdp_has_deferred() {
    Node::each(|node| {
        for proto in [TCP, UDP] {
            let id = node.backend(LOCAL, proto, true);
            node.frontend(VIP, proto, &[id], 0);
            let opener = node.opener(proto, 40_000, VIP).payload(b"even").looking_offloaded();
            let seen = opener.with(|frame| frame.dst = (LOCAL, TARGET));
            let delivered = [&NEW[..], &[Event(E::Delivered)]].concat();
            node.check(
                "the first",
                Hook::TcIngress,
                &opener.bytes(),
                Action::Pass,
                &seen.bytes(),
                &delivered,
            );
            let delivered = [Event(E::Delivered)];
            node.check(
                "the second",
                Hook::TcIngress,
                &opener.bytes(),
                Action::Pass,
                &seen.bytes(),
                &delivered,
            );
        }
    });
}

#[test]
fn tc_finishes_answers_that_xdp_has_deferred() {
    Node::each(|node| {
        one_remote(node);
        for proto in [TCP, UDP] {
            let flow = node.open("a flow", &node.opener(proto, 40_000, VIP), REMOTE);
            let reply = flow.answer(node).flags(SYN | ACK).looking_offloaded();
            let half = reply.with(|frame| frame.dst.0 = CLIENT);
            let slow = [Event(E::SlowPath)];
            node.check("the answer", Hook::TcIngress, &reply.bytes(), Action::Pass, &half.bytes(), &slow);
            let whole = half.with(|frame| (frame.src, frame.dst) = (flow.opener.dst, flow.opener.src));
            let finished = [Event(E::Finished)];
            node.check("out", Hook::TcEgress, &half.bytes(), Action::Pass, &whole.bytes(), &finished);
            flow.sends(node, "the handshake's end", ACK, &[Event(E::FlowEstablished)]);
        }
    });
}

#[test]
fn tc_ingress_leaves_alone_what_xdp_has_seen_through() {
    Node::each(|node| {
        one_remote(node);
        for proto in [TCP, UDP] {
            let flow = node.connect("a flow", &node.opener(proto, 40_000, VIP), REMOTE);
            for frame in [&flow.opener.flags(ACK), &flow.answer(node), &node.opener(proto, 40_001, VIP)] {
                let frame = frame.bytes();
                node.check("a finished checksum", Hook::TcIngress, &frame, Action::Pass, &frame, &[]);
            }
        }
    });
}
