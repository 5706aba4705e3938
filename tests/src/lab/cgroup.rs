//! Cgroups of tests: socket hooks are attached to one, and only the processes in it notice.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};

use super::wait_for;

const GONE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// A cgroup (v2) that goes with this value; its processes have to be gone by then.
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes an empty cgroup below the root of the hierarchy.
    pub fn new(name: &str) -> Result<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self::make(root()?.join(format!("xdp-agent-test-{}-{number}-{name}", std::process::id())))
    }

    /// Makes an empty cgroup in this one, as each pod has its own in that of the kubelet.
    pub fn child(&self, name: &str) -> Result<Self> {
        Self::make(self.path.join(name))
    }

    /// Returns its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets the process of a command begin in this cgroup.
    pub fn start_in(&self, command: &mut Command) -> Result<()> {
        let procs = self.path.join("cgroup.procs");
        let file = fs::OpenOptions::new().write(true).open(&procs);
        let fd: OwnedFd = file.with_context(|| format!("cannot open {}", procs.display()))?.into();
        // SAFETY: between fork and exec the closure makes one system call; the descriptor is its own.
        unsafe {
            command.pre_exec(move || match libc::write(fd.as_raw_fd(), b"0".as_ptr().cast(), 1) {
                1 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        Ok(())
    }

    fn make(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path).with_context(|| format!("cannot make the cgroup {}", path.display()))?;
        Ok(Self { path })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The kernel empties a cgroup a moment after its last process has ended.
        let result = wait_for("a cgroup to be empty", GONE_TIMEOUT, || Ok(fs::remove_dir(&self.path)?));
        if let Err(error) = result {
            eprintln!("{} stays behind: {error:#}", self.path.display());
        }
    }
}

/// Returns where the hierarchy v2 is mounted.
fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let found = fields.find(|fields| fields.get(2) == Some(&"cgroup2"));
    let found = found.context("no cgroup v2 is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")?;
    Ok(PathBuf::from(found[1]))
}
