//! Child processes: started in the repository's root, shown before they run, named when they fail.

use crate::host;
use crate::workspace::Workspace;
use anyhow::{Context, Result, bail};
use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The cargo that started this process, or the one on PATH.
pub(crate) fn cargo_program() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Prepares a cargo call on the host side of the workspace.
pub(crate) fn cargo(workspace: &Workspace) -> Command {
    let mut command = cargo_by(&cargo_program());
    in_workspace(&mut command, workspace);
    command
}

/// Prepares a cargo call that compiles or installs and runs nothing of ours.
///
/// Inside a network namespace without a way out, crates can still be fetched from the one it was entered from: what
/// compiles does not care where it is, so it goes there. What runs the agent or a test must not.
pub(crate) fn cargo_compile(workspace: &Workspace) -> Command {
    let mut command = cargo_compile_by(&cargo_program());
    in_workspace(&mut command, workspace);
    command
}

/// As [`cargo_compile`], by a named cargo and with no directory set.
pub(crate) fn cargo_compile_by(program: &OsStr) -> Command {
    in_outer_netns(program)
}

/// Prepares a program that fetches or compiles and runs nothing of ours, where it has a way out.
pub(crate) fn in_outer_netns(program: &OsStr) -> Command {
    let Some(outer) = host::outer_netns() else { return cargo_by(program) };
    let mut command = cargo_by(OsStr::new("nsenter"));
    command.arg(format!("--net={}", outer.display())).arg("--").arg(program);
    command
}

fn cargo_by(program: &OsStr) -> Command {
    let mut command = Command::new(program);
    // `cargo run` describes this package in the environment; build scripts of others would rerun because of it.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    command
}

fn in_workspace(command: &mut Command, workspace: &Workspace) {
    command
        .current_dir(&workspace.root)
        .env("CARGO_TARGET_DIR", &workspace.target)
        .env("XDP_AGENT_BPF_DIR", workspace.bpf_objects());
}

/// Shows the command, runs it, and fails when it does.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    show(command);
    let status = command.status().with_context(|| cannot_start(command))?;
    if !status.success() {
        bail!("`{}` failed ({status})", line(command));
    }
    Ok(())
}

/// Runs a command that is not worth a line, and fails with what it said when it does.
pub(crate) fn run_briefly(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| cannot_start(command))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed: {}", line(command), said.trim());
    }
    Ok(())
}

/// Shows the command and becomes it, so that signals reach it and nothing else.
pub(crate) fn become_process(command: &mut Command) -> Result<()> {
    show(command);
    Err(command.exec()).with_context(|| cannot_start(command))
}

/// What the command prints, or nothing when it cannot run or fails; its messages are not shown.
pub(crate) fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The first file of that name in the directories of PATH.
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    all_on_path(name).into_iter().next()
}

/// Every file of that name in the directories of PATH, in their order.
pub(crate) fn all_on_path(name: &str) -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(name)).filter(|file| is_executable(file)).collect()
}

/// Whether the path is a file that may be executed.
pub(crate) fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

pub(crate) fn show(command: &Command) {
    eprintln!("$ {}", line(command));
}

fn line(command: &Command) -> String {
    // The place of a program is the machine's affair; its name is what a reader knows.
    let program = Path::new(command.get_program());
    let program = program.file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn cannot_start(command: &Command) -> String {
    format!("cannot start `{}`", command.get_program().to_string_lossy())
}
