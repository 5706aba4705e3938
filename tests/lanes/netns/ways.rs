//! Several ways to a backend: flows share them, or follow their type of service, as the kernel would.

use std::{
    net::{Ipv4Addr, Ipv6Addr, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use xdp_agent_tests::lab::{stay_on, wait_for};

use crate::{
    dual,
    setup::Setup,
    two_backends::{Place, Talk, TwoBackends, VIP, at},
};

/// A host that both of the node's neighbours stand for.
const SHARED: dual::Both = (Ipv4Addr::new(10, 99, 0, 1), Ipv6Addr::new(0x2001, 0xdb8, 0x99, 0, 0, 0, 0, 1));
const CLIENTS: u8 = 64;
/// A type of service (RFC 1349), in the bits of it that routes may ask for.
const LOW_DELAY: u8 = 0x10;
const LEARN_TIMEOUT: Duration = Duration::from_secs(5);

each_mode!(flows_share_equal_ways, false);
fn flows_share_equal_ways(setup: Setup) -> Result<()> {
    let world = behind_both(setup)?;
    world.node.route_by_either(SHARED.0, &[at(0, 2).0, at(1, 2).0])?;
    let agent = world.start_agent(&[])?;
    let mut talks = Vec::new();
    for host in 10..10 + CLIENTS {
        let from = Ipv4Addr::new(198, 51, 100, host);
        world.client.address("eth0", from, 24)?;
        talks.push(Talk::udp_from(&world.client, from.into(), VIP.0.into())?);
    }
    for round in 0..3 {
        let mut second = 0;
        for talk in &mut talks {
            second += talk.ask()?;
        }
        // With as many flows a fair coin is outside once in a million times.
        ensure!(
            (12..=52).contains(&second),
            "round {round}: {second} of {CLIENTS} flows go by the second way"
        );
    }
    agent.stop()
}

each_mode!(flows_follow_a_route_for_their_type_of_service_that_comes_while_they_last, false);
fn flows_follow_a_route_for_their_type_of_service_that_comes_while_they_last(setup: Setup) -> Result<()> {
    let world = behind_both(setup)?;
    world.node.route_for_service_type(SHARED.0, 0, at(0, 2).0)?;
    let agent = world.start_agent(&[])?;
    // Next hops are known per CPU.
    stay_on(0)?;
    let mut talks = [Talk::udp(&world.client, VIP.0.into())?, Talk::udp(&world.client, VIP.0.into())?];
    if let Talk::Udp(socket) = &talks[1] {
        setsockopt(socket, sockopt::Ipv4Tos, &LOW_DELAY.into())?;
    }
    let mut ways = || -> Result<[usize; 2]> { Ok([talks[0].ask()?, talks[1].ask()?]) };
    for _ in 0..3 {
        ensure!(ways()? == [0, 0], "by the one route there is");
    }
    world.node.route_for_service_type(SHARED.0, LOW_DELAY, at(1, 2).0)?;
    wait_for("the second route to be followed", LEARN_TIMEOUT, || {
        ensure!(ways()? == [0, 1], "all by the first");
        Ok(())
    })?;
    for _ in 0..3 {
        ensure!(ways()? == [0, 1], "each by its own");
    }
    agent.stop()
}

/// A world where both of the node's neighbours stand for one host, the Service's only backend.
fn behind_both(setup: Setup) -> Result<TwoBackends> {
    let world = TwoBackends::without_servers(setup, Place::Elsewhere)?;
    for (number, host) in (0..).zip(&world.backends) {
        host.address("eth0", SHARED.0, 32)?;
        let socket = host.run(|| UdpSocket::bind((SHARED.0, dual::TARGET)))?;
        thread::spawn(move || {
            while let Ok((_, peer)) = socket.recv_from(&mut [0; 8]) {
                // Who is not answered says so.
                let _ = socket.send_to(&[number], peer);
            }
        });
    }
    world.publish_behind_both(SHARED)?;
    Ok(world)
}
