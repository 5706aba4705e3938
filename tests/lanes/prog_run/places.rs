//! Where entries of the established table are: in one of a key's places, or in the hash behind them. Packets meet no difference.

use xdp_common::{
    net::TCP,
    verdict::{Counter::Event, Event as E},
};

use crate::{flows::Remote, forwarding::one_remote, frames::*, node::*};

/// So few slots that several flows find their places taken, before there is no room at all.
const CROWDED: Sizes = Sizes { established: 16, buckets: 1 << 10 };
/// First source port of the clients.
const CLIENTS: u16 = 40_000;

/// Connects as many clients as there is room for, and checks that some of their entries are in the hash.
fn crowd(node: &Node) -> Vec<Remote> {
    let room = CROWDED.overflow() as usize;
    let mut flows = Vec::new();
    while node.maps.overflowed() + 2 <= room {
        let sport = CLIENTS + flows.len() as u16;
        flows.push(node.connect("a flow with room", &node.opener(TCP, sport, VIP), REMOTE));
    }
    assert!(node.maps.overflowed() > 0, "{} flows have all found their places free", flows.len());
    assert_eq!(node.maps.established_entries(), 2 * flows.len());
    flows
}

#[test]
fn flows_whose_places_are_taken_go_on_like_others() {
    Node::each_sized(CROWDED, |node| {
        one_remote(node);
        for flow in crowd(node) {
            for _ in 0..2 {
                flow.sends(node, "a packet", ACK, &[]);
                flow.answers(node, "its answer", ACK, &[]);
            }
        }
    });
}

#[test]
fn an_entry_whose_next_hop_moves_stays_where_it_is() {
    Node::each_sized(CROWDED, |node| {
        one_remote(node);
        let flows = crowd(node);
        for flow in &flows {
            flow.answers(node, "an answer", ACK, &[]);
        }
        let overflowed = node.maps.overflowed();
        for last in 0x77..0x7d {
            let moved = [2, 0, 0, 0, 0, last];
            let gateway = node.family.ip(GATEWAY);
            node.namespace.static_neighbour("eth0", gateway, moved).expect("a neighbour can be replaced");
            node.raise_epoch();
            for flow in &flows {
                let sent = flow.opener.flags(ACK).bytes();
                let expected = flow.seen.flags(ACK).with(|frame| frame.mac.1 = moved).bytes();
                let stale = node.maps.routing(&sent);
                for _ in 0..2 {
                    node.check(
                        "data",
                        node.entry,
                        &sent,
                        Action::Transmit,
                        &expected,
                        &[Event(E::Transmitted)],
                    );
                }
                assert_ne!(node.maps.routing(&sent), stale, "the answer is kept");
                let entries = (node.maps.established_entries(), node.maps.overflowed());
                assert_eq!(entries, (2 * flows.len(), overflowed), "an entry for each half, where it was");
            }
        }
    });
}

#[test]
fn a_flow_that_is_renewed_leaves_nothing_behind_wherever_it_was() {
    Node::each_sized(CROWDED, |node| {
        one_remote(node);
        let flows = crowd(node);
        for flow in &flows {
            flow.sends(node, "the client resets", RST, &[]);
            let again = [Event(E::FlowRenewed), Event(E::FlowNew), Event(E::Transmitted)];
            let counts = [&again[..], &[xdp_common::verdict::Counter::SnatAttempt(0)]].concat();
            let sent = flow.opener.bytes();
            node.check("the next opener", node.entry, &sent, Action::Transmit, &flow.seen.bytes(), &counts);
            assert_eq!(node.maps.established_entries(), 2 * flows.len() - 2, "both halves are gone");
            node.establish("the next connection", flow);
            flow.answers(node, "its answer", ACK, &[]);
        }
        assert_eq!(node.maps.established_entries(), 2 * flows.len());
    });
}
