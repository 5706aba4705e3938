//! The image in a container as the DaemonSet describes it, by runc: its user, its three capabilities, a default seccomp
//! profile, a read-only root that holds the image's files alone, and of the node nothing but its network and one directory
//! of pins.
//!
//! Needs root, runc, and the layout that `cargo xtask image` makes, which `XDP_AGENT_IMAGE` names.

#[path = "image/container.rs"]
mod container;
#[path = "image/layout.rs"]
mod layout;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::clients::{http_get, whoami_once};
use xdp_agent_tests::lab::world::{World, WorldOptions, http_frontends};
use xdp_agent_tests::lab::{block_on, wait_for};

use crate::container::Container;
use crate::layout::Image;

const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// Each frontend is asked so often that both backends on the node and elsewhere answer.
const CONNECTIONS: usize = 16;

#[test]
fn the_image_serves_with_the_privileges_of_the_manifest_alone() -> Result<()> {
    let image = Image::open()?;
    let world = World::build(WorldOptions::default())?;
    world.publish()?;
    let mut container = Container::start(&world, &image)?;
    wait_for("the agent to be ready", READY_TIMEOUT, || {
        container.check_running()?;
        let (status, body) = block_on(http_get(&world.node, address(10_249), "/readyz"))?;
        ensure!(status == 200, "/readyz says {status}: {body}");
        Ok(())
    })?;
    for (kind, target) in http_frontends() {
        let mut places = std::collections::BTreeSet::new();
        for _ in 0..CONNECTIONS {
            let whoami = block_on(whoami_once(&world.client, target)).context(kind)?;
            places.insert(whoami.backend.split('-').next().map(str::to_owned));
        }
        ensure!(places.len() == 2, "{kind}: only {places:?} have answered");
    }
    let (_, metrics) = block_on(http_get(&world.node, address(10_249), "/metrics"))?;
    let build =
        metrics.lines().find(|line| line.starts_with("xdp_agent_build_info{")).context("no build info")?;
    for (label, of_image) in [("version", "version"), ("revision", "revision")] {
        let value = image.label(of_image)?;
        ensure!(
            build.contains(&format!("{label}=\"{value}\"")),
            "{build} lacks {label} {value} of the image"
        );
    }
    ensure!(!image.label("revision")?.contains("unknown"), "the image names no commit");
    ensure!(
        !world.bpffs.list(container::PINS)?.is_empty(),
        "the pins are not where the manifest mounts them from"
    );
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

fn address(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}
