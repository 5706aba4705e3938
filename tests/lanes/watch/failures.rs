//! What the watch does when the API server or the way to it fails.

use std::time::{Duration, Instant};

use xdp_agent::source::Kind;
use xdp_agent::watch::{Notice, Pace, State, event};
use xdp_agent_tests::lab::api_server::{ApiServer, Fault, Gone, Injection, Resource};
use xdp_agent_tests::lab::block_on;

use crate::setup::{NODE, PACE, World, service, service_cidr, slice};

/// How many watches of Services were asked for.
fn watches(server: &ApiServer) -> usize {
    let asked = server.asked();
    asked.iter().filter(|asked| asked.watch && asked.resource == Some(Resource::Services)).count()
}

fn refuse(resource: Option<Resource>, code: u16) -> Vec<Fault> {
    vec![Fault { resource, code, retry_after: None }]
}

#[test]
fn what_vanished_while_the_watch_could_not_be_resumed_is_gone_after_the_next_list() {
    for gone in [Gone::Event, Gone::Status] {
        let mut world = World::with(PACE, |server| {
            for number in 0..10 {
                server.put(service(&format!("s{number}"), &format!("10.96.0.{number}"), 80));
            }
        });
        world.until_synced();
        world.server.go().unwrap();
        for number in 0..5 {
            assert!(world.server.delete(Resource::Services, "shop", &format!("s{number}")));
        }
        world.server.put(service("new", "10.96.1.1", 80));
        world.server.forget(gone);
        world.server.back().unwrap();
        world.until("the new service", |_, seen| seen.services().contains(&"new".into()));
        world.until_equal();
        assert_eq!(world.seen.services().len(), 6);
        assert_eq!(world.seen.count("watch_relists", Kind::Service), 1, "{gone:?}");
    }
}

#[test]
fn a_watch_that_breaks_off_is_resumed_where_it_was() {
    let mut world = World::with(PACE, |server| {
        server.put(service("web", "10.96.0.10", 80));
    });
    world.until_synced();
    for number in 0..8 {
        world.server.put(slice("web", number, &["10.244.1.1"]));
        // In the middle of a line, the end of a line, and the end of the answer.
        match number % 3 {
            0 => {
                let half = br#"{"type":"MODIFIED","object":{"kind":"Endpo"#.to_vec();
                world.server.inject(Some(Resource::EndpointSlices), Injection::Bytes(half));
                world.server.inject(Some(Resource::EndpointSlices), Injection::Disconnect);
            }
            1 => world.server.inject(Some(Resource::EndpointSlices), Injection::Disconnect),
            _ => world.server.inject(Some(Resource::EndpointSlices), Injection::End),
        }
        world.server.put(slice("web", number, &["10.244.1.2"]));
        world.until_equal();
        world.until("the watch", |server, _| server.open_watches(Resource::EndpointSlices) == 1);
    }
    assert_eq!(world.seen.objects.slices.len(), 8);
    assert_eq!(world.asked(Resource::EndpointSlices, false).len(), 1, "nothing is listed again");
    assert_eq!(world.seen.count("watch_relists", Kind::EndpointSlice), 0);
}

#[test]
fn an_api_server_that_is_gone_takes_nothing_with_it() {
    let mut world = World::with(PACE, |server| {
        server.put(service("web", "10.96.0.10", 80));
        server.put(slice("web", 0, &["10.244.1.1"]));
    });
    world.until_synced();
    let before = world.seen.objects.clone();
    world.server.go().unwrap();
    world.until("the loss to be noticed", |_, seen| {
        seen.watch.health.borrow().kinds.iter().all(|kind| matches!(kind.state, State::Failing(_)))
    });
    assert_eq!(world.seen.objects, before);
    world.server.put(service("late", "10.96.0.11", 80));
    world.server.back().unwrap();
    world.until("the change meanwhile", |_, seen| seen.services() == ["late", "web"]);
    world.until("health", |_, seen| seen.watch.health.borrow().is_fresh());
    assert_eq!(world.asked(Resource::Services, false).len(), 1, "resumed, not listed");
}

#[test]
fn a_watch_begins_without_an_api_server() {
    let (mut server, directory) = World::without_watch();
    server.put(service("web", "10.96.0.10", 80));
    server.go().unwrap();
    let mut world = World::watching(server, directory, PACE);
    world.until("failures", |_, seen| seen.count("watch_failures", Kind::Service) > 2);
    assert!(world.seen.synced.is_empty());
    // Nothing depends on events, so they are lost without a word.
    block_on(event(&world.access(), NODE, &Notice::Starting));
    world.server.back().unwrap();
    world.until_synced();
    assert_eq!(world.seen.synced[0].services.len(), 1);
}

