//! How packets leave: fast path, slow path, and what each hook does.

use xdp_common::{
    checksum,
    frame::{Packet, tcp},
    net::TCP,
    tables::{Config, Device, Route, device},
    verdict::{Action, Event, Hop},
};

use crate::model::*;

fn established() -> (Model, Packet<[u8; 4]>) {
    let model = Model::new();
    let id = model.backend(REMOTE, TCP, false);
    model.frontend(VIP, TCP, &[id], 0);
    let seen = model.through(&syn(40_000, VIP));
    for _ in 0..2 {
        model.through(&answer(&seen, tcp::ACK));
        model.through(&ack(40_000, VIP));
    }
    (model, seen)
}

fn raise_epoch(model: &Model) {
    model.config.set(Config { epoch: model.config.get().epoch + 1, ..model.config.get() });
}

#[test]
fn an_established_flow_asks_for_its_next_hop_once_per_routing_epoch() {
    let (model, _) = established();
    let asked = model.events(Event::HopRefreshed);
    for _ in 0..3 {
        let verdict = model.xdp(&ack(40_000, VIP));
        assert_eq!(verdict.action, Action::Transmit);
        assert_eq!(verdict.hop, Hop { dmac: GATEWAY_MAC, smac: OUR_MAC, ifindex: UPLINK });
    }
    assert_eq!(model.events(Event::HopRefreshed), asked);
    let moved = [2, 0, 0, 0, 0, 7];
    model.route.set(Route::Hop { ifindex: UPLINK, dmac: moved, smac: OUR_MAC, mtu: 1500 });
    raise_epoch(&model);
    assert_eq!(model.xdp(&ack(40_000, VIP)).hop.dmac, moved);
    assert_eq!(model.xdp(&ack(40_000, VIP)).hop.dmac, moved);
    assert_eq!(model.events(Event::HopRefreshed), asked + 1);
}

#[test]
fn without_a_neighbour_both_directions_take_the_slow_path_and_arrive_whole() {
    let model = Model::new();
    let id = model.backend(REMOTE, TCP, false);
    model.frontend(VIP, TCP, &[id], 0);
    model.route.set(Route::NoNeighbour { ifindex: UPLINK });
    let verdict = model.xdp(&syn(40_000, VIP));
    assert_eq!(verdict.action, Action::Stack);
    assert_eq!(verdict.rewrite.src, CLIENT, "the kernel must not see one of its own addresses as a source");
    let seen = model.through(&syn(40_000, VIP));
    assert_eq!((seen.key.src, seen.key.dst), (NODE, REMOTE));
    let reply = answer(&seen, tcp::SYN | tcp::ACK);
    assert_eq!(model.xdp(&reply).rewrite.src, REMOTE);
    assert_eq!(model.through(&reply).key, syn(40_000, VIP).key.reversed());
    assert!(model.events(Event::SlowPath) >= 4 && model.events(Event::Finished) >= 2);
    model.route.set(gateway());
    assert_eq!(model.xdp(&ack(40_000, VIP)).action, Action::Transmit, "as soon as there is a neighbour");
}

#[test]
fn the_slow_path_keeps_flows_apart_that_share_client_port_and_backend() {
    let model = Model::new();
    let id = model.backend(REMOTE, TCP, false);
    model.frontend(VIP, TCP, &[id], 0);
    model.frontend(VIP_TOO, TCP, &[id], 0);
    model.route.set(Route::NoNeighbour { ifindex: UPLINK });
    for vip in [VIP, VIP_TOO] {
        let seen = model.through(&syn(40_000, vip));
        let back = model.through(&answer(&seen, tcp::SYN | tcp::ACK));
        assert_eq!(back.key, syn(40_000, vip).key.reversed());
    }
}

#[test]
fn packets_over_the_mtu_and_on_their_last_hop_go_by_the_kernel() {
    let (model, seen) = established();
    let mut long = ack(40_000, VIP);
    long.total_len = 1501;
    let mut last = ack(40_000, VIP);
    last.ttl = 1;
    let mut reply = answer(&seen, tcp::ACK);
    reply.ttl = 1;
    for packet in [long, last, reply] {
        assert_eq!(model.xdp(&packet).action, Action::Stack);
    }
    assert_eq!(model.events(Event::SlowPath), 3);
}

