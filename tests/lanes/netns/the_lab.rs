//! The lab itself, with plain kernel routing and no agent: what these cases find is not the agent's doing.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use xdp_agent_tests::lab::block_on;
use xdp_agent_tests::lab::capture::{Capture, PacketSocket};
use xdp_agent_tests::lab::clients::{HttpConnection, UdpClient};
use xdp_agent_tests::lab::packets::{Ends, verify_checksums};
use xdp_agent_tests::lab::servers::{HTTP_PORT, UDP_PORT, pattern_of};
use xdp_agent_tests::lab::snapshot::Snapshot;
use xdp_agent_tests::lab::wait_for;
use xdp_agent_tests::lab::world::{CLIENT, NODE, ROUTER, RemoteLink, World, WorldOptions};

#[test]
fn pods_of_both_nodes_are_reached_by_routing_alone() -> Result<()> {
    for remote_link in [RemoteLink::Segment, RemoteLink::Direct { peer_program: true }] {
        let world = World::build(WorldOptions { remote_link, ..WorldOptions::default() })?;
        for pod in &world.pods {
            let target = SocketAddr::from((pod.server.address(), HTTP_PORT));
            let mut connection = block_on(HttpConnection::open(&world.node, target))?;
            ensure!(block_on(connection.whoami())?.backend == pod.server.name());
            ensure!(block_on(connection.bytes(1 << 20, Duration::from_secs(20)))? == pod.server.name());
            let socket = block_on(UdpClient::open(&world.node, (pod.server.address(), UDP_PORT), 0))?;
            block_on(socket.echo(&pattern_of(1_400)))?;
            ensure!(pod.server.udp_served()[0].length == 1_400);
        }
    }
    Ok(())
}

#[test]
fn offload_decides_whether_frames_carry_complete_checksums() -> Result<()> {
    for tx_offload in [true, false] {
        let world =
            World::build(WorldOptions { local: 0, remote: 0, tx_offload, ..WorldOptions::default() })?;
        let capture = Capture::start(&world.node, "eth0")?;
        // Nothing listens there: the refusal proves that the frame came through and was right for the kernel.
        ensure!(block_on(HttpConnection::open(&world.client, (NODE, 22))).is_err());
        let frames = capture.stop();
        let from_client = [CLIENT.octets(), NODE.octets()].concat();
        let syn =
            frames.iter().find(|seen| !seen.outgoing && seen.frame.get(26..34) == Some(&from_client[..]));
        let syn = syn.ok_or_else(|| anyhow::anyhow!("no SYN among {} frames", frames.len()))?;
        ensure!(verify_checksums(&syn.frame).is_err() == tx_offload, "tx_offload={tx_offload}");
    }
    Ok(())
}

#[test]
fn frames_sent_on_one_end_are_captured_on_the_other() -> Result<()> {
    let world = World::build(WorldOptions { local: 0, remote: 0, ..WorldOptions::default() })?;
    let capture = Capture::start(&world.node, "eth0")?;
    let ends = Ends { mac: ([2, 0, 0, 0, 0, 9], world.node.mac("eth0")?), ip: (ROUTER, NODE) };
    let frame = ends.udp((1_000, 2_000), b"over the wire");
    PacketSocket::open(&world.router, "node0")?.send(&frame)?;
    ensure!(capture.stop().iter().any(|seen| !seen.outgoing && seen.frame == frame));
    Ok(())
}

#[test]
fn a_snapshot_notices_a_route_an_address_and_a_setting() -> Result<()> {
    let world = World::build(WorldOptions { local: 0, remote: 0, ..WorldOptions::default() })?;
    let before = Snapshot::take(&world.node)?;
    ensure!(before.difference(&Snapshot::take(&world.node)?).is_empty());
    world.node.address("eth0", [192, 168, 50, 99], 24)?;
    world.node.sysctl("net/ipv4/conf/eth0/send_redirects", "0")?;
    let difference = before.difference(&Snapshot::take(&world.node)?);
    for part in ["+ address", "+ route", "send_redirects = 0"] {
        ensure!(difference.iter().any(|line| line.contains(part)), "no {part} in {difference:#?}");
    }
    Ok(())
}

#[test]
fn flushed_neighbours_are_learned_again_by_the_next_packet() -> Result<()> {
    let world = World::build(WorldOptions { local: 0, remote: 1, ..WorldOptions::default() })?;
    let target = SocketAddr::from((world.pods[0].server.address(), HTTP_PORT));
    block_on(HttpConnection::open(&world.node, target))?;
    ensure!(!world.node.neighbours()?.is_empty());
    wait_for("the flush", Duration::from_secs(5), || {
        world.flush_neighbours()?;
        ensure!(world.node.neighbours()?.is_empty());
        Ok(())
    })?;
    block_on(HttpConnection::open(&world.node, target))?;
    ensure!(!world.node.neighbours()?.is_empty());
    Ok(())
}
