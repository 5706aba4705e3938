//! Which endpoints a service port has.

use super::*;

#[test]
fn slices_that_do_not_count_are_left_out() {
    for object in [
        json!({"metadata": {"labels": {"service.kubernetes.io/headless": ""}}}),
        json!({"metadata": {"labels": {"kubernetes.io/service-name": "other"}}}),
        json!({"metadata": {"labels": {"kubernetes.io/service-name": ""}}}),
        json!({"metadata": {"labels": null}}),
        json!({"ports": [{"name": "http", "port": 8080, "protocol": "UDP"}]}),
        json!({"ports": [{"name": "other", "port": 8080, "protocol": "TCP"}]}),
        json!({"ports": null}),
        json!({"endpoints": null}),
    ] {
        let world = World::new().service(json!({})).slice("a", json!([endpoint("10.0.0.1")]), json!({}));
        assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 10.0.0.1:8080"]);
        let world = world.slice("a", json!([endpoint("10.0.0.1")]), object.clone());
        assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 "], "{object}");
        assert!(!world.port().any_endpoint);
        assert!(world.problems().is_empty(), "{object}");
    }
}

#[test]
fn each_family_takes_the_slices_of_its_address_type() {
    let dual = json!({"clusterIPs": ["10.96.0.1", "fd00::9"], "ipFamilies": ["IPv4", "IPv6"]});
    let world = World::new().service(dual).slice("a", json!([endpoint("10.0.0.1")]), json!({})).slice(
        "b",
        json!([endpoint("fd00:2::1")]),
        json!({"addressType": "IPv6"}),
    );
    assert_eq!(
        world.lines(),
        ["ClusterIp 10.96.0.1:80 10.0.0.1:8080", "ClusterIp [fd00::9]:80 [fd00:2::1]:8080"]
    );
}

#[test]
fn slices_of_a_service_are_merged_and_each_endpoint_counts_once() {
    let world = World::new()
        .service(json!({}))
        .slice(
            "a",
            json!([leaving("10.0.0.1", "there"), endpoint("10.0.0.3"), endpoint("010.0.0.2")]),
            json!({}),
        )
        .slice("b", json!([endpoint("10.0.0.1"), endpoint("10.0.0.3"), {"addresses": []}]), json!({}));
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 10.0.0.1:8080,10.0.0.2:8080,10.0.0.3:8080"]);
    let world = world.without_slice("b");
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 10.0.0.2:8080,10.0.0.3:8080"]);
    let world = world.without_slice("a");
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 "]);
}

#[test]
fn of_an_address_that_has_two_pods_the_one_that_stays_counts() {
    // The old pod is on this node and not ready, the new one elsewhere.
    for (a, b) in [("old", "new"), ("new", "old")] {
        let world = World::new()
            .service(json!({"internalTrafficPolicy": "Local"}))
            .slice(a, json!([leaving("10.0.0.1", "here")]), json!({}))
            .slice(b, json!([endpoint("10.0.0.1")]), json!({}));
        let port = world.port();
        assert!(port.any_endpoint && port.local.is_empty() && !port.serving[0].local, "{port:?}");
    }
    // A Service may have its endpoints called ready throughout (publishNotReadyAddresses).
    let ready = json!({"addresses": ["10.0.0.1"], "conditions": {"ready": true, "terminating": true}});
    let starting = json!({"addresses": ["10.0.0.1"], "conditions": {"ready": false}});
    let world = World::new().service(json!({})).slice("a", json!([ready, starting]), json!({}));
    assert!(!world.port().any_endpoint);
}

#[test]
fn only_the_first_address_of_an_endpoint_counts() {
    let world = World::new().service(json!({})).slice(
        "a",
        json!([{"addresses": ["10.0.0.1", "10.0.0.2"]}]),
        json!({}),
    );
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 10.0.0.1:8080"]);
}

#[test]
fn a_slice_with_two_ports_of_a_name_serves_both() {
    let ports = json!([{"name": "http", "port": 1, "protocol": "TCP"}, {"name": "http", "port": 2, "protocol": "TCP"}]);
    let world =
        World::new().service(json!({})).slice("a", json!([endpoint("10.0.0.1")]), json!({"ports": ports}));
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 10.0.0.1:1,10.0.0.1:2"]);
}

