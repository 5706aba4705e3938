//! However changes are ordered and batched, what has been told adds up to the same.

use proptest::{prelude::*, sample::select};

use super::*;

/// What is done to a cluster. Few names and addresses, so that they meet.
#[derive(Clone, Debug)]
enum Step {
    Apply(Change),
    Facts(NodeFacts),
    Update,
}

/// One of some values.
fn one<const N: usize>(values: [Value; N]) -> impl Strategy<Value = Value> + Clone {
    select(values.to_vec())
}

fn services() -> impl Strategy<Value = Value> {
    let ips = one([
        json!({"clusterIP": "10.96.0.1"}),
        json!({"clusterIP": "10.96.0.2"}),
        json!({"clusterIP": "None"}),
        // An address of the node, where NodePorts are served.
        json!({"clusterIP": "192.0.2.1"}),
        json!({"clusterIP": "fd00::9"}),
        json!({"clusterIPs": ["10.96.0.1", "fd00::9"], "ipFamilies": ["IPv4", "IPv6"]}),
    ]);
    let outside = one([
        json!({}),
        json!({"externalIPs": ["198.51.100.7", "fd00::7"]}),
        json!({"externalIPs": ["192.0.2.1", "10.96.0.2", "nonsense"]}),
        json!({"loadBalancerSourceRanges": ["192.0.2.0/24", "fd00::/64"]}),
        json!({"loadBalancerSourceRanges": ["x"]}),
        json!({"healthCheckNodePort": 32000}),
    ]);
    let ports = one([
        json!([{"name": "http", "port": 80, "nodePort": 30080}]),
        json!([{"name": "http", "port": 80}, {"name": "more", "port": 81, "nodePort": 30080}]),
        json!([{"name": "dns", "port": 80, "protocol": "UDP"}]),
        json!([{"name": "same", "port": 80, "nodePort": 80}]),
        json!([]),
    ]);
    let policies = one([
        json!({}),
        json!({"externalTrafficPolicy": "Local"}),
        json!({"internalTrafficPolicy": "Local", "sessionAffinity": "ClientIP"}),
        json!({"internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local"}),
    ]);
    let kind = one([json!("ClusterIP"), json!("NodePort"), json!("LoadBalancer"), json!("ExternalName")]);
    let created = one([json!(null), json!("2026-01-01T00:00:00Z"), json!("2026-01-02T00:00:00Z")]);
    let ingress = one([json!([]), json!([{"ip": "203.0.113.1"}, {"ip": "198.51.100.7"}, {"ip": "fd00::2"}])]);
    (ips, outside, ports, policies, kind, created, ingress).prop_map(
        |(ips, outside, ports, policies, kind, created, ingress)| {
            let mut spec = json!({"type": kind, "ports": ports});
            [ips, outside, policies].into_iter().for_each(|part| merge(&mut spec, part));
            let status = json!({"loadBalancer": {"ingress": ingress}});
            json!({"metadata": {"creationTimestamp": created}, "spec": spec, "status": status})
        },
    )
}

fn service_change() -> impl Strategy<Value = Change> {
    (select(vec!["web", "other", "third"]), proptest::option::weighted(0.7, services())).prop_map(
        |(name, object)| {
            let Some(mut object) = object else {
                return Change::Service(ObjectName::new("shop", name), None);
            };
            merge(&mut object, json!({"metadata": {"name": name}}));
            service(object)
        },
    )
}

fn slice_change() -> impl Strategy<Value = Change> {
    let hinted = json!({"addresses": ["10.0.0.5"], "hints": {"forZones": [{"name": "a"}]}});
    let endpoint = one([
        endpoint("10.0.0.1"),
        local("10.0.0.1"),
        local("10.0.0.2"),
        leaving("10.0.0.1", "here"),
        hinted,
        endpoint("127.0.0.1"),
        endpoint("10.96.0.2"),
        endpoint("fd00:2::1"),
        local("fd00:2::2"),
    ]);
    let endpoints = proptest::collection::vec(endpoint, 0..4);
    let service = one([json!("web"), json!("web"), json!("other"), json!("fourth"), json!(null)]);
    let family = one([json!("IPv4"), json!("IPv4"), json!("IPv6"), json!("FQDN")]);
    let ports = one([
        json!([{"name": "http", "port": 8080}]),
        json!([{"name": "http", "port": 8080}, {"name": "more", "port": 8081}, {"name": "dns", "port": 53, "protocol": "UDP"}]),
        json!([{"name": "more", "port": 0}]),
    ]);
    let object = (endpoints, service, family, ports);
    (select(vec!["a", "b", "c"]), proptest::option::weighted(0.7, object)).prop_map(|(name, object)| {
        let Some((endpoints, service, family, ports)) = object else {
            return Change::Slice(ObjectName::new("shop", name), None);
        };
        let labels = json!({"kubernetes.io/service-name": service});
        let labels = if service.is_null() { json!(null) } else { labels };
        slice(
            name,
            json!(endpoints),
            json!({"addressType": family, "ports": ports, "metadata": {"labels": labels}}),
        )
    })
}

