//! Tables at their limits: no room for established flows, and a flood through the table of new ones.

use xdp_common::{
    net::{TCP, UDP},
    verdict::{Counter::Event, Event as E},
};

use crate::{forwarding::one_remote, frames::*, node::*};

/// New flows of a flood, many times what the smallest table holds.
const FLOOD: u16 = 200;

/// First port of the clients of a flood: they keep their ports, so that none meets another's, whichever the table holds. That
/// depends on how many come in a tick of the kernel's clock.
const KEPT: u16 = 2_000;

/// Opens flows from another client, new ones in each wave: which of the last wave the table still holds depends on the clock too.
fn flood(node: &Node, wave: u16) {
    for sport in wave * FLOOD..(wave + 1) * FLOOD {
        let opener = node.opener(UDP, KEPT + sport, VIP).with(|frame| frame.src.0 = [198, 51, 100, 99]);
        node.open("a flow of the flood", &opener, REMOTE);
    }
}

#[test]
fn a_full_established_table_leaves_flows_where_they_are_and_counts_it() {
    for established in [1, 2, 3] {
        let sizes = Sizes { established, ..Sizes::default() };
        Node::each_sized(sizes, |node| {
            one_remote(node);
            let room = (established + sizes.overflow()) / 2;
            for sport in 0..room as u16 {
                node.connect("a flow with room", &node.opener(TCP, 40_000 + sport, VIP), REMOTE);
            }
            let held = node.maps.established_entries();
            for proto in [TCP, UDP] {
                let flow = node.open("a flow without room", &node.opener(proto, 45_000, VIP), REMOTE);
                flow.answers(node, "its answer", SYN | ACK, &[]);
                for _ in 0..3 {
                    flow.sends(node, "it goes on", ACK, &[Event(E::EstablishedFull)]);
                    flow.answers(node, "its answers too", ACK, &[]);
                }
            }
            assert_eq!(node.maps.established_entries(), held, "no half is left behind");
        });
    }
}

#[test]
fn a_flow_moves_to_the_established_table_once_there_is_room() {
    Node::each_sized(Sizes { established: 1, ..Sizes::default() }, |node| {
        one_remote(node);
        node.connect("the first", &node.opener(TCP, 40_000, VIP), REMOTE);
        let flow = node.open("the second", &node.opener(TCP, 40_001, VIP), REMOTE);
        flow.answers(node, "its answer", SYN | ACK, &[]);
        flow.sends(node, "without room", ACK, &[Event(E::EstablishedFull)]);
        node.maps.forget_established();
        flow.sends(node, "with room", ACK, &[Event(E::FlowEstablished)]);
        flow.answers(node, "with room", ACK, &[]);
    });
}

#[test]
fn a_flood_disturbs_no_established_flow() {
    Node::each_sized(Sizes { buckets: 1, ..Sizes::default() }, |node| {
        one_remote(node);
        let flow = node.connect("a flow", &node.opener(TCP, 40_000, VIP), REMOTE);
        for wave in 0..2 {
            flood(node, wave);
            flow.sends(node, "an established flow", ACK, &[]);
            flow.answers(node, "an established flow", ACK, &[]);
        }
    });
}

#[test]
fn a_flood_evicts_unanswered_flows_before_answered_ones() {
    Node::each_sized(Sizes { buckets: 1, ..Sizes::default() }, |node| {
        one_remote(node);
        let answered = node.open("answered", &node.opener(TCP, 40_000, VIP), REMOTE);
        answered.answers(node, "the answer", SYN | ACK, &[]);
        let silent = node.open("unanswered", &node.opener(TCP, 40_001, VIP), REMOTE);
        flood(node, 0);
        answered.answers(node, "the answer once more", SYN | ACK, &[]);
        answered.sends(node, "the handshake's end", ACK, &[Event(E::FlowEstablished)]);
        let late = silent.answer(node).flags(SYN | ACK).bytes();
        node.check("a late answer", node.entry, &late, Action::Pass, &late, &[Event(E::Unclaimed)]);
        node.open("a repeated opener makes it again", &silent.opener, REMOTE);
    });
}

#[test]
fn a_flood_of_answered_flows_disturbs_no_established_one() {
    Node::each_sized(Sizes { buckets: 1, ..Sizes::default() }, |node| {
        one_remote(node);
        let flow = node.connect("a flow", &node.opener(TCP, 40_000, VIP), REMOTE);
        for sport in 0..FLOOD {
            let other = node.open("a flow of the flood", &node.opener(TCP, KEPT + sport, VIP), REMOTE);
            other.answers(node, "its answer", SYN | ACK, &[]);
        }
        flow.sends(node, "an established flow", ACK, &[]);
        flow.answers(node, "an established flow", ACK, &[]);
    });
}
