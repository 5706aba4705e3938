//! Addresses of the node that go while flows come from them.

use std::{
    net::{IpAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use xdp_agent_tests::lab::{agent::Agent, wait_for};

use crate::{
    dual,
    setup::Setup,
    two_backends::{Place, Talk, TwoBackends, VIP, at},
};

/// The agent looks every ten seconds.
const LIMIT: Duration = Duration::from_secs(25);
const ANSWER_TIMEOUT: Duration = Duration::from_millis(200);

each_mode!(flows_of_udp_begin_anew_when_the_node_has_their_address_no_more, false);
fn flows_of_udp_begin_anew_when_the_node_has_their_address_no_more(setup: Setup) -> Result<()> {
    let world = TwoBackends::build(setup, Place::Elsewhere)?;
    world.publish(&[0])?;
    let agent = world.start_agent(&[])?;
    let sockets = sockets(&world)?;
    for socket in [&sockets, &sockets].into_iter().flatten() {
        ask(socket)?;
    }
    renumber(&world)?;
    for socket in &sockets {
        // The client does not pause.
        wait_for("the flow to begin anew", LIMIT, || ask(socket))?;
        for _ in 0..3 {
            ask(socket)?;
        }
    }
    let renewed = agent.metric("xdp_agent_events_total", r#"event="flow_renewed""#)?;
    ensure!(renewed >= 2.0, "{renewed} flows were renewed");
    agent.stop()
}

/// Connections of TCP that leave no room for established flows, and the smallest table that the agent accepts for those. A
/// slot of it is one of four that a key may have, and two entries a connection leave hardly one free.
const CONNECTIONS: usize = 100;
const SMALLEST: &str = "64";
/// Flows that may find room all the same.
const SOCKETS_MAX: usize = 10;

each_mode!(flows_of_udp_that_find_no_room_to_be_established_begin_anew_too, false);
fn flows_of_udp_that_find_no_room_to_be_established_begin_anew_too(setup: Setup) -> Result<()> {
    let world = TwoBackends::build(setup, Place::Elsewhere)?;
    world.publish(&[0])?;
    let agent = world.start_agent(&["--max-established", SMALLEST])?;
    let mut connections = Vec::new();
    for to in dual::each(VIP).into_iter().cycle().take(2 * CONNECTIONS) {
        let mut connection = Talk::tcp(&world.client, to)?;
        ensure!(connection.ask()? == 0);
        connections.push(connection);
    }
    let [v4, v6] = dual::each(VIP).map(|to| without_room(&world, &agent, to));
    let sockets = [v4?, v6?];
    renumber(&world)?;
    for socket in &sockets {
        wait_for("the flow to begin anew", LIMIT, || ask(socket))?;
    }
    agent.stop()
}

/// A socket of the client whose flow finds no room to be established. A place may be left, and a key reach it.
fn without_room(world: &TwoBackends, agent: &Agent, to: IpAddr) -> Result<UdpSocket> {
    let refused = || agent.metric("xdp_agent_events_total", r#"event="established_full""#);
    for _ in 0..SOCKETS_MAX {
        let socket = dual::socket(&world.client, to, ANSWER_TIMEOUT)?;
        let before = refused()?;
        ask(&socket)?;
        ask(&socket)?;
        if refused()? > before {
            return Ok(socket);
        }
    }
    bail!("there was room for {SOCKETS_MAX} flows to {to}")
}

/// A socket of the client for each family.
fn sockets(world: &TwoBackends) -> Result<[UdpSocket; 2]> {
    let [v4, v6] = dual::each(VIP).map(|to| dual::socket(&world.client, to, ANSWER_TIMEOUT));
    Ok([v4?, v6?])
}

fn ask(socket: &UdpSocket) -> Result<()> {
    socket.send(b"?")?;
    socket.recv(&mut [0]).map(drop).with_context(|| format!("no answer to {socket:?}"))
}

/// Gives the node other addresses in a backend's network, which knows them without a gateway.
fn renumber(world: &TwoBackends) -> Result<()> {
    let (before, after) = (at(0, 1), at(0, 9));
    for (old, new, prefix) in
        [(IpAddr::from(before.0), IpAddr::from(after.0), 24), (before.1.into(), after.1.into(), 64)]
    {
        world.node.forget_address("in0", old)?;
        world.node.address("in0", new, prefix)?;
    }
    // Sooner or later the backend asks who has the old one.
    world.backends[0].flush_neighbours().map(drop)
}