fn node_change() -> impl Strategy<Value = Change> {
    let object = one([
        json!({}),
        json!({"metadata": {"labels": {"topology.kubernetes.io/zone": "a"}}}),
        json!({"status": {"addresses": [{"type": "InternalIP", "address": "10.96.0.2"}]}}),
        json!({"status": {"addresses": [{"type": "InternalIP", "address": "198.51.100.7"}]}}),
        json!({"spec": {"podCIDRs": ["10.0.0.0/24", "fd00:2::/64"]}}),
        json!({"spec": {"podCIDRs": ["nonsense"]}}),
    ]);
    let gone = || Change::Node("here".to_owned(), None);
    proptest::option::weighted(0.7, object).prop_map(move |object| object.map_or_else(gone, node))
}

fn cidr_change() -> impl Strategy<Value = Change> {
    let cidrs = one([json!(["10.96.0.0/16"]), json!(["fd00::/112", "10.96.0.0/16"]), json!(["x"])]);
    (select(vec!["a", "b"]), proptest::option::weighted(0.7, cidrs)).prop_map(|(name, cidrs)| match cidrs {
        Some(cidrs) => cidr(name, cidrs),
        None => Change::ServiceCidr(name.to_owned(), None),
    })
}

fn step() -> impl Strategy<Value = Step> {
    let facts = select(vec![
        facts(&["192.0.2.1"], &["192.0.2.1"]),
        facts(&["192.0.2.1", "fd00:1::1"], &["192.0.2.1", "198.51.100.7", "fd00::7"]),
        facts(&[], &["10.96.0.1", "fd00:1::1", "127.0.0.1"]),
    ]);
    prop_oneof![
        6 => service_change().prop_map(Step::Apply),
        6 => slice_change().prop_map(Step::Apply),
        1 => node_change().prop_map(Step::Apply),
        1 => cidr_change().prop_map(Step::Apply),
        1 => facts.prop_map(Step::Facts),
        3 => Just(Step::Update),
    ]
}

fn options() -> impl Strategy<Value = Options> {
    let node_ports = [NodePortAddresses::Primary, NodePortAddresses::Cidrs(vec![])];
    let detectors = [DetectLocal::None, DetectLocal::NodeCidr];
    (select(node_ports.to_vec()), select(detectors.to_vec())).prop_map(
        |(nodeport_addresses, detect_local)| Options {
            node: "here".to_owned(),
            nodeport_addresses,
            detect_local,
            ..Options::default()
        },
    )
}

/// The last state of every object, and the change that removes it.
#[derive(Default)]
struct Last {
    objects: BTreeMap<String, (Change, Change)>,
    facts: NodeFacts,
}

impl Last {
    fn take(&mut self, change: &Change) {
        let (key, gone, is_gone) = match change {
            Change::Service(name, object) => {
                (format!("service {name}"), Change::Service(name.clone(), None), object.is_none())
            }
            Change::Slice(name, object) => {
                (format!("slice {name}"), Change::Slice(name.clone(), None), object.is_none())
            }
            Change::Node(name, object) => {
                (format!("node {name}"), Change::Node(name.clone(), None), object.is_none())
            }
            Change::ServiceCidr(name, object) => {
                (format!("cidr {name}"), Change::ServiceCidr(name.clone(), None), object.is_none())
            }
        };
        if is_gone {
            self.objects.remove(&key);
        } else {
            self.objects.insert(key, (change.clone(), gone));
        }
    }
}

