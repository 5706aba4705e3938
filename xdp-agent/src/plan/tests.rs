use std::net::Ipv4Addr;

use xdp_common::tables::frontend;

use self::model::Model;
use super::*;
use crate::cluster::{DesiredFrontend, Endpoint, FrontendKind, Policy, Protocol};

mod generated;
mod model;

pub(super) const LIMITS: Limits = Limits { frontends: 64, backends: 64, ring_slots: 8192 };

/// A TCP service port with one frontend for each policy given, on 10.96.0.`n`.
fn port(n: u8, policies: &[Policy], cluster: &[Endpoint], local: &[Endpoint]) -> ServicePort {
    let name = ServicePortName {
        namespace: "shop".to_owned(),
        service: format!("s{n}"),
        port: String::new(),
        protocol: Protocol::Tcp,
    };
    let frontend = |(at, policy): (usize, &Policy)| DesiredFrontend {
        addr: [10, 96, at as u8, n],
        port: 80,
        kind: FrontendKind::ClusterIp,
        policy: *policy,
        node_address: false,
    };
    ServicePort {
        name,
        frontends: policies.iter().enumerate().map(frontend).collect(),
        cluster: cluster.to_vec(),
        local: local.to_vec(),
        serving: cluster.to_vec(),
        any_endpoint: !cluster.is_empty(),
    }
}

fn endpoint(n: u8) -> Endpoint {
    Endpoint { addr: [10, 0, 0, n], port: 8080, local: false }
}

fn simple(n: u8, endpoints: &[u8]) -> ServicePort {
    let list: Vec<Endpoint> = endpoints.iter().map(|n| endpoint(*n)).collect();
    port(n, &[Policy::Cluster], &list, &[])
}

fn wish(ports: impl IntoIterator<Item = ServicePort>) -> Desired {
    let mut services: Vec<_> = ports.into_iter().map(Arc::new).collect();
    services.sort_by(|a, b| a.name.cmp(&b.name));
    Desired { services, problems: Vec::new() }
}

/// Changes as lines, one a change, for comparison with what a person expects.
fn script(changes: &[Change]) -> Vec<String> {
    let line = |change: &Change| match change {
        Change::Backend { id, value } => {
            format!(
                "backend {id} {} flags {} generation {}",
                Ipv4Addr::from(value.addr),
                value.flags,
                value.generation
            )
        }
        Change::Ring { offset, slots } => format!("ring {offset}+{}", slots.len()),
        Change::IngressGate { .. } => "ingress gate".to_owned(),
        Change::EgressGate { .. } => "egress gate".to_owned(),
        Change::Frontend { key, value } => format!(
            "frontend {} service {} ring {}+{} flags {}",
            Ipv4Addr::from(key.addr),
            value.service,
            value.ring,
            value.slots,
            value.flags
        ),
        Change::RemoveFrontend { key } => format!("remove {}", Ipv4Addr::from(key.addr)),
    };
    let mut lines: Vec<String> = changes.iter().map(line).collect();
    lines.dedup();
    lines
}

fn in_use(started_ms: u64) -> InUse {
    InUse { started_ms, ..InUse::default() }
}

#[test]
fn a_service_comes_changes_and_goes_in_order() {
    let mut plan = Plan::new(LIMITS);
    let update = plan.update(&wish([simple(1, &[1, 2])]), &[], 0);
    assert_eq!(
        script(&update.changes),
        [
            "ingress gate",
            "egress gate",
            "backend 1 10.0.0.1 flags 0 generation 1",
            "backend 2 10.0.0.2 flags 0 generation 1",
            "ring 0+211",
            "frontend 10.96.0.1 service 1 ring 0+211 flags 0",
        ]
    );
    assert_eq!(plan.update(&wish([simple(1, &[1, 2])]), &[], 10).changes, []);

    let update = plan.update(&wish([simple(1, &[2])]), &[], 20);
    assert_eq!(
        script(&update.changes),
        [
            "ring 211+1",
            "frontend 10.96.0.1 service 1 ring 211+1 flags 0",
            "backend 1 10.0.0.1 flags 0 generation 2",
        ]
    );

    let update = plan.update(&wish([]), &[], 30);
    assert_eq!(script(&update.changes), ["remove 10.96.0.1", "backend 2 10.0.0.2 flags 0 generation 2"]);
    assert_eq!(plan.fill(), Fill { frontends: 0, backends: 2, ring_slots: 212 });

    assert_eq!(plan.collect(&in_use(25), 40).changes, []);
    let update = plan.collect(&in_use(1_040), 1_050);
    assert_eq!(
        script(&update.changes),
        [
            "backend 1 0.0.0.0 flags 0 generation 2",
            "backend 2 0.0.0.0 flags 0 generation 2",
            "ingress gate",
            "egress gate"
        ]
    );
    assert_eq!(plan.fill(), Fill::default());

    let update = plan.update(&wish([simple(1, &[7])]), &[], 1_060);
    assert_eq!(script(&update.changes)[2], "backend 1 10.0.0.7 flags 0 generation 3");
}

