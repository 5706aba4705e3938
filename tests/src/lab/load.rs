//! Traffic that goes on in the background while something else happens, and a strict count of how it went.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::task::JoinHandle;

use super::clients::{HttpConnection, UdpClient, Whoami, whoami_once};
use super::netns::Namespace;
use super::{block_on, runtime, wait_for};

/// A worker that only ever fails must not fill the memory with reasons.
const ERRORS_KEPT_MAX: usize = 20;

/// What each request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A connection of its own.
    NewConnections,
    /// One more request on the connection the worker began with, which must stay on its backend.
    KeptConnection,
    /// A datagram from the socket the worker began with, which must stay on its backend.
    Datagrams,
}

/// Background workers that ask one frontend who answers.
pub struct Load {
    kind: Kind,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    started: Instant,
    workers: Vec<JoinHandle<Report>>,
}

/// How the requests went.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Requests that were answered.
    pub answered: u64,
    /// Reasons of those that were not; at most a few per worker.
    pub errors: Vec<String>,
    /// Answers by backend.
    pub by_backend: BTreeMap<String, u64>,
    /// Time of every answered request, ascending.
    pub latencies: Vec<Duration>,
    /// From start to stop.
    pub elapsed: Duration,
}

impl Load {
    /// Starts workers that go on until stopped.
    pub fn start(client: &Namespace, target: SocketAddr, kind: Kind, workers: usize) -> Self {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let workers = (0..workers)
            .map(|_| {
                let worker = Worker { client: client.clone(), target, kind, kept: Kept::None };
                runtime().spawn(worker.work(Arc::clone(&stop), Arc::clone(&answered)))
            })
            .collect();
        Self { kind, stop, answered, started: Instant::now(), workers }
    }

    /// Waits until so many more requests were answered.
    pub fn wait_answered(&self, more: u64, limit: Duration) -> Result<()> {
        let start = self.answered.load(Ordering::Relaxed);
        wait_for(&format!("{more} more answers ({:?})", self.kind), limit, || {
            let now = self.answered.load(Ordering::Relaxed) - start;
            ensure!(now >= more, "{now} answers so far");
            Ok(())
        })
    }

    /// Stops the workers after their present requests and returns the sums.
    pub fn stop(self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        let mut sum = Report::default();
        for worker in self.workers {
            match block_on(worker) {
                Ok(report) => sum.add(report),
                Err(panic) => sum.errors.push(format!("a worker panicked: {panic}")),
            }
        }
        sum.elapsed = self.started.elapsed();
        sum.latencies.sort_unstable();
        sum
    }
}

impl Report {
    /// Fails unless there were answers and every request was answered.
    pub fn all_answered(&self) -> Result<()> {
        ensure!(self.errors.is_empty(), "{} answered, but: {:#?}", self.answered, self.errors);
        ensure!(self.answered > 0, "no request was sent");
        Ok(())
    }

    /// Returns the latency below which a part of the requests stayed, such as 0.99.
    pub fn quantile(&self, part: f64) -> Duration {
        let last = self.latencies.len().saturating_sub(1);
        self.latencies.get((last as f64 * part) as usize).copied().unwrap_or_default()
    }

    /// Returns answered requests per second.
    pub fn per_second(&self) -> f64 {
        self.answered as f64 / self.elapsed.as_secs_f64().max(f64::EPSILON)
    }

    fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.errors.extend(other.errors);
        self.latencies.extend(other.latencies);
        for (backend, count) in other.by_backend {
            *self.by_backend.entry(backend).or_default() += count;
        }
    }
}

struct Worker {
    client: Namespace,
    target: SocketAddr,
    kind: Kind,
    kept: Kept,
}

enum Kept {
    None,
    Connection(HttpConnection, Option<String>),
    Socket(UdpClient, Option<String>),
}

impl Worker {
    async fn work(mut self, stop: Arc<AtomicBool>, answered: Arc<AtomicU64>) -> Report {
        let mut report = Report::default();
        while !stop.load(Ordering::Relaxed) && report.errors.len() < ERRORS_KEPT_MAX {
            let start = Instant::now();
            match self.ask().await {
                Ok(whoami) => {
                    report.answered += 1;
                    answered.fetch_add(1, Ordering::Relaxed);
                    report.latencies.push(start.elapsed());
                    *report.by_backend.entry(whoami.backend).or_default() += 1;
                }
                Err(error) => report.errors.push(format!("{error:#}")),
            }
            // Answers may all be there already, and the runtime's other work must get its turn.
            tokio::task::yield_now().await;
        }
        report
    }

    async fn ask(&mut self) -> Result<Whoami> {
        if let Kept::None = self.kept {
            self.kept = match self.kind {
                Kind::NewConnections => return whoami_once(&self.client, self.target).await,
                Kind::KeptConnection => {
                    Kept::Connection(HttpConnection::open(&self.client, self.target).await?, None)
                }
                Kind::Datagrams => Kept::Socket(UdpClient::open(&self.client, self.target, 0).await?, None),
            };
        }
        let (whoami, first) = match &mut self.kept {
            Kept::None => return whoami_once(&self.client, self.target).await,
            Kept::Connection(connection, first) => (connection.whoami().await?, first),
            Kept::Socket(socket, first) => (socket.whoami().await?, first),
        };
        let first = first.get_or_insert_with(|| whoami.backend.clone());
        ensure!(*first == whoami.backend, "moved from {first} to {}", whoami.backend);
        Ok(whoami)
    }
}
