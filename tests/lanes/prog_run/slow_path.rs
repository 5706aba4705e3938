//! What XDP cannot finish goes up the stack half-translated, and egress finishes it, in both directions.

use xdp_common::{
    net::{SCTP, TCP, UDP},
    tables::{Device, WAYS},
    verdict::{
        Counter::{self, Event, SnatAttempt},
        Event as E,
    },
};

use crate::{forwarding::one_remote, frames::*, node::*};

const SLOW: &[Counter] = &[Event(E::SlowPath)];
const NEW_SLOW: &[Counter] = &[Event(E::FlowNew), SnatAttempt(0), Event(E::SlowPath)];

/// Checks both halves of the way of a client's packet and returns the source port that the backend sees.
fn up_and_out(node: &Node, name: &str, sent: &Frame, backend: Addr, snat: Addr, counts: &[Counter]) -> u16 {
    let port = source_port(&node.run(node.entry, &sent.bytes()).frame);
    // Asked twice: the first run has opened the flow and counted it.
    let counts = if counts == NEW_SLOW { SLOW } else { counts };
    let half = sent.with(|frame| {
        frame.src.1 = port;
        frame.dst = (backend, TARGET);
    });
    node.check(name, node.entry, &sent.bytes(), Action::Pass, &half.bytes(), counts);
    finished(node, name, &half, |frame| frame.src = (snat, port));
    port
}

/// Checks the second half: the kernel has routed the packet, and egress translates the rest.
fn finished(node: &Node, name: &str, half: &Frame, edit: impl FnOnce(&mut Frame)) {
    let routed = half.with(|frame| {
        frame.mac = (node.mac, [2, 0, 0, 0, 0, 0x55]);
        frame.ttl = 63;
    });
    let whole = routed.with(edit);
    node.check(name, Hook::TcEgress, &routed.bytes(), Action::Pass, &whole.bytes(), &[Event(E::Finished)]);
}

/// Checks that the answer to an opener, which the backend has seen from this port, finds its way back.
fn answered(node: &Node, opener: &Frame, port: u16) {
    let reply = opener.flags(SYN | ACK).with(|frame| {
        frame.src = (UNRESOLVED, TARGET);
        frame.dst = (NODE, port);
    });
    let back = reply.with(|frame| {
        frame.mac = (node.mac, GATEWAY_MAC);
        frame.ttl -= 1;
        (frame.src, frame.dst) = (opener.dst, opener.src);
    });
    let transmitted = [Event(E::Transmitted)];
    node.check("the answer", node.entry, &reply.bytes(), Action::Transmit, &back.bytes(), &transmitted);
}

#[test]
fn a_new_flow_on_the_slow_path_counts_itself_once() {
    Node::each(|node| {
        let id = node.backend(UNRESOLVED, TCP, false);
        node.frontend(VIP, TCP, &[id], 0);
        let opener = node.opener(TCP, 2_000, VIP);
        let half = opener.with(|frame| frame.dst = (UNRESOLVED, TARGET));
        for counts in [NEW_SLOW, SLOW] {
            node.check("an opener", node.entry, &opener.bytes(), Action::Pass, &half.bytes(), counts);
        }
    });
}

#[test]
fn without_a_neighbour_packets_take_the_kernels_way_and_arrive_whole() {
    Node::each(|node| {
        for proto in [TCP, UDP, SCTP] {
            let id = node.backend(UNRESOLVED, proto, false);
            node.frontend(VIP, proto, &[id], 0);
            let opener = node.opener(proto, 40_000, VIP);
            let port = up_and_out(node, "the opener", &opener, UNRESOLVED, NODE, NEW_SLOW);
            answered(node, &opener, port);
            let next = opener.flags(ACK).payload(b"data");
            let before = node.maps.established_entries();
            up_and_out(node, "data", &next, UNRESOLVED, NODE, SLOW);
            assert_eq!(node.maps.established_entries(), before + 2, "the slow path establishes too");
        }
    });
}