#[test]
fn one_changed_service_changes_nothing_else() {
    let mut plan = Plan::new(LIMITS);
    let all = |last: &[u8]| wish([simple(1, &[1, 2]), simple(2, &[1, 3]), simple(3, last)]);
    plan.update(&all(&[4]), &[], 0);
    let update = plan.update(&all(&[5]), &[], 10);
    assert_eq!(
        script(&update.changes),
        [
            "egress gate",
            "backend 5 10.0.0.5 flags 0 generation 1",
            "ring 423+1",
            "frontend 10.96.0.3 service 3 ring 423+1 flags 0",
            "backend 4 10.0.0.4 flags 0 generation 2",
        ]
    );
}

#[test]
fn policies_with_the_same_endpoints_share_a_ring() {
    let mut plan = Plan::new(LIMITS);
    let list = [endpoint(1), endpoint(2)].map(|endpoint| Endpoint { local: true, ..endpoint });
    let update = plan.update(&wish([port(1, &[Policy::Cluster, Policy::Local], &list, &list)]), &[], 0);
    let rings = update.changes.iter().filter(|change| matches!(change, Change::Ring { .. })).count();
    assert_eq!((rings, plan.fill().ring_slots), (1, 211));
    assert!(script(&update.changes).contains(&"backend 1 10.0.0.1 flags 1 generation 1".to_owned()));
}

#[test]
fn a_frontend_without_endpoints_says_whether_there_are_some_elsewhere() {
    let mut plan = Plan::new(LIMITS);
    let both = [Policy::Cluster, Policy::Local];
    let mut none = port(2, &both, &[], &[]);
    none.frontends[0].node_address = true;
    plan.update(&wish([port(1, &both, &[endpoint(1)], &[]), none]), &[], 0);
    let mut image = plan.image();
    image.frontends.sort_by_key(|(key, _)| (key.addr[3], key.addr[2]));
    let values: Vec<_> = image.frontends.iter().map(|(_, value)| (value.slots, value.flags)).collect();
    assert_eq!(values, [(1, 0), (0, frontend::HAS_ENDPOINTS), (0, frontend::NODE_ADDRESS), (0, 0)]);
    assert!(image.frontends.iter().all(|(key, _)| key.zero == 0));
}

#[test]
fn an_endpoint_that_still_serves_keeps_its_generation_until_it_is_gone() {
    let mut plan = Plan::new(LIMITS);
    plan.update(&wish([simple(1, &[1, 2])]), &[], 0);
    let mut leaving = simple(1, &[2]);
    leaving.serving.push(endpoint(1));
    leaving.serving.push(endpoint(9)); // serves, but was never chosen
    let update = plan.update(&wish([leaving]), &[], 10);
    assert_eq!(script(&update.changes), ["ring 211+1", "frontend 10.96.0.1 service 1 ring 211+1 flags 0"]);
    let update = plan.update(&wish([simple(1, &[2])]), &[], 20);
    assert_eq!(script(&update.changes), ["backend 1 10.0.0.1 flags 0 generation 2"]);
}

#[test]
fn an_endpoint_that_comes_back_has_its_id_again() {
    let mut plan = Plan::new(LIMITS);
    plan.update(&wish([simple(1, &[1, 2])]), &[], 0);
    plan.update(&wish([simple(1, &[2])]), &[], 10);
    let update = plan.update(&wish([simple(1, &[1, 2])]), &[], 20);
    assert_eq!(
        script(&update.changes),
        ["ring 212+211", "frontend 10.96.0.1 service 1 ring 212+211 flags 0"]
    );
    assert_eq!(plan.image().backends[0].1.generation, 2);
}

