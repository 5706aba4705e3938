//! Connections that the agent has marked because their endpoint is gone.

use xdp_common::{
    net::TCP,
    verdict::{
        Counter::{Drop, Event, SnatAttempt},
        Event as E, Reason,
    },
};

use crate::{
    answers::reset,
    forwarding::one_remote,
    frames::*,
    here::{answer, delivered, one_local, restored},
    node::*,
};

/// Checks that XDP resets the client.
fn is_reset(node: &Node, name: &str, sent: &Frame) {
    let counts = [Drop(Reason::EndpointRemoved), Event(E::Answered)];
    node.check(name, node.entry, &sent.bytes(), Action::Transmit, &reset(node, sent), &counts);
}

#[test]
fn whoever_goes_on_with_an_endpoint_that_is_gone_is_reset_and_nobody_else() {
    Node::each(|node| {
        one_remote(node);
        let flow = node.connect("a connection", &node.opener(TCP, 40_000, VIP), REMOTE);
        flow.sends(node, "it has a next hop", ACK, &[]);
        node.maps.mark_removed();
        let other = node.connect("another", &node.opener(TCP, 40_001, VIP), REMOTE);
        flow.answers(node, "the endpoint, if it is there, is heard", ACK, &[]);
        for flags in [ACK, FIN | ACK] {
            is_reset(node, "the client's next packet", &flow.opener.flags(flags));
        }
        is_reset(node, "and with data", &flow.opener.flags(ACK).payload(b"request"));
        flow.answers(node, "the endpoint's next packet", ACK, &[]);
        flow.sends(node, "the client's reset is the endpoint's", RST, &[]);
        other.sends(node, "other connections go on", ACK, &[]);
        // The same ports again are a new connection.
        let gone = node.backend(REMOTE_TOO, TCP, false);
        node.frontend(VIP, TCP, &[gone], 0);
        let expected = flow.seen.with(|frame| frame.dst.0 = REMOTE_TOO);
        let counts = [Event(E::FlowRenewed), Event(E::FlowNew), SnatAttempt(0), Event(E::Transmitted)];
        let sent = flow.opener.bytes();
        node.check("a new opener", node.entry, &sent, Action::Transmit, &expected.bytes(), &counts);
    });
}

#[test]
fn an_endpoint_on_this_node_that_is_gone_is_answered_for_as_well() {
    Node::each(|node| {
        one_local(node);
        let opener = node.opener(TCP, 40_000, VIP);
        let reply = answer(node, &opener, 40_000);
        delivered(node, "the opener", &opener, 40_000, &[Event(E::FlowNew), SnatAttempt(0)]);
        restored(node, "the answer", &opener, &reply.flags(SYN | ACK));
        delivered(node, "the handshake's end", &opener.flags(ACK), 40_000, &[Event(E::FlowEstablished)]);
        node.maps.mark_removed();
        restored(node, "the endpoint's data", &opener, &reply.flags(ACK));
        is_reset(node, "the client's next packet", &opener.flags(ACK));
        let counts = [Drop(Reason::EndpointRemoved), Event(E::Answered)];
        let deferred = opener.flags(ACK).looking_offloaded().bytes();
        let outcome = node.run(Hook::TcIngress, &deferred);
        outcome.check("at tc", Action::Redirect, &outcome.frame, &counts);
        delivered(node, "the client's reset", &opener.flags(RST), 40_000, &[]);
    });
}
