//! A cluster under test, whose objects are given as their JSON, and what it has told.

use std::{collections::BTreeMap, net::SocketAddr};

use serde_json::{Value, json};

use super::{
    wanted::{
        DesiredFrontend, Endpoint, IpAddress, Networks, Policy, ServicePort as WantedPort, ServicePortName,
    },
    *,
};

mod claims;
mod endpoints;
mod flaws;
mod frontends;
mod health;
mod node;
mod nodes;
mod order;
mod policies;
mod topology;

/// A cluster, updated after every change, and the sum of what it has told.
struct World {
    cluster: Cluster,
    told: Told,
}

/// The sum of all updates.
#[derive(Debug, Default, PartialEq)]
struct Told {
    v4: ToldFamily<[u8; 4]>,
    v6: ToldFamily<Ip6>,
}

#[derive(Debug, PartialEq)]
struct ToldFamily<A> {
    ports: BTreeMap<ServicePortName, Arc<WantedPort<A>>>,
    networks: Networks<A>,
}

impl<A> Default for ToldFamily<A> {
    fn default() -> Self {
        Self { ports: BTreeMap::new(), networks: Networks::NONE }
    }
}

impl Told {
    fn take(&mut self, update: Update) {
        self.v4.take(update.v4);
        self.v6.take(update.v6);
    }

    /// Every frontend, as its kind, its address and port, and the endpoints for clients outside.
    fn lines(&self) -> Vec<String> {
        self.v4.lines().chain(self.v6.lines()).collect()
    }
}

impl<A: IpAddress> ToldFamily<A> {
    /// Adds an update, in which nothing may be old.
    fn take(&mut self, delta: Delta<A>) {
        for (name, port) in delta.ports {
            match port {
                Some(port) => {
                    assert_eq!(name, port.name);
                    let before = self.ports.insert(name, Arc::clone(&port));
                    assert_ne!(before, Some(port), "told twice");
                }
                None => assert!(self.ports.remove(&name).is_some(), "{name} is told gone and never was"),
            }
        }
        if let Some(networks) = delta.networks {
            assert_ne!(networks, self.networks, "told twice");
            self.networks = networks;
        }
    }

    fn lines(&self) -> impl Iterator<Item = String> {
        self.ports.values().flat_map(|port| port.frontends.iter().map(|frontend| line(port, frontend)))
    }
}

fn line<A: IpAddress>(port: &WantedPort<A>, frontend: &DesiredFrontend<A>) -> String {
    let list = |policy| match policy {
        Policy::Cluster => endpoints(&port.cluster),
        Policy::Local => endpoints(&port.local),
    };
    let at = SocketAddr::new(frontend.addr.to_ip(), frontend.port);
    format!("{:?} {at} {}", frontend.kind, list(frontend.external))
}

fn endpoints<A: IpAddress>(list: &[Endpoint<A>]) -> String {
    let texts = list.iter().map(|e| SocketAddr::new(e.addr.to_ip(), e.port).to_string());
    texts.collect::<Vec<_>>().join(",")
}

impl World {
    /// On node `here`, which has an address of each family and one more, and no Node object.
    fn new() -> Self {
        Self::with(Options::default())
    }

    fn with(options: Options) -> Self {
        let mut cluster = Cluster::new(Options { node: "here".to_owned(), ..options });
        cluster.set_node(facts(&["192.0.2.1", "fd00:1::1"], &["192.0.2.1", "192.0.2.2", "fd00:1::1"]));
        let mut world = Self { cluster, told: Told::default() };
        world.update();
        world
    }

    fn update(&mut self) {
        let update = self.cluster.update();
        self.told.take(update);
    }

    fn apply(&mut self, change: Change) {
        self.cluster.apply(change);
        self.update();
    }

    /// Service `shop/web` with port `http` 80/TCP at 10.96.0.1, changed by `spec`.
    fn service(self, spec: Value) -> Self {
        self.service_object(json!({"spec": spec}))
    }

    /// The same, with the whole object changed by `object`.
    fn service_object(mut self, object: Value) -> Self {
        self.apply(service(object));
        self
    }

    fn without_service(mut self, name: &str) -> Self {
        self.apply(Change::Service(ObjectName::new("shop", name), None));
        self
    }

    /// A slice of Service `shop/web` for port `http` 8080, changed by `object`.
    fn slice(mut self, name: &str, endpoints: Value, object: Value) -> Self {
        self.apply(slice(name, endpoints, object));
        self
    }

    fn without_slice(mut self, name: &str) -> Self {
        self.apply(Change::Slice(ObjectName::new("shop", name), None));
        self
    }

    /// The Node object of this node.
    fn node(mut self, object: Value) -> Self {
        self.apply(node(object));
        self
    }

    fn cidr(mut self, name: &str, cidrs: Value) -> Self {
        self.apply(cidr(name, cidrs));
        self
    }

    fn lines(&self) -> Vec<String> {
        self.told.lines()
    }

    /// The only service port of IPv4.
    fn port(&self) -> &WantedPort<[u8; 4]> {
        assert_eq!(self.told.v4.ports.len(), 1, "{:?}", self.lines());
        self.told.v4.ports.values().next().unwrap()
    }

    fn problems(&self) -> Vec<String> {
        self.cluster.problems().iter().map(ToString::to_string).collect()
    }
}

fn facts(addresses: &[&str], own: &[&str]) -> NodeFacts {
    NodeFacts { addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(), own: ips(own) }
}

fn ips(texts: &[&str]) -> BTreeSet<IpAddr> {
    texts.iter().map(|ip| ip.parse().unwrap()).collect()
}

fn networks(texts: &[&str]) -> Vec<(IpAddr, u8)> {
    texts.iter().map(|text| address::parse_cidr_sloppy(text).unwrap()).collect()
}

fn service(object: Value) -> Change {
    let mut full = json!({
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]},
    });
    merge(&mut full, object);
    let name = ObjectName::new("shop", full["metadata"]["name"].as_str().unwrap());
    Change::Service(name, Some(Arc::new(Service::read(&serde_json::from_value(full).unwrap()))))
}

fn slice(name: &str, endpoints: Value, object: Value) -> Change {
    let mut full = json!({
        "metadata": {"name": name, "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints,
    });
    merge(&mut full, object);
    let slice = Slice::read(&serde_json::from_value(full).unwrap());
    Change::Slice(ObjectName::new("shop", name), Some(Arc::new(slice)))
}

fn node(object: Value) -> Change {
    Change::Node("here".to_owned(), Some(Arc::new(Node::read(&serde_json::from_value(object).unwrap()))))
}

fn cidr(name: &str, cidrs: Value) -> Change {
    let object = serde_json::from_value(json!({"spec": {"cidrs": cidrs}})).unwrap();
    Change::ServiceCidr(name.to_owned(), Some(Arc::new(ServiceCidr::read(&object))))
}

/// Changes fields of an object; those of an array as a whole.
fn merge(base: &mut Value, change: Value) {
    match (base, change) {
        (Value::Object(base), Value::Object(change)) => {
            for (key, value) in change {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, change) => *base = change,
    }
}

/// A ready endpoint on another node.
fn endpoint(ip: &str) -> Value {
    json!({"addresses": [ip], "nodeName": "there"})
}

/// A ready endpoint on this node.
fn local(ip: &str) -> Value {
    json!({"addresses": [ip], "nodeName": "here"})
}

/// An endpoint on its way out that still serves, on some node.
fn leaving(ip: &str, node: &str) -> Value {
    let conditions = json!({"ready": false, "serving": true, "terminating": true});
    json!({"addresses": [ip], "nodeName": node, "conditions": conditions})
}
