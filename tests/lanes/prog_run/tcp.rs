//! What TCP allows and a load balancer must not get in the way of; closing and using again are in `renewal`.

use xdp_common::{
    net::TCP,
    verdict::{Counter::Event, Event as E},
};

use crate::{
    forwarding::one_remote,
    frames::*,
    here::{answer, delivered, one_local, restored},
    node::*,
};

#[test]
fn openers_that_cross_each_other_are_one_connection() {
    Node::each(|node| {
        one_remote(node);
        let flow = node.open("the client's opener", &node.opener(TCP, 40_000, VIP), REMOTE);
        flow.answers(node, "the backend's opener", SYN, &[]);
        flow.sends(node, "the client's answer", SYN | ACK, &[]);
        flow.answers(node, "the backend's answer", SYN | ACK, &[]);
        flow.sends(node, "the client goes on", ACK, &[Event(E::FlowEstablished)]);
        flow.answers(node, "the backend goes on", ACK, &[]);
        one_local(node);
        let opener = node.opener(TCP, 40_001, VIP);
        let reply = answer(node, &opener, 40_001);
        let port = source_port(&node.run(node.entry, &opener.bytes()).frame);
        assert_eq!(port, 40_001);
        restored(node, "the backend's opener", &opener, &reply.flags(SYN));
        delivered(node, "the client's answer", &opener.flags(SYN | ACK), 40_001, &[]);
        restored(node, "the backend's answer", &opener, &reply.flags(SYN | ACK));
        delivered(node, "the client goes on", &opener.flags(ACK), 40_001, &[Event(E::FlowEstablished)]);
    });
}

#[test]
fn segments_are_translated_whatever_their_sequence_numbers() {
    Node::each(|node| {
        one_remote(node);
        let flow = node.connect("a connection", &node.opener(TCP, 40_000, VIP), REMOTE);
        for seq in [0, 1, 0x0102_0303, 0x0202_0304, 0x7fff_ffff, 0x8102_0304, u32::MAX] {
            for flags in [ACK, FIN | ACK, SYN | ACK, RST | ACK] {
                let sent =
                    flow.opener.flags(flags).payload(b"out of any window").with(|frame| frame.seq = seq);
                flow.forwards(node, "the client's", &sent, &[]);
                let sent = flow.answer(node).flags(flags).with(|frame| frame.seq = seq);
                flow.returns(node, "the backend's", &sent, &[]);
            }
        }
        flow.sends(node, "nothing of that has ended it", ACK, &[]);
    });
}
