//! The only writer of the maps that say what is served: applies planned changes in order, and keeps the settings.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant as TokioInstant, MissedTickBehavior, interval, sleep_until},
};
use tracing::warn;
use xdp_common::tables::Config;

use crate::{
    cluster::{Cluster, NodeFacts, Options},
    config::{PortRange, ports},
    host::Host,
    interfaces::{Interfaces, Picture},
    maps::ImageMaps,
    metrics::{KubeProxy, Metrics},
    neighbours::Feed,
    plan::{Change, InUse, Limits, Plan},
    preflight,
    problem::Problem,
    sockets::Hooks,
    source::Event,
    status::{Heartbeat, NotReady, Shared, SnatStatus, SyncState},
};

pub use self::names::ServiceNames;

mod backlog;
mod compare;
mod names;
mod report;
mod sync;

/// Time between two comparisons of the maps with the plan.
const COMPARE_PERIOD: Duration = Duration::from_secs(60);
/// Changes of routes come in bursts; next hops are asked for again at most this often.
const EPOCH_PAUSE: Duration = Duration::from_millis(5);
/// Time before refused writes are repeated.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// What the writer hears.
#[derive(Debug)]
pub struct Inlets {
    /// What a source says of objects.
    pub events: mpsc::Receiver<Event>,
    /// The kernel's network.
    pub feed: Feed,
    /// What flows still need.
    pub in_use: mpsc::Receiver<InUse>,
    /// The order to stop.
    pub stop: oneshot::Receiver<()>,
}

/// What the writer is made of.
#[derive(Debug)]
pub struct Parts {
    /// The maps.
    pub maps: ImageMaps,
    /// Map sizes.
    pub limits: Limits,
    /// Buckets of the table of new flows.
    pub embryonic_buckets: u32,
    /// Whether they hold an earlier agent's contents.
    pub is_adopted: bool,
    /// What decides, beside the objects, what is served.
    pub cluster: Options,
    /// Whether the source has the Node object of every node.
    pub expects_node: bool,
    /// Managed interfaces by name.
    pub names: Vec<String>,
    /// Source ports of translated flows.
    pub snat_ports: PortRange,
    /// Seconds of agent time, for the garbage collection.
    pub clock: Arc<AtomicU32>,
    /// Zero of the plan's clock.
    pub origin: Instant,
    /// For health and for load balancers.
    pub sync: watch::Sender<SyncState>,
    /// For people.
    pub shared: Arc<Shared>,
    /// For Prometheus.
    pub metrics: Arc<Metrics>,
    /// The same, as far as kube-proxy measures it too.
    pub kube_proxy: KubeProxy,
    /// Names for accounts.
    pub names_of_services: ServiceNames,
    /// The socket hooks, if there are any.
    pub hooks: Option<Hooks>,
}

/// The writer.
#[derive(Debug)]
pub struct Reconciler {
    parts: Parts,
    plan: Plan<[u8; 4]>,
    cluster: Cluster,
    /// Whether everything that exists has been told.
    is_complete: bool,
    source_problems: Vec<Problem>,
    source_problems_version: u64,
    settings: Config,
    /// Agent time when this agent began.
    clock_base: u32,
    facts: NodeFacts,
    picture: Picture,
    reported: report::Reported,
    untold: sync::Untold,
    /// Whether it has been said that IPv6 is not forwarded, and SCTP not.
    is_ipv6_told: bool,
    is_sctp_told: bool,
    /// Changes that wait for one that was refused.
    pending: VecDeque<Change<[u8; 4]>>,
    backlog: backlog::Backlog,
    /// Until the maps first are as everything known asks.
    first_image: Option<NotReady>,
    attempts: u32,
    retry_at: Option<TokioInstant>,
    update_at: Option<TokioInstant>,
    epoch_at: Option<TokioInstant>,
    last_epoch: Option<Instant>,
    comparison: Option<compare::Comparison>,
    comparisons: u32,
}

impl Reconciler {
    /// A writer for maps that are empty or an earlier agent's; nothing is written yet but the settings.
    ///
    /// # Errors
    /// When the maps cannot be read or written.
    pub fn new(mut parts: Parts) -> io::Result<Self> {
        let plan = if parts.is_adopted {
            Plan::adopt(parts.limits, parts.maps.read()?)
        } else {
            Plan::new(parts.limits)
        };
        let found = parts.maps.config()?;
        if parts.is_adopted {
            parts.snat_ports = adopted_ports(parts.snat_ports, &found);
        }
        let settings = Config {
            epoch: found.epoch.wrapping_add(1),
            clock: found.clock.max(1),
            snat_port_min: parts.snat_ports.min,
            snat_port_max: parts.snat_ports.max,
            embryonic_buckets: parts.embryonic_buckets,
            masquerade_wire: 1,
            // Until the rules are known.
            policy_routing: 1,
        };
        parts.maps.set_config(settings)?;
        parts.clock.store(settings.clock, Ordering::Relaxed);
        let first_image = Some(parts.shared.wait_for("the first image in the maps"));
        let backlog = backlog::Backlog::new(parts.kube_proxy.clone());
        Ok(Self {
            cluster: Cluster::new(parts.cluster.clone()),
            parts,
            plan,
            is_complete: false,
            source_problems: Vec::new(),
            source_problems_version: 0,
            settings,
            clock_base: settings.clock,
            facts: NodeFacts::default(),
            picture: Picture::default(),
            reported: report::Reported::default(),
            untold: sync::Untold::default(),
            is_ipv6_told: false,
            is_sctp_told: false,
            pending: VecDeque::new(),
            backlog,
            first_image,
            attempts: 0,
            retry_at: None,
            update_at: None,
            epoch_at: None,
            last_epoch: None,
            comparison: None,
            comparisons: 0,
        })
    }

