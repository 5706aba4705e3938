//! How flows are opened, established, renewed and refused.

use std::collections::HashMap;

use xdp_common::{
    frame::tcp,
    net::{FlowKey, TCP, UDP},
    tables::{BackendKey, Table, Tables, frontend, network},
    verdict::{Action, Counter, Event, Reason, SNAT_ATTEMPTS_MAX},
};

use crate::model::*;

fn one_remote() -> Model {
    let model = Model::new();
    let id = model.backend(REMOTE, TCP, false);
    model.frontend(VIP, TCP, &[id], 0);
    model
}

fn one_local() -> Model {
    let model = Model::new();
    let id = model.backend(LOCAL, TCP, true);
    model.frontend(VIP, TCP, &[id], 0);
    model
}

/// Opener, answer, and the initiator's next packet; returns the opener as the backend has seen it.
fn handshake(model: &Model, sport: u16, vip: [u8; 4]) -> xdp_common::frame::Packet<[u8; 4]> {
    let seen = model.through(&syn(sport, vip));
    model.through(&answer(&seen, tcp::SYN | tcp::ACK));
    model.through(&ack(sport, vip));
    seen
}

#[test]
fn a_backend_elsewhere_sees_the_node_and_the_client_sees_the_frontend() {
    let model = one_remote();
    let seen = model.through(&syn(40_000, VIP));
    assert_eq!((seen.key.src, seen.key.dst, seen.key.dport), (NODE, REMOTE, TARGET));
    let port = u16::from_be_bytes(seen.key.sport);
    assert!((1024..=29_999).contains(&port), "{port}");
    let reply = model.through(&answer(&seen, tcp::SYN | tcp::ACK));
    assert_eq!(reply.key, syn(40_000, VIP).key.reversed());
    assert_eq!(model.count_of(Counter::SnatAttempt(0)), 1);
}

#[test]
fn a_backend_on_this_node_sees_the_client() {
    let model = one_local();
    let verdict = model.xdp(&syn(40_000, VIP));
    assert_eq!(verdict.action, Action::Stack);
    let seen = rewritten(&syn(40_000, VIP), &verdict);
    let expected = FlowKey { dst: LOCAL, dport: TARGET, ..syn(40_000, VIP).key };
    assert_eq!(seen.key, expected);
    let reply = answer(&seen, tcp::SYN | tcp::ACK);
    let restored = rewritten(&reply, &model.egress(&reply));
    assert_eq!(restored.key, syn(40_000, VIP).key.reversed());
    assert_eq!((model.events(Event::Delivered), model.events(Event::Restored)), (1, 1));
}

#[test]
fn the_clients_own_port_is_kept_where_it_is_in_the_range() {
    let model = one_remote();
    assert_eq!(model.through(&syn(2_000, VIP)).key.sport, 2_000u16.to_be_bytes());
}

#[test]
fn a_new_flow_has_one_entry_an_answered_one_two_and_an_established_one_none_that_can_be_evicted() {
    let model = one_remote();
    let seen = model.through(&syn(40_000, VIP));
    assert_eq!((model.embryonic.borrow().len(), model.established.borrow().len()), (1, 0));
    model.through(&answer(&seen, tcp::SYN | tcp::ACK));
    assert_eq!((model.embryonic.borrow().len(), model.established.borrow().len()), (2, 0));
    model.through(&ack(40_000, VIP));
    assert_eq!((model.embryonic.borrow().len(), model.established.borrow().len()), (0, 2));
    assert_eq!((model.events(Event::FlowNew), model.events(Event::FlowEstablished)), (1, 1));
    model.embryonic.borrow_mut().clear();
    assert_eq!(model.through(&ack(40_000, VIP)).key, FlowKey { ..seen.key });
}

#[test]
fn answers_alone_establish_nothing() {
    let model = one_remote();
    let seen = model.through(&syn(40_000, VIP));
    for _ in 0..3 {
        model.through(&answer(&seen, tcp::SYN | tcp::ACK));
    }
    model.through(&syn(40_000, VIP));
    assert!(model.established.borrow().is_empty(), "a flood that draws answers stays in the evicting table");
}

