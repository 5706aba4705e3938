//! Who gets which ring, who may come at all, and who meets the same backend again.

use std::collections::HashSet;

use xdp_common::{
    net::{TCP, UDP},
    tables::{Backend, Frontend, backend, frontend, network},
    verdict::{
        Counter::{Drop, Event, SnatAttempt},
        Event as E, Reason,
    },
};

use crate::{frames::*, node::*};

/// A frontend of both rings.
fn frontend(rings: ((u32, u32), (u32, u32)), flags: u32) -> Frontend {
    let ((ring, slots), (inner_ring, inner_slots)) = rings;
    Frontend { service: 1, ring, slots, inner_ring, inner_slots, flags, affinity_seconds: 0 }
}

/// The host that a frame is addressed to, among these.
fn destination(node: &Node, frame: &[u8], hosts: &[Addr]) -> Addr {
    let at = ETHERNET + node.family.header_len();
    let is_it = |host: &&Addr| frame[..at].ends_with(&node.family.octets(**host));
    *hosts.iter().find(is_it).expect("a frame to one of the hosts")
}

#[test]
fn pods_get_the_inner_ring_and_others_the_outer_one() {
    Node::each(|node| {
        let (outer, inner) = (node.backend(LOCAL, TCP, true), node.backend(REMOTE, TCP, false));
        let rings = (node.ring(&[outer]), node.ring(&[inner]));
        let flags = frontend::DISTINGUISHES_PODS | frontend::LOCAL | frontend::MASQUERADE_POD;
        node.set_frontend(VIP, TCP, frontend(rings, flags));
        node.maps.network(network::PODS, [10, 244, 0, 0], 16, 1);
        let outside = node.run(node.entry, &node.opener(TCP, 40_000, VIP).bytes());
        assert_eq!(
            (outside.action, destination(node, &outside.frame, &[LOCAL, REMOTE])),
            (Action::Pass, LOCAL)
        );
        let pod = node.opener(TCP, 40_000, VIP).with(|frame| frame.src.0 = [10, 244, 9, 9]);
        let inside = node.run(node.entry, &pod.bytes());
        assert_eq!(
            (inside.action, destination(node, &inside.frame, &[LOCAL, REMOTE])),
            (Action::Transmit, REMOTE)
        );
        // Where nothing depends on it, a pod is a client like any other.
        node.set_frontend(VIP_TOO, TCP, frontend(rings, frontend::LOCAL));
        let pod = node.run(node.entry, &pod.with(|frame| frame.dst.0 = VIP_TOO).bytes());
        assert_eq!((pod.action, destination(node, &pod.frame, &[LOCAL, REMOTE])), (Action::Pass, LOCAL));
    });
}

#[test]
fn without_masquerading_the_clients_address_survives_the_way_to_another_node() {
    Node::each(|node| {
        let remote = node.backend(REMOTE, TCP, false);
        let ring = node.ring(&[remote]);
        node.set_frontend(VIP, TCP, frontend((ring, ring), 0));
        let opener = node.opener(TCP, 40_000, VIP);
        let expected = opener.with(|frame| frame.dst = (REMOTE, TARGET));
        let counts = [Event(E::FlowNew), SnatAttempt(0), Event(E::Delivered)];
        node.check("up", node.entry, &opener.bytes(), Action::Pass, &expected.bytes(), &counts);
        node.configure(|config| config.masquerade_wire = 1);
        node.open("unless all that comes by wire is masqueraded", &node.opener(TCP, 40_001, VIP), REMOTE);
    });
}

#[test]
fn sources_outside_the_ranges_drop_and_their_established_flows_go_on() {
    Node::each(|node| {
        for proto in [TCP, UDP] {
            let remote = node.backend(REMOTE, proto, false);
            let ring = node.ring(&[remote]);
            let flags = frontend::MASQUERADE_EXTERNAL;
            node.set_frontend(VIP, proto, frontend((ring, ring), flags));
            let flow = node.connect("before", &node.opener(proto, 40_000, VIP), REMOTE);
            node.set_frontend(VIP, proto, frontend((ring, ring), flags | frontend::RESTRICTED));
            node.maps.network(network::sources_of(1), [192, 0, 2, 0], 24, 1);
            node.maps.network(network::sources_of(2), CLIENT, 32, 1);
            let refused = node.opener(proto, 40_001, VIP).bytes();
            let dropped = [Drop(Reason::SourceRange)];
            node.check("outside", node.entry, &refused, Action::Drop, &refused, &dropped);
            flow.sends(node, "established", ACK, &[]);
            let allowed = node.opener(proto, 40_001, VIP).with(|frame| frame.src.0 = [192, 0, 2, 7]);
            assert_eq!(node.run(node.entry, &allowed.bytes()).action, Action::Transmit);
        }
    });
}

