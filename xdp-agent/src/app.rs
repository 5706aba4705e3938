//! The wiring: what is made, in which order, and who speaks to whom.
//!
//! Nothing is touched before everything that can be checked is checked; nothing is removed from an earlier agent's maps
//! before the objects have been read; and whatever a failed start has attached or pinned is taken away again.

use std::{
    path::PathBuf,
    sync::{Arc, atomic::AtomicU32},
    time::Instant,
};

use anyhow::{Context, bail, ensure};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
};
use tracing::{error, info, warn};

use crate::{
    attach::Attacher,
    config::Config,
    gc::{Collector, Outlets},
    host::Host,
    interfaces::Interfaces,
    manifests::{self, Problem, ProblemKind, Snapshot, watcher::Watcher},
    maps::{self, Loaded, NewPins},
    metrics,
    neighbours::{Feed, Follower, UsedMacs},
    preflight::{self, KernelVersion, PinDir},
    reconcile::{Inlets, Parts, Reconciler},
    serve,
    status::{Health, Heartbeat, NotReady, Shared, Status, SyncState},
};

/// Everything that runs once the programs are attached.
struct Running {
    reconciler: Reconciler,
    interfaces: Interfaces,
    collector: Collector,
    outlets: Outlets,
    inlets: Inlets,
    heartbeat: Heartbeat,
    follower: Follower,
    objects: watch::Sender<Arc<Snapshot>>,
    servers: serve::Servers,
    sources: serve::Sources,
    stop: oneshot::Sender<()>,
    not_ready: Vec<NotReady>,
}

/// Runs until SIGINT or SIGTERM.
///
/// # Errors
/// When something is missing that the agent cannot do without; the host is left as it was then.
pub async fn run(config: Config) -> anyhow::Result<()> {
    ensure!(
        !maps::OBJECT.is_empty(),
        "built without the BPF object: run `cargo xtask build` and build the agent again"
    );
    ensure!(!config.files().is_empty(), "give the objects by --services");
    let kernel = KernelVersion::current()?;
    preflight::check_privileges()?;
    preflight::raise_memlock(kernel);
    // Signals from here on end the agent by its own way out.
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let running = start(&config, kernel).await?;
    let Running { reconciler, interfaces, collector, outlets, inlets, heartbeat, follower, .. } = running;
    let (watcher, changes) = Watcher::start(config.files().to_vec());
    let writer = tokio::spawn(reconciler.run(inlets, interfaces, heartbeat));
    tokio::spawn(collector.run(outlets));
    tokio::spawn(follow(follower));
    tokio::spawn(read_again(config.clone(), changes, running.objects));
    tokio::spawn(running.servers.run(running.sources));
    drop(running.not_ready);
    info!("ready");
    tokio::select! {
        _ = interrupt.recv() => info!(signal = "SIGINT", "stopping"),
        _ = terminate.recv() => info!(signal = "SIGTERM", "stopping"),
    }
    drop(watcher);
    // Sending fails when the writer is gone, which the join below reports.
    let _ = running.stop.send(());
    let interfaces = writer.await.context("the writer of the maps ended early")?;
    if config.keep {
        interfaces.leave();
        info!("programs stay attached; the next start adopts them");
    } else {
        interfaces.detach_all().context("cannot take everything off")?;
        info!("programs are off");
    }
    Ok(())
}

async fn start(config: &Config, kernel: KernelVersion) -> anyhow::Result<Running> {
    let origin = Instant::now();
    let servers = serve::Servers::open(&config.listen).await?;
    let (macs, used_macs) = watch::channel(UsedMacs::default());
    let (follower, feed) = Follower::open(used_macs).context("cannot follow the network by netlink")?;
    let host = Arc::clone(&feed.host.borrow());
    preflight::check_interfaces(&config.interfaces, &host)?;
    preflight::warn_of_settings(&config.interfaces);
    let snapshot = Arc::new(first_read(config).await?);
    let (pins, loaded) = load(config)?;
    let (mut registries, metrics, kube_proxy) = metrics::Registries::new();
    let metrics = Arc::new(metrics);
    metrics.capacities(&loaded.sizes);
    metrics::Datapath::register(&mut registries.agent, loaded.counters);
    let shared = Shared::new(Status {
        version: env!("CARGO_PKG_VERSION"),
        node: config.cluster.node.clone(),
        sources: config.files().to_vec(),
        adopted: loaded.is_adopted,
        ..Status::default()
    });
    let not_ready =
        vec![shared.wait_for("the first image in the maps"), shared.wait_for("programs on the interfaces")];
    let clock = Arc::new(AtomicU32::new(0));
    let parts = Parts {
        maps: loaded.image,
        limits: loaded.sizes.limits(),
        embryonic_buckets: loaded.embryonic.buckets(),
        is_adopted: loaded.is_adopted,
        node: config.cluster.node.clone(),
        names: config.interfaces.clone(),
        snat_ports: config.snat_ports,
        clock: Arc::clone(&clock),
        origin,
        shared: Arc::clone(&shared),
        metrics: Arc::clone(&metrics),
    };
    let attacher = Attacher::new(loaded.programs, pins, config.mode, kernel);
    let (reconciler, interfaces) = fill_and_attach(config, parts, attacher, &snapshot, &host, loaded.pins)?;
    let (to_in_use, in_use) = mpsc::channel(1);
    let (objects, snapshots) = watch::channel(snapshot);
    let (stop, stopped) = oneshot::channel();
    let heartbeat = Heartbeat::new(origin);
    let (_, sync) = watch::channel(SyncState::default());
    Ok(Running {
        reconciler,
        interfaces,
        collector: Collector::new(loaded.established, loaded.embryonic, config.timeouts, clock, origin),
        outlets: Outlets { in_use: to_in_use, macs, shared: Arc::clone(&shared), metrics },
        inlets: Inlets { snapshots, feed: fresh(feed), in_use, stop: stopped },
        heartbeat: heartbeat.clone(),
        follower,
        objects,
        servers,
        sources: serve::Sources {
            registries: Arc::new(registries),
            metrics: kube_proxy,
            shared,
            health: Health { sync, heartbeat },
            config: Arc::new(config.to_json()),
        },
        stop,
        not_ready,
    })
}