#[test]
fn a_repeated_opener_keeps_its_backend_and_port() {
    let model = one_remote();
    let first = model.through(&syn(40_000, VIP));
    assert_eq!(model.through(&syn(40_000, VIP)).key, first.key);
    assert_eq!(model.events(Event::FlowNew), 1);
}

#[test]
fn a_flow_keeps_its_backend_when_the_ring_changes() {
    for is_local in [false, true] {
        let model = Model::new();
        let first = model.backend(if is_local { LOCAL } else { REMOTE }, TCP, is_local);
        let other = model.backend(REMOTE_TOO, TCP, false);
        model.frontend(VIP, TCP, &[first], 0);
        let answered = model.through(&syn(40_000, VIP));
        model.through(&answer(&answered, tcp::SYN | tcp::ACK));
        let established = handshake(&model, 40_001, VIP);
        model.frontend(VIP, TCP, &[other], 0);
        assert_eq!(model.through(&ack(40_000, VIP)).key.dst, answered.key.dst, "answered, local {is_local}");
        assert_eq!(
            model.through(&ack(40_001, VIP)).key.dst,
            established.key.dst,
            "established, local {is_local}"
        );
        assert_eq!(model.through(&syn(40_002, VIP)).key.dst, REMOTE_TOO);
    }
}

#[test]
fn one_client_port_reaches_one_backend_by_two_frontends() {
    for is_local in [false, true] {
        let model = Model::new();
        let id = model.backend(if is_local { LOCAL } else { REMOTE }, TCP, is_local);
        model.frontend(VIP, TCP, &[id], 0);
        model.frontend(VIP_TOO, TCP, &[id], 0);
        let first = handshake(&model, 40_000, VIP);
        let second = handshake(&model, 40_000, VIP_TOO);
        assert_ne!(first.key.sport, second.key.sport);
        for (seen, vip) in [(first, VIP), (second, VIP_TOO)] {
            let reply = answer(&seen, tcp::ACK);
            let back =
                if is_local { rewritten(&reply, &model.egress(&reply)) } else { model.through(&reply) };
            assert_eq!(back.key, ack(40_000, vip).key.reversed());
        }
    }
}

#[test]
fn a_free_address_of_a_service_network_is_dropped_and_those_beside_it_pass() {
    let model = one_remote();
    let free = [203, 0, 113, 99];
    model.service_network(free);
    model.networks.borrow_mut().insert((network::SERVICES, free));
    assert_eq!(model.xdp(&syn(40_000, free)).action, Action::Drop(Reason::UnknownServiceAddress));
    let beside = model.xdp(&syn(40_000, [203, 0, 113, 98]));
    assert_eq!((beside.action, model.events(Event::Unclaimed)), (Action::Pass, 1));
}

#[test]
fn openers_that_cross_each_other_are_one_flow() {
    for is_local in [false, true] {
        let model = if is_local { one_local() } else { one_remote() };
        let seen = model.through(&syn(40_000, VIP));
        let back = |flags| {
            let reply = answer(&seen, flags);
            if is_local { rewritten(&reply, &model.egress(&reply)) } else { model.through(&reply) }
        };
        assert_eq!(back(tcp::SYN).key, syn(40_000, VIP).key.reversed(), "local {is_local}");
        let acknowledged = segment(CLIENT, 40_000, VIP, HTTP, tcp::SYN | tcp::ACK);
        assert_eq!(model.through(&acknowledged).key, seen.key, "local {is_local}");
        assert_eq!(back(tcp::SYN | tcp::ACK).key, syn(40_000, VIP).key.reversed(), "local {is_local}");
        assert_eq!(model.events(Event::FlowEstablished), 0, "nobody has gone on yet");
        assert_eq!(model.through(&ack(40_000, VIP)).key, seen.key, "local {is_local}");
        assert_eq!((model.events(Event::FlowNew), model.events(Event::FlowEstablished)), (1, 1));
    }
}

