//! From objects to the kernel: start-up, one change, memory, beside rules of kube-proxy's form on the same machine.
//!
//! Each row of the table is measured by a process of its own, in namespaces of its own: memory that one has used and not
//! given back must not count for the next, and nothing is left behind.

use std::{process::Stdio, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use xdp_agent_tests::lab::{
    link,
    netns::{Namespace, PrivateBpffs},
    require_root,
};

use self::{figures::Row, peers::Peer};

mod agent;
mod figures;
mod iptables;
mod nftables;
mod objects;
mod ours;
pub(crate) mod peers;
mod pipeline;
pub(crate) mod world;

/// The sizes up to which the project promises something, in endpoints: 10,000 Services of 10.
const PROMISED_ENDPOINTS: u32 = 100_000;
const LOAD_BUDGET_MS: f64 = 3_000.0;
const CHANGE_BUDGET_MS: f64 = 5.0;
const PROCESS_BUDGET_MIB: f64 = 200.0;

/// Measures how long Services take into the kernel, and what they cost there.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Numbers of Services.
    #[arg(long, value_delimiter = ',', default_value = "1000,10000,30000")]
    services: Vec<u32>,
    /// Endpoints of each Service.
    #[arg(long, default_value_t = 10)]
    endpoints: u32,
    /// Single changes of ours; their 99th percentile counts.
    #[arg(long, default_value_t = 200)]
    changes: usize,
    /// Single changes of each peer, which take up to seconds.
    #[arg(long, default_value_t = 20)]
    peer_changes: usize,
    /// Seconds that a load or a change may take; a row that takes longer says so.
    #[arg(long, default_value_t = 300)]
    limit: u64,
    /// Services up to which the peers are loaded. Beyond, the kernel may stand still while nftables adds or removes them.
    #[arg(long, default_value_t = 10_000)]
    peers_max: u32,
    /// Rows to measure instead of the usual ones.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Contestant>,
    /// Fails when a figure of ours is over the budget of the project.
    #[arg(long)]
    check: bool,
    /// Measures one row here, in namespaces made for it, and writes it to stdout.
    #[arg(long, hide = true)]
    row: Option<Contestant>,
}

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Contestant {
    /// From objects to the maps, stage by stage in one process.
    Pipeline,
    /// The agent, which follows an API server.
    Agent,
    /// kube-proxy's nftables mode.
    Nftables,
    /// kube-proxy's iptables mode by the legacy tools.
    IptablesLegacy,
    /// kube-proxy's iptables mode by the tools that write nftables.
    IptablesNft,
}

/// How many Services, and endpoints of each.
#[derive(Clone, Copy, Debug)]
struct Size {
    services: u32,
    endpoints: u32,
}

impl Contestant {
    /// Who is measured unless told otherwise: iptables by the tools that load faster, where the kernel has their tables.
    fn usual() -> Result<[Self; 4]> {
        let is_legacy = Peer::IptablesLegacy.is_supported()?;
        let iptables = if is_legacy { Self::IptablesLegacy } else { Self::IptablesNft };
        Ok([Self::Pipeline, Self::Agent, Self::Nftables, iptables])
    }

    fn peer(self) -> Option<Peer> {
        match self {
            Self::Pipeline | Self::Agent => None,
            Self::Nftables => Some(Peer::Nftables),
            Self::IptablesLegacy => Some(Peer::IptablesLegacy),
            Self::IptablesNft => Some(Peer::IptablesNft),
        }
    }

    /// Milliseconds to load and to change, and MiB, of which the project promises that it takes no more.
    fn budgets(self) -> [Option<f64>; 3] {
        match self {
            Self::Pipeline => [Some(LOAD_BUDGET_MS), Some(CHANGE_BUDGET_MS), None],
            // How fast it has the objects depends on the server.
            Self::Agent => [None, Some(CHANGE_BUDGET_MS), Some(PROCESS_BUDGET_MIB)],
            Self::Nftables | Self::IptablesLegacy | Self::IptablesNft => [None; 3],
        }
    }
}

/// Measures every row and prints a table per size.
pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(contestant) = args.row {
        let [services] = args.services[..] else { bail!("--row measures one size") };
        let row = measure(args, contestant, Size { services, endpoints: args.endpoints })?;
        return Ok(serde_json::to_writer(std::io::stdout().lock(), &row)?);
    }
    require_root()?;
    let contestants = if args.only.is_empty() { Contestant::usual()?.to_vec() } else { args.only.clone() };
    for peer in contestants.iter().filter_map(|contestant| contestant.peer()) {
        peer.find()?;
    }
    let mut failed = Vec::new();
    for &services in &args.services {
        let size = Size { services, endpoints: args.endpoints };
        let mut rows = Vec::new();
        for &contestant in &contestants {
            eprintln!("bench: {contestant:?} at {services} services");
            let row = match contestant.peer() {
                Some(peer) if services > args.peers_max => not_run(peer, args.peers_max)?,
                Some(_) | None => in_a_process(args, contestant, size)?,
            };
            rows.push((contestant, row));
        }
        print(size, &rows);
        failed.extend(rows.iter().flat_map(|(who, row)| over_budget(size, *who, row)));
    }
    ensure!(!args.check || failed.is_empty(), "over budget: {}", failed.join("; "));
    Ok(())
}

