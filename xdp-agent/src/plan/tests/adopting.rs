//! Starts with what a previous agent has left.

use super::*;

fn taken_over<A: TestAddress>(limits: Limits, before: &[ServicePort<A>]) -> (Node<A>, Model<A>) {
    let (mut old, mut model) = (Node::new(limits), Model::new(limits));
    let update = old.wish(before.iter().cloned(), 0);
    model.apply_all(&update, &Ports::new(), &old.ports, 0);
    (Node { plan: Plan::adopt(limits, model.adopted()), ports: Ports::new() }, model)
}

#[test]
fn the_maps_of_a_previous_agent_are_taken_over_without_a_write() {
    let mut split = port(1, &[Policy::Local], &[endpoint(1), endpoint(2)], &[endpoint(1)]);
    split.frontends[0].internal = Policy::Cluster;
    split.frontends[0].is_restricted = true;
    split.sources = vec![Network { addr: [192, 0, 2, 0], len: 24 }];
    let mut cluster_ip = simple::<V4>(2, &[3, 4, 5]);
    cluster_ip.frontends[0].kind = FrontendKind::ClusterIp;
    let all = [split, cluster_ip];
    let (mut node, _) = taken_over(LIMITS, &all);
    assert_eq!(node.wish(all.clone(), 0).changes, []);
    let lines = node.lines([all[1].clone()], 10);
    assert_eq!(
        lines,
        [
            "remove 10.96.0.1",
            "network 192.0.2.0/24 of 80000001 goes",
            "backend 1 10.0.0.1 of 1 flags 6 generation 2",
            "backend 2 10.0.0.2 of 1 flags 2 generation 2",
        ]
    );
}

#[test]
fn what_changed_while_no_agent_ran_is_changed_and_nothing_else() {
    let before = [simple::<V4>(1, &[1, 2]), simple(2, &[3]), simple(3, &[4])];
    let (mut node, mut model) = taken_over(LIMITS, &before);
    // Service 3 is gone, service 2 lost its endpoint to another one, service 1 is as it was.
    let update = node.wish([simple(1, &[1, 2]), simple(2, &[5])], 0);
    model.apply_all(&update, &wish(before), &node.ports, 0);
    assert_eq!(
        script(&update.changes),
        [
            "egress gate",
            "backend 5 10.0.0.5 of 2 flags 2 generation 1",
            "ring 213+1",
            "frontend 10.96.0.2 service 2 ring 213+1 flags 2",
            "remove 10.96.0.3",
            "backend 3 10.0.0.3 of 2 flags 2 generation 2",
            "backend 4 10.0.0.4 of 3 flags 2 generation 2",
        ]
    );
    assert!(model.is_like(&node.plan));
}

#[test]
fn nothing_of_a_previous_agent_goes_before_everything_wanted_is_known() {
    let before = [simple::<V4>(1, &[1]), simple(2, &[2])];
    let (mut node, _) = taken_over(LIMITS, &before);
    let first = delta(&Ports::new(), &wish([before[0].clone()]));
    assert_eq!(node.plan.update(&first, false, &[], 0).changes, []);
    assert_eq!(node.plan.collect(&in_use(5_000), 5_000).changes, []);
    assert_eq!(node.plan.fill().frontends, 2);
    let update = node.plan.update(&Delta::default(), true, &[], 5_010);
    assert_eq!(script(&update.changes), ["remove 10.96.0.2", "backend 2 10.0.0.2 of 2 flags 2 generation 2"]);
}

#[test]
fn frontends_of_a_previous_agent_stay_until_their_service_fits() {
    let limits = Limits { ring_slots: 40, ..LIMITS };
    let (mut node, _) = taken_over(limits, &[simple::<V4>(1, &[1, 2])]);
    // Its ring of 23 slots leaves no room for one of 31.
    let update = node.wish([simple(1, &[1, 2, 3])], 0);
    assert_eq!(node.plan.problems()[0].kind, ProblemKind::RingsFull);
    assert_eq!(update.changes, [], "what works stays");
    assert_eq!(node.plan.fill().frontends, 1);
}

#[test]
fn a_ring_whose_slots_are_not_what_they_should_be_is_made_anew() {
    let before = [simple::<V4>(1, &[1, 2])];
    let (_, mut model) = taken_over(LIMITS, &before);
    model.rings[7] ^= 3;
    let mut node = Node { plan: Plan::adopt(LIMITS, model.adopted()), ports: Ports::new() };
    assert_eq!(node.lines(before, 0), ["ring 211+211", "frontend 10.96.0.1 service 1 ring 211+211 flags 2"]);
}

#[test]
fn frontends_of_udp_are_new_once_and_endpoints_do_not_make_them_new() {
    let udp = |n, endpoints: &[u8]| {
        let mut port = simple::<V4>(n, endpoints);
        port.name.protocol = Protocol::Udp;
        port
    };
    let mut node = Node::new(LIMITS);
    let is_new = |node: &mut Node<V4>, ports: &[ServicePort<V4>]| {
        node.wish(ports.to_vec(), 0);
        node.plan.take_new_udp_frontends()
    };
    assert!(!is_new(&mut node, &[simple(1, &[1])]), "of TCP");
    assert!(is_new(&mut node, &[udp(2, &[])]));
    assert!(!is_new(&mut node, &[udp(2, &[])]));
    assert!(!is_new(&mut node, &[udp(2, &[1])]));
    assert!(is_new(&mut node, &[udp(2, &[1]), udp(3, &[1])]));
    assert!(!is_new(&mut node, &[udp(3, &[1])]));
    assert!(is_new(&mut node, &[udp(2, &[1]), udp(3, &[1])]), "it has come back");
    let (mut node, _) = taken_over(LIMITS, &[udp(2, &[1])]);
    assert!(!is_new(&mut node, &[udp(2, &[1])]), "of a previous agent");
}