#[test]
fn a_closed_tuple_is_placed_anew_when_it_is_used_again() {
    let model = one_remote();
    let other = model.backend(REMOTE_TOO, TCP, false);
    handshake(&model, 40_000, VIP);
    model.through(&segment(CLIENT, 40_000, VIP, HTTP, tcp::FIN | tcp::ACK));
    model.frontend(VIP, TCP, &[other], 0);
    assert_eq!(model.through(&ack(40_000, VIP)).key.dst, REMOTE, "the close itself is the old connection's");
    assert_eq!(handshake(&model, 40_000, VIP).key.dst, REMOTE_TOO);
    assert_eq!(model.events(Event::FlowRenewed), 1);
    assert_eq!(model.established.borrow().len(), 2, "nothing of the old flow is left");
}

#[test]
fn a_reset_by_the_backend_lets_the_tuple_be_placed_anew() {
    for rounds in [0, 1] {
        let model = one_remote();
        let other = model.backend(REMOTE_TOO, TCP, false);
        let seen = model.through(&syn(40_000, VIP));
        if rounds == 1 {
            model.through(&answer(&seen, tcp::SYN | tcp::ACK));
            model.through(&ack(40_000, VIP));
        }
        model.through(&answer(&seen, tcp::RST | tcp::ACK));
        model.frontend(VIP, TCP, &[other], 0);
        assert_eq!(model.through(&syn(40_000, VIP)).key.dst, REMOTE_TOO, "after {rounds} rounds");
    }
}

#[test]
fn what_a_half_open_connection_has_left_does_not_hold_the_next_one() {
    let model = one_remote();
    let other = model.backend(REMOTE_TOO, TCP, false);
    let seen = model.through(&syn(40_000, VIP));
    model.through(&answer(&seen, tcp::SYN | tcp::ACK));
    let mut config = model.config.get();
    config.clock += 60;
    model.config.set(config);
    model.frontend(VIP, TCP, &[other], 0);
    assert_eq!(handshake(&model, 40_000, VIP).key.dst, REMOTE_TOO);
    assert_eq!(model.through(&ack(40_000, VIP)).key.dst, REMOTE_TOO);
}

#[test]
fn the_first_of_two_answers_to_one_opener_counts() {
    let model = one_remote();
    let other = model.backend(REMOTE_TOO, TCP, false);
    let first = model.through(&syn(40_000, VIP));
    model.frontend(VIP, TCP, &[other], 0);
    let second = model.through(&syn(40_000, VIP));
    model.through(&answer(&second, tcp::SYN | tcp::ACK));
    model.through(&answer(&first, tcp::SYN | tcp::ACK));
    assert_eq!(model.through(&ack(40_000, VIP)).key.dst, REMOTE_TOO);
}

#[test]
fn a_refused_connection_can_be_tried_again_at_once_and_is_then_established() {
    let model = one_remote();
    let seen = model.through(&syn(40_000, VIP));
    model.through(&answer(&seen, tcp::RST | tcp::ACK));
    handshake(&model, 40_000, VIP);
    assert_eq!((model.established.borrow().len(), model.embryonic.borrow().len()), (2, 0));
}

#[test]
fn udp_leaves_a_backend_that_is_gone_and_tcp_does_not() {
    let model = Model::new();
    for proto in [TCP, UDP] {
        let gone = model.backend(REMOTE, proto, false);
        let other = model.backend(REMOTE_TOO, proto, false);
        model.frontend(VIP, proto, &[gone], 0);
        let opener = if proto == TCP { syn(40_000, VIP) } else { datagram(CLIENT, 40_000, VIP, HTTP) };
        let next = if proto == TCP { ack(40_000, VIP) } else { opener };
        let seen = model.through(&opener);
        model.through(&answer(&seen, tcp::ACK & if proto == TCP { 0xff } else { 0 }));
        model.through(&next);
        model.through(&next);
        model.backends.borrow_mut()[gone as usize].generation += 1;
        model.frontend(VIP, proto, &[other], 0);
        let expected = if proto == TCP { REMOTE } else { REMOTE_TOO };
        assert_eq!(model.through(&next).key.dst, expected, "protocol {proto}");
    }
}

