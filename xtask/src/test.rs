//! `test`: runs the lanes and adds up what their tests said.

use crate::arch::Arch;
use crate::build;
use crate::cross;
use crate::dist;
use crate::host;
use crate::image;
use crate::process;
use crate::setup;
use crate::workspace::{Profile, Workspace};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

/// One kind of test: where it runs, and what it takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lane {
    /// Pure logic on this machine: no root, no network, no BPF toolchain.
    Host,
    /// Frames through the programs by `BPF_PROG_TEST_RUN`: root.
    ProgRun,
    /// Real traffic between network namespaces: root.
    Netns,
    /// The agent against an API server, in network namespaces: root.
    Kubernetes,
    /// The container image as the DaemonSet describes it, by runc: root.
    Image,
    /// Pure logic as the other architecture has it, by an emulator of its programs.
    Emulated,
}

const LANES: [Lane; 6] =
    [Lane::Host, Lane::ProgRun, Lane::Netns, Lane::Kubernetes, Lane::Image, Lane::Emulated];

/// Lanes that run when they are named: each compiles every dependency once more, which takes as long as the rest.
const ON_REQUEST: [Lane; 2] = [Lane::Image, Lane::Emulated];

/// Where etcd, kube-apiserver and kubectl are, by the convention of envtest; without it the tests' own server serves.
const REAL_API_SERVER: &str = "KUBEBUILDER_ASSETS";

/// Lanes use the agent's own profile, release: its binary is needed anyway, and a second profile would compile every
/// dependency twice, which is most of a cold build on two cores.
const PROFILE: Profile = Profile::Release;

/// The packages of the agent. What asks the kernel by netlink, whose messages the emulator does not know, is left to the
/// host lane.
const EMULATED: [&str; 14] = [
    "--package",
    "xdp-common",
    "--package",
    "xdp-agent",
    "--lib",
    "--test",
    "*",
    "--",
    "--skip",
    "neighbours::tests::this_namespace_can_be_read",
    "--skip",
    "netdev::tests::the_kernel_answers_for_this_namespace",
    "--skip",
    "sockets::diag::tests::a_connected_socket_is_found_with_its_peer",
];

/// What follows `cargo test` for the lane prog-run.
pub(crate) const PROG_RUN: &[&str] = &["--features", LANES_OF_ROOT, "--test", "prog_run"];

/// The lanes of every run that have a feature. All are asked for whichever is meant, so that what they share is compiled once.
const LANES_OF_ROOT: &str = "xdp-agent-tests/prog-run,xdp-agent-tests/netns,xdp-agent-tests/kubernetes";

impl Lane {
    fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::ProgRun => "prog-run",
            Self::Netns => "netns",
            Self::Kubernetes => "kubernetes",
            Self::Image => "image",
            Self::Emulated => "emulated",
        }
    }

    /// What follows `cargo test`. No `-p`, so that features unify over the same packages in every lane and no
    /// dependency is compiled again; the name of the test target selects.
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Host => &[],
            Self::ProgRun => PROG_RUN,
            Self::Netns => &["--features", LANES_OF_ROOT, "--test", "netns", "--", "--test-threads=2"],
            Self::Kubernetes => {
                &["--features", LANES_OF_ROOT, "--test", "kubernetes", "--", "--test-threads=2"]
            }
            Self::Image => &["--features", "xdp-agent-tests/image", "--test", "image"],
            Self::Emulated => &EMULATED,
        }
    }

    fn needs_root(self) -> bool {
        match self {
            Self::Host | Self::Emulated => false,
            Self::ProgRun | Self::Netns | Self::Kubernetes | Self::Image => true,
        }
    }
}

/// What tests reported.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
}

