//! Networks of pods and ServiceCIDRs, sources of load balancers, and addresses of ClusterIPs as such.

use super::*;

fn net(b: u8, len: u8) -> Network<V4> {
    Network { addr: [10, b, 0, 0], len }
}

#[test]
fn networks_come_before_what_needs_them_and_exceptions_before_what_they_except() {
    let mut node = Node::<V4>::new(LIMITS);
    let networks = Networks {
        pods: vec![net(244, 16)],
        services: vec![net(96, 16)],
        own: vec![[10, 96, 0, 9], [192, 0, 2, 1]],
        ..Networks::NONE
    };
    let update = node.wish_with([], Some(networks.clone()), 0);
    assert_eq!(
        script(&update.changes),
        [
            "ingress gate",
            "network 10.96.0.9/32 of 1 is 0",
            "network 10.244.0.0/16 of 0 is 1",
            "network 10.96.0.0/16 of 1 is 1",
        ]
    );
    let bit = service_network_bit([10, 96, 77, 1].network());
    assert_eq!(node.plan.ingress_gate()[(bit / 64) as usize] >> (bit % 64) & 1, 1);
    assert_eq!(node.wish_with([], Some(networks), 10).changes, []);
    let update = node.wish_with([], Some(Networks::default()), 20);
    assert_eq!(
        script(&update.changes),
        [
            "network 10.244.0.0/16 of 0 goes",
            "network 10.96.0.0/16 of 1 goes",
            "network 10.96.0.9/32 of 1 goes"
        ]
    );
    assert_eq!(node.plan.fill(), Fill::default());
}

#[test]
fn a_network_of_ipv6_has_its_bits_too() {
    let mut node = Node::<V6>::new(LIMITS);
    let services = vec![Network { addr: V6::at(96, 0, 0), len: 108 }];
    let own = vec![V6::at(96, 0, 9)];
    let update = node.wish_with([], Some(Networks { services, own, ..Networks::NONE }), 0);
    assert_eq!(
        script(&update.changes),
        ["ingress gate", "network fd60::9/128 of 1 is 0", "network fd60::/108 of 1 is 1"]
    );
    let bit = service_network_bit(V6::at(96, 5, 5).network());
    assert_eq!(node.plan.ingress_gate()[(bit / 64) as usize] >> (bit % 64) & 1, 1);
}

#[test]
fn sources_are_there_before_a_restricted_frontend_and_go_after_it() {
    let mut node = Node::<V4>::new(LIMITS);
    let restricted = |sources: &[u8]| {
        let mut port = simple(1, &[1]);
        port.frontends[0] =
            DesiredFrontend { kind: FrontendKind::LoadBalancer, is_restricted: true, ..port.frontends[0] };
        port.sources = sources.iter().map(|b| net(*b, 16)).collect();
        port
    };
    let lines = node.lines([restricted(&[1, 2])], 0);
    assert_eq!(lines[2..4], ["network 10.1.0.0/16 of 80000001 is 1", "network 10.2.0.0/16 of 80000001 is 1"]);
    assert_eq!(only_frontend(&node.plan).flags, frontend::HAS_ENDPOINTS | frontend::RESTRICTED);
    assert_eq!(
        node.lines([restricted(&[2, 3])], 10),
        ["network 10.3.0.0/16 of 80000001 is 1", "network 10.1.0.0/16 of 80000001 goes"]
    );
    let lines = node.lines([], 20);
    assert_eq!(
        lines[..3],
        ["remove 10.96.0.1", "network 10.2.0.0/16 of 80000001 goes", "network 10.3.0.0/16 of 80000001 goes"]
    );
    assert_eq!(node.plan.networks().count(), 0);
}

#[test]
fn the_address_of_a_cluster_ip_stands_as_such_while_any_service_port_has_it() {
    let mut node = Node::<V4>::new(LIMITS);
    let cluster_ip = |n: u8, number: u16| {
        let mut port = simple(n, &[n]);
        let kind = FrontendKind::ClusterIp;
        port.frontends[0] = DesiredFrontend { kind, addr: [10, 96, 0, 7], port: number, ..port.frontends[0] };
        port
    };
    let lines = node.lines([cluster_ip(1, 80), cluster_ip(2, 443)], 0);
    assert_eq!(
        lines[lines.len() - 3..],
        [
            "frontend 10.96.0.7 service 1 ring 0+1 flags 2",
            "frontend 10.96.0.7 service 2 ring 1+1 flags 2",
            "address 10.96.0.7"
        ]
    );
    let bit = service_network_bit([10, 96, 0, 7].network());
    assert_eq!(node.plan.ingress_gate()[(bit / 64) as usize] >> (bit % 64) & 1, 1);
    let lines = node.lines([cluster_ip(2, 443)], 10);
    assert_eq!(lines, ["remove 10.96.0.7", "backend 1 10.0.0.1 of 1 flags 2 generation 2"]);
    assert_eq!(node.plan.fill().frontends, 2);
    node.wish([], 20);
    assert_eq!(node.plan.fill().frontends, 0);
}

#[test]
fn a_cluster_ip_that_is_the_nodes_own_address_is_no_address_as_such() {
    let mut node = Node::<V4>::new(LIMITS);
    let mut port = simple(1, &[1]);
    port.frontends[0] =
        DesiredFrontend { kind: FrontendKind::ClusterIp, is_node_address: true, ..port.frontends[0] };
    node.wish([port], 0);
    assert_eq!(only_frontend(&node.plan).flags, frontend::HAS_ENDPOINTS | frontend::NODE_ADDRESS);
}
