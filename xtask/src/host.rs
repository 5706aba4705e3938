//! What this process may do on this machine: privileges, the BPF file system, its network namespace.

use crate::process;
use anyhow::{Result, bail};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const BPFFS: &str = "/sys/fs/bpf";

/// How far up to look for the namespace this one was entered from: deeper than any chain of shells.
const ANCESTORS_MAX: usize = 64;

/// Whether the effective user is root.
pub(crate) fn is_root() -> bool {
    // /proc/self belongs to the effective user of the process.
    Path::new("/proc/self").metadata().is_ok_and(|meta| meta.uid() == 0)
}

/// Fails early, with one message, when neither root nor sudo is there.
pub(crate) fn can_become_root(verb: &str) -> Result<()> {
    if is_root() || process::on_path("sudo").is_some() {
        return Ok(());
    }
    bail!("`{verb}` loads BPF programs and needs root; there is no sudo here: run it as root")
}

/// Prepares a program to run as root, through sudo if that is needed.
///
/// Only the program itself goes through sudo, never the build: files in the target directory stay the user's. The
/// agent's own variables and the log filter are handed on, because sudo clears the environment.
pub(crate) fn as_root(program: &Path) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg("--").arg("env");
    for (name, value) in std::env::vars() {
        if name.starts_with("XDP_AGENT_") || name == "RUST_LOG" || name == "RUST_BACKTRACE" {
            command.arg(format!("{name}={value}"));
        }
    }
    command.arg(program);
    command
}

/// Mounts the BPF file system where the agent pins its maps, unless it is there.
///
/// It stays, as on any machine that uses BPF: so this is for running the agent here, and lanes and demo have mounts of
/// their own.
/// `ip netns exec` hides the machine's mount and gives its command a private /sys: the one made here ends with it.
pub(crate) fn mount_bpffs() -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    if bpffs_is_mounted(&mounts) {
        return Ok(());
    }
    eprintln!("setup: {BPFFS} is not mounted: mounting the BPF file system there");
    process::run(as_root(Path::new("mount")).args(["-t", "bpf", "bpf", BPFFS]))
}

fn bpffs_is_mounted(mounts: &str) -> bool {
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some(BPFFS) && fields.next() == Some("bpf")
    })
}

/// The network namespace this one was entered from, when it is another and can be entered: that of the outermost
/// ancestor whose namespaces may be read.
pub(crate) fn outer_netns() -> Option<PathBuf> {
    if !is_root() || process::on_path("nsenter").is_none() {
        return None;
    }
    let own = std::fs::read_link("/proc/self/ns/net").ok()?;
    let mut outer = None;
    let mut pid = std::process::id();
    for _ in 0..ANCESTORS_MAX {
        let Some(parent) = parent(pid) else { break };
        pid = parent;
        let namespace = PathBuf::from(format!("/proc/{pid}/ns/net"));
        if let Ok(link) = std::fs::read_link(&namespace) {
            outer = (link != own).then_some(namespace);
        }
    }
    outer
}

fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses and may hold anything; state and parent follow it.
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(1)?.parse().ok().filter(|&parent| parent != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bpffs_counts_as_mounted_only_at_its_own_place() {
        assert!(bpffs_is_mounted("proc /proc proc rw 0 0\nbpf /sys/fs/bpf bpf rw,relatime 0 0\n"));
        assert!(!bpffs_is_mounted("bpf /run/bpf bpf rw 0 0\ntmpfs /sys/fs/bpf tmpfs rw 0 0\n"));
    }
}
