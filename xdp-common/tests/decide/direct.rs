//! Direct server return: which flows go through tunnels, and what becomes of them.

use xdp_common::{
    frame::{Packet, tcp},
    net::{SCTP, TCP, UDP},
    tables::{Backend, Flow, Route, Table, Tables, backend, direct, exit, frontend, kind, network},
    verdict::{Action, Event, Reason},
};

use crate::model::*;

/// The node of the backends elsewhere.
const OTHER_NODE: Addr = [192, 168, 70, 20];

/// Lets a backend be on another node, to which packets may go as they are.
fn on(model: &Model, id: u32, node: Addr) {
    let backend = Backend { node, ..model.backends.borrow()[id as usize] };
    model.set_backend(id, backend);
}

fn answers_directly(model: &Model, direct: u32) {
    let mut config = model.config.get();
    config.direct = direct;
    model.config.set(config);
}

/// A frontend of TCP and UDP with one backend on another node.
fn one_elsewhere() -> Model {
    let model = Model::new();
    answers_directly(&model, direct::TCP | direct::OTHERS);
    model.networks.borrow_mut().insert((network::SELF, NODE));
    for proto in [TCP, UDP, SCTP] {
        let id = model.backend(REMOTE, proto, false);
        on(&model, id, OTHER_NODE);
        model.frontend(VIP, proto, &[id], 0);
    }
    model
}

/// The same packet, taken out of one of another node.
fn tunnelled(packet: Packet<Addr>) -> Packet<Addr> {
    Packet { is_tunnelled: true, ..packet }
}

fn goes_to(model: &Model, packet: &Packet<Addr>) -> Option<Addr> {
    let verdict = model.xdp(packet);
    (verdict.action == Action::Tunnel).then_some(verdict.rewrite.dst)
}

#[test]
fn packets_go_to_the_node_of_their_backend_by_one_entry_that_reserves_nothing() {
    let model = one_elsewhere();
    for packet in [syn(40_000, VIP), datagram(CLIENT, 40_000, VIP, HTTP)] {
        let verdict = model.xdp(&packet);
        assert_eq!(verdict.action, Action::Tunnel);
        assert_eq!((verdict.rewrite.src, verdict.rewrite.dst), (NODE, OTHER_NODE));
        assert_eq!((verdict.hop.ifindex, verdict.hop.dmac), (UPLINK, GATEWAY_MAC));
    }
    assert_eq!((model.embryonic.borrow().len(), model.established.borrow().len()), (2, 0));
    assert_eq!(goes_to(&model, &syn(40_000, VIP)), Some(OTHER_NODE), "sent again");
    assert_eq!(model.established.borrow().len(), 0, "an opener establishes nothing");
    for packet in [ack(40_000, VIP), datagram(CLIENT, 40_000, VIP, HTTP)] {
        assert_eq!(goes_to(&model, &packet), Some(OTHER_NODE));
    }
    assert_eq!((model.embryonic.borrow().len(), model.established.borrow().len()), (0, 2));
    assert_eq!((model.events(Event::FlowNew), model.events(Event::FlowEstablished)), (2, 2));
    assert_eq!(goes_to(&model, &ack(40_000, VIP)), Some(OTHER_NODE), "by the fast path");
    assert_eq!(model.events(Event::Tunnelled), 6);
}

#[test]
fn a_flow_keeps_its_node_when_the_ring_changes_and_finds_one_in_its_midst() {
    let model = one_elsewhere();
    for packet in [syn(40_000, VIP), ack(40_000, VIP), syn(40_001, VIP)] {
        assert_eq!(goes_to(&model, &packet), Some(OTHER_NODE));
    }
    let id = model.backend(REMOTE_TOO, TCP, false);
    on(&model, id, [192, 168, 70, 30]);
    model.frontend(VIP, TCP, &[id], 0);
    for port in [40_000, 40_001] {
        assert_eq!(goes_to(&model, &ack(port, VIP)), Some(OTHER_NODE), "{port}");
    }
    // Of a connection that has entered by another node until now.
    assert_eq!(goes_to(&model, &ack(40_002, VIP)), Some([192, 168, 70, 30]));
    // Without an entry, because tables refuse it, a packet still goes where the ring says.
    model.refuse.set(u32::MAX);
    assert_eq!(goes_to(&model, &ack(40_003, VIP)), Some([192, 168, 70, 30]));
    assert_eq!(model.all_drops(), 0);
}

