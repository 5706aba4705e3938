//! The other nodes, where packets go to them as they are.

use super::*;

fn directly() -> World {
    let world = World::with(Options { forwarding: Forwarding::Dsr, ..Options::default() });
    world.service(json!({"externalIPs": ["203.0.113.10"]}))
}

/// The Node object of another node.
fn other(name: &str, addresses: &[(&str, &str)]) -> Change {
    let addresses: Vec<_> = addresses.iter().map(|(kind, ip)| json!({"type": kind, "address": ip})).collect();
    let object = serde_json::from_value(json!({"status": {"addresses": addresses}})).unwrap();
    Change::Node(name.to_owned(), Some(Arc::new(Node::read(&object))))
}

fn nodes(world: &World) -> Vec<[u8; 4]> {
    world.port().cluster.iter().map(|endpoint| endpoint.node).collect()
}

#[test]
fn an_endpoint_elsewhere_has_the_address_of_its_node_as_soon_as_that_is_known_and_as_long() {
    let mut world = directly();
    world = world.slice("a", json!([endpoint("10.1.0.1"), local("10.1.0.2")]), json!({}));
    assert_eq!(nodes(&world), [[0; 4]; 2], "no object of it yet");
    world.apply(other(
        "there",
        &[("Hostname", "there"), ("ExternalIP", "198.51.100.9"), ("InternalIP", "192.0.2.9")],
    ));
    assert_eq!(
        nodes(&world),
        [[192, 0, 2, 9], [0; 4]],
        "the internal address, and none for an endpoint here"
    );
    let networks = &world.told.v4.networks;
    assert_eq!(networks.nodes, [[192, 0, 2, 9], [198, 51, 100, 9]], "it may send from any of its own");
    assert_eq!(networks.this, [[192, 0, 2, 1]]);
    world.apply(other("there", &[("ExternalIP", "198.51.100.9")]));
    assert_eq!(nodes(&world), [[198, 51, 100, 9], [0; 4]], "it has another now");
    world.apply(other("beyond", &[("InternalIP", "192.0.2.7")]));
    assert_eq!(world.told.v4.networks.nodes, [[192, 0, 2, 7], [198, 51, 100, 9]]);
    world.apply(other("there", &[("InternalIP", "fd00:1::9")]));
    assert_eq!(nodes(&world), [[0; 4]; 2], "none of this family");
    world.apply(Change::Node("beyond".to_owned(), None));
    assert_eq!(world.told.v4.networks.nodes, [[0; 4]; 0]);
    assert_eq!(world.told.v6.networks.nodes.len(), 1);
}

#[test]
fn other_nodes_do_not_matter_where_sources_are_translated() {
    let mut world = World::new().service(json!({"externalIPs": ["203.0.113.10"]}));
    world = world.slice("a", json!([endpoint("10.1.0.1")]), json!({}));
    world.apply(other("there", &[("InternalIP", "192.0.2.9"), ("InternalIP", "no address")]));
    assert_eq!(nodes(&world), [[0; 4]]);
    assert_eq!(
        world.told.v4.networks,
        Networks { own: world.told.v4.networks.own.clone(), ..Networks::NONE }
    );
    assert_eq!(world.problems(), [""; 0]);
}

#[test]
fn what_is_wrong_with_another_node_is_told_where_it_matters() {
    let mut world = directly();
    world.apply(other("there", &[("InternalIP", "no address")]));
    assert_eq!(world.problems().len(), 1, "{:?}", world.problems());
    assert!(world.problems()[0].contains("there"), "{:?}", world.problems());
}
