//! How watching goes, for people and for Prometheus.

use std::{sync::Arc, time::Instant};

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use serde::Serialize;
use tokio::sync::watch;

use crate::source::Kind;

type Label = [(&'static str, &'static str); 1];

/// What is counted while watching, each by kind of object.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    events: Family<Label, Counter>,
    relists: Family<Label, Counter>,
    failures: Family<Label, Counter>,
    bad_objects: Family<Label, Counter>,
    up_to_date: Family<Label, Gauge>,
}

impl Metrics {
    /// Adds the metrics to a registry, all of them at zero.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        for (name, help, family) in [
            ("watch_events", "Changes of objects that the API server told, by kind", &metrics.events),
            (
                "watch_relists",
                "Lists after the first, because a watch could not be resumed",
                &metrics.relists,
            ),
            ("watch_failures", "Lists and watches that failed", &metrics.failures),
            (
                "watch_bad_objects",
                "Objects that do not have the form of their kind, as often as they came",
                &metrics.bad_objects,
            ),
        ] {
            for kind in Kind::ALL {
                drop(family.get_or_create(&[("kind", kind.label())]));
            }
            registry.register(name, help, family.clone());
        }
        for kind in Kind::ALL {
            drop(metrics.up_to_date.get_or_create(&[("kind", kind.label())]));
        }
        let help = "1 while the API server is watched, or has no such kind; 0 while what is known may be old";
        registry.register("watch_up_to_date", help, metrics.up_to_date.clone());
        metrics
    }
}

/// How each kind fares.
#[derive(Clone, Debug)]
pub struct SourceHealth {
    /// By kind, in the order of [`Kind::ALL`].
    pub kinds: [KindHealth; Kind::ALL.len()],
}

/// How one kind fares.
#[derive(Clone, Debug)]
pub struct KindHealth {
    /// The kind.
    pub kind: Kind,
    /// What is being done.
    pub state: State,
    /// Since when.
    pub since: Instant,
    /// When the API server last told a change.
    pub last_event: Option<Instant>,
}

/// What is being done about one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It is listed.
    Listing,
    /// It is watched: what is known is what is.
    Watching,
    /// The API server does not have it.
    Absent,
    /// It did not work, and is tried again; what was known stays.
    Failing(String),
}

/// How one kind fares, for `/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KindStatus {
    /// The kind.
    pub kind: &'static str,
    /// `listing`, `watching`, `absent` or `failing`.
    pub state: &'static str,
    /// Seconds in this state.
    pub seconds: u64,
    /// Seconds since the API server last told a change.
    pub last_event_seconds: Option<u64>,
    /// Why it fails.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl Default for SourceHealth {
    fn default() -> Self {
        let new = |kind| KindHealth { kind, state: State::Listing, since: Instant::now(), last_event: None };
        Self { kinds: Kind::ALL.map(new) }
    }
}

impl SourceHealth {
    /// Whether every kind is followed, so that nothing that is known is old.
    pub fn is_fresh(&self) -> bool {
        self.kinds.iter().all(|kind| matches!(kind.state, State::Watching | State::Absent))
    }

    /// The same for people.
    pub fn status(&self, now: Instant) -> Vec<KindStatus> {
        let seconds = |then: Instant| now.saturating_duration_since(then).as_secs();
        let status = |health: &KindHealth| KindStatus {
            kind: health.kind.name(),
            state: health.state.label(),
            seconds: seconds(health.since),
            last_event_seconds: health.last_event.map(seconds),
            message: match &health.state {
                State::Failing(message) => Some(message.clone()),
                State::Listing | State::Watching | State::Absent => None,
            },
        };
        self.kinds.iter().map(status).collect()
    }
}

impl State {
    /// One word.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Listing => "listing",
            Self::Watching => "watching",
            Self::Absent => "absent",
            Self::Failing(_) => "failing",
        }
    }
}

/// Where followers say how they fare.
#[derive(Clone, Debug)]
pub(super) struct Reporter {
    health: Arc<watch::Sender<SourceHealth>>,
    metrics: Metrics,
}

impl Reporter {
    pub(super) fn new(health: watch::Sender<SourceHealth>, metrics: Metrics) -> Self {
        Self { health: Arc::new(health), metrics }
    }

    /// The kind is in this state from now on, unless it was already.
    pub(super) fn state(&self, kind: Kind, state: State) {
        let is_up_to_date = matches!(state, State::Watching | State::Absent);
        self.metrics.up_to_date.get_or_create(&[("kind", kind.label())]).set(is_up_to_date.into());
        self.health.send_if_modified(|health| {
            let of_kind = &mut health.kinds[kind as usize];
            if of_kind.state == state {
                return false;
            }
            (of_kind.state, of_kind.since) = (state, Instant::now());
            true
        });
    }

    /// The API server told a change.
    pub(super) fn event(&self, kind: Kind) {
        self.metrics.events.get_or_create(&[("kind", kind.label())]).inc();
        self.health.send_if_modified(|health| {
            health.kinds[kind as usize].last_event = Some(Instant::now());
            false // every change is more than anybody wants to wake for
        });
    }

    pub(super) fn relist(&self, kind: Kind) {
        self.metrics.relists.get_or_create(&[("kind", kind.label())]).inc();
    }

    pub(super) fn failure(&self, kind: Kind) {
        self.metrics.failures.get_or_create(&[("kind", kind.label())]).inc();
    }

    pub(super) fn bad_object(&self, kind: Kind) {
        self.metrics.bad_objects.get_or_create(&[("kind", kind.label())]).inc();
    }
}
