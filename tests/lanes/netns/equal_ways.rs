//! Equal ways to a backend: flows share them as the kernel would.

use std::{
    net::{Ipv4Addr, Ipv6Addr, UdpSocket},
    thread,
};

use anyhow::{Result, ensure};

use crate::{
    dual,
    setup::Setup,
    two_backends::{Place, Talk, TwoBackends, VIP, at},
};

/// A host that both of the node's neighbours stand for.
const SHARED: dual::Both = (Ipv4Addr::new(10, 99, 0, 1), Ipv6Addr::new(0x2001, 0xdb8, 0x99, 0, 0, 0, 0, 1));
const CLIENTS: u8 = 64;

each_mode!(flows_share_equal_ways, false);
fn flows_share_equal_ways(setup: Setup) -> Result<()> {
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
