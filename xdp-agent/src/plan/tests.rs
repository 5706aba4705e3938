use std::{collections::BTreeMap, sync::Arc};

use xdp_common::{
    net::Address,
    tables::{backend, network::SERVICES},
};

use self::model::Model;
use super::*;
use crate::cluster::wanted::{
    DesiredFrontend, Endpoint, FrontendKind, Ip6, Masquerade, Networks, Policy, Protocol, ServicePort,
};

mod addresses;
mod adopting;
mod endpoints;
mod generated;
mod limits;
mod model;
mod networks;

const LIMITS: Limits = Limits { frontends: 64, backends: 64, ring_slots: 8192, networks: 64 };

type V4 = [u8; 4];
type V6 = Ip6;

/// Addresses by a number of a network and two more.
trait TestAddress: IpAddress {
    fn at(network: u8, a: u8, b: u8) -> Self;
}

impl TestAddress for V4 {
    fn at(network: u8, a: u8, b: u8) -> Self {
        [10, network, a, b]
    }
}

impl TestAddress for V6 {
    fn at(network: u8, a: u8, b: u8) -> Self {
        [0xfd, network, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b].into()
    }
}

type Ports<A> = BTreeMap<ServicePortName, Arc<ServicePort<A>>>;

/// A plan, and what was wished last.
struct Node<A> {
    plan: Plan<A>,
    ports: Ports<A>,
}

impl<A: IpAddress> Node<A> {
    fn new(limits: Limits) -> Self {
        Self { plan: Plan::new(limits), ports: Ports::new() }
    }

    /// Wishes these and no others.
    fn wish(&mut self, ports: impl IntoIterator<Item = ServicePort<A>>, now_ms: u64) -> Update<A> {
        self.wish_with(ports, None, now_ms)
    }

    fn wish_with(
        &mut self,
        ports: impl IntoIterator<Item = ServicePort<A>>,
        networks: Option<Networks<A>>,
        now_ms: u64,
    ) -> Update<A> {
        let ports = wish(ports);
        let delta = Delta { networks, ..delta(&self.ports, &ports) };
        self.ports = ports;
        self.plan.update(&delta, true, &[], now_ms)
    }

    fn lines(&mut self, ports: impl IntoIterator<Item = ServicePort<A>>, now_ms: u64) -> Vec<String> {
        script(&self.wish(ports, now_ms).changes)
    }
}

fn wish<A>(ports: impl IntoIterator<Item = ServicePort<A>>) -> Ports<A> {
    ports.into_iter().map(|port| (port.name.clone(), Arc::new(port))).collect()
}

fn delta<A: IpAddress>(before: &Ports<A>, after: &Ports<A>) -> Delta<A> {
    let gone = before.keys().filter(|name| !after.contains_key(*name)).map(|name| (name.clone(), None));
    let changed = after.iter().filter(|(name, port)| before.get(*name) != Some(*port));
    let ports = gone.chain(changed.map(|(name, port)| (name.clone(), Some(Arc::clone(port))))).collect();
    Delta { ports, networks: None }
}

/// A TCP service port with one frontend for each policy given, for everybody.
fn port<A: TestAddress>(
    n: u8,
    policies: &[Policy],
    cluster: &[Endpoint<A>],
    local: &[Endpoint<A>],
) -> ServicePort<A> {
    let name = ServicePortName {
        namespace: "shop".to_owned(),
        service: format!("s{n}"),
        port: String::new(),
        protocol: Protocol::Tcp,
    };
    let frontend = |(at, policy): (usize, &Policy)| DesiredFrontend {
        addr: A::at(96, at as u8, n),
        port: 80,
        kind: FrontendKind::NodePort,
        external: *policy,
        internal: *policy,
        masquerade: Masquerade::default(),
        is_restricted: false,
        is_node_address: false,
    };
    ServicePort {
        name,
        frontends: policies.iter().enumerate().map(frontend).collect(),
        cluster: cluster.to_vec(),
        local: local.to_vec(),
        serving: cluster.to_vec(),
        any_endpoint: !cluster.is_empty(),
        affinity_seconds: 0,
        sources: Vec::new(),
    }
}

