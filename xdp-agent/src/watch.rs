//! Services, EndpointSlices, the own Node and ServiceCIDRs from an API server.
//!
//! Each kind is listed in pages and then watched from there. A watch that ends is resumed where it was; one that cannot be
//! resumed is listed again, and what a list does not hold any more is gone. Every attempt waits first, with jitter and
//! longer each time, also when a server ends each watch at once without an error. An object that does not have the form of
//! its kind keeps its earlier version and stops nothing else, and a line that is no event at all leads to a new list, for
//! nobody knows what it said.
//!
//! The last two are why kube's `watcher` is not used: a list with one bad item fails as a whole there, a line that cannot
//! be read is skipped and its change lost, and watches that end at once are repeated without a pause. This file and those
//! below it are the only ones that name the Kubernetes client.

use std::collections::{BTreeMap, BTreeSet};

use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tracing::info;

use crate::{
    objects::{Change, ObjectName},
    problem::{Problem, ProblemKind},
    source::{BATCH_MAX, Event, Kind},
};

pub use self::{
    client::Access,
    event::{Notice, event},
    health::{KindHealth, KindStatus, Metrics, SourceHealth, State},
    pace::Pace,
};
use self::{client::Connection, follow::Follower, health::Reporter};

mod client;
mod decode;
mod event;
mod follow;
mod health;
mod pace;

/// What a follower of one kind tells.
#[derive(Debug)]
enum Told {
    /// An object is new, has changed or is gone.
    Object(Kind, ObjectName, Change),
    /// An object cannot be used, and why; its earlier version stays.
    Bad(Kind, ObjectName, String),
    /// Everything of a kind has been told, or there is no such kind.
    Listed(Kind),
}

/// What to watch, and how patiently.
#[derive(Clone, Debug)]
pub struct Options {
    /// The API server.
    pub access: Access,
    /// Name of this node.
    pub node: String,
    /// Whether the other nodes matter too.
    pub all_nodes: bool,
    /// Times.
    pub pace: Pace,
}

/// A running watch; dropping it ends it.
#[derive(Debug)]
pub struct Watch {
    _tasks: JoinSet<()>,
    /// How each kind fares.
    pub health: watch::Receiver<SourceHealth>,
}

impl Watch {
    /// Starts watching. An API server that cannot be reached is asked again until it can be.
    ///
    /// # Errors
    /// When the kubeconfig, or what the pod is given in its place, cannot be read.
    pub async fn start(
        options: Options,
        events: mpsc::Sender<Event>,
        metrics: Metrics,
    ) -> anyhow::Result<Self> {
        let (health, receiver) = watch::channel(SourceHealth::default());
        let reporter = Reporter::new(health, metrics);
        let (told, telling) = mpsc::channel(BATCH_MAX);
        let mut tasks = JoinSet::new();
        for kind in Kind::ALL {
            let connection = Connection::open(options.access.clone()).await?;
            let follower = Follower::new(kind, &options, connection, told.clone(), reporter.clone());
            tasks.spawn(follower.run());
        }
        tasks.spawn(collect(telling, events));
        Ok(Self { _tasks: tasks, health: receiver })
    }
}

/// Hands on what all kinds tell, in batches of what is there.
async fn collect(mut told: mpsc::Receiver<Told>, events: mpsc::Sender<Event>) {
    let mut batch = Vec::new();
    let mut problems: BTreeMap<(Kind, ObjectName), Problem> = BTreeMap::new();
    let mut missing: BTreeSet<Kind> = Kind::ALL.into();
    while told.recv_many(&mut batch, BATCH_MAX).await > 0 {
        let mut changes = Vec::with_capacity(batch.len());
        let (mut problems_changed, mut listed) = (false, false);
        for told in batch.drain(..) {
            match told {
                Told::Object(kind, name, change) => {
                    changes.push(change);
                    problems_changed |= problems.remove(&(kind, name)).is_some();
                }
                Told::Bad(kind, name, message) => {
                    let object = format!("{} {}", kind.name(), name);
                    let problem = Problem::of(ProblemKind::Invalid, object, message);
                    let before = problems.insert((kind, name), problem.clone());
                    problems_changed |= before.as_ref() != Some(&problem);
                }
                Told::Listed(kind) => listed |= missing.remove(&kind) && missing.is_empty(),
            }
        }
        let mut said = Vec::new();
        if !changes.is_empty() {
            said.push(Event::Changes(changes));
        }
        if problems_changed {
            said.push(Event::Problems(problems.values().cloned().collect()));
        }
        if listed {
            info!("everything is listed");
            said.push(Event::Synced);
        }
        for event in said {
            if events.send(event).await.is_err() {
                return; // nobody listens any more
            }
        }
    }
}
