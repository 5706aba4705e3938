//! The only writer of the maps that say what is served: applies planned changes in order, and keeps the settings.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    time::{Instant as TokioInstant, MissedTickBehavior, interval, sleep_until},
};
use tracing::warn;
use xdp_common::tables::Config;

use self::side::Side;
use crate::{
    cluster::{
        Cluster, NodeFacts, Options,
        wanted::{Ip6, IpAddress},
    },
    config::{PortRange, ports},
    host::Host,
    interfaces::{FamilyPicture, Interfaces, Picture},
    maps::{ReservedPorts, Settings},
    metrics::{KubeProxy, Metrics},
    neighbours::Feed,
    plan::InUse,
    preflight,
    problem::Problem,
    reserved,
    sockets::Hooks,
    source::Event,
    status::{Heartbeat, NotReady, Shared, SnatStatus, SyncState},
};

pub use self::{names::ServiceNames, side::SideParts};

mod backlog;
mod compare;
mod names;
mod report;
mod side;
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
    pub in_use: mpsc::Receiver<Needs>,
    /// The order to stop.
    pub stop: oneshot::Receiver<()>,
}

/// What flows still need, by address family.
#[derive(Clone, Debug, Default)]
pub struct Needs {
    /// Those of IPv4.
    pub v4: InUse,
    /// Those of IPv6.
    pub v6: InUse,
}

/// What the writer is made of.
#[derive(Debug)]
pub struct Parts {
    /// What the datapath is told beside what is served.
    pub settings: Settings,
    /// The maps of IPv4.
    pub v4: SideParts<[u8; 4]>,
    /// The maps of IPv6.
    pub v6: SideParts<Ip6>,
    /// Buckets of the table of new flows.
    pub embryonic_buckets: u32,
    /// Slots of the table of established flows that the places of a key may begin at.
    pub established_homes: u32,
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
    /// Whether echo requests to the addresses of Services are answered.
    pub echo: bool,
    /// Who is told.
    pub told: Told,
    /// The socket hooks, if there are any.
    pub hooks: Option<Hooks>,
}

/// Whom the writer tells what.
#[derive(Debug)]
pub struct Told {
    /// Seconds of agent time, for the garbage collection.
    pub clock: Arc<AtomicU32>,
    /// Zero of the plan's clock.
    pub origin: Instant,
    /// For health and for load balancers.
    pub sync: watch::Sender<SyncState>,
    /// That backends may have gone, for connections that are to be reset.
    pub gone: Arc<Notify>,
    /// For people.
    pub shared: Arc<Shared>,
    /// For Prometheus.
    pub metrics: Arc<Metrics>,
    /// The same, as far as kube-proxy measures it too.
    pub kube_proxy: KubeProxy,
}

/// The writer.
#[derive(Debug)]
pub struct Reconciler {
    told: Told,
    hooks: Option<Hooks>,
    v4: Side<[u8; 4]>,
    v6: Side<Ip6>,
    cluster: Cluster,
    /// Whether the source has the Node object of every node.
    expects_node: bool,
    /// Managed interfaces by name.
    names: Vec<String>,
    snat_ports: PortRange,
    /// What keeps ports from the kernel's choice, if that is wanted.
    reserved: Option<reserved::Reservation>,
    /// Whether NodePorts may have changed since it was told.
    may_have_other_ports: bool,
    /// Whether everything that exists has been told.
    is_complete: bool,
    source_problems: Vec<Problem>,
    source_problems_version: u64,
    settings: Settings,
    config: Config,
    /// Agent time when this agent began.
    clock_base: u32,
    facts: NodeFacts,
    picture: Picture,
    reported: report::Reported,
    untold: sync::Untold,
    backlog: backlog::Backlog,
    /// Until the maps first are as everything known asks.
    first_image: Option<NotReady>,
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
    pub fn new(parts: Parts) -> io::Result<Self> {
        let Parts {
            mut settings,
            v4,
            v6,
            embryonic_buckets,
            established_homes,
            is_adopted,
            cluster,
            mut snat_ports,
            ..
        } = parts;
        let (v4, v6) = (Side::new(v4, is_adopted)?, Side::new(v6, is_adopted)?);
        let found = settings.get()?;
        if is_adopted {
            snat_ports = adopted_ports(snat_ports, &found);
        }
        let config = Config {
            epoch: found.epoch.wrapping_add(1),
            clock: found.clock.max(1),
            snat_port_min: snat_ports.min,
            snat_port_max: snat_ports.max,
            embryonic_buckets,
            established_homes,
            masquerade_wire: 1,
            // Until the rules are known.
            policy_routing: 1,
            echo: u32::from(parts.echo),
            direct: cluster.direct(),
        };
        settings.set(config)?;
        parts.told.clock.store(config.clock, Ordering::Relaxed);
        let first_image = Some(parts.told.shared.wait_for("the first image in the maps"));
        let backlog = backlog::Backlog::new(parts.told.kube_proxy.clone());
        Ok(Self {
            told: parts.told,
            hooks: parts.hooks,
            v4,
            v6,
            cluster: Cluster::new(cluster),
            expects_node: parts.expects_node,
            names: parts.names,
            snat_ports,
            reserved: None,
            may_have_other_ports: false,
            is_complete: false,
            source_problems: Vec::new(),
            source_problems_version: 0,
            settings,
            config,
            clock_base: config.clock,
            facts: NodeFacts::default(),
            picture: Picture::default(),
            reported: report::Reported::default(),
            untold: sync::Untold::default(),
            backlog,
            first_image,
            epoch_at: None,
            last_epoch: None,
            comparison: None,
            comparisons: 0,
        })
    }

