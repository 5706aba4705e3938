//! Networks that are not one plain uplink: answers that leave by another, overlays, VLANs, strict filters.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::rule::RuleAction;
use xdp_agent_tests::lab::agent::{Agent, AgentOptions, Mode};
use xdp_agent_tests::lab::block_on;
use xdp_agent_tests::lab::capture::PacketSocket;
use xdp_agent_tests::lab::clients::HttpConnection;
use xdp_agent_tests::lab::fragments::datagram;
use xdp_agent_tests::lab::link::veth;
use xdp_agent_tests::lab::manifests::{Endpoint, Manifests, Service, node_yaml};
use xdp_agent_tests::lab::netns::{Namespace, PrivateBpffs};
use xdp_agent_tests::lab::packets::Ends;
use xdp_agent_tests::lab::pass::PassProgram;
use xdp_agent_tests::lab::servers::{HTTP_PORT, Server, UDP_PORT, pattern_of};

use crate::setup::{Setup, says};

const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const NODE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The second link between them.
const CLIENT_TOO: Ipv4Addr = Ipv4Addr::new(198, 51, 101, 2);
const NODE_TOO: Ipv4Addr = Ipv4Addr::new(198, 51, 101, 1);
const NODE_INSIDE: Ipv4Addr = Ipv4Addr::new(192, 168, 70, 1);
const BACKENDS: Ipv4Addr = Ipv4Addr::new(192, 168, 70, 2);
const NODE_OVERLAY: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 1);
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const SERVICE_UDP: u16 = 5_000;
/// A routing table of the case's own.
const TABLE: u32 = 100;
/// Connections after which a backend that was never chosen is not in the ring.
const TRIES_MAX: usize = 60;
const LIMIT: Duration = Duration::from_secs(20);

/// A client with two links to the node, and backends behind it.
struct Fork {
    client: Namespace,
    node: Namespace,
    backend: Namespace,
    manifests: Manifests,
    bpffs: PrivateBpffs,
    servers: Vec<Server>,
    _peers: [PassProgram; 3],
}

impl Fork {
    fn build(tx_offload: bool) -> Result<Self> {
        let [client, node, backend] = ["fork-client", "fork-node", "fork-backend"].map(Namespace::new);
        let (client, node, backend) = (client?, node?, backend?);
        veth(&client, "eth0", &node, "out0")?;
        veth(&client, "eth1", &node, "out1")?;
        veth(&backend, "eth0", &node, "in0")?;
        for (namespace, device, address) in [
            (&client, "eth0", CLIENT),
            (&client, "eth1", CLIENT_TOO),
            (&node, "out0", NODE),
            (&node, "out1", NODE_TOO),
            (&node, "in0", NODE_INSIDE),
            (&backend, "eth0", BACKENDS),
        ] {
            namespace.address(device, address, 24)?;
            namespace.tx_offload(device, tx_offload)?;
        }
        node.sysctl("net/ipv4/ip_forward", "1")?;
        // Answers come by the other link.
        filter(&client, &["eth0", "eth1"], "0")?;
        client.route_via(Ipv4Addr::UNSPECIFIED, 0, NODE)?;
        backend.route_via(Ipv4Addr::UNSPECIFIED, 0, NODE_INSIDE)?;
        let peers = [
            PassProgram::attach(&client, "eth0")?,
            PassProgram::attach(&client, "eth1")?,
            PassProgram::attach(&backend, "eth0")?,
        ];
        let (manifests, bpffs) = (Manifests::new()?, PrivateBpffs::new()?);
        Ok(Self { client, node, backend, manifests, bpffs, servers: Vec::new(), _peers: peers })
    }

    /// Starts a server on an address of the backends' device, and says whether it is on this node.
    fn serve(&mut self, device: &str, address: Ipv4Addr, is_here: bool) -> Result<Endpoint> {
        if address != BACKENDS {
            self.backend.address(device, address, 24)?;
        }
        let name = if is_here { "local" } else { "remote" };
        self.servers.push(Server::start(&self.backend, name, address)?);
        Ok(Endpoint::new(address, if is_here { "node" } else { "other" }))
    }

