//! `cargo xtask demo`: a small world of namespaces, the agent on it, real traffic, and what came of it.
//!
//! Everything lives inside this process and its child, so nothing is left behind, also when interrupted.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use xdp_agent_tests::lab::agent::{Agent, METRICS, Mode};
use xdp_agent_tests::lab::clients::{HttpConnection, UdpClient, Whoami};
use xdp_agent_tests::lab::load::{Kind, Load};
use xdp_agent_tests::lab::world::{CLIENT, NODE, NODE2, World, WorldOptions, http_frontends, udp_frontends};
use xdp_agent_tests::lab::{block_on, require_root, runtime};

/// Connections or sockets opened through each frontend to show the shares.
const FLOWS: usize = 400;
/// How long each rate is measured.
const RATE_TIME: Duration = Duration::from_secs(2);
const RATE_WORKERS: usize = 16;
const BODY_BYTES: usize = 100 << 20;
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
const RING_CHANGES: usize = 6;
const LOAD_TIMEOUT: Duration = Duration::from_secs(20);
/// Exit status of a process that Ctrl-C ended, as shells report it.
const INTERRUPTED: i32 = 130;

/// Shows the agent at work in a small world of network namespaces.
#[derive(Parser)]
struct Options {
    /// How to attach the XDP program.
    #[arg(long, value_enum, default_value = "auto", env = "XDP_AGENT_DEMO_MODE")]
    mode: ModeArgument,
    /// Keeps the world until Ctrl-C and prints how to look into it.
    #[arg(long, env = "XDP_AGENT_DEMO_KEEP_OPEN")]
    keep_open: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum ModeArgument {
    Auto,
    Native,
    Generic,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match show(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn show(options: &Options) -> Result<()> {
    require_root()?;
    let mode = match options.mode {
        ModeArgument::Auto => Mode::Auto,
        ModeArgument::Native => Mode::Native,
        ModeArgument::Generic => Mode::Generic,
    };
    let start = Instant::now();
    // Frames on a real wire carry complete checksums, so these do too.
    let world = World::build(WorldOptions { tx_offload: false, ..WorldOptions::default() })?;
    let interrupt = Interrupt::watch(world.manifests.scratch().to_path_buf())?;
    print_world(&world);
    world.publish()?;
    let starting = Instant::now();
    let mut agent = Agent::start(&world.node, &world.bpffs, &world.agent_options(mode))?;
    agent.quiet();
    let result = tour(&world, &agent, starting.elapsed()).and_then(|()| {
        if options.keep_open {
            print_keys(&world, &agent);
            interrupt.wait()?;
        }
        Ok(())
    });
    if let Err(error) = result {
        eprintln!("\nlog of the agent:\n{}", agent.log());
        return Err(error);
    }
    agent.stop()?;
    drop(world);
    println!(
        "\nAll requests were answered. The agent stopped cleanly, the world is gone ({:.0?}).",
        start.elapsed()
    );
    if !options.keep_open {
        println!("To look around inside: `cargo xtask demo --keep-open`.");
    }
    Ok(())
}

fn tour(world: &World, agent: &Agent, ready: Duration) -> Result<()> {
    let (mode, reason) = agent.mode_of("eth0")?;
    heading("Attached");
    println!("  eth0 of the node: {} ({reason}); ready {:.0?} after the start", bold(&mode), ready);
    let seen = show_shares(world)?;
    show_addresses(&seen)?;
    show_bodies(world)?;
    show_ring_changes(world, agent)?;
    show_rates(world)?;
    show_counts(agent)
}

fn print_world(world: &World) {
    let pods = |local: bool| {
        let pods = world.pods.iter().filter(|pod| pod.is_local() == local);
        pods.map(|pod| format!("{} {}", pod.server.name(), pod.server.address()))
            .collect::<Vec<_>>()
            .join(", ")
    };
    println!(
        "{}",
        bold("xdp-agent demo: network namespaces of this process; the host's network is not touched")
    );
    println!();
    println!("  client {CLIENT} ── router ══ segment ══ node {NODE} ── {}", pods(true));
    println!("                                    ╚════ node2 {NODE2} ── {}", pods(false));
}

/// Opens many flows through every frontend and prints who answered; returns what each backend saw.
fn show_shares(world: &World) -> Result<Vec<(SocketAddr, Whoami)>> {
    heading(&format!("Who answered ({FLOWS} connections or sockets through each frontend)"));
    let names: Vec<&str> = world.pods.iter().map(|pod| pod.server.name()).collect();
    print!("  {:<42}", "");
    names.iter().for_each(|name| print!("{name:>10}"));
    println!("{:>10}", "answered");
    let mut seen = Vec::new();
    for (protocol, frontends) in [("TCP", http_frontends()), ("UDP", udp_frontends())] {
        for (kind, target) in frontends {
            let answers =
                block_on(ask_often(world, protocol, target)).with_context(|| format!("{protocol} {kind}"))?;
            let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
            answers.iter().for_each(|(_, whoami)| *counts.entry(&whoami.backend).or_default() += 1);
            print!("  {protocol} {:<38}", format!("{kind} {target}"));
            for name in &names {
                let share = *counts.get(name).unwrap_or(&0) as f64 / FLOWS as f64;
                print!("{:>8.1} %", share * 100.0);
            }
            println!("{:>8.0} %", answers.len() as f64 / FLOWS as f64 * 100.0);
            ensure!(counts.len() == names.len(), "{kind}: only {counts:?} answered");
            seen.extend(answers);
        }
    }
    Ok(seen)
}

async fn ask_often(world: &World, protocol: &str, target: SocketAddr) -> Result<Vec<(SocketAddr, Whoami)>> {
    if protocol == "UDP" {
        // Every socket stays open until the end, so that each flow has a port of its own.
        let mut sockets = Vec::new();
        let mut answers = Vec::new();
        for _ in 0..FLOWS {
            let socket = UdpClient::open(&world.client, target, 0).await?;
            answers.push((socket.local()?, socket.whoami().await?));
            sockets.push(socket);
        }
        return Ok(answers);
    }
    let mut asking = JoinSet::new();
    for _ in 0..FLOWS {
        let client = world.client.clone();
        asking.spawn(async move {
            let mut connection = HttpConnection::open(&client, target).await?;
            Ok((connection.local(), connection.whoami().await?))
        });
    }
    asking.join_all().await.into_iter().collect()
}

fn show_addresses(seen: &[(SocketAddr, Whoami)]) -> Result<()> {
    heading("Which client address the backends saw");
    for (place, expected, meaning) in [
        ("local", CLIENT, "the client's own: only the destination is rewritten"),
        ("remote", NODE, "the node's: source and destination are rewritten, so that answers come back here"),
    ] {
        let flows: Vec<_> = seen.iter().filter(|(_, whoami)| whoami.backend.starts_with(place)).collect();
        for (local, whoami) in &flows {
            ensure!(whoami.peer.ip() == expected, "{} saw {} for {local}", whoami.backend, whoami.peer);
        }
        println!("  {place:<7} {expected:<14} {meaning}");
        let same = flows.iter().filter(|(local, whoami)| whoami.peer.port() == local.port()).count();
        println!("  {:<22} ({} flows, {same} of them with the client's port)", "", flows.len());
    }
    Ok(())
}

fn show_bodies(world: &World) -> Result<()> {
    heading(&format!("A body of {} MiB, every byte compared", BODY_BYTES >> 20));
    let [(_, target), ..] = http_frontends();
    for place in ["local", "remote"] {
        let (elapsed, backend) = block_on(fetch(world, target, place))?;
        let rate = BODY_BYTES as f64 * 8.0 / elapsed.as_secs_f64() / 1e9;
        println!("  {backend:<9} intact after {elapsed:>6.2?} ({rate:.1} Gbit/s)");
    }
    Ok(())
}

async fn fetch(world: &World, target: SocketAddr, place: &str) -> Result<(Duration, String)> {
    for _ in 0..FLOWS {
        let mut connection = HttpConnection::open(&world.client, target).await?;
        if connection.whoami().await?.backend.starts_with(place) {
            let start = Instant::now();
            let backend = connection.bytes(BODY_BYTES, BODY_TIMEOUT).await?;
            return Ok((start.elapsed(), backend));
        }
    }
    bail!("no {place} backend answered")
}

/// Takes each backend out and back in while connections are made and others stay open.
fn show_ring_changes(world: &World, agent: &Agent) -> Result<()> {
    heading(&format!("{RING_CHANGES} changes of the endpoints under traffic"));
    let [(_, target), ..] = http_frontends();
    let loads = [
        (Kind::NewConnections, "new connections, all answered"),
        (Kind::KeptConnection, "requests on open connections, all answered by the backend each began with"),
    ]
    .map(|(kind, name)| (Load::start(&world.client, target, kind, 8), name));
    for change in 0..RING_CHANGES {
        let pods = world.pods.iter().enumerate();
        let endpoints: Vec<_> = pods
            .filter(|(index, _)| change % 2 == 1 || *index != change / 2)
            .map(|(_, pod)| pod.endpoint())
            .collect();
        world.change_endpoints(agent, &endpoints)?;
        loads.iter().try_for_each(|(load, _)| load.wait_answered(50, LOAD_TIMEOUT))?;
    }
    for (load, name) in loads {
        let report = load.stop();
        report.all_answered()?;
        println!("  {:>7} {name}", report.answered);
    }
    Ok(())
}

fn show_rates(world: &World) -> Result<()> {
    heading(&format!("Rates ({RATE_WORKERS} clients, {RATE_TIME:.0?} each)"));
    let [(_, http), ..] = http_frontends();
    let [(_, udp), ..] = udp_frontends();
    for (kind, target, name) in [
        (Kind::NewConnections, http, "HTTP, a connection each"),
        (Kind::KeptConnection, http, "HTTP, kept connections"),
        (Kind::Datagrams, udp, "UDP echo"),
    ] {
        let load = Load::start(&world.client, target, kind, RATE_WORKERS);
        std::thread::park_timeout(RATE_TIME);
        let report = load.stop();
        report.all_answered().context(name)?;
        let (half, most) = (report.quantile(0.5), report.quantile(0.99));
        println!(
            "  {name:<26} {:>8.0} /s   median {half:>7.0?}   99 % within {most:>7.0?}",
            report.per_second()
        );
    }
    println!(
        "  Client, router, nodes and servers share this machine: this shows that it works, not how fast it can be."
    );
    Ok(())
}

/// Prints the datapath's own counts of what all this was to it.
fn show_counts(agent: &Agent) -> Result<()> {
    heading("What the datapath counted (from /metrics)");
    let metrics = agent.metrics()?;
    let counts = metrics.iter().filter_map(|(key, value)| {
        let (_, label) = key.strip_suffix("\"}")?.split_once("{event=\"").or(key.split_once("{reason=\""))?;
        (*value > 0.0).then(|| format!("{:<18} {value:>9}", label.trim_end_matches("\"}")))
    });
    for row in counts.collect::<Vec<_>>().chunks(3) {
        println!("  {}", row.join("     "));
    }
    let drops = agent.metric("drops_total", "")?;
    ensure!(drops == 0.0, "{drops} frames were dropped");
    println!("  No frame was dropped.");
    Ok(())
}

fn print_keys(world: &World, agent: &Agent) {
    heading("The world stays open until Ctrl-C; from another shell, as root:");
    let inside = format!("nsenter --target {} --net --mount", agent.pid());
    let [(_, http), ..] = http_frontends();
    println!("  metrics    {inside} curl -s http://{METRICS}/metrics");
    println!("  status     {inside} curl -s http://{METRICS}/status");
    println!("  programs   {inside} bpftool net");
    println!("  client     nsenter --net={} curl -s http://{http}/whoami", world.client.path());
    for (name, namespace) in [("router", &world.router), ("node2", &world.node2)] {
        println!("  {name:<10} nsenter --net={} ip address", namespace.path());
    }
    for pod in &world.pods {
        println!("  {:<10} nsenter --net={} ip address", pod.server.name(), pod.namespace.path());
    }
    println!("  manifests  {} (the agent follows changes)", world.manifests.directory().display());
}

fn heading(text: &str) {
    println!("\n{}", bold(text));
}

fn bold(text: &str) -> String {
    if std::io::stdout().is_terminal() { format!("\x1b[1m{text}\x1b[0m") } else { text.to_string() }
}

/// What a signal leads to: the end of `--keep-open`, or an immediate end that still cleans up.
struct Interrupt {
    waiting: &'static AtomicBool,
    signals: mpsc::Receiver<()>,
}

impl Interrupt {
    /// Catches SIGINT and SIGTERM; the directory is the only thing that would outlive this process.
    fn watch(directory: PathBuf) -> Result<Self> {
        static WAITING: AtomicBool = AtomicBool::new(false);
        let (sender, signals) = mpsc::channel();
        let _context = runtime().enter();
        let (mut interrupt, mut terminate) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        runtime().spawn(async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if WAITING.load(Ordering::Acquire) && sender.send(()).is_ok() {
                    continue;
                }
                // The kernel kills the agent with us, and namespaces and pins go with their last process.
                let _ = std::fs::remove_dir_all(&directory);
                eprintln!("\ninterrupted; nothing is left behind");
                std::process::exit(INTERRUPTED);
            }
        });
        Ok(Self { waiting: &WAITING, signals })
    }

    fn wait(&self) -> Result<()> {
        self.waiting.store(true, Ordering::Release);
        self.signals.recv().context("the signal task ended")
    }
}
