//! Connections of a pod to a Service, beside direct ones and rules of kube-proxy's form: the same client and the same
//! server in a place each, in turns.
//!
//! A machine with neighbours is never still, and they only ever slow a turn down, so contestants take short turns, and one
//! that is faster than nine tenths of the others counts. What is the luck of a place, all are built several times, and the
//! median counts, with its standard error.

use std::{fmt, time::Duration};

use anyhow::{Context, Result, ensure};

use self::{
    client::{Client, Verb},
    place::Place,
};
use crate::{median, sync::peers::Peer};

mod client;
mod place;

/// The kernel may stand still for seconds while it takes or frees more rules than these have, so they are built
/// [less often](PEER_BUILDS_OF_MANY).
const FEW_SERVICES: u32 = 1_000;
const PEER_BUILDS_OF_MANY: usize = 3;

/// Measures what a pod's connections to a Service cost.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Numbers of Services, one of which is measured.
    #[arg(long, value_delimiter = ',', default_value = "1,1000,10000")]
    services: Vec<u32>,
    /// Times that the places of all contestants are built; the median counts.
    #[arg(long, default_value_t = 15)]
    builds: usize,
    /// Turns of each contestant in a place; one that is faster than nine tenths of them counts.
    #[arg(long, default_value_t = 25)]
    rounds: usize,
    /// Milliseconds of a turn.
    #[arg(long, default_value_t = 20)]
    turn: u64,
    /// Fails when a figure of ours is below what the project promises by more than its error.
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
    /// A second place like the first; the mean of both is what shares are of.
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

/// Rates of one contestant, a build each, and what they are of the direct ones'.
#[derive(Default)]
struct Figures {
    rates: Vec<f64>,
    shares: Vec<f64>,
}

/// Measures every size and prints a table for each.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.client {
        return client::serve();
    }
    xdp_agent_tests::lab::require_root()?;
    ensure!(args.builds > 0 && args.rounds > 0 && args.turn > 0, "--builds, --rounds and --turn begin at 1");
    let iptables =
        if Peer::IptablesLegacy.is_supported()? { Peer::IptablesLegacy } else { Peer::IptablesNft };
    let peers = [Peer::Nftables, iptables];
    for peer in peers {
        peer.find()?;
    }
    let mut failed = Vec::new();
    // What ours had with the fewest Services, by what was asked for.
    let mut first: Vec<Option<Share>> = vec![None; Verb::ALL.len()];
    for &services in &args.services {
        let mut contestants = vec![Contestant::Direct, Contestant::Again, Contestant::Ours];
        contestants.extend(peers.map(Contestant::Peer));
        let figures = measure(args, services, &contestants)?;
        println!("\n{services} services (median of {} builds)", args.builds);
        println!("{:<26}{:<30}{:>10}{:>22}", "", "", "rate", "share of direct");
        for ((verb, rows), first) in Verb::ALL.into_iter().zip(&figures).zip(&mut first) {
            for (contestant, row) in contestants.iter().zip(rows) {
                let (share, name) = (Share::of(&row.shares), contestant.name()?);
                println!("{:<26}{name:<30}{:>10.0}{share:>22}", verb.name(), median(&row.rates));
                if matches!(contestant, Contestant::Ours) {
                    failed.extend(below(verb, services, share, first));
                }
            }
        }
        if peer_builds(args, services) < args.builds {
            println!("  rules of kube-proxy's form were loaded in the first {PEER_BUILDS_OF_MANY} builds");
        }
    }
    ensure!(!args.check || failed.is_empty(), "less than promised: {}", failed.join("; "));
    Ok(())
}

/// How many builds have peers.
fn peer_builds(args: &Args, services: u32) -> usize {
    if services <= FEW_SERVICES { args.builds } else { args.builds.min(PEER_BUILDS_OF_MANY) }
}

/// Figures of every contestant, for every verb.
fn measure(args: &Args, services: u32, contestants: &[Contestant]) -> Result<Vec<Vec<Figures>>> {
    let empty = || contestants.iter().map(|_| Figures::default()).collect();
    let mut figures: Vec<Vec<Figures>> = Verb::ALL.iter().map(|_| empty()).collect();
    for build in 1..=args.builds {
        eprintln!("bench: {services} services, build {build} of {}", args.builds);
        // Peers are the last; the rows of those that stay away just end sooner.
        let has_peers = build <= peer_builds(args, services);
        let is_here = |contestant: &&Contestant| has_peers || !matches!(contestant, Contestant::Peer(_));
        let contestants: Vec<Contestant> = contestants.iter().filter(is_here).copied().collect();
        let places = contestants.iter().map(|contestant| Place::build(*contestant, services));
        let mut places = places.collect::<Result<Vec<_>>>()?;
        for (verb, rows) in Verb::ALL.into_iter().zip(&mut figures) {
            let rates = turns(args, verb, &contestants, &mut places)?;
            let direct = rates.iter().take(2).sum::<f64>() / 2.0;
            for (row, rate) in rows.iter_mut().zip(rates) {
                row.rates.push(rate);
                row.shares.push(rate / direct);
            }
        }
    }
    Ok(figures)
}

