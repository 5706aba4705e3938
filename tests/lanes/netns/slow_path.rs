//! Where XDP cannot transmit, the kernel forwards: served all the same, and counted as such.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::agent::{Agent, Mode};
use xdp_agent_tests::lab::block_on;
use xdp_agent_tests::lab::capture::{Capture, Captured};
use xdp_agent_tests::lab::servers::pattern_of;
use xdp_agent_tests::lab::world::{RemoteLink, WorldOptions, http_frontends, udp_frontends};

use crate::setup::{Running, Setup, connection_to, counted, socket_to};

const ICMP: u8 = 1;
const ICMP_REDIRECT: u8 = 5;

each_mode_and_offload!(a_second_node_behind_a_peer_without_a_program_is_served);
fn a_second_node_behind_a_peer_without_a_program_is_served(setup: Setup) -> Result<()> {
    let running = start(setup, RemoteLink::Direct { peer_program: false }, true)?;
    serve_everything(&running)?;
    went(&running, setup, "slow_path")
}

each_mode_and_offload!(a_node_none_of_whose_peers_has_a_program_is_served);
fn a_node_none_of_whose_peers_has_a_program_is_served(setup: Setup) -> Result<()> {
    let running = start(setup, RemoteLink::Direct { peer_program: false }, false)?;
    serve_everything(&running)?;
    went(&running, setup, "slow_path")
}

each_mode_and_offload!(a_second_node_behind_another_interface_is_served);
fn a_second_node_behind_another_interface_is_served(setup: Setup) -> Result<()> {
    let running = start(setup, RemoteLink::Direct { peer_program: true }, true)?;
    serve_everything(&running)?;
    went(&running, setup, "redirected")
}

each_mode_and_offload!(a_segment_whose_device_has_no_program_is_served);
fn a_segment_whose_device_has_no_program_is_served(setup: Setup) -> Result<()> {
    let running = start(setup, RemoteLink::Segment, false)?;
    let capture = Capture::start(&running.world.client, "eth0")?;
    serve_everything(&running)?;
    let redirects = capture.stop().into_iter().filter(is_icmp_redirect).count();
    ensure!(redirects == 0, "the client received {redirects} ICMP redirects");
    went(&running, setup, "slow_path")
}

fn start(setup: Setup, remote_link: RemoteLink, peer_programs: bool) -> Result<Running> {
    let world = setup.world(WorldOptions { remote_link, peer_programs, ..WorldOptions::default() })?;
    world.publish()?;
    let mut options = world.agent_options(setup.mode);
    if remote_link != RemoteLink::Segment {
        options.interfaces.push("eth1".into());
    }
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    for interface in &options.interfaces {
        setup.check_mode(&agent, interface)?;
    }
    Ok(Running { agent, world })
}

fn serve_everything(running: &Running) -> Result<()> {
    let client = &running.world.client;
    for (kind, target) in http_frontends() {
        for place in ["local", "remote"] {
            let mut connection = block_on(connection_to(client, target, place)).context(kind)?;
            block_on(connection.bytes(1 << 20, Duration::from_secs(20))).context(place).context(kind)?;
        }
    }
    for (kind, target) in udp_frontends() {
        for place in ["local", "remote"] {
            let socket = block_on(socket_to(client, target, place)).context(kind)?;
            for length in [1, 64, 1_400] {
                block_on(socket.echo(&pattern_of(length))).context(place).context(kind)?;
            }
        }
    }
    Ok(())
}

/// Fails unless packets are counted to have gone this way, where mode and checksums leave no other.
///
/// Generic XDP transmits to any device, and frames with a pseudo-header sum only are finished by the kernel anyway.
fn went(running: &Running, setup: Setup, event: &str) -> Result<()> {
    if setup.mode == Mode::Native && !setup.tx_offload {
        return counted(&running.agent, event);
    }
    Ok(())
}

fn is_icmp_redirect(seen: &Captured) -> bool {
    !seen.outgoing && seen.frame.get(23) == Some(&ICMP) && seen.frame.get(34) == Some(&ICMP_REDIRECT)
}
