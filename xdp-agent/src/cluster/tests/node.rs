//! What this node and the networks decide.

use super::*;

fn node_port() -> Value {
    json!({
        "type": "NodePort", "clusterIPs": ["10.96.0.1", "fd00::9"], "ipFamilies": ["IPv4", "IPv6"],
        "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
    })
}

/// Where NodePorts are served.
fn node_ports(world: &World) -> Vec<String> {
    let lines = world.lines().into_iter();
    lines
        .filter_map(|line| Some(line.strip_prefix("NodePort ")?.strip_suffix(":30080 ")?.to_owned()))
        .collect()
}

#[test]
fn node_ports_are_served_on_the_first_address_of_a_family() {
    let address = |kind: &str, ip: &str| json!({"type": kind, "address": ip});
    let (internal, external) = (|ip| address("InternalIP", ip), |ip| address("ExternalIP", ip));
    for (addresses, expected) in [
        (
            json!([external("203.0.113.9"), internal("192.0.2.77"), internal("192.0.2.78")]),
            ["192.0.2.77", "[fd00:1::1]"],
        ),
        (
            json!([internal("fd00::1"), external("203.0.113.9"), external("fd00::2")]),
            ["203.0.113.9", "[fd00::1]"],
        ),
        // What the operator gives stands in for what the object lacks.
        (json!([address("Hostname", "here")]), ["192.0.2.1", "[fd00:1::1]"]),
        (json!(null), ["192.0.2.1", "[fd00:1::1]"]),
    ] {
        let world = World::new().service(node_port()).node(json!({"status": {"addresses": addresses}}));
        assert_eq!(node_ports(&world), expected);
        let mut frontends = world.told.v4.ports.values().flat_map(|port| &port.frontends);
        assert!(frontends.any(|f| f.kind == wanted::FrontendKind::NodePort && f.is_node_address));
    }
}

#[test]
fn node_ports_follow_the_addresses_of_the_node() {
    let at = |ip: &str| json!({"status": {"addresses": [{"type": "InternalIP", "address": ip}]}});
    let world = World::new().service(node_port()).node(at("192.0.2.77"));
    assert_eq!(node_ports(&world)[0], "192.0.2.77");
    let mut world = world.node(at("192.0.2.78"));
    assert_eq!(node_ports(&world)[0], "192.0.2.78");
    world.apply(Change::Node("here".to_owned(), None));
    assert_eq!(node_ports(&world)[0], "192.0.2.1");
    let other = Change::Node("there".to_owned(), Some(Arc::new(Node::default())));
    world.apply(other);
    assert_eq!(world.cluster.eligibility(), Eligibility::Absent);
}

#[test]
fn addresses_that_the_operator_gives_stand_in_for_those_of_their_family() {
    let options = Options {
        node_ips: ["192.0.2.5", "192.0.2.6"].map(|ip| ip.parse().unwrap()).into(),
        ..Options::default()
    };
    let addresses = json!([
        {"type": "InternalIP", "address": "192.0.2.77"}, {"type": "InternalIP", "address": "fd00::1"},
    ]);
    let world = World::with(options).service(node_port()).node(json!({"status": {"addresses": addresses}}));
    assert_eq!(node_ports(&world), ["192.0.2.5", "[fd00::1]"]);
    for own in ["192.0.2.6", "192.0.2.77"] {
        assert!(
            world.told.v4.networks.own.contains(&own.parse::<std::net::Ipv4Addr>().unwrap().octets()),
            "{own}"
        );
    }
}

#[test]
fn networks_choose_where_node_ports_are_served() {
    let own = ["127.0.0.1", "192.0.2.1", "198.51.100.1", "203.0.113.1", "::1", "fd00:1::1", "fe80::1"];
    for (cidrs, expected) in [
        (&["192.0.2.0/24"][..], vec!["192.0.2.1", "[fd00:1::1]"]),
        (&["192.0.2.0/24", "203.0.113.1/32", "fd00:2::/64"], vec!["192.0.2.1", "203.0.113.1"]),
        (&["fd00:1::/64"], vec!["192.0.2.1", "198.51.100.1", "203.0.113.1", "[fd00:1::1]"]),
        (&["0.0.0.0/0", "fd00:2::/64"], vec!["192.0.2.1", "198.51.100.1", "203.0.113.1"]),
        (&["10.0.0.0/8", "::/0"], vec!["[fd00:1::1]"]),
        (&["127.0.0.0/8", "::/0", "fe80::/64"], vec!["[fd00:1::1]", "[fe80::1]"]),
        (&[], vec!["192.0.2.1", "198.51.100.1", "203.0.113.1", "[fd00:1::1]"]),
    ] {
        let nodeport_addresses = NodePortAddresses::Cidrs(networks(cidrs));
        let mut world =
            World::with(Options { nodeport_addresses, ..Options::default() }).service(node_port());
        world.cluster.set_node(facts(&[], &own));
        world.update();
        assert_eq!(node_ports(&world), expected, "{cidrs:?}");
    }
}

