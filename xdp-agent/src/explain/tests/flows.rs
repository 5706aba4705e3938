//! The packet-flow tables of kube-proxy's own unit tests, all of them, through the decision that the kernel runs.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::*;
use crate::cluster::{
    DetectLocal, Forwarding, NodePortAddresses, Options,
    address::{parse_cidr_sloppy, parse_ip_sloppy},
};

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
    node_name: String,
    #[serde(rename = "nodeIPs")]
    node_ips: Vec<String>,
    #[serde(rename = "localPodCIDRs")]
    local_pod_cidrs: Vec<String>,
    masquerade_all: bool,
    node_port_addresses: Vec<String>,
    /// Only kube-proxy's nftables mode has them.
    #[serde(rename = "serviceCIDRs", default)]
    service_cidrs: Vec<String>,
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
    masquerade: Option<bool>,
}

/// A self-test of the upstream tracer whose rules are written by hand: there are no objects to serve.
const WITHOUT_OBJECTS: (&str, usize) = ("nftables/TestTracePacketV6", 3);

/// Flows of kube-proxy's iptables mode that its nftables mode, which is followed here, treats otherwise.
const IPTABLES_ONLY: [(&str, &str, Verdict); 15] = [
    // Other ports of a ClusterIP are refused, where iptables lets them go on to nowhere.
    ("iptables/TestClusterIPGeneral", "TCP-only port does not match UDP traffic", Verdict::Reject),
    ("iptables/TestClusterIPGeneral", "svc1 does not accept svc2's ports", Verdict::Reject),
    // NodePorts are not served on loopback addresses.
    (
        "iptables/TestNodePorts/ipv4,_localhost-nodeports_enabled",
        "localhost to nodePort gets masqueraded",
        Verdict::Pass,
    ),
    ("iptables/TestInternalExternalMasquerade/base", "localhost to NodePort", Verdict::Pass),
    ("iptables/TestInternalExternalMasquerade/base", "localhost to NodePort with eTP:Local", Verdict::Pass),
    ("iptables/TestInternalExternalMasquerade/base", "localhost to NodePort with iTP:Local", Verdict::Pass),
    (
        "iptables/TestInternalExternalMasquerade/no_LocalTrafficDetector",
        "localhost to NodePort",
        Verdict::Pass,
    ),
    (
        "iptables/TestInternalExternalMasquerade/no_LocalTrafficDetector",
        "localhost to NodePort with eTP:Local",
        Verdict::Pass,
    ),
    (
        "iptables/TestInternalExternalMasquerade/no_LocalTrafficDetector",
        "localhost to NodePort with iTP:Local",
        Verdict::Pass,
    ),
    ("iptables/TestInternalExternalMasquerade/masqueradeAll", "localhost to NodePort", Verdict::Pass),
    (
        "iptables/TestInternalExternalMasquerade/masqueradeAll",
        "localhost to NodePort with eTP:Local",
        Verdict::Pass,
    ),
    (
        "iptables/TestInternalExternalMasquerade/masqueradeAll",
        "localhost to NodePort with iTP:Local",
        Verdict::Pass,
    ),
    (
        "iptables/TestInternalExternalMasquerade/masqueradeAll,_no_LocalTrafficDetector",
        "localhost to NodePort",
        Verdict::Pass,
    ),
    (
        "iptables/TestInternalExternalMasquerade/masqueradeAll,_no_LocalTrafficDetector",
        "localhost to NodePort with eTP:Local",
        Verdict::Pass,
    ),
    (
        "iptables/TestInternalExternalMasquerade/masqueradeAll,_no_LocalTrafficDetector",
        "localhost to NodePort with iTP:Local",
        Verdict::Pass,
    ),
];

