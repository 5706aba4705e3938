//! Fragmented datagrams of real sockets, in the order in which the kernel sends them and in the worst one.

use std::{
    collections::HashSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::agent::{Agent, AgentOptions};
use xdp_agent_tests::lab::capture::PacketSocket;
use xdp_agent_tests::lab::fragments::datagram;
use xdp_agent_tests::lab::link::veth;
use xdp_agent_tests::lab::netns::{Namespace, PrivateBpffs};
use xdp_agent_tests::lab::packets::Mac;
use xdp_agent_tests::lab::pass::PassProgram;
use xdp_agent_tests::lab::servers::pattern_of;
use xdp_agent_tests::lab::wait_for;

use crate::setup::Setup;

const DATAGRAMS: u32 = 10_000;
/// Datagrams that are under way at a time: less than default socket buffers hold, and not so many that a receiver gives
/// packets up for the distance between their fragments (64, net.ipv4.ipfrag_max_dist).
const AT_A_TIME: u32 = 16;
const LENGTH: usize = 2_000;
/// Bytes of a datagram in each of its fragments.
const PART: usize = 720;
const CLIENT_PORT: u16 = 41_000;
const SERVICE_PORT: u16 = 53;
const BACKEND_PORT: u16 = 5353;
/// A retransmission would hide a loss; UDP has none, so what has not come by then is lost.
const PATIENCE: Duration = Duration::from_secs(5);
/// Endless reads look this often whether the case is over.
const LOOK: Duration = Duration::from_millis(100);

/// The addresses of a family.
struct Plan {
    client: IpAddr,
    node_outside: IpAddr,
    node_inside: IpAddr,
    backend: IpAddr,
    service: IpAddr,
    prefix: u8,
    family: &'static str,
}

const V4: Plan = Plan {
    client: IpAddr::V4(Ipv4Addr::new(198, 51, 100, 2)),
    node_outside: IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)),
    node_inside: IpAddr::V4(Ipv4Addr::new(192, 168, 70, 1)),
    backend: IpAddr::V4(Ipv4Addr::new(192, 168, 70, 2)),
    service: IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)),
    prefix: 24,
    family: "IPv4",
};

const V6: Plan = Plan {
    client: IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2)),
    node_outside: IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1)),
    node_inside: IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1)),
    backend: IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2)),
    service: IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10)),
    prefix: 64,
    family: "IPv6",
};

impl Plan {
    /// The Service, with its endpoint on a node of that name.
    fn manifest(&self, node: &str) -> String {
        let Self { service, family, backend, .. } = self;
        format!(
            r#"
apiVersion: v1
kind: Service
metadata: {{name: dns, namespace: shop}}
spec:
  clusterIP: "{service}"
  clusterIPs: ["{service}"]
  ipFamilies: [{family}]
  ports: [{{name: dns, port: {SERVICE_PORT}, targetPort: {BACKEND_PORT}, protocol: UDP}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: dns-1, namespace: shop, labels: {{kubernetes.io/service-name: dns}}}}
addressType: {family}
ports: [{{name: dns, port: {BACKEND_PORT}, protocol: UDP}}]
endpoints: [{{addresses: ["{backend}"], nodeName: {node}, conditions: {{ready: true}}}}]
"#
        )
    }
}

/// A client, the node and a backend in a row, with the agent on both interfaces of the node.
struct Row {
    agent: Agent,
    plan: Plan,
    server: Echo,
    client: Namespace,
    /// Of the client and of the node toward it.
    macs: (Mac, Mac),
    _rest: (Namespace, Namespace, [PassProgram; 2], PrivateBpffs, tempfile::TempDir),
}

impl Row {
    fn build(setup: Setup, plan: Plan, is_here: bool) -> Result<Self> {
        Self::build_with(setup, plan, is_here, |_| Ok(()))
    }

