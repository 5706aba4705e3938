//! One client port to two frontends that lead to the same backend: two connections, not one.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::block_on;
use xdp_agent_tests::lab::clients::{HttpConnection, UdpClient};
use xdp_agent_tests::lab::world::{WorldOptions, http_frontends, udp_frontends};

use crate::setup::Setup;

const CLIENT_PORT: u16 = 45_678;

each_mode!(one_client_port_to_every_frontend_of_one_remote_backend);
fn one_client_port_to_every_frontend_of_one_remote_backend(setup: Setup) -> Result<()> {
    every_frontend_at_once(setup, WorldOptions { local: 0, remote: 1, ..WorldOptions::default() })
}

each_mode!(one_client_port_to_every_frontend_of_one_local_backend);
fn one_client_port_to_every_frontend_of_one_local_backend(setup: Setup) -> Result<()> {
    every_frontend_at_once(setup, WorldOptions { local: 1, remote: 0, ..WorldOptions::default() })
}

each_mode!(one_client_port_for_datagrams_to_every_frontend_of_one_remote_backend);
fn one_client_port_for_datagrams_to_every_frontend_of_one_remote_backend(setup: Setup) -> Result<()> {
    let running = setup.start_with(WorldOptions { local: 0, remote: 1, ..WorldOptions::default() })?;
    // A connected socket takes answers from its frontend only, so a mixed-up answer is a missing answer here.
    for (kind, target) in udp_frontends() {
        let socket = block_on(UdpClient::open(&running.world.client, target, CLIENT_PORT))?;
        block_on(socket.echo(kind.as_bytes())).context(kind)?;
    }
    Ok(())
}

fn every_frontend_at_once(setup: Setup, options: WorldOptions) -> Result<()> {
    let running = setup.start_with(options)?;
    let mut connections: Vec<(&str, SocketAddr, HttpConnection)> = Vec::new();
    for (kind, target) in http_frontends() {
        let opening = HttpConnection::open_from(&running.world.client, target, CLIENT_PORT);
        connections.push((kind, target, block_on(opening).context(kind)?));
    }
    // All are open at once now; each must still answer for itself, and the backend must see different peers.
    let mut peers = Vec::new();
    for (kind, _, connection) in &mut connections {
        peers.push(block_on(connection.whoami()).context(*kind)?.peer);
    }
    for (kind, _, connection) in &mut connections {
        block_on(connection.bytes(100_000, std::time::Duration::from_secs(10))).context(*kind)?;
    }
    let count = peers.len();
    peers.sort();
    peers.dedup();
    ensure!(peers.len() == count, "the backend saw only {peers:?}");
    Ok(())
}
