//! A node with a client's pod and a server's pod, and a proxy of one kind.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use xdp_agent_tests::lab::{
    agent::{Agent, AgentOptions, Mode},
    cgroup::Cgroup,
    link,
    manifests::{Endpoint, Manifests, Service, node_yaml},
    netns::{Namespace, PrivateBpffs},
};

use super::{Client, Contestant, Verb};
use crate::sync::{
    peers,
    world::{self, NODE, NODE_ADDRESS, PORT, TARGET_PORT, World},
};

/// In the network of pods, far behind those of the largest world.
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 255, 255, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// Each of half a minute.
const READY_TRIES: usize = 4;
const LOAD_LIMIT: Duration = Duration::from_secs(60);

/// Fields drop in order: processes before their cgroups.
pub(super) struct Place {
    client: Client,
    target: SocketAddr,
    _agent: Option<Agent>,
    _cgroups: [Cgroup; 2],
    _bpffs: PrivateBpffs,
    _manifests: Manifests,
    _namespaces: [Namespace; 4],
}

impl Place {
    /// Builds a node with so many Services of one endpoint each, of which that in the middle is real.
    pub(super) fn build(contestant: Contestant, services: u32) -> Result<Self> {
        let world = World::new(services, 1)?;
        let service = services / 2;
        let server_ip = world.pod_address(world.pods(service)[0]);
        let [node, outside, client, server] =
            ["bench-node", "bench-outside", "bench-client", "bench-server"].map(Namespace::new);
        let (node, outside, client, server) = (node?, outside?, client?, server?);
        node.sysctl("net/ipv4/ip_forward", "1")?;
        link::veth(&node, "eth0", &outside, "eth0")?;
        node.address("eth0", NODE_ADDRESS, 24)?;
        for (device, pod, address) in [("client", &client, CLIENT), ("server", &server, server_ip)] {
            link::veth(&node, device, pod, "eth0")?;
            node.address(device, GATEWAY, 32)?;
            node.route_dev(address, 32, device)?;
            pod.address("eth0", address, 32)?;
            pod.route_dev(GATEWAY, 32, "eth0")?;
            pod.route_via(Ipv4Addr::UNSPECIFIED, 0, GATEWAY)?;
        }
        let listener = server.run(|| TcpListener::bind((server_ip, TARGET_PORT)))?;
        thread::spawn(move || {
            if let Err(error) = super::client::answer(&listener) {
                eprintln!("bench: the server of {contestant:?}: {error:#}");
            }
        });

        let (bpffs, manifests) = (PrivateBpffs::new()?, Manifests::new()?);
        let service_address = (world::cluster_ip(service), PORT).into();
        // Each has one, because sockets in a cgroup may cost more than others: their memory is charged.
        let cgroup = Cgroup::new("bench")?;
        let of_client = cgroup.child("client")?;
        let (target, agent) = match contestant {
            Contestant::Direct | Contestant::Again => ((server_ip, TARGET_PORT).into(), None),
            Contestant::Peer(peer) => {
                node.run(|| peers::fill(peer, &world, LOAD_LIMIT))?;
                (service_address, None)
            }
            Contestant::Ours => {
                write(&manifests, &world)?;
                let mut options = AgentOptions::new(manifests.directory(), Mode::Generic);
                options.node = NODE.into();
                options.cgroup = Some(cgroup.path().to_path_buf());
                let mut agent = Agent::spawn(&node, &bpffs, &options)?;
                wait_ready(&mut agent)?;
                agent.quiet();
                (service_address, Some(agent))
            }
        };
        let client_process = Client::start(&client, &of_client)?;
        Ok(Self {
            client: client_process,
            target,
            _agent: agent,
            _cgroups: [of_client, cgroup],
            _bpffs: bpffs,
            _manifests: manifests,
            _namespaces: [node, outside, client, server],
        })
    }

    pub(super) fn ask(&mut self, verb: Verb, turn: Duration) -> Result<f64> {
        let rate = self.client.ask(verb, self.target, turn)?;
        ensure!(rate > 0.0, "nothing was done in {turn:?}");
        Ok(rate)
    }
}

/// Waits longer than tests do: 20,000 objects in files take a while to read.
fn wait_ready(agent: &mut Agent) -> Result<()> {
    let mut tries = (0..READY_TRIES).map(|_| agent.wait_ready());
    tries.find(|result| result.is_ok()).unwrap_or_else(|| bail!("the agent does not become ready"))
}

/// The objects of the world, as few fields as they can have.
fn write(manifests: &Manifests, world: &World) -> Result<()> {
    let mut objects = vec![node_yaml(NODE, NODE_ADDRESS, "10.128.0.0/24")];
    for number in world.services() {
        let service = Service::new(&world::name(number), world::cluster_ip(number)).port(
            "http",
            "TCP",
            PORT,
            TARGET_PORT,
            world::node_port(number).unwrap_or(0),
        );
        let pods = world.pods(number).iter();
        let endpoints: Vec<Endpoint> = pods
            .map(|&pod| Endpoint::new(world.pod_address(pod), &format!("node-{}", world.node_number(pod))))
            .collect();
        objects.push(service.yaml());
        objects.push(service.slice_yaml(&endpoints));
    }
    manifests.write("objects.yaml", &objects).context("cannot write the objects")
}
