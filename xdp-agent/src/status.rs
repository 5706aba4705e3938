//! What the agent says about itself: the picture behind `/status`, and readiness as a value.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use serde::Serialize;
use tokio::sync::watch;

use crate::{
    cgroup::{self, Cgroup},
    cluster::{HealthCheck, NoLocalEndpoints},
    config::SocketLb,
    devices::{Mode, Transmit},
    watch::KindStatus,
};

/// A writer that has not moved for this long, or lets changes wait for so long, is stuck: twice the period after which
/// kube-proxy tries again.
pub const STUCK_AFTER: Duration = Duration::from_secs(60);

/// Everything `/status` shows.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Status {
    /// Version of the agent.
    pub version: &'static str,
    /// Name of this node.
    pub node: String,
    /// Whether everything is in place.
    pub ready: bool,
    /// What is still waited for.
    pub waiting_for: Vec<&'static str>,
    /// Managed interfaces.
    pub interfaces: Vec<InterfaceStatus>,
    /// Devices of pods that are served packet by packet.
    pub pod_interfaces: Vec<String>,
    /// Devices of pods that are not, because they have refused.
    pub refused_pod_interfaces: Vec<RefusedStatus>,
    /// Service ports that are served.
    pub services: usize,
    /// Addresses and ports that clients connect to.
    pub frontends: u32,
    /// Endpoints in the maps.
    pub backends: u32,
    /// Flows.
    pub flows: FlowCounts,
    /// What could not be done as asked.
    pub problems: Vec<ProblemStatus>,
    /// Source addresses and ports of translated flows.
    pub snat: SnatStatus,
    /// Ports that the kernel gives to no connection of its own because of this agent; empty for none.
    pub reserved_ports: String,
    /// Where objects are read from.
    pub sources: Vec<PathBuf>,
    /// How watching the API server goes, by kind of object; empty when objects come from files.
    pub api_server: Vec<KindStatus>,
    /// Whose sockets are served.
    pub sockets: SocketStatus,
    /// Routing epoch.
    pub epoch: u32,
    /// Whether this agent took over from an earlier one.
    pub adopted: bool,
}

/// A managed interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InterfaceStatus {
    /// Its name.
    pub name: String,
    /// Its index, 0 while it is not there.
    pub ifindex: u32,
    /// How XDP runs.
    pub mode: Mode,
    /// Why it runs so.
    pub reason: String,
    /// Whether translated frames may leave here at XDP.
    pub xmit: Transmit,
    /// Source addresses of translated flows that leave here; of an interface in several networks one for each.
    pub addresses: Vec<String>,
}

/// A device that has refused programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RefusedStatus {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
}

impl RefusedStatus {
    /// A device that has refused for a reason.
    pub fn new(name: &str, reason: &str) -> Self {
        Self { name: name.to_owned(), reason: reason.to_owned() }
    }
}

/// The socket hooks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SocketStatus {
    /// Whose sockets are served: `all`, `host-only` or `off`.
    pub scope: &'static str,
    /// The cgroup that the hooks are attached to, if they are.
    pub cgroup: Option<PathBuf>,
    /// What may be wrong with it.
    pub warning: Option<&'static str>,
}

impl SocketStatus {
    /// Takes the cgroup that the hooks are attached to.
    pub fn on(self, cgroup: Option<&Cgroup>) -> Self {
        let warning = match cgroup {
            Some(cgroup) => cgroup.is_leaf.then_some(cgroup::LEAF),
            None if self.scope == SocketLb::Off.label() => None,
            None if self.cgroup.is_some() => Some(cgroup::GONE),
            None => Some(cgroup::NONE),
        };
        Self { cgroup: cgroup.map(|cgroup| cgroup.path.clone()), warning, ..self }
    }
}

/// How many flows there are; a flow has two entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FlowCounts {
    /// Open TCP connections.
    pub tcp: u32,
    /// TCP connections that are closing.
    pub tcp_closing: u32,
    /// UDP flows.
    pub udp: u32,
    /// SCTP associations.
    pub sctp: u32,
    /// Flows that are not established yet.
    pub embryonic: u32,
    /// Entries of the table of established flows.
    pub established_entries: u32,
    /// Entries of the table of new flows.
    pub embryonic_entries: u32,
    /// Entries removed by the last look.
    pub removed: u32,
}

/// A problem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProblemStatus {
    /// Its kind, as in the metric.
    pub kind: &'static str,
    /// What is wrong, where, and what to do.
    pub message: String,
}

/// Source addresses and ports of translated flows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SnatStatus {
    /// Addresses, one a managed interface.
    pub addresses: Vec<String>,
    /// Ports as MIN-MAX.
    pub range: String,
}

/// The status, and what is still waited for.
#[derive(Debug, Default)]
pub struct Shared {
    status: Mutex<Status>,
    pending: Mutex<BTreeSet<&'static str>>,
}

/// Something that the agent is not ready without; dropping it says that it is there.
#[derive(Debug)]
pub struct NotReady {
    shared: Arc<Shared>,
    what: &'static str,
}

impl Shared {
    /// A status of nothing yet.
    pub fn new(status: Status) -> Arc<Self> {
        Arc::new(Self { status: Mutex::new(status), pending: Mutex::default() })
    }

    /// Something that has to be there before the agent is ready.
    pub fn wait_for(self: &Arc<Self>, what: &'static str) -> NotReady {
        lock(&self.pending).insert(what);
        NotReady { shared: Arc::clone(self), what }
    }

    /// What is still waited for; nothing when the agent is ready.
    pub fn pending(&self) -> Vec<&'static str> {
        lock(&self.pending).iter().copied().collect()
    }

    /// Changes the status.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut lock(&self.status));
    }

    /// The status as it is now.
    pub fn status(&self) -> Status {
        let mut status = lock(&self.status).clone();
        status.waiting_for = self.pending();
        status.ready = status.waiting_for.is_empty();
        status
    }
}

