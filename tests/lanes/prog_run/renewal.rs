//! When a flow is over, and what its tuple carries afterwards.

use xdp_common::{
    net::{SCTP, TCP, UDP},
    verdict::{
        Counter::{Event, SnatAttempt},
        Event as E,
    },
};

use crate::{flows::Remote, forwarding::one_remote, frames::*, node::*};

/// Checks that the next opener of a flow's tuple goes to another backend, as a new flow; and that it can be established.
fn renewed(node: &Node, name: &str, flow: &Remote, backend: Addr) {
    let sent = flow.opener.bytes();
    let expected = flow.seen.with(|frame| frame.dst.0 = backend);
    // The same client and range give the same source port at the first attempt.
    let counts = [Event(E::FlowRenewed), Event(E::FlowNew), SnatAttempt(0), Event(E::Transmitted)];
    node.check(name, node.entry, &sent, Action::Transmit, &expected.bytes(), &counts);
    let again = Remote { seen: expected, ..flow.clone() };
    let before = node.maps.established_entries();
    node.establish(name, &again);
    again.answers(node, name, ACK, &[]);
    assert_eq!(node.maps.established_entries(), before + 2, "{name}: nothing of the old flow is left");
}

#[test]
fn a_closed_tuple_is_placed_anew_when_it_is_used_again() {
    Node::each(|node| {
        one_remote(node);
        let flow = node.connect("a flow", &node.opener(TCP, 40_000, VIP), REMOTE);
        let other = node.backend(REMOTE_TOO, TCP, false);
        node.frontend(VIP, TCP, &[other], 0);
        flow.sends(node, "an opener out of its window is the old flow's", SYN, &[]);
        flow.sends(node, "the client closes", FIN | ACK, &[]);
        flow.answers(node, "the backend closes", FIN | ACK, &[]);
        flow.sends(node, "the last acknowledgement", ACK, &[]);
        renewed(node, "the next opener", &flow, REMOTE_TOO);
    });
}

#[test]
fn a_reset_by_either_side_ends_a_flow() {
    Node::each(|node| {
        for (sport, by_client) in [(40_000, true), (40_001, false)] {
            one_remote(node);
            let flow = node.connect("a flow", &node.opener(TCP, sport, VIP), REMOTE);
            let other = node.backend(REMOTE_TOO, TCP, false);
            node.frontend(VIP, TCP, &[other], 0);
            if by_client {
                flow.sends(node, "the client resets", RST, &[]);
            } else {
                flow.answers(node, "the backend resets", RST | ACK, &[]);
            }
            renewed(node, "the next opener", &flow, REMOTE_TOO);
        }
    });
}

#[test]
fn udp_leaves_a_backend_that_is_gone_and_connections_do_not() {
    Node::each(|node| {
        for (generation, is_free) in [(2, false), (1, true)] {
            for proto in [TCP, UDP, SCTP] {
                let gone = node.backend(REMOTE, proto, false);
                let other = node.backend(REMOTE_TOO, proto, false);
                node.frontend(VIP, proto, &[gone], 0);
                let sport = 40_000 + u16::from(is_free);
                let flow = node.connect("a flow", &node.opener(proto, sport, VIP), REMOTE);
                node.frontend(VIP, proto, &[other], 0);
                flow.sends(node, "the ring alone moves no flow", ACK, &[]);
                node.set_backend(gone, REMOTE, if is_free { 0 } else { proto }, false, generation);
                if proto != UDP {
                    flow.sends(node, "a connection ends where it began", ACK, &[]);
                    flow.answers(node, "its answers too", ACK, &[]);
                } else {
                    renewed(node, "the next datagram", &flow, REMOTE_TOO);
                }
            }
        }
    });
}

#[test]
fn a_flow_keeps_its_backend_when_the_ring_changes() {
    Node::each(|node| {
        one_remote(node);
        let answered = node.open("answered", &node.opener(TCP, 40_000, VIP), REMOTE);
        answered.answers(node, "the answer", SYN | ACK, &[]);
        let established = node.connect("established", &node.opener(TCP, 40_001, VIP), REMOTE);
        let other = node.backend(REMOTE_TOO, TCP, false);
        node.frontend(VIP, TCP, &[other], 0);
        established.sends(node, "established", ACK, &[]);
        answered.sends(node, "answered", ACK, &[Event(E::FlowEstablished)]);
        node.open("a new flow", &node.opener(TCP, 40_002, VIP), REMOTE_TOO);
    });
}

#[test]
fn a_close_that_meets_a_stale_next_hop_is_noted() {
    Node::each(|node| {
        for (sport, by_client, flags) in
            [(40_000, true, FIN | ACK), (40_001, true, RST), (40_002, false, RST | ACK)]
        {
            one_remote(node);
            let flow = node.connect("a flow", &node.opener(TCP, sport, VIP), REMOTE);
            flow.answers(node, "an answer", ACK, &[]);
            let other = node.backend(REMOTE_TOO, TCP, false);
            node.frontend(VIP, TCP, &[other], 0);
            node.raise_epoch();
            if by_client {
                flow.sends(node, "the client closes", flags, &[]);
            } else {
                flow.answers(node, "the backend closes", flags, &[]);
            }
            renewed(node, "the next opener", &flow, REMOTE_TOO);
        }
    });
}

#[test]
fn a_close_that_establishes_a_flow_is_noted() {
    Node::each(|node| {
        one_remote(node);
        let flow = node.open("a flow", &node.opener(TCP, 40_000, VIP), REMOTE);
        flow.answers(node, "the answer", SYN | ACK, &[]);
        flow.sends(node, "an end at once", FIN | ACK, &[Event(E::FlowEstablished)]);
        let other = node.backend(REMOTE_TOO, TCP, false);
        node.frontend(VIP, TCP, &[other], 0);
        renewed(node, "the next opener", &flow, REMOTE_TOO);
    });
}
