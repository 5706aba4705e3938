//! The entries of kube-proxy's conntrack clean-up: flows that were there before the endpoints changed.
//!
//! kube-proxy walks the kernel's table and deletes what must not go on. Here nothing is deleted: the next packet of such
//! a flow finds its backend gone, and is placed anew. What counts is where that packet goes.

use serde::Deserialize;
use serde_json::json;
use xdp_common::{
    decide::{Hook, ingress},
    frame::tcp,
    net::{FlowKey, TCP, V4},
    verdict::{Action, Reason},
};

use super::{super::decision::packet, *};
use crate::cluster::{DetectLocal, Forwarding, NodePortAddresses, Options, wanted::Protocol};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CleanUp {
    service: Value,
    endpoints: Vec<Address>,
    entries: Vec<Entry>,
}

#[derive(Deserialize)]
struct Address {
    ip: String,
    port: u16,
    serving: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    proto: String,
    #[serde(rename = "origDstIP")]
    orig_dst_ip: Option<String>,
    orig_dst_port: u16,
    #[serde(rename = "replySrcIP")]
    reply_src_ip: String,
    reply_src_port: u16,
    expect: String,
}

/// Where a packet goes.
#[derive(Debug, PartialEq)]
enum Way {
    To(String),
    Untouched,
    Refused(Reason),
}

const NODE: &str = "192.168.0.2";
/// A port that is not of the Service that changes: it is the neighbour's.
const NEIGHBOURS_PORT: u16 = 3000;

#[test]
fn every_entry_of_the_clean_up_table_goes_where_it_must() {
    let mut tables: Value = serde_json::from_str(TABLES).expect("JSON");
    let table: CleanUp = serde_json::from_value(tables["conntrack_cleanup"].take()).expect("the table");
    assert_eq!(table.entries.len(), 72);
    let (mut kept, mut moved, mut never_translated) = (0, 0, 0);
    for entry in &table.entries {
        if entry.reply_src_port == 0 {
            assert_eq!(after_an_untouched_flow(&table, entry), untouched_expected(&table, entry));
            never_translated += 1;
            continue;
        }
        let backend = format!("{}:{}", entry.reply_src_ip, entry.reply_src_port);
        let expected = match entry.expect.as_str() {
            "keep" => backend.clone(),
            "delete" => serving(&table),
            other => panic!("unknown expectation {other}"),
        };
        if expected == backend {
            kept += 1
        } else {
            moved += 1
        }
        let Entry { proto, orig_dst_ip, orig_dst_port, .. } = entry;
        let found = after_the_change(&table, entry);
        assert_eq!(found, Way::To(expected), "{proto} {orig_dst_ip:?}:{orig_dst_port} from {backend}");
    }
    assert_eq!((kept, moved, never_translated), (55, 11, 6));
}

#[test]
fn udp_leaves_a_service_that_has_lost_its_last_endpoint_or_is_gone() {
    let spec = json!({"clusterIP": "172.30.1.1", "ports": [{"name": "dns", "protocol": "UDP", "port": 53}]});
    let there =
        [service(&object("dns", &spec)), slice(&endpoints("dns", &["dns"], &[("10.240.0.4", 53, true)]))];
    let asked = key("172.30.1.1", 53, Protocol::Udp);
    let without_endpoints = vec![removal(&there[1])];
    let without_service = there.iter().map(removal).collect();
    let cases: [(Vec<Change>, Way); 2] =
        [(without_endpoints, Way::Refused(Reason::NoEndpoint)), (without_service, Way::Untouched)];
    for (gone, expected) in cases {
        let mut world = world();
        world.apply(there.clone());
        establish(&world, asked, "10.240.0.4:53");
        world.apply(gone);
        assert_eq!(way(&world, asked, 0), expected);
    }
}

