//! What happens to objects while all is well.

use serde_json::json;
use xdp_agent::objects::Change;
use xdp_agent::source::Kind;
use xdp_agent::watch::{Notice, event};
use xdp_agent_tests::lab::api_server::{Injection, Resource};
use xdp_agent_tests::lab::block_on;

use crate::setup::{NODE, PACE, World, labelled, node, service, service_cidr, slice};

const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";

#[test]
fn everything_that_exists_is_known_when_it_is_said_to_be() {
    let mut world = World::with(PACE, |server| {
        for number in 0..1_201 {
            let name = format!("s{number:04}");
            server.put(service(&name, &format!("10.96.{}.{}", number / 250, number % 250), 80));
            server.put(slice(&name, 0, &["10.244.1.1"]));
        }
        server.put(service("none", "None", 80));
        server.put(labelled(service("other", "10.96.9.9", 80), PROXY_NAME, "other-proxy"));
        server.put(labelled(slice("none", 0, &["10.244.1.2"]), "service.kubernetes.io/headless", ""));
        let mut other_node = node();
        other_node["metadata"]["name"] = json!("node-b");
        server.put(other_node);
        server.put(service_cidr("kubernetes", "10.96.0.0/16"));
    });
    world.until_synced();
    let first = &world.seen.synced[0];
    assert_eq!((first.services.len(), first.slices.len()), (1_201, 1_201));
    assert_eq!(first.nodes.keys().collect::<Vec<_>>(), [NODE]);
    assert_eq!(first.service_cidrs.len(), 1);
    world.until_equal();
    let pages = world.asked(Resource::Services, false);
    assert_eq!(pages.len(), 3, "pages of 500");
    assert!(
        pages
            .iter()
            .all(|page| page.query["limit"] == "500"
                && page.query["labelSelector"] == format!("!{PROXY_NAME}"))
    );
    assert!(pages[0].user_agent.starts_with("xdp-agent/"), "{}", pages[0].user_agent);
    let watches = world.asked(Resource::Services, true);
    assert_eq!(watches.len(), 1);
    assert_eq!(watches[0].query["allowWatchBookmarks"], "true");
    assert_eq!(watches[0].query["fieldSelector"], "spec.clusterIP!=None");
}

#[test]
fn other_nodes_are_followed_where_they_matter() {
    let mut world = World::of_all_nodes();
    world.until_synced();
    let mut other = node();
    other["metadata"]["name"] = json!("node-b");
    other["status"]["addresses"][0]["address"] = json!("192.0.2.2");
    world.server.put(other);
    world.until("the other node", |_, seen| {
        let address = |name| seen.objects.nodes.get(name).map(|node| node.internal_ips.clone());
        address("node-b").is_some_and(|ips| ips[0].to_string() == "192.0.2.2") && address(NODE).is_some()
    });
    assert!(world.asked(Resource::Nodes, false).iter().all(|list| !list.query.contains_key("fieldSelector")));
    world.server.delete(Resource::Nodes, "", "node-b");
    world.until("it to be gone", |_, seen| seen.objects.nodes.len() == 1);
}

#[test]
fn an_object_is_followed_from_its_creation_to_its_deletion() {
    let mut world = World::start();
    world.until_synced();
    world.server.put(service("web", "10.96.0.10", 80));
    world.server.put(slice("web", 0, &["10.244.1.1"]));
    world.until("the service", |_, seen| seen.services() == ["web"]);
    world.until_equal();
    let before = world.seen.objects.clone();
    world.server.put(slice("web", 0, &["10.244.1.1", "10.244.2.1"]));
    world.until("the change", |_, seen| seen.count("watch_events", Kind::EndpointSlice) == 2);
    world.until_equal();
    assert_ne!(world.seen.objects.slices, before.slices);
    world.server.delete_all();
    world.until("the deletions", |_, seen| seen.objects == Default::default());
    assert!(matches!(
        world.seen.changes.last(),
        Some(Change::Service(_, None) | Change::Slice(_, None) | Change::Node(_, None))
    ));
    assert_eq!(world.seen.count("watch_relists", Kind::Service), 0);
    assert_eq!(world.seen.synced.len(), 1, "said once");
}

#[test]
fn a_service_given_to_another_proxy_is_gone_until_it_comes_back() {
    let mut world = World::with(PACE, |server| {
        server.put(service("web", "10.96.0.10", 80));
    });
    world.until_synced();
    assert_eq!(world.seen.services(), ["web"]);
    for _ in 0..2 {
        world.server.put(labelled(service("web", "10.96.0.10", 80), PROXY_NAME, ""));
        world.until("the service to be gone", |_, seen| seen.services().is_empty());
        world.server.put(service("web", "10.96.0.10", 80));
        world.until("the service to be back", |_, seen| seen.services() == ["web"]);
    }
    world.until_equal();
}

#[test]
fn bookmarks_move_the_place_at_which_a_watch_is_resumed() {
    let mut world = World::start();
    world.until_synced();
    let first = world.asked(Resource::Services, true)[0].query["resourceVersion"].clone();
    for port in 1..=5 {
        world.server.put(slice("web", port, &["10.244.1.1"]));
    }
    let version = world.server.version().to_string();
    world.server.inject(Some(Resource::Services), Injection::Bookmark);
    world.server.inject(Some(Resource::Services), Injection::End);
    world.until("the watch to be resumed", |server, _| {
        server
            .asked()
            .iter()
            .filter(|asked| asked.watch && asked.resource == Some(Resource::Services))
            .count()
            == 2
    });
    let resumed = &world.asked(Resource::Services, true)[1];
    assert_eq!(resumed.query["resourceVersion"], version);
    assert_ne!(first, version);
    assert_eq!(world.asked(Resource::Services, false).len(), 1, "nothing is listed again");
}

#[test]
fn kinds_come_in_any_order_and_late() {
    let mut world = World::with(PACE, |server| server.hold(Resource::EndpointSlices, true));
    world.until_synced();
    for number in 0..20 {
        let name = format!("s{number}");
        world.server.put(slice(&name, 0, &["10.244.1.1"]));
        world.server.put(service(&name, &format!("10.96.0.{}", number + 10), 80));
    }
    world.until("the services", |_, seen| seen.objects.services.len() == 20);
    assert!(world.seen.objects.slices.is_empty());
    world.server.hold(Resource::EndpointSlices, false);
    world.until_equal();
}

#[test]
fn events_reach_the_api_server() {
    let world = World::start();
    block_on(event(&world.access(), NODE, &Notice::Starting));
    let posted = world.server.posted();
    assert_eq!(posted.len(), 1);
    assert_eq!(
        (posted[0]["action"].as_str(), posted[0]["regarding"]["name"].as_str()),
        (Some("StartKubeProxy"), Some(NODE))
    );
}
