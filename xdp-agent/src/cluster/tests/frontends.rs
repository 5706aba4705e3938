//! Which addresses a Service is served at.

use super::*;

#[test]
fn services_that_are_not_proxied_have_no_frontends() {
    for object in [
        json!({"spec": {"clusterIP": "None"}}),
        json!({"spec": {"clusterIP": ""}}),
        json!({"spec": {"clusterIP": null}}),
        json!({"spec": {"type": "ExternalName", "externalName": "example.com"}}),
        json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": ""}}}),
        json!({"spec": null}),
    ] {
        let world = World::new().service_object(object.clone());
        assert_eq!((world.lines(), world.problems()), (vec![], vec![]), "{object}");
    }
}

#[test]
fn a_service_comes_and_goes_with_the_label_of_another_proxy() {
    let label =
        |value: Value| json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": value}}});
    let world = World::new().service(json!({}));
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 "]);
    let world = world.service_object(label(json!("other")));
    assert!(world.lines().is_empty());
    assert_eq!(world.service(json!({})).lines(), ["ClusterIp 10.96.0.1:80 "]);
}

#[test]
fn each_family_has_its_own_cluster_ip() {
    let dual = ["ClusterIp 10.96.0.9:80 ", "ClusterIp [fd00::9]:80 "];
    for (spec, expected) in [
        (json!({"clusterIP": "fd00::9"}), &dual[1..]),
        (json!({"clusterIP": "10.96.0.9", "ipFamilies": ["IPv4"]}), &dual[..1]),
        (
            json!({"clusterIP": "fd00::9", "clusterIPs": ["fd00::9", "10.96.0.9"], "ipFamilies": ["IPv6", "IPv4"]}),
            &dual,
        ),
        (
            json!({"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00::9"], "ipFamilies": ["IPv4", "IPv6"]}),
            &dual,
        ),
        // The families say how many of the addresses count.
        (
            json!({"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00::9"], "ipFamilies": ["IPv4"]}),
            &dual[..1],
        ),
        // Without families only the first form does.
        (json!({"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00::9"]}), &dual[..1]),
    ] {
        assert_eq!(World::new().service(spec.clone()).lines(), expected, "{spec}");
    }
}

#[test]
fn every_kind_of_frontend_is_claimed_in_its_family() {
    let world = World::new().slice("a", json!([endpoint("10.0.0.1")]), json!({})).service_object(json!({
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.01", "externalIPs": ["198.51.100.7", "fd00::7"],
            "clusterIPs": ["10.96.0.01", "fd00::9"], "ipFamilies": ["IPv4", "IPv6"],
            "loadBalancerClass": "example.com/any",
            "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
        },
        "status": {"loadBalancer": {"ingress": [
            {"ip": "203.0.113.1"}, {"ip": "203.0.113.2", "ipMode": "VIP"}, {"ip": "203.0.113.3", "ipMode": "Proxy"},
            {"hostname": "lb.example.com"}, {"ip": "198.51.100.7"}, {"ip": "fd00::2"},
        ]}},
    }));
    assert_eq!(
        world.lines(),
        [
            "ClusterIp 10.96.0.1:80 10.0.0.1:8080",
            "NodePort 192.0.2.1:30080 10.0.0.1:8080",
            "ExternalIp 198.51.100.7:80 10.0.0.1:8080",
            "LoadBalancer 203.0.113.1:80 10.0.0.1:8080",
            "LoadBalancer 203.0.113.2:80 10.0.0.1:8080",
            "LoadBalancer [fd00::2]:80 ",
            "ExternalIp [fd00::7]:80 ",
            "ClusterIp [fd00::9]:80 ",
            "NodePort [fd00:1::1]:30080 ",
        ]
    );
    assert!(world.problems().is_empty(), "{:?}", world.problems());
}

#[test]
fn a_load_balancer_without_node_ports_is_served_at_its_address() {
    let world = World::new().service_object(json!({
        "spec": {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false},
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}},
    }));
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 ", "LoadBalancer 203.0.113.1:80 "]);
}

/// Other nodes send on what comes to theirs, but for policy Local, whose endpoints are all where it comes in.
#[test]
fn with_direct_server_return_node_ports_are_those_of_every_node() {
    let spec = |policy: &str| {
        json!({
            "type": "NodePort", "externalTrafficPolicy": policy,
            "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
        })
    };
    for forwarding in [Forwarding::Dsr, Forwarding::Hybrid] {
        let of =
            |policy| World::with(Options { forwarding, ..Options::default() }).service(spec(policy)).lines();
        let here = ["ClusterIp 10.96.0.1:80 ", "NodePort 192.0.2.1:30080 "];
        assert_eq!(of("Local"), here);
        let everywhere = [&["NodePort 0.0.0.0:30080 "], &here[..]].concat();
        assert_eq!(of("Cluster"), everywhere);
    }
    let claim = |name: &str, ip: &str| {
        json!({
            "metadata": {"name": name},
            "spec": {"type": "NodePort", "clusterIP": ip, "ports": [{"port": 80, "nodePort": 30080}]},
        })
    };
    let world = World::with(Options { forwarding: Forwarding::Dsr, ..Options::default() });
    let world = world.service_object(claim("a", "10.96.0.1")).service_object(claim("b", "10.96.0.2"));
    assert_eq!(world.problems().len(), 1, "{:?}", world.problems());
}

#[test]
fn a_service_without_a_cluster_ip_of_a_family_has_nothing_in_it() {
    let world = World::new().service(json!({
        "type": "NodePort", "externalIPs": ["fd00::7"], "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
    }));
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 ", "NodePort 192.0.2.1:30080 "]);
}