fn endpoint<A: TestAddress>(n: u8) -> Endpoint<A> {
    Endpoint { addr: A::at(0, 0, n), port: 8080, local: false, node: A::UNSPECIFIED }
}

fn simple<A: TestAddress>(n: u8, endpoints: &[u8]) -> ServicePort<A> {
    let list: Vec<_> = endpoints.iter().map(|n| endpoint(*n)).collect();
    port(n, &[Policy::Cluster], &list, &[])
}

/// The flags of a frontend, without that of the kind which [`port`] gives.
fn flags(value: &Frontend) -> u32 {
    value.flags & !frontend::NODE_PORT
}

/// Changes as lines, one a change, for comparison with what a person expects.
fn script<A: IpAddress>(changes: &[Change<A>]) -> Vec<String> {
    let line = |change: &Change<A>| match change {
        Change::Backend { id, value } => {
            let (addr, flags, generation) = (value.addr.to_ip(), value.flags, value.generation);
            format!("backend {id} {addr} of {} flags {flags} generation {generation}", value.service)
        }
        Change::Ring { offset, slots } => format!("ring {offset}+{}", slots.len()),
        Change::IngressGate { .. } => "ingress gate".to_owned(),
        Change::EgressGate { .. } => "egress gate".to_owned(),
        Change::Frontend { key, value } if value.service == 0 => format!("address {}", key.addr.to_ip()),
        Change::Frontend { key, value } => {
            let (addr, service, flags) = (key.addr.to_ip(), value.service, flags(value));
            let inner = match (value.inner_ring, value.inner_slots) {
                same if same == (value.ring, value.slots) => String::new(),
                (ring, slots) => format!(" inside {ring}+{slots}"),
            };
            format!(
                "frontend {addr} service {service} ring {}+{}{inner} flags {flags}",
                value.ring, value.slots
            )
        }
        Change::RemoveFrontend { key } => format!("remove {}", key.addr.to_ip()),
        Change::Network { owner, network, value: Some(value) } => {
            format!("network {network} of {owner:x} is {value}")
        }
        Change::Network { owner, network, value: None } => format!("network {network} of {owner:x} goes"),
    };
    let mut lines: Vec<String> = changes.iter().map(line).collect();
    lines.dedup();
    lines
}

fn in_use(started_ms: u64) -> InUse {
    InUse { started_ms, ..InUse::default() }
}

fn only_frontend<A: IpAddress>(plan: &Plan<A>) -> Frontend {
    let mut all = plan.frontends().filter(|(key, _)| key.proto != 0);
    let (_, value) = all.next().expect("a frontend");
    assert_eq!(all.next(), None);
    value
}

#[test]
fn a_service_comes_changes_and_goes_in_order() {
    let mut node = Node::<V4>::new(LIMITS);
    assert_eq!(
        node.lines([simple(1, &[1, 2])], 0),
        [
            "ingress gate",
            "egress gate",
            "backend 1 10.0.0.1 of 1 flags 2 generation 1",
            "backend 2 10.0.0.2 of 1 flags 2 generation 1",
            "ring 0+211",
            "frontend 10.96.0.1 service 1 ring 0+211 flags 2",
        ]
    );
    let same = Delta {
        ports: BTreeMap::from_iter(node.ports.clone().into_iter().map(|(n, p)| (n, Some(p)))),
        networks: None,
    };
    assert_eq!(node.plan.update(&same, true, &[], 10).changes, []);

    assert_eq!(
        node.lines([simple(1, &[2])], 20),
        [
            "ring 211+1",
            "frontend 10.96.0.1 service 1 ring 211+1 flags 2",
            "backend 1 10.0.0.1 of 1 flags 2 generation 2",
        ]
    );

    assert_eq!(node.lines([], 30), ["remove 10.96.0.1", "backend 2 10.0.0.2 of 1 flags 2 generation 2"]);
    assert_eq!(node.plan.fill(), Fill { backends: 2, ring_slots: 212, ..Fill::default() });

    assert_eq!(node.plan.collect(&in_use(25), 40).changes, []);
    let update = node.plan.collect(&in_use(1_040), 1_050);
    assert_eq!(
        script(&update.changes),
        [
            "backend 1 0.0.0.0 of 0 flags 0 generation 2",
            "backend 2 0.0.0.0 of 0 flags 0 generation 2",
            "ingress gate",
            "egress gate"
        ]
    );
    assert_eq!(node.plan.fill(), Fill::default());

    assert_eq!(node.lines([simple(1, &[7])], 1_060)[2], "backend 1 10.0.0.7 of 2 flags 2 generation 3");
}

