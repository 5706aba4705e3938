use serde_json::{Value, json};

use super::*;

/// Objects for one test, built as their JSON.
#[derive(Default)]
struct World {
    objects: Objects,
    node: NodeFacts,
}

impl World {
    fn new() -> Self {
        let node = NodeFacts {
            name: "here".to_owned(),
            addresses: vec![Ipv4Addr::new(192, 0, 2, 1)],
            own: BTreeSet::from([Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)]),
        };
        Self { node, ..Self::default() }
    }

    /// A Service in namespace `shop` with port 80/TCP, changed by `spec`.
    fn service(mut self, name: &str, spec: Value) -> Self {
        let mut full = json!({"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]});
        merge(&mut full, spec);
        let value = json!({"metadata": {"name": name, "namespace": "shop"}, "spec": full});
        self.add_service(value);
        self
    }

    fn add_service(&mut self, value: Value) {
        let service: Service = serde_json::from_value(value).unwrap();
        let name = service.metadata.name.clone().unwrap();
        self.objects.services.insert(ObjectName { namespace: "shop".to_owned(), name }, Arc::new(service));
    }

    /// A slice of Service `web` in namespace `shop` for port `http` 8080, changed by `object`.
    fn slice(mut self, name: &str, endpoints: Value, object: Value) -> Self {
        let mut full = json!({
            "metadata": {"name": name, "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": endpoints,
        });
        merge(&mut full, object);
        let name = ObjectName { namespace: "shop".to_owned(), name: name.to_owned() };
        self.objects.slices.insert(name, Arc::new(serde_json::from_value(full).unwrap()));
        self
    }

    fn node_object(mut self, value: Value) -> Self {
        let name = ObjectName { namespace: String::new(), name: "here".to_owned() };
        let mut full = json!({"metadata": {"name": "here"}});
        merge(&mut full, value);
        self.objects.nodes.insert(name, Arc::new(serde_json::from_value(full).unwrap()));
        self
    }

    fn desired(&self) -> Desired {
        desired(&self.objects, &self.node)
    }

    /// Every frontend as `kind addr:port list-of-endpoints`.
    fn served(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for service in self.desired().services {
            for frontend in &service.frontends {
                let list = match frontend.policy {
                    Policy::Cluster => &service.cluster,
                    Policy::Local => &service.local,
                };
                let endpoints: Vec<String> =
                    list.iter().map(|e| format!("{}:{}", Ipv4Addr::from(e.addr), e.port)).collect();
                let addr = Ipv4Addr::from(frontend.addr);
                lines.push(format!("{:?} {addr}:{} {}", frontend.kind, frontend.port, endpoints.join(",")));
            }
        }
        lines
    }

    fn problems(&self) -> Vec<(ProblemKind, String)> {
        self.desired().problems.into_iter().map(|problem| (problem.kind, problem.to_string())).collect()
    }
}

fn merge(base: &mut Value, change: Value) {
    match (base, change) {
        (Value::Object(base), Value::Object(change)) => {
            for (key, value) in change {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, change) => *base = change,
    }
}

fn endpoint(ip: &str) -> Value {
    json!({"addresses": [ip]})
}

#[test]
fn services_that_are_not_proxied_have_no_frontends() {
    for spec in [
        json!({"clusterIP": "None"}),
        json!({"clusterIP": ""}),
        json!({"clusterIP": null}),
        json!({"type": "ExternalName", "externalName": "example.com"}),
        json!({"clusterIP": "fd00::1"}),
        json!({"ipFamilies": ["IPv6"], "clusterIPs": ["fd00::1"], "clusterIP": "fd00::1"}),
    ] {
        assert!(World::new().service("web", spec.clone()).served().is_empty(), "{spec}");
    }
    let mut world = World::new();
    world.add_service(json!({
        "metadata": {"name": "web", "labels": {"service.kubernetes.io/service-proxy-name": ""}},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]},
    }));
    assert!(world.served().is_empty());
}

#[test]
fn the_cluster_ip_of_this_family_is_found_in_second_place() {
    let spec = json!({"clusterIP": "fd00::1", "clusterIPs": ["fd00::1", "10.96.0.9"], "ipFamilies": ["IPv6", "IPv4"]});
    assert_eq!(World::new().service("web", spec).served(), ["ClusterIp 10.96.0.9:80 "]);
}

#[test]
fn every_kind_of_frontend_is_claimed() {
    let mut world = World::new().slice("a", json!([endpoint("10.0.0.1")]), json!({}));
    world.add_service(json!({
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.01", "externalIPs": ["198.51.100.7", "fd00::7"],
            "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
        },
        "status": {"loadBalancer": {"ingress": [
            {"ip": "203.0.113.1"}, {"ip": "203.0.113.2", "ipMode": "VIP"}, {"ip": "203.0.113.3", "ipMode": "Proxy"},
            {"hostname": "lb.example.com"}, {"ip": "198.51.100.7"},
        ]}},
    }));
    assert_eq!(
        world.served(),
        [
            "ClusterIp 10.96.0.1:80 10.0.0.1:8080",
            "NodePort 192.0.2.1:30080 10.0.0.1:8080",
            "ExternalIp 198.51.100.7:80 10.0.0.1:8080",
            "LoadBalancer 203.0.113.1:80 10.0.0.1:8080",
            "LoadBalancer 203.0.113.2:80 10.0.0.1:8080",
        ]
    );
    assert_eq!(world.problems(), []);
}

