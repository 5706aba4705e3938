//! Loads rules of kube-proxy's form with the tools it uses, and changes one endpoint after another.

use std::{
    fmt, fs,
    io::{Read, Seek, Write},
    net::Ipv4Addr,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{UsageWho, getrusage};

use super::{
    Size,
    figures::{Row, kernel_mib, milliseconds},
    iptables, nftables,
    world::{Replacement, World},
};

/// How exactly the end of a load is seen; it takes at least tens of milliseconds.
const LOAD_POLL: Duration = Duration::from_micros(500);

/// How much is shown of what a tool complains about.
const COMPLAINT_LINES: usize = 6;

/// A tool of the system that loads rules.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Peer {
    /// `nft -f -`.
    Nftables,
    /// `iptables-legacy-restore`, where the kernel has its tables.
    IptablesLegacy,
    /// `iptables-nft-restore`.
    IptablesNft,
}

impl Peer {
    /// Whether the kernel has what the tool writes to.
    pub(crate) fn is_supported(self) -> Result<bool> {
        match self {
            Self::Nftables | Self::IptablesNft => Ok(true),
            // The file is there as soon as the kernel has the tables, as a module or built in.
            Self::IptablesLegacy => Ok(fs::exists("/proc/net/ip_tables_names")?),
        }
    }

    fn program(self) -> &'static str {
        match self {
            Self::Nftables => "nft",
            Self::IptablesLegacy => "iptables-legacy-restore",
            Self::IptablesNft => "iptables-nft-restore",
        }
    }

    fn package(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::IptablesLegacy | Self::IptablesNft => "iptables",
        }
    }

    /// Where the tool is.
    ///
    /// # Errors
    /// When it is not there, with what to install.
    pub(crate) fn find(self) -> Result<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        // Not every user's PATH has the system's tools, and sudo keeps some users' PATH.
        let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
        let mut files = places.map(|place| place.join(self.program()));
        files.find(|file| file.is_file()).with_context(|| {
            format!(
                "no {} to compare with: install the package {}, `apt-get install {}` on Debian",
                self.program(),
                self.package(),
                self.package()
            )
        })
    }

    fn command(self) -> Result<Command> {
        let mut command = Command::new(self.find()?);
        match self {
            Self::Nftables => command.args(["-f", "-"]),
            Self::IptablesLegacy | Self::IptablesNft => command.args(iptables::OPTIONS),
        };
        Ok(command)
    }

    /// What the row is called: the tool and its version.
    pub(crate) fn name(self) -> Result<String> {
        Ok(format!("{} {}", self.program(), self.version()?))
    }

    fn version(self) -> Result<String> {
        let output = Command::new(self.find()?).arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        // "nftables v1.0.6 (…)", "iptables-restore v1.8.9 (legacy)".
        Ok(text.split_whitespace().find(|word| word.starts_with('v')).unwrap_or("").to_owned())
    }

    fn load(self, world: &World) -> Result<String, fmt::Error> {
        match self {
            Self::Nftables => nftables::load(world),
            Self::IptablesLegacy | Self::IptablesNft => iptables::load(world),
        }
    }

    fn change(self, world: &World, replaced: &Replacement) -> Result<String, fmt::Error> {
        match self {
            Self::Nftables => nftables::change(world, replaced),
            Self::IptablesLegacy | Self::IptablesNft => iptables::change(world, replaced),
        }
    }

    /// Fails unless the kernel holds as many rules that translate addresses as the world asks for, and one to this address.
    fn verify(self, world: &World, latest: Ipv4Addr) -> Result<()> {
        let services = world.services().len();
        let (mut list, mark, expected) = match self {
            Self::Nftables => {
                let mut list = Command::new(self.find()?);
                list.args(["list", "table", "ip", "kube-proxy"]);
                (list, "dnat ", services)
            }
            Self::IptablesLegacy | Self::IptablesNft => {
                let program = self.program().replace("-restore", "-save");
                let mut list = Command::new(self.find()?.with_file_name(program));
                list.args(["-t", "nat"]);
                (list, "-j DNAT ", services * world.pods(0).len())
            }
        };
        let output = list.output().with_context(|| format!("cannot run {list:?}"))?;
        ensure!(output.status.success(), "{list:?} ended with {}", output.status);
        let rules = String::from_utf8_lossy(&output.stdout);
        let found = rules.lines().filter(|line| line.contains(mark)).count();
        // More: the chain of an endpoint that was replaced stays with iptables, and masquerading mentions dnat as well.
        ensure!(found >= expected, "{} holds {found} rules with {mark:?}, not {expected}", self.program());
        ensure!(rules.contains(&latest.to_string()), "{} holds no rule to {latest}", self.program());
        Ok(())
    }
}