#[test]
fn an_address_that_moves_to_this_node_is_another_backend_for_flows() {
    let mut plan = Plan::new(LIMITS);
    plan.update(&wish([simple(1, &[1])]), &[], 0);
    let here = [Endpoint { local: true, ..endpoint(1) }];
    let update = plan.update(&wish([port(1, &[Policy::Cluster], &here, &[])]), &[], 10);
    assert_eq!(script(&update.changes), ["backend 1 10.0.0.1 flags 1 generation 2"]);
}

#[test]
fn an_id_in_use_by_a_flow_is_not_given_to_another() {
    let mut plan = Plan::new(LIMITS);
    plan.update(&wish([simple(1, &[1])]), &[], 0);
    plan.update(&wish([]), &[], 10);
    plan.collect(&in_use(15), 20);
    let flows = InUse { started_ms: 5_000, backends: HashSet::from([1]), ..InUse::default() };
    assert_eq!(script(&plan.collect(&flows, 5_000).changes), ["ingress gate"]);
    let update = plan.update(&wish([simple(1, &[2])]), &[], 5_010);
    assert_eq!(script(&update.changes)[2], "backend 2 10.0.0.2 flags 0 generation 1");
}

#[test]
fn a_frontend_that_moves_between_services_is_switched_not_removed() {
    let mut plan = Plan::new(LIMITS);
    let taken = |n: u8, address_of: u8| {
        let mut port = simple(n, &[n]);
        port.frontends[0].addr = [10, 96, 9, address_of];
        port
    };
    plan.update(&wish([taken(1, 1), taken(2, 2)]), &[], 0);
    for swapped in [[taken(1, 2), taken(2, 1)], [taken(1, 1), taken(2, 2)]] {
        let lines = script(&plan.update(&wish(swapped), &[], 10).changes);
        assert_eq!(lines.len(), 2);
        assert!(lines.iter().all(|line| line.starts_with("frontend ")), "{lines:?}");
    }
    let lines = script(&plan.update(&wish([taken(2, 1)]), &[], 20).changes);
    assert_eq!(lines[0], "frontend 10.96.9.1 service 2 ring 1+1 flags 0");
    assert_eq!(lines[1..], ["remove 10.96.9.2", "backend 1 10.0.0.1 flags 0 generation 2"]);
}

#[test]
fn a_full_map_stops_one_service_and_names_the_flag() {
    let fits = [simple(1, &[1]), simple(2, &[2])];
    let cases = [
        (Limits { frontends: 2, ..LIMITS }, simple(5, &[1]), ProblemKind::FrontendsFull, "--max-frontends"),
        (Limits { backends: 4, ..LIMITS }, simple(5, &[3, 4]), ProblemKind::BackendsFull, "--max-backends"),
        (Limits { ring_slots: 4, ..LIMITS }, simple(5, &[1, 2]), ProblemKind::RingsFull, "--max-ring-slots"),
    ];
    for (limits, too_much, kind, flag) in cases {
        let mut plan = Plan::new(limits);
        let desired = wish(fits.iter().cloned().chain([too_much.clone()]));
        let update = plan.update(&desired, &[], 0);
        let problem = &update.problems[0];
        assert_eq!((update.problems.len(), problem.kind), (1, kind));
        assert!(problem.message.contains(flag), "{problem}");
        assert_eq!(plan.fill(), Fill { frontends: 2, backends: 2, ring_slots: 2 });
        assert_eq!(plan.update(&desired, &[], 10).changes, [], "nothing half done, nothing repeated");
        assert_eq!(plan.update(&wish([simple(9, &[1])]), &[], 20).problems, []);
        let update = plan.update(&wish([too_much]), &[], 9_000);
        assert!(limits.frontends == 2 || update.problems.len() == 1, "it is tried again and still too much");
    }
}

#[test]
fn room_of_frontends_that_go_serves_those_that_come_in_the_same_update() {
    let mut plan = Plan::new(Limits { frontends: 2, ..LIMITS });
    plan.update(&wish([simple(1, &[1]), simple(2, &[2])]), &[], 0);
    let update = plan.update(&wish([simple(3, &[1]), simple(4, &[2])]), &[], 10);
    assert_eq!((update.problems, plan.fill().frontends), (vec![], 2));
}

