//! A small network world on one machine, built and taken down by one process.

pub mod agent;
pub mod api_server;
pub mod caller;
pub mod capture;
pub mod cgroup;
pub mod clients;
pub mod devices;
pub mod fragments;
pub mod link;
pub mod load;
pub mod manifests;
pub mod netns;
pub mod packets;
pub mod pass;
pub mod servers;
pub mod snapshot;
pub mod tap;
pub mod world;

use std::future::Future;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use tokio::runtime::Runtime;

/// Sockets of clients and servers live in one process, so a thousand connections need several thousand descriptors.
const OPEN_FILES_MIN: libc::rlim_t = 16_384;

/// Pause between two looks at a condition.
const POLL_INTERVAL_MS: u64 = 10;

/// How much longer than usual everything may take, as an emulated machine says by this variable.
const PATIENCE: &str = "XDP_AGENT_LAB_PATIENCE";

/// Stretches a time limit where the machine is known to be slow.
pub fn patient(limit: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    let read = || std::env::var(PATIENCE).ok().and_then(|factor| factor.parse().ok()).unwrap_or(1);
    limit * *FACTOR.get_or_init(read)
}

/// Keeps this thread on one CPU.
///
/// # Errors
/// When there is no such CPU for this process.
pub fn stay_on(cpu: usize) -> std::io::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &cpus)?)
}

/// Returns the runtime that drives every socket of the lab, whichever namespace the socket belongs to.
pub fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        raise_open_files();
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a tokio runtime needs threads and an epoll descriptor")
    })
}

/// Runs a future to its end on the lab's runtime; not to be called from within one.
pub fn block_on<F: Future>(future: F) -> F::Output {
    runtime().block_on(future)
}

/// Looks at a condition until it yields a value, or fails with the last reason once the time is over.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let limit = patient(limit);
    let end = Instant::now() + limit;
    loop {
        let error = match look() {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if Instant::now() >= end {
            return Err(error.context(format!("waited {limit:?} for {what}")));
        }
        std::thread::park_timeout(Duration::from_millis(POLL_INTERVAL_MS));
    }
}

/// Looks again and again for so long, and fails with the first look that does.
pub fn holds_for(span: Duration, mut look: impl FnMut() -> Result<()>) -> Result<()> {
    let end = Instant::now() + patient(span);
    while Instant::now() < end {
        look()?;
        std::thread::park_timeout(Duration::from_millis(POLL_INTERVAL_MS));
    }
    Ok(())
}

/// Fails with one sentence that says what to do when this process cannot build namespaces.
pub fn require_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    bail!(
        "the lab builds network namespaces and loads BPF programs: run it as root (for example with sudo -E)"
    )
}

fn raise_open_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit for the call to fill.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 || limit.rlim_cur >= OPEN_FILES_MIN {
        return;
    }
    limit.rlim_cur = OPEN_FILES_MIN;
    limit.rlim_max = limit.rlim_max.max(OPEN_FILES_MIN);
    // SAFETY: `limit` is a valid rlimit; a refusal leaves the old limit, and large cases then say "too many open files".
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
}

/// Adds the time limit to a future and names what was waited for.
pub async fn within<T>(what: &str, limit: Duration, future: impl Future<Output = Result<T>>) -> Result<T> {
    let limit = patient(limit);
    tokio::time::timeout(limit, future).await.with_context(|| format!("{what} took longer than {limit:?}"))?
}
