//! Connections of a pod to a Service, beside direct ones and rules of kube-proxy's form: the same client and the same
//! server in a place each, in turns.
//!
//! A machine with neighbours is never still, so contestants take turns of a fiftieth of a second, and each turn is compared
//! with the direct one of its round only. How much two direct ones differ tells what a figure is worth.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use self::{
    client::{Client, Verb},
    place::Place,
};
use crate::{median, sync::peers::Peer};

mod client;
mod place;

/// The kernel may stand still for seconds while it takes or frees more rules than these have.
const PEER_SERVICES_MAX: u32 = 1_000;

/// Measures what a pod's connections to a Service cost.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Numbers of Services, one of which is measured.
    #[arg(long, value_delimiter = ',', default_value = "1,1000,10000")]
    services: Vec<u32>,
    /// Turns of each contestant; the median counts.
    #[arg(long, default_value_t = 401)]
    rounds: usize,
    /// Milliseconds of a turn.
    #[arg(long, default_value_t = 20)]
    turn: u64,
    /// Fails when a figure of ours is below what the project promises, by more than two direct ones differ.
    #[arg(long)]
    check: bool,
    /// Is the client of a place.
    #[arg(long, hide = true)]
    client: bool,
}

/// Who is measured, in this order.
#[derive(Clone, Copy, Debug)]
enum Contestant {
    Direct,
    /// A second place like the first.
    Again,
    Ours,
    Peer(Peer),
}

impl Contestant {
    fn name(self) -> Result<String> {
        Ok(match self {
            Self::Direct => "direct".to_owned(),
            Self::Again => "direct, again".to_owned(),
            Self::Ours => "xdp-agent".to_owned(),
            Self::Peer(peer) => peer.name()?,
        })
    }
}

/// Rates of one contestant, turn by turn, and what they are of the direct one's.
struct Figures {
    contestant: Contestant,
    rates: Vec<f64>,
    shares: Vec<f64>,
}

/// Measures every size and prints a table for each.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.client {
        return client::serve();
    }
    xdp_agent_tests::lab::require_root()?;
    ensure!(args.rounds > 0 && args.turn > 0, "--rounds and --turn begin at 1");
    let iptables =
        if Peer::IptablesLegacy.is_supported()? { Peer::IptablesLegacy } else { Peer::IptablesNft };
    let peers = [Peer::Nftables, iptables];
    for peer in peers {
        peer.find()?;
    }
    let mut failed = Vec::new();
    // What ours had with the fewest Services, by what was asked for.
    let mut first: Vec<Option<f64>> = vec![None; Verb::ALL.len()];
    for &services in &args.services {
        let mut contestants = vec![Contestant::Direct, Contestant::Again, Contestant::Ours];
        if services <= PEER_SERVICES_MAX {
            contestants.extend(peers.map(Contestant::Peer));
        }
        let mut places = Vec::new();
        for contestant in contestants {
            eprintln!("bench: {contestant:?} at {services} services");
            places.push((contestant, Place::build(contestant, services)?));
        }
        println!("\n{services} services");
        println!("{:<26}{:<30}{:>14}{:>18}", "", "", "median", "share of direct");
        for (verb, first) in Verb::ALL.into_iter().zip(&mut first) {
            let figures = measure(args, verb, &mut places)?;
            let mut noise = 0.0;
            for row in &figures {
                let (share, name) = (median(&row.shares), row.contestant.name()?);
                println!("{:<26}{name:<30}{:>14.0}{:>17.1}%", verb.name(), median(&row.rates), 100.0 * share);
                match row.contestant {
                    Contestant::Again => noise = (1.0 - share).abs(),
                    Contestant::Ours => failed.extend(below(verb, services, share, noise, first)),
                    Contestant::Direct | Contestant::Peer(_) => {}
                }
            }
        }
        if services > PEER_SERVICES_MAX {
            println!(
                "  rules of kube-proxy's form are not loaded for more than {PEER_SERVICES_MAX} services"
            );
        }
    }
    ensure!(!args.check || failed.is_empty(), "less than promised: {}", failed.join("; "));
    Ok(())
}

/// Lets every place have its turns.
fn measure(args: &Args, verb: Verb, places: &mut [(Contestant, Place)]) -> Result<Vec<Figures>> {
    let turn = Duration::from_millis(args.turn);
    let mut rates = vec![Vec::new(); places.len()];
    // The first turn of each only warms up.
    for round in 0..=args.rounds {
        let mut order: Vec<usize> = (0..places.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            let (contestant, place) = &mut places[at];
            let rate = place.ask(verb, turn).with_context(|| format!("{contestant:?}, {}", verb.name()))?;
            if round > 0 {
                rates[at].push(rate);
            }
        }
    }
    let direct = rates.first().context("somebody is direct")?.clone();
    Ok(places
        .iter()
        .zip(rates)
        .map(|((contestant, _), rates)| {
            let shares = rates.iter().zip(&direct).map(|(rate, direct)| rate / direct).collect();
            Figures { contestant: *contestant, rates, shares }
        })
        .collect())
}

/// By how much two direct places may differ for a figure beside them to say anything.
const NOISE_MAX: f64 = 0.05;

/// What of a figure of ours is below the promise: the share of a direct connection, and that more Services cost nothing. The
/// noise is how far another direct connection's share is from one.
fn below(verb: Verb, services: u32, share: f64, noise: f64, first: &mut Option<f64>) -> Vec<String> {
    let floor = verb.floor() - noise;
    let mut failed = Vec::new();
    if noise > NOISE_MAX {
        failed.push(format!(
            "{} at {services} services says nothing: two direct places differ by {:.1}%",
            verb.name(),
            100.0 * noise
        ));
    }
    if share < floor {
        failed.push(format!(
            "{} at {services} services is {:.1}% of direct, not {:.1}%",
            verb.name(),
            100.0 * share,
            100.0 * floor
        ));
    }
    let first = *first.get_or_insert(share);
    if share < first * floor {
        failed.push(format!("{} at {services} services is slower than with fewer", verb.name()));
    }
    failed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_the_promise_is_named() {
        let mut first = None;
        assert!(below(Verb::Connect, 1, 0.99, 0.0, &mut first).is_empty());
        assert!(below(Verb::Connect, 1_000, 0.97, 0.0, &mut first).is_empty());
        assert_eq!(below(Verb::Connect, 10_000, 0.965, 0.0, &mut first).len(), 1);
        assert_eq!(below(Verb::Bulk, 1, 0.98, 0.0, &mut None).len(), 1);
        assert_eq!(below(Verb::Bulk, 1, 0.98, 0.015, &mut None).len(), 0);
        assert_eq!(below(Verb::Bulk, 1, 1.0, 0.06, &mut None).len(), 1, "it says nothing");
        assert_eq!(below(Verb::Request, 10_000, 0.5, 0.0, &mut Some(1.0)).len(), 2);
    }
}