#[test]
fn the_zone_of_the_node_chooses_endpoints_with_hints() {
    let hinted = |ip: &str, zone: &str| json!({"addresses": [ip], "hints": {"forZones": [{"name": zone}]}});
    let zone = |zone: &str| json!({"metadata": {"labels": {"topology.kubernetes.io/zone": zone}}});
    let both = json!([hinted("10.0.0.1", "a"), hinted("10.0.0.2", "b")]);
    let world = World::new().service(json!({})).slice("a", both.clone(), json!({}));
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 10.0.0.1:8080,10.0.0.2:8080"]);
    let world = world.node(zone("b"));
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 10.0.0.2:8080"]);
    let world = world.node(zone("a"));
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 10.0.0.1:8080"]);
    let given = Options { zone: Some("b".to_owned()), ..Options::default() };
    let world = World::with(given).service(json!({})).slice("a", both, json!({})).node(zone("a"));
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 10.0.0.2:8080"]);
}

fn texts<A: IpAddress>(networks: &[wanted::Network<A>]) -> Vec<String> {
    networks.iter().map(ToString::to_string).collect()
}

#[test]
fn service_networks_are_those_of_flags_and_of_objects() {
    let service_cidrs = networks(&["10.96.0.0/12"]);
    let world = World::with(Options { service_cidrs, ..Options::default() });
    assert_eq!(texts(&world.told.v4.networks.services), ["10.96.0.0/12"]);
    let world = world
        .cidr("a", json!(["10.97.1.2/24", "fd00:96::/112"]))
        .cidr("b", json!(["nonsense", "10.98.0.0/24"]));
    assert_eq!(texts(&world.told.v4.networks.services), ["10.96.0.0/12", "10.97.1.0/24", "10.98.0.0/24"]);
    assert_eq!(texts(&world.told.v6.networks.services), ["fd00:96::/112"]);
    assert!(world.problems()[0].starts_with("ServiceCIDR b: "), "{:?}", world.problems());
    let mut world = world.cidr("b", json!([]));
    world.apply(Change::ServiceCidr("a".to_owned(), None));
    assert_eq!(texts(&world.told.v4.networks.services), ["10.96.0.0/12"]);
    assert!(world.told.v6.networks.services.is_empty() && world.problems().is_empty());
}

#[test]
fn pods_have_the_networks_of_the_detector() {
    let pods = |detect_local: DetectLocal| {
        let world = World::with(Options { detect_local, ..Options::default() })
            .node(json!({"spec": {"podCIDR": "10.0.1.0/24", "podCIDRs": ["10.0.1.0/24", "fd00:10::/64"]}}));
        (texts(&world.told.v4.networks.pods), texts(&world.told.v6.networks.pods))
    };
    let none = (vec![], vec![]);
    assert_eq!(pods(DetectLocal::None), none);
    assert_eq!(pods(DetectLocal::BridgeInterface("cni0".to_owned())), none);
    assert_eq!(pods(DetectLocal::InterfaceNamePrefix("veth".to_owned())), none);
    assert_eq!(
        pods(DetectLocal::ClusterCidr(networks(&["10.0.0.0/8"]))),
        (vec!["10.0.0.0/8".to_owned()], vec![])
    );
    let both = (vec!["10.0.1.0/24".to_owned()], vec!["fd00:10::/64".to_owned()]);
    assert_eq!(pods(DetectLocal::NodeCidr), both);
}

#[test]
fn every_address_of_the_node_is_its_own() {
    let addresses = json!([{"type": "InternalIP", "address": "192.0.2.7"}, {"type": "ExternalIP", "address": "fd00:1::7"}]);
    let world = World::new().node(json!({"status": {"addresses": addresses}}));
    assert_eq!(world.told.v4.networks.own, [[192, 0, 2, 1], [192, 0, 2, 2], [192, 0, 2, 7]]);
    assert_eq!(world.told.v6.networks.own.len(), 2);
}

#[test]
fn an_address_that_comes_concerns_only_those_who_claim_it() {
    let mut world = World::new()
        .service(json!({}))
        .service_object(json!({"metadata": {"name": "other"}, "spec": {"clusterIP": "10.96.0.2", "externalIPs": ["198.51.100.7"]}}));
    world.cluster.set_node(facts(&["192.0.2.1", "fd00:1::1"], &["192.0.2.1", "198.51.100.7", "fd00:1::1"]));
    let update = world.cluster.update();
    let told: Vec<_> = update.v4.ports.keys().map(|name| &*name.service).collect();
    assert_eq!(told, ["other"]);
    assert!(update.v4.networks.is_some() && update.v6.is_empty());
}

#[test]
fn nobody_should_send_anything_to_a_node_that_leaves() {
    for (object, expected) in [
        (json!({}), Eligibility::Eligible),
        (json!({"spec": {"taints": [{"key": "other", "effect": "NoSchedule"}]}}), Eligibility::Eligible),
        (json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}), Eligibility::Leaving),
        (
            json!({"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}}),
            Eligibility::Leaving,
        ),
    ] {
        assert_eq!(World::new().node(object).cluster.eligibility(), expected);
    }
}

#[test]
fn a_node_address_that_cannot_be_read_is_said() {
    let addresses = json!([{"type": "InternalIP", "address": "nonsense"}]);
    let world = World::new().node(json!({"status": {"addresses": addresses}, "spec": {"podCIDRs": ["x"]}}));
    let problems = world.problems();
    assert!(problems.len() == 2 && problems.iter().all(|p| p.starts_with("Node here: ")), "{problems:?}");
}
