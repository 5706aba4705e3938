//! Forgotten neighbours cost no connection: what XDP cannot resolve, the kernel resolves and delivers.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::block_on;
use xdp_agent_tests::lab::clients::{HttpConnection, UdpClient, Whoami};
use xdp_agent_tests::lab::wait_for;
use xdp_agent_tests::lab::world::{Pod, World, http_frontends, udp_frontends};

use crate::setup::{Running, Setup, check_peer, connection_to, counted};

/// The first retransmission of a SYN comes after one second (RFC 6298), so a faster handshake lost nothing.
const FIRST_RETRANSMISSION: Duration = Duration::from_secs(1);

each_mode_and_offload!(the_first_connection_after_a_flush_succeeds_at_once);
fn the_first_connection_after_a_flush_succeeds_at_once(setup: Setup) -> Result<()> {
    let running = setup.start()?;
    for place in ["local", "remote"] {
        only(&running, place)?;
        for (kind, target) in http_frontends() {
            flush(&running.world)?;
            let whoami =
                connect_at_once(&running.world, target).with_context(|| format!("{kind}, {place}"))?;
            ensure!(whoami.backend.starts_with(place), "{whoami:?}");
        }
    }
    // With a pseudo-header sum only, the frames go to the kernel for that reason already.
    if setup.tx_offload { Ok(()) } else { counted(&running.agent, "slow_path") }
}

each_mode!(the_first_datagram_after_a_flush_is_answered);
fn the_first_datagram_after_a_flush_is_answered(setup: Setup) -> Result<()> {
    let running = setup.start()?;
    for place in ["local", "remote"] {
        only(&running, place)?;
        for (kind, target) in udp_frontends() {
            flush(&running.world)?;
            let socket = block_on(UdpClient::open(&running.world.client, target, 0))?;
            let whoami = block_on(socket.whoami()).with_context(|| format!("{kind}, {place}"))?;
            ensure!(whoami.backend.starts_with(place), "{whoami:?}");
        }
    }
    Ok(())
}

each_mode_and_offload!(an_open_connection_goes_on_after_a_flush_in_both_directions);
fn an_open_connection_goes_on_after_a_flush_in_both_directions(setup: Setup) -> Result<()> {
    let running = setup.start()?;
    for place in ["local", "remote"] {
        let [(_, target), ..] = http_frontends();
        let mut connection = block_on(connection_to(&running.world.client, target, place))?;
        let before = connection.tcp_info()?.retransmits;
        for _ in 0..5 {
            flush(&running.world)?;
            block_on(connection.bytes(100_000, Duration::from_secs(5))).context(place)?;
        }
        let retransmits = connection.tcp_info()?.retransmits - before;
        ensure!(retransmits == 0, "{place}: the client sent {retransmits} segments again");
    }
    Ok(())
}

fn connect_at_once(world: &World, target: SocketAddr) -> Result<Whoami> {
    let mut connection = block_on(HttpConnection::open(&world.client, target))?;
    let handshake = connection.handshake();
    ensure!(handshake < FIRST_RETRANSMISSION, "the handshake took {handshake:?}");
    let whoami = block_on(connection.whoami())?;
    check_peer(&whoami)?;
    let info = connection.tcp_info()?;
    ensure!(info.retransmits == 0, "{info:?}");
    Ok(whoami)
}

/// Publishes only the backends of one place, so that the next connection's backend is known beforehand.
fn only(running: &Running, place: &str) -> Result<()> {
    let pods = running.world.pods.iter().filter(|pod| pod.server.name().starts_with(place));
    let endpoints: Vec<_> = pods.map(Pod::endpoint).collect();
    running.world.change_endpoints(&running.agent, &endpoints)
}

/// Empties the neighbour tables of router, node and second node.
fn flush(world: &World) -> Result<()> {
    wait_for("empty neighbour tables", Duration::from_secs(5), || {
        world.flush_neighbours()?;
        let left = world.node.neighbours()?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}