    /// Takes what is known of the node, before any program is attached.
    pub fn start(&mut self, host: &Host) {
        self.picture.snat =
            preflight::node_addresses(&self.parts.names, host).iter().map(|addr| addr.octets()).collect();
        self.note_policy(host);
        self.set_facts(host);
        self.publish();
    }

    /// Writes what the interfaces are like.
    pub fn devices(&mut self, interfaces: &mut Interfaces, host: &Host) {
        let picture = interfaces.picture(host);
        if picture == self.picture {
            return;
        }
        if let Err(error) = self.write_devices(&picture.devices) {
            self.parts.metrics.map_write_failures.inc();
            warn!(%error, "cannot write the interfaces; trying again when they change or at the next comparison");
        }
        self.parts.metrics.interfaces(&picture.status);
        let status = picture.status.clone();
        let range = self.parts.snat_ports.to_string();
        let addresses = picture.snat.iter().map(|addr| std::net::Ipv4Addr::from(*addr).to_string()).collect();
        self.parts.shared.update(|all| {
            all.interfaces = status;
            all.snat = SnatStatus { addresses, range };
        });
        self.picture = picture;
    }

    /// Follows changes until it is told to stop, and gives the interfaces back.
    pub async fn run(
        mut self,
        mut inlets: Inlets,
        mut interfaces: Interfaces,
        heartbeat: Heartbeat,
    ) -> Interfaces {
        let mut seconds = interval(Duration::from_secs(1));
        seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut compare = interval(COMPARE_PERIOD);
        compare.set_missed_tick_behavior(MissedTickBehavior::Delay);
        compare.reset();
        let mut events = Vec::with_capacity(sync::EVENTS_MAX);
        loop {
            tokio::select! {
                biased;
                _ = &mut inlets.stop => return interfaces,
                Ok(()) = inlets.feed.routing.changed() => self.routing_changed(),
                () = at(self.epoch_at) => self.raise_epoch(),
                Ok(()) = inlets.feed.host.changed() => {
                    let host = Arc::clone(&inlets.feed.host.borrow_and_update());
                    self.host_changed(&host, &mut interfaces);
                }
                _ = seconds.tick() => self.tick(),
                Some(in_use) = inlets.in_use.recv() => self.collect(&in_use),
                () = at(self.retry_at) => self.retry(),
                () = at(self.update_at) => self.sync(),
                _ = compare.tick() => self.compare(),
                1.. = inlets.events.recv_many(&mut events, sync::EVENTS_MAX) => self.take_events(&mut events),
                () = std::future::ready(()), if self.comparison.is_some() => self.compare_step(),
            }
            heartbeat.beat();
        }
    }

    fn host_changed(&mut self, host: &Host, interfaces: &mut Interfaces) {
        let before = self.picture.snat.clone();
        self.parts.metrics.attach_failures.inc_by(interfaces.follow(host));
        self.note_policy(host);
        self.devices(interfaces, host);
        // Addresses decide which NodePorts there are and which of the frontends are the node's own.
        let facts = self.facts.clone();
        self.set_facts(host);
        if before != self.picture.snat || self.facts != facts {
            self.sync();
        }
    }

    /// Tells the datapath whether next hops depend on more than the destination.
    fn note_policy(&mut self, host: &Host) {
        let policy_routing = u32::from(host.has_policy_routing);
        if policy_routing != self.settings.policy_routing {
            self.settings.policy_routing = policy_routing;
            self.write_settings();
        }
    }

    fn routing_changed(&mut self) {
        match self.last_epoch.map(|last| last.elapsed()) {
            Some(elapsed) if elapsed < EPOCH_PAUSE => {
                self.epoch_at.get_or_insert(TokioInstant::now() + (EPOCH_PAUSE - elapsed));
            }
            Some(_) | None => self.raise_epoch(),
        }
    }

    fn raise_epoch(&mut self) {
        self.epoch_at = None;
        self.last_epoch = Some(Instant::now());
        self.settings.epoch = self.settings.epoch.wrapping_add(1);
        self.write_settings();
        let epoch = self.settings.epoch;
        self.parts.metrics.epoch.set(epoch.into());
        self.parts.shared.update(|status| status.epoch = epoch);
    }

    fn tick(&mut self) {
        let clock = self.clock_base.wrapping_add(self.parts.origin.elapsed().as_secs() as u32);
        if clock != self.settings.clock {
            self.settings.clock = clock;
            self.write_settings();
            self.parts.clock.store(clock, Ordering::Relaxed);
        }
        self.tell_writes();
        self.report_objects();
    }

    fn write_settings(&mut self) {
        if let Err(error) = self.parts.maps.set_config(self.settings) {
            self.parts.metrics.map_write_failures.inc();
            warn!(%error, "cannot write the settings; trying again within a second");
        }
    }

    fn now_ms(&self) -> u64 {
        self.parts.origin.elapsed().as_millis() as u64
    }
}

/// The source ports to use with the flows of an earlier agent, whose settings were `found`.
fn adopted_ports(wanted: PortRange, found: &Config) -> PortRange {
    let found = PortRange { min: found.snat_port_min, max: found.snat_port_max };
    let used = ports::ephemeral().map_or(wanted, |ephemeral| wanted.or_adopted(found, ephemeral));
    if used != wanted {
        warn!(
            %used,
            %wanted,
            "source ports stay as they are, because adopted flows use them; start with --fresh to change them, which \
             ends every flow"
        );
    } else if found.min > 0 && used != found {
        warn!(%used, %found, "source ports change, because those of adopted flows are not free any more; such flows end");
    }
    used
}

/// Ends at an instant, or never without one.
async fn at(instant: Option<TokioInstant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
