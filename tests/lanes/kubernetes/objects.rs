//! Objects as an API server has them, and changes of them that nobody has thought of.

use serde_json::{Value, json};
use xdp_agent_tests::lab::api_server::Resource;
use xdp_agent_tests::lab::servers::{HTTP_PORT, UDP_PORT};
use xdp_agent_tests::lab::world::{
    CLUSTER_IP, EXTERNAL_IP, LOAD_BALANCER_IP, NODE, NODE_PORT_HTTP, NODE_PORT_UDP, NODE2, Pod, SERVICE_HTTP,
    SERVICE_UDP,
};

/// Namespace of every object that has one.
pub(crate) const NAMESPACE: &str = "default";
/// Services that generated changes are about.
const SERVICES: u64 = 40;
/// Slices of each of them.
const SLICES: u64 = 4;
/// Name and first address of those Services.
const PREFIX: &str = "s";

/// Numbers that look random and are the same in every run (Steele, Lea and Flood's SplitMix64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Whether something of so many in a hundred happens.
    pub(crate) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize]
    }
}

/// A change of an object.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Put(Value),
    Delete(Resource, String),
}

/// The next change.
pub(crate) fn step(random: &mut Random) -> Step {
    let number = random.below(SERVICES);
    let name = format!("{PREFIX}{number}");
    match random.below(100) {
        0..45 => Step::Put(slice(&name, random.below(SLICES), random)),
        45..55 => Step::Delete(Resource::EndpointSlices, format!("{name}-{}", random.below(SLICES))),
        55..85 => Step::Put(service(number, &name, random)),
        85..92 => Step::Delete(Resource::Services, name),
        92..95 => Step::Put(node(random.one_of(&["", "zone-a", "zone-b"]))),
        95..98 => Step::Put(service_cidr("second", "10.97.0.0/16")),
        _ => Step::Delete(Resource::ServiceCidrs, "second".to_string()),
    }
}

fn service(number: u64, name: &str, random: &mut Random) -> Value {
    let kind = random.one_of(&["ClusterIP", "NodePort", "LoadBalancer"]);
    let is_headless = kind == "ClusterIP" && random.percent(10);
    let address = if is_headless { "None".to_string() } else { format!("10.96.1.{}", number + 1) };
    let node_port = 30_000 + 4 * number;
    let mut ports = Vec::new();
    for (at, (port_name, protocol, port)) in
        [("http", "TCP", 80), ("dns", "UDP", 53), ("peer", "SCTP", 9_000)].into_iter().enumerate()
    {
        if at == 0 || random.percent(50) {
            let mut entry =
                json!({"name": port_name, "protocol": protocol, "port": port, "targetPort": port});
            if kind != "ClusterIP" {
                entry["nodePort"] = json!(node_port + at as u64);
            }
            ports.push(entry);
        }
    }
    let mut spec = json!({
        "type": kind, "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
        "ipFamilyPolicy": "SingleStack", "ports": ports, "internalTrafficPolicy": "Cluster"
    });
    if random.percent(20) {
        spec["internalTrafficPolicy"] = json!("Local");
    }
    if random.percent(30) {
        spec["sessionAffinity"] = json!("ClientIP");
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 60 + random.below(3) * 60}});
    }
    // Few enough that Services claim the same one, which the older of them has.
    let pool = random.below(6);
    let mut status = json!({"loadBalancer": {}});
    if !is_headless && random.percent(25) {
        spec["externalIPs"] = json!([format!("203.0.113.{}", 20 + pool)]);
    }
    if kind != "ClusterIP" || spec.get("externalIPs").is_some() {
        spec["externalTrafficPolicy"] = json!(random.one_of(&["Cluster", "Cluster", "Local"]));
    }
    if kind == "LoadBalancer" {
        if random.percent(40) {
            spec["loadBalancerSourceRanges"] = json!(["198.51.100.0/24", "2001:db8::/64"]);
        }
        if spec["externalTrafficPolicy"] == "Local" {
            spec["healthCheckNodePort"] = json!(31_000 + number);
        }
        let mode = random.one_of(&["VIP", "VIP", "Proxy"]);
        status["loadBalancer"] =
            json!({"ingress": [{"ip": format!("203.0.113.{}", 40 + pool), "ipMode": mode}]});
    }
    let mut labels = json!({"app": name});
    if random.percent(8) {
        labels["service.kubernetes.io/service-proxy-name"] = json!("another");
    }
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": name, "namespace": NAMESPACE, "labels": labels,
            "creationTimestamp": format!("2026-01-01T00:00:{:02}Z", number)
        },
        "spec": spec, "status": status
    })
}