#[test]
fn a_full_table_leaves_a_flow_among_the_new_ones() {
    let model = one_elsewhere();
    model.established_max.set(0);
    for packet in [syn(40_000, VIP), ack(40_000, VIP), ack(40_000, VIP)] {
        assert_eq!(goes_to(&model, &packet), Some(OTHER_NODE));
    }
    assert_eq!((model.embryonic.borrow().len(), model.events(Event::EstablishedFull)), (1, 2));
}

/// What stays as it was with direct server return on: the source becomes this node's.
#[test]
fn what_the_other_node_could_not_answer_is_translated_as_ever() {
    let pod = [10, 244, 3, 3];
    let offloaded = |mut packet: Packet<Addr>| {
        packet.check = xdp_common::checksum::pseudo_header(packet.key.addresses_sum(), TCP, packet.l4_len);
        packet
    };
    let is_translated = |name: &str, model: &Model, packet: &Packet<Addr>| {
        let verdict = model.xdp(packet);
        assert_eq!((verdict.action, verdict.rewrite.src), (Action::Transmit, NODE), "{name}");
        assert_eq!(model.events(Event::Tunnelled), 0, "{name}");
    };
    let model = one_elsewhere();
    answers_directly(&model, direct::TCP);
    is_translated("UDP, where only TCP is direct", &model, &datagram(CLIENT, 40_000, VIP, HTTP));
    answers_directly(&model, 0);
    is_translated("all, where nothing is", &model, &syn(40_000, VIP));
    let model = one_elsewhere();
    model.networks.borrow_mut().insert((network::PODS, pod));
    is_translated("a pod", &model, &segment(pod, 40_000, VIP, HTTP, tcp::SYN));
    is_translated("what has come by a tunnel", &model, &tunnelled(syn(40_000, VIP)));
    let model = one_elsewhere();
    on(&model, 1, [0; 4]);
    is_translated("a node that is not known", &model, &syn(40_000, VIP));
    for flag in [frontend::NODE_PORT, frontend::NODE_ADDRESS] {
        let model = one_elsewhere();
        model.frontend(VIP, TCP, &[1], flag);
        is_translated("an address of this node", &model, &syn(40_000, VIP));
    }
    let model = one_elsewhere();
    model.routes.borrow_mut().insert(OTHER_NODE, Route::Kernel);
    is_translated("a node without a way", &model, &syn(40_000, VIP));
    let model = one_elsewhere();
    model.networks.borrow_mut().remove(&(network::SELF, NODE));
    is_translated("from an address that the other node does not know", &model, &syn(40_000, VIP));
    // Left to tc ingress by XDP, and translated in half there.
    let model = one_elsewhere();
    let packet = offloaded(syn(40_000, VIP));
    assert_eq!(model.xdp(&packet).action, Action::Pass);
    assert_eq!(model.tc(&packet).action, Action::Stack);
    assert_eq!(model.events(Event::Tunnelled), 0);
}

#[test]
fn a_backend_on_this_node_gets_what_comes_by_a_tunnel() {
    let model = Model::new();
    answers_directly(&model, direct::TCP);
    let id = model.backend(LOCAL, TCP, true);
    model.frontend(VIP, TCP, &[id], 0);
    let packet = tunnelled(syn(40_000, VIP));
    let verdict = model.xdp(&packet);
    assert_eq!((verdict.action, verdict.rewrite.src, verdict.rewrite.dst), (Action::Stack, CLIENT, LOCAL));
    let reply = answer(&rewritten(&packet, &verdict), tcp::SYN | tcp::ACK);
    assert_eq!(rewritten(&reply, &model.egress(&reply)).key, syn(40_000, VIP).key.reversed());
}

/// Two nodes that each take the other for the backend's must not send a packet to and fro.
#[test]
fn what_has_come_by_a_tunnel_goes_through_no_other_whatever_was_known_of_its_flow() {
    let model = one_elsewhere();
    for packet in [syn(40_000, VIP), ack(40_000, VIP)] {
        assert_eq!(goes_to(&model, &packet), Some(OTHER_NODE));
    }
    let sent = tunnelled(ack(40_000, VIP));
    let verdict = model.xdp(&sent);
    assert_eq!((verdict.action, verdict.rewrite.src, verdict.rewrite.dst), (Action::Transmit, NODE, REMOTE));
    assert_eq!(model.events(Event::FlowRenewed), 1);
    let reply = answer(&rewritten(&sent, &verdict), tcp::ACK);
    assert_eq!(rewritten(&reply, &model.xdp(&reply)).key, sent.key.reversed());
    let next = model.xdp(&ack(40_000, VIP));
    assert_eq!(next.action, Action::Transmit, "answered, it stays translated");
}