#[test]
fn a_full_established_table_keeps_flows_embryonic_and_counts_it() {
    let model = one_remote();
    for room in [0, 1] {
        model.established_max.set(room);
        let seen = model.through(&syn(40_000, VIP));
        model.through(&answer(&seen, tcp::SYN | tcp::ACK));
        assert_eq!(model.through(&ack(40_000, VIP)).key, seen.key);
        assert!(model.established.borrow().is_empty(), "no half is left behind");
    }
    assert_eq!(model.events(Event::EstablishedFull), 2);
    model.established_max.set(2);
    model.through(&ack(40_000, VIP));
    assert_eq!(model.established.borrow().len(), 2);
}

#[test]
fn running_out_of_source_ports_is_a_counted_drop() {
    let model = one_remote();
    let mut config = model.config.get();
    (config.snat_port_min, config.snat_port_max) = (5_000, 5_001);
    model.config.set(config);
    let forwarded =
        (40_000..40_010).filter(|&port| model.xdp(&syn(port, VIP)).action == Action::Transmit).count();
    assert_eq!(forwarded, 2);
    assert_eq!(model.drops(Reason::SnatExhausted), 8);
    let attempts: u64 = (0..SNAT_ATTEMPTS_MAX).map(|n| model.count_of(Counter::SnatAttempt(n))).sum();
    assert_eq!(attempts, 2, "an attempt is counted once per flow");
    let backend = BackendKey { addr: REMOTE, port: TARGET, proto: TCP, zero: 0 };
    assert_eq!(model.exhausted.take(), HashMap::from([(backend, 8)]));
}

#[test]
fn idle_flows_that_got_no_further_than_their_first_packets_give_up_their_ports() {
    let model = one_remote();
    let mut config = model.config.get();
    (config.snat_port_min, config.snat_port_max) = (5_000, 5_001);
    model.config.set(config);
    let kept = handshake(&model, 39_999, VIP);
    let idle = model.through(&syn(40_000, VIP));
    let refused = || assert_eq!(model.xdp(&syn(40_001, VIP)).action, Action::Drop(Reason::SnatExhausted));
    let pass = |seconds| {
        let mut config = model.config.get();
        config.clock += seconds;
        model.config.set(config);
    };
    pass(10);
    refused();
    model.through(&answer(&idle, tcp::SYN | tcp::ACK));
    pass(11);
    refused();
    model.through(&answer(&idle, tcp::RST));
    pass(11);
    let taken = model.through(&syn(40_001, VIP));
    assert_ne!(taken.key.sport, kept.key.sport, "an established flow keeps its port");
    assert_eq!(model.through(&answer(&taken, tcp::ACK)).key, syn(40_001, VIP).key.reversed());
    assert_eq!(model.events(Event::PortTakenOver), 1);
}

#[test]
fn no_flow_gives_up_its_port_while_others_are_free() {
    let model = one_remote();
    let mut config = model.config.get();
    (config.snat_port_min, config.snat_port_max) = (5_000, 5_999);
    model.config.set(config);
    for port in 5_000..5_500 {
        model.through(&syn(port, VIP));
    }
    config.clock += 60;
    model.config.set(config);
    for port in 40_000..40_250 {
        model.through(&syn(port, VIP));
    }
    // Of a chance of 1 in 2 to 3 in 4 eight times in a row, a few.
    assert!(model.events(Event::PortTakenOver) < 20, "{}", model.events(Event::PortTakenOver));
    // A packet that another CPU has just noted is not one of long ago.
    let model = one_remote();
    (config.snat_port_min, config.snat_port_max) = (5_000, 5_000);
    model.config.set(config);
    model.through(&syn(40_000, VIP));
    config.clock -= 1;
    model.config.set(config);
    assert_eq!(model.xdp(&syn(40_001, VIP)).action, Action::Drop(Reason::SnatExhausted));
}