fn slice(service: &str, number: u64, random: &mut Random) -> Value {
    let endpoints = (0..random.below(7)).map(|_| endpoint(random)).collect::<Vec<_>>();
    let mut labels = json!({"kubernetes.io/service-name": service});
    if random.percent(5) {
        labels["service.kubernetes.io/headless"] = json!("");
    }
    let family = if random.percent(4) { "FQDN" } else { "IPv4" };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("{service}-{number}"), "namespace": NAMESPACE, "labels": labels},
        "addressType": family, "endpoints": endpoints,
        "ports": [
            {"name": "http", "protocol": "TCP", "port": 80}, {"name": "dns", "protocol": "UDP", "port": 53},
            {"name": "peer", "protocol": "SCTP", "port": 9_000}
        ]
    })
}

fn endpoint(random: &mut Random) -> Value {
    let (node, network) = random.one_of(&[("node", 1), ("node2", 2)]);
    let (ready, serving, terminating) = random.one_of(&[
        (true, true, false),
        (true, true, false),
        (false, true, true),
        (false, false, false),
    ]);
    let mut endpoint = json!({
        "addresses": [format!("10.244.{network}.{}", 11 + random.below(12))], "nodeName": node,
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating}
    });
    if random.percent(40) {
        endpoint["hints"] = json!({"forZones": [{"name": random.one_of(&["zone-a", "zone-b"])}]});
    }
    endpoint
}

/// The Node of the agent.
pub(crate) fn node(zone: &str) -> Value {
    let mut node = node_of("node", &NODE.to_string(), "10.244.1.0/24");
    if !zone.is_empty() {
        node["metadata"]["labels"] = json!({"topology.kubernetes.io/zone": zone});
    }
    node
}

/// The other Node, which the agent does not watch.
pub(crate) fn node2() -> Value {
    node_of("node2", &NODE2.to_string(), "10.244.2.0/24")
}

fn node_of(name: &str, address: &str, pods: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
        "spec": {"podCIDR": pods, "podCIDRs": [pods]},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]}
    })
}

pub(crate) fn service_cidr(name: &str, cidr: &str) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": name},
        "spec": {"cidrs": [cidr]}
    })
}

/// A Service of one port, whose number tells one look at the maps from another.
pub(crate) fn marker(port: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "marker", "namespace": NAMESPACE},
        "spec": {
            "type": "ClusterIP", "clusterIP": "10.96.2.1", "clusterIPs": ["10.96.2.1"], "ipFamilies": ["IPv4"],
            "ports": [{"name": "at", "protocol": "TCP", "port": port, "targetPort": port}]
        }
    })
}

/// The standard Service of a world.
pub(crate) fn web() -> Value {
    let ip = CLUSTER_IP.to_string();
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": NAMESPACE},
        "spec": {
            "type": "LoadBalancer", "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"],
            "externalIPs": [EXTERNAL_IP.to_string()], "externalTrafficPolicy": "Cluster",
            "ports": [
                {"name": "http", "protocol": "TCP", "port": SERVICE_HTTP, "targetPort": HTTP_PORT,
                    "nodePort": NODE_PORT_HTTP},
                {"name": "echo", "protocol": "UDP", "port": SERVICE_UDP, "targetPort": UDP_PORT,
                    "nodePort": NODE_PORT_UDP}
            ]
        },
        "status": {"loadBalancer": {"ingress": [{"ip": LOAD_BALANCER_IP.to_string(), "ipMode": "VIP"}]}}
    })
}

/// The slice of the standard Service with these pods.
pub(crate) fn web_slice<'a>(pods: impl IntoIterator<Item = &'a Pod>) -> Value {
    let endpoint = |pod: &Pod| {
        json!({
            "addresses": [pod.server.address().to_string()], "nodeName": pod.node,
            "conditions": {"ready": true, "serving": true, "terminating": false}
        })
    };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": "web-1", "namespace": NAMESPACE, "labels": {"kubernetes.io/service-name": "web"}
        },
        "addressType": "IPv4", "endpoints": pods.into_iter().map(endpoint).collect::<Vec<_>>(),
        "ports": [
            {"name": "http", "protocol": "TCP", "port": HTTP_PORT},
            {"name": "echo", "protocol": "UDP", "port": UDP_PORT}
        ]
    })
}
