//! Session affinity over time: as long as a client comes back, and no longer.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use xdp_agent_tests::lab::{holds_for, wait_for};

use crate::{
    dual::{Both, each},
    setup::Setup,
    two_backends::{Place, Talk, TwoBackends, VIP},
};

const AFFINITY: &str =
    "  sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 4}}\n";
/// More than twice the time-out.
const LONG: Duration = Duration::from_secs(10);
/// Clients that all draw the same of two backends do so by luck once in 2^24.
const IDLE_CLIENTS: u16 = 24;
/// Those, and as many that come later.
const CLIENTS: u16 = 2 * IDLE_CLIENTS;
const SEES_CHANGES: Duration = Duration::from_secs(5);

fn client(number: u16) -> Both {
    let host = 100 + number;
    (Ipv4Addr::new(198, 51, 100, host as u8), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, host))
}

/// Which backends new connections and new sockets of the first client meet.
fn met(world: &TwoBackends, vip: IpAddr) -> Result<[usize; 2]> {
    Ok([Talk::tcp(&world.client, vip)?.ask()?, Talk::udp(&world.client, vip)?.ask()?])
}

fn ask_from(world: &TwoBackends, number: u16, family: usize) -> Result<usize> {
    let (from, vip) = (each(client(number))[family], each(VIP)[family]);
    Ok(Talk::udp_from(&world.client, from, vip)?.ask()?)
}

each_mode!(a_client_keeps_its_backend_while_it_comes_back_within_the_time_and_draws_again_after);
fn a_client_keeps_its_backend_while_it_comes_back_within_the_time_and_draws_again_after(
    setup: Setup,
) -> Result<()> {
    let world = TwoBackends::build(setup, Place::Elsewhere)?;
    for number in 0..CLIENTS {
        let (v4, v6) = client(number);
        world.client.address("eth0", v4, 24)?;
        world.client.address("eth0", v6, 64)?;
    }
    world.publish_with(&[0], AFFINITY)?;
    let agent = world.start_agent(&[])?;
    for vip in each(VIP) {
        ensure!(met(&world, vip)? == [0, 0]);
    }
    for family in [0, 1] {
        for number in 0..IDLE_CLIENTS {
            ensure!(ask_from(&world, number, family)? == 0);
        }
    }
    // From here on, whoever is not remembered may meet either.
    world.publish_with(&[0, 1], AFFINITY)?;
    let began = Instant::now();
    holds_for(LONG, || {
        for vip in each(VIP) {
            let met = met(&world, vip)?;
            ensure!(met == [0, 0], "after {:?} {vip} has become {met:?}", began.elapsed());
        }
        Ok(())
    })?;
    for family in [0, 1] {
        let mut now = Vec::new();
        for number in 0..IDLE_CLIENTS {
            let backend = ask_from(&world, number, family)?;
            ensure!(ask_from(&world, number, family)? == backend, "client {number} has drawn again at once");
            now.push(backend);
        }
        ensure!(now.contains(&1), "nobody was forgotten");
    }
    world.publish_with(&[1], AFFINITY)?;
    for vip in each(VIP) {
        wait_for("the other backend to be met", SEES_CHANGES, || {
            let met = met(&world, vip)?;
            ensure!(met == [1, 1], "{met:?}");
            Ok(())
        })?;
    }
    // The one that comes back has lost its clients, and may have others.
    world.publish_with(&[0, 1], AFFINITY)?;
    holds_for(SEES_CHANGES, || {
        for vip in each(VIP) {
            let met = met(&world, vip)?;
            ensure!(met == [1, 1], "{vip} has gone back: {met:?}");
        }
        Ok(())
    })?;
    for family in [0, 1] {
        let fresh = (IDLE_CLIENTS..CLIENTS).map(|number| ask_from(&world, number, family));
        ensure!(fresh.collect::<Result<Vec<_>>>()?.contains(&0), "the one that came back serves nobody");
    }
    agent.stop()
}
