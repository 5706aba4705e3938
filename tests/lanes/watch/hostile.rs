//! Objects and lines that should not be: each is named, and the rest goes on.

use serde_json::{Value, json};
use xdp_agent::problem::ProblemKind;
use xdp_agent::source::Kind;
use xdp_agent_tests::lab::api_server::{Injection, Resource};

use crate::setup::{PACE, World, service, slice};

/// A Service whose ports are no list.
fn malformed(name: &str) -> Value {
    let mut object = service(name, "10.96.0.99", 80);
    object["spec"]["ports"] = json!({"port": "eighty"});
    object
}

#[test]
fn a_malformed_object_keeps_its_earlier_version_and_stops_nothing_else() {
    let mut world = World::with(PACE, |server| {
        server.put(service("a", "10.96.0.1", 80));
        server.put(malformed("b"));
        server.put(service("c", "10.96.0.3", 80));
    });
    world.until_synced();
    world.until("the problem", |_, seen| seen.problems.len() == 1);
    assert_eq!(world.seen.services(), ["a", "c"]);
    let problem = world.seen.problems[0].clone();
    assert_eq!(problem.kind, ProblemKind::Invalid);
    assert_eq!(problem.object.as_deref(), Some("Service shop/b"));
    assert!(problem.message.contains("spec.ports"), "{problem}");
    // The same again is counted, and said once.
    let reports = world.seen.reports;
    let before = world.seen.objects.services.clone();
    world.server.put(malformed("b"));
    world.server.put(malformed("a"));
    world.server.put(service("d", "10.96.0.4", 80));
    world.until("the services", |_, seen| seen.services() == ["a", "c", "d"]);
    world.until("both problems", |_, seen| seen.problems.len() == 2);
    assert_eq!(world.seen.reports, reports + 1);
    assert_eq!(world.seen.count("watch_bad_objects", Kind::Service), 3);
    assert!(world.seen.objects.services.iter().take(2).eq(before.iter()), "a is as it was");
    // Put right, or gone, it is no problem any more.
    world.server.put(service("a", "10.96.0.1", 81));
    assert!(world.server.delete(Resource::Services, "shop", "b"));
    world.until("no problems", |_, seen| seen.problems.is_empty());
    world.until_equal();
    assert_eq!(world.asked(Resource::Services, false).len(), 1, "nothing is listed again");
}

#[test]
fn lines_that_are_no_events_lead_to_a_new_list() {
    let mut world = World::start();
    world.until_synced();
    let lines: [&[u8]; 6] = [
        b"}{\n",
        b"\xff\xfe\x00\n",
        b"{\"type\":\"ADDED\"}\n",
        b"{\"type\":\"RENAMED\",\"object\":{}}\n",
        b"{\"type\":\"BOOKMARK\",\"object\":{\"metadata\":{}}}\n",
        b"{\"type\":\"DELETED\",\"object\":{\"metadata\":{\"name\":7}}}\n",
    ];
    for (at, line) in lines.into_iter().enumerate() {
        world.server.inject(Some(Resource::Services), Injection::Bytes(line.to_vec()));
        world.server.put(service(&format!("s{at}"), &format!("10.96.0.{at}"), 80));
        world.until("a new list", |_, seen| seen.count("watch_relists", Kind::Service) == at as u64 + 1);
        world.until_equal();
        world.until("the watch", |server, _| server.open_watches(Resource::Services) == 1);
    }
    assert_eq!(world.seen.count("watch_failures", Kind::Service), 6);
    assert_eq!(world.seen.count("watch_failures", Kind::EndpointSlice), 0);
}

#[test]
fn names_of_64_kib_and_texts_that_are_no_utf_8_are_read() {
    let long = "n".repeat(64 << 10);
    let mut world = World::with(PACE, |server| {
        server.put(service(&long, "10.96.0.1", 80));
        server.put(malformed(&"m".repeat(64 << 10)));
    });
    world.until_synced();
    assert_eq!(world.seen.services(), std::slice::from_ref(&long));
    world.until("the problem", |_, seen| seen.problems.len() == 1);
    let problem = world.seen.problems[0].to_string();
    assert!(problem.len() < 1_000, "{} bytes", problem.len());
    let mut event = json!({"type": "ADDED", "object": service("odd", "10.96.0.2", 80)});
    event["object"]["metadata"]["annotations"] = json!({"text": "HERE"});
    let (before, after) = {
        let text = event.to_string();
        let (before, after) = text.split_once("HERE").unwrap();
        (before.as_bytes().to_vec(), after.as_bytes().to_vec())
    };
    let line = [before, vec![0xff, 0xc0, 0x80], after, b"\n".to_vec()].concat();
    world.server.inject(Some(Resource::Services), Injection::Bytes(line));
    world.until("the service", |_, seen| seen.services().contains(&"odd".into()));
    assert_eq!(world.seen.count("watch_failures", Kind::Service), 0);
}

#[test]
fn a_thousand_slices_of_one_service_and_objects_of_every_odd_kind_are_read() {
    let odd = [
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "bare", "namespace": "shop"}}),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "zero", "namespace": "shop"},
            "spec": {"clusterIP": "10.96.0.2", "ports": [{"port": 0}, {"port": -1}, {"port": 99_999}]}}),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "words", "namespace": "shop"},
            "spec": {"clusterIP": "ten", "type": "Magic", "ipFamilies": ["IPv5"], "sessionAffinity": "Sometimes"}}),
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "fqdn", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "FQDN", "endpoints": [{"addresses": ["a.example", "a.example"]}]}),
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "null", "namespace": "shop"}, "addressType": "", "endpoints": null, "ports": null}),
    ];
    let mut world = World::with(PACE, |server| {
        for number in 0..1_000 {
            server.put(slice("web", number, &["10.244.1.1", "10.244.1.1"]));
        }
        for object in &odd {
            server.put(object.clone());
        }
    });
    world.until_synced();
    world.until_equal();
    assert_eq!(world.seen.objects.slices.len(), 1_002);
    assert_eq!(world.seen.objects.services.len(), 3);
}