#[test]
fn a_new_flow_has_room_for_its_entries_beside_answered_ones() {
    Node::each_sized(Sizes { buckets: 1, ..Sizes::default() }, |node| {
        one_remote(node);
        for sport in 0..WAYS as u16 {
            let answered = node.open("a flow", &node.opener(TCP, 2_000 + sport, VIP), REMOTE);
            answered.answers(node, "its answer", SYN | ACK, &[]);
        }
        let id = node.backend(UNRESOLVED, TCP, false);
        node.frontend(VIP_TOO, TCP, &[id], 0);
        let opener = node.opener(TCP, 3_000, VIP_TOO);
        let port = up_and_out(node, "the opener", &opener, UNRESOLVED, NODE, NEW_SLOW);
        answered(node, &opener, port);
    });
}

#[test]
fn as_soon_as_there_is_a_neighbour_packets_leave_directly() {
    Node::each(|node| {
        let id = node.backend(UNRESOLVED, TCP, false);
        node.frontend(VIP, TCP, &[id], 0);
        let opener = node.opener(TCP, 40_000, VIP);
        let port = up_and_out(node, "without", &opener, UNRESOLVED, NODE, NEW_SLOW);
        let mac = [2, 0, 0, 0, 0, 0x55];
        node.namespace
            .static_neighbour("eth0", node.family.ip(UNRESOLVED), mac)
            .expect("a neighbour can be added");
        let whole = opener.with(|frame| {
            frame.mac = (node.mac, mac);
            frame.ttl -= 1;
            (frame.src, frame.dst) = ((NODE, port), (UNRESOLVED, TARGET));
        });
        let transmitted = [Event(E::Transmitted)];
        node.check("with", node.entry, &opener.bytes(), Action::Transmit, &whole.bytes(), &transmitted);
    });
}

#[test]
fn packets_on_their_last_hop_or_over_the_mtu_go_by_the_kernel_in_both_directions() {
    Node::each(|node| {
        one_remote(node);
        for proto in [TCP, UDP, SCTP] {
            let flow = node.connect("a flow", &node.opener(proto, 40_000, VIP), REMOTE);
            let header = node.family.header_len() + l4_header_len(proto);
            let forms: [Form; 4] = [
                ("on its last hop", &|frame| frame.ttl = 1),
                ("without a hop", &|frame| frame.ttl = 0),
                ("over the MTU", &|frame| frame.payload = vec![0x5a; 1501 - header]),
                ("far over the MTU", &|frame| frame.payload = vec![0x5a; 3_000]),
            ];
            for (name, form) in forms {
                let name = format!("protocol {proto}, {name}");
                let sent = flow.opener.flags(ACK).with(form);
                assert_eq!(up_and_out(node, &name, &sent, REMOTE, NODE, SLOW), flow.seen.src.1);
                let reply = flow.answer(node).flags(ACK).with(form);
                let half = reply.with(|frame| frame.dst.0 = CLIENT);
                node.check(&name, node.entry, &reply.bytes(), Action::Pass, &half.bytes(), SLOW);
                finished(node, &name, &half, |frame| {
                    (frame.src, frame.dst) = (flow.opener.dst, flow.opener.src)
                });
            }
            let whole = flow.opener.flags(ACK).with(|frame| frame.payload = vec![0x5a; 1500 - header]);
            flow.forwards(node, "as long as the MTU", &whole, &[]);
        }
    });
}

#[test]
fn the_mtu_is_that_of_the_way_out() {
    Node::each(|node| {
        let id = node.backend(BESIDE, UDP, false);
        node.frontend(VIP, UDP, &[id], 0);
        let opener = node.opener(UDP, 40_000, VIP);
        let flow = node.open_by("a flow", &opener, BESIDE, node.beside(), 0);
        let headers = node.family.header_len() + l4_header_len(UDP);
        let long = |len: u16| opener.with(|frame| frame.payload = vec![0x5a; usize::from(len) - headers]);
        flow.forwards(node, "as long as the MTU", &long(MTU_TOO), &[]);
        up_and_out(node, "over the MTU", &long(MTU_TOO + 1), BESIDE, NODE_TOO, SLOW);
    });
}

