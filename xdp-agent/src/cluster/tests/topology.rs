//! The table of kube-proxy's own test of `CategorizeEndpoints` (see `testdata/kubeproxy_flows.json`).

use serde::Deserialize;

use super::*;

const TABLES: &str = include_str!("../testdata/kubeproxy_flows.json");

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Case {
    name: String,
    node: CaseNode,
    prefer_same_node_enabled: bool,
    service: CaseService,
    endpoints: Vec<CaseEndpoint>,
    expect: Expect,
}

#[derive(Deserialize)]
struct CaseNode {
    name: String,
    labels: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CaseService {
    externally_accessible: bool,
    external_traffic_policy: String,
    internal_traffic_policy: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CaseEndpoint {
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
struct Expect {
    cluster_endpoints: Option<Vec<String>>,
    local_endpoints: Option<Vec<String>>,
    has_any_endpoints: bool,
}

#[test]
fn topology_and_policies_choose_what_kube_proxy_chooses() {
    let mut tables: Value = serde_json::from_str(TABLES).unwrap();
    let cases: Vec<Case> = serde_json::from_value(tables["categorize_cases"].take()).unwrap();
    assert_eq!(cases.len(), 32);
    for case in cases {
        let mut world = World::new();
        let node = if case.node.name.is_empty() { "here" } else { &*case.node.name };
        world.cluster = Cluster::new(Options { node: node.to_owned(), ..Options::default() });
        let labels = json!({"metadata": {"labels": case.node.labels}});
        let labels = Node::read(&serde_json::from_value(labels).unwrap());
        world.apply(Change::Node(node.to_owned(), Some(Arc::new(labels))));
        let world = world.service(service_spec(&case.service));
        let ports = json!([{"name": "http", "port": 80, "protocol": "TCP"}]);
        let list: Vec<Value> = case.endpoints.iter().map(|endpoint| object(&case, endpoint, node)).collect();
        let world = world.slice("a", json!(list), json!({"ports": ports}));
        let port = world.port();
        // A list that nobody uses is null in the table.
        let expected =
            |list: &Option<Vec<String>>| list.as_ref().map_or(String::new(), |list| list.join(","));
        assert_eq!(
            endpoints(&port.cluster),
            expected(&case.expect.cluster_endpoints),
            "cluster: {}",
            case.name
        );
        assert_eq!(endpoints(&port.local), expected(&case.expect.local_endpoints), "local: {}", case.name);
        assert_eq!(port.any_endpoint, case.expect.has_any_endpoints, "{}", case.name);
    }
}

fn service_spec(service: &CaseService) -> Value {
    let external_ips = if service.externally_accessible { vec!["198.51.100.7"] } else { vec![] };
    json!({
        "externalIPs": external_ips,
        "externalTrafficPolicy": service.external_traffic_policy,
        "internalTrafficPolicy": service.internal_traffic_policy,
    })
}

fn object(case: &Case, endpoint: &CaseEndpoint, node: &str) -> Value {
    let CaseEndpoint { is_local, ready, serving, terminating, .. } = *endpoint;
    let named = |names: &[String]| names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>();
    // Without the feature gate node hints are as good as missing; it is always on where this agent runs.
    let node_hints = if case.prefer_same_node_enabled { named(&endpoint.node_hints) } else { Vec::new() };
    json!({
        "addresses": [endpoint.endpoint.strip_suffix(":80").unwrap()],
        "nodeName": if is_local { node } else { "another" },
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
        "hints": {"forNodes": node_hints, "forZones": named(&endpoint.zone_hints)},
    })
}