    /// A backend elsewhere and one on this node.
    fn serve_both(&mut self) -> Result<()> {
        let elsewhere = self.serve("eth0", BACKENDS, false)?;
        let here = self.serve("eth0", Ipv4Addr::new(192, 168, 70, 3), true)?;
        self.publish(&[elsewhere, here])
    }

    fn publish(&self, endpoints: &[Endpoint]) -> Result<()> {
        let service = Service::new("web", SERVICE).port("http", "TCP", 80, HTTP_PORT, 30_080).port(
            "echo",
            "UDP",
            SERVICE_UDP,
            UDP_PORT,
            30_500,
        );
        self.manifests.write("nodes.yaml", &[node_yaml("node", NODE, "10.244.1.0/24")])?;
        self.manifests.write("web.yaml", &[service.yaml(), service.slice_yaml(endpoints)])
    }

    fn start(&self, interfaces: &[&str], mode: Mode) -> Result<Agent> {
        let mut options = AgentOptions::new(self.manifests.directory(), mode);
        options.interfaces = interfaces.iter().map(|&name| name.to_owned()).collect();
        Agent::start(&self.node, &self.bpffs, &options)
    }

    /// Reaches these backends by connections of several segments in both directions.
    fn reaches(&self, names: &[&str]) -> Result<()> {
        let mut met = BTreeSet::new();
        for _ in 0..TRIES_MAX {
            let mut connection = block_on(HttpConnection::open(&self.client, (SERVICE, 80)))?;
            met.insert(block_on(connection.bytes(1 << 17, LIMIT))?);
            if names.iter().all(|&name| met.contains(name)) {
                return Ok(());
            }
        }
        ensure!(names.iter().all(|&name| met.contains(name)), "{TRIES_MAX} connections met {met:?} only");
        Ok(())
    }

    /// Frames of the client that have come in by its second link.
    fn answers_by_the_second_link(&self, before: u64) -> Result<()> {
        let now = received(&self.client, "eth1")?;
        ensure!(now > before + 100, "{} frames came by the second link", now - before);
        Ok(())
    }
}

fn filter(namespace: &Namespace, devices: &[&str], value: &str) -> Result<()> {
    ["all"]
        .iter()
        .chain(devices)
        .try_for_each(|device| namespace.sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), value))
}

/// Frames that a device has received.
fn received(namespace: &Namespace, device: &str) -> Result<u64> {
    let path = "/proc/net/dev";
    // Of the thread that reads, which is in the namespace then.
    let table = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).context(path)?;
    let line = table.lines().find_map(|line| line.trim().strip_prefix(&format!("{device}:")[..]));
    let packets = line.and_then(|line| line.split_whitespace().nth(1)).context("no such device")?;
    Ok(packets.parse()?)
}

each_mode_and_offload!(answers_take_another_uplink_where_the_routes_say_so);
fn answers_take_another_uplink_where_the_routes_say_so(setup: Setup) -> Result<()> {
    let mut fork = Fork::build(setup.tx_offload)?;
    fork.serve_both()?;
    filter(&fork.node, &["out0", "out1"], "2")?;
    fork.node.route_via(CLIENT, 32, CLIENT_TOO)?;
    let before = received(&fork.client, "eth1")?;
    let agent = fork.start(&["out0", "out1", "in0"], setup.mode)?;
    fork.reaches(&["local", "remote"])?;
    fork.answers_by_the_second_link(before)?;
    agent.stop()
}

each_mode!(answers_take_another_uplink_where_a_routing_policy_says_so);
fn answers_take_another_uplink_where_a_routing_policy_says_so(setup: Setup) -> Result<()> {
    let mut fork = Fork::build(setup.tx_offload)?;
    fork.serve_both()?;
    filter(&fork.node, &["out0", "out1"], "2")?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(CLIENT_TOO).table_id(TABLE).build();
    block_on(fork.node.netlink().route().add(route).execute()).context("a route in a table of its own")?;
    // By source: what comes from the backends' network.
    let rules = fork.node.netlink().rule();
    let rule = rules.add().v4().source_prefix(Ipv4Addr::new(192, 168, 70, 0), 24);
    let rule = rule.destination_prefix(CLIENT, 32).table_id(TABLE).action(RuleAction::ToTable);
    block_on(rule.execute()).context("a rule of the routing policy")?;
    let before = received(&fork.client, "eth1")?;
    let agent = fork.start(&["out0", "out1", "in0"], setup.mode)?;
    fork.reaches(&["local", "remote"])?;
    fork.answers_by_the_second_link(before)?;
    agent.stop()
}

