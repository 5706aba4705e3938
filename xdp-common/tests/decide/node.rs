//! Pods by their devices, and the node without socket hooks.

use xdp_common::{
    frame::{Packet, tcp},
    net::TCP,
    tables::{Device, Table, Tables, device, frontend, kind},
    verdict::{Action, Event, Reason},
};

use crate::model::*;

const OTHER_POD: Addr = [10, 244, 1, 3];
const POD_DEVICE: u32 = 7;

/// A node with pods' devices, and a frontend with these backends.
fn node(backends: &[(Addr, bool)]) -> Model {
    let model = Model::new();
    let ids: Vec<u32> =
        backends.iter().map(|(addr, is_local)| model.backend(*addr, TCP, *is_local)).collect();
    model.frontend(VIP, TCP, &ids, 0);
    let of_pods = Device { snat: NODE, flags: 0, mtu: 0, mac: [0; 6], zero: [0; 2] };
    model.devices.borrow_mut().insert(device::OF_PODS, of_pods);
    model
}

fn from_pod(packet: Packet<Addr>) -> Packet<Addr> {
    // Pods send to their gateway, which need not be an interface of ours.
    Packet { ifindex: POD_DEVICE, dmac: [2, 0, 0, 0, 0, 9], ..packet }
}

fn call(src: Addr, flags: u8) -> Packet<Addr> {
    segment(src, 40_000, VIP, HTTP, flags)
}

#[test]
fn what_a_pod_sends_is_translated_whatever_its_checksum_and_the_answer_is_restored_at_its_device() {
    for backend in [(OTHER_POD, true), (REMOTE, false)] {
        let model = node(&[backend]);
        let verdict = model.pod(&from_pod(call(LOCAL, tcp::SYN)));
        assert_eq!(verdict.action, Action::Stack);
        let seen = rewritten(&call(LOCAL, tcp::SYN), &verdict);
        assert_eq!((seen.key.src, seen.key.dst, seen.key.dport), (LOCAL, backend.0, TARGET));
        assert_eq!(seen.key.sport, call(LOCAL, 0).key.sport, "the pod keeps its port");
        let reply = answer(&seen, tcp::SYN | tcp::ACK);
        let restored = rewritten(&reply, &model.egress(&reply));
        assert_eq!(restored.key, call(LOCAL, 0).key.reversed());
        assert_eq!(model.pod(&from_pod(call(LOCAL, tcp::ACK))).action, Action::Stack);
        assert_eq!(model.events(Event::FlowEstablished), 1);
    }
}

#[test]
fn a_pod_that_meets_itself_is_turned_around_with_the_nodes_address() {
    let model = node(&[(LOCAL, true)]);
    for flags in [tcp::SYN, tcp::ACK, tcp::ACK] {
        let there = model.pod(&from_pod(call(LOCAL, flags)));
        assert_eq!(there.action, Action::Transmit);
        let seen = rewritten(&call(LOCAL, flags), &there);
        assert_eq!((seen.key.src, seen.key.dst), (NODE, LOCAL));
        let reply = from_pod(answer(&seen, tcp::ACK));
        let back = model.pod(&reply);
        assert_eq!(back.action, Action::Transmit);
        assert_eq!(rewritten(&reply, &back).key, call(LOCAL, 0).key.reversed());
    }
    assert_eq!(model.events(Event::FlowEstablished), 1);
}

#[test]
fn a_pod_is_refused_and_counted_as_others_are() {
    let model = node(&[]);
    assert_eq!(model.pod(&from_pod(call(LOCAL, tcp::SYN))).action, Action::Reject(Reason::NoEndpoint));
    assert_eq!(model.drops(Reason::NoEndpoint), 1);
    let elsewhere = segment(LOCAL, 40_000, REMOTE, TARGET, tcp::SYN);
    assert_eq!(model.pod(&from_pod(elsewhere)).action, Action::Pass, "not everything is a Service");
}

#[test]
fn what_the_node_sends_elsewhere_takes_a_port_of_ours_and_its_answer_goes_up_whole() {
    let model = node(&[(REMOTE, false)]);
    for flags in [tcp::SYN, tcp::ACK, tcp::ACK] {
        let out = model.out(&call(NODE, flags));
        assert_eq!(out.action, Action::Redirect);
        let seen = rewritten(&call(NODE, flags), &out);
        assert_eq!((seen.key.src, seen.key.dst), (NODE, REMOTE));
        assert!(
            (1024..=29_999).contains(&u16::from_be_bytes(seen.key.sport)),
            "XDP would not know the answer"
        );
        let reply = answer(&seen, tcp::ACK);
        let back = model.xdp(&reply);
        assert_eq!(back.action, Action::Stack);
        assert_eq!(rewritten(&reply, &back).key, call(NODE, 0).key.reversed());
    }
    assert_eq!(model.events(Event::FlowEstablished), 1);
}

#[test]
fn what_the_node_sends_to_a_backend_here_comes_in_from_the_frontends_address_and_so_does_the_answer() {
    // One of them on the node's own address.
    for here in [LOCAL, NODE] {
        let model = node(&[(here, true)]);
        for flags in [tcp::SYN, tcp::ACK, tcp::ACK] {
            let out = model.out(&call(NODE, flags));
            assert_eq!(out.action, Action::Transmit);
            let seen = rewritten(&call(NODE, flags), &out);
            assert_eq!((seen.key.src, seen.key.dst), (VIP, here), "its own address is a martian");
            let reply = answer(&seen, tcp::ACK);
            let back = model.egress(&reply);
            assert_eq!(back.action, Action::Transmit);
            assert_eq!(rewritten(&reply, &back).key, call(NODE, 0).key.reversed());
        }
        let reply = model.flow(Table::Established, &answer(&seen_of(&model), tcp::ACK).key);
        assert_eq!(reply.map(|flow| flow.kind), Some(kind::REPLY_LOCAL));
    }
}

fn seen_of(model: &Model) -> Packet<Addr> {
    let packet = call(NODE, tcp::ACK);
    rewritten(&packet, &model.out(&packet))
}

#[test]
fn on_the_nodes_own_address_the_kernel_refuses_what_it_sends_itself() {
    let model = Model::new();
    model.frontend(NODE, TCP, &[], frontend::NODE_ADDRESS);
    let own = segment(NODE, 40_000, NODE, HTTP, tcp::SYN);
    assert_eq!(model.out(&own).action, Action::Pass);
    assert_eq!(model.events(Event::NoEndpointPassed), 1);
}
