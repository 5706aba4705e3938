//! What runs in a guest: the compiled lanes, the agent and its objects, the same for every kernel of an architecture.

use super::{Architecture, Lane, initramfs::Initramfs};
use crate::build;
use crate::process;
use crate::workspace::{Profile, Workspace};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Builds everything and packs it, with the list of what is run.
pub(crate) fn pack(
    workspace: &Workspace,
    architecture: Architecture,
    lanes: &[Lane],
    profile: Profile,
    filter: Option<&str>,
) -> Result<Vec<u8>> {
    let agent = build::agent_and_objects(workspace, profile)?;
    let mut archive = Initramfs::default();
    let mut programs = vec![agent.clone()];
    archive.copy("xdp-agent", &agent)?;
    for object in std::fs::read_dir(workspace.bpf_objects())? {
        let object = object?;
        archive.copy(&format!("bpf/{}", object.file_name().to_string_lossy()), &object.path())?;
    }
    let mut list = String::new();
    let messages = compile(workspace, lanes, profile)?;
    for lane in lanes {
        let program = executable(&messages, lane.target());
        let program = program.with_context(|| format!("cargo names no program of {}", lane.name()))?;
        archive.copy(lane.target(), &program)?;
        let filter = filter.map(|filter| format!(" {filter}")).unwrap_or_default();
        list.push_str(&format!(
            "{} XDP_AGENT_BPF_DIR=/bpf XDP_AGENT_BIN=/xdp-agent RUST_BACKTRACE=0 /{} --test-threads={}{filter} 2>&1\n",
            lane.name(),
            lane.target(),
            lane.threads(),
        ));
        programs.push(program);
    }
    list.push_str("doctor /xdp-agent doctor --output json\n");
    archive.file("run.list", list.as_bytes());
    for library in libraries(&programs)? {
        archive.copy(&library.to_string_lossy(), &library)?;
    }
    debug_assert!(architecture.is_native());
    Ok(archive.finish())
}

/// Compiles the lanes, all at once so that what they share is compiled once; cargo says where their programs are.
fn compile(workspace: &Workspace, lanes: &[Lane], profile: Profile) -> Result<String> {
    let mut command = process::cargo_compile(workspace);
    command.arg("test").args(profile.flags()).args(["--no-run", "--message-format=json-render-diagnostics"]);
    // Whichever lanes are asked for, the features are the same: nothing is compiled again for fewer.
    let features = Lane::ALL.map(|lane| format!("xdp-agent-tests/{}", lane.name()));
    command.arg("--features").arg(features.join(","));
    for lane in lanes {
        command.args(["--test", lane.target()]);
    }
    process::show(&command);
    let output = command.stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("the lanes do not compile");
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The program of a test target in cargo's messages, one JSON object a line.
fn executable(messages: &str, target: &str) -> Option<PathBuf> {
    let name = format!("\"name\":\"{target}\"");
    let of_target = messages.lines().filter(|line| line.contains("\"compiler-artifact\"") && line.contains(&name));
    let paths = of_target.filter_map(|line| {
        let (_, rest) = line.split_once("\"executable\":\"")?;
        Some(PathBuf::from(rest.split('"').next()?))
    });
    paths.last()
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