#[test]
fn node_ports_are_served_on_the_primary_address_of_the_node_object() {
    let status = |addresses: Value| json!({"status": {"addresses": addresses}});
    let spec = json!({"type": "NodePort", "ports": [{"name": "http", "port": 80, "nodePort": 30080}]});
    let cases = [
        (
            json!([{"type": "ExternalIP", "address": "203.0.113.9"}, {"type": "InternalIP", "address": "192.0.2.77"}]),
            "192.0.2.77",
        ),
        (
            json!([{"type": "InternalIP", "address": "fd00::1"}, {"type": "ExternalIP", "address": "203.0.113.9"}]),
            "203.0.113.9",
        ),
        (json!([{"type": "Hostname", "address": "here"}]), "192.0.2.1"),
    ];
    for (addresses, expected) in cases {
        let world = World::new().service("web", spec.clone()).node_object(status(addresses));
        assert_eq!(world.served()[1], format!("NodePort {expected}:30080 "));
        assert!(world.desired().services[0].frontends[1].node_address);
    }
}

#[test]
fn an_external_ip_that_is_the_nodes_own_is_marked() {
    let world = World::new().service("web", json!({"externalIPs": ["192.0.2.2", "198.51.100.7"]}));
    let desired = world.desired();
    let marked: Vec<bool> = desired.services[0].frontends.iter().map(|f| f.node_address).collect();
    assert_eq!(marked, [false, true, false]);
}

#[test]
fn slices_that_do_not_count_are_left_out() {
    let one = || json!([endpoint("10.0.0.1")]);
    for object in [
        json!({"metadata": {"labels": {"service.kubernetes.io/headless": ""}}}),
        json!({"metadata": {"labels": {"kubernetes.io/service-name": "other"}}}),
        json!({"metadata": {"labels": null}}),
        json!({"addressType": "FQDN"}),
        json!({"addressType": "IPv6"}),
        json!({"ports": [{"name": "http", "protocol": "TCP"}]}),
        json!({"ports": [{"name": "http", "port": 0, "protocol": "TCP"}]}),
        json!({"ports": [{"port": 8080, "protocol": "TCP"}]}),
        json!({"ports": [{"name": "http", "port": 8080, "protocol": "UDP"}]}),
        json!({"ports": null}),
    ] {
        let world = World::new().service("web", json!({})).slice("a", one(), object.clone());
        assert_eq!(world.served(), ["ClusterIp 10.96.0.1:80 "], "{object}");
        assert!(!world.desired().services[0].any_endpoint);
    }
}

#[test]
fn slices_of_a_service_are_merged_and_each_endpoint_counts_once() {
    let leaving = json!({"addresses": ["10.0.0.1"], "conditions": {"ready": false, "terminating": true}});
    let world = World::new()
        .service("web", json!({}))
        .slice("a", json!([leaving, endpoint("10.0.0.3"), endpoint("010.0.0.2")]), json!({}))
        .slice("b", json!([endpoint("10.0.0.1"), endpoint("10.0.0.3"), {"addresses": []}]), json!({}));
    assert_eq!(world.served(), ["ClusterIp 10.96.0.1:80 10.0.0.1:8080,10.0.0.2:8080,10.0.0.3:8080"]);
}

#[test]
fn a_slice_with_two_ports_of_a_name_serves_both() {
    let ports = json!([{"name": "http", "port": 1, "protocol": "TCP"}, {"name": "http", "port": 2, "protocol": "TCP"}]);
    let world = World::new().service("web", json!({})).slice(
        "a",
        json!([endpoint("10.0.0.1")]),
        json!({"ports": ports}),
    );
    assert_eq!(world.served(), ["ClusterIp 10.96.0.1:80 10.0.0.1:1,10.0.0.1:2"]);
}

