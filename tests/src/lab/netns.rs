//! Anonymous network namespaces, and a private mount namespace that carries a BPF file system.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use super::runtime;

/// Where the agent expects the BPF file system.
pub const BPFFS: &str = "/sys/fs/bpf";

/// A network namespace that exists as long as a clone of this value, or a process or socket inside it.
#[derive(Clone)]
pub struct Namespace {
    name: Arc<str>,
    fd: Arc<OwnedFd>,
    netlink: rtnetlink::Handle,
}

impl Namespace {
    /// Makes an empty namespace with its loopback device up.
    ///
    /// IPv6 is off so that router solicitations and duplicate address detection do not disturb captures.
    pub fn new(name: &str) -> Result<Self> {
        let fd = thread::spawn(|| -> Result<OwnedFd> {
            unshare(CloneFlags::CLONE_NEWNET).context("no new network namespace: run as root")?;
            Ok(File::open("/proc/thread-self/ns/net")?.into())
        })
        .join()
        .expect("the namespace thread does not panic")?;
        let netlink = in_namespace(fd.as_fd(), || -> Result<rtnetlink::Handle> {
            let _context = runtime().enter();
            let (connection, handle, _) = rtnetlink::new_connection()?;
            runtime().spawn(connection);
            Ok(handle)
        })?;
        let namespace = Self { name: name.into(), fd: Arc::new(fd), netlink };
        for family in ["all", "default"] {
            namespace.sysctl(&format!("net/ipv6/conf/{family}/disable_ipv6"), "1")?;
            // Addresses are used at once: duplicates are looked for for a second, and there are none.
            namespace.sysctl(&format!("net/ipv6/conf/{family}/accept_dad"), "0")?;
            namespace.sysctl(&format!("net/ipv4/conf/{family}/rp_filter"), "0")?;
        }
        namespace.up("lo")?;
        Ok(namespace)
    }

    /// Returns the name used in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns a netlink handle whose requests concern this namespace.
    pub fn netlink(&self) -> &rtnetlink::Handle {
        &self.netlink
    }

    /// Runs a closure on a thread inside the namespace; sockets it makes stay there for good.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_namespace(self.fd.as_fd(), work)
    }

    /// Returns a command whose process runs inside the namespace and dies with the thread that starts it.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        enter(&mut command, vec![(self.fd.as_raw_fd(), CloneFlags::CLONE_NEWNET)]);
        command
    }

    /// Returns a path that `nsenter --net=…` takes while this process lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd())
    }

    /// Writes a value below `/proc/sys` as seen from inside the namespace.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.run(|| std::fs::write(format!("/proc/sys/{key}"), value))
            .with_context(|| format!("sysctl {key}={value} in {}", self.name))
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl std::fmt::Debug for Namespace {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "namespace {}", self.name)
    }
}

/// A mount namespace whose `/sys/fs/bpf` is a BPF file system of its own.
///
/// Pinned objects survive a killed agent and vanish with this value; the host's mounts are never touched.
pub struct PrivateBpffs {
    fd: OwnedFd,
}

impl PrivateBpffs {
    /// Makes the mount namespace and mounts the file system in it.
    pub fn new() -> Result<Self> {
        Self::build("bpf")
    }

    /// Makes a mount namespace in which `/sys/fs/bpf` is an ordinary directory, as on a host that forgot the mount.
    pub fn missing() -> Result<Self> {
        Self::build("tmpfs")
    }

    fn build(kind: &'static str) -> Result<Self> {
        let fd = thread::spawn(move || -> Result<OwnedFd> {
            // The thread must stop sharing its root and working directory before it may change its mounts.
            unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)
                .context("no new mount namespace: run as root")?;
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
            mount(Some(kind), BPFFS, Some(kind), MsFlags::empty(), None::<&str>)
                .with_context(|| format!("cannot mount {kind} on {BPFFS}"))?;
            Ok(File::open("/proc/thread-self/ns/mnt")?.into())
        })
        .join()
        .expect("the mount thread does not panic")?;
        Ok(Self { fd })
    }

    /// Runs a closure on a thread that sees this file system.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let fd = self.fd.as_fd();
        thread::scope(|scope| {
            let worker = scope.spawn(move || -> Result<T> {
                unshare(CloneFlags::CLONE_FS)?;
                setns(fd, CloneFlags::CLONE_NEWNS)?;
                Ok(work())
            });
            match worker.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Lists the names below a directory of the file system, sorted; a missing directory is empty.
    pub fn list(&self, directory: &str) -> Result<Vec<String>> {
        self.run(|| {
            let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
            let mut names: Vec<String> =
                entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
            names.sort();
            names
        })
    }

    /// Returns a command that runs in the network namespace and sees this file system.
    pub fn command(&self, namespace: &Namespace, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let network = (namespace.fd.as_raw_fd(), CloneFlags::CLONE_NEWNET);
        enter(&mut command, vec![network, (self.fd.as_raw_fd(), CloneFlags::CLONE_NEWNS)]);
        command
    }
}

fn in_namespace<T: Send>(fd: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let worker = scope.spawn(move || {
            setns(fd, CloneFlags::CLONE_NEWNET).expect("a namespace we made can be entered");
            work()
        });
        match worker.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn enter(command: &mut Command, namespaces: Vec<(RawFd, CloneFlags)>) {
    // SAFETY: between fork and exec the closure makes only system calls (setns, prctl) and neither allocates nor locks;
    // the descriptors belong to values the caller keeps while it spawns.
    unsafe {
        command.pre_exec(move || {
            for (fd, kind) in &namespaces {
                setns(BorrowedFd::borrow_raw(*fd), *kind)?;
            }
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}
