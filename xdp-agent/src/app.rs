//! The wiring: what is made, in which order, and who speaks to whom.
//!
//! Nothing is touched before everything that can be checked is checked; nothing is removed from an earlier agent's maps
//! before every object has been told; and whatever a failed start has attached or pinned is taken away again.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use prometheus_client::registry::Registry;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{Notify, mpsc, oneshot, watch},
};
use tracing::{debug, error, info, warn};

use crate::{
    attach::{self, Attacher},
    bpf,
    cgroup::Cgroup,
    cluster::{
        Forwarding,
        wanted::{Ip6, ServicePortName},
    },
    config::{Config, ObjectSource, SocketLb},
    fragments::{FragmentMaps, Keeper},
    gc::{Collector, FlowTables, Outlets},
    health,
    host::Host,
    interfaces::Interfaces,
    maps::{self, Loaded, NewPins},
    metrics,
    neighbours::{self, Feed, Follower, UsedMacs},
    pins::PinDir,
    preflight::{self, KernelVersion},
    reconcile::{Inlets, Parts, Reconciler, ServiceNames, SideParts, Told},
    reserved, serve,
    sockets::{Hooks, Scope, Sweeper},
    source::{self, Event},
    status::{Health, Heartbeat, NotReady, Shared, SocketStatus, Status, SyncState},
    watch::{self as watch_objects, Access, Notice, Options, Pace, Watch},
};

/// How long a start with `--fresh` waits for the source to tell of all objects before it says so; a multiple of the next.
const FILL_PATIENCE: Duration = Duration::from_secs(5);
/// Time between two signs of life of such a start.
const HEARTBEAT_PERIOD: Duration = Duration::from_secs(1);
/// Events of a source that wait for the writer of the maps; then the source waits.
const EVENTS_MAX: usize = 64;

/// Everything that runs once the programs are attached.
struct Running {
    reconciler: Reconciler,
    interfaces: Interfaces,
    collector: Collector,
    outlets: Outlets,
    inlets: Inlets,
    heartbeat: Heartbeat,
    follower: Follower,
    source: Source,
    health: Health,
    stop: oneshot::Sender<()>,
    not_ready: NotReady,
    /// What ends sockets, and what tells it to.
    sweeper: Option<(Sweeper, Arc<Notify>)>,
    /// What keeps fragments, and the program that has them come in once more.
    keeper: (Keeper, OwnedFd),
}

/// What tells of objects; dropping it ends it.
enum Source {
    Files { _files: source::Files },
    Kubernetes { watch: Watch },
}

/// What asks the agent to end.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?,
            terminate: signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?,
        })
    }

    /// Waits for one, and gives its name.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