/// Loads the rules of a world into the network namespace of this thread.
pub(crate) fn fill(peer: Peer, world: &World, limit: Duration) -> Result<()> {
    if !matches!(peer, Peer::Nftables) {
        let jumps = run(peer, iptables::JUMPS.to_owned(), limit)?;
        ensure!(jumps.is_some(), "{} does not come to an end", peer.program());
    }
    let loaded = run(peer, peer.load(world)?, limit)?;
    ensure!(loaded.is_some(), "{} has not loaded its rules within {limit:?}", peer.program());
    Ok(())
}

/// Measures one peer at one size, in the network namespace of this process.
pub(super) fn measure(peer: Peer, size: Size, changes: usize, limit: Duration) -> Result<Row> {
    let mut world = World::new(size.services, size.endpoints)?;
    if !matches!(peer, Peer::Nftables) {
        let jumps = run(peer, iptables::JUMPS.to_owned(), limit)?;
        ensure!(jumps.is_some(), "{} does not come to an end", peer.program());
    }
    let script = peer.load(&world)?;
    let mut row = Row { name: peer.name()?, ..Row::default() };
    row.notes.push(format!("its input is {:.1} MiB of text", script.len() as f64 / f64::from(1 << 20)));
    let before = kernel_mib()?;
    let Some(took) = run(peer, script, limit)? else {
        row.notes.push(format!("gave up loading after {} s", limit.as_secs()));
        return Ok(row);
    };
    row.load_ms = Some(milliseconds(took));
    row.kernel_mib = Some(kernel_mib()? - before);
    let mut times = Vec::new();
    let mut latest = world.pod_address(world.pods(0)[0]);
    for _ in 0..changes {
        let replaced = world.replace();
        latest = world.pod_address(replaced.pod);
        let Some(took) = run(peer, peer.change(&world, &replaced)?, limit)? else {
            bail!("one change took {} more than {limit:?}", peer.program());
        };
        times.push(took);
    }
    // Before the listing, which needs more memory than the loader.
    row.process_mib = Some(getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss() as f64 / 1024.0);
    peer.verify(&world, latest)?;
    row.set_changes(&times);
    Ok(row)
}

/// Runs the loader on a script, and says how long it took from its start to its end; nothing when it was
/// killed at the limit.
///
/// The script goes through a file: the kernel counts what this process holds when it forks as memory of the child.
fn run(peer: Peer, script: String, limit: Duration) -> Result<Option<Duration>> {
    let mut input = tempfile::tempfile()?;
    input.write_all(script.as_bytes())?;
    drop(script);
    input.rewind()?;
    // A pipe that nobody reads before the end could fill up.
    let mut errors = tempfile::tempfile()?;
    let mut command = peer.command()?;
    command.stdin(input).stdout(Stdio::null()).stderr(errors.try_clone()?);
    let start = Instant::now();
    let mut child = command.spawn().with_context(|| format!("cannot start {}", peer.program()))?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(LOAD_POLL);
    };
    let took = start.elapsed();
    if !status.success() {
        let mut message = String::new();
        errors.rewind()?;
        errors.read_to_string(&mut message)?;
        // Tools repeat one complaint for every rule.
        let message: Vec<&str> = message.lines().take(COMPLAINT_LINES).collect();
        bail!("{} ended with {status}: {}", peer.program(), message.join("\n"));
    }
    Ok(Some(took))
}