impl Drop for NotReady {
    fn drop(&mut self) {
        lock(&self.shared.pending).remove(self.what);
    }
}

/// When the writer last moved.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    origin: Instant,
    last_ms: Arc<AtomicU64>,
}

impl Heartbeat {
    /// A heart that has just beaten; `origin` is the zero of its clock.
    pub fn new(origin: Instant) -> Self {
        let heartbeat = Self { origin, last_ms: Arc::default() };
        heartbeat.beat();
        heartbeat
    }

    /// The writer has moved.
    pub fn beat(&self) {
        self.last_ms.store(self.origin.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Time since the last beat.
    pub fn age(&self, now: Instant) -> Duration {
        let last = Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
        now.saturating_duration_since(self.origin).saturating_sub(last)
    }
}

/// What the writer of the maps says of its work, for health and metrics.
#[derive(Clone, Debug, PartialEq)]
pub struct SyncState {
    /// Since when the oldest change waits that is not in the maps, or that they have refused.
    pub queued_since: Option<Instant>,
    /// When the maps were last as everything known asks.
    pub last_synced: Option<SystemTime>,
    /// Whether load balancers should send anything to this node; so it is until something says otherwise.
    pub node_eligible: bool,
    /// Ports on which load balancers ask for endpoints of single Services.
    pub health_checks: Vec<HealthCheck>,
    /// Every address of the node's interfaces, of which health-check node ports may be restricted to some.
    pub own_addresses: BTreeSet<IpAddr>,
    /// Service ports that drop for want of local endpoints.
    pub no_local_endpoints: NoLocalEndpoints,
}

impl Default for SyncState {
    fn default() -> Self {
        Self {
            queued_since: None,
            last_synced: None,
            node_eligible: true,
            health_checks: Vec::new(),
            own_addresses: BTreeSet::new(),
            no_local_endpoints: NoLocalEndpoints::default(),
        }
    }
}

/// Whether the writer of the maps does its work.
#[derive(Clone, Debug)]
pub struct Health {
    /// What it says of it.
    pub sync: watch::Receiver<SyncState>,
    /// When it last moved.
    pub heartbeat: Heartbeat,
    /// Whether programs are attached, its own or those of an earlier agent.
    pub serves: Arc<AtomicBool>,
}

impl Health {
    /// Whether it keeps up at `now`; so it does while it starts. This node's eligibility is another matter.
    pub fn is_good(&self, now: Instant) -> bool {
        let is_late = |since: Instant| now.saturating_duration_since(since) >= STUCK_AFTER;
        self.heartbeat.age(now) < STUCK_AFTER && !self.sync.borrow().queued_since.is_some_and(is_late)
    }
}

/// A panic elsewhere does not make plain data unreadable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_cgroup_the_status_says_what_hooks_need() {
        let of = |scope: SocketLb| SocketStatus { scope: scope.label(), ..SocketStatus::default() }.on(None);
        assert_eq!(of(SocketLb::All).warning, Some(cgroup::NONE));
        assert_eq!(of(SocketLb::Off).warning, None, "nobody wants them");
    }

    #[test]
    fn ready_means_that_nothing_is_waited_for() {
        let shared = Shared::new(Status::default());
        let programs = shared.wait_for("programs");
        let image = shared.wait_for("image");
        assert_eq!(shared.pending(), ["image", "programs"]);
        assert!(!shared.status().ready);
        drop(programs);
        assert_eq!(shared.status().waiting_for, ["image"]);
        drop(image);
        assert!(shared.status().ready);
    }

    #[test]
    fn a_heart_that_stops_is_noticed() {
        let origin = Instant::now();
        let heartbeat = Heartbeat::new(origin);
        assert!(heartbeat.age(Instant::now()) < Duration::from_secs(1));
        assert!(heartbeat.age(origin + Duration::from_secs(90)) > Duration::from_secs(89));
    }

    #[test]
    fn a_change_that_waits_for_a_minute_is_bad_health() {
        let origin = Instant::now();
        let (state, sync) = watch::channel(SyncState::default());
        let health = Health { sync, heartbeat: Heartbeat::new(origin), serves: Arc::default() };
        let second = Duration::from_secs(1);
        assert!(health.is_good(origin), "while it starts");
        assert!(!health.is_good(origin + STUCK_AFTER + second), "the writer itself is stuck");
        state.send_modify(|state| state.queued_since = Some(origin));
        assert!(health.is_good(origin + STUCK_AFTER - second));
        assert!(!health.is_good(origin + STUCK_AFTER));
    }

    #[test]
    fn the_status_is_json_as_documented() {
        let shared = Shared::new(Status { version: "1.2.3", node: "node-a".to_owned(), ..Status::default() });
        shared.update(|status| {
            status.interfaces.push(InterfaceStatus {
                name: "eth0".to_owned(),
                ifindex: 2,
                mode: Mode::NativeFrags,
                reason: "because".to_owned(),
                xmit: Transmit { transmit: true, redirect: false },
                addresses: vec!["192.0.2.1".to_owned()],
            });
        });
        let json = serde_json::to_value(shared.status()).expect("plain data");
        assert_eq!(json["node"], "node-a");
        assert_eq!(json["interfaces"][0]["mode"], "native-frags");
        assert_eq!(json["interfaces"][0]["xmit"]["transmit"], true);
        assert_eq!(json["flows"]["tcp"], 0);
        assert!(
            json["snat"]["range"].is_string() && json["problems"].is_array() && json["sources"].is_array()
        );
    }
}