#[test]
fn a_service_that_waits_for_resting_slots_is_planned_when_they_are_free() {
    let mut plan = Plan::new(Limits { ring_slots: 300, ..LIMITS });
    plan.update(&wish([simple(1, &[1, 2])]), &[], 0);
    let wanted = wish([simple(1, &[1, 3])]);
    let update = plan.update(&wanted, &[], 10);
    assert_eq!(
        (update.problems.len(), update.retry_in_ms),
        (1, None),
        "its own ring stands in the way for ever"
    );
    let wanted = wish([simple(2, &[1, 3])]);
    let update = plan.update(&wanted, &[], 20);
    assert_eq!((update.problems.len(), update.retry_in_ms), (1, Some(QUARANTINE_MS)));
    assert_eq!(plan.update(&wanted, &[], 1_020).problems.len(), 1);
    let update = plan.update(&wanted, &[], 2_020);
    assert_eq!((update.problems, update.retry_in_ms, plan.fill().frontends), (vec![], None, 1));
}

#[test]
fn collecting_says_when_a_service_that_waits_for_backends_may_fit() {
    let mut plan = Plan::new(Limits { backends: 2, ..LIMITS });
    plan.update(&wish([simple(1, &[1])]), &[], 0);
    let wanted = wish([simple(1, &[2])]);
    assert_eq!(plan.update(&wanted, &[], 10).problems[0].kind, ProblemKind::BackendsFull);
    assert_eq!(plan.update(&wish([simple(2, &[2])]), &[], 20).problems.len(), 1);
    assert_eq!(plan.collect(&in_use(25), 30).retry_in_ms, None);
    assert_eq!(plan.collect(&in_use(1_030), 1_040).retry_in_ms, Some(0));
    assert_eq!(plan.update(&wish([simple(2, &[2])]), &[], 1_050).problems, []);
}

#[test]
fn snat_addresses_have_their_bit_as_long_as_flows_use_them() {
    let mut plan = Plan::new(LIMITS);
    let address = [192, 0, 2, 1];
    let bit = snat_bit(address);
    let is_set = |plan: &Plan| plan.image().ingress_gate[(bit / 64) as usize] >> (bit % 64) & 1 == 1;
    assert_eq!(script(&plan.update(&wish([]), &[address, address], 0).changes), ["ingress gate"]);
    assert_eq!(plan.update(&wish([]), &[address], 0).changes, []);
    plan.update(&wish([]), &[], 10);
    plan.collect(&in_use(15), 20);
    plan.collect(&InUse { started_ms: 5_000, ingress_bits: HashSet::from([bit]), ..InUse::default() }, 5_000);
    assert!(is_set(&plan));
    plan.collect(&in_use(5_000), 5_000);
    assert!(!is_set(&plan));
}

#[test]
fn the_maps_of_a_previous_agent_are_taken_over() {
    let mut old = Plan::new(LIMITS);
    let mut model = Model::new(LIMITS);
    let before = wish([simple(1, &[1, 2]), simple(2, &[3]), simple(3, &[4])]);
    model.apply_all(&old.update(&before, &[], 0), &wish([]), &before, 0);
    let mut plan = Plan::adopt(LIMITS, model.adopted());
    // Service 3 is gone, service 2 lost its endpoint to another one, service 1 is as it was.
    let desired = wish([simple(1, &[1, 2]), simple(2, &[5])]);
    let update = plan.update(&desired, &[], 0);
    model.apply_all(&update, &before, &desired, 0);
    assert_eq!(
        script(&update.changes),
        [
            "egress gate",
            "backend 5 10.0.0.5 flags 0 generation 1",
            "ring 213+211",
            "ring 424+1",
            "frontend 10.96.0.1 service 1 ring 213+211 flags 0",
            "frontend 10.96.0.2 service 2 ring 424+1 flags 0",
            "remove 10.96.0.3",
            "backend 3 10.0.0.3 flags 0 generation 2",
            "backend 4 10.0.0.4 flags 0 generation 2",
        ]
    );
    assert_eq!(plan.update(&desired, &[], 10).changes, []);
}

#[test]
fn frontends_of_a_previous_agent_stay_until_their_service_fits() {
    let limits = Limits { ring_slots: 300, ..LIMITS };
    let mut old = Plan::new(limits);
    let mut model = Model::new(limits);
    let desired = wish([simple(1, &[1, 2])]);
    model.apply_all(&old.update(&desired, &[], 0), &wish([]), &desired, 0);
    let mut plan = Plan::adopt(limits, model.adopted());
    let update = plan.update(&desired, &[], 0);
    assert_eq!(update.problems.len(), 1);
    assert_eq!(update.changes, [], "what works stays");
    assert_eq!(plan.fill().frontends, 1);
}
