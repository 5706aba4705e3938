//! What cannot be used of an object is named once, by object, with its kind.

use super::*;
use crate::problem::ProblemKind::{self, Invalid, Unsupported};

/// Every problem as its kind and its text.
fn found(world: &World) -> Vec<(ProblemKind, String)> {
    world.cluster.problems().iter().map(|problem| (problem.kind, problem.to_string())).collect()
}

/// Asserts that there is one problem, of this object and kind, that says this.
fn check(world: &World, object: &str, kind: ProblemKind, says: &str, case: &Value) {
    let problems = found(world);
    let [(found, text)] = &problems[..] else { panic!("{case}: {problems:?}") };
    assert_eq!(*found, kind, "{case}: {text}");
    assert!(text.starts_with(&format!("{object}: ")) && text.contains(says), "{case}: {text}");
}

#[test]
fn what_cannot_be_used_of_a_slice_is_named_once_and_gone_with_it() {
    let port = |port: Value| json!({"ports": [port]});
    for (object, kind, says) in [
        (json!({"addressType": "FQDN"}), Unsupported, "FQDN"),
        (json!({"addressType": "IPv5"}), Invalid, "\"IPv5\""),
        (json!({"addressType": ""}), Invalid, "\"\""),
        (port(json!({"name": "http", "protocol": "TCP"})), Unsupported, "without a number"),
        (port(json!({"name": "http", "port": null})), Unsupported, "without a number"),
        (port(json!({"name": "http", "port": 0})), Invalid, "port 0 is not 1 to 65535"),
        (port(json!({"name": "http", "port": -1})), Invalid, "port -1 is not 1 to 65535"),
        (port(json!({"name": "http", "port": 65536})), Invalid, "port 65536 is not 1 to 65535"),
        (port(json!({"port": 8080})), Invalid, "without a name"),
        (port(json!({"name": "http", "port": 8080, "protocol": "tcp"})), Invalid, "protocol \"tcp\""),
    ] {
        let world = World::new().service(json!({})).slice("a", json!([endpoint("10.0.0.1")]), object.clone());
        assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 "], "{object}");
        assert!(!world.port().any_endpoint);
        check(&world, "EndpointSlice shop/a", kind, says, &object);
        // Told again, it is the same problem; changed for the better, none.
        let version = world.cluster.problems_version();
        let world = world.slice("a", json!([endpoint("10.0.0.1")]), object.clone());
        assert_eq!((found(&world).len(), world.cluster.problems_version()), (1, version), "{object}");
        assert_eq!(found(&world.slice("a", json!([]), json!({}))), [], "{object}");
        let world = World::new().slice("a", json!([endpoint("10.0.0.1")]), object.clone());
        assert_eq!(found(&world.without_slice("a")), [], "{object}");
    }
}

#[test]
fn slices_of_no_service_and_of_headless_ones_have_no_flaws() {
    for metadata in [
        json!({"labels": null}),
        json!({"labels": {"kubernetes.io/service-name": ""}}),
        json!({"labels": {"service.kubernetes.io/headless": ""}}),
    ] {
        let object = json!({"metadata": metadata, "addressType": "FQDN", "ports": [{"port": 0}]});
        assert_eq!(found(&World::new().slice("a", json!([{"addresses": []}]), object)), [], "{metadata}");
    }
}

#[test]
fn endpoints_that_cannot_be_used_are_named_and_the_others_serve() {
    let ready = endpoint("10.0.0.1");
    for (bad, says) in [
        (json!({"addresses": []}), "without an address"),
        (endpoint("web.example.org"), "\"web.example.org\" is not an IPv4 address"),
        (endpoint("fd00::1"), "\"fd00::1\" is not an IPv4 address"),
        (endpoint("0.0.0.0"), "unspecified"),
        (endpoint("127.0.0.1"), "loopback"),
        (endpoint("169.254.0.1"), "link-local"),
        (endpoint("224.0.0.1"), "multicast"),
        (endpoint("255.255.255.255"), "broadcast"),
        (ready.clone(), "10.0.0.1 stands there twice"),
        (local("010.0.0.1"), "10.0.0.1 stands there twice"),
    ] {
        let world = World::new().service(json!({})).slice("a", json!([ready, bad]), json!({}));
        assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 10.0.0.1:8080"], "{bad}");
        check(&world, "EndpointSlice shop/a", Invalid, says, &bad);
    }
}

#[test]
fn an_address_that_is_moving_to_another_pod_may_stand_twice() {
    let starting = json!({"addresses": ["10.0.0.1"], "conditions": {"ready": false}});
    for other in [leaving("10.0.0.1", "there"), starting] {
        let world = World::new().slice("a", json!([endpoint("10.0.0.1"), other]), json!({}));
        assert_eq!(found(&world), []);
    }
    // In two slices it may too: a controller that moves an endpoint writes one after the other.
    let world = World::new().slice("a", json!([endpoint("10.0.0.1")]), json!({})).slice(
        "b",
        json!([endpoint("10.0.0.1")]),
        json!({}),
    );
    assert_eq!(found(&world), []);
}

