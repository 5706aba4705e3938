//! Direct server return between three nodes: backends see their clients and answer them past the node where they came in,
//! which may change.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use xdp_agent_tests::lab::{
    agent::{Agent, AgentOptions, Mode},
    manifests::Manifests,
    netns::{Namespace, PrivateBpffs},
    pass::PassProgram,
    servers::pattern_of,
    wait_for,
};

use crate::{
    dual::{self, Both, each},
    setup::Setup,
};

const VIP: Both = (Ipv4Addr::new(203, 0, 113, 10), Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 10));
const CLUSTER_IP: Both = (Ipv4Addr::new(10, 96, 0, 10), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10));
const NAMES: [&str; 3] = ["node-a", "node-b", "node-c"];
/// The nodes that have a backend.
const BACKENDS: [usize; 2] = [1, 2];
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long a datagram may be on its way before another is sent.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a transfer may pause; a lost packet is sent again after a second at most.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);
/// What is sent each way in a turn, and how many turns there are.
const TURN: usize = 4 << 20;
const TURNS: usize = 6;
/// Connections after which a backend that was never chosen is not in the ring.
const TRIES_MAX: usize = 60;

/// A client and three nodes around a router; two of the nodes have a pod. Fields drop in order, agents first.
struct Cluster {
    agents: Vec<Option<Agent>>,
    bpffs: Vec<PrivateBpffs>,
    client: Namespace,
    router: Namespace,
    nodes: Vec<Namespace>,
    pods: Vec<Namespace>,
    manifests: Manifests,
    setup: Setup,
    /// The device of each node that all others are behind.
    uplink: &'static str,
    _programs: Vec<PassProgram>,
}

/// The address of a host on a link; hosts there end in 2 and the other side in 1.
fn at(link: u16, host: u16) -> Both {
    let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0x20, link, 0, 0, 0, host);
    (Ipv4Addr::new(10, 20, link as u8, host as u8), v6)
}

/// The link of a node to the router, and that of its pod to it.
const fn link_of(node: usize) -> u16 {
    node as u16 + 1
}
const fn inside(node: usize) -> u16 {
    node as u16 + 11
}
/// That of the client.
const CLIENT_LINK: u16 = 9;

impl Cluster {
    fn build(setup: Setup, forwarding: &str) -> Result<Self> {
        Self::build_with(setup, forwarding, "eth0")
    }

    /// The same with another uplink, a bridge over `eth0`.
    fn build_with(setup: Setup, forwarding: &str, uplink: &'static str) -> Result<Self> {
        let mut cluster = Self {
            agents: vec![None, None, None],
            bpffs: (0..NAMES.len()).map(|_| PrivateBpffs::new()).collect::<Result<_>>()?,
            client: Namespace::new("direct-client")?,
            router: Namespace::new("direct-router")?,
            nodes: NAMES.into_iter().map(Namespace::new).collect::<Result<_>>()?,
            pods: ["pod-b", "pod-c"].into_iter().map(Namespace::new).collect::<Result<_>>()?,
            manifests: Manifests::new()?,
            setup,
            uplink,
            _programs: Vec::new(),
        };
        cluster.link(&cluster.client, &cluster.router, "client", CLIENT_LINK)?;
        for (node, name) in NAMES.iter().enumerate() {
            cluster.link_by(uplink, &cluster.nodes[node], &cluster.router, name, link_of(node))?;
        }
        for (&node, pod) in BACKENDS.iter().zip(&cluster.pods) {
            cluster.link(pod, &cluster.nodes[node], "pod", inside(node))?;
            serve(pod, node as u8)?;
            let (pods_v4, pods_v6) = at(inside(node), 0);
            let (v4, v6) = at(link_of(node), 2);
            cluster.router.route_via(pods_v4, 24, v4)?;
            cluster.router.route_via_v6(pods_v6, 64, v6)?;
        }
        for namespace in [&cluster.nodes[..], &[cluster.router.clone()]].concat() {
            dual::forward(&namespace)?;
        }
        // Without them, what a native program sends to a veth is lost.
        let devices = NAMES.into_iter().map(|name| (&cluster.router, name));
        for (namespace, device) in devices.chain([(&cluster.client, "eth0")]) {
            cluster._programs.push(PassProgram::attach(namespace, device)?);
        }
        cluster.publish(&BACKENDS)?;
        for node in 0..NAMES.len() {
            cluster.start(node, forwarding)?;
        }
        cluster.enter_by(0)?;
        Ok(cluster)
    }

