//! The standard world: an outside client, a router, this node with pods, and a second node with pods.
//!
//! ```text
//! client ── router ══ segment (bridge) ══ node ── local pods
//!                          ╚═══════════ node2 ── remote pods
//! ```

use std::cell::Cell;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::agent::{Agent, AgentOptions, Mode};
use super::link::veth;
use super::manifests::{Endpoint, Manifests, Service, node_yaml};
use super::netns::{Namespace, PrivateBpffs};
use super::pass::PassProgram;
use super::servers::{HTTP_PORT, Server, UDP_PORT};
use super::wait_for;

/// The outside client.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// The router's address towards the client.
pub const ROUTER_OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The router's address on the segment.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
/// This node.
pub const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 10);
/// The second node on the segment.
pub const NODE2: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 11);
/// This node on the link that only leads to the second node.
pub const NODE_DIRECT: Ipv4Addr = Ipv4Addr::new(192, 168, 60, 10);
/// The second node on the link that only leads to this node.
pub const NODE2_DIRECT: Ipv4Addr = Ipv4Addr::new(192, 168, 60, 11);
/// ServiceIP of the standard Service.
pub const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// Load-balancer address of the standard Service.
pub const LOAD_BALANCER_IP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// External address of the standard Service.
pub const EXTERNAL_IP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 20);
/// HTTP port of the standard Service.
pub const SERVICE_HTTP: u16 = 80;
/// UDP port of the standard Service.
pub const SERVICE_UDP: u16 = 5_000;
/// HTTP port on the node's addresses.
pub const NODE_PORT_HTTP: u16 = 30_080;
/// UDP port on the node's addresses.
pub const NODE_PORT_UDP: u16 = 30_500;

/// Longest time from a changed manifest to changed maps.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(10);
/// Publications after which numbers repeat; far more than one agent could leave unread.
const REVISIONS: usize = 16;
const REVISION_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 255, 1);
const POD_GATEWAYS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 244, 1, 1), Ipv4Addr::new(10, 244, 2, 1)];

/// How this node reaches the second node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemoteLink {
    /// Over the segment, out of the interface the client's packets come in by.
    Segment,
    /// Over a second interface `eth1`, whose peer takes frames sent by XDP only if it carries a program.
    Direct {
        /// Whether the peer carries a pass program.
        peer_program: bool,
    },
}

/// What the world is made of.
#[derive(Clone, Copy, Debug)]
pub struct WorldOptions {
    /// Backends behind this node.
    pub local: usize,
    /// Backends behind the second node.
    pub remote: usize,
    /// Whether client and pods leave checksums to the device, which a veth never fills in.
    pub tx_offload: bool,
    /// Whether the devices that receive this node's frames carry a pass program, as native XDP_TX needs.
    pub peer_programs: bool,
    /// Way to the second node.
    pub remote_link: RemoteLink,
}

impl Default for WorldOptions {
    fn default() -> Self {
        Self { local: 2, remote: 2, tx_offload: true, peer_programs: true, remote_link: RemoteLink::Segment }
    }
}

/// A pod: a namespace with one address and both servers.
pub struct Pod {
    /// The pod's namespace.
    pub namespace: Namespace,
    /// The servers.
    pub server: Server,
    /// Name of the pod's node.
    pub node: &'static str,
}

impl Pod {
    /// Returns the EndpointSlice entry of the pod.
    pub fn endpoint(&self) -> Endpoint {
        Endpoint::new(self.server.address(), self.node)
    }

    /// Returns whether the pod runs on the node under test.
    pub fn is_local(&self) -> bool {
        self.node == "node"
    }
}

/// A built world with a directory of manifests and a BPF file system of its own.
pub struct World {
    /// The outside client.
    pub client: Namespace,
    /// The router, with the segment's bridge.
    pub router: Namespace,
    /// The node under test; its uplink is `eth0`.
    pub node: Namespace,
    /// The second node.
    pub node2: Namespace,
    /// All pods, local ones first, named `local-1`, `remote-1` and so on.
    pub pods: Vec<Pod>,
    /// Manifests the agent follows.
    pub manifests: Manifests,
    /// Where the agent pins.
    pub bpffs: PrivateBpffs,
    programs: Vec<PassProgram>,
    revision: Cell<usize>,
}