/// All that a cluster says.
fn all(cluster: &Cluster, told: &Told) -> String {
    let mut problems = cluster.problems();
    problems.sort();
    let (checks, no_local) = (cluster.health_checks(), cluster.no_local_endpoints());
    format!("{told:#?} {problems:#?} {checks:#?} {no_local:?} {:?}", cluster.eligibility())
}

#[test]
fn what_does_not_matter_of_an_object_changes_nothing() {
    let list = || json!([endpoint("10.0.0.1"), local("10.0.0.2")]);
    let noise =
        json!({"metadata": {"resourceVersion": "7", "annotations": {"a": "b"}, "labels": {"app": "web"}}});
    let mut world = World::new().service(json!({})).slice("a", list(), json!({})).node(json!({}));
    let mut reordered = list();
    reordered.as_array_mut().unwrap().reverse();
    for change in [
        service(json!({})),
        service(noise.clone()),
        service(json!({"spec": {"selector": {"app": "web"}, "publishNotReadyAddresses": true}})),
        slice("a", list(), noise.clone()),
        slice("a", reordered, json!({})),
        node(json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}})),
        Change::Node("there".to_owned(), Some(Arc::new(Node::default()))),
        Change::Service(ObjectName::new("shop", "unknown"), None),
        Change::Slice(ObjectName::new("shop", "unknown"), None),
        Change::ServiceCidr("unknown".to_owned(), None),
    ] {
        world.cluster.apply(change.clone());
        assert!(world.cluster.update().is_empty(), "{change:?}");
    }
}

#[test]
fn a_change_tells_only_of_the_service_that_it_touches() {
    let mut world = World::new();
    for at in 1..=50 {
        let ports = json!([{"name": "http", "port": 80}, {"name": "more", "port": 81}]);
        let spec = json!({"clusterIP": format!("10.96.1.{at}"), "ports": ports});
        world = world.service_object(json!({"metadata": {"name": format!("other-{at}")}, "spec": spec}));
    }
    world.cluster.apply(service(
        json!({"spec": {"ports": [{"name": "http", "port": 80}, {"name": "more", "port": 81}]}}),
    ));
    assert_eq!(world.cluster.update().v4.ports.len(), 2);
    world.cluster.apply(slice("a", json!([endpoint("10.0.0.1")]), json!({})));
    assert_eq!(world.cluster.touched, BTreeSet::from([ObjectName::new("shop", "web")]));
    let update = world.cluster.update();
    let told: Vec<_> = update.v4.ports.keys().map(ToString::to_string).collect();
    assert_eq!(told, ["shop/web:http/TCP"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_history_leads_to_what_its_end_alone_does(
        options in options(),
        steps in proptest::collection::vec(step(), 1..40),
    ) {
        let (mut cluster, mut told, mut last) = (Cluster::new(options.clone()), Told::default(), Last::default());
        let mut seen = (cluster.problems_version(), cluster.problems());
        for step in steps {
            match step {
                Step::Apply(change) => {
                    last.take(&change);
                    cluster.apply(change);
                }
                Step::Facts(facts) => {
                    last.facts = facts.clone();
                    cluster.set_node(facts);
                }
                Step::Update => {
                    told.take(cluster.update());
                    let now = (cluster.problems_version(), cluster.problems());
                    prop_assert!(now.0 != seen.0 || now.1 == seen.1, "other problems of the same version");
                    seen = now;
                }
            }
        }
        told.take(cluster.update());
        prop_assert!(cluster.update().is_empty());

        let (mut fresh, mut fresh_told) = (Cluster::new(options.clone()), Told::default());
        fresh.set_node(last.facts.clone());
        last.objects.values().rev().for_each(|(object, _)| fresh.apply(object.clone()));
        fresh_told.take(fresh.update());
        prop_assert_eq!(all(&cluster, &told), all(&fresh, &fresh_told));

        for (_, gone) in last.objects.into_values() {
            cluster.apply(gone);
        }
        told.take(cluster.update());
        let (mut empty, mut empty_told) = (Cluster::new(options), Told::default());
        empty.set_node(last.facts);
        empty_told.take(empty.update());
        prop_assert_eq!(all(&cluster, &told), all(&empty, &empty_told));
        prop_assert!(told.lines().is_empty());
        prop_assert!(cluster.services.is_empty() && cluster.slices.is_empty(), "something is kept");
        prop_assert!(cluster.v4.claims.is_empty() && cluster.v6.claims.is_empty(), "a claim is kept");
    }
}