    /// Links a namespace to its gateway, where the device has a name.
    fn link(&self, namespace: &Namespace, gateway: &Namespace, device: &str, link: u16) -> Result<()> {
        self.link_by("eth0", namespace, gateway, device, link)
    }

    fn link_by(
        &self,
        uplink: &str,
        namespace: &Namespace,
        gateway: &Namespace,
        device: &str,
        link: u16,
    ) -> Result<()> {
        dual::link(namespace, uplink, at(link, 2), gateway, device, at(link, 1), self.setup.tx_offload)
    }

    /// Has packets to the Service come in by a node from now on.
    fn enter_by(&self, node: usize) -> Result<()> {
        for (to, gateway) in each(VIP).into_iter().zip(each(at(link_of(node), 2))) {
            self.router.reroute_via(to, gateway)?;
        }
        Ok(())
    }

    fn start(&mut self, node: usize, forwarding: &str) -> Result<()> {
        let mut options = AgentOptions::new(self.manifests.directory(), self.setup.mode);
        options.node = NAMES[node].into();
        options.interfaces = vec![self.uplink.into()];
        // Pods are told from clients, who are elsewhere.
        let pods = "10.20.11.0/24,10.20.12.0/23,2001:db8:20:b::/64,2001:db8:20:c::/63";
        options.extra =
            ["--forwarding", forwarding, "--cluster-cidr", pods].into_iter().map(str::to_owned).collect();
        self.agents[node] = Some(Agent::start(&self.nodes[node], &self.bpffs[node], &options)?);
        Ok(())
    }

    fn agent(&self, node: usize) -> &Agent {
        self.agents[node].as_ref().expect("an agent on every node")
    }

    fn count(&self, node: usize, event: &str) -> Result<f64> {
        self.agent(node).metric("xdp_agent_events_total", &format!("event=\"{event}\""))
    }

    /// Says which backends serve, by their nodes.
    fn publish(&self, backends: &[usize]) -> Result<()> {
        let endpoints: Vec<_> = backends.iter().map(|&node| (at(inside(node), 2), NAMES[node])).collect();
        let [v4, v6] = dual::slices(&endpoints);
        let mut documents = vec![dual::service(CLUSTER_IP, &[VIP]), v4, v6];
        for (node, name) in NAMES.into_iter().enumerate() {
            let (v4, v6) = at(link_of(node), 2);
            documents.push(format!(
                "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nstatus:\n  addresses:\n  - {{type: InternalIP, address: \
                 {v4}}}\n  - {{type: InternalIP, address: \"{v6}\"}}\n"
            ));
        }
        self.manifests.write("all.yaml", &documents)
    }

    fn connect(&self, to: IpAddr) -> Result<Connection> {
        let mut stream = dual::connect(&self.client, to, STALL_TIMEOUT)?;
        let mut greeting = [0; GREETING];
        stream.read_exact(&mut greeting)?;
        Ok(Connection { met: Met::of(&greeting), stream })
    }

    /// Connects until this backend answers.
    fn connect_to(&self, to: IpAddr, backend: usize) -> Result<Connection> {
        for _ in 0..TRIES_MAX {
            let connection = self.connect(to)?;
            if connection.met.backend == backend {
                return Ok(connection);
            }
        }
        anyhow::bail!("{TRIES_MAX} connections never met the backend on {}", NAMES[backend])
    }

    fn socket(&self, to: IpAddr) -> Result<UdpSocket> {
        dual::socket(&self.client, to, ANSWER_TIMEOUT)
    }
}

/// Who has answered, and whom that one saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Met {
    backend: usize,
    client: IpAddr,
}

/// What a backend says first: its node, and the address it sees, as IPv6 writes it.
const GREETING: usize = 17;

impl Met {
    fn of(greeting: &[u8]) -> Self {
        let octets: [u8; 16] = greeting[1..GREETING].try_into().expect("an address of IPv6");
        Self { backend: greeting[0].into(), client: Ipv6Addr::from(octets).to_canonical() }
    }
}

struct Connection {
    stream: TcpStream,
    met: Met,
}