/// The way of a flow's next packet: it was established toward the entry's endpoint, and then the table's state came.
fn after_the_change(table: &CleanUp, entry: &Entry) -> Way {
    let mut world = world();
    let ports = ports(table);
    let before = [(entry.reply_src_ip.as_str(), entry.reply_src_port, true)];
    // The neighbour has endpoints at the same addresses, and another port at the same address of its own.
    world.apply([
        service(&object("changes", &spec(table))),
        slice(&endpoints("changes", &ports, &before)),
        service(&object("neighbour", &neighbour(table))),
        slice(&endpoints("neighbour", &ports, &before)),
    ]);
    let to = entry.orig_dst_ip.as_deref().unwrap_or(NODE);
    let key = key(to, entry.orig_dst_port, protocol(entry));
    establish(&world, key, &format!("{}:{}", entry.reply_src_ip, entry.reply_src_port));
    let now: Vec<_> = table.endpoints.iter().map(|at| (at.ip.as_str(), at.port, at.serving)).collect();
    world.apply([slice(&endpoints("changes", &ports, &now))]);
    way(&world, key, if key.proto == TCP { tcp::ACK } else { 0 })
}

/// The way of the next packet of a flow that began before there were any Services.
fn after_an_untouched_flow(table: &CleanUp, entry: &Entry) -> Way {
    let mut world = world();
    let to = entry.orig_dst_ip.as_deref().expect("an address");
    let key = key(to, entry.orig_dst_port, protocol(entry));
    assert_eq!(way(&world, key, 0), Way::Untouched);
    let now: Vec<_> = table.endpoints.iter().map(|at| (at.ip.as_str(), at.port, at.serving)).collect();
    world.apply([
        service(&object("changes", &spec(table))),
        slice(&endpoints("changes", &ports(table), &now)),
    ]);
    way(&world, key, 0)
}

/// Deliberately different: such a flow leaves no trace here, so that its next packet is the first; another port of a
/// ClusterIP is refused, where the kernel's table would let it go on to nowhere.
fn untouched_expected(table: &CleanUp, entry: &Entry) -> Way {
    let is_cluster_ip = entry.orig_dst_ip.as_deref() == table.service["clusterIP"].as_str();
    match entry.expect.as_str() {
        "delete" => Way::To(serving(table)),
        "keep" if is_cluster_ip => Way::Refused(Reason::UnknownPort),
        "keep" => Way::Untouched,
        other => panic!("unknown expectation {other}"),
    }
}

/// Lets a client and a backend talk until their flow cannot be told from any other established one.
fn establish(world: &World, key: FlowKey<[u8; 4]>, backend: &str) {
    let is_tcp = key.proto == TCP;
    let flags = |flags| if is_tcp { flags } else { 0 };
    assert_eq!(way(world, key, flags(tcp::SYN)), Way::To(backend.to_owned()));
    let sent = ingress::<V4, _>(&world.v4.maps, &packet(key, flags(tcp::SYN)), Hook::Xdp).rewrite;
    let reply = FlowKey { src: sent.dst, dst: sent.src, sport: sent.dport, dport: sent.sport, ..key };
    let back =
        ingress::<V4, _>(&world.v4.maps, &packet(reply, flags(tcp::SYN | tcp::ACK)), Hook::Xdp).rewrite;
    assert_eq!((back.src, back.sport, back.dst, back.dport), (key.dst, key.dport, key.src, key.sport));
    for _ in 0..2 {
        assert_eq!(way(world, key, flags(tcp::ACK)), Way::To(backend.to_owned()));
    }
}

fn way(world: &World, key: FlowKey<[u8; 4]>, tcp_flags: u8) -> Way {
    let verdict = ingress::<V4, _>(&world.v4.maps, &packet(key, tcp_flags), Hook::Xdp);
    match verdict.action {
        Action::Pass => Way::Untouched,
        Action::Reject(reason) => Way::Refused(reason),
        Action::Drop(reason) => panic!("dropped: {}", reason.text()),
        Action::Tunnel => panic!("nothing is direct here"),
        Action::Stack | Action::Transmit | Action::Redirect => {
            let (ip, port) = (IpAddr::from(verdict.rewrite.dst), u16::from_be_bytes(verdict.rewrite.dport));
            Way::To(format!("{ip}:{port}"))
        }
    }
}

