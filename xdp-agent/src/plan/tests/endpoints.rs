//! What becomes of backends when endpoints come, change and go.

use super::*;

#[test]
fn an_endpoint_of_two_services_leaves_one_and_stays_with_the_other() {
    let mut node = Node::<V4>::new(LIMITS);
    node.wish([simple(1, &[1]), simple(2, &[1])], 0);
    let lines = node.lines([simple(2, &[1])], 10);
    assert_eq!(lines, ["remove 10.96.0.1", "backend 1 10.0.0.1 of 1 flags 2 generation 2"]);
}

#[test]
fn an_endpoint_that_still_serves_keeps_its_generation_until_it_is_gone() {
    let mut node = Node::<V4>::new(LIMITS);
    node.wish([simple(1, &[1, 2])], 0);
    let mut leaving = simple(1, &[2]);
    leaving.serving.push(endpoint(1));
    leaving.serving.push(endpoint(9)); // serves, but was never chosen
    assert_eq!(
        node.lines([leaving], 10),
        [
            "backend 1 10.0.0.1 of 1 flags 0 generation 1",
            "ring 211+1",
            "frontend 10.96.0.1 service 1 ring 211+1 flags 2"
        ]
    );
    assert_eq!(node.lines([simple(1, &[2])], 20), ["backend 1 10.0.0.1 of 1 flags 0 generation 2"]);
}

#[test]
fn an_endpoint_that_comes_back_has_its_id_again() {
    let mut node = Node::<V4>::new(LIMITS);
    node.wish([simple(1, &[1, 2])], 0);
    node.wish([simple(1, &[2])], 10);
    assert_eq!(
        node.lines([simple(1, &[1, 2])], 20),
        ["ring 212+211", "frontend 10.96.0.1 service 1 ring 212+211 flags 2"]
    );
    assert_eq!(node.plan.backends(1..2).next().unwrap().1.generation, 2);
}

#[test]
fn an_address_that_moves_to_this_node_is_another_backend_for_flows() {
    let mut node = Node::<V4>::new(LIMITS);
    node.wish([simple(1, &[1])], 0);
    let here = [Endpoint { local: true, ..endpoint(1) }];
    let lines = node.lines([port(1, &[Policy::Cluster], &here, &[])], 10);
    assert_eq!(lines, ["backend 1 10.0.0.1 of 1 flags 3 generation 2"]);
}

#[test]
fn an_id_in_use_by_a_flow_is_not_given_to_another() {
    let mut node = Node::<V4>::new(LIMITS);
    node.wish([simple(1, &[1])], 0);
    node.wish([], 10);
    node.plan.collect(&in_use(15), 20);
    let flows = InUse { started_ms: 5_000, backends: HashSet::from([1]), ..InUse::default() };
    assert_eq!(script(&node.plan.collect(&flows, 5_000).changes), ["ingress gate"]);
    assert_eq!(node.lines([simple(1, &[2])], 5_010)[2], "backend 2 10.0.0.2 of 2 flags 2 generation 1");
}

#[test]
fn a_service_id_that_comes_back_for_another_protocol_has_other_backends() {
    let mut node = Node::<V4>::new(LIMITS);
    node.wish([simple(1, &[1])], 0);
    node.wish([], 10);
    node.plan.last_id = 0;
    let mut udp = simple(1, &[1]);
    udp.name.protocol = Protocol::Udp;
    assert!(node.lines([udp], 20).contains(&"backend 2 10.0.0.1 of 1 flags 2 generation 1".to_owned()));
}