impl Connection {
    /// Sends so much, and gets the same back.
    fn exchange(&mut self, bytes: &[u8]) -> Result<()> {
        let mut writer = self.stream.try_clone()?;
        thread::scope(|scope| {
            let sent = scope.spawn(move || writer.write_all(bytes));
            let mut back = vec![0; bytes.len()];
            self.stream.read_exact(&mut back).context("reading what comes back")?;
            sent.join().expect("the writer does not panic").context("sending")?;
            ensure!(back == bytes, "what came back is something else");
            Ok(())
        })
    }
}

/// Greets every connection and echoes what it sends; greets every datagram, and repeats it.
fn serve(pod: &Namespace, node: u8) -> Result<()> {
    let greeting = move |peer: SocketAddr| -> Vec<u8> {
        let octets = match peer.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        [&[node][..], &octets].concat()
    };
    let stream = move |mut stream: TcpStream| {
        stream.write_all(&greeting(stream.peer_addr()?))?;
        std::io::copy(&mut stream.try_clone()?, &mut stream).map(|_| ())
    };
    dual::serve(pod, stream, move |peer, question| [&greeting(peer)[..], question].concat())
}

/// Asks by a datagram of so many bytes until it is answered as a whole: one too long for the tunnel is lost, and its sender
/// told.
fn ask(socket: &UdpSocket, len: usize) -> Result<Met> {
    let question = pattern_of(len);
    let what = format!("a datagram of {len} bytes to {:?} to be answered", socket.peer_addr()?);
    wait_for(&what, TIMEOUT, || {
        // The error of an earlier one, which the kernel was told, comes with the next call.
        let _ = socket.take_error();
        socket.send(&question)?;
        let mut answer = vec![0; len + GREETING + 1];
        let got = socket.recv(&mut answer)?;
        ensure!(answer[GREETING..got] == question, "{got} bytes came back");
        Ok(Met::of(&answer))
    })
}

each_mode_of_a_wire!(backends_see_their_clients_and_answer_past_the_node_of_entry);
fn backends_see_their_clients_and_answer_past_the_node_of_entry(setup: Setup) -> Result<()> {
    let cluster = Cluster::build(setup, "dsr")?;
    let clients = each(at(CLIENT_LINK, 2));
    // By an address of the Service, and by a NodePort.
    let targets = [VIP, at(link_of(0), 2)].map(each).concat();
    for (to, client) in targets.into_iter().zip(clients.into_iter().cycle()) {
        for backend in BACKENDS {
            let mut connection = cluster.connect_to(to, backend)?;
            ensure!(connection.met == Met { backend, client }, "{to}: {:?}", connection.met);
            connection.exchange(&pattern_of(TURN)).with_context(|| format!("by {to}"))?;
        }
        // Long enough to be fragments too.
        for len in [1, 1_400, 1_472, 8_000] {
            let met = ask(&cluster.socket(to)?, len)?;
            ensure!(met.client == client, "{len} bytes to {to}: {met:?}");
        }
    }
    for event in ["transmitted", "redirected", "restored", "slow_path"] {
        let times = cluster.count(0, event)?;
        ensure!(times == 0.0, "the node of entry has {times} of {event}: answers came back by it");
    }
    ensure!(cluster.count(0, "tunnelled")? > 10.0 && cluster.count(0, "untunnelled")? == 0.0);
    for backend in BACKENDS {
        ensure!(cluster.count(backend, "untunnelled")? > 2.0 && cluster.count(backend, "tunnelled")? == 0.0);
        ensure!(cluster.count(backend, "delivered")? > 2.0 && cluster.count(backend, "restored")? > 2.0);
    }
    Ok(())
}

each_mode_of_a_wire!(a_router_that_has_no_room_for_an_answer_is_heard_by_the_backend);
fn a_router_that_has_no_room_for_an_answer_is_heard_by_the_backend(setup: Setup) -> Result<()> {
    let cluster = Cluster::build(setup, "dsr")?;
    for (namespace, device) in [(&cluster.router, "client"), (&cluster.client, "eth0")] {
        namespace.mtu(device, 1_300)?;
    }
    // What a backend has heard once holds for the client, so each is asked by one of the two only.
    for (targets, backend) in [VIP, at(link_of(0), 2)].into_iter().zip(BACKENDS) {
        cluster.publish(&[backend])?;
        for to in each(targets) {
            let socket = cluster.socket(to)?;
            wait_for("the backend to be the only one", TIMEOUT, || {
                ensure!(ask(&socket, 1)?.backend == backend);
                Ok(())
            })?;
            ask(&socket, 1_400)?;
        }
        let heard = cluster.count(backend, "related")?;
        ensure!(heard >= 2.0, "the node of the backend has heard {heard} errors");
    }
    // They are for the address that the answer came from, and so come in where its clients do.
    let heard = cluster.count(0, "related")?;
    ensure!(heard >= 4.0, "the node of entry has heard {heard} errors");
    Ok(())
}

