//! An API server, the agent's watch of it, and what a consumer of its events knows.

use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus_client::{encoding::text::encode, registry::Registry};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::mpsc;
use xdp_agent::objects::{self, Change, ObjectName, Objects};
use xdp_agent::problem::Problem;
use xdp_agent::source::{Event, Kind};
use xdp_agent::watch::{Access, Metrics, Options, Pace, Watch};
use xdp_agent_tests::lab::api_server::{ApiServer, Asked, Resource};
use xdp_agent_tests::lab::block_on;

/// Longest time for anything to be seen.
const LIMIT: Duration = Duration::from_secs(20);
/// Time between two looks when nothing is said.
const LOOK: Duration = Duration::from_millis(10);

/// Name of the node whose Node is watched.
pub(crate) const NODE: &str = "node-a";

/// Less patient than an agent, so that failures are overcome while a test waits.
pub(crate) const PACE: Pace = Pace {
    first: Duration::from_millis(4),
    cap: Duration::from_millis(100),
    steady: Duration::from_millis(200),
    list: Duration::from_secs(5),
    idle: Duration::from_secs(10),
    watch: Duration::from_secs(60),
    absent: Duration::from_millis(50),
};

/// A server and a consumer of what is watched there.
pub(crate) struct World {
    pub(crate) server: ApiServer,
    pub(crate) seen: Seen,
    directory: TempDir,
}

/// What a consumer knows.
pub(crate) struct Seen {
    pub(crate) watch: Watch,
    pub(crate) objects: Objects,
    pub(crate) problems: Vec<Problem>,
    /// Objects that were there when everything was said to be.
    pub(crate) synced: Vec<Objects>,
    /// Every change, in order.
    pub(crate) changes: Vec<Change>,
    /// Lists of problems, in order.
    pub(crate) reports: usize,
    events: mpsc::Receiver<Event>,
    registry: Registry,
}

impl World {
    /// A server with a Node, and nothing that watches it.
    pub(crate) fn without_watch() -> (ApiServer, TempDir) {
        let server = ApiServer::start().expect("a server");
        server.put(node());
        (server, tempfile::tempdir().expect("a directory"))
    }

    /// A server with a Node, and a watch of it.
    pub(crate) fn start() -> Self {
        Self::with(PACE, |_| {})
    }

    /// A server that is made ready first.
    pub(crate) fn with(pace: Pace, ready: impl FnOnce(&ApiServer)) -> Self {
        let (server, directory) = Self::without_watch();
        ready(&server);
        Self::watching(server, directory, pace)
    }

    /// A watch of all nodes.
    pub(crate) fn of_all_nodes() -> Self {
        let (server, directory) = Self::without_watch();
        Self::watching_as(server, directory, PACE, true)
    }

    /// A watch of a server.
    pub(crate) fn watching(server: ApiServer, directory: TempDir, pace: Pace) -> Self {
        Self::watching_as(server, directory, pace, false)
    }

    fn watching_as(server: ApiServer, directory: TempDir, pace: Pace, all_nodes: bool) -> Self {
        let access = Access {
            kubeconfig: Some(server.kubeconfig(directory.path()).expect("a kubeconfig")),
            master: None,
        };
        let options = Options { access, node: NODE.into(), all_nodes, pace };
        let (sender, events) = mpsc::channel(64);
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let watch = block_on(Watch::start(options, sender, metrics)).expect("a watch");
        let seen = Seen {
            watch,
            objects: Objects::default(),
            problems: Vec::new(),
            synced: Vec::new(),
            changes: Vec::new(),
            reports: 0,
            events,
            registry,
        };
        Self { server, seen, directory }
    }

    /// How to reach the server.
    pub(crate) fn access(&self) -> Access {
        Access { kubeconfig: Some(self.directory.path().join("kubeconfig")), master: None }
    }

    /// Takes events until a condition holds.
    #[track_caller]
    pub(crate) fn until(&mut self, what: &str, mut holds: impl FnMut(&ApiServer, &Seen) -> bool) {
        let end = Instant::now() + LIMIT;
        while !holds(&self.server, &self.seen) {
            let seen = &self.seen;
            assert!(
                Instant::now() < end,
                "waited {LIMIT:?} for {what}; {:?}, {:?}",
                seen.objects,
                seen.problems
            );
            let event = block_on(async { tokio::time::timeout(LOOK, self.seen.events.recv()).await });
            if let Ok(event) = event {
                self.seen.take(event.expect("the watch runs"));
            }
        }
    }

