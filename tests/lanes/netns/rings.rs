//! Rings change under traffic: connections stay where they are, and new ones never meet half a ring.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::block_on;
use xdp_agent_tests::lab::clients::{HttpConnection, UdpClient, Whoami};
use xdp_agent_tests::lab::load::{Kind, Load};
use xdp_agent_tests::lab::manifests::Endpoint;
use xdp_agent_tests::lab::world::{World, WorldOptions, http_frontends, udp_frontends};

use crate::setup::Setup;

/// Ring changes while the kept connections are asked after each.
const CHANGES: usize = 12;
/// Ring changes while new connections are made all the time.
const HAMMER_CHANGES: usize = 40;
const WORLD: WorldOptions = WorldOptions {
    local: 3,
    remote: 3,
    tx_offload: true,
    peer_programs: true,
    remote_link: xdp_agent_tests::lab::world::RemoteLink::Segment,
};
const ANSWERS_TIMEOUT: Duration = Duration::from_secs(30);

each_mode!(a_connection_keeps_its_backend_while_rings_change);
fn a_connection_keeps_its_backend_while_rings_change(setup: Setup) -> Result<()> {
    let running = setup.start_with(WORLD)?;
    let world = &running.world;
    let mut flows = open_flows(world)?;
    for change in 0..CHANGES {
        let endpoints = subset(world, change);
        world.change_endpoints(&running.agent, &endpoints)?;
        for (number, flow) in flows.iter_mut().enumerate() {
            let now = block_on(flow.whoami()).with_context(|| format!("flow {number}, change {change}"))?;
            let is_endpoint =
                endpoints.iter().any(|endpoint| endpoint.address == flow.backend_address(world));
            // A UDP flow leaves a backend that is no endpoint any more; a TCP connection never moves.
            if matches!(flow.connection, Connection::Udp(_)) && !is_endpoint {
                flow.first = now;
                continue;
            }
            ensure!(
                now == flow.first,
                "change {change} moved flow {number} from {:?} to {now:?}",
                flow.first
            );
        }
    }
    Ok(())
}

each_mode!(connecting_never_fails_while_rings_change);
fn connecting_never_fails_while_rings_change(setup: Setup) -> Result<()> {
    let running = setup.start_with(WORLD)?;
    let world = &running.world;
    let [(_, cluster_ip), (_, node_port), ..] = http_frontends();
    let loads =
        [cluster_ip, node_port].map(|target| Load::start(&world.client, target, Kind::NewConnections, 4));
    for change in 0..HAMMER_CHANGES {
        let endpoints = subset(world, change);
        world.change_endpoints(&running.agent, &endpoints)?;
    }
    for load in &loads {
        load.wait_answered(100, ANSWERS_TIMEOUT)?;
    }
    for load in loads {
        let report = load.stop();
        report.all_answered()?;
        ensure!(report.by_backend.len() == world.pods.len(), "only {:?} were used", report.by_backend);
    }
    Ok(())
}

struct Flow {
    connection: Connection,
    first: Whoami,
}

enum Connection {
    Tcp(HttpConnection),
    Udp(UdpClient),
}

impl Flow {
    async fn open_tcp(world: &World, target: std::net::SocketAddr) -> Result<Self> {
        let mut connection = HttpConnection::open(&world.client, target).await?;
        let first = connection.whoami().await?;
        Ok(Self { connection: Connection::Tcp(connection), first })
    }

    async fn open_udp(world: &World, target: std::net::SocketAddr) -> Result<Self> {
        let socket = UdpClient::open(&world.client, target, 0).await?;
        let first = socket.whoami().await?;
        Ok(Self { connection: Connection::Udp(socket), first })
    }

    async fn whoami(&mut self) -> Result<Whoami> {
        match &mut self.connection {
            Connection::Tcp(connection) => connection.whoami().await,
            Connection::Udp(socket) => socket.whoami().await,
        }
    }

    fn backend_address(&self, world: &World) -> std::net::Ipv4Addr {
        world.pod(&self.first.backend).map_or(std::net::Ipv4Addr::UNSPECIFIED, |pod| pod.server.address())
    }
}

/// Opens flows of both protocols through every frontend, enough to meet every backend.
fn open_flows(world: &World) -> Result<Vec<Flow>> {
    let mut flows = Vec::new();
    for _ in 0..12 {
        for ((_, http), (_, udp)) in http_frontends().into_iter().zip(udp_frontends()) {
            flows.push(block_on(Flow::open_tcp(world, http))?);
            flows.push(block_on(Flow::open_udp(world, udp))?);
        }
    }
    for pod in &world.pods {
        let name = pod.server.name();
        ensure!(flows.iter().any(|flow| flow.first.backend == name), "no flow reached {name}");
    }
    Ok(flows)
}

/// Chooses endpoints for a step: everything, or all but two neighbours that move around, so that each pod comes and goes.
fn subset(world: &World, step: usize) -> Vec<Endpoint> {
    let count = world.pods.len();
    let left_out = [step % count, (step + 1) % count];
    let kept = world.pods.iter().enumerate();
    kept.filter(|(index, _)| step % 3 == 2 || !left_out.contains(index))
        .map(|(_, pod)| pod.endpoint())
        .collect()
}
