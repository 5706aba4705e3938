//! Who gets which endpoints, and whose address is kept.

use super::*;

/// Where clients are, in the words of the tables: outside, in a pod of this node, on this node.
fn treatment(detect_local: DetectLocal, masquerade_all: bool, spec: Value) -> Vec<String> {
    let mut full = json!({
        "type": "NodePort", "externalIPs": ["198.51.100.7"],
        "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
    });
    merge(&mut full, spec);
    let world = World::with(Options { detect_local, masquerade_all, ..Options::default() })
        .service_object(json!({
            "spec": full, "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}},
        }))
        .slice("a", json!([endpoint("10.0.0.1"), local("10.0.0.2")]), json!({}));
    let port = world.port();
    let text = |frontend: &DesiredFrontend<[u8; 4]>| {
        let client =
            |policy, is_masqueraded| format!("{policy:?}{}", if is_masqueraded { "+masquerade" } else { "" });
        let DesiredFrontend { kind, external, internal, masquerade, .. } = *frontend;
        let outside = client(external, masquerade.external);
        let (pod, host) = (client(internal, masquerade.pod), client(internal, masquerade.host));
        format!("{kind:?}: {outside}, pod {pod}, host {host}")
    };
    port.frontends.iter().map(text).collect()
}

fn pods() -> DetectLocal {
    DetectLocal::ClusterCidr(networks(&["10.0.0.0/8"]))
}

const OUTSIDE: [&str; 3] = ["NodePort", "ExternalIp", "LoadBalancer"];

#[test]
fn policies_and_masquerading_depend_on_where_the_client_is() {
    let local_outside = json!({"externalTrafficPolicy": "Local"});
    let local_inside = json!({"internalTrafficPolicy": "Local"});
    let kept = "Cluster, pod Cluster, host Cluster";
    let unless_pod = "Cluster+masquerade, pod Cluster, host Cluster+masquerade";
    let all = "Cluster+masquerade, pod Cluster+masquerade, host Cluster+masquerade";
    let short_circuit = "Local, pod Cluster, host Cluster+masquerade";
    for (detect_local, masquerade_all, spec, cluster_ip, outside) in [
        (pods(), false, json!({}), unless_pod, all),
        (DetectLocal::None, false, json!({}), kept, all),
        (DetectLocal::None, true, json!({}), all, all),
        (pods(), true, json!({}), all, all),
        (pods(), false, local_outside.clone(), unless_pod, short_circuit),
        (DetectLocal::None, false, local_outside.clone(), kept, short_circuit),
        (pods(), true, local_outside, all, short_circuit),
        (pods(), false, local_inside.clone(), "Local+masquerade, pod Local, host Local+masquerade", all),
        (DetectLocal::None, false, local_inside, "Local, pod Local, host Local", all),
    ] {
        let mut expected = vec![format!("ClusterIp: {cluster_ip}")];
        expected.extend(OUTSIDE.map(|kind| format!("{kind}: {outside}")));
        assert_eq!(
            treatment(detect_local.clone(), masquerade_all, spec.clone()),
            expected,
            "{detect_local:?} {spec}"
        );
    }
}

#[test]
fn a_detector_that_knows_no_pods_of_a_family_is_none() {
    let is_detector = |detect_local: DetectLocal, node_object: Option<Value>| {
        let mut world = World::with(Options { detect_local, ..Options::default() }).service(json!({}));
        if let Some(object) = node_object {
            world = world.node(object);
        }
        world.port().frontends[0].masquerade.external
    };
    let interface = || "cni0".to_owned();
    assert!(is_detector(pods(), None));
    assert!(is_detector(DetectLocal::BridgeInterface(interface()), None));
    assert!(is_detector(DetectLocal::InterfaceNamePrefix(interface()), None));
    assert!(is_detector(DetectLocal::NodeCidr, Some(json!({"spec": {"podCIDRs": ["10.0.1.0/24"]}}))));
    assert!(is_detector(DetectLocal::NodeCidr, Some(json!({"spec": {"podCIDR": "10.0.1.0/24"}}))));
    assert!(!is_detector(DetectLocal::None, None));
    assert!(!is_detector(DetectLocal::NodeCidr, None));
    assert!(!is_detector(DetectLocal::NodeCidr, Some(json!({"spec": {"podCIDRs": ["fd00:10::/64"]}}))));
    assert!(!is_detector(DetectLocal::ClusterCidr(networks(&["fd00:10::/64"])), None));
}