#[test]
fn udp_and_openers_leave_a_backend_that_is_gone_and_connections_stay() {
    let model = one_elsewhere();
    let udp = datagram(CLIENT, 40_000, VIP, HTTP);
    for packet in [syn(40_000, VIP), ack(40_000, VIP), udp, udp] {
        assert_eq!(goes_to(&model, &packet), Some(OTHER_NODE));
    }
    let next = [192, 168, 70, 30];
    for (proto, id) in [(TCP, 1), (UDP, 2)] {
        let gone = Backend { generation: 2, ..model.backends.borrow()[id as usize] };
        model.set_backend(id, gone);
        let id = model.backend(REMOTE_TOO, proto, false);
        on(&model, id, next);
        model.frontend(VIP, proto, &[id], 0);
    }
    assert_eq!(goes_to(&model, &udp), Some(next));
    assert_eq!(goes_to(&model, &ack(40_000, VIP)), Some(OTHER_NODE), "a connection stays");
    assert_eq!(goes_to(&model, &syn(40_000, VIP)), Some(next), "a new one does not");
    assert_eq!(model.events(Event::FlowRenewed), 2);
}

#[test]
fn the_tuple_of_a_closed_connection_may_be_used_again() {
    let model = one_elsewhere();
    for flags in [tcp::SYN, tcp::ACK, tcp::FIN | tcp::ACK] {
        assert_eq!(goes_to(&model, &segment(CLIENT, 40_000, VIP, HTTP, flags)), Some(OTHER_NODE));
    }
    assert_eq!(goes_to(&model, &syn(40_000, VIP)), Some(OTHER_NODE));
    assert_eq!(model.events(Event::FlowRenewed), 1);
    assert_eq!((model.embryonic.borrow().len(), model.established.borrow().len()), (1, 0));
}

#[test]
fn what_is_too_long_for_the_tunnel_is_refused_with_the_length_that_gets_through() {
    let model = one_elsewhere();
    let long = |len| Packet { total_len: len, ..ack(40_000, VIP) };
    for packet in [syn(40_000, VIP), long(1_480), long(1_480)] {
        assert_eq!(goes_to(&model, &packet), Some(OTHER_NODE));
    }
    let verdict = model.xdp(&long(1_481));
    assert_eq!((verdict.action, verdict.mtu), (Action::Reject(Reason::TunnelMtu), 1_480));
    assert_eq!(model.drops(Reason::TunnelMtu), 1);
    // The same after the way was asked for again, and again.
    for epoch in 2..5 {
        let mut config = model.config.get();
        config.epoch = epoch;
        model.config.set(config);
        assert_eq!(model.xdp(&long(1_481)).mtu, 1_480);
        assert_eq!(goes_to(&model, &long(1_480)), Some(OTHER_NODE));
    }
}

#[test]
fn what_the_kernel_has_merged_is_not_too_long_because_it_is_shortened_packet_by_packet() {
    let model = one_elsewhere();
    for packet in [syn(40_000, VIP), ack(40_000, VIP)] {
        assert_eq!(goes_to(&model, &packet), Some(OTHER_NODE));
    }
    let mut merged = Packet { total_len: 30_000, l4_len: 29_980, ..ack(40_000, VIP) };
    merged.check = xdp_common::checksum::pseudo_header(merged.key.addresses_sum(), TCP, merged.l4_len);
    assert_eq!(model.xdp(&merged).action, Action::Pass);
    let verdict = model.tc(&merged);
    assert_eq!((verdict.action, verdict.rewrite.dst), (Action::Tunnel, OTHER_NODE));
    assert_eq!(model.all_drops(), 0);
}

#[test]
fn where_tunnels_are_switched_off_or_a_node_has_another_address_known_flows_leave_theirs() {
    let udp = datagram(CLIENT, 40_000, VIP, HTTP);
    let model = one_elsewhere();
    for packet in [syn(40_000, VIP), ack(40_000, VIP), udp, udp] {
        assert_eq!(goes_to(&model, &packet), Some(OTHER_NODE));
    }
    let next = [192, 168, 70, 30];
    on(&model, 2, next);
    assert_eq!(goes_to(&model, &udp), Some(next), "another address");
    assert_eq!(goes_to(&model, &ack(40_000, VIP)), Some(OTHER_NODE));
    answers_directly(&model, 0);
    for packet in [ack(40_000, VIP), udp] {
        let verdict = model.xdp(&packet);
        assert_eq!((verdict.action, verdict.rewrite.src), (Action::Transmit, NODE), "switched off");
    }
}

