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

mod figures;
mod iptables;
mod nftables;
mod objects;
mod peers;
mod world;

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
    /// Seconds that a peer may take to load; a row that takes longer says so.
    #[arg(long, default_value_t = 600)]
    limit: u64,
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
    fn usual() -> Result<[Self; 2]> {
        let is_legacy = Peer::IptablesLegacy.is_supported()?;
        Ok([Self::Nftables, if is_legacy { Self::IptablesLegacy } else { Self::IptablesNft }])
    }

    fn peer(self) -> Option<Peer> {
        match self {
            Self::Nftables => Some(Peer::Nftables),
            Self::IptablesLegacy => Some(Peer::IptablesLegacy),
            Self::IptablesNft => Some(Peer::IptablesNft),
        }
    }

    fn is_ours(self) -> bool {
        self.peer().is_none()
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
            rows.push((contestant, in_a_process(args, contestant, size)?));
        }
        print(size, &rows);
        failed.extend(rows.iter().filter(|(who, _)| who.is_ours()).flat_map(|(_, row)| over_budget(size, row)));
    }
    ensure!(!args.check || failed.is_empty(), "over budget: {}", failed.join("; "));
    Ok(())
}

fn measure(args: &Args, contestant: Contestant, size: Size) -> Result<Row> {
    match contestant.peer() {
        Some(peer) => peers::measure(peer, size, args.peer_changes, Duration::from_secs(args.limit)),
        None => bail!("not there yet"),
    }
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
        let load = row.load_ms.map_or_else(|| "-".to_owned(), |load| format!("{load:.0}"));
        let [p50, p99, max] = [0.5, 0.99, 1.0].map(|share| match row.percentile(share) {
            Some(time) => format!("{time:.2}"),
            None => "-".to_owned(),
        });
        println!(
            "{:<34}{load:>10}{p50:>12}{p99:>10}{max:>10}{:>13.0}{:>12.0}",
            row.name, row.process_mib, row.kernel_mib
        );
    }
    for (_, row) in rows {
        for note in &row.notes {
            println!("  {}: {note}", row.name);
        }
    }
}

/// What is over the budget of the project, which names a size.
fn over_budget(size: Size, row: &Row) -> Vec<String> {
    if size.services * size.endpoints > PROMISED_ENDPOINTS {
        return Vec::new();
    }
    let figures = [
        ("load ms", row.load_ms, LOAD_BUDGET_MS),
        ("change p99 ms", row.percentile(0.99), CHANGE_BUDGET_MS),
        ("process MiB", Some(row.process_mib), PROCESS_BUDGET_MIB),
    ];
    let over = figures.into_iter().filter_map(|(what, value, budget)| {
        let value = value.filter(|value| *value > budget)?;
        Some(format!("{} at {} services: {what} {value:.1}, budget {budget}", row.name, size.services))
    });
    over.collect()
}