#[test]
fn one_changed_service_changes_nothing_else() {
    let mut node = Node::<V4>::new(LIMITS);
    let all = |last: &[u8]| [simple(1, &[1, 2]), simple(2, &[1, 3]), simple(3, last)];
    node.wish(all(&[4]), 0);
    assert_eq!(
        node.lines(all(&[5]), 10),
        [
            "egress gate",
            "backend 6 10.0.0.5 of 3 flags 2 generation 1",
            "ring 423+1",
            "frontend 10.96.0.3 service 3 ring 423+1 flags 2",
            "backend 5 10.0.0.4 of 3 flags 2 generation 2",
        ]
    );
}

#[test]
fn policies_with_the_same_endpoints_share_a_ring() {
    let mut node = Node::<V4>::new(LIMITS);
    let list = [endpoint(1), endpoint(2)].map(|endpoint| Endpoint { local: true, ..endpoint });
    let update = node.wish([port(1, &[Policy::Cluster, Policy::Local], &list, &list)], 0);
    let rings = update.changes.iter().filter(|change| matches!(change, Change::Ring { .. })).count();
    assert_eq!((rings, node.plan.fill().ring_slots), (1, 211));
    assert!(script(&update.changes).contains(&"backend 1 10.0.0.1 of 1 flags 7 generation 1".to_owned()));
}

#[test]
fn clients_outside_and_inside_get_the_ring_of_their_policy() {
    let mut node = Node::<V4>::new(LIMITS);
    let here = Endpoint { local: true, ..endpoint(1) };
    let mut split = port(1, &[Policy::Local], &[here, endpoint(2)], &[here]);
    split.frontends[0].internal = Policy::Cluster;
    split.affinity_seconds = 10_800;
    assert_eq!(
        node.lines([split.clone()], 0)[2..],
        [
            "backend 1 10.0.0.1 of 1 flags 7 generation 1",
            "backend 2 10.0.0.2 of 1 flags 2 generation 1",
            "ring 0+211",
            "ring 211+1",
            "frontend 10.96.0.1 service 1 ring 211+1 inside 0+211 flags 130",
        ]
    );
    assert_eq!(only_frontend(&node.plan).affinity_seconds, 10_800);

    // Only policy Cluster is left: the other ring goes, and who was in both lists keeps its generation.
    split.frontends[0].external = Policy::Cluster;
    assert_eq!(
        node.lines([split], 10),
        ["backend 1 10.0.0.1 of 1 flags 3 generation 1", "frontend 10.96.0.1 service 1 ring 0+211 flags 2"]
    );
    assert_eq!(node.plan.slices.settled(), 211);
}

