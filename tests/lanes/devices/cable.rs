//! What every case has: a node whose one interface is the device in question, and the rest of the world at its other end.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::agent::{Agent, AgentOptions, Mode, agent_binary};
use xdp_agent_tests::lab::block_on;
use xdp_agent_tests::lab::clients::{HttpConnection, UdpClient};
use xdp_agent_tests::lab::link::veth;
use xdp_agent_tests::lab::manifests::{Endpoint, Manifests, Service, node_yaml};
use xdp_agent_tests::lab::netns::{Namespace, PrivateBpffs};
use xdp_agent_tests::lab::servers::{HTTP_PORT, Server, UDP_PORT, pattern_of};

const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 70, 1);
const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 70, 2);
/// A backend on another node, which the client's machine is too.
const REMOTE: Ipv4Addr = Ipv4Addr::new(192, 168, 70, 3);
const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 11);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 1);
const NODE_PORT_HTTP: u16 = 30_080;
const NODE_PORT_UDP: u16 = 30_500;
/// Connections after which a backend that was never chosen is not in the ring.
const TRIES_MAX: usize = 60;
/// More than the buffers of any queue, so that frames of full length go by in trains.
const BODY: usize = 1 << 18;

/// The two ends of a cable.
pub(crate) struct Cable {
    pub(crate) node: Namespace,
    pub(crate) client: Namespace,
    pub(crate) pod: Namespace,
    bpffs: PrivateBpffs,
    manifests: Manifests,
    _servers: Vec<Server>,
}

impl Cable {
    /// Two machines that are not connected yet; the node runs a pod.
    pub(crate) fn unplugged() -> Result<Self> {
        xdp_agent_tests::lab::require_root()?;
        let (node, client, pod) =
            (Namespace::new("node")?, Namespace::new("client")?, Namespace::new("pod")?);
        node.sysctl("net/ipv4/ip_forward", "1")?;
        veth(&node, "pod1", &pod, "eth0")?;
        node.address("pod1", GATEWAY, 32)?;
        node.route_dev(POD, 32, "pod1")?;
        pod.address("eth0", POD, 32)?;
        pod.route_dev(GATEWAY, 32, "eth0")?;
        pod.route_via(Ipv4Addr::UNSPECIFIED, 0, GATEWAY)?;
        let servers = vec![Server::start(&pod, "local", POD)?];
        let (bpffs, manifests) = (PrivateBpffs::new()?, Manifests::new()?);
        Ok(Self { node, client, pod, bpffs, manifests, _servers: servers })
    }

    /// Gives the ends of the cable their addresses, and starts what serves at the far one.
    pub(crate) fn plug(&mut self, near: &str, far: &str) -> Result<()> {
        self.node.address(near, NODE, 24)?;
        self.client.address(far, CLIENT, 24)?;
        self.client.address(far, REMOTE, 24)?;
        self._servers.push(Server::start(&self.client, "remote", REMOTE)?);
        let service = Service::new("web", Ipv4Addr::new(10, 96, 0, 10))
            .port("http", "TCP", 80, HTTP_PORT, NODE_PORT_HTTP)
            .port("echo", "UDP", 5_000, UDP_PORT, NODE_PORT_UDP);
        let endpoints = [Endpoint::new(POD, "node"), Endpoint::new(REMOTE, "node2")];
        let nodes = [node_yaml("node", NODE, "10.244.1.0/24"), node_yaml("node2", CLIENT, "10.244.2.0/24")];
        self.manifests.write("nodes.yaml", &nodes)?;
        self.manifests.write("web.yaml", &[service.yaml(), service.slice_yaml(&endpoints)])
    }

    /// Starts the agent on the device.
    pub(crate) fn start(&self, device: &str, mode: Mode) -> Result<Agent> {
        Agent::start(&self.node, &self.bpffs, &self.options(device, mode))
    }

    pub(crate) fn options(&self, device: &str, mode: Mode) -> AgentOptions {
        let options = AgentOptions::new(self.manifests.directory(), mode);
        AgentOptions { interfaces: vec![device.to_owned()], ..options }
    }

    /// What an agent that is expected to refuse says.
    pub(crate) fn refusal(&self, device: &str, mode: Mode) -> Result<String> {
        let options = self.options(device, mode);
        Ok(Agent::refuse(&self.node, &self.bpffs, &options)?.log)
    }

    /// What `doctor` says after a trial; its exit status has to agree.
    pub(crate) fn doctor(&self, device: &str) -> Result<serde_json::Value> {
        let mut command = self.bpffs.command(&self.node, agent_binary()?);
        command.args(["doctor", "--try", "--output", "json", "--iface", device]);
        let output = command.stdin(Stdio::null()).output().context("cannot start the agent")?;
        let report: serde_json::Value =
            serde_json::from_slice(&output.stdout).with_context(|| format!("no report: {output:?}"))?;
        ensure!(report["works"] == output.status.success(), "the status {} and {report}", output.status);
        Ok(report)
    }

    /// Reaches the backends on both nodes through the device, by short and long frames.
    pub(crate) fn serves(&self) -> Result<()> {
        let mut met = BTreeSet::new();
        for _ in 0..TRIES_MAX {
            let mut connection = block_on(HttpConnection::open(&self.client, (NODE, NODE_PORT_HTTP)))?;
            met.insert(block_on(connection.bytes(BODY, Duration::from_secs(20)))?);
            if met.len() == 2 {
                break;
            }
        }
        ensure!(met.len() == 2, "{TRIES_MAX} connections met {met:?} only");
        met.clear();
        for _ in 0..TRIES_MAX {
            let socket = block_on(UdpClient::open(&self.client, (NODE, NODE_PORT_UDP), 0))?;
            for length in [1, 60, 1_472] {
                block_on(socket.echo(&pattern_of(length)))?;
            }
            met.insert(block_on(socket.whoami())?.backend);
            if met.len() == 2 {
                return Ok(());
            }
        }
        ensure!(met.len() == 2, "{TRIES_MAX} sockets met {met:?} only");
        Ok(())
    }

    /// Runs `doctor` and the agent on the device: both name this mode, the reason says this, and traffic passes.
    pub(crate) fn runs(&self, device: &str, mode: &str, says: &str) -> Result<()> {
        let report = self.doctor(device)?;
        let foreseen = &report["interfaces"][0];
        ensure!(foreseen["mode"] == mode, "doctor foresees {foreseen}, and not {mode}");
        let agent = self.start(device, Mode::Auto)?;
        let (found, reason) = agent.mode_of(device)?;
        ensure!(found == mode, "{device} is {found} ({reason}), not {mode}");
        ensure!(reason.contains(says), "the reason does not say {says:?}: {reason}");
        ensure!(foreseen["reason"] == reason, "doctor says {foreseen}, the agent {reason}");
        self.serves()?;
        agent.stop()
    }
}