/// The maps, at their pins; a refusal leaves no empty directories behind.
fn load(config: &Config) -> anyhow::Result<(PinDir, Loaded)> {
    let pins = PinDir::open(&config.pin_dir)?;
    if config.fresh {
        pins.clear().context("cannot remove what an earlier agent has pinned")?;
    }
    match maps::load(maps::OBJECT, &pins.maps(), &config.sizes) {
        Ok(loaded) => Ok((pins, loaded)),
        Err(error) => {
            pins.remove();
            Err(error)
        }
    }
}

/// The image first, then the programs: a packet that meets a program meets a filled map. What fails is undone.
fn fill_and_attach(
    config: &Config,
    parts: Parts,
    mut attacher: Attacher,
    snapshot: &Arc<Snapshot>,
    host: &Host,
    pins: NewPins,
) -> anyhow::Result<(Reconciler, Interfaces)> {
    let result = attacher.load_programs().and_then(|()| {
        let mut reconciler = Reconciler::new(parts).context("cannot read the maps")?;
        reconciler.start(Arc::clone(snapshot), host)?;
        Ok(reconciler)
    });
    let mut reconciler = match result {
        Ok(reconciler) => reconciler,
        Err(error) => {
            drop(pins);
            attacher.give_up();
            return Err(error);
        }
    };
    let mut interfaces = Interfaces::new(attacher, config.interfaces.clone());
    if let Err(error) = interfaces.attach_all() {
        drop(pins);
        interfaces.give_up();
        return Err(error);
    }
    // The links carry the mode each interface took, which the device map has to say.
    reconciler.devices(&mut interfaces, host);
    pins.keep();
    Ok((reconciler, interfaces))
}

async fn first_read(config: &Config) -> anyhow::Result<Snapshot> {
    let paths = config.files().to_vec();
    let snapshot = tokio::task::spawn_blocking(move || manifests::read(&paths, None))
        .await
        .context("reading the objects ended early")?;
    if let Some(problem) = unreadable_source(&snapshot, config.files()) {
        bail!("{problem}; check --services");
    }
    Ok(snapshot)
}

/// Why a path of `--services` itself cannot be read: that is a slip of the pen, and taking it for "no services" would
/// empty adopted maps. One bad file among those of a directory is a problem like any other, and the rest is served.
fn unreadable_source<'a>(snapshot: &'a Snapshot, services: &[PathBuf]) -> Option<&'a Problem> {
    snapshot.problems.iter().find(|problem| {
        let is_source = problem.place.as_ref().is_some_and(|place| services.contains(&place.file));
        problem.kind == ProblemKind::Unreadable && is_source
    })
}

async fn read_again(config: Config, mut changes: mpsc::Receiver<()>, objects: watch::Sender<Arc<Snapshot>>) {
    while changes.recv().await.is_some() {
        let previous = Arc::clone(&objects.borrow());
        let paths = config.files().to_vec();
        let read = tokio::task::spawn_blocking(move || manifests::read(&paths, Some(&previous)));
        match read.await {
            Ok(snapshot) => drop(objects.send_replace(Arc::new(snapshot))),
            Err(error) => error!(%error, "reading the objects ended early; the maps stay as they are"),
        }
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_bad_file_in_a_directory_does_not_stop_the_start_and_a_bad_source_does() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        let service = "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: shop}\n";
        fs::write(at("1.yaml"), service).expect("a file");
        fs::write(at("2.yaml"), [0xff, 0xfe]).expect("a file");
        std::os::unix::fs::symlink("nowhere", at("3.yaml")).expect("a link");
        let large = fs::File::create(at("4.yaml")).expect("a file");
        large.set_len(manifests::FILE_BYTES_MAX + 1).expect("a size");
        let services = [directory.path().to_owned()];
        let snapshot = manifests::read(&services, None);
        let unreadable = snapshot.problems.iter().filter(|problem| problem.kind == ProblemKind::Unreadable);
        assert_eq!((snapshot.objects.services.len(), unreadable.count()), (1, 3));
        assert_eq!(unreadable_source(&snapshot, &services), None);
        for source in [at("2.yaml"), at("3.yaml"), at("4.yaml"), at("missing")] {
            let services = [directory.path().to_owned(), source.clone()];
            let snapshot = manifests::read(&services, None);
            let problem = unreadable_source(&snapshot, &services).expect("the source is named");
            assert!(problem.to_string().contains(&source.display().to_string()), "{problem}");
        }
    }
}
