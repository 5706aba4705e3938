//! Drops, each for exactly one counted reason, and what is never dropped.

use xdp_common::{
    net::{TCP, UDP},
    tables::frontend,
    verdict::{
        Counter::{self, Drop, Event, SnatAttempt},
        Event as E, Reason, SNAT_ATTEMPTS_MAX,
    },
};

use crate::{forwarding::one_remote, frames::*, maps, node::*};

#[test]
fn without_endpoints_a_node_address_passes_and_a_local_policy_drops() {
    Node::each(|node| {
        for proto in [TCP, UDP] {
            for (vip, flags, action, counter) in [
                (VIP_TOO, frontend::HAS_ENDPOINTS, Action::Drop, Drop(Reason::NoLocalEndpoint)),
                (NODE, frontend::NODE_ADDRESS, Action::Pass, Event(E::NoEndpointPassed)),
            ] {
                node.frontend(vip, proto, &[], flags);
                let opener = node.opener(proto, 40_000, vip);
                let frame = opener.bytes();
                node.check("at XDP", node.entry, &frame, action, &frame, &[counter]);
                let frame = opener.looking_offloaded().bytes();
                node.check("at tc", Hook::TcIngress, &frame, action, &frame, &[counter]);
            }
        }
    });
}

#[test]
fn a_ring_that_names_no_backend_is_a_counted_drop() {
    Node::each(|node| {
        node.frontend(VIP, TCP, &[200], 0);
        let frame = node.opener(TCP, 40_000, VIP).bytes();
        node.check("no backend", node.entry, &frame, Action::Drop, &frame, &[Drop(Reason::NoBackend)]);
    });
}

#[test]
fn running_out_of_source_ports_drops_new_flows_and_no_other() {
    Node::each(|node| {
        one_remote(node);
        node.configure(|config| (config.snat_port_min, config.snat_port_max) = (5_000, 5_001));
        let mut flows = Vec::new();
        for sport in 40_000..40_010 {
            let opener = node.opener(TCP, sport, VIP);
            let outcome = node.run(node.entry, &opener.bytes());
            if outcome.action == Action::Drop {
                outcome.check("refused", Action::Drop, &opener.bytes(), &[Drop(Reason::SnatExhausted)]);
                continue;
            }
            let port = source_port(&outcome.frame);
            let seen = opener.with(|frame| {
                frame.mac = (node.mac, GATEWAY_MAC);
                frame.ttl -= 1;
                (frame.src, frame.dst) = ((NODE, port), (REMOTE, TARGET));
            });
            // Which attempt found the port is the hash's choice; that exactly one is counted is not.
            let attempts = (0..SNAT_ATTEMPTS_MAX).map(SnatAttempt);
            let attempt: Vec<Counter> =
                attempts.filter(|attempt| outcome.counts.contains(&maps::name(attempt.index()))).collect();
            let counts = [&attempt[..], &[Event(E::FlowNew), Event(E::Transmitted)]].concat();
            assert_eq!(counts.len(), 3);
            outcome.check("accepted", Action::Transmit, &seen.bytes(), &counts);
            flows.push((opener, seen));
        }
        let mut ports: Vec<u16> = flows.iter().map(|(_, seen)| seen.src.1).collect();
        ports.sort();
        assert_eq!(ports, [5_000, 5_001], "every port of the range is used, once");
        assert_eq!(node.maps.exhausted(REMOTE, TARGET, TCP), 8, "the backend is named");
        assert_eq!(node.maps.exhausted(REMOTE, TARGET, UDP), 0, "and no other");
        for (opener, seen) in flows {
            let (sent, expected) = (opener.bytes(), seen.bytes());
            let transmitted = [Event(E::Transmitted)];
            node.check("an old flow", node.entry, &sent, Action::Transmit, &expected, &transmitted);
        }
        let other = node.opener(UDP, 40_000, VIP);
        let outcome = node.run(node.entry, &other.bytes());
        assert_eq!(outcome.action, Action::Transmit, "another protocol has ports of its own");
    });
}

#[test]
fn a_held_bucket_drops_new_flows_for_a_counted_reason_and_no_established_one() {
    Node::each_sized(Sizes { buckets: 1, ..Sizes::default() }, |node| {
        one_remote(node);
        let flow = node.connect("a flow", &node.opener(TCP, 40_000, VIP), REMOTE);
        node.maps.hold_bucket(0, true);
        let frame = node.opener(TCP, 40_001, VIP).bytes();
        let counts = [Event(E::InsertRetried), Drop(Reason::FlowInsert)];
        node.check("a new flow", node.entry, &frame, Action::Drop, &frame, &counts);
        flow.sends(node, "an established flow", ACK, &[]);
        flow.answers(node, "an established flow", ACK, &[]);
        node.maps.hold_bucket(0, false);
        node.open("the bucket is free again", &node.opener(TCP, 40_001, VIP), REMOTE);
    });
}

#[test]
fn an_answer_of_no_known_flow_is_left_to_the_kernel() {
    Node::each(|node| {
        one_remote(node);
        for proto in [TCP, UDP] {
            let stray = node.frame(proto, (GATEWAY_MAC, node.mac), (REMOTE, TARGET), (NODE, 2_000)).bytes();
            node.check("a stray", node.entry, &stray, Action::Pass, &stray, &[Event(E::Unclaimed)]);
        }
    });
}

#[test]
fn flows_that_are_idle_keep_their_ports_while_others_are_free() {
    let taken_over = maps::name(Event(E::PortTakenOver).index());
    Node::each(|node| {
        one_remote(node);
        for proto in [TCP, UDP] {
            for port in 40_000..40_500 {
                node.run(node.entry, &node.opener(proto, port, VIP).bytes());
            }
        }
        node.configure(|config| config.clock += 60);
        for proto in [TCP, UDP] {
            for port in 41_000..41_500 {
                let outcome = node.run(node.entry, &node.opener(proto, port, VIP).bytes());
                assert!(!outcome.counts.contains(&taken_over), "port {port} of protocol {proto}");
            }
        }
    });
}