each_mode_of_a_wire!(a_router_on_both_sides_of_a_node_hears_its_own_errors_by_another_name);
fn a_router_on_both_sides_of_a_node_hears_its_own_errors_by_another_name(setup: Setup) -> Result<()> {
    let cluster = Cluster::build(setup, "snat")?;
    cluster.publish(&BACKENDS[..1])?;
    cluster.router.mtu("node-b", 1_400)?;
    cluster.nodes[1].mtu("eth0", 1_400)?;
    for vip in each(VIP) {
        let mut connection = wait_for("the backend", TIMEOUT, || cluster.connect_to(vip, BACKENDS[0]))?;
        connection.exchange(&pattern_of(1 << 20)).with_context(|| format!("{vip}"))?;
    }
    ensure!(cluster.count(0, "related")? >= 2.0);
    Ok(())
}

each_mode_of_a_wire!(a_router_that_has_no_room_for_a_packet_to_another_node_is_heard_by_the_client);
fn a_router_that_has_no_room_for_a_packet_to_another_node_is_heard_by_the_client(setup: Setup) -> Result<()> {
    let cluster = Cluster::build(setup, "dsr")?;
    cluster.publish(&BACKENDS[..1])?;
    cluster.router.mtu("node-b", 1_400)?;
    cluster.nodes[1].mtu("eth0", 1_400)?;
    for to in [VIP, at(link_of(0), 2)].map(each).concat() {
        let before = cluster.count(0, "related")?;
        let mut connection = wait_for("the backend", TIMEOUT, || cluster.connect_to(to, BACKENDS[0]))?;
        connection.exchange(&pattern_of(1 << 20)).with_context(|| format!("{to}"))?;
        ensure!(cluster.count(0, "related")? > before, "{to}: the node of entry has heard no error");
    }
    Ok(())
}

each_mode_of_a_wire!(a_transfer_goes_on_when_its_node_of_entry_changes_is_killed_or_loses_its_neighbours);
fn a_transfer_goes_on_when_its_node_of_entry_changes_is_killed_or_loses_its_neighbours(
    setup: Setup,
) -> Result<()> {
    let mut cluster = Cluster::build(setup, "dsr")?;
    let bytes = pattern_of(TURN);
    for (vip, backend) in each(VIP).into_iter().zip(BACKENDS) {
        cluster.enter_by(0)?;
        let mut connection = cluster.connect_to(vip, backend)?;
        for turn in 0..TURNS {
            match turn {
                // By each node in turn: one that sends on, the backend's own, the other one's.
                1 | 2 => cluster.enter_by(turn)?,
                3 => cluster.enter_by(0)?,
                4 => {
                    cluster.nodes[0].flush_neighbours()?;
                }
                5 => {
                    cluster.agents[0].take().expect("an agent on every node").kill()?;
                }
                _ => {}
            }
            connection.exchange(&bytes).with_context(|| format!("{vip}, turn {turn}"))?;
        }
        cluster.start(0, "dsr")?;
        connection.exchange(&bytes).context("with another agent")?;
    }
    // Longer packets than get through the tunnel, of which their sender was told.
    let too_long = cluster.agent(0).metric("xdp_agent_drops_total", "reason=\"tunnel_mtu\"")?;
    ensure!(too_long > 0.0, "nothing was too long");
    Ok(())
}

each_mode_of_a_wire!(hybrid_answers_tcp_directly_and_udp_by_the_node_of_entry);
fn hybrid_answers_tcp_directly_and_udp_by_the_node_of_entry(setup: Setup) -> Result<()> {
    let cluster = Cluster::build(setup, "hybrid")?;
    let ends = each(at(CLIENT_LINK, 2)).into_iter().zip(each(at(link_of(0), 2)));
    for (vip, (client, node)) in each(VIP).into_iter().zip(ends) {
        ensure!(cluster.connect(vip)?.met.client == client, "TCP is direct");
        ensure!(ask(&cluster.socket(vip)?, 100)?.client == node, "UDP is not");
    }
    Ok(())
}