    /// Takes events until everything is listed and watched.
    #[track_caller]
    pub(crate) fn until_synced(&mut self) {
        self.until("everything to be listed", |_, seen| !seen.synced.is_empty());
        self.until("everything to be watched", |_, seen| seen.watch.health.borrow().is_fresh());
    }

    /// Takes events until the consumer knows what the server has.
    #[track_caller]
    pub(crate) fn until_equal(&mut self) {
        self.until("the consumer to know what the server has", |server, seen| seen.objects == wanted(server));
    }

    /// Requests of a kind.
    pub(crate) fn asked(&self, resource: Resource, watch: bool) -> Vec<Asked> {
        let concerns = |asked: &Asked| asked.resource == Some(resource) && asked.watch == watch;
        self.server.asked().into_iter().filter(concerns).collect()
    }
}

impl Seen {
    fn take(&mut self, event: Event) {
        match event {
            Event::Changes(changes) => {
                assert!(!changes.is_empty(), "a batch holds something");
                for change in changes {
                    self.changes.push(change.clone());
                    self.objects.apply(change);
                }
            }
            Event::Problems(problems) => {
                self.problems = problems;
                self.reports += 1;
            }
            Event::Synced => self.synced.push(self.objects.clone()),
        }
    }

    /// The value of a counter of a kind.
    pub(crate) fn count(&self, name: &str, kind: Kind) -> u64 {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("metrics");
        let key = format!("{name}_total{{kind=\"{}\"}} ", kind.label());
        let line = text.lines().find_map(|line| line.strip_prefix(&key));
        line.unwrap_or_else(|| panic!("no {key} in\n{text}")).parse().expect("a number")
    }

    /// Names of the Services that are known.
    pub(crate) fn services(&self) -> Vec<String> {
        self.objects.services.keys().map(|name| name.name.clone()).collect()
    }
}

/// What an agent has to know of a server's objects, by the words of Kubernetes' documentation rather than by selectors.
pub(crate) fn wanted(server: &ApiServer) -> Objects {
    let mut objects = Objects::default();
    for resource in Resource::ALL {
        for object in server.objects(resource) {
            let labels = &object["metadata"]["labels"];
            let is_ours = match resource {
                Resource::Services => {
                    object["spec"]["clusterIP"] != "None"
                        && labels.get("service.kubernetes.io/service-proxy-name").is_none()
                }
                Resource::EndpointSlices => labels.get("service.kubernetes.io/headless").is_none(),
                Resource::Nodes => object["metadata"]["name"] == NODE,
                Resource::ServiceCidrs => true,
            };
            if is_ours {
                objects.apply(change(resource, object));
            }
        }
    }
    objects
}

/// The change that brings an object.
pub(crate) fn change(resource: Resource, object: Value) -> Change {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_string();
    let name = ObjectName { namespace: text("namespace"), name: text("name") };
    let parse = "an object of its kind";
    match resource {
        Resource::Services => {
            let object = serde_json::from_value(object).expect(parse);
            Change::Service(name, Some(Arc::new(objects::Service::read(&object))))
        }
        Resource::EndpointSlices => {
            let object = serde_json::from_value(object).expect(parse);
            Change::Slice(name, Some(Arc::new(objects::Slice::read(&object))))
        }
        Resource::Nodes => {
            let object = serde_json::from_value(object).expect(parse);
            Change::Node(name.name, Some(Arc::new(objects::Node::read(&object))))
        }
        Resource::ServiceCidrs => {
            let object = serde_json::from_value(object).expect(parse);
            Change::ServiceCidr(name.name, Some(Arc::new(objects::ServiceCidr::read(&object))))
        }
    }
}

pub(crate) fn node() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}
    })
}

pub(crate) fn service(name: &str, address: &str, port: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": port, "targetPort": 8080, "protocol": "TCP"}]
        }
    })
}

/// A slice of a Service with the endpoints of these addresses.
pub(crate) fn slice(service: &str, number: usize, addresses: &[&str]) -> Value {
    let endpoint = |address: &&str| json!({"addresses": [address], "conditions": {"ready": true}});
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-{number}"), "namespace": "shop",
            "labels": {"kubernetes.io/service-name": service}
        },
        "addressType": "IPv4", "endpoints": addresses.iter().map(endpoint).collect::<Vec<_>>(),
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]
    })
}

pub(crate) fn service_cidr(name: &str, cidr: &str) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": name},
        "spec": {"cidrs": [cidr]}
    })
}

/// The object with a label.
pub(crate) fn labelled(mut object: Value, key: &str, value: &str) -> Value {
    object["metadata"]["labels"][key] = value.into();
    object
}