#[test]
fn a_client_that_finds_no_port_meets_other_ports_later() {
    let model = one_remote();
    let tried = |model: &Model| {
        let reply = |port: u16| FlowKey {
            src: REMOTE,
            dst: NODE,
            sport: TARGET,
            dport: port.to_be_bytes(),
            proto: TCP,
            zero: [0; 3],
        };
        // Every port is another's: what is looked at is what the model is asked for.
        (1024..=29_999).filter(|&port| model.asked.borrow().contains(&reply(port))).count()
    };
    model.taken.set(true);
    for second in 0..4 {
        let mut config = model.config.get();
        config.clock += second;
        model.config.set(config);
        assert_eq!(model.xdp(&syn(40_000, VIP)).action, Action::Drop(Reason::SnatExhausted));
    }
    assert!(tried(&model) > 2 * SNAT_ATTEMPTS_MAX as usize, "{} ports", tried(&model));
}

#[test]
fn a_reset_that_its_ends_do_not_take_for_theirs_closes_nothing() {
    for is_local in [false, true] {
        let model = if is_local { one_local() } else { one_remote() };
        let seen = handshake(&model, 40_000, VIP);
        model.through(&segment(CLIENT, 40_000, VIP, HTTP, tcp::RST));
        model.through(&ack(40_000, VIP));
        model.through(&answer(&seen, tcp::ACK));
        let flows = model.established.borrow();
        assert!(flows.values().all(|flow| flow.get().closing == 0), "local {is_local}");
    }
}

#[test]
fn a_refused_insert_is_a_counted_drop() {
    let model = one_remote();
    model.refuse.set(1);
    assert_eq!(model.xdp(&syn(40_000, VIP)).action, Action::Drop(Reason::FlowInsert));
    assert_eq!((model.drops(Reason::FlowInsert), model.all_drops()), (1, 1));
    assert_eq!(model.xdp(&syn(40_000, VIP)).action, Action::Transmit);
}

#[test]
fn without_endpoints_a_node_address_passes_and_others_drop_with_their_reason() {
    let model = Model::new();
    model.frontend(NODE, TCP, &[], frontend::NODE_ADDRESS);
    model.frontend(VIP, TCP, &[], 0);
    model.frontend(VIP_TOO, TCP, &[], frontend::HAS_ENDPOINTS);
    assert_eq!(model.xdp(&syn(40_000, NODE)).action, Action::Pass);
    assert_eq!(model.xdp(&syn(40_000, VIP)).action, Action::Reject(Reason::NoEndpoint));
    assert_eq!(model.xdp(&syn(40_000, VIP_TOO)).action, Action::Drop(Reason::NoLocalEndpoint));
    assert_eq!((model.events(Event::NoEndpointPassed), model.all_drops()), (1, 2));
}

#[test]
fn frames_for_another_station_and_impossible_sources_open_nothing() {
    let model = one_remote();
    let mut overheard = syn(40_000, VIP);
    overheard.dmac = [2, 9, 9, 9, 9, 9];
    assert_eq!(model.xdp(&overheard).action, Action::Pass);
    for src in [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 5], [255, 255, 255, 255]] {
        assert_eq!(model.xdp(&segment(src, 40_000, VIP, HTTP, tcp::SYN)).action, Action::Pass);
    }
    assert!(model.embryonic.borrow().is_empty());
}

#[test]
fn an_answer_of_no_known_flow_is_left_to_the_kernel() {
    let model = one_remote();
    let stray = segment(REMOTE, 8080, NODE, 2_000u16.to_be_bytes(), tcp::ACK);
    assert_eq!(model.xdp(&stray).action, Action::Pass);
    assert_eq!(model.events(Event::Unclaimed), 1);
}

#[test]
fn a_lost_half_is_found_again_by_its_answerable_half() {
    let model = one_remote();
    let seen = handshake(&model, 40_000, VIP);
    (&model).remove(Table::Established, &ack(40_000, VIP).key);
    assert_eq!(model.through(&ack(40_000, VIP)).key, seen.key);
}