#[test]
fn conditions_say_who_gets_new_flows_and_who_keeps_old_ones() {
    let with = |conditions: Value| {
        let list = json!([{"addresses": ["10.0.0.1"], "nodeName": "here", "conditions": conditions}]);
        let local = json!({"internalTrafficPolicy": "Local", "externalIPs": ["198.51.100.7"]});
        let world = World::new().service(local).slice("a", list, json!({}));
        let port = world.port();
        let is_in = |list: &[Endpoint<[u8; 4]>]| !list.is_empty();
        assert_eq!((is_in(&port.local), is_in(&port.cluster)), (port.any_endpoint, port.any_endpoint));
        (port.any_endpoint, is_in(&port.serving))
    };
    for (conditions, expected) in [
        (json!(null), (true, true)),
        (json!({}), (true, true)),
        (json!({"ready": true}), (true, true)),
        (json!({"ready": true, "serving": false}), (true, false)),
        (json!({"ready": false}), (false, true)),
        (json!({"ready": false, "serving": true, "terminating": false}), (false, true)),
        // The last resort when no endpoint is ready.
        (json!({"ready": false, "serving": true, "terminating": true}), (true, true)),
        (json!({"ready": false, "terminating": true}), (true, true)),
        (json!({"ready": false, "serving": false, "terminating": true}), (false, false)),
    ] {
        assert_eq!(with(conditions.clone()), expected, "{conditions}");
    }
}

#[test]
fn an_endpoint_that_is_leaving_gets_new_flows_only_when_none_stays() {
    let spec = json!({"externalIPs": ["198.51.100.7"], "externalTrafficPolicy": "Local"});
    let lists = |list: Value| {
        let world = World::new().service(spec.clone()).slice("a", list, json!({}));
        let port = world.port();
        [&port.cluster, &port.local, &port.serving]
            .map(|list| endpoints(list).replace("10.0.0.", ".").replace(":8080", ""))
    };
    let (a, b) = (leaving("10.0.0.1", "here"), leaving("10.0.0.2", "there"));
    assert_eq!(lists(json!([a, b])), [".1,.2", ".1", ".1,.2"]);
    assert_eq!(lists(json!([a, b, endpoint("10.0.0.3")])), [".3", ".1", ".1,.2,.3"]);
    assert_eq!(lists(json!([a, b, local("10.0.0.3")])), [".3", ".3", ".1,.2,.3"]);
}

#[test]
fn an_endpoint_is_local_by_the_name_of_its_node_alone() {
    let list =
        json!([{"addresses": ["192.0.2.1"]}, local("10.0.0.2"), {"addresses": ["10.0.0.3"], "nodeName": ""}]);
    let world = World::new().service(json!({"internalTrafficPolicy": "Local"})).slice("a", list, json!({}));
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 10.0.0.2:8080"]);
    let world = world.slice("a", json!([{"addresses": ["10.0.0.3"]}]), json!({}));
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 "]);
}

#[test]
fn an_endpoint_address_that_cannot_be_one_leaves_the_others() {
    for (family, good, cases) in [
        (
            "IPv4",
            "10.0.0.2",
            &[
                ("10.0.0.300", "not an IPv4 address"),
                ("fd00::1", "not an IPv4 address"),
                ("0.0.0.0", "unspecified"),
                ("127.0.0.5", "loopback"),
                ("169.254.169.254", "link-local"),
                ("224.0.0.1", "multicast"),
                ("255.255.255.255", "broadcast"),
            ][..],
        ),
        (
            "IPv6",
            "fd00::2",
            &[
                ("::", "unspecified"),
                ("::1", "loopback"),
                ("fe80::1", "link-local"),
                ("ff02::1", "multicast"),
            ],
        ),
    ] {
        for (address, what) in cases {
            let list = json!([endpoint(address), endpoint(good)]);
            let spec = json!({"clusterIPs": ["10.96.0.1", "fd00::9"], "ipFamilies": ["IPv4", "IPv6"]});
            let world = World::new().service(spec).slice("a", list, json!({"addressType": family}));
            let lines = world.lines().concat();
            assert!(lines.contains(good) && !lines.contains(&format!(" {address}:")), "{lines}");
            let problems = world.problems();
            let is_said = problems[0].starts_with("EndpointSlice shop/a: ") && problems[0].contains(address);
            assert!(problems.len() == 1 && is_said && problems[0].contains(what), "{problems:?}");
            assert!(world.without_slice("a").problems().is_empty());
        }
    }
}

#[test]
fn slices_may_come_before_their_service_and_stay_after_it() {
    let world = World::new().slice("a", json!([endpoint("10.0.0.1")]), json!({}));
    assert!(world.lines().is_empty());
    let world = world.service(json!({}));
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 10.0.0.1:8080"]);
    let world = world.without_service("web");
    assert!(world.lines().is_empty());
    assert_eq!(world.service(json!({})).lines(), ["ClusterIp 10.96.0.1:80 10.0.0.1:8080"]);
}

#[test]
fn a_slice_may_move_to_another_service() {
    let other = json!({"metadata": {"labels": {"kubernetes.io/service-name": "other"}}});
    let world = World::new()
        .service(json!({}))
        .service_object(json!({"metadata": {"name": "other"}, "spec": {"clusterIP": "10.96.0.2"}}))
        .slice("a", json!([endpoint("10.0.0.1")]), json!({}))
        .slice("a", json!([endpoint("10.0.0.1")]), other);
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.2:80 10.0.0.1:8080", "ClusterIp 10.96.0.1:80 "]);
}