#[test]
fn one_port_number_serves_three_protocols() {
    let port = |protocol: &str| json!({"name": protocol.to_lowercase(), "port": 53, "protocol": protocol});
    let slice_port = |protocol: &str, port: u16| json!({"name": protocol.to_lowercase(), "port": port, "protocol": protocol});
    let world = World::new().service(json!({"ports": [port("TCP"), port("UDP"), port("SCTP")]})).slice(
        "a",
        json!([endpoint("10.0.0.1")]),
        json!({"ports": [slice_port("TCP", 1), slice_port("UDP", 2), slice_port("SCTP", 3)]}),
    );
    let served: Vec<_> =
        world.told.v4.ports.values().map(|port| (port.name.to_string(), endpoints(&port.cluster))).collect();
    let expected = [
        ("shop/web:sctp/SCTP", "10.0.0.1:3"),
        ("shop/web:tcp/TCP", "10.0.0.1:1"),
        ("shop/web:udp/UDP", "10.0.0.1:2"),
    ];
    assert_eq!(served, expected.map(|(name, endpoints)| (name.to_owned(), endpoints.to_owned())));
}

#[test]
fn an_unnamed_port_goes_with_the_unnamed_port_of_slices() {
    let unnamed = json!({"ports": [{"name": "", "port": 8080, "protocol": "TCP"}]});
    let world = World::new()
        .service(json!({"ports": [{"port": 80}]}))
        .slice("a", json!([endpoint("10.0.0.1")]), json!({}))
        .slice("b", json!([endpoint("10.0.0.2")]), unnamed);
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 10.0.0.2:8080"]);
}

#[test]
fn a_service_of_the_same_name_in_another_namespace_is_another() {
    let mut world = World::new().service(json!({})).slice("a", json!([endpoint("10.0.0.1")]), json!({}));
    let Change::Service(_, other) = service(json!({"spec": {"clusterIP": "10.96.0.2"}})) else { panic!() };
    world.apply(Change::Service(ObjectName::new("other", "web"), other));
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.2:80 ", "ClusterIp 10.96.0.1:80 10.0.0.1:8080"]);
}

#[test]
fn an_address_of_the_node_is_marked_as_long_as_it_is_one() {
    let marked = |world: &World| -> Vec<bool> {
        world.port().frontends.iter().map(|frontend| frontend.is_node_address).collect()
    };
    let mut world = World::new().service(json!({"externalIPs": ["192.0.2.2", "198.51.100.7"]}));
    assert_eq!(marked(&world), [false, true, false]);
    world.cluster.set_node(facts(&["192.0.2.1"], &["192.0.2.1", "198.51.100.7"]));
    world.update();
    assert_eq!(marked(&world), [false, false, true]);
}

#[test]
fn node_ports_are_not_served_on_cluster_ips() {
    let node_port = json!({"type": "NodePort", "ports": [{"name": "http", "port": 80, "nodePort": 30080}]});
    // The ClusterIP of another Service is an address of this node (as kube-proxy's IPVS mode leaves them behind).
    let other = json!({"metadata": {"name": "other"}, "spec": {"clusterIP": "192.0.2.1"}});
    let both = ["ClusterIp 192.0.2.1:80 ", "ClusterIp 10.96.0.1:80 "];
    let alone = ["ClusterIp 10.96.0.1:80 ", "NodePort 192.0.2.1:30080 "];
    let world = World::new().service(node_port.clone()).service_object(other.clone());
    assert_eq!(world.lines(), both);
    let world = world.without_service("other");
    assert_eq!(world.lines(), alone);
    let world = World::new().service_object(other).service(node_port);
    assert_eq!(world.lines(), both);
}

#[test]
fn values_that_cannot_be_used_are_said_and_the_rest_is_served() {
    let world = World::new().service_object(json!({
        "spec": {
            "externalIPs": ["198.51.100.300", "127.0.0.1", "198.51.100.7"],
            "ports": [
                {"name": "q", "port": 1, "protocol": "QUIC"}, {"name": "big", "port": 70000},
                {"name": "u", "port": 1, "protocol": "UDP"}, {"name": "u", "port": 2, "protocol": "UDP"},
                {"name": "zero", "port": 0}, {"name": "n", "port": 3, "nodePort": 70000},
            ],
        },
    }));
    let lines = world.lines();
    let expected = [
        "ClusterIp 10.96.0.1:3 ",
        "ExternalIp 198.51.100.7:3 ",
        "ClusterIp 10.96.0.1:1 ",
        "ExternalIp 198.51.100.7:1 ",
    ];
    assert_eq!(lines, expected);
    let problems = world.problems();
    let words = ["198.51.100.300", "loopback", "QUIC", "70000", "port 2 ", "port 0 ", "nodePort 70000"];
    assert_eq!(problems.len(), words.len(), "{problems:?}");
    for (problem, word) in problems.iter().zip(words) {
        assert!(problem.starts_with("Service shop/web: ") && problem.contains(word), "{problem}");
    }
    assert!(world.service(json!({})).problems().is_empty());
}

#[test]
fn an_object_with_many_bad_values_makes_few_problems() {
    let bad: Vec<String> = (0..1000).map(|n| format!("{}{n}", "x".repeat(1000))).collect();
    let problems = World::new().service(json!({"externalIPs": bad})).problems();
    assert_eq!(problems.len(), 9);
    assert!(
        problems.iter().all(|problem| problem.len() < 250) && problems[8].contains("992 more"),
        "{problems:?}"
    );
}
