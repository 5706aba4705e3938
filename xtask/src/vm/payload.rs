//! What runs in a guest: the compiled lanes, the agent and its objects, the same for every kernel of an architecture.

use super::{Lane, Request, container, initramfs::Initramfs};
use crate::arch::Arch;
use crate::build;
use crate::cross;
use crate::dist;
use crate::process;
use crate::setup;
use crate::workspace::Workspace;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where a lane finds the programs, and that time goes slowly.
const ENVIRONMENT: &str =
    "XDP_AGENT_BPF_DIR=/bpf XDP_AGENT_BIN=/xdp-agent XDP_AGENT_IMAGE=/layout XDP_AGENT_LAB_PATIENCE=10";

/// What is asked of the agent about every card.
const DOCTOR: &str = include_str!("doctor.sh");

/// The list of what is run where the kernel is too old for the programs: the agent has to refuse it.
pub(crate) fn refusal() -> Vec<u8> {
    let mut archive = Initramfs::default();
    // No device is needed to be refused, and old kernels lack drivers.
    archive.file("modules", b"");
    archive.file("run.list", b"refusal /xdp-agent run --services /tmp --iface lo 2>&1\n");
    archive.finish()
}

/// Builds everything and packs it, with the list of what is run.
pub(crate) fn pack(workspace: &Workspace, arch: Arch, request: &Request) -> Result<Vec<u8>> {
    let objects = workspace.bpf_objects();
    build::bpf_objects(workspace, &setup::ensure()?, None)?;
    let programs = compile(workspace, arch, request)?;
    let program = |name: &str| {
        let found = executable(&programs, name);
        found.with_context(|| format!("cargo names no program {name}"))
    };
    let mut archive = Initramfs::default();
    let mut binaries = vec![program("xdp-agent")?];
    for object in std::fs::read_dir(&objects).with_context(|| format!("cannot read {}", objects.display()))? {
        let object = object?;
        archive.copy(&format!("bpf/{}", object.file_name().to_string_lossy()), &object.path())?;
    }
    let mut list = String::new();
    let mut names = vec!["xdp-agent"];
    for lane in &request.lanes {
        let Some(target) = lane.target() else {
            archive.file("doctor.sh", DOCTOR.as_bytes());
            list.push_str(&format!("{} sh /doctor.sh 2>&1\n", lane.name()));
            continue;
        };
        binaries.push(program(target)?);
        names.push(target);
        list.push_str(&format!(
            "{} {ENVIRONMENT} /{} --test-threads={} {} 2>&1\n",
            lane.name(),
            target,
            lane.threads(),
            request.tests(*lane).join(" ")
        ));
    }
    for (name, binary) in names.iter().zip(&binaries) {
        archive.copy(name, binary)?;
    }
    archive.file("run.list", list.as_bytes());
    if request.lanes.contains(&Lane::Netns) || request.lanes.contains(&Lane::Image) {
        // It is started by tests of these lanes, at the path where cargo has built it.
        let caller = program("caller")?;
        archive.copy(&caller.to_string_lossy(), &caller)?;
    }
    if request.lanes.contains(&Lane::Image) {
        binaries.extend(container::pack(workspace, arch, &mut archive)?);
    }
    for library in libraries(&binaries)? {
        archive.copy(&library.to_string_lossy(), &library)?;
    }
    Ok(archive.finish())
}

/// Compiles the agent and the lanes, for this machine's processor as the lanes are compiled here, for another one as
/// released binaries are; cargo says where they are.
fn compile(workspace: &Workspace, arch: Arch, request: &Request) -> Result<String> {
    let call = |verb: &[&str]| -> Result<Command> {
        let mut command = process::cargo_compile(workspace);
        command.args(verb).args(request.profile.flags());
        if arch != Arch::here()? {
            dist::released(&mut command, workspace, &cross::ensure(&[arch])?, arch);
        }
        Ok(command)
    };
    // Whichever lanes are asked for, the features are the same: nothing is compiled again for fewer.
    let lanes = Lane::ALL.iter().filter(|lane| lane.target().is_some());
    let features: Vec<_> = lanes.map(|lane| format!("xdp-agent-tests/{}", lane.name())).collect();
    let mut messages = run(&mut call(&["build", "--bin", "xdp-agent", FORMAT])?)?;
    let mut tests = call(&["test", "--no-run", FORMAT, "--features", &features.join(",")])?;
    let targets: Vec<_> = request.lanes.iter().filter_map(|lane| lane.target()).collect();
    if targets.is_empty() {
        return Ok(messages);
    }
    for target in targets {
        tests.args(["--test", target]);
    }
    messages.push_str(&run(&mut tests)?);
    Ok(messages)
}

const FORMAT: &str = "--message-format=json-render-diagnostics";

fn run(command: &mut Command) -> Result<String> {
    process::show(command);
    let output = command.stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("the guests' programs do not compile");
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The program of a test target in cargo's messages, one JSON object a line.
fn executable(messages: &str, target: &str) -> Option<PathBuf> {
    let name = format!("\"name\":\"{target}\"");
    let of_target =
        messages.lines().filter(|line| line.contains("\"compiler-artifact\"") && line.contains(&name));
    let mut paths = of_target.filter_map(|line| {
        let (_, rest) = line.split_once("\"executable\":\"")?;
        Some(PathBuf::from(rest.split('"').next()?))
    });
    paths.next_back()
}

/// The shared libraries of programs, and what loads them; none of a static one.
fn libraries(programs: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut libraries = Vec::new();
    for program in programs {
        let output = process::output(Command::new("ldd").arg(program)).unwrap_or_default();
        libraries.extend(output.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from));
    }
    libraries.sort();
    libraries.dedup();
    let missing = libraries.iter().find(|library: &&PathBuf| !Path::new(library).is_file());
    if let Some(missing) = missing {
        bail!("the library {} is not there", missing.display());
    }
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_program_is_found_in_the_messages_of_cargo() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"netns"},"executable":null}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"netns"},"executable":"/t/deps/netns-1"}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"prog_run"},"executable":"/t/deps/prog_run-1"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        assert_eq!(executable(messages, "netns"), Some(PathBuf::from("/t/deps/netns-1")));
        assert_eq!(executable(messages, "watch"), None);
    }
}
