//! Health-check node ports and what metrics count.

use super::*;

fn checked(spec: Value) -> Value {
    let mut full = json!({
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000,
        "clusterIPs": ["10.96.0.1", "fd00::9"], "ipFamilies": ["IPv4", "IPv6"],
        "ports": [{"name": "http", "port": 80}, {"name": "more", "port": 81}],
    });
    merge(&mut full, spec);
    full
}

#[test]
fn only_load_balancers_with_policy_local_are_checked() {
    let ports = |spec: Value| -> Vec<u16> {
        World::new().service(spec).cluster.health_checks().iter().map(|check| check.port).collect()
    };
    assert_eq!(ports(checked(json!({}))), [32000]);
    for spec in [
        json!({"type": "NodePort"}),
        json!({"externalTrafficPolicy": "Cluster"}),
        json!({"healthCheckNodePort": 0}),
        json!({"healthCheckNodePort": null}),
        json!({"clusterIP": "None"}),
        json!({"ports": []}),
    ] {
        assert!(ports(checked(spec.clone())).is_empty(), "{spec}");
    }
}

#[test]
fn the_check_counts_addresses_with_ready_endpoints_here() {
    let two_ports = json!([{"name": "http", "port": 1, "protocol": "TCP"}, {"name": "more", "port": 2, "protocol": "TCP"}]);
    let v4 = json!([local("10.0.0.1"), local("10.0.0.2"), endpoint("10.0.0.3"), leaving("10.0.0.4", "here")]);
    let world = World::new()
        .service(checked(json!({})))
        .slice("a", v4, json!({"ports": two_ports}))
        .slice("b", json!([local("10.0.0.2"), local("10.0.0.5")]), json!({}))
        .slice("c", json!([local("fd00:2::1")]), json!({"addressType": "IPv6"}));
    let check = HealthCheck {
        service: ObjectName::new("shop", "web"),
        port: 32000,
        local_endpoints_v4: 3,
        local_endpoints_v6: 1,
    };
    assert_eq!(world.cluster.health_checks(), [check]);
    let world = world.without_slice("a").without_slice("c");
    let check = &world.cluster.health_checks()[0];
    assert_eq!((check.local_endpoints_v4, check.local_endpoints_v6), (2, 0));
    assert!(world.without_service("web").cluster.health_checks().is_empty());
}

#[test]
fn service_ports_without_local_endpoints_are_counted_by_policy() {
    let counts = |world: &World| {
        let PolicyCounts { internal, external } = world.cluster.no_local_endpoints().v4;
        (internal, external)
    };
    let both = json!({"internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local", "externalIPs": ["198.51.100.7"]});
    let world = World::new().service(both);
    assert_eq!(counts(&world), (0, 0), "no endpoints at all are another matter");
    let world = world.slice("a", json!([endpoint("10.0.0.1")]), json!({}));
    assert_eq!(counts(&world), (1, 1));
    assert_eq!(world.cluster.no_local_endpoints().v6, PolicyCounts::default());
    let world = world.slice("b", json!([local("10.0.0.2")]), json!({}));
    assert_eq!(counts(&world), (0, 0));
    let world = world.without_slice("b").service(json!({"internalTrafficPolicy": "Local"}));
    assert_eq!(counts(&world), (1, 0));
    let world = world.service(json!({"externalTrafficPolicy": "Local", "externalIPs": ["198.51.100.7"]}));
    assert_eq!(counts(&world), (0, 1));
    assert_eq!(counts(&world.without_service("web")), (0, 0));
}