    /// Keeps the ports of translated flows and NodePorts from the kernel's choice from now on.
    pub fn reserve_ports(&mut self, added: ReservedPorts) {
        let node_ports = self.v4.plan.node_ports().chain(self.v6.plan.node_ports());
        self.reserved = Some(reserved::Reservation::new(added, self.snat_ports, node_ports));
        self.tell_ports();
    }

    /// Follows NodePorts, which may be outside the usual range (`--service-node-port-range` of kube-apiserver).
    fn follow_node_ports(&mut self) {
        let Some(reserved) = &mut self.reserved else { return };
        if !std::mem::take(&mut self.may_have_other_ports) {
            return;
        }
        if reserved.follow(self.v4.plan.node_ports().chain(self.v6.plan.node_ports())) {
            self.tell_ports();
        }
    }

    fn tell_ports(&self) {
        let Some(reserved) = &self.reserved else { return };
        let kept = reserved.kept().to_string();
        self.told.shared.update(|status| status.reserved_ports = kept);
    }

    /// Takes what is known of the node, before any program is attached.
    pub fn start(&mut self, host: &Host) {
        self.picture.v4.snat = preflight::node_addresses(&self.names, host);
        self.picture.v6.snat = preflight::node_addresses(&self.names, host);
        self.note_policy(host);
        self.set_facts(host);
        self.publish();
    }

    /// Writes what the interfaces are like as long as nothing is attached: all frames take the kernel's way.
    pub fn devices_ahead(&mut self, interfaces: &Interfaces, host: &Host) {
        let (v4, v6) = interfaces.families_ahead(host);
        self.write_devices(&v4, &v6);
    }

    /// Writes what the interfaces are like.
    pub fn devices(&mut self, interfaces: &mut Interfaces, host: &Host) {
        let picture = interfaces.picture(host);
        if picture == self.picture {
            return;
        }
        self.write_devices(&picture.v4, &picture.v6);
        self.told.metrics.interfaces(&picture.status);
        let status = picture.status.clone();
        let (pods, refused) = (picture.pods.clone(), picture.refused_pods.clone());
        let range = self.snat_ports.to_string();
        let v4 = picture.v4.snat.iter().map(|addr| addr.to_ip());
        let v6 = picture.v6.snat.iter().map(|addr| addr.to_ip());
        let addresses = v4.chain(v6).map(|addr| addr.to_string()).collect();
        self.told.shared.update(|all| {
            all.interfaces = status;
            all.pod_interfaces = pods;
            all.refused_pod_interfaces = refused;
            all.snat = SnatStatus { addresses, range };
        });
        self.picture = picture;
    }