#[test]
fn the_flags_of_a_frontend_say_who_is_masqueraded_and_whether_pods_are_asked_for() {
    let masquerade = |external, pod, host| Masquerade { external, pod, host };
    let (has, distinguishes) = (frontend::HAS_ENDPOINTS, frontend::DISTINGUISHES_PODS);
    let (outside, pod, host) =
        (frontend::MASQUERADE_EXTERNAL, frontend::MASQUERADE_POD, frontend::MASQUERADE_HOST);
    let cases = [
        (masquerade(true, false, true), Policy::Cluster, outside | host | distinguishes),
        (masquerade(true, true, true), Policy::Cluster, outside | pod | host),
        (masquerade(false, false, true), Policy::Local, host | frontend::LOCAL | distinguishes),
    ];
    for (masquerade, external, expected) in cases {
        let mut wanted = simple::<V4>(1, &[1]);
        wanted.frontends[0] = DesiredFrontend { masquerade, external, ..wanted.frontends[0] };
        let mut node = Node::new(LIMITS);
        node.wish([wanted.clone()], 0);
        let unknown = flags(&only_frontend(&node.plan));
        assert_eq!(unknown, has | expected & !distinguishes, "no pods are known by their networks");
        let networks =
            Networks { pods: vec![Network { addr: [10, 0, 0, 0], len: 16 }], ..Networks::default() };
        node.wish_with([wanted], Some(networks), 10);
        assert_eq!(flags(&only_frontend(&node.plan)), has | expected);
    }
}

#[test]
fn a_frontend_without_endpoints_says_whether_there_are_some_elsewhere() {
    let mut node = Node::<V4>::new(LIMITS);
    let both = [Policy::Cluster, Policy::Local];
    let mut none = port(2, &both, &[], &[]);
    none.frontends[0].is_node_address = true;
    node.wish([port(1, &both, &[endpoint(1)], &[]), none], 0);
    let mut all: Vec<_> = node.plan.frontends().collect();
    all.sort_by_key(|(key, _)| (key.addr[3], key.addr[2]));
    let values: Vec<_> = all.iter().map(|(_, value)| (value.slots, flags(value))).collect();
    let local = frontend::LOCAL | frontend::INNER_LOCAL;
    let has = frontend::HAS_ENDPOINTS;
    assert_eq!(values, [(1, has), (0, has | local), (0, frontend::NODE_ADDRESS), (0, local)]);
    assert!(all.iter().all(|(key, _)| key.zero == 0));
}

#[test]
fn a_frontend_that_moves_between_services_is_switched_not_removed() {
    let mut node = Node::<V4>::new(LIMITS);
    let taken = |n: u8, address_of: u8| {
        let mut port = simple(n, &[n]);
        port.frontends[0].addr = [10, 96, 9, address_of];
        port
    };
    node.wish([taken(1, 1), taken(2, 2)], 0);
    for swapped in [[taken(1, 2), taken(2, 1)], [taken(1, 1), taken(2, 2)]] {
        let lines = node.lines(swapped, 10);
        assert_eq!(lines.len(), 2);
        assert!(lines.iter().all(|line| line.starts_with("frontend ")), "{lines:?}");
    }
    let lines = node.lines([taken(2, 1)], 20);
    assert_eq!(lines[0], "frontend 10.96.9.1 service 2 ring 1+1 flags 2");
    assert_eq!(lines[1..], ["remove 10.96.9.2", "backend 1 10.0.0.1 of 1 flags 2 generation 2"]);
}

#[test]
fn snat_addresses_have_their_bit_as_long_as_flows_use_them() {
    let mut plan = Plan::<V4>::new(LIMITS);
    let address = [192, 0, 2, 1];
    let bit = snat_bit(address);
    let is_set = |plan: &Plan<V4>| plan.ingress_gate()[(bit / 64) as usize] >> (bit % 64) & 1 == 1;
    let nothing = Delta::default();
    assert_eq!(script(&plan.update(&nothing, true, &[address, address], 0).changes), ["ingress gate"]);
    assert_eq!(plan.update(&nothing, true, &[address], 0).changes, []);
    plan.update(&nothing, true, &[], 10);
    plan.collect(&in_use(15), 20);
    plan.collect(&InUse { started_ms: 5_000, ingress_bits: HashSet::from([bit]), ..InUse::default() }, 5_000);
    assert!(is_set(&plan));
    plan.collect(&in_use(5_000), 5_000);
    assert!(!is_set(&plan));
}