#[test]
fn an_endpoint_that_is_leaving_still_serves_its_flows() {
    let leaving = json!({"addresses": ["10.0.0.1"], "conditions": {"ready": false, "serving": true, "terminating": true}});
    let gone = json!({"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": false, "terminating": true}});
    let world = World::new().service("web", json!({})).slice(
        "a",
        json!([leaving, endpoint("10.0.0.2"), gone]),
        json!({}),
    );
    assert_eq!(world.served(), ["ClusterIp 10.96.0.1:80 10.0.0.2:8080"]);
    let serving: Vec<[u8; 4]> = world.desired().services[0].serving.iter().map(|e| e.addr).collect();
    assert_eq!(serving, [[10, 0, 0, 1], [10, 0, 0, 2]]);
}

#[test]
fn policy_local_tells_no_endpoint_from_endpoints_elsewhere() {
    let spec = json!({"type": "NodePort", "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local",
        "ports": [{"name": "http", "port": 80, "nodePort": 30080}]});
    let elsewhere = json!([{"addresses": ["10.0.0.1"], "nodeName": "there"}]);
    let world = World::new().service("web", spec.clone());
    assert!(!world.desired().services[0].any_endpoint);
    let world = world.slice("a", elsewhere, json!({}));
    let service = &world.desired().services[0];
    assert!(service.any_endpoint && service.local.is_empty() && service.cluster.is_empty());
    let here = json!([{"addresses": ["10.0.0.1"], "nodeName": "there"}, {"addresses": ["10.0.0.2"], "nodeName": "here"}]);
    let world = World::new().service("web", spec).slice("a", here, json!({}));
    assert_eq!(
        world.served(),
        ["ClusterIp 10.96.0.1:80 10.0.0.2:8080", "NodePort 192.0.2.1:30080 10.0.0.2:8080"]
    );
    assert!(world.desired().services[0].local[0].local);
}

#[test]
fn the_external_policy_of_a_plain_cluster_ip_is_ignored() {
    let elsewhere = json!([{"addresses": ["10.0.0.1"], "nodeName": "there"}]);
    let world = World::new().service("web", json!({"externalTrafficPolicy": "Local"})).slice(
        "a",
        elsewhere.clone(),
        json!({}),
    );
    assert_eq!(world.served(), ["ClusterIp 10.96.0.1:80 10.0.0.1:8080"]);
    let world = World::new()
        .service("web", json!({"externalTrafficPolicy": "Local", "externalIPs": ["198.51.100.7"]}))
        .slice("a", elsewhere, json!({}));
    assert_eq!(world.served()[1], "ExternalIp 198.51.100.7:80 ");
}

#[test]
fn zone_hints_are_followed_when_the_node_object_names_its_zone() {
    let hinted = |ip: &str, zone: &str| json!({"addresses": [ip], "hints": {"forZones": [{"name": zone}]}});
    let world = World::new().service("web", json!({})).slice(
        "a",
        json!([hinted("10.0.0.1", "a"), hinted("10.0.0.2", "b")]),
        json!({}),
    );
    assert_eq!(world.served(), ["ClusterIp 10.96.0.1:80 10.0.0.1:8080,10.0.0.2:8080"]);
    let world = world.node_object(json!({"metadata": {"labels": {"topology.kubernetes.io/zone": "b"}}}));
    assert_eq!(world.served(), ["ClusterIp 10.96.0.1:80 10.0.0.2:8080"]);
}

#[test]
fn guarded_load_balancer_addresses_are_not_served_and_the_rest_is() {
    let guarded = |ranges: Value| {
        let mut world = World::new();
        world.add_service(json!({
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {
                "type": "LoadBalancer", "clusterIP": "10.96.0.1", "ports": [{"port": 80, "nodePort": 30080}],
                "externalIPs": ["203.0.113.1", "198.51.100.7"], "loadBalancerSourceRanges": ranges,
            },
            "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}},
        }));
        world
    };
    for ranges in [json!([" 203.0.113.0/25"]), json!(["nonsense"]), json!(["fd00::/64", "10.0.0.0/8"])] {
        let world = guarded(ranges);
        let kinds: Vec<_> = world.desired().services[0].frontends.iter().map(|f| f.kind).collect();
        assert_eq!(kinds, [FrontendKind::ClusterIp, FrontendKind::NodePort, FrontendKind::ExternalIp]);
        assert_eq!(world.problems()[0].0, ProblemKind::Unsupported);
    }
    for ranges in [json!(null), json!([]), json!(["fd00::/64"]), json!(["10.0.0.0/8", "0.0.0.0/0"])] {
        let world = guarded(ranges);
        assert_eq!((world.served().len(), world.problems()), (4, vec![]));
    }
}