/// Lets every place have its turns; the rate of each is the answer.
fn turns(args: &Args, verb: Verb, contestants: &[Contestant], places: &mut [Place]) -> Result<Vec<f64>> {
    let turn = Duration::from_millis(args.turn);
    let mut rates = vec![Vec::new(); places.len()];
    // The first turn of each only warms up.
    for round in 0..=args.rounds {
        // Each goes after each.
        let mut order: Vec<usize> = (0..places.len()).collect();
        order.rotate_left(round / 2 % places.len());
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            let rate = places[at].ask(verb, turn);
            let rate = rate.with_context(|| format!("{:?}, {}", contestants[at], verb.name()))?;
            if round > 0 {
                rates[at].push(rate);
            }
        }
    }
    Ok(rates.iter().map(|rates| undisturbed(rates)).collect())
}

/// A rate that is as high as that of nine turns in ten, or higher: only the fastest are not disturbed, and of those some were
/// lucky.
fn undisturbed(rates: &[f64]) -> f64 {
    let mut rates = rates.to_vec();
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() * 9 / 10).copied().unwrap_or(f64::NAN)
}

/// What a contestant's rate is of the direct one's.
#[derive(Clone, Copy, Debug)]
struct Share {
    median: f64,
    /// Standard error: how far another median of as many builds is likely to be.
    error: f64,
}

impl Share {
    fn of(shares: &[f64]) -> Self {
        let count = shares.len() as f64;
        let mean = shares.iter().sum::<f64>() / count;
        let variance =
            shares.iter().map(|share| (share - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
        Self { median: median(shares), error: (variance / count).sqrt() }
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:.1} % ± {:.1}", 100.0 * self.median, 100.0 * self.error))
    }
}

/// The greatest error of a share that says anything.
const ERROR_MAX: f64 = 0.025;

/// What of a figure of ours is below the promise by more than its error: the share of a direct connection, and that more
/// Services cost nothing.
fn below(verb: Verb, services: u32, share: Share, first: &mut Option<Share>) -> Vec<String> {
    let floor = verb.floor();
    let what = format!("{} at {services} services", verb.name());
    let mut failed = Vec::new();
    if share.error > ERROR_MAX {
        failed.push(format!("{what} says nothing: {share} of direct"));
    }
    if share.median + share.error < floor {
        failed.push(format!("{what} is {share} of direct, not {:.0} %", 100.0 * floor));
    }
    let first = *first.get_or_insert(share);
    if share.median + share.error.hypot(first.error) < first.median * floor {
        failed.push(format!("{what} is {share} of direct, with fewer {first}"));
    }
    failed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_that_others_have_slowed_down_do_not_count() {
        let mut rates = vec![50.0; 17];
        rates.extend([100.0, 101.0, 130.0]);
        assert_eq!(undisturbed(&rates), 101.0);
        assert_eq!(undisturbed(&[7.0]), 7.0);
        assert!(undisturbed(&[]).is_nan());
    }

    #[test]
    fn a_share_is_given_with_its_error() {
        let share = Share::of(&[0.96, 1.0, 0.99, 0.98, 0.97]);
        assert_eq!(share.to_string(), "98.0 % ± 0.7");
        assert_eq!(Share::of(&[0.98]).to_string(), "98.0 % ± 0.0");
    }

    #[test]
    fn what_is_below_the_promise_is_named() {
        let exactly = |median| Share { median, error: 0.0 };
        let mut first = None;
        assert!(below(Verb::Connect, 1, exactly(0.99), &mut first).is_empty());
        assert!(below(Verb::Connect, 1_000, exactly(0.97), &mut first).is_empty());
        assert_eq!(below(Verb::Connect, 10_000, exactly(0.965), &mut first).len(), 1);
        assert_eq!(below(Verb::Connect, 10_000, exactly(0.95), &mut first).len(), 2, "slower with more");
        assert_eq!(below(Verb::Bulk, 1, exactly(0.98), &mut None).len(), 1);
        assert_eq!(below(Verb::Bulk, 1, Share { median: 0.98, error: 0.015 }, &mut None).len(), 0);
        assert_eq!(
            below(Verb::Bulk, 1, Share { median: 1.0, error: 0.03 }, &mut None).len(),
            1,
            "says nothing"
        );
    }
}