fn world() -> World {
    let options = Options {
        node: "here".to_owned(),
        detect_local: DetectLocal::None,
        // So that replies come back through this node, whatever they answer.
        masquerade_all: true,
        nodeport_addresses: NodePortAddresses::Primary,
        service_cidrs: Vec::new(),
        node_ips: vec![NODE.parse().expect("an address")],
        zone: None,
        forwarding: Forwarding::Snat,
    };
    World::new(options)
}

fn key(to: &str, port: u16, protocol: Protocol) -> FlowKey<[u8; 4]> {
    let from = "203.0.113.2:1234".parse().expect("a source");
    let to = format!("{to}:{port}").parse().expect("a destination");
    match Question::new(from, to, protocol).expect("one family") {
        Question::V4(key) => key,
        Question::V6(_) => unreachable!("both are IPv4"),
    }
}

fn protocol(entry: &Entry) -> Protocol {
    match entry.proto.as_str() {
        "TCP" => Protocol::Tcp,
        "UDP" => Protocol::Udp,
        "SCTP" => Protocol::Sctp,
        other => panic!("unknown protocol {other}"),
    }
}

/// The one endpoint of the new state that serves.
fn serving(table: &CleanUp) -> String {
    let serving: Vec<_> = table.endpoints.iter().filter(|at| at.serving).collect();
    let [at] = serving.as_slice() else { panic!("one endpoint serves") };
    format!("{}:{}", at.ip, at.port)
}

fn ports(table: &CleanUp) -> Vec<&str> {
    table.service["ports"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|port| port["name"].as_str().expect("a name"))
        .collect()
}

/// The Service of the table, which has its ports; that for TCP has the same NodePort here as the others have.
fn spec(table: &CleanUp) -> Value {
    let mut spec = json!({
        "type": "LoadBalancer",
        "clusterIP": table.service["clusterIP"],
        "externalIPs": table.service["externalIPs"],
        "ports": table.service["ports"],
        "loadBalancer": table.service["loadBalancerIP"],
    });
    for port in spec["ports"].as_array_mut().expect("a list") {
        port["nodePort"] = json!(32000);
    }
    spec
}

/// The same addresses with another port.
fn neighbour(table: &CleanUp) -> Value {
    let mut spec = spec(table);
    for port in spec["ports"].as_array_mut().expect("a list") {
        port["port"] = json!(NEIGHBOURS_PORT);
        port["nodePort"] = json!(0);
    }
    spec
}

fn object(name: &str, spec: &Value) -> Value {
    json!({
        "metadata": {"namespace": "ns", "name": name},
        "spec": spec,
        "status": {"loadBalancer": {"ingress": [{"ip": spec["loadBalancer"]}]}},
    })
}

fn endpoints(service: &str, ports: &[&str], at: &[(&str, u16, bool)]) -> Value {
    // One slice has one set of ports; where they differ, the tables would need two.
    let number = at[0].1;
    assert!(at.iter().all(|(_, port, _)| *port == number));
    let ports: Vec<_> = ports
        .iter()
        .map(|name| {
            let protocol = name.rsplit('-').next().filter(|protocol| *protocol != "dns").unwrap_or("udp");
            json!({"name": name, "protocol": protocol.to_uppercase(), "port": number})
        })
        .collect();
    let endpoints: Vec<_> = at
        .iter()
        .map(|(ip, _, serving)| {
            json!({"addresses": [ip], "nodeName": "elsewhere", "conditions": {"ready": serving, "serving": serving}})
        })
        .collect();
    json!({
        "metadata": {"namespace": "ns", "name": service, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": ports,
        "endpoints": endpoints,
    })
}
