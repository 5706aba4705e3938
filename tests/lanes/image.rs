//! The image in a container as the DaemonSet describes it, by runc: its user, its capabilities, a default seccomp profile, a
//! read-only root that holds the image's files alone, and of the node nothing but its network and the directories that the
//! manifest mounts.
//!
//! Needs root, runc, and the layout that `cargo xtask image` makes, which `XDP_AGENT_IMAGE` names.

#[path = "image/bundle.rs"]
mod bundle;
#[path = "image/container.rs"]
mod container;
#[path = "image/layout.rs"]
mod layout;
#[path = "image/node.rs"]
mod node;

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::caller::Caller;
use xdp_agent_tests::lab::clients::{http_get, whoami_once};
use xdp_agent_tests::lab::world::{Pod, World, WorldOptions, http_frontends, udp_frontends};
use xdp_agent_tests::lab::{block_on, wait_for};

use crate::container::Container;
use crate::layout::Image;
use crate::node::{Node, PINS};

const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// Each frontend is asked so often that both backends on the node and elsewhere answer.
const CONNECTIONS: usize = 16;
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn the_image_serves_with_the_privileges_of_the_manifest_alone() -> Result<()> {
    let image = Image::open()?;
    let world = World::build(WorldOptions::default())?;
    let node = Node::of(&world)?;
    let container = serve(&world, &node, &image)?;
    for (kind, target) in http_frontends() {
        both_places(kind, || Ok(block_on(whoami_once(&world.client, target))?.backend))?;
    }
    let (_, metrics) = block_on(http_get(&world.node, address(10_249), "/metrics"))?;
    let build =
        metrics.lines().find(|line| line.starts_with("xdp_agent_build_info{")).context("no build info")?;
    for label in ["version", "revision"] {
        let value = image.label(label)?;
        ensure!(
            build.contains(&format!("{label}=\"{value}\"")),
            "{build} lacks {label} {value} of the image"
        );
    }
    ensure!(!image.label("revision")?.contains("unknown"), "the image names no commit");
    ensure!(!world.bpffs.list(PINS)?.is_empty(), "the pins are not where the manifest mounts them from");
    container.stop()
}

#[test]
fn the_image_serves_the_sockets_of_pods_by_the_cgroups_and_namespaces_of_the_manifest() -> Result<()> {
    let image = Image::open()?;
    let world = World::build(WorldOptions::default())?;
    let node = Node::of(&world)?;
    let cgroup = node.cgroup.child("pod")?;
    let mut pod =
        Caller::start(Path::new(env!("CARGO_BIN_EXE_caller")), &world.pod("local-1")?.namespace, &cgroup)?;
    let container = serve(&world, &node, &image)?;
    for (kind, target) in http_frontends() {
        both_places(kind, || Ok(pod.http(target)??.backend))?;
    }
    // A connected socket learns that its backend is gone from an agent that has entered the pod's namespace.
    pod.open("socket", false)?;
    pod.connect("socket", udp_frontends()[0].1)?;
    let met = pod.ask("socket")??.backend;
    let others: Vec<_> =
        world.pods.iter().filter(|pod| pod.server.name() != met).map(Pod::endpoint).collect();
    world.publish_endpoints(&others)?;
    wait_for("the socket to be told", CHANGE_TIMEOUT, || {
        let failed = pod.ask("socket")?.err().context("the old backend still answers")?;
        ensure!(failed.errno != 0 && failed.errno != libc::EAGAIN, "silence: {failed}");
        Ok(())
    })?;
    container.stop()
}

#[test]
fn the_image_holds_the_program_and_its_bill_of_materials_alone() -> Result<()> {
    let image = Image::open()?;
    let files = image.files()?;
    ensure!(
        files == ["usr/bin/xdp-agent", "usr/share/doc/xdp-agent/xdp-agent.cdx.json"],
        "the image has {files:?}"
    );
    Ok(())
}

/// Starts the agent's container on a node with the standard Service, and waits until it is ready.
fn serve(world: &World, node: &Node, image: &Image) -> Result<Container> {
    world.publish()?;
    let mut container = Container::start(world, node, image)?;
    wait_for("the agent to be ready", READY_TIMEOUT, || {
        container.check_running()?;
        let (status, body) = block_on(http_get(&world.node, address(10_249), "/readyz"))?;
        ensure!(status == 200, "/readyz says {status}: {body}");
        Ok(())
    })?;
    Ok(container)
}

/// Fails unless backends on this node and on the other answer.
fn both_places(kind: &str, mut ask: impl FnMut() -> Result<String>) -> Result<()> {
    let mut places = BTreeSet::new();
    for _ in 0..CONNECTIONS {
        let backend = ask().context(kind.to_owned())?;
        places.insert(backend.split('-').next().map(str::to_owned));
    }
    ensure!(places.len() == 2, "{kind}: only {places:?} have answered");
    Ok(())
}

fn address(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}