impl World {
    /// Builds namespaces, links, routes, pods and servers.
    pub fn build(options: WorldOptions) -> Result<Self> {
        super::require_root()?;
        let mut world = Self {
            client: Namespace::new("client")?,
            router: Namespace::new("router")?,
            node: Namespace::new("node")?,
            node2: Namespace::new("node2")?,
            pods: Vec::new(),
            manifests: Manifests::new()?,
            bpffs: PrivateBpffs::new()?,
            programs: Vec::new(),
            revision: Cell::new(0),
        };
        world.link_outside()?;
        world.link_segment(options.peer_programs)?;
        world.link_nodes(options.remote_link)?;
        for number in 1..=options.local {
            world.add_pod(true, number)?;
        }
        for number in 1..=options.remote {
            world.add_pod(false, number)?;
        }
        if !options.tx_offload {
            world.client.tx_offload("eth0", false)?;
            for pod in &world.pods {
                pod.namespace.tx_offload("eth0", false)?;
            }
        }
        Ok(world)
    }

    /// Writes the standard Service with all its frontends, all pods as endpoints, and both nodes.
    pub fn publish(&self) -> Result<()> {
        self.publish_endpoints(&self.pods.iter().map(Pod::endpoint).collect::<Vec<_>>())
    }

    /// Writes the standard manifests with chosen endpoints.
    ///
    /// The file of the endpoints holds a second Service, whose number of ports tells one publication from the next.
    pub fn publish_endpoints(&self, endpoints: &[Endpoint]) -> Result<()> {
        let service = standard_service();
        self.revision.set(self.revision.get() % REVISIONS + 1);
        let ports = 1..=self.revision.get() as u16;
        let revision = ports.fold(Service::new("zz-revision", REVISION_IP), |service, port| {
            service.port(&format!("port-{port}"), "TCP", port, port, 0)
        });
        self.manifests.write("nodes.yaml", &nodes())?;
        self.manifests.write("web-slice.yaml", &[service.slice_yaml(endpoints), revision.yaml()])?;
        self.manifests.write("web.yaml", &[service.yaml()])
    }

    /// Returns the usual command line for this world's agent.
    pub fn agent_options(&self, mode: Mode) -> AgentOptions {
        AgentOptions::new(self.manifests.directory(), mode)
    }

    /// Publishes the standard manifests and starts an agent on `eth0`.
    pub fn start_agent(&self, mode: Mode) -> Result<Agent> {
        self.publish()?;
        Agent::start(&self.node, &self.bpffs, &self.agent_options(mode))
    }

    /// Publishes chosen endpoints and waits until the agent has taken them in.
    pub fn change_endpoints(&self, agent: &Agent, endpoints: &[Endpoint]) -> Result<()> {
        self.publish_endpoints(endpoints)?;
        let services = standard_service().ports.len() + self.revision.get();
        wait_for("the published endpoints to be served", PUBLISH_TIMEOUT, || {
            let served = agent.status()?["services"].as_u64();
            ensure!(served == Some(services as u64), "{served:?} service ports are served, not {services}");
            Ok(())
        })
    }