#[test]
fn a_device_that_takes_no_redirect_is_reached_by_the_kernel() {
    Node::each(|node| {
        let id = node.backend(BESIDE, TCP, false);
        node.frontend(VIP, TCP, &[id], 0);
        let tunnel =
            Device { snat: NODE_TOO, flags: 0, mtu: MTU_TOO.into(), mac: node.mac_too, zero: [0; 2] };
        node.device(node.ifindex_too, tunnel);
        up_and_out(node, "an opener", &node.opener(TCP, 40_000, VIP), BESIDE, NODE_TOO, NEW_SLOW);
    });
}

#[test]
fn a_backend_behind_an_interface_without_programs_keeps_the_clients_address() {
    Node::each(|node| {
        let id = node.backend(BESIDE, TCP, false);
        node.frontend(VIP, TCP, &[id], 0);
        node.maps.forget_device(node.ifindex_too);
        let opener = node.opener(TCP, 40_000, VIP);
        let seen = opener.with(|frame| frame.dst = (BESIDE, TARGET));
        let counts = [Event(E::FlowNew), SnatAttempt(0), Event(E::UnmanagedEgress), Event(E::Delivered)];
        node.check("the opener", node.entry, &opener.bytes(), Action::Pass, &seen.bytes(), &counts);
        let reply = opener.flags(SYN | ACK).with(|frame| (frame.src, frame.dst) = (seen.dst, seen.src));
        let back = reply.with(|frame| frame.src = opener.dst);
        let restored = [Event(E::Restored)];
        node.check("the answer", Hook::TcEgress, &reply.bytes(), Action::Pass, &back.bytes(), &restored);
    });
}

#[test]
fn flows_that_share_client_port_and_backend_stay_apart_on_the_slow_path() {
    Node::each(|node| {
        let id = node.backend(UNRESOLVED, UDP, false);
        for vip in [VIP, VIP_TOO] {
            node.frontend(vip, UDP, &[id], 0);
        }
        let ports = [VIP, VIP_TOO].map(|vip| {
            let opener = node.opener(UDP, 2_000, vip);
            up_and_out(node, "an opener", &opener, UNRESOLVED, NODE, NEW_SLOW)
        });
        assert_ne!(ports[0], ports[1]);
        for (vip, port) in [VIP, VIP_TOO].into_iter().zip(ports) {
            let reply = node.opener(UDP, 2_000, vip).with(|frame| {
                (frame.src, frame.dst, frame.ttl) = ((UNRESOLVED, TARGET), (NODE, port), 1);
            });
            let half = reply.with(|frame| frame.dst.0 = CLIENT);
            node.check("an answer", node.entry, &reply.bytes(), Action::Pass, &half.bytes(), SLOW);
            finished(node, "an answer", &half, |frame| {
                (frame.src, frame.dst) = ((vip, HTTP), (CLIENT, 2_000));
            });
        }
    });
}

#[test]
fn what_egress_does_not_know_is_not_touched() {
    Node::each(|node| {
        one_remote(node);
        let flow = node.connect("a flow", &node.opener(TCP, 40_000, VIP), REMOTE);
        // Toward the backend, but not of a half-translated flow; and a translated packet that passes egress.
        let own = flow.opener.with(|frame| frame.dst = (REMOTE, TARGET)).bytes();
        node.check("the client's own", Hook::TcEgress, &own, Action::Pass, &own, &[]);
        let whole = flow.seen.bytes();
        node.check("a whole translation", Hook::TcEgress, &whole, Action::Pass, &whole, &[]);
    });
}