/// A start that was asked to end before it took over from an earlier agent.
#[derive(Debug, thiserror::Error)]
#[error("stopping by {0}; what an earlier agent has left stays as it was")]
struct Stopped(&'static str);

/// Runs until SIGINT or SIGTERM.
///
/// # Errors
/// When something is missing that the agent cannot do without; the host is left as it was then.
pub async fn run(config: Config) -> anyhow::Result<()> {
    ensure!(
        !maps::OBJECT.is_empty(),
        "built without the BPF object: run `cargo xtask build` and build the agent again"
    );
    let kernel = KernelVersion::current()?;
    preflight::check_kernel(kernel)?;
    preflight::check_privileges()?;
    preflight::raise_memlock(kernel);
    // Signals from here on end the agent by its own way out.
    let mut signals = Signals::new()?;
    let running = match start(&config, &mut signals).await {
        Ok(running) => running,
        Err(error) if error.is::<Stopped>() => {
            info!("{error}");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let Running { reconciler, interfaces, collector, outlets, inlets, heartbeat, follower, .. } = running;
    let writer = tokio::spawn(reconciler.run(inlets, interfaces, heartbeat));
    tokio::spawn(collector.run(outlets));
    tokio::spawn(follow(follower));
    let (keeper, release) = running.keeper;
    tokio::spawn(keeper.run(release));
    tokio::spawn(serve_health_checks(running.health, config.clone()));
    if let Some((sweeper, gone)) = running.sweeper {
        tokio::spawn(sweeper.run(gone));
    }
    if let Some(access) = access(&config) {
        let node = config.cluster.node.clone();
        tokio::spawn(async move { watch_objects::event(&access, &node, &Notice::Starting).await });
    }
    drop(running.not_ready);
    info!("programs are attached");
    info!(signal = signals.next().await, "stopping");
    drop(running.source);
    // Sending fails when the writer is gone, which the join below reports.
    let _ = running.stop.send(());
    let interfaces = writer.await.context("the writer of the maps ended early")?;
    if config.keep {
        interfaces.leave();
        info!("programs stay attached; the next start adopts them");
    } else {
        interfaces.detach_all().await.context("cannot take everything off")?;
        info!("programs are off");
    }
    Ok(())
}

async fn start(config: &Config, signals: &mut Signals) -> anyhow::Result<Running> {
    let origin = Instant::now();
    let servers = serve::Servers::open(&config.listen).await?;
    let (macs, used_macs) = watch::channel(UsedMacs::default());
    let (follower, feed) = Follower::open(used_macs).context("cannot follow the network by netlink")?;
    let host = Arc::clone(&feed.host.borrow());
    preflight::check_interfaces(&config.interfaces, &host)?;
    preflight::warn_of_settings(&config.interfaces, &host);
    let (mut registries, metrics, kube_proxy) = metrics::Registries::new();
    let (events, mut told) = mpsc::channel(EVENTS_MAX);
    // Files that cannot be read end the start here, before anything is touched.
    let source = open_source(config, events, &mut registries.agent).await?;
    let health_of_watch = match &source {
        Source::Files { .. } => None,
        Source::Kubernetes { watch } => Some(watch.health.clone()),
    };
    let cgroup = match config.sockets.scope {
        SocketLb::Off => None,
        SocketLb::All | SocketLb::HostOnly => Cgroup::find(config.sockets.cgroup.as_deref())?,
    };
    let (pins, loaded) = load(config)?;
    let metrics = Arc::new(metrics);
    let (v4_sizes, v6_sizes) = (loaded.v4.sizes(), loaded.v6.sizes());
    metrics.capacities::<[u8; 4]>(&v4_sizes);
    metrics.capacities::<Ip6>(&v6_sizes);
    metrics::Datapath::register(&mut registries.agent, loaded.counters);
    metrics::Exhausted::register(&mut registries.agent, loaded.v4.exhausted, loaded.v6.exhausted);
    let shared = Shared::new(Status {
        version: env!("CARGO_PKG_VERSION"),
        node: config.cluster.node.clone(),
        sources: config.files().to_vec(),
        sockets: SocketStatus { scope: config.sockets.scope.label(), ..SocketStatus::default() }
            .on(cgroup.as_ref()),
        adopted: loaded.is_adopted,
        ..Status::default()
    });
    let not_ready = shared.wait_for("programs on the interfaces");
    let (to_sync, sync) = watch::channel(SyncState::default());
    metrics::kube_proxy::Sync::register(&mut registries.kube_proxy, sync.clone());
    let (v4_names, v6_names) = (ServiceNames::default(), ServiceNames::default());
    let names_of_families = (v4_names.clone(), v6_names.clone());
    if config.service_metrics {
        let of_families = [(loaded.v4.accounts, v4_names.clone()), (loaded.v6.accounts, v6_names.clone())];
        metrics::Accounts::register(&mut registries.agent, move || {
            let accounts = of_families.iter().flat_map(|(accounts, names)| match accounts.read() {
                Ok(accounts) => names.resolve(accounts),
                Err(error) => {
                    debug!(%error, "cannot read the accounts of service ports");
                    Vec::new()
                }
            });
            summed(accounts)
        });
    }
    let hooks = match cgroup {
        None => None,
        Some(_) => {
            let hooks = Hooks::new(loaded.sockets, config.sockets.scope, config.sockets.is_on_loopback);
            Some(hooks.context("cannot tell the socket hooks of the node")?)
        }
    };
    let scope = cgroup.as_ref().map(|cgroup| Scope {
        cgroup: cgroup.path.clone(),
        is_node_alone: config.sockets.scope == SocketLb::HostOnly || !config.sockets.pod_devices.is_empty(),
    });
    let sweeper = hooks.as_ref().zip(scope).map(|(hooks, scope)| {
        let metrics = metrics::SocketMetrics::add(&mut registries.agent, loaded.socket_counters);
        (Sweeper::new(loaded.peers, loaded.pods, hooks, scope, metrics), Arc::clone(&hooks.gone))
    });
    let (clock, gone) = (Arc::new(AtomicU32::new(0)), Arc::new(Notify::new()));
    let parts = Parts {
        settings: loaded.settings,
        v4: SideParts { maps: loaded.v4.image, limits: v4_sizes.limits(), names: v4_names },
        v6: SideParts { maps: loaded.v6.image, limits: v6_sizes.limits(), names: v6_names },
        embryonic_buckets: loaded.v4.embryonic.buckets(),
        established_homes: loaded.v4.established.homes(),
        is_adopted: loaded.is_adopted,
        cluster: config.cluster.clone(),
        expects_node: matches!(config.source, ObjectSource::Kubernetes { .. }),
        names: config.interfaces.clone(),
        snat_ports: config.snat_ports,
        echo: config.echo,
        told: Told {
            clock: Arc::clone(&clock),
            origin,
            sync: to_sync,
            gone: Arc::clone(&gone),
            shared: Arc::clone(&shared),
            metrics: Arc::clone(&metrics),
            kube_proxy: kube_proxy.clone(),
        },
        hooks,
    };
    let v4_flows = FlowTables {
        established: loaded.v4.established,
        embryonic: loaded.v4.embryonic,
        backends: loaded.v4.generations,
    };
    let v6_flows = FlowTables {
        established: loaded.v6.established,
        embryonic: loaded.v6.embryonic,
        backends: loaded.v6.generations,
    };
    let attacher = Attacher::new(
        loaded.programs,
        pins,
        config.mode,
        bpf::has_tcx().context(attach::OF_TCX)?,
        cgroup,
        config.sockets.pod_devices.clone(),
        config.overlays,
    );
    let fragments = FragmentMaps { v4: loaded.v4.fragments, v6: loaded.v6.fragments };
    let mut held = loaded.held;
    let left = held.forget();
    if left > 0 {
        info!(
            fragments = left,
            "an earlier agent has left fragments that waited for their first; they are let go"
        );
    }
    let keeper = Keeper::new(held, fragments, Arc::clone(&clock))?;
    let heartbeat = Heartbeat::new(origin);
    let serves = Arc::new(AtomicBool::new(attacher.follows_another()?));
    let health = Health { sync, heartbeat: heartbeat.clone(), serves: Arc::clone(&serves) };
    // A start that waits for an API server can be seen to do so.
    tokio::spawn(servers.run(serve::Sources {
        registries: Arc::new(registries),
        metrics: kube_proxy,
        shared: Arc::clone(&shared),
        health: health.clone(),
        watch: health_of_watch,
        config: Arc::new(config.to_json()),
        names: names_of_families,
        slis: metrics::Slis::default(),
    }));
    let (mut reconciler, interfaces, release) =
        adopt_and_attach(config, parts, attacher, &host, loaded.pins, &mut told, (signals, &heartbeat))
            .await?;
    serves.store(true, Ordering::Relaxed);
    if config.reserve_ports {
        reconciler.reserve_ports(loaded.reserved_ports);
    } else {
        reserved::leave_alone(loaded.reserved_ports);
    }
    let (to_in_use, in_use) = mpsc::channel(1);
    let (stop, stopped) = oneshot::channel();
    Ok(Running {
        reconciler,
        interfaces,
        collector: Collector::new(
            v4_flows,
            v6_flows,
            config.timeouts,
            clock,
            origin,
            config.reset_on_endpoint_removal.then_some(gone),
            feed.host.clone(),
        ),
        outlets: Outlets { in_use: to_in_use, macs, shared: Arc::clone(&shared), metrics },
        inlets: Inlets { events: told, feed: fresh(feed), in_use, stop: stopped },
        heartbeat,
        follower,
        source,
        health,
        stop,
        not_ready,
        sweeper,
        keeper: (keeper, release),
    })
}

/// Accounts by service port: one of both families has two.
fn summed(accounts: impl Iterator<Item = (ServicePortName, u64, u64)>) -> Vec<(ServicePortName, u64, u64)> {
    let mut sums: HashMap<ServicePortName, (u64, u64)> = HashMap::new();
    for (name, packets, bytes) in accounts {
        let sum = sums.entry(name).or_default();
        *sum = (sum.0 + packets, sum.1 + bytes);
    }
    sums.into_iter().map(|(name, (packets, bytes))| (name, packets, bytes)).collect()
}

/// The maps, at their pins; a refusal leaves no empty directories behind.
fn load(config: &Config) -> anyhow::Result<(PinDir, Loaded)> {
    let pins = PinDir::open(&config.pin_dir)?;
    pins.take_maps_back()?;
    if config.fresh {
        pins.set_maps_aside()?;
    }
    match maps::load(maps::OBJECT, &pins.maps(), &config.sizes) {
        Ok(loaded) => Ok((pins, loaded)),
        Err(error) => {
            pins.remove();
            Err(error)
        }
    }
}

/// Starts telling of objects.
async fn open_source(
    config: &Config,
    events: mpsc::Sender<Event>,
    registry: &mut Registry,
) -> anyhow::Result<Source> {
    match access(config) {
        None => Ok(Source::Files { _files: source::files(config.files().to_vec(), events).await? }),
        Some(access) => {
            let node = config.cluster.node.clone();
            let all_nodes = config.cluster.forwarding != Forwarding::Snat;
            let options = Options { access, node, all_nodes, pace: Pace::default() };
            let metrics = watch_objects::Metrics::register(registry);
            Ok(Source::Kubernetes { watch: Watch::start(options, events, metrics).await? })
        }
    }
}

/// How the API server is reached, if objects come from there.
fn access(config: &Config) -> Option<Access> {
    match &config.source {
        ObjectSource::Files(_) => None,
        ObjectSource::Kubernetes { kubeconfig, master } => {
            Some(Access { kubeconfig: kubeconfig.clone(), master: master.clone() })
        }
    }
}

/// Answers on health-check node ports; a port that cannot be had is a warning, and an event of its Service.
async fn serve_health_checks(health: Health, config: Config) {
    let access = access(&config);
    let failed = |failure: &health::Failure| {
        let health::Failure { service, message } = failure.clone();
        warn!(%service, %message, "no answers on a health-check node port");
        if let Some(access) = access.clone() {
            let node = config.cluster.node.clone();
            let notice = Notice::HealthCheckPort { service, message };
            tokio::spawn(async move { watch_objects::event(&access, &node, &notice).await });
        }
    };
    health::run(health, config.cluster.nodeport_addresses.clone(), failed).await;
}

/// The maps first, then the programs, which pass everything on until the first image is there; with `--fresh`, where programs of
/// an earlier agent serve, the image comes before. What fails is undone.
async fn adopt_and_attach(
    config: &Config,
    parts: Parts,
    mut attacher: Attacher,
    host: &Host,
    pins: NewPins,
    events: &mut mpsc::Receiver<Event>,
    waiting: (&mut Signals, &Heartbeat),
) -> anyhow::Result<(Reconciler, Interfaces, OwnedFd)> {
    let result = async {
        attacher.load_programs()?;
        let release = attacher.release_program()?;
        let mut reconciler = Reconciler::new(parts).context("cannot read the maps")?;
        reconciler.start(host);
        let is_filled = config.fresh && attacher.follows_another()?;
        if is_filled {
            fill(&mut reconciler, events, waiting).await?;
        }
        if config.fresh {
            attacher.begin_anew()?;
        }
        Ok((reconciler, release, is_filled))
    };
    let (mut reconciler, release, is_filled) = match result.await {
        Ok(ready) => ready,
        Err(error) => {
            drop(pins);
            attacher.give_up();
            return Err(error);
        }
    };
    let mut interfaces = Interfaces::new(attacher, config.interfaces.clone());
    if is_filled {
        // Programs find frontends from the first moment, and would take none for theirs by a device that they do not know.
        let now = neighbours::read_host();
        reconciler.devices_ahead(&interfaces, now.as_ref().unwrap_or(host));
    }
    if let Err(error) = interfaces.attach_all().await {
        drop(pins);
        interfaces.give_up();
        return Err(error);
    }
    // The links carry the mode each interface took, which the device map has to say.
    reconciler.devices(&mut interfaces, host);
    pins.keep();
    Ok((reconciler, interfaces, release))
}

/// Fills the maps before any program uses them. An earlier agent's programs serve until then, however long it takes.
async fn fill(
    reconciler: &mut Reconciler,
    events: &mut mpsc::Receiver<Event>,
    (signals, heartbeat): (&mut Signals, &Heartbeat),
) -> anyhow::Result<()> {
    let mut filled = pin!(reconciler.fill(events));
    let mut beats = tokio::time::interval(HEARTBEAT_PERIOD);
    let mut waited = Duration::ZERO;
    loop {
        tokio::select! {
            filled = &mut filled => return filled,
            signal = signals.next() => return Err(Stopped(signal).into()),
            _ = beats.tick() => heartbeat.beat(),
        }
        if waited == FILL_PATIENCE {
            warn!("the objects are not known yet; until they are, the earlier agent's programs serve");
        }
        waited += HEARTBEAT_PERIOD;
    }
}

async fn follow(follower: Follower) {
    if let Err(error) = follower.run().await {
        error!(%error, "the network is not followed any more: changes of routes and interfaces go unnoticed; restart the agent");
    } else {
        warn!("the network is not followed any more");
    }
}

/// The feed with nothing marked as seen, so that what changed during the start is not lost.
fn fresh(mut feed: Feed) -> Feed {
    feed.host.mark_changed();
    feed.routing.mark_changed();
    feed
}