    /// Returns the pod of that name.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods.iter().find(|pod| pod.server.name() == name).with_context(|| format!("no pod {name}"))
    }

    /// Forgets the learned neighbours of router and nodes.
    pub fn flush_neighbours(&self) -> Result<usize> {
        Ok(self.router.flush_neighbours()? + self.node.flush_neighbours()? + self.node2.flush_neighbours()?)
    }

    fn link_outside(&self) -> Result<()> {
        veth(&self.client, "eth0", &self.router, "client0")?;
        self.client.address("eth0", CLIENT, 24)?;
        self.router.address("client0", ROUTER_OUTSIDE, 24)?;
        self.client.route_via(Ipv4Addr::UNSPECIFIED, 0, ROUTER_OUTSIDE)
    }

    fn link_segment(&mut self, peer_programs: bool) -> Result<()> {
        self.router.sysctl("net/ipv4/ip_forward", "1")?;
        self.router.bridge("br0")?;
        self.router.address("br0", ROUTER, 24)?;
        for (node, port, address) in [(&self.node, "node0", NODE), (&self.node2, "node20", NODE2)] {
            node.sysctl("net/ipv4/ip_forward", "1")?;
            veth(node, "eth0", &self.router, port)?;
            self.router.enslave(port, "br0")?;
            node.address("eth0", address, 24)?;
            node.route_via(Ipv4Addr::UNSPECIFIED, 0, ROUTER)?;
        }
        for network in [Ipv4Addr::new(10, 96, 0, 0), Ipv4Addr::new(203, 0, 113, 0)] {
            let prefix = if network.octets()[0] == 10 { 16 } else { 24 };
            self.router.route_via(network, prefix, NODE)?;
        }
        if peer_programs {
            self.programs.push(PassProgram::attach(&self.router, "node0")?);
        }
        Ok(())
    }

    fn link_nodes(&mut self, link: RemoteLink) -> Result<()> {
        let remote_pods = Ipv4Addr::new(10, 244, 2, 0);
        let local_pods = Ipv4Addr::new(10, 244, 1, 0);
        let RemoteLink::Direct { peer_program } = link else {
            self.node.route_via(remote_pods, 24, NODE2)?;
            return self.node2.route_via(local_pods, 24, NODE);
        };
        veth(&self.node, "eth1", &self.node2, "eth1")?;
        self.node.address("eth1", NODE_DIRECT, 24)?;
        self.node2.address("eth1", NODE2_DIRECT, 24)?;
        self.node.route_via(remote_pods, 24, NODE2_DIRECT)?;
        self.node2.route_via(local_pods, 24, NODE_DIRECT)?;
        if peer_program {
            self.programs.push(PassProgram::attach(&self.node2, "eth1")?);
        }
        Ok(())
    }

    /// Links a pod as a bridge-less CNI with host-local addresses does: one veth `podN` on its node, one host route.
    pub fn add_pod(&mut self, local: bool, number: usize) -> Result<()> {
        let (host, kind, node) =
            if local { (&self.node, "local", "node") } else { (&self.node2, "remote", "node2") };
        let gateway = POD_GATEWAYS[usize::from(!local)];
        let [a, b, c, _] = gateway.octets();
        let last = u8::try_from(10 + number).context("more pods than addresses")?;
        let address = Ipv4Addr::new(a, b, c, last);
        let (name, device) = (format!("{kind}-{number}"), format!("pod{number}"));
        let namespace = Namespace::new(&name)?;
        veth(host, &device, &namespace, "eth0")?;
        host.address(&device, gateway, 32)?;
        host.route_dev(address, 32, &device)?;
        namespace.address("eth0", address, 32)?;
        namespace.route_dev(gateway, 32, "eth0")?;
        namespace.route_via(Ipv4Addr::UNSPECIFIED, 0, gateway)?;
        let server = Server::start(&namespace, &name, address)?;
        self.pods.push(Pod { namespace, server, node });
        Ok(())
    }
}

/// Returns the Service every standard world publishes: ServiceIP, NodePorts, an external and a load-balancer address.
pub fn standard_service() -> Service {
    let mut service = Service::new("web", CLUSTER_IP)
        .port("http", "TCP", SERVICE_HTTP, HTTP_PORT, NODE_PORT_HTTP)
        .port("echo", "UDP", SERVICE_UDP, UDP_PORT, NODE_PORT_UDP);
    service.external_ips.push(EXTERNAL_IP);
    service.load_balancer_ips.push(LOAD_BALANCER_IP);
    service
}

/// Returns the Node objects of the world.
pub fn nodes() -> [String; 2] {
    [node_yaml("node", NODE, "10.244.1.0/24"), node_yaml("node2", NODE2, "10.244.2.0/24")]
}

/// Returns every HTTP frontend of the standard Service, with the name of its kind.
pub fn http_frontends() -> [(&'static str, SocketAddr); 4] {
    frontends(SERVICE_HTTP, NODE_PORT_HTTP)
}

/// Returns every UDP frontend of the standard Service, with the name of its kind.
pub fn udp_frontends() -> [(&'static str, SocketAddr); 4] {
    frontends(SERVICE_UDP, NODE_PORT_UDP)
}

fn frontends(port: u16, node_port: u16) -> [(&'static str, SocketAddr); 4] {
    [
        ("ClusterIP", CLUSTER_IP, port),
        ("NodePort", NODE, node_port),
        ("external IP", EXTERNAL_IP, port),
        ("load-balancer IP", LOAD_BALANCER_IP, port),
    ]
    .map(|(kind, address, port)| (kind, SocketAddrV4::new(address, port).into()))
}