    /// With something further on the node.
    fn build_with(
        setup: Setup,
        plan: Plan,
        is_here: bool,
        furnish: impl FnOnce(&Namespace) -> Result<()>,
    ) -> Result<Self> {
        let [client, node, backend] = ["frag-client", "frag-node", "frag-backend"].map(Namespace::new);
        let (client, node, backend) = (client?, node?, backend?);
        veth(&client, "eth0", &node, "out0")?;
        veth(&backend, "eth0", &node, "in0")?;
        for namespace in [&client, &node, &backend] {
            namespace.sysctl("net/ipv6/conf/all/disable_ipv6", "0")?;
            namespace.sysctl("net/ipv6/conf/default/disable_ipv6", "0")?;
        }
        for (namespace, device, address) in [
            (&client, "eth0", plan.client),
            (&node, "out0", plan.node_outside),
            (&backend, "eth0", plan.backend),
            (&node, "in0", plan.node_inside),
        ] {
            namespace.enable_v6(device)?;
            namespace.address(device, address, plan.prefix)?;
            namespace.tx_offload(device, setup.tx_offload)?;
        }
        node.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        node.sysctl("net/ipv4/ip_forward", "1")?;
        for (namespace, gateway) in [(&client, plan.node_outside), (&backend, plan.node_inside)] {
            match gateway {
                IpAddr::V4(gateway) => namespace.route_via(Ipv4Addr::UNSPECIFIED, 0, gateway)?,
                IpAddr::V6(gateway) => namespace.default_route_v6(gateway)?,
            }
        }
        furnish(&node)?;
        let peers = [PassProgram::attach(&client, "eth0")?, PassProgram::attach(&backend, "eth0")?];
        let dir = tempfile::tempdir()?;
        let place = if is_here { "node" } else { "other" };
        fs::write(dir.path().join("services.yaml"), plan.manifest(place))?;
        let bpffs = PrivateBpffs::new()?;
        let mut options = AgentOptions::new(dir.path(), setup.mode);
        options.interfaces = vec!["out0".into(), "in0".into()];
        let agent = Agent::start(&node, &bpffs, &options)?;
        setup.check_mode(&agent, "out0")?;
        let raw = if is_here { None } else { Some((backend.mac("eth0")?, node.mac("in0")?)) };
        let server = Echo::start(&backend, plan.backend, raw)?;
        let macs = (client.mac("eth0")?, node.mac("out0")?);
        Ok(Self { agent, plan, server, client, macs, _rest: (node, backend, peers, bpffs, dir) })
    }

    fn target(&self) -> SocketAddr {
        (self.plan.service, SERVICE_PORT).into()
    }

    fn socket(&self) -> Result<UdpSocket> {
        // A process that another test starts has a copy of the last one until it is itself.
        let socket = wait_for("the client's port", PATIENCE, || {
            Ok(self.client.run(|| UdpSocket::bind((self.plan.client, CLIENT_PORT)))?)
        })?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect(self.target())?;
        Ok(socket)
    }

    /// Exchanges datagrams, whose fragments the kernel sends in order, with the lengths around those of whole frames.
    fn exchange_in_order(&self) -> Result<()> {
        let socket = self.socket()?;
        let mut answer = vec![0; 65_536];
        for length in [1, 1_400, 1_472, 1_473, 2_000, 8_000, 40_000, 60_000] {
            let question = pattern_of(length);
            socket.send(&question)?;
            let got = socket.recv(&mut answer).with_context(|| format!("{length} bytes"))?;
            ensure!(answer[..got] == question, "{length} bytes came back as {got} other ones");
        }
        Ok(())
    }

    /// Exchanges datagrams whose fragments are sent last to first, each alone and many interleaved; how many were lost is
    /// the answer.
    fn exchange_in_the_worst_order(&self) -> Result<usize> {
        let (socket, wire) = (self.socket()?, PacketSocket::open(&self.client, "eth0")?);
        let ends = ((self.plan.client, CLIENT_PORT).into(), self.target());
        let (mut lost, mut answer) = (0, vec![0; 65_536]);
        for start in (0..DATAGRAMS).step_by(AT_A_TIME as usize) {
            let numbers = start..(start + AT_A_TIME).min(DATAGRAMS);
            let questions: Vec<_> = numbers.clone().map(question).collect();
            let mut frames = Vec::new();
            for (number, question) in numbers.zip(&questions) {
                let fragments = datagram(self.macs, ends, number, question, PART)?;
                frames.extend(fragments.into_iter().enumerate());
            }
            if (start / AT_A_TIME).is_multiple_of(2) {
                frames.reverse();
            } else {
                // Stable: all the last ones, then those before them.
                frames.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
            }
            frames.iter().try_for_each(|(_, frame)| wire.send(frame))?;
            let mut missing: HashSet<Vec<u8>> = questions.into_iter().collect();
            while !missing.is_empty() {
                let Ok(length) = socket.recv(&mut answer) else { break };
                ensure!(missing.remove(&answer[..length]), "{length} bytes that nobody waits for");
            }
            lost += missing.len();
        }
        Ok(lost)
    }

    fn events(&self, event: &str) -> Result<f64> {
        self.agent.metric("xdp_agent_events_total", &format!("event=\"{event}\""))
    }
}

/// A datagram with a number of its own.
fn question(number: u32) -> Vec<u8> {
    let mut question = pattern_of(LENGTH);
    question[..4].copy_from_slice(&number.to_be_bytes());
    question
}