/// What a card's driver hands over is merged before it gets to a device above it.
#[test]
fn merged_segments_go_through_the_tunnel_and_come_out_of_it() -> Result<()> {
    let setup = Setup { mode: Mode::Generic, tx_offload: false };
    let cluster = Cluster::build_with(setup, "dsr", "br0")?;
    for node in &cluster.nodes {
        node.gro("eth0", true)?;
    }
    let bytes = pattern_of(TURN);
    for (vip, backend) in each(VIP).into_iter().zip(BACKENDS) {
        let mut connection = cluster.connect_to(vip, backend)?;
        let before = cluster.count(0, "deferred")?;
        for turn in 0..TURNS {
            connection.exchange(&bytes).with_context(|| format!("{vip}, turn {turn}"))?;
        }
        // One complete checksum in 65,536 looks like one of what is merged.
        let deferred = cluster.count(0, "deferred")? - before;
        ensure!(deferred > 100.0, "{deferred} merged at the node of entry");
    }
    Ok(())
}

/// A client on the same machine leaves its checksums to a device that never comes; its flows are translated.
#[test]
fn a_client_that_leaves_checksums_to_its_device_is_served_too() -> Result<()> {
    let setup = Setup { mode: Mode::Native, tx_offload: true };
    let cluster = Cluster::build(setup, "dsr")?;
    let bytes = pattern_of(TURN);
    for vip in each(VIP) {
        cluster.connect(vip)?.exchange(&bytes)?;
        ask(&cluster.socket(vip)?, 100)?;
    }
    Ok(())
}

each_mode_of_a_wire!(udp_leaves_a_backend_that_goes_and_tcp_stays_with_it);
fn udp_leaves_a_backend_that_goes_and_tcp_stays_with_it(setup: Setup) -> Result<()> {
    let cluster = Cluster::build(setup, "dsr")?;
    cluster.publish(&BACKENDS[..1])?;
    for vip in each(VIP) {
        let gone = BACKENDS[0];
        let socket = cluster.socket(vip)?;
        let mut connection = wait_for("the other backend to be gone", TIMEOUT, || {
            ensure!(ask(&socket, 1)?.backend == gone);
            cluster.connect_to(vip, gone)
        })?;
        cluster.publish(&BACKENDS[1..])?;
        wait_for("UDP to leave the backend that is gone", TIMEOUT, || {
            ensure!(ask(&socket, 1)?.backend == BACKENDS[1]);
            Ok(())
        })?;
        connection.exchange(b"goes on").context("a connection to a backend that is gone")?;
        cluster.publish(&BACKENDS[..1])?;
    }
    Ok(())
}

each_mode_of_a_wire!(a_connection_to_a_node_port_outlives_the_loss_of_its_way);
fn a_connection_to_a_node_port_outlives_the_loss_of_its_way(setup: Setup) -> Result<()> {
    let cluster = Cluster::build(setup, "dsr")?;
    cluster.publish(&BACKENDS[..1])?;
    let ways = each(at(link_of(BACKENDS[0]), 2));
    for (to, way) in each(at(link_of(0), 2)).into_iter().zip(ways) {
        let mut connection = wait_for("a connection through a tunnel", TIMEOUT, || {
            let before = cluster.count(0, "tunnelled")?;
            let mut connection = cluster.connect_to(to, BACKENDS[0])?;
            connection.exchange(b"before")?;
            ensure!(cluster.count(0, "tunnelled")? > before, "it is translated");
            Ok(connection)
        })?;
        let lost =
            |cluster: &Cluster| cluster.agent(0).metric("xdp_agent_drops_total", r#"reason="tunnel_way""#);
        let before = lost(&cluster)?;
        cluster.nodes[0].refuse_way(way, true)?;
        thread::scope(|scope| {
            let back = scope.spawn(|| {
                let seen = wait_for("a packet to have no way", TIMEOUT, || {
                    ensure!(lost(&cluster)? > before);
                    Ok(())
                });
                seen.and(cluster.nodes[0].refuse_way(way, false))
            });
            // Until the loss is noticed, packets go on.
            let mut went_on = Ok(());
            while went_on.is_ok() && !back.is_finished() {
                went_on = connection.exchange(b"goes on").context("while the way came back");
            }
            back.join().map_err(|_| anyhow!("the thread panicked"))?.and(went_on)
        })?;
    }
    Ok(())
}
