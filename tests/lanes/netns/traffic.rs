//! Ordinary clients get every byte, through every kind of frontend, from backends on this node and elsewhere.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;
use xdp_agent_tests::lab::block_on;
use xdp_agent_tests::lab::clients::{HttpConnection, UdpClient, Whoami};
use xdp_agent_tests::lab::servers::pattern_of;
use xdp_agent_tests::lab::world::{http_frontends, udp_frontends};

use crate::setup::{Setup, check_peer, connection_to, counted, socket_to};

const CONNECTIONS: usize = 1_000;
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
const PORTS_FIRST: u16 = 20_000;
const PORTS: u16 = 20;
const DATAGRAM_MAX: usize = 1_400;

each_mode_and_offload!(http_bodies_arrive_intact);
fn http_bodies_arrive_intact(setup: Setup) -> Result<()> {
    let running = setup.start()?;
    for (kind, target) in http_frontends() {
        for place in ["local", "remote"] {
            let mut connection =
                block_on(connection_to(&running.world.client, target, place)).context(kind)?;
            for length in [1, 1 << 20] {
                let backend = block_on(connection.bytes(length, BODY_TIMEOUT)).context(kind)?;
                ensure!(backend.starts_with(place), "{kind}: the connection moved to {backend}");
            }
        }
    }
    Ok(())
}

each_mode_and_offload!(a_body_of_100_mib_arrives_intact);
fn a_body_of_100_mib_arrives_intact(setup: Setup) -> Result<()> {
    let running = setup.start()?;
    let [(_, cluster_ip), (_, node_port), ..] = http_frontends();
    for (place, target) in [("local", cluster_ip), ("remote", node_port)] {
        let mut connection = block_on(connection_to(&running.world.client, target, place))?;
        let backend = block_on(connection.bytes(100 << 20, BODY_TIMEOUT)).context(place)?;
        ensure!(backend.starts_with(place), "the connection moved to {backend}");
    }
    Ok(())
}

each_mode_and_offload!(a_thousand_concurrent_connections_are_all_answered);
fn a_thousand_concurrent_connections_are_all_answered(setup: Setup) -> Result<()> {
    let running = setup.start()?;
    let answers = block_on(async {
        let mut opening = JoinSet::new();
        for number in 0..CONNECTIONS {
            let client = running.world.client.clone();
            let (_, target) = http_frontends()[number % 4];
            opening.spawn(async move { HttpConnection::open(&client, target).await });
        }
        let mut asking = JoinSet::new();
        // All of them are open before the first request goes out.
        for connection in opening.join_all().await {
            let mut connection = connection?;
            asking.spawn(async move { Ok((connection.whoami().await?, connection)) });
        }
        asking.join_all().await.into_iter().collect::<Result<Vec<(Whoami, HttpConnection)>>>()
    })?;
    ensure!(answers.len() == CONNECTIONS);
    answers.iter().try_for_each(|(whoami, _)| check_peer(whoami))?;
    let used: BTreeSet<_> = answers.iter().map(|(whoami, _)| whoami.backend.as_str()).collect();
    ensure!(used.len() == running.world.pods.len(), "only {used:?} were used");
    Ok(())
}

each_mode!(a_backend_on_this_node_sees_the_client_with_its_port);
fn a_backend_on_this_node_sees_the_client_with_its_port(setup: Setup) -> Result<()> {
    let running = setup.start()?;
    let client = &running.world.client;
    for (number, ((kind, http), (_, udp))) in (0..).zip(http_frontends().into_iter().zip(udp_frontends())) {
        // Ports differ between frontends, so that none is taken at a backend already.
        for port in (PORTS_FIRST + number * PORTS..).take(PORTS.into()) {
            let mut connection = block_on(HttpConnection::open_from(client, http, port)).context(kind)?;
            let socket = block_on(UdpClient::open(client, udp, port))?;
            for whoami in [block_on(connection.whoami()), block_on(socket.whoami())] {
                let whoami = whoami.context(kind)?;
                check_peer(&whoami)?;
                let kept = whoami.backend.starts_with("remote") || whoami.peer.port() == port;
                ensure!(kept, "{kind}: {} saw port {} instead of {port}", whoami.backend, whoami.peer.port());
            }
        }
    }
    Ok(())
}

each_mode_and_offload!(datagrams_of_every_size_come_back_unchanged);
fn datagrams_of_every_size_come_back_unchanged(setup: Setup) -> Result<()> {
    let running = setup.start()?;
    let payload = pattern_of(DATAGRAM_MAX);
    block_on(async {
        for (kind, target) in udp_frontends() {
            let local = socket_to(&running.world.client, target, "local").await.context(kind)?;
            let remote = socket_to(&running.world.client, target, "remote").await.context(kind)?;
            for length in 1..=DATAGRAM_MAX {
                let (local, remote) =
                    tokio::join!(local.echo(&payload[..length]), remote.echo(&payload[..length]));
                local.context("local").context(kind)?;
                remote.context("remote").context(kind)?;
            }
        }
        Ok::<_, anyhow::Error>(())
    })?;
    for place in [true, false] {
        let pods = running.world.pods.iter().filter(|pod| pod.is_local() == place);
        let sizes: BTreeSet<_> =
            pods.flat_map(|pod| pod.server.udp_served()).map(|served| served.length).collect();
        ensure!((1..=DATAGRAM_MAX).all(|length| sizes.contains(&length)), "local={place}: a size is missing");
    }
    Ok(())
}

each_mode!(packets_are_counted_by_their_way_and_none_is_dropped);
fn packets_are_counted_by_their_way_and_none_is_dropped(setup: Setup) -> Result<()> {
    // With complete checksums nothing keeps XDP from sending to the second node by itself.
    let running = Setup { tx_offload: false, ..setup }.start()?;
    for (kind, target) in http_frontends() {
        for place in ["local", "remote"] {
            block_on(connection_to(&running.world.client, target, place)).context(kind)?;
        }
    }
    for event in ["transmitted", "delivered", "restored", "flow_new", "flow_established"] {
        counted(&running.agent, event)?;
    }
    let drops =
        running.agent.metrics()?.into_iter().filter(|(key, value)| key.contains("drop") && *value > 0.0);
    let drops: Vec<_> = drops.collect();
    ensure!(drops.is_empty(), "{drops:?}");
    Ok(())
}
