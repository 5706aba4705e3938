//! Who serves what several claim.

use super::*;

/// A Service with port 80 at 10.96.0.1.
fn claim(name: &str, created: Option<&str>) -> Value {
    json!({"metadata": {"name": name, "creationTimestamp": created}})
}

fn winners(world: &World) -> Vec<&str> {
    world.told.v4.ports.keys().map(|name| &*name.service).collect()
}

#[test]
fn of_two_services_with_one_address_the_older_is_served() {
    let (new, old) = (Some("2026-01-02T00:00:00Z"), Some("2026-01-01T00:00:00Z"));
    for (a, b, winner) in
        [(new, old, "b"), (old, new, "a"), (None, old, "b"), (None, None, "a"), (old, old, "a")]
    {
        let orders = [[claim("a", a), claim("b", b)], [claim("b", b), claim("a", a)]];
        for objects in orders {
            let world = objects.into_iter().fold(World::new(), World::service_object);
            assert_eq!(winners(&world), [winner]);
            let loser = if winner == "a" { "b" } else { "a" };
            let problems = world.problems();
            let is_said = problems[0].starts_with(&format!("Service shop/{loser}:http/TCP: 10.96.0.1:80 "));
            assert!(
                problems.len() == 1 && is_said && problems[0].contains(&format!("shop/{winner}")),
                "{problems:?}"
            );
        }
    }
}

#[test]
fn the_next_claimant_takes_what_the_winner_leaves() {
    let world =
        ["a", "b", "c"].map(|name| claim(name, None)).into_iter().fold(World::new(), World::service_object);
    assert_eq!((winners(&world), world.problems().len()), (vec!["a"], 2));
    let world = world.without_service("a");
    assert_eq!((winners(&world), world.problems().len()), (vec!["b"], 1));
    let moved = json!({"metadata": {"name": "b"}, "spec": {"clusterIP": "10.96.0.2"}});
    let world = world.service_object(moved);
    assert_eq!((winners(&world), world.problems().len()), (vec!["b", "c"], 0));
    let world = world.service_object(claim("b", None));
    assert_eq!((winners(&world), world.problems().len()), (vec!["b"], 1));
}

#[test]
fn only_what_is_claimed_twice_is_lost() {
    let node_port = |name: &str, ip: &str, created: &str| {
        json!({
            "metadata": {"name": name, "creationTimestamp": created},
            "spec": {"type": "NodePort", "clusterIP": ip, "ports": [{"port": 80, "nodePort": 30080}]},
        })
    };
    let world = World::new()
        .service_object(node_port("a", "10.96.0.1", "2026-01-02T00:00:00Z"))
        .service_object(node_port("b", "10.96.0.2", "2026-01-01T00:00:00Z"));
    assert_eq!(
        world.lines(),
        ["ClusterIp 10.96.0.1:80 ", "ClusterIp 10.96.0.2:80 ", "NodePort 192.0.2.1:30080 "]
    );
    let other_protocol = json!({"spec": {"ports": [{"port": 80, "protocol": "UDP"}, {"port": 81}]}});
    let world = World::new().service(json!({})).service_object({
        let mut object = claim("other", None);
        merge(&mut object, other_protocol);
        object
    });
    assert!(world.problems().is_empty(), "{:?}", world.problems());
}

#[test]
fn an_exact_address_goes_before_an_older_node_port() {
    let node_port = json!({
        "metadata": {"name": "a", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]},
    });
    let exact = json!({
        "metadata": {"name": "b", "creationTimestamp": "2026-02-01T00:00:00Z"},
        "spec": {"clusterIP": "10.96.0.2", "externalIPs": ["192.0.2.1"], "ports": [{"port": 30080}]},
    });
    let world = World::new().service_object(node_port).service_object(exact);
    assert_eq!(
        world.lines(),
        ["ClusterIp 10.96.0.1:80 ", "ClusterIp 10.96.0.2:30080 ", "ExternalIp 192.0.2.1:30080 "]
    );
    assert_eq!(world.problems().len(), 1);
    let world = world.without_service("b");
    assert_eq!(world.lines(), ["ClusterIp 10.96.0.1:80 ", "NodePort 192.0.2.1:30080 "]);
}

#[test]
fn the_problems_have_a_new_version_only_when_they_change() {
    let world = World::new().service(json!({}));
    let quiet = world.cluster.problems_version();
    let world = world.slice("a", json!([endpoint("10.0.0.1")]), json!({})).without_slice("a");
    assert_eq!(world.cluster.problems_version(), quiet);
    let world = world.service_object(claim("other", None));
    let lost = world.cluster.problems_version();
    assert_ne!(lost, quiet);
    let world = world.slice("a", json!([endpoint("nowhere")]), json!({}));
    let bad = world.cluster.problems_version();
    assert_ne!(bad, lost);
    let world = world.slice("a", json!([endpoint("nowhere"), endpoint("10.0.0.1")]), json!({}));
    assert_eq!(world.cluster.problems_version(), bad);
    let world = world.without_slice("a").without_service("other");
    assert_ne!(world.cluster.problems_version(), bad);
    assert!(world.problems().is_empty());
}
