//! From objects to the maps in this process, stage by stage: what the agent does when it has heard of them.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use xdp_agent::{
    cluster::{Cluster, DetectLocal, Options},
    maps::{self, ImageMaps},
    objects::{self, Change, ObjectName},
    plan::{InUse, Plan},
};

use super::{
    Size,
    figures::{Row, kernel_mib, milliseconds},
    objects as written, ours,
    world::{self, NODE_ADDRESS, POD_CIDR, World},
};

/// Where the maps are pinned, in the BPF file system of this row.
const PINS: &str = "/sys/fs/bpf/xdp-agent-bench";
/// Changes of the burst.
const BURST: u32 = 1_000;

/// How long each stage took.
#[derive(Clone, Copy, Debug, Default)]
struct Stages {
    /// Objects as the client of the API gives them, to what is kept of them.
    read: Duration,
    /// To what should be served.
    cluster: Duration,
    /// To the changes of the maps.
    plan: Duration,
    /// To the last write.
    write: Duration,
    /// Changes of the maps.
    changes: usize,
}

impl Stages {
    fn total(&self) -> Duration {
        self.read + self.cluster + self.plan + self.write
    }

    fn note(&self) -> String {
        let Self { read, cluster, plan, write, changes } = *self;
        let [read, cluster, plan, write] = [read, cluster, plan, write].map(milliseconds);
        format!(
            "read {read:.1} + cluster {cluster:.1} + plan {plan:.1} + {changes} writes {write:.1} = {:.1} ms",
            milliseconds(self.total())
        )
    }
}

/// What stands between objects and the kernel.
struct Pipeline {
    cluster: Cluster,
    plan: Plan<[u8; 4]>,
    maps: ImageMaps<[u8; 4]>,
    origin: Instant,
}

impl Pipeline {
    /// Brings what the cluster has heard of into the maps, and adds up how long that took.
    fn sync(&mut self, stages: &mut Stages) -> Result<()> {
        let began = Instant::now();
        let delta = self.cluster.update().v4;
        let derived = Instant::now();
        let update = self.plan.update(&delta, true, &[NODE_ADDRESS.octets()], self.now_ms());
        let planned = Instant::now();
        let (made, result) = self.maps.apply(&update.changes);
        stages.write += planned.elapsed();
        stages.plan += planned - derived;
        stages.cluster += derived - began;
        stages.changes += made;
        result.context("the kernel refuses a write")
    }

    /// Hears of the present slice of a Service, and adds up how long that took.
    fn hear(&mut self, world: &World, service: u32, stages: &mut Stages) {
        let object = written::slice(world, service);
        let began = Instant::now();
        let slice = objects::Slice::read(&object);
        let read = Instant::now();
        let name = ObjectName::new(world::namespace(service), written::slice_name(service));
        self.cluster.apply(Change::Slice(name, Some(slice.into())));
        stages.cluster += read.elapsed();
        stages.read += read - began;
    }

    /// Gives back what no flow needs, as the walk over the flows does: there are none here.
    fn collect(&mut self) -> Result<()> {
        let now = self.now_ms();
        let update = self.plan.collect(&InUse { started_ms: now, ..InUse::default() }, now);
        self.maps.apply(&update.changes).1.context("the kernel refuses a write")
    }

    fn now_ms(&self) -> u64 {
        self.origin.elapsed().as_millis() as u64
    }
}

/// Measures the stages at one size, in the network namespace and BPF file system of this process.
pub(super) fn measure(size: Size, changes: usize) -> Result<Row> {
    let mut world = World::new(size.services, size.endpoints)?;
    let pins = Path::new(PINS);
    std::fs::create_dir(pins).with_context(|| format!("cannot make {PINS}"))?;
    let before = kernel_mib()?;
    let loaded = maps::load(maps::OBJECT, pins, &ours::sizes(&world))?;
    let (node, own) = (world::NODE.to_owned(), [NODE_ADDRESS.into()]);
    let pods = vec![(POD_CIDR.0.into(), POD_CIDR.1)];
    let options = Options { node, detect_local: DetectLocal::ClusterCidr(pods), ..Options::default() };
    let mut pipeline = Pipeline {
        cluster: Cluster::new(options),
        plan: Plan::new(loaded.v4.sizes().limits()),
        maps: loaded.v4.image,
        origin: Instant::now(),
    };
    pipeline.cluster.set_node(xdp_agent::cluster::NodeFacts { addresses: own.to_vec(), own: own.into() });
    let mut row = Row { name: "xdp-agent, in process".to_owned(), ..Row::default() };
    let start = load(&mut pipeline, &world)?;
    row.load_ms = Some(milliseconds(start.total()));
    row.kernel_mib = Some(kernel_mib()? - before);
    row.notes.push(format!("load: {}", start.note()));
    ours::verify(&pipeline.maps, &world)?;

    let (mut times, mut all) = (Vec::new(), Stages::default());
    for _ in 0..changes {
        let mut stages = Stages::default();
        let replaced = world.replace();
        pipeline.hear(&world, replaced.service, &mut stages);
        pipeline.sync(&mut stages)?;
        times.push(stages.total());
        add(&mut all, stages);
        pipeline.collect()?;
    }
    row.set_changes(&times);
    row.notes.push(format!("{changes} changes one by one: {}", all.note()));

    let mut burst = Stages::default();
    for _ in 0..BURST {
        let replaced = world.replace();
        pipeline.hear(&world, replaced.service, &mut burst);
    }
    pipeline.sync(&mut burst)?;
    row.notes.push(format!("{BURST} changes at once: {}", burst.note()));
    ours::verify(&pipeline.maps, &world)?;
    row.notes.extend(pipeline.plan.problems().iter().map(|problem| problem.message.clone()));
    ensure!(
        pipeline.plan.services() == world.services().len(),
        "{} service ports are served",
        pipeline.plan.services()
    );
    Ok(row)
}

/// Everything at once, as after a start.
fn load(pipeline: &mut Pipeline, world: &World) -> Result<Stages> {
    let mut stages = Stages::default();
    let node = objects::Node::read(&written::node());
    pipeline.cluster.apply(Change::Node(world::NODE.to_owned(), Some(node.into())));
    let range = objects::ServiceCidr::read(&written::service_cidr());
    pipeline.cluster.apply(Change::ServiceCidr("kubernetes".to_owned(), Some(range.into())));
    for number in world.services() {
        let object = written::service(number);
        let began = Instant::now();
        let service = objects::Service::read(&object);
        let read = Instant::now();
        let name = ObjectName::new(world::namespace(number), world::name(number));
        pipeline.cluster.apply(Change::Service(name, Some(service.into())));
        stages.cluster += read.elapsed();
        stages.read += read - began;
        pipeline.hear(world, number, &mut stages);
    }
    pipeline.sync(&mut stages)?;
    Ok(stages)
}

fn add(all: &mut Stages, stages: Stages) {
    all.read += stages.read;
    all.cluster += stages.cluster;
    all.plan += stages.plan;
    all.write += stages.write;
    all.changes += stages.changes;
}