each_mode_and_offload!(a_strict_filter_lets_services_pass_where_ways_are_symmetric);
fn a_strict_filter_lets_services_pass_where_ways_are_symmetric(setup: Setup) -> Result<()> {
    let mut fork = Fork::build(setup.tx_offload)?;
    fork.serve_both()?;
    filter(&fork.node, &["out0", "out1", "in0"], "1")?;
    let agent = fork.start(&["out0", "out1", "in0"], setup.mode)?;
    fork.reaches(&["local", "remote"])?;
    // Said at the start, with what to change where they are not.
    says(&agent.log(), &["rp_filter of out0 is strict", "sysctl net.ipv4.conf.out0.rp_filter=2"])?;
    agent.stop()
}

/// Backends that are reached through a VXLAN device, which the agent manages too.
fn through_an_overlay(mode: Mode) -> Result<()> {
    let mut fork = Fork::build(true)?;
    fork.node.vxlan("vx0", "in0", BACKENDS)?;
    fork.backend.vxlan("vx0", "eth0", NODE_INSIDE)?;
    for namespace in [&fork.node, &fork.backend] {
        namespace.mtu("vx0", 1_450)?;
    }
    fork.node.address("vx0", NODE_OVERLAY, 24)?;
    let pods = [
        fork.serve("vx0", Ipv4Addr::new(10, 244, 2, 2), false)?,
        fork.serve("vx0", Ipv4Addr::new(10, 244, 2, 3), false)?,
    ];
    fork.publish(&pods)?;
    let agent = fork.start(&["out0", "vx0"], mode)?;
    for _ in 0..5 {
        fork.reaches(&["remote"])?;
    }
    let mut peers = fork.servers.iter().flat_map(|server| server.http_served());
    ensure!(
        peers.all(|served| served.peer.ip() == IpAddr::V4(NODE_OVERLAY)),
        "the overlay's own address is the source"
    );
    // Into the tunnel the kernel has to put them.
    ensure!(agent.metric("xdp_agent_events_total", "event=\"slow_path\"")? > 0.0);
    agent.stop()
}

#[test]
fn pods_behind_vxlan_are_reached_in_the_mode_that_each_device_takes() -> Result<()> {
    through_an_overlay(Mode::Auto)
}

#[test]
fn pods_behind_vxlan_are_reached_in_generic_mode() -> Result<()> {
    through_an_overlay(Mode::Generic)
}

each_mode!(what_a_vlan_carries_is_left_to_the_device_of_the_vlan);
fn what_a_vlan_carries_is_left_to_the_device_of_the_vlan(setup: Setup) -> Result<()> {
    let mut fork = Fork::build(setup.tx_offload)?;
    fork.serve_both()?;
    let agent = fork.start(&["out0", "in0"], setup.mode)?;
    let wire = PacketSocket::open(&fork.client, "eth0")?;
    let macs = (fork.client.mac("eth0")?, fork.node.mac("out0")?);
    let (from, to) = (SocketAddr::from((CLIENT, 40_000)), SocketAddr::from((SERVICE, SERVICE_UDP)));
    let ends = Ends { mac: macs, ip: (CLIENT, SERVICE) };
    let whole = ends.udp((40_000, SERVICE_UDP), b"hello");
    let mut unfinished = whole.clone();
    unfinished[40..42].copy_from_slice(&pseudo_header(&whole).to_be_bytes());
    let mut frames = datagram(macs, (from, to), 7, &pattern_of(2_000), 720)?;
    frames.extend([whole, unfinished]);
    let tags: [&[u8]; 2] = [&[0x81, 0, 0, 5], &[0x88, 0xa8, 0, 9, 0x81, 0, 0, 5]];
    for tag in tags {
        for frame in frames.iter().rev() {
            let mut tagged = frame.clone();
            tagged.splice(12..12, tag.iter().copied());
            wire.send(&tagged)?;
        }
    }
    // What is not tagged is served behind them, so they have been seen by then.
    fork.reaches(&["local", "remote"])?;
    ensure!(
        fork.servers.iter().all(|server| server.udp_served().is_empty()),
        "a tagged datagram was delivered"
    );
    for event in ["fragment", "fragment_held", "fragment_lost"] {
        let count = agent.metric("xdp_agent_events_total", &format!("event=\"{event}\""))?;
        ensure!(count == 0.0, "{count} of {event}");
    }
    agent.stop()
}