#[test]
fn an_endpoint_that_is_a_cluster_ip_is_named_whichever_comes_first() {
    let other = |ip: &str| json!({"metadata": {"name": "other"}, "spec": {"clusterIP": ip}});
    let endpoints = json!([endpoint("10.0.0.1"), endpoint("10.96.0.9")]);
    let says = "10.96.0.9 is the ClusterIP of a Service";
    let first = World::new().service(json!({})).service_object(other("10.96.0.9")).slice(
        "a",
        endpoints.clone(),
        json!({}),
    );
    check(&first, "EndpointSlice shop/a", Invalid, says, &json!("first"));
    let later = World::new().service(json!({})).slice("a", endpoints, json!({}));
    assert_eq!(found(&later), []);
    let quiet = later.cluster.problems_version();
    let later = later.service_object(other("10.96.0.9"));
    assert_ne!(later.cluster.problems_version(), quiet);
    check(&later, "EndpointSlice shop/a", Invalid, says, &json!("later"));
    // kube-proxy tries such an endpoint too.
    assert_eq!(later.lines()[0], "ClusterIp 10.96.0.9:80 ");
    assert_eq!(later.lines()[1], "ClusterIp 10.96.0.1:80 10.0.0.1:8080,10.96.0.9:8080");
    // It ends with either of the two.
    assert_eq!(found(&first.without_slice("a")), []);
    let later = later.service_object(other("10.96.0.8"));
    assert_eq!(found(&later), []);
    let later = later.service_object(other("10.96.0.9"));
    assert_eq!(found(&later).len(), 1);
    let later = later.without_service("other");
    assert_eq!(found(&later), []);
    let later = later.service_object(other("10.96.0.9")).slice("a", json!([endpoint("10.0.0.1")]), json!({}));
    assert_eq!(found(&later), []);
    let both = World::new().service_object(other("fd00::9")).slice(
        "a",
        json!([endpoint("fd00::9")]),
        json!({"addressType": "IPv6"}),
    );
    check(&both, "EndpointSlice shop/a", Invalid, "fd00::9 is the ClusterIP", &json!("IPv6"));
    assert_eq!(found(&both.without_service("other")), []);
}

#[test]
fn words_that_kubernetes_does_not_know_are_named_and_stand_for_the_default() {
    for (object, says) in [
        (json!({"spec": {"type": "Magic"}}), "type \"Magic\""),
        (json!({"spec": {"internalTrafficPolicy": "local"}}), "internalTrafficPolicy \"local\""),
        (
            json!({"spec": {"type": "NodePort", "externalTrafficPolicy": "Near"}}),
            "externalTrafficPolicy \"Near\"",
        ),
        (json!({"spec": {"sessionAffinity": "Cookie"}}), "sessionAffinity \"Cookie\""),
        (json!({"spec": {"ipFamilies": ["IPv5"], "clusterIPs": ["10.96.0.1"]}}), "\"IPv5\""),
        (json!({"spec": {"ports": [{"name": "http", "port": 80, "protocol": "QUIC"}]}}), "protocol \"QUIC\""),
        (
            json!({"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1", "ipMode": "Both"}]}}}),
            "ipMode \"Both\"",
        ),
    ] {
        let world = World::new().service_object(object.clone());
        check(&world, "Service shop/web", Invalid, says, &object);
        let has_port = world.told.v4.ports.values().next().map(|port| {
            let frontend = port.frontends[0];
            (port.frontends.len(), frontend.external, frontend.internal, port.affinity_seconds)
        });
        let is_served = !says.contains("IPv5") && !says.contains("QUIC");
        assert_eq!(has_port, is_served.then_some((1, Policy::Cluster, Policy::Cluster, 0)), "{object}");
    }
    for object in [
        json!({"spec": {"type": "", "internalTrafficPolicy": "", "externalTrafficPolicy": "", "sessionAffinity": ""}}),
        json!({"spec": {"type": "ClusterIP", "internalTrafficPolicy": "Cluster", "sessionAffinity": "None"}}),
        json!({"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1", "ipMode": "Proxy"}]}}}),
    ] {
        assert_eq!(found(&World::new().service_object(object.clone())), [], "{object}");
    }
}

#[test]
fn a_time_of_affinity_that_cannot_be_is_named_and_the_nearest_used() {
    for (given, used, is_said) in [
        (json!(null), 10_800, false),
        (json!(1), 1, false),
        (json!(86_400), 86_400, false),
        (json!(0), 1, true),
        (json!(-1), 1, true),
        (json!(i32::MIN), 1, true),
        (json!(86_401), 86_400, true),
        (json!(i32::MAX), 86_400, true),
    ] {
        let config = json!({"clientIP": {"timeoutSeconds": given}});
        let world =
            World::new().service(json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config}));
        assert_eq!(world.port().affinity_seconds, used, "{given}");
        if is_said {
            let says = format!("timeoutSeconds {given} is not 1 to 86400; {used} is used");
            check(&world, "Service shop/web", Invalid, &says, &given);
        } else {
            assert_eq!(found(&world), [], "{given}");
        }
    }
}