/// Answers each datagram with itself until it is dropped, and remembers whom.
struct Echo {
    peers: Arc<Mutex<HashSet<IpAddr>>>,
    is_over: Arc<AtomicBool>,
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

impl Echo {
    /// With hardware addresses, long answers go out last fragment first; else the kernel sends them.
    fn start(backend: &Namespace, address: IpAddr, reversed: Option<(Mac, Mac)>) -> Result<Self> {
        let from = SocketAddr::from((address, BACKEND_PORT));
        let socket = backend.run(|| UdpSocket::bind(from))?;
        socket.set_read_timeout(Some(LOOK))?;
        let wire = PacketSocket::open(backend, "eth0")?;
        let echo = Self { peers: Arc::default(), is_over: Arc::default() };
        let (peers, is_over) = (Arc::clone(&echo.peers), Arc::clone(&echo.is_over));
        thread::spawn(move || {
            let (mut question, mut id) = (vec![0; 65_536], 0);
            while !is_over.load(Ordering::Relaxed) {
                let Ok((length, peer)) = socket.recv_from(&mut question) else { continue };
                peers.lock().expect("no holder panics").insert(peer.ip());
                id += 1;
                // What fails here is missing at the client.
                let _ = match reversed {
                    Some(macs) if length == LENGTH => {
                        datagram(macs, (from, peer), id, &question[..length], PART).and_then(|fragments| {
                            fragments.iter().rev().try_for_each(|fragment| wire.send(fragment))
                        })
                    }
                    Some(_) | None => {
                        socket.send_to(&question[..length], peer).map(drop).map_err(anyhow::Error::from)
                    }
                };
            }
        });
        Ok(echo)
    }

    fn peers(&self) -> HashSet<IpAddr> {
        self.peers.lock().expect("no holder panics").clone()
    }
}

/// Has the node follow connections, and with that put fragments together before it routes them.
fn track_connections(node: &Namespace) -> Result<()> {
    let rules = "table inet lab { chain forward { type filter hook forward priority 0; ct state invalid counter drop; }; }";
    let output = node.command("nft").arg(rules).output().context("this case needs nft")?;
    ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Both orders to a backend elsewhere, whose answers come back last fragment first.
fn elsewhere(setup: Setup, plan: Plan) -> Result<()> {
    pass_any_order(Row::build(setup, plan, false)?)
}

fn pass_any_order(row: Row) -> Result<()> {
    row.exchange_in_order()?;
    let held = row.events("fragment_held")?;
    let lost = row.exchange_in_the_worst_order()?;
    ensure!(lost == 0, "{lost} of {DATAGRAMS} datagrams are lost\n{}", row.agent.log());
    ensure!(row.server.peers() == HashSet::from([row.plan.node_inside]), "{:?}", row.server.peers());
    // Two of three fragments each way.
    let held = row.events("fragment_held")? - held;
    ensure!(held >= f64::from(DATAGRAMS), "{held} fragments were held");
    ensure!(row.events("fragment_lost")? == 0.0);
    row.agent.stop()
}

/// Both orders to a backend of this node, whose answers its kernel sends.
fn here(setup: Setup, plan: Plan) -> Result<()> {
    let row = Row::build(setup, plan, true)?;
    row.exchange_in_order()?;
    let lost = row.exchange_in_the_worst_order()?;
    ensure!(lost == 0, "{lost} of {DATAGRAMS} datagrams are lost\n{}", row.agent.log());
    ensure!(row.server.peers() == HashSet::from([row.plan.client]), "{:?}", row.server.peers());
    ensure!(row.events("fragment_lost")? == 0.0);
    row.agent.stop()
}

each_mode!(fragments_of_ipv4_reach_a_backend_elsewhere_in_any_order);
fn fragments_of_ipv4_reach_a_backend_elsewhere_in_any_order(setup: Setup) -> Result<()> {
    elsewhere(setup, V4)
}

each_mode!(fragments_of_ipv6_reach_a_backend_elsewhere_in_any_order);
fn fragments_of_ipv6_reach_a_backend_elsewhere_in_any_order(setup: Setup) -> Result<()> {
    elsewhere(setup, V6)
}

each_mode!(fragments_of_ipv4_reach_a_backend_of_this_node_in_any_order);
fn fragments_of_ipv4_reach_a_backend_of_this_node_in_any_order(setup: Setup) -> Result<()> {
    here(setup, V4)
}

each_mode!(fragments_of_ipv6_reach_a_backend_of_this_node_in_any_order);
fn fragments_of_ipv6_reach_a_backend_of_this_node_in_any_order(setup: Setup) -> Result<()> {
    here(setup, V6)
}

each_mode!(fragments_of_ipv4_pass_a_node_that_tracks_connections);
fn fragments_of_ipv4_pass_a_node_that_tracks_connections(setup: Setup) -> Result<()> {
    pass_any_order(Row::build_with(setup, V4, false, track_connections)?)
}

each_mode!(fragments_of_ipv6_pass_a_node_that_tracks_connections);
fn fragments_of_ipv6_pass_a_node_that_tracks_connections(setup: Setup) -> Result<()> {
    pass_any_order(Row::build_with(setup, V6, false, track_connections)?)
}