#[test]
fn what_has_come_by_a_tunnel_is_refused_without_an_answer() {
    let model = one_elsewhere();
    model.frontend(VIP, TCP, &[], 0);
    assert_eq!(model.xdp(&syn(40_000, VIP)).action, Action::Reject(Reason::NoEndpoint));
    let verdict = model.xdp(&tunnelled(syn(40_000, VIP)));
    assert_eq!(verdict.action, Action::Drop(Reason::NoEndpoint));
    assert_eq!(model.drops(Reason::NoEndpoint), 2);
}

#[test]
fn without_a_neighbour_tc_ingress_sends_what_xdp_leaves_alone() {
    let model = one_elsewhere();
    model.route.set(Route::NoNeighbour { ifindex: UPLINK });
    for (at, flags) in [tcp::SYN, tcp::SYN, tcp::ACK, tcp::ACK].into_iter().enumerate() {
        let packet = segment(CLIENT, 40_000, VIP, HTTP, flags);
        assert_eq!(model.xdp(&packet).action, Action::Pass, "{at}");
        let verdict = model.tc(&packet);
        assert_eq!(
            (verdict.action, verdict.rewrite.dst, verdict.hop.ifindex),
            (Action::Tunnel, OTHER_NODE, UPLINK)
        );
    }
    model.route.set(gateway());
    let mut config = model.config.get();
    config.epoch += 1;
    model.config.set(config);
    assert_eq!(goes_to(&model, &ack(40_000, VIP)), Some(OTHER_NODE), "as soon as there is one");
    // On its last hop a packet is the kernel's, which says so to the client.
    let last = Packet { ttl: 1, ..ack(40_000, VIP) };
    assert_eq!((model.xdp(&last).action, model.tc(&last).action), (Action::Pass, Action::Pass));
    // A flow that is not direct, and one that is nobody's, are left alone by tc as ever.
    model.frontend(VIP_TOO, TCP, &[], frontend::NODE_ADDRESS);
    assert_eq!(model.tc(&syn(40_000, VIP_TOO)).action, Action::Pass);
    assert_eq!(model.embryonic.borrow().len(), 0);
}

#[test]
fn a_connection_whose_endpoint_is_gone_is_reset_where_that_is_asked_for() {
    let model = one_elsewhere();
    for packet in [syn(40_000, VIP), ack(40_000, VIP)] {
        assert_eq!(goes_to(&model, &packet), Some(OTHER_NODE));
    }
    for entry in model.established.borrow().values() {
        entry.set(Flow { exit: entry.get().exit | exit::RESET, ..entry.get() });
    }
    assert_eq!(model.xdp(&ack(40_000, VIP)).action, Action::Reject(Reason::EndpointRemoved));
    let reset = segment(CLIENT, 40_000, VIP, HTTP, tcp::RST);
    assert_eq!(goes_to(&model, &reset), Some(OTHER_NODE), "the client's own reset goes on");
}

#[test]
fn affinity_and_the_lists_are_those_of_other_flows() {
    let model = Model::new();
    answers_directly(&model, direct::TCP);
    model.networks.borrow_mut().insert((network::SELF, NODE));
    model.affinity_seconds.set(100);
    let ids = [REMOTE, REMOTE_TOO].map(|addr| model.backend(addr, TCP, false));
    on(&model, ids[0], OTHER_NODE);
    on(&model, ids[1], [192, 168, 70, 30]);
    model.frontend(VIP, TCP, &ids, 0);
    let first = goes_to(&model, &syn(40_000, VIP));
    assert!(first.is_some());
    for port in 40_001..40_020 {
        assert_eq!(goes_to(&model, &syn(port, VIP)), first);
    }
    let entry = model.flow(Table::Embryonic, &syn(40_000, VIP).key).unwrap();
    assert_eq!((entry.kind, entry.exit), (kind::TUNNEL, exit::TUNNEL));
    assert_eq!(model.backends.borrow()[1].flags & backend::LOCAL, 0);
}