    fn write_devices(&mut self, v4: &FamilyPicture<[u8; 4]>, v6: &FamilyPicture<Ip6>) {
        if let Err(error) = self.v4.write_devices(v4).and_then(|()| self.v6.write_devices(v6)) {
            self.told.metrics.map_write_failures.inc();
            warn!(%error, "cannot write the interfaces; trying again when they change or at the next comparison");
        }
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
                Ok(()) = inlets.feed.routing.changed() => {
                    // Flows that ask anew keep the answer, so the datapath has to know of the devices before.
                    if inlets.feed.host.has_changed().is_ok_and(|is_changed| is_changed) {
                        self.host_changed(&newest(&mut inlets.feed), &mut interfaces);
                    }
                    self.routing_changed();
                }
                () = at(self.epoch_at) => self.raise_epoch(),
                Ok(()) = inlets.feed.host.changed() => {
                    self.host_changed(&newest(&mut inlets.feed), &mut interfaces);
                }
                _ = seconds.tick() => {
                    if let Some(cgroup) = interfaces.follow_cgroup() {
                        self.hooks.iter().for_each(|hooks| hooks.note_attached(cgroup.is_some()));
                        self.told.shared.update(|status| status.sockets = status.sockets.clone().on(cgroup));
                    }
                    if interfaces.are_due() {
                        let host = Arc::clone(&inlets.feed.host.borrow());
                        self.host_changed(&host, &mut interfaces);
                    }
                    self.tick();
                }
                Some(in_use) = inlets.in_use.recv() => self.collect(&in_use),
                () = at(earlier(self.v4.retry_at, self.v6.retry_at)) => self.retry(),
                () = at(earlier(self.v4.update_at, self.v6.update_at)) => self.sync(),
                _ = compare.tick() => self.compare(),
                1.. = inlets.events.recv_many(&mut events, sync::EVENTS_MAX) => self.take_events(&mut events),
                () = std::future::ready(()), if self.comparison.is_some() => self.compare_step(),
            }
            heartbeat.beat();
        }
    }

    fn host_changed(&mut self, host: &Host, interfaces: &mut Interfaces) {
        let before = (self.picture.v4.snat.clone(), self.picture.v6.snat.clone());
        self.told.metrics.attach_failures.inc_by(interfaces.follow(host));
        self.note_policy(host);
        self.devices(interfaces, host);
        // Addresses decide which NodePorts there are and which of the frontends are the node's own.
        let facts = self.facts.clone();
        self.set_facts(host);
        let is_moved = before != (self.picture.v4.snat.clone(), self.picture.v6.snat.clone());
        if is_moved || self.facts != facts {
            self.sync();
        }
    }

    /// Tells the datapath whether next hops depend on more than the destination.
    fn note_policy(&mut self, host: &Host) {
        let policy_routing = u32::from(host.has_policy_routing || host.has_several_ways);
        if policy_routing != self.config.policy_routing {
            self.config.policy_routing = policy_routing;
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
        self.config.epoch = self.config.epoch.wrapping_add(1);
        self.write_settings();
        let epoch = self.config.epoch;
        self.told.metrics.epoch.set(epoch.into());
        self.told.shared.update(|status| status.epoch = epoch);
    }

    fn tick(&mut self) {
        let clock = self.clock_base.wrapping_add(self.told.origin.elapsed().as_secs() as u32);
        if clock != self.config.clock {
            self.config.clock = clock;
            self.write_settings();
            self.told.clock.store(clock, Ordering::Relaxed);
        }
        self.follow_node_ports();
        self.tell_writes();
        self.log_problems();
        self.report_objects();
    }

    fn write_settings(&mut self) {
        if let Err(error) = self.settings.set(self.config) {
            self.told.metrics.map_write_failures.inc();
            warn!(%error, "cannot write the settings; trying again within a second");
        }
    }

    fn now_ms(&self) -> u64 {
        self.told.origin.elapsed().as_millis() as u64
    }
}

/// Links and addresses as they are now.
fn newest(feed: &mut Feed) -> Arc<Host> {
    Arc::clone(&feed.host.borrow_and_update())
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

fn earlier(one: Option<TokioInstant>, other: Option<TokioInstant>) -> Option<TokioInstant> {
    one.into_iter().chain(other).min()
}

/// Ends at an instant, or never without one.
async fn at(instant: Option<TokioInstant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
