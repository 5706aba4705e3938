//! What the server of the tests says, beside what a kube-apiserver 1.36.2 said.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use xdp_agent_tests::lab::api_server::{ApiServer, Injection, Resource};

use crate::setup::{PACE, World};

/// The events of a recording.
fn recorded(name: &str) -> Vec<Value> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("cases/watch").join(name);
    let text = std::fs::read_to_string(path).expect("a recording");
    text.lines().map(|line| serde_json::from_str(line).expect("an event")).collect()
}

fn version(event: &Value) -> u64 {
    event["object"]["metadata"]["resourceVersion"]
        .as_str()
        .and_then(|text| text.parse().ok())
        .expect("a version")
}

/// Makes happen on the server what an event tells.
fn replay(server: &ApiServer, resource: Resource, event: &Value) {
    let object = &event["object"];
    let text = |field: &str| object["metadata"][field].as_str().expect("a name");
    match event["type"].as_str().unwrap_or_default() {
        "ADDED" | "MODIFIED" => server.put_as_it_is(object.clone()),
        "DELETED" => {
            server.advance(version(event) - 1);
            assert!(server.delete(resource, text("namespace"), text("name")));
        }
        "BOOKMARK" => {
            server.advance(version(event));
            if object["metadata"]["annotations"].is_null() {
                server.inject(Some(resource), Injection::Bookmark);
            }
        }
        other => panic!("{other} was not recorded"),
    }
}

/// What a watch that asks as the recorded one did hears.
fn heard(resource: Resource, path: &str, events: &[Value]) -> Vec<Value> {
    let server = ApiServer::start().expect("a server");
    let is_initial_end =
        |event: &Value| !event["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"].is_null();
    let initial = events.iter().position(is_initial_end).expect("an end of the initial events") + 1;
    let (before, after) = events.split_at(initial);
    before.iter().for_each(|event| replay(&server, resource, event));
    let query =
        "watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let mut lines = Lines::open(&server, &format!("{path}?{query}&timeoutSeconds=60")).expect("an answer");
    let mut said: Vec<Value> = before.iter().map(|_| lines.next()).collect();
    after.iter().for_each(|event| replay(&server, resource, event));
    said.extend(after.iter().map(|_| lines.next()));
    said
}

/// The lines of an answer, by a client that knows nothing of Kubernetes or of chunks: HTTP/1.0.
struct Lines(BufReader<TcpStream>);

impl Lines {
    fn open(server: &ApiServer, path: &str) -> io::Result<Self> {
        let mut stream = TcpStream::connect(server.address())?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
        let mut lines = Self(BufReader::new(stream));
        while !lines.line()?.trim_end().is_empty() {}
        Ok(lines)
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        Ok(line)
    }

    fn next(&mut self) -> Value {
        serde_json::from_str(&self.line().expect("a line")).expect("an event")
    }
}

#[test]
fn the_server_says_what_a_real_one_said() {
    for (resource, path, name) in [
        (Resource::Services, "/api/v1/services", "watch-services.jsonl"),
        (Resource::EndpointSlices, "/apis/discovery.k8s.io/v1/endpointslices", "watch-endpointslices.jsonl"),
    ] {
        let events = recorded(name);
        let said = heard(resource, path, &events);
        for (said, event) in said.iter().zip(&events) {
            assert_eq!(said, event, "{name}");
        }
        assert_eq!(said.len(), events.len());
    }
}

#[test]
fn a_recording_leaves_the_consumer_with_what_was_there_at_its_end() {
    let mut world = World::start();
    world.until_synced();
    let mut both: BTreeMap<u64, (Resource, Value)> = BTreeMap::new();
    for (resource, name) in [
        (Resource::Services, "watch-services.jsonl"),
        (Resource::EndpointSlices, "watch-endpointslices.jsonl"),
    ] {
        let changes = recorded(name).into_iter().filter(|event| event["type"] != "BOOKMARK");
        both.extend(changes.map(|event| (version(&event), (resource, event))));
    }
    for (resource, event) in both.values() {
        replay(&world.server, *resource, event);
    }
    // "headless" has no cluster IP, "ext" and "web" were deleted.
    world.until("the changes", |_, seen| seen.services() == ["kubernetes", "lb", "np"]);
    world.until_equal();
    assert!(world.seen.problems.is_empty(), "{:?}", world.seen.problems);
    let World { server, .. } = world;
    // The same for one that lists it all at once.
    let mut late = World::watching(server, tempfile::tempdir().unwrap(), PACE);
    late.until_synced();
    late.until_equal();
    assert_eq!(late.seen.services(), ["kubernetes", "lb", "np"]);
}
