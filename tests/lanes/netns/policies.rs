//! Traffic policies restrict a frontend to the backends of this node.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use xdp_agent_tests::lab::agent::Agent;
use xdp_agent_tests::lab::block_on;
use xdp_agent_tests::lab::clients::{HttpConnection, tcp, whoami_once};
use xdp_agent_tests::lab::manifests::Service;
use xdp_agent_tests::lab::world::{
    Pod, World, WorldOptions, http_frontends, standard_service, udp_frontends,
};

use crate::setup::{Running, Setup, check_peer, counted};

/// With two backends of each kind, 40 connections miss one kind by luck once in 2^40.
const CONNECTIONS: usize = 40;
const SILENCE: Duration = Duration::from_secs(2);
/// Far below the second after which a client would ask again.
const AT_ONCE: Duration = Duration::from_millis(500);

each_mode!(external_traffic_policy_local_keeps_outside_traffic_on_this_node);
fn external_traffic_policy_local_keeps_outside_traffic_on_this_node(setup: Setup) -> Result<()> {
    let running = start(setup, Service { external_traffic_policy: "Local", ..standard_service() })?;
    let [cluster_ip, outside @ ..] = http_frontends();
    for (kind, target) in outside {
        let places = places(&running.world, target)?;
        ensure!(places == ["local"], "{kind}: {places:?}");
    }
    let places = places(&running.world, cluster_ip.1)?;
    ensure!(places == ["local", "remote"], "the ServiceIP follows the other policy: {places:?}");
    Ok(())
}

each_mode!(internal_traffic_policy_local_keeps_the_service_ip_on_this_node);
fn internal_traffic_policy_local_keeps_the_service_ip_on_this_node(setup: Setup) -> Result<()> {
    let running = start(setup, Service { internal_traffic_policy: "Local", ..standard_service() })?;
    let [cluster_ip, node_port, ..] = http_frontends();
    ensure!(places(&running.world, cluster_ip.1)? == ["local"]);
    ensure!(places(&running.world, node_port.1)? == ["local", "remote"]);
    Ok(())
}

each_mode!(a_service_without_endpoints_refuses_at_once_on_every_frontend);
fn a_service_without_endpoints_refuses_at_once_on_every_frontend(setup: Setup) -> Result<()> {
    let running = setup.start()?;
    running.world.change_endpoints(&running.agent, &[])?;
    for (kind, target) in http_frontends() {
        let began = Instant::now();
        let refusal = block_on(tcp(&running.world.client, target, 0)).expect_err("there is no endpoint");
        let why = refusal.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        ensure!(why == Some(ErrorKind::ConnectionRefused), "{kind}: {refusal:#}");
        ensure!(began.elapsed() < AT_ONCE, "{kind}: refused after {:?}", began.elapsed());
    }
    for (kind, target) in udp_frontends() {
        let client = &running.world.client;
        let socket = client.run(|| -> std::io::Result<_> {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.connect(target)?;
            socket.set_read_timeout(Some(SILENCE))?;
            socket.send(b"anybody?")?;
            Ok(socket)
        })?;
        let refusal = socket.recv(&mut [0; 16]).expect_err("there is no endpoint");
        ensure!(refusal.kind() == ErrorKind::ConnectionRefused, "{kind}: {refusal}");
    }
    counted(&running.agent, "no_endpoint")?;
    ensure!(running.agent.metric("events", "answered")? > 0.0, "the refusals were the kernel's");
    Ok(())
}

each_mode!(a_local_policy_without_a_local_endpoint_drops_and_counts);
fn a_local_policy_without_a_local_endpoint_drops_and_counts(setup: Setup) -> Result<()> {
    let world = setup.world(WorldOptions::default())?;
    let remote: Vec<_> = world.pods.iter().filter(|pod| !pod.is_local()).map(Pod::endpoint).collect();
    world.publish_endpoints(&remote)?;
    let running = serve(setup, world, &Service { external_traffic_policy: "Local", ..standard_service() })?;
    let [(_, cluster_ip), _, (_, external_ip), _] = http_frontends();
    ensure!(answers(&running.world, cluster_ip), "the ServiceIP follows the other policy");
    ensure!(!answers(&running.world, external_ip), "a remote backend answers in spite of the policy");
    counted(&running.agent, "no_local_endpoint")
}

/// Asks once, for no longer than a connection that works could ever take.
fn answers(world: &World, target: std::net::SocketAddr) -> bool {
    let asking = async { tokio::time::timeout(SILENCE, whoami_once(&world.client, target)).await };
    matches!(block_on(asking), Ok(Ok(_)))
}

fn start(setup: Setup, service: Service) -> Result<Running> {
    let world = setup.world(WorldOptions::default())?;
    world.publish()?;
    serve(setup, world, &service)
}

/// Starts an agent that finds this Service in place of the standard one.
fn serve(setup: Setup, world: World, service: &Service) -> Result<Running> {
    world.manifests.write("web.yaml", &[service.yaml()])?;
    let agent = Agent::start(&world.node, &world.bpffs, &world.agent_options(setup.mode))?;
    Ok(Running { agent, world })
}

fn places(world: &World, target: std::net::SocketAddr) -> Result<Vec<&'static str>> {
    let mut places = BTreeSet::new();
    for _ in 0..CONNECTIONS {
        let mut connection = block_on(HttpConnection::open(&world.client, target))?;
        let whoami = block_on(connection.whoami())?;
        check_peer(&whoami)?;
        places.insert(if whoami.backend.starts_with("local") { "local" } else { "remote" });
    }
    Ok(places.into_iter().collect())
}