fn measure(args: &Args, contestant: Contestant, size: Size) -> Result<Row> {
    let limit = Duration::from_secs(args.limit);
    match contestant {
        Contestant::Pipeline => pipeline::measure(size, args.changes),
        Contestant::Agent => agent::measure(size, args.changes, limit),
        Contestant::Nftables => peers::measure(Peer::Nftables, size, args.peer_changes, limit),
        Contestant::IptablesLegacy => peers::measure(Peer::IptablesLegacy, size, args.peer_changes, limit),
        Contestant::IptablesNft => peers::measure(Peer::IptablesNft, size, args.peer_changes, limit),
    }
}

/// The row of a peer that is too slow for this size.
fn not_run(peer: Peer, peers_max: u32) -> Result<Row> {
    let note = format!("not run: the peers are loaded up to {peers_max} services, see --peers-max");
    Ok(Row { name: peer.name()?, notes: vec![note], ..Row::default() })
}

/// Runs this program again for one row, on a node of its own with a BPF file system of its own.
fn in_a_process(args: &Args, contestant: Contestant, size: Size) -> Result<Row> {
    let node = Namespace::new("bench-node")?;
    let peer = Namespace::new("bench-peer")?;
    link::veth(&node, "eth0", &peer, "eth0")?;
    node.address("eth0", world::NODE_ADDRESS, 24)?;
    let bpffs = PrivateBpffs::new()?;
    let mut command = bpffs.command(&node, std::env::current_exe()?);
    let name = contestant.to_possible_value().context("every contestant has a name")?;
    command.args(["sync", "--row", name.get_name()]);
    command.args(["--services", &size.services.to_string(), "--endpoints", &size.endpoints.to_string()]);
    command.args(["--changes", &args.changes.to_string(), "--peer-changes", &args.peer_changes.to_string()]);
    command.args(["--limit", &args.limit.to_string()]);
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "the row {} ended with {}", name.get_name(), output.status);
    serde_json::from_slice(&output.stdout).context("a row cannot be read")
}

fn print(size: Size, rows: &[(Contestant, Row)]) {
    println!("\n{} services x {} endpoints", size.services, size.endpoints);
    println!(
        "{:<34}{:>10}{:>12}{:>10}{:>10}{:>13}{:>12}",
        "", "load ms", "change p50", "p99", "max", "process MiB", "kernel MiB"
    );
    for (_, row) in rows {
        let times = [0.5, 0.99, 1.0].map(|share| cell(row.percentile(share), 2));
        let [p50, p99, max] = times;
        let (load, process, kernel) =
            (cell(row.load_ms, 0), cell(row.process_mib, 0), cell(row.kernel_mib, 0));
        println!("{:<34}{load:>10}{p50:>12}{p99:>10}{max:>10}{process:>13}{kernel:>12}", row.name);
    }
    for (_, row) in rows {
        for note in &row.notes {
            println!("  {}: {note}", row.name);
        }
    }
}

fn cell(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

/// What is over the budget of the project, which names a size.
fn over_budget(size: Size, contestant: Contestant, row: &Row) -> Vec<String> {
    if size.services * size.endpoints > PROMISED_ENDPOINTS {
        return Vec::new();
    }
    let figures =
        [("load ms", row.load_ms), ("change p99 ms", row.percentile(0.99)), ("process MiB", row.process_mib)];
    let over = figures.into_iter().zip(contestant.budgets()).filter_map(|((what, value), budget)| {
        let budget = budget?;
        let value = value.filter(|value| *value > budget)?;
        Some(format!("{} at {} services: {what} {value:.1}, budget {budget}", row.name, size.services))
    });
    over.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_over_its_budget_is_named_at_sizes_that_something_is_promised_of() {
        let promised = Size { services: 10_000, endpoints: 10 };
        let row = Row {
            name: "ours".to_owned(),
            load_ms: Some(3_500.0),
            changes_ms: vec![4.0, 6.0],
            process_mib: Some(199.0),
            ..Row::default()
        };
        let over = over_budget(promised, Contestant::Pipeline, &row);
        assert_eq!(
            over,
            [
                "ours at 10000 services: load ms 3500.0, budget 3000",
                "ours at 10000 services: change p99 ms 6.0, budget 5"
            ]
        );
        assert_eq!(over_budget(promised, Contestant::Agent, &row).len(), 1);
        assert!(over_budget(promised, Contestant::Nftables, &row).is_empty());
        assert!(over_budget(Size { services: 30_000, ..promised }, Contestant::Pipeline, &row).is_empty());
    }
}