pub(crate) fn verb(workspace: &Workspace, args: &[String]) -> Result<()> {
    let lanes = parse(args)?;
    let mut total = Tally::default();
    let ready = prepare(workspace, &lanes);
    for &lane in &lanes {
        let outcome = match (&ready, lane) {
            (Err(error), lane) if lane.needs_root() => Err(anyhow::anyhow!("cannot be prepared: {error:#}")),
            (Err(_) | Ok(()), lane) => run(workspace, lane),
        };
        let tally = outcome.unwrap_or_else(|error| {
            eprintln!("lane {}: FAILED: {error:#}", lane.name());
            // A lane that gives no count is one failure, whatever it holds.
            Tally { passed: 0, failed: 1 }
        });
        println!("lane {}: {} passed, {} failed", lane.name(), tally.passed, tally.failed);
        total = Tally { passed: total.passed + tally.passed, failed: total.failed + tally.failed };
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    std::io::stdout().flush()?;
    if total.failed > 0 {
        std::process::exit(1)
    }
    Ok(())
}

fn parse(args: &[String]) -> Result<Vec<Lane>> {
    if args.is_empty() {
        return Ok(LANES.into_iter().filter(|lane| !ON_REQUEST.contains(lane)).collect());
    }
    let lane = |arg: &String| {
        let known = LANES.into_iter().find(|lane| lane.name() == arg);
        known.with_context(|| format!("no lane `{arg}`; there are {}", LANES.map(Lane::name).join(", ")))
    };
    args.iter().map(lane).collect()
}

/// Builds what the lanes that meet the kernel need; the host lane goes without, the image has an agent of its own.
fn prepare(workspace: &Workspace, lanes: &[Lane]) -> Result<()> {
    let need_the_agent = |lane: &Lane| lane.needs_root() && *lane != Lane::Image;
    if !lanes.iter().any(need_the_agent) || !host::is_root() {
        return Ok(());
    }
    build::release_agent(workspace).map(drop)
}

fn run(workspace: &Workspace, lane: Lane) -> Result<Tally> {
    if lane.needs_root() && !host::is_root() {
        bail!(
            "needs root, and this is an ordinary user: run `sudo -E env PATH=\"$PATH\" cargo xtask test {}`",
            lane.name()
        );
    }
    let mut command = process::cargo(workspace);
    command.arg("test");
    if lane == Lane::Netns {
        // A client that is not ours, and rules of another proxy.
        setup::ensure_packages("curl", &["curl"])?;
        setup::ensure_packages("nft", &["nftables"])?;
    }
    if lane == Lane::Image {
        setup::ensure_packages("runc", &["runc"])?;
        // Of this machine's architecture alone: it is what can run here.
        command.env("XDP_AGENT_IMAGE", image::layout(workspace, &[Arch::here()?], None)?);
    }
    if lane == Lane::Emulated {
        // Its own profile: nothing that is compiled for another lane serves here, and this one compiles faster.
        emulate(workspace, &mut command)?;
    } else {
        command.args(PROFILE.flags());
    }
    command.arg("--no-fail-fast").args(lane.arguments());
    command.env("XDP_AGENT_BIN", workspace.binary(PROFILE, "xdp-agent"));
    if lane == Lane::Kubernetes && std::env::var_os(REAL_API_SERVER).is_none() {
        println!("lane kubernetes: {REAL_API_SERVER} is not set, so the API server is the tests' own alone");
        command.args(["--skip", "real::"]);
    }
    let (tally, succeeded) = count(&mut command)?;
    if tally == Tally::default() {
        bail!("ran no test at all; what is above says why");
    }
    if !succeeded && tally.failed == 0 {
        eprintln!("lane {}: a test program ended without its result", lane.name());
        return Ok(Tally { failed: 1, ..tally });
    }
    Ok(tally)
}

/// Has the tests of a cargo call compiled as released binaries of the other architecture are, and run by an emulator.
fn emulate(workspace: &Workspace, command: &mut Command) -> Result<()> {
    let arch = Arch::other()?;
    let emulator = format!("qemu-{}-static", arch.machine());
    setup::ensure_packages(&emulator, &["qemu-user-static"])?;
    let cross = cross::ensure(&[arch])?;
    let mut compile = process::cargo_compile(workspace);
    compile.args(["test", "--no-run"]);
    process::run(dist::released(&mut compile, workspace, &cross, arch).args(Lane::Emulated.arguments()))?;
    dist::released(command, workspace, &cross, arch);
    let target = arch.target().to_uppercase().replace('-', "_");
    command.env(format!("CARGO_TARGET_{target}_RUNNER"), emulator);
    Ok(())
}

/// Runs cargo, passes on what it prints, and adds up the result lines in it.
fn count(command: &mut Command) -> Result<(Tally, bool)> {
    process::show(command);
    let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start cargo")?;
    let output = child.stdout.take().context("cargo has no output")?;
    let mut tally = Tally::default();
    let mut out = std::io::stdout().lock();
    let mut reader = BufReader::new(output);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        out.write_all(&line)?;
        if let Some(result) = result_line(&String::from_utf8_lossy(&line)) {
            tally.passed += result.passed;
            tally.failed += result.failed;
        }
        line.clear();
    }
    out.flush()?;
    Ok((tally, child.wait()?.success()))
}

/// Reads libtest's closing line: `test result: ok. 5 passed; 0 failed; …`.
pub(crate) fn result_line(line: &str) -> Option<Tally> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |word: &str| {
        let part = counts.split(';').map(str::trim).find_map(|part| part.strip_suffix(word))?;
        part.trim().parse().ok()
    };
    Some(Tally { passed: number("passed")?, failed: number("failed")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_line_of_a_test_program_is_counted() {
        let ok =
            "test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 2 filtered out; finished in 0.00s\n";
        let failed = "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(result_line(ok), Some(Tally { passed: 5, failed: 0 }));
        assert_eq!(result_line(failed), Some(Tally { passed: 3, failed: 2 }));
        assert_eq!(result_line("test a_name ... ok\n"), None);
    }

    #[test]
    fn a_lane_is_named_exactly_or_refused() {
        assert_eq!(parse(&["netns".into(), "host".into()]).unwrap(), [Lane::Netns, Lane::Host]);
        assert_eq!(parse(&[]).unwrap(), LANES[..4]);
        let error = parse(&["hosts".into()]).unwrap_err().to_string();
        assert!(error.contains("host, prog-run, netns, kubernetes, image, emulated"), "{error}");
    }
}