each_mode!(a_tag_that_gives_a_priority_alone_is_no_vlan);
fn a_tag_that_gives_a_priority_alone_is_no_vlan(setup: Setup) -> Result<()> {
    let mut fork = Fork::build(setup.tx_offload)?;
    fork.serve_both()?;
    let agent = fork.start(&["out0", "in0"], setup.mode)?;
    let wire = PacketSocket::open(&fork.client, "eth0")?;
    let ends = Ends { mac: (fork.client.mac("eth0")?, fork.node.mac("out0")?), ip: (CLIENT, SERVICE) };
    // Enough of them to meet both backends.
    for port in 40_000..40_020 {
        let socket = fork.client.run(|| UdpSocket::bind((CLIENT, port)))?;
        socket.set_read_timeout(Some(LIMIT))?;
        for priority in [0, 3 << 5] {
            let mut frame = ends.udp((port, SERVICE_UDP), b"hello");
            frame.splice(12..12, [0x81, 0, priority, 0]);
            wire.send(&frame)?;
            socket.recv(&mut [0; 64]).with_context(|| format!("priority {priority}, port {port}"))?;
        }
    }
    agent.stop()
}

each_mode!(an_error_with_a_tag_that_gives_a_priority_alone_reaches_the_client);
fn an_error_with_a_tag_that_gives_a_priority_alone_reaches_the_client(setup: Setup) -> Result<()> {
    let mut fork = Fork::build(setup.tx_offload)?;
    let elsewhere = fork.serve("eth0", BACKENDS, false)?;
    fork.publish(&[elsewhere])?;
    let agent = fork.start(&["out0", "in0"], setup.mode)?;
    let wire = PacketSocket::open(&fork.backend, "eth0")?;
    let socket = fork.client.run(|| UdpSocket::bind((CLIENT, 40_000)))?;
    socket.set_read_timeout(Some(LIMIT))?;
    socket.connect((SERVICE, SERVICE_UDP))?;
    socket.send(b"hello")?;
    socket.recv(&mut [0; 64]).context("the backend's answer")?;
    let is_ours =
        |frame: &[u8]| frame[12..14] == [8, 0] && frame[23] == 17 && frame[30..34] == BACKENDS.octets();
    let mut captured = std::iter::from_fn(|| wire.receive());
    let met = captured.find(|captured| is_ours(&captured.frame)).context("what the backend has met")?;
    let macs = (fork.backend.mac("eth0")?, fork.node.mac("in0")?);
    let mut error = Ends { mac: macs, ip: (BACKENDS, NODE_INSIDE) }.port_unreachable(&met.frame[14..14 + 28]);
    error.splice(12..12, [0x81, 0, 0, 0]);
    wire.send(&error)?;
    let failed = socket.recv(&mut [0; 64]).err().context("an answer to nothing")?;
    ensure!(failed.kind() == std::io::ErrorKind::ConnectionRefused, "{failed}");
    agent.stop()
}

/// The sum of the pseudo-header of a UDP frame, as a sender leaves it to its device.
fn pseudo_header(frame: &[u8]) -> u16 {
    let words = frame[26..34].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let length = u32::from(u16::from_be_bytes([frame[38], frame[39]]));
    let sum = words.sum::<u32>() + 17 + length;
    ((sum & 0xffff) + (sum >> 16)) as u16
}