#[test]
fn without_local_endpoints_only_clients_outside_are_turned_away() {
    let spec = json!({"type": "NodePort", "externalTrafficPolicy": "Local", "ports": [{"name": "http", "port": 80, "nodePort": 30080}]});
    let world = World::new().service(spec.clone());
    assert!(!world.port().any_endpoint);
    let world = world.slice("a", json!([endpoint("10.0.0.1")]), json!({}));
    let port = world.port();
    assert!(port.any_endpoint && port.local.is_empty());
    assert_eq!(endpoints(&port.cluster), "10.0.0.1:8080");
    let world = world.slice("a", json!([endpoint("10.0.0.1"), local("10.0.0.2")]), json!({}));
    assert_eq!(
        world.lines(),
        ["ClusterIp 10.96.0.1:80 10.0.0.1:8080,10.0.0.2:8080", "NodePort 192.0.2.1:30080 10.0.0.2:8080"]
    );
}

#[test]
fn lists_that_no_frontend_uses_are_empty() {
    let mixed = json!([endpoint("10.0.0.1"), local("10.0.0.2")]);
    for (spec, cluster, local) in [
        (json!({}), "10.0.0.1:8080,10.0.0.2:8080", ""),
        (json!({"internalTrafficPolicy": "Local"}), "", "10.0.0.2:8080"),
        (
            json!({"internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local", "externalIPs": ["198.51.100.7"]}),
            "10.0.0.1:8080,10.0.0.2:8080",
            "10.0.0.2:8080",
        ),
    ] {
        let world = World::new().slice("a", mixed.clone(), json!({})).service(spec.clone());
        let port = world.port();
        assert_eq!((&*endpoints(&port.cluster), &*endpoints(&port.local)), (cluster, local), "{spec}");
    }
}

#[test]
fn the_external_policy_of_a_plain_cluster_ip_is_ignored() {
    let with_status = |spec: Value| {
        let object = json!({"spec": spec, "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}}});
        let world = World::new().service_object(object);
        world.port().frontends.last().unwrap().external
    };
    assert_eq!(with_status(json!({"externalTrafficPolicy": "Local"})), Policy::Cluster);
    assert_eq!(with_status(json!({"externalTrafficPolicy": "Local", "type": "ClusterIP"})), Policy::Cluster);
    assert_eq!(
        with_status(json!({"externalTrafficPolicy": "Local", "externalIPs": ["198.51.100.7"]})),
        Policy::Local
    );
    assert_eq!(with_status(json!({"externalTrafficPolicy": "Local", "type": "LoadBalancer"})), Policy::Local);
}

/// Who may reach which frontends of a Service with these source ranges on its load-balancer address 203.0.113.1.
fn guarded(ranges: Value) -> (Vec<String>, Vec<String>, World) {
    let world = World::new().service_object(json!({
        "spec": {
            "type": "LoadBalancer", "ports": [{"port": 80, "nodePort": 30080}],
            "externalIPs": ["198.51.100.7"], "loadBalancerSourceRanges": ranges,
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}, {"ip": "fd00::2"}]}},
    }));
    let port = world.port();
    let restricted =
        port.frontends.iter().filter(|f| f.is_restricted).map(|f| f.addr.to_ip().to_string()).collect();
    (restricted, port.sources.iter().map(ToString::to_string).collect(), world)
}