#[test]
fn a_device_that_takes_no_redirect_is_reached_by_the_kernel() {
    for (flags, expected) in [(0, Action::Stack), (device::REDIRECT, Action::Redirect)] {
        let model = Model::new();
        let id = model.backend(REMOTE, TCP, false);
        model.frontend(VIP, TCP, &[id], 0);
        let other = Device { snat: [10, 9, 9, 9], flags, mtu: 1400, mac: OUR_MAC, zero: [0; 2] };
        model.devices.borrow_mut().insert(7, other);
        model.route.set(Route::Hop { ifindex: 7, dmac: GATEWAY_MAC, smac: OUR_MAC, mtu: 0 });
        assert_eq!(model.xdp(&syn(40_000, VIP)).action, expected);
        assert_eq!(model.through(&syn(40_000, VIP)).key.src, [10, 9, 9, 9], "the source follows the device");
    }
}

#[test]
fn the_source_follows_the_way_where_a_device_is_in_several_networks() {
    for (flags, expected) in [(0, NODE), (device::SEVERAL, [10, 20, 0, 1])] {
        let model = Model::new();
        let id = model.backend(REMOTE, TCP, false);
        model.frontend(VIP, TCP, &[id], 0);
        model.devices.borrow_mut().get_mut(&UPLINK).unwrap().flags |= flags;
        model.sources.borrow_mut().insert(REMOTE, [10, 20, 0, 1]);
        assert_eq!(model.through(&syn(40_000, VIP)).key.src, expected);
        let elsewhere = model.backend([10, 244, 9, 9], TCP, false);
        model.frontend(VIP, TCP, &[elsewhere], 0);
        assert_eq!(model.through(&syn(40_001, VIP)).key.src, NODE, "nothing is said of that way");
    }
}

#[test]
fn a_backend_behind_an_unmanaged_device_keeps_the_clients_address() {
    let model = Model::new();
    let id = model.backend(REMOTE, TCP, false);
    model.frontend(VIP, TCP, &[id], 0);
    model.route.set(Route::Hop { ifindex: 99, dmac: GATEWAY_MAC, smac: OUR_MAC, mtu: 1500 });
    let verdict = model.xdp(&syn(40_000, VIP));
    assert_eq!((verdict.action, verdict.rewrite.src), (Action::Stack, CLIENT));
    assert_eq!(model.events(Event::UnmanagedEgress), 1);
    let reply = answer(&rewritten(&syn(40_000, VIP), &verdict), tcp::SYN | tcp::ACK);
    assert_eq!(rewritten(&reply, &model.egress(&reply)).key, syn(40_000, VIP).key.reversed());
}

#[test]
fn a_checksum_left_to_the_device_is_left_to_tc_by_xdp_and_every_other_to_xdp_by_tc() {
    let (model, _) = established();
    let finished = ack(40_000, VIP);
    let mut offloaded = finished;
    offloaded.check = checksum::pseudo_header(offloaded.key.addresses_sum(), TCP, offloaded.l4_len);
    assert_eq!(model.xdp(&offloaded).action, Action::Pass);
    assert_eq!(model.tc(&finished).action, Action::Pass);
    assert_eq!(model.events(Event::Deferred), 1);
    let verdict = model.tc(&offloaded);
    assert_eq!((verdict.action, verdict.rewrite.src), (Action::Stack, CLIENT));
    let half = rewritten(&offloaded, &verdict);
    assert_eq!(rewritten(&half, &model.egress(&half)).key.src, NODE);
}

#[test]
fn the_other_direction_of_a_node_local_flow_is_not_taken_for_a_reply_at_ingress() {
    let model = Model::new();
    let id = model.backend(LOCAL, TCP, true);
    model.frontend(VIP, TCP, &[id], 0);
    let seen = model.through(&syn(40_000, VIP));
    // A forged reply from the wire: no ingress entry has this key.
    assert_eq!(model.xdp(&answer(&seen, tcp::ACK)).action, Action::Pass);
    assert_eq!(model.egress(&syn(40_000, VIP)).action, Action::Pass);
}

#[test]
fn a_flow_that_comes_in_by_another_interface_leaves_by_the_one_its_route_names() {
    const OTHER: u32 = UPLINK + 1;
    let (model, _) = established();
    let other = Device { mac: [2, 0, 0, 0, 0, 3], ..model.devices.borrow()[&UPLINK] };
    model.device(OTHER, other);
    let refreshed = model.events(Event::HopRefreshed);
    for (ifindex, action) in [
        (UPLINK, Action::Transmit),
        (OTHER, Action::Redirect),
        (OTHER, Action::Redirect),
        (UPLINK, Action::Transmit),
    ] {
        let dmac = model.devices.borrow()[&ifindex].mac;
        let verdict = model.xdp(&Packet { ifindex, dmac, ..ack(40_000, VIP) });
        assert_eq!((verdict.action, verdict.hop.ifindex), (action, UPLINK), "in by {ifindex}");
    }
    assert_eq!(model.events(Event::HopRefreshed), refreshed + 2, "once for each change");
}