#[test]
fn every_flow_of_the_tables_meets_what_kube_proxy_gives_it() {
    let mut tables: Value = serde_json::from_str(TABLES).expect("JSON");
    let cases: Vec<Case> = serde_json::from_value(tables["tests"].take()).expect("the tables");
    let (mut wrong, mut seen) = (Vec::new(), BTreeMap::<&str, usize>::new());
    let mut exceptions: BTreeSet<(&str, &str)> = BTreeSet::new();
    assert_eq!(cases.len(), 57);
    for case in &cases {
        let mut world = World::new(options(&case.config));
        let mut there: Vec<Change> = Vec::new();
        for (number, step) in case.steps.iter().enumerate() {
            let now: Vec<Change> =
                step.services.iter().map(service).chain(step.endpoint_slices.iter().map(slice)).collect();
            let is_gone = |change: &&Change| !now.iter().any(|other| removal(other) == removal(change));
            let gone: Vec<Change> = there.iter().filter(is_gone).map(removal).collect();
            world.apply(gone.into_iter().chain(now.iter().cloned()));
            there = now;
            assert_eq!(world.problems(), [], "{}", case.id);
            if (case.id.as_str(), step.flows.len()) == WITHOUT_OBJECTS {
                assert!(step.services.is_empty());
                *seen.entry("without objects").or_default() += step.flows.len();
                continue;
            }
            for flow in &step.flows {
                let exception =
                    IPTABLES_ONLY.iter().find(|(id, name, _)| *id == case.id && *name == flow.name);
                let (expected, what) = match exception {
                    Some((id, name, verdict)) => {
                        assert!(exceptions.insert((id, name)), "{id} {name} twice");
                        (bare(&case.config, flow, *verdict), "iptables only")
                    }
                    None => expected(&case.config, step, flow),
                };
                *seen.entry(what).or_default() += 1;
                let found = found(&world, flow);
                if found != expected {
                    let Flow { name, source_ip, protocol, dest_ip, dest_port, .. } = flow;
                    wrong.push(format!(
                        "{} step {number}: {name}: {source_ip} to {dest_ip}:{dest_port}/{protocol}\n   found {found:?}\nexpected {expected:?}",
                        case.id
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} of 464 flows:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(exceptions.len(), IPTABLES_ONLY.len());
    let expected = [
        ("ACCEPT", 2),
        ("DNAT", 351),
        ("DROP", 16),
        ("NONE", 13),
        ("REJECT", 64),
        ("iptables only", 15),
        ("without objects", 3),
    ];
    assert_eq!(seen, BTreeMap::from(expected));
}

/// What can be compared of an answer.
#[derive(Debug, PartialEq)]
struct Met {
    verdict: Verdict,
    source: Source,
    endpoints: Vec<Endpoint>,
    /// Whether the answer names a frontend and a Service, which it does where it is somebody's.
    is_named: bool,
    is_health_check: bool,
    has_reason: bool,
}

fn found(world: &World, flow: &Flow) -> Met {
    let proto = flow.protocol.to_lowercase();
    let at = if flow.dest_ip.contains(':') { format!("[{}]", flow.dest_ip) } else { flow.dest_ip.clone() };
    let line = serde_json::json!({
        "from": flow.source_ip, "to": format!("{at}:{}", flow.dest_port), "proto": proto,
    });
    let answer = world.ask(&Question::from_json(&line.to_string()).expect("a question"));
    assert_eq!(answer.frontend.is_some(), answer.service.is_some());
    Met {
        verdict: answer.verdict,
        source: answer.source,
        is_named: answer.service.is_some(),
        is_health_check: answer.frontend == Some(Frontend::HealthCheckNodePort),
        endpoints: answer.endpoints,
        has_reason: answer.reason.is_some(),
    }
}

fn expected(config: &Config, step: &Step, flow: &Flow) -> (Met, &'static str) {
    let expect = &flow.expect;
    match expect.verdict.as_str() {
        "NONE" => (bare(config, flow, Verdict::Pass), "NONE"),
        "ACCEPT" => {
            (Met { is_named: true, is_health_check: true, ..bare(config, flow, Verdict::Pass) }, "ACCEPT")
        }
        "REJECT" => {
            (Met { is_named: is_claimed(step, flow), ..bare(config, flow, Verdict::Reject) }, "REJECT")
        }
        "DROP" => (Met { is_named: is_claimed(step, flow), ..bare(config, flow, Verdict::Drop) }, "DROP"),
        "DNAT" => {
            let masquerade = expect.masquerade.expect("said for what is forwarded");
            let mut endpoints: Vec<Endpoint> = expect
                .endpoints
                .iter()
                .map(|address| endpoint(config, step, flow, address, masquerade))
                .collect();
            endpoints.sort_by(|a, b| a.address.cmp(&b.address));
            (
                Met { is_named: true, endpoints, has_reason: false, ..bare(config, flow, Verdict::Forward) },
                "DNAT",
            )
        }
        other => panic!("unknown verdict {other}"),
    }
}

/// An endpoint as it must be answered. On this node the client's address survives where kube-proxy masquerades, because
/// replies are restored on their way out; only an endpoint that reaches itself must not see its own address.
fn endpoint(config: &Config, step: &Step, flow: &Flow, address: &str, masquerade: bool) -> Endpoint {
    let (ip, _) = address.rsplit_once(':').expect("an address and a port");
    let ip = ip.trim_matches(['[', ']']);
    let endpoints =
        step.endpoint_slices.iter().flat_map(|slice| slice["endpoints"].as_array().expect("a list"));
    let own = endpoints.filter(|endpoint| endpoint["nodeName"] == config.node_name.as_str());
    let local = own.into_iter().any(|endpoint| endpoint["addresses"][0] == ip);
    let is_itself = parse_ip_sloppy(&flow.source_ip) == parse_ip_sloppy(ip);
    Endpoint { address: address.to_owned(), local, snat: masquerade && (!local || is_itself) }
}

/// What is nobody's.
fn bare(config: &Config, flow: &Flow, verdict: Verdict) -> Met {
    let ip = parse_ip_sloppy(&flow.source_ip).expect("an address");
    let source = if ip.is_loopback() || addresses(config).contains(&ip) {
        Source::Host
    } else if config.local_pod_cidrs.iter().any(|cidr| is_in(cidr, ip)) {
        Source::Pod
    } else {
        Source::External
    };
    Met { verdict, source, endpoints: Vec::new(), is_named: false, is_health_check: false, has_reason: true }
}

/// Whether any Service port claims the destination; the tables have no address of one Service with a port of another.
fn is_claimed(step: &Step, flow: &Flow) -> bool {
    step.services.iter().any(|service| {
        let holds = |field: &str, number: u16| {
            let ports = service["spec"]["ports"].as_array().expect("a list");
            ports.iter().any(|port| {
                port[field] == number && port["protocol"].as_str().unwrap_or("TCP") == flow.protocol
            })
        };
        let has_address = service.to_string().contains(&format!("\"{}\"", flow.dest_ip));
        (has_address && holds("port", flow.dest_port)) || holds("nodePort", flow.dest_port)
    })
}

fn options(config: &Config) -> Options {
    let cidrs = |texts: &[String]| -> Vec<(IpAddr, u8)> {
        texts.iter().map(|text| parse_cidr_sloppy(text).expect("a network")).collect()
    };
    Options {
        node: config.node_name.clone(),
        detect_local: match config.local_pod_cidrs.as_slice() {
            [] => DetectLocal::None,
            networks => DetectLocal::ClusterCidr(cidrs(networks)),
        },
        masquerade_all: config.masquerade_all,
        nodeport_addresses: NodePortAddresses::Cidrs(cidrs(&config.node_port_addresses)),
        service_cidrs: cidrs(&config.service_cidrs),
        node_ips: addresses(config),
        zone: None,
        forwarding: Forwarding::Snat,
    }
}

fn addresses(config: &Config) -> Vec<IpAddr> {
    config.node_ips.iter().map(|ip| parse_ip_sloppy(ip).expect("an address")).collect()
}

fn is_in(cidr: &str, ip: IpAddr) -> bool {
    let (base, len) = parse_cidr_sloppy(cidr).expect("a network");
    match (base, ip) {
        (IpAddr::V4(base), IpAddr::V4(ip)) => (base.to_bits() ^ ip.to_bits()).leading_zeros() >= len.into(),
        (IpAddr::V6(base), IpAddr::V6(ip)) => (base.to_bits() ^ ip.to_bits()).leading_zeros() >= len.into(),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
    }
}