#[test]
fn refusals_are_met_with_longer_and_longer_pauses() {
    let pace = Pace { cap: Duration::from_millis(400), ..PACE };
    for code in [401, 403, 429, 500, 503] {
        let mut world = World::with(pace, |server| server.fail(refuse(None, code)));
        world.until("refusals", |_, seen| seen.count("watch_failures", Kind::Service) >= 6);
        let asked = world.asked(Resource::Services, false).len() as u64;
        assert!(asked <= world.seen.count("watch_failures", Kind::Service) + 1, "{code}: {asked} requests");
        let State::Failing(message) = world.seen.watch.health.borrow().kinds[0].state.clone() else {
            panic!("{code} is a failure")
        };
        assert!(message.contains(&code.to_string()), "{message}");
        assert!(world.seen.synced.is_empty());
        world.server.fail(Vec::new());
        world.until_synced();
    }
}

#[test]
fn a_server_that_ends_each_watch_at_once_is_not_stormed() {
    let pace = Pace { first: Duration::from_millis(20), cap: Duration::from_millis(200), ..PACE };
    for ends_well in [true, false] {
        let started = Instant::now();
        let mut world = World::with(pace, |server| server.hang_up(ends_well));
        world.until("ten watches", |server, _| {
            if !ends_well && server.open_watches(Resource::Services) > 0 {
                server.inject(Some(Resource::Services), Injection::Error(410));
            }
            watches(server) >= 10
        });
        // Halves of 20, 40, 80, 160 and then 200 ms.
        assert!(started.elapsed() >= Duration::from_millis(650), "{:?}", started.elapsed());
        world.server.hang_up(false);
        world.server.put(service("web", "10.96.0.10", 80));
        world.until_equal();
    }
}

#[test]
fn the_pause_that_a_server_asks_for_is_kept() {
    let fault = Fault { resource: Some(Resource::Services), code: 429, retry_after: Some(1) };
    let pace = Pace { cap: Duration::from_secs(1), ..PACE };
    let started = Instant::now();
    let mut world = World::with(pace, |server| server.fail(vec![fault]));
    world.until("three requests", |server, _| {
        server.asked().iter().filter(|asked| asked.resource == Some(Resource::Services)).count() == 3
    });
    assert!(started.elapsed() >= Duration::from_secs(2), "{:?}", started.elapsed());
    world.server.fail(Vec::new());
    world.until_synced();
}

#[test]
fn a_watch_that_is_refused_again_and_again_is_listed_again() {
    let mut world = World::start();
    world.until_synced();
    world.server.inject(Some(Resource::Services), Injection::Error(500));
    world.until("the watch to be resumed", |_, seen| seen.count("watch_failures", Kind::Service) == 1);
    world.until("the watch", |server, _| server.open_watches(Resource::Services) == 1);
    assert_eq!(world.seen.count("watch_relists", Kind::Service), 0, "one ERROR event is no reason to list");
    world.server.fail(refuse(Some(Resource::Services), 500));
    world.server.inject(Some(Resource::Services), Injection::End);
    world.until("lists", |_, seen| seen.count("watch_relists", Kind::Service) >= 1);
    world.server.fail(Vec::new());
    world.server.put(service("web", "10.96.0.10", 80));
    world.until_equal();
}

#[test]
fn a_connection_on_which_nothing_is_said_is_given_up() {
    let mut world = World::with(Pace { idle: Duration::from_millis(300), ..PACE }, |_| {});
    world.until_synced();
    world.server.hold(Resource::Services, true);
    world.server.put(service("web", "10.96.0.10", 80));
    world.until("other watches", |server, _| watches(server) >= 3);
    world.server.hold(Resource::Services, false);
    world.until_equal();
    assert_eq!(world.asked(Resource::Services, false).len(), 1);
}

#[test]
fn a_cluster_without_service_cidrs_is_synced_and_gets_them_later() {
    for code in [403, 404] {
        let mut world = World::with(PACE, |server| server.fail(refuse(Some(Resource::ServiceCidrs), code)));
        world.until_synced();
        assert_eq!(world.seen.watch.health.borrow().kinds[3].state, State::Absent);
        assert_eq!(world.seen.count("watch_failures", Kind::ServiceCidr), 0);
        world.server.put(service_cidr("kubernetes", "10.96.0.0/16"));
        world.server.fail(Vec::new());
        world.until("the ServiceCIDR", |_, seen| seen.objects.service_cidrs.len() == 1);
        assert_eq!(world.seen.synced.len(), 1);
    }
}

#[test]
fn slow_answers_are_waited_for() {
    let mut world = World::with(PACE, |server| {
        server.put(service("web", "10.96.0.10", 80));
        server.slow_down(Duration::from_millis(200));
    });
    world.until_synced();
    assert_eq!(world.seen.services(), ["web"]);
    assert_eq!(world.seen.count("watch_failures", Kind::Service), 0);
}
