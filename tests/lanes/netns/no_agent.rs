//! What programs do that nobody looks after any more.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result};
use xdp_agent_tests::lab::{capture::PacketSocket, fragments::datagram, servers::pattern_of, wait_for};

use crate::{
    dual,
    setup::{Setup, says},
    two_backends::{CLIENT, NODE, Place, TwoBackends},
};

/// A port of the node's own, which no Service has.
const OWN: u16 = 9_999;
const LENGTH: usize = 2_000;
/// Datagrams in a row that have to come.
const DATAGRAMS: u16 = 10;

each_mode!(fragments_to_the_node_itself_come_in_any_order_without_an_agent);
fn fragments_to_the_node_itself_come_in_any_order_without_an_agent(setup: Setup) -> Result<()> {
    let world = TwoBackends::build(setup, Place::Elsewhere)?;
    world.publish(&[0])?;
    let agent = world.start_agent(&[])?;
    let ends = dual::each(CLIENT).into_iter().zip(dual::each(NODE));
    let ends: Vec<(IpAddr, IpAddr)> = ends.collect();
    for &(from, to) in &ends {
        in_reverse(&world, from, to, 1)?;
    }
    agent.kill()?;
    for (from, to) in ends {
        // Programs need a second to find out, or until the ring is full.
        wait_for("fragments to reach the node again", Duration::from_secs(10), || {
            in_reverse(&world, from, to, 1_000)
        })?;
        in_reverse(&world, from, to, 2_000)?;
    }
    // Those that were held for nobody are not put together with later ones.
    let agent = world.start_agent(&[])?;
    says(&agent.log(), &["an earlier agent has left fragments"])?;
    agent.stop()
}

/// Sends datagrams to the node with their fragments reversed; all of them have to come.
fn in_reverse(world: &TwoBackends, from: IpAddr, to: IpAddr, first: u16) -> Result<()> {
    let macs = (world.client.mac("eth0")?, world.node.mac("out0")?);
    let wire = PacketSocket::open(&world.client, "eth0")?;
    let socket = world.node.run(|| UdpSocket::bind((to, OWN)))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let mut room = [0; LENGTH];
    for number in 0..DATAGRAMS {
        let ends = (SocketAddr::new(from, 45_000), SocketAddr::new(to, OWN));
        let frames = datagram(macs, ends, (first + number).into(), &pattern_of(LENGTH), 720)?;
        for frame in frames.iter().rev() {
            wire.send(frame)?;
        }
        socket.recv(&mut room).with_context(|| format!("datagram {number} to {to}"))?;
    }
    Ok(())
}