#[test]
fn what_this_version_does_not_do_is_said() {
    let world = World::new().service(
        "web",
        json!({"sessionAffinity": "ClientIP", "ports": [
            {"name": "s", "port": 1, "protocol": "SCTP"}, {"name": "x", "port": 1, "protocol": "QUIC"},
            {"name": "u", "port": 1, "protocol": "UDP"}, {"name": "big", "port": 70000}, {"name": "u", "port": 2, "protocol": "UDP"},
        ]}),
    );
    assert_eq!(world.served(), ["ClusterIp 10.96.0.1:1 "]);
    let kinds: Vec<_> = world.problems().into_iter().map(|(kind, _)| kind).collect();
    use ProblemKind::{Invalid, Unsupported};
    assert_eq!(kinds, [Unsupported, Unsupported, Invalid, Invalid, Invalid]);
}

#[test]
fn of_two_services_with_one_address_the_older_is_served() {
    let claim = |name: &str, created: Option<&str>| {
        json!({
            "metadata": {"name": name, "namespace": "shop", "creationTimestamp": created},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]},
        })
    };
    let cases = [
        (Some("2026-01-02T00:00:00Z"), Some("2026-01-01T00:00:00Z"), "b"),
        (None, Some("2026-01-01T00:00:00Z"), "b"),
        (None, None, "a"),
        (Some("2026-01-01T00:00:00Z"), Some("2026-01-01T00:00:00Z"), "a"),
    ];
    for (a, b, winner) in cases {
        let mut world = World::new();
        world.add_service(claim("a", a));
        world.add_service(claim("b", b));
        let desired = world.desired();
        assert_eq!(desired.services.len(), 1);
        assert_eq!(desired.services[0].name.service, winner);
        let text = desired.problems[0].to_string();
        assert!(
            text.contains("shop/a") && text.contains("shop/b") && text.contains("10.96.0.1:80"),
            "{text}"
        );
    }
}

#[test]
fn an_exact_address_goes_before_a_node_port() {
    let mut world = World::new();
    world.add_service(json!({
        "metadata": {"name": "a", "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"type": "NodePort", "clusterIP": "10.96.0.1", "ports": [{"port": 80, "nodePort": 30080}]},
    }));
    world.add_service(json!({
        "metadata": {"name": "b", "namespace": "shop", "creationTimestamp": "2026-02-01T00:00:00Z"},
        "spec": {"clusterIP": "10.96.0.2", "externalIPs": ["192.0.2.1"], "ports": [{"port": 30080}]},
    }));
    assert_eq!(
        world.served(),
        ["ClusterIp 10.96.0.1:80 ", "ClusterIp 10.96.0.2:30080 ", "ExternalIp 192.0.2.1:30080 "]
    );
    assert_eq!(world.problems()[0].0, ProblemKind::DuplicateFrontend);
}

#[test]
fn a_bad_endpoint_address_leaves_the_others() {
    let world = World::new().service("web", json!({})).slice(
        "a",
        json!([endpoint("10.0.0.300"), endpoint("10.0.0.2")]),
        json!({}),
    );
    assert_eq!(world.served(), ["ClusterIp 10.96.0.1:80 10.0.0.2:8080"]);
    assert!(world.problems()[0].1.starts_with("EndpointSlice shop/a: "));
}

#[test]
fn an_endpoint_address_that_is_no_hosts_leaves_the_others() {
    for (address, what) in [
        ("0.0.0.0", "unspecified"),
        ("127.0.0.5", "loopback"),
        ("169.254.169.254", "link-local"),
        ("224.0.0.1", "multicast"),
        ("255.255.255.255", "broadcast"),
    ] {
        let list = json!([endpoint(address), endpoint("10.0.0.2")]);
        let world = World::new().service("web", json!({})).slice("a", list, json!({}));
        assert_eq!(world.served(), ["ClusterIp 10.96.0.1:80 10.0.0.2:8080"]);
        let problems = world.problems();
        let (kind, text) = &problems[0];
        assert_eq!((problems.len(), *kind), (1, ProblemKind::Invalid));
        let named =
            text.starts_with("EndpointSlice shop/a: ") && text.contains(address) && text.contains(what);
        assert!(named, "{text}");
    }
}
