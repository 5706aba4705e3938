//! The packet-flow and topology tables of kube-proxy's own unit tests (see `testdata/kubeproxy_flows.json`).

use std::{collections::BTreeSet, net::Ipv4Addr};

use serde::Deserialize;
use serde_json::Value;

use super::{
    endpoints::{Candidate, Hint},
    *,
};

const TABLES: &str = include_str!("testdata/kubeproxy_flows.json");

/// Sources outside the cluster, as the tables' conventions name them.
const EXTERNAL: [&str; 2] = ["203.0.113.2", "203.0.113.130"];

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Case {
    id: String,
    config: Config,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    ip_family: String,
    node_name: String,
    #[serde(rename = "nodeIPs")]
    node_ips: Vec<String>,
    node_port_addresses: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Step {
    services: Vec<Value>,
    endpoint_slices: Vec<Value>,
    flows: Vec<Flow>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Flow {
    name: String,
    #[serde(rename = "sourceIP")]
    source_ip: String,
    protocol: String,
    #[serde(rename = "destIP")]
    dest_ip: String,
    dest_port: u16,
    expect: Expect,
}

#[derive(Deserialize)]
struct Expect {
    verdict: String,
    endpoints: Vec<String>,
}

#[test]
fn flows_from_outside_meet_what_kube_proxy_gives_them() {
    let mut tables: Value = serde_json::from_str(TABLES).unwrap();
    let cases: Vec<Case> = serde_json::from_value(tables["tests"].take()).unwrap();
    let (mut checked, mut closed) = (0, 0);
    for case in cases.iter().filter(|case| case.config.ip_family == "IPv4") {
        for (at, step) in case.steps.iter().enumerate() {
            let objects = objects(step);
            let desired = desired(&objects, &facts(&case.config));
            for flow in step.flows.iter().filter(|flow| EXTERNAL.contains(&flow.source_ip.as_str())) {
                if flow.protocol != "TCP" && flow.protocol != "UDP" {
                    continue;
                }
                let context =
                    format!("{} step {at}: {} to {}:{}", case.id, flow.name, flow.dest_ip, flow.dest_port);
                let found = verdict(&desired, flow);
                if is_guarded(&objects, &flow.dest_ip) {
                    assert_eq!(found.0, "NONE", "{context}: guarded addresses must not be served");
                    closed += 1;
                    continue;
                }
                let expected = match flow.expect.verdict.as_str() {
                    // Nothing of ours: the health-check server answers.
                    "ACCEPT" => "NONE",
                    // kube-proxy's nftables mode also turns away unknown ports and addresses of the Service network.
                    "REJECT" | "DROP" if !is_claimed(&objects, flow) => "NONE",
                    other => other,
                };
                let endpoints: BTreeSet<String> = flow.expect.endpoints.iter().cloned().collect();
                assert_eq!(found, (expected, endpoints), "{context}");
                checked += 1;
            }
        }
    }
    assert_eq!((checked, closed), (140, 9));
}

/// Whether source ranges guard a load-balancer address, which then is not served.
fn is_guarded(objects: &Objects, ip: &str) -> bool {
    objects.services.values().any(|service| {
        let value = serde_json::to_value(service.as_ref()).unwrap();
        let ranges = value.pointer("/spec/loadBalancerSourceRanges").and_then(Value::as_array);
        let ingress = value.pointer("/status/loadBalancer/ingress").and_then(Value::as_array);
        ranges.is_some_and(|ranges| ranges.iter().any(|range| range.as_str().unwrap().contains('.')))
            && ingress.is_some_and(|ingress| ingress.iter().any(|ingress| ingress["ip"] == ip))
    })
}

/// Whether any Service port claims the destination.
fn is_claimed(objects: &Objects, flow: &Flow) -> bool {
    objects.services.values().any(|service| {
        let text = serde_json::to_string(service.as_ref()).unwrap();
        let port = flow.dest_port;
        let exact =
            text.contains(&format!("\"{}\"", flow.dest_ip)) && text.contains(&format!("\"port\":{port}"));
        exact || text.contains(&format!("\"nodePort\":{port}"))
    })
}

fn objects(step: &Step) -> Objects {
    let mut objects = Objects::default();
    for value in &step.services {
        let service: Service = serde_json::from_value(value.clone()).unwrap();
        objects.services.insert(name(&service.metadata), Arc::new(service));
    }
    for value in &step.endpoint_slices {
        let slice: k8s_openapi::api::discovery::v1::EndpointSlice =
            serde_json::from_value(value.clone()).unwrap();
        objects.slices.insert(name(&slice.metadata), Arc::new(slice));
    }
    objects
}

fn name(meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> ObjectName {
    ObjectName { namespace: meta.namespace.clone().unwrap(), name: meta.name.clone().unwrap() }
}

fn facts(config: &Config) -> NodeFacts {
    let ips: Vec<Ipv4Addr> = config.node_ips.iter().filter_map(|ip| ip.parse().ok()).collect();
    let accepted = |ip: &&Ipv4Addr| {
        config.node_port_addresses.iter().any(|network| {
            let (std::net::IpAddr::V4(base), length) = address::parse_cidr_sloppy(network).unwrap() else {
                return false;
            };
            let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
            (u32::from(base) ^ u32::from(**ip)) & mask == 0
        })
    };
    NodeFacts {
        name: config.node_name.clone(),
        addresses: ips.iter().filter(accepted).copied().collect(),
        own: ips.iter().copied().collect(),
    }
}

fn verdict(desired: &Desired, flow: &Flow) -> (&'static str, BTreeSet<String>) {
    let Ok(addr) = flow.dest_ip.parse::<Ipv4Addr>() else { return ("NONE", BTreeSet::new()) };
    for service in &desired.services {
        for frontend in &service.frontends {
            let same = (frontend.addr, frontend.port) == (addr.octets(), flow.dest_port);
            if !same || Protocol::parse(Some(&flow.protocol)) != Some(service.name.protocol) {
                continue;
            }
            let list = match frontend.policy {
                Policy::Cluster => &service.cluster,
                Policy::Local => &service.local,
            };
            let verdict = match (list.is_empty(), service.any_endpoint) {
                (false, _) => "DNAT",
                (true, true) => "DROP",
                (true, false) => "REJECT",
            };
            return (verdict, list.iter().map(text).collect());
        }
    }
    ("NONE", BTreeSet::new())
}

fn text(endpoint: &Endpoint) -> String {
    format!("{}:{}", Ipv4Addr::from(endpoint.addr), endpoint.port)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TopologyCase {
    name: String,
    node: TopologyNode,
    prefer_same_node_enabled: bool,
    endpoints: Vec<TopologyEndpoint>,
    expect: TopologyExpect,
}

#[derive(Deserialize)]
struct TopologyNode {
    name: String,
    labels: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TopologyEndpoint {
    endpoint: String,
    is_local: bool,
    node_hints: Vec<String>,
    zone_hints: Vec<String>,
    ready: bool,
    serving: bool,
    terminating: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TopologyExpect {
    cluster_endpoints: Option<Vec<String>>,
    local_endpoints: Option<Vec<String>>,
    has_any_endpoints: bool,
}

#[test]
fn topology_and_policies_choose_what_kube_proxy_chooses() {
    let mut tables: Value = serde_json::from_str(TABLES).unwrap();
    let cases: Vec<TopologyCase> = serde_json::from_value(tables["categorize_cases"].take()).unwrap();
    assert_eq!(cases.len(), 32);
    for case in cases {
        let candidates: Vec<Candidate> =
            case.endpoints.iter().map(|endpoint| candidate(&case, endpoint)).collect();
        let lists = categorize(&candidates);
        // A list that nobody uses is null in the tables and left out when a service port is built.
        if let Some(expected) = &case.expect.cluster_endpoints {
            assert_eq!(&lists.cluster.iter().map(text).collect::<Vec<_>>(), expected, "{}", case.name);
        }
        if let Some(expected) = &case.expect.local_endpoints {
            assert_eq!(&lists.local.iter().map(text).collect::<Vec<_>>(), expected, "{}", case.name);
        }
        assert_eq!(lists.any, case.expect.has_any_endpoints, "{}", case.name);
    }
}

fn candidate(case: &TopologyCase, endpoint: &TopologyEndpoint) -> Candidate {
    let (ip, port) = endpoint.endpoint.split_once(':').unwrap();
    let zone =
        case.node.labels.as_ref().and_then(|labels| labels.get(LABEL_ZONE)).filter(|zone| !zone.is_empty());
    let hint = |hints: &[String], own: Option<&String>| match own.is_some_and(|own| hints.contains(own)) {
        true => Hint::Here,
        false if hints.is_empty() => Hint::Missing,
        false => Hint::Elsewhere,
    };
    // Without the feature gate node hints are as good as missing; it is always on where this agent runs.
    let node_hints = if case.prefer_same_node_enabled { endpoint.node_hints.as_slice() } else { &[] };
    Candidate {
        endpoint: Endpoint {
            addr: ip.parse::<Ipv4Addr>().unwrap().octets(),
            port: port.parse().unwrap(),
            local: endpoint.is_local,
        },
        ready: endpoint.ready,
        serving: endpoint.serving,
        terminating: endpoint.terminating,
        node_hint: hint(node_hints, Some(&case.node.name)),
        zone_hint: hint(&endpoint.zone_hints, zone),
    }
}