#[test]
fn source_ranges_guard_load_balancer_addresses_alone() {
    for (ranges, sources) in [
        (json!([" 203.0.113.0/25\t", "010.1.2.3/8"]), vec!["10.0.0.0/8", "203.0.113.0/25"]),
        (json!(["fd00::/64", "10.0.0.0/8", "10.0.0.0/8"]), vec!["10.0.0.0/8"]),
        // A node that may come in may do so from the balancer's address too, which its own packets have.
        (json!(["192.0.2.0/28"]), vec!["192.0.2.0/28", "203.0.113.1/32"]),
    ] {
        let (restricted, found, world) = guarded(ranges.clone());
        assert_eq!(
            (restricted, found),
            (vec!["203.0.113.1".to_owned()], sources.iter().map(|s| (*s).to_owned()).collect())
        );
        assert!(world.problems().is_empty(), "{ranges}");
    }
}

#[test]
fn node_ports_are_open_though_the_address_is_the_load_balancers_too() {
    let world = World::new().service_object(json!({
        "spec": {
            "type": "LoadBalancer", "externalIPs": ["198.51.100.7", "203.0.113.1"],
            "ports": [{"port": 80, "nodePort": 30080}], "loadBalancerSourceRanges": ["10.0.0.0/8"],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}, {"ip": "203.0.113.1"}]}},
    }));
    let restricted = world.port().frontends.iter().filter(|f| f.is_restricted);
    let restricted: Vec<_> = restricted.map(|f| (f.addr.to_ip().to_string(), f.port)).collect();
    assert_eq!(restricted, [("192.0.2.1".to_owned(), 80), ("203.0.113.1".to_owned(), 80)]);
}

#[test]
fn without_ranges_of_a_family_everybody_of_it_may_come() {
    for ranges in [json!(null), json!([]), json!(["fd00::/64"]), json!(["10.0.0.0/8", "0.0.0.0/0"])] {
        let (restricted, sources, world) = guarded(ranges.clone());
        assert_eq!((restricted, sources, world.problems()), (vec![], vec![], vec![]), "{ranges}");
    }
}

#[test]
fn a_source_range_that_cannot_be_read_lets_nobody_in() {
    let (restricted, sources, world) = guarded(json!(["nonsense"]));
    assert_eq!((restricted, sources), (vec!["203.0.113.1".to_owned()], vec![]));
    assert!(world.problems()[0].contains("\"nonsense\""), "{:?}", world.problems());
    let (restricted, sources, _) = guarded(json!(["10.0.0.0/33", "fd00::/64"]));
    assert_eq!((restricted.len(), sources.len()), (1, 0));
}

#[test]
fn source_ranges_of_the_other_family_guard_it() {
    let world = World::new().service_object(json!({
        "spec": {
            "type": "LoadBalancer", "clusterIP": "fd00::9", "loadBalancerSourceRanges": ["fd00:1::/64", "10.0.0.0/8"],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}, {"ip": "fd00::2"}]}},
    }));
    let port = world.told.v6.ports.values().next().unwrap();
    let sources: Vec<_> = port.sources.iter().map(ToString::to_string).collect();
    assert_eq!(sources, ["fd00::2/128", "fd00:1::/64"]);
}

#[test]
fn affinity_lasts_as_long_as_the_service_says() {
    let seconds = |spec: Value| World::new().service(spec).port().affinity_seconds;
    let timeout = |time: i64| {
        seconds(
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": time}}}),
        )
    };
    assert_eq!(seconds(json!({})), 0);
    assert_eq!(seconds(json!({"sessionAffinity": "None"})), 0);
    assert_eq!(seconds(json!({"sessionAffinity": "ClientIP"})), 10_800);
    assert_eq!([timeout(30), timeout(0), timeout(100_000), timeout(-1)], [30, 1, 86_400, 1]);
}
