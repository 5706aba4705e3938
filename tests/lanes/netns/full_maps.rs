//! A map that is full costs what does not fit and nothing else, says so, and counts it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::task::JoinSet;
use xdp_agent_tests::lab::agent::{Agent, Mode};
use xdp_agent_tests::lab::clients::HttpConnection;
use xdp_agent_tests::lab::manifests::{Endpoint, Service};
use xdp_agent_tests::lab::world::{World, WorldOptions, http_frontends};
use xdp_agent_tests::lab::{block_on, wait_for};

use crate::{
    dual::{self, TARGET},
    setup::{Setup, connection_to, counted, says},
    two_backends::{Place, Talk, TwoBackends, VIP, at},
};

/// Connections at once, several times what the small map of established flows holds.
const CONNECTIONS: usize = 300;
/// The smallest size the agent accepts for a map.
const SMALLEST: &str = "64";
/// Ports or endpoints that do not fit into such a map.
const FILLER: u16 = 100;
const FILLER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 9, 9);
const REACTION_TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn frontends_that_do_not_fit_are_reported_and_the_others_serve() -> Result<()> {
    let world = World::build(WorldOptions::default())?;
    world.publish()?;
    let agent = start(&world, &["--max-frontends", SMALLEST])?;
    everything_answers(&world)?;
    let many = Service::new("more", FILLER_IP);
    let many =
        (1..=FILLER).fold(many, |service, port| service.port(&format!("p{port}"), "TCP", port, port, 0));
    world.manifests.write("more.yaml", &[many.yaml(), many.slice_yaml(&[])])?;
    reported(&agent, "--max-frontends", "frontends_full")?;
    everything_answers(&world)?;
    world.manifests.remove("more.yaml")?;
    wait_for("the end of the problem", REACTION_TIMEOUT, || {
        ensure!(agent.metric("problems", "frontends_full")? == 0.0);
        Ok(())
    })?;
    agent.stop()
}

#[test]
fn backends_that_do_not_fit_are_reported_and_the_others_serve() -> Result<()> {
    let world = World::build(WorldOptions::default())?;
    world.publish()?;
    let agent = start(&world, &["--max-backends", SMALLEST])?;
    everything_answers(&world)?;
    let many = Service::new("more", FILLER_IP).port("http", "TCP", 80, 8080, 0);
    let endpoints: Vec<_> =
        (1..=FILLER as u8).map(|last| Endpoint::new(Ipv4Addr::new(10, 244, 9, last), "node9")).collect();
    world.manifests.write("more.yaml", &[many.yaml(), many.slice_yaml(&endpoints)])?;
    reported(&agent, "--max-backends", "backends_full")?;
    everything_answers(&world)?;
    agent.stop()
}

#[test]
fn more_connections_than_the_flow_map_holds_are_answered_and_old_ones_go_on() -> Result<()> {
    let world = World::build(WorldOptions::default())?;
    world.publish()?;
    let agent = start(&world, &["--max-established", SMALLEST])?;
    let [(_, target), ..] = http_frontends();
    let mut old = Vec::new();
    for place in ["local", "remote"] {
        old.push((place, block_on(connection_to(&world.client, target, place))?));
    }
    let answered = block_on(async {
        let mut opening = JoinSet::new();
        for _ in 0..CONNECTIONS {
            let client = world.client.clone();
            opening.spawn(async move { HttpConnection::open(&client, target).await });
        }
        let mut answered = 0;
        let mut open = opening.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
        for connection in &mut open {
            connection.whoami().await?;
            answered += 1;
        }
        Ok::<_, anyhow::Error>(answered)
    })?;
    ensure!(answered == CONNECTIONS);
    for (place, connection) in &mut old {
        let backend = block_on(connection.bytes(100_000, Duration::from_secs(10)))?;
        ensure!(backend.starts_with(*place), "the old connection moved to {backend}");
    }
    counted(&agent, "established_full")?;
    agent.stop()
}

/// As few source ports as the agent accepts, and more sockets than those.
const PORTS: &str = "2000-3023";
const SOCKETS: usize = 2_000;
/// Sockets that are to find no port before the case goes on; each waits for an answer that does not come.
const UNSERVED: usize = 3;
/// Sockets that are kept: not all, because a process may not have so many.
const KEPT: usize = 20;

#[test]
fn a_backend_toward_which_no_source_port_is_left_is_named_and_its_flows_go_on() -> Result<()> {
    let world = TwoBackends::build(Setup { mode: Mode::Native, tx_offload: false }, Place::Elsewhere)?;
    world.publish(&[0])?;
    let agent = world.start_agent(&["--snat-ports", PORTS])?;
    for (vip, backend) in dual::each(VIP).into_iter().zip(dual::each(at(0, 2))) {
        let mut served = served_until_ports_run_out(&world, vip)?;
        let name = SocketAddr::new(backend, TARGET);
        let labels = format!(r#"backend="{name}",protocol="UDP""#);
        let named = agent.metric("xdp_agent_snat_exhausted_total", &labels)?;
        ensure!(named as usize == UNSERVED, "{named} for {name} of {:?}", agent.metrics()?);
        for socket in &mut served {
            ensure!(socket.ask()? == 0);
        }
    }
    let drops = agent.metric("xdp_agent_drops_total", r#"reason="snat_exhausted""#)?;
    ensure!(drops as usize == 2 * UNSERVED, "{drops} drops");
    agent.stop()
}

/// The first sockets to a Service that are answered, of as many as there are until some are not.
fn served_until_ports_run_out(world: &TwoBackends, vip: IpAddr) -> Result<Vec<Talk>> {
    let (mut served, mut unserved) = (Vec::new(), 0);
    for _ in 0..SOCKETS {
        let mut socket = Talk::udp(&world.client, vip)?;
        match socket.ask() {
            Ok(_) if served.len() == KEPT => {}
            Ok(_) => served.push(socket),
            Err(_) => unserved += 1,
        }
        if unserved == UNSERVED {
            return Ok(served);
        }
    }
    bail!("{SOCKETS} sockets to {vip} have found ports, {unserved} have not")
}

/// Asks every frontend of the standard Service until both places have answered.
fn everything_answers(world: &World) -> Result<()> {
    for (kind, target) in http_frontends() {
        for place in ["local", "remote"] {
            block_on(connection_to(&world.client, target, place)).context(kind)?;
        }
    }
    Ok(())
}

/// Waits until log and metric say that a map is full, and which flag makes it larger.
fn reported(agent: &Agent, flag: &str, label: &str) -> Result<()> {
    wait_for("a report of the full map", REACTION_TIMEOUT, || {
        says(&agent.log(), &[flag])?;
        counted(agent, label)
    })
}

fn start(world: &World, extra: &[&str]) -> Result<Agent> {
    let mut options = world.agent_options(Mode::Auto);
    options.extra.extend(extra.iter().map(ToString::to_string));
    Agent::start(&world.node, &world.bpffs, &options)
}
