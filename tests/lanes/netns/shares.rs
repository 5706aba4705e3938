//! Every backend gets its share, within what Maglev's ring and the luck of the flow hash allow.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use tokio::task::JoinSet;
use xdp_agent_tests::lab::block_on;
use xdp_agent_tests::lab::clients::{HttpConnection, UdpClient};
use xdp_agent_tests::lab::world::{WorldOptions, http_frontends, udp_frontends};

use crate::setup::Setup;

const FLOWS: usize = 1_000;
const BACKENDS: usize = 5;

/// Largest chi-square that is still luck.
///
/// With 5 backends the statistic has 4 degrees of freedom and exceeds 33.4 once in a million fair draws. The ring adds to
/// that: with at least 100 slots per backend Maglev's shares differ from equal ones by about 1 % (Eisenbud et al., NSDI
/// 2016, section 5.3); even 10 % of difference adds only 1000 · 0.1² = 10.
const CHI_SQUARE_MAX: f64 = 43.4;

each_mode!(connections_spread_evenly);
fn connections_spread_evenly(setup: Setup) -> Result<()> {
    let running = setup.start_with(WorldOptions { local: 2, remote: 3, ..WorldOptions::default() })?;
    for (kind, target) in http_frontends() {
        let counts = block_on(async {
            let mut asking = JoinSet::new();
            for _ in 0..FLOWS {
                let client = running.world.client.clone();
                asking.spawn(async move { HttpConnection::open(&client, target).await?.whoami().await });
            }
            count(asking.join_all().await.into_iter().map(|whoami| Ok(whoami?.backend)))
        })?;
        check_shares(kind, &counts)?;
    }
    Ok(())
}

each_mode!(datagram_flows_spread_evenly);
fn datagram_flows_spread_evenly(setup: Setup) -> Result<()> {
    let running = setup.start_with(WorldOptions { local: 2, remote: 3, ..WorldOptions::default() })?;
    for (kind, target) in udp_frontends() {
        let counts = block_on(async {
            // All sockets stay open until the end, so that every flow has a port of its own.
            let mut sockets = Vec::new();
            let mut backends = Vec::new();
            for _ in 0..FLOWS {
                let socket = UdpClient::open(&running.world.client, target, 0).await?;
                backends.push(socket.whoami().await.map(|whoami| whoami.backend));
                sockets.push(socket);
            }
            count(backends)
        })?;
        check_shares(kind, &counts)?;
    }
    Ok(())
}

fn count(backends: impl IntoIterator<Item = Result<String>>) -> Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    for backend in backends {
        *counts.entry(backend?).or_default() += 1;
    }
    Ok(counts)
}

fn check_shares(kind: &str, counts: &BTreeMap<String, usize>) -> Result<()> {
    ensure!(counts.len() == BACKENDS, "{kind}: only {counts:?} were used");
    ensure!(counts.values().sum::<usize>() == FLOWS, "{kind}: {counts:?}");
    let expected = FLOWS as f64 / BACKENDS as f64;
    let chi_square: f64 = counts.values().map(|&count| (count as f64 - expected).powi(2) / expected).sum();
    ensure!(chi_square <= CHI_SQUARE_MAX, "{kind}: chi-square {chi_square:.1} for {counts:?}");
    Ok(())
}