#[test]
fn a_client_meets_its_backend_again_on_every_frontend_until_it_is_idle_or_the_backend_is_gone() {
    Node::each(|node| {
        let endpoints: Vec<Addr> = (2..10).map(|last| [10, 244, 2, last]).collect();
        let ids: Vec<u32> = endpoints.iter().map(|addr| node.backend(*addr, TCP, false)).collect();
        let ring = node.ring(&ids);
        let sticky =
            Frontend { affinity_seconds: 30, ..frontend((ring, ring), frontend::MASQUERADE_EXTERNAL) };
        node.set_frontend(VIP, TCP, sticky);
        node.set_frontend(VIP_TOO, TCP, sticky);
        let mut sport = 40_000;
        let mut meet = |node: &Node, vip, times| {
            let met: HashSet<Addr> = (0..times)
                .map(|_| {
                    sport += 1;
                    let outcome = node.run(node.entry, &node.opener(TCP, sport, vip).bytes());
                    destination(node, &outcome.frame, &endpoints)
                })
                .collect();
            met
        };
        let first = meet(node, VIP, 1);
        node.configure(|config| config.clock += 29);
        assert_eq!(meet(node, VIP, 20), first, "remembered");
        node.configure(|config| config.clock += 29);
        assert_eq!(
            meet(node, VIP_TOO, 20),
            first,
            "remembered by the other frontend, from the last connection on"
        );
        node.configure(|config| config.clock += 30);
        let spread = |node: &Node, meet: &mut dyn FnMut(&Node, Addr, u32) -> HashSet<Addr>| {
            let mut all = HashSet::new();
            for _ in 0..20 {
                node.maps.forget_affinities();
                all.extend(meet(node, VIP, 1));
            }
            all
        };
        assert!(spread(node, &mut meet).len() > 1, "forgotten, clients spread");
        let stuck = meet(node, VIP, 1);
        let addr = *stuck.iter().next().expect("one connection");
        let id = ids[endpoints.iter().position(|endpoint| *endpoint == addr).expect("an endpoint")];
        // Out of the list, though flows still use it.
        let out = Backend {
            addr,
            port: TARGET.to_be_bytes(),
            proto: TCP,
            flags: backend::IN_LOCAL_LIST,
            generation: 1,
            service: 1,
            node: [0; 4],
        };
        node.maps.backend(id, out);
        let others: Vec<u32> = ids.iter().copied().filter(|other| *other != id).collect();
        let (ring, slots) = node.ring(&others);
        node.set_frontend(VIP, TCP, Frontend { ring, slots, ..sticky });
        let next = meet(node, VIP, 5);
        assert_eq!((next.len(), next.contains(&addr)), (1, false), "moved once, and stays there");
    });
}

#[test]
fn packets_of_both_directions_are_on_the_account_of_their_service() {
    Node::each(|node| {
        let remote = node.backend(REMOTE, TCP, false);
        node.frontend(VIP, TCP, &[remote], 0);
        let before = node.maps.account(1);
        let flow = node.connect("a flow", &node.opener(TCP, 40_000, VIP), REMOTE);
        let (packets, bytes) = node.maps.account(1);
        let sent = (packets - before.0, bytes - before.1);
        flow.sends(node, "more", ACK, &[]);
        flow.answers(node, "more", ACK, &[]);
        let (packets, bytes) = node.maps.account(1);
        let len = flow.opener.total_len() as u64;
        assert!(sent.0 >= 3, "opener, answer, and what establishes: {sent:?}");
        assert_eq!((packets - before.0, bytes - before.1), (sent.0 + 2, (sent.0 + 2) * len));
    });
}
