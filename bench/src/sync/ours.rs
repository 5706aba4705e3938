//! What both rows of ours share: how large the maps are, and what must be in them at the end.

use std::{
    collections::{BTreeSet, HashMap},
    net::Ipv4Addr,
    path::Path,
};

use anyhow::{Context, Result, ensure};
use xdp_agent::{
    config::Sizes,
    maps::{self, ImageMaps},
};
use xdp_common::tables::{self, FrontendKey, MapSpec};

use super::world::{self, PORT, World};

/// Number of TCP, the protocol of every Service here.
const TCP: u8 = 6;

/// Default sizes of the maps where they do, else as large as an operator of such a cluster has to choose them.
pub(super) fn sizes(world: &World) -> Sizes {
    let services = world.services().len();
    let endpoints = services * world.pods(0).len();
    Sizes {
        established: tables::ESTABLISHED_V4.entries,
        embryonic: tables::EMBRYONIC_V4.entries,
        // The address of each ClusterIP as such, its port, and for every other a NodePort.
        frontends: room(&tables::FRONTENDS_V4, services * 5 / 2),
        backends: room(&tables::BACKENDS_V4, endpoints),
        // As many slots for each as the default has for 100,000 endpoints.
        ring_slots: room(&tables::RINGS_V4, endpoints * 32),
        networks: tables::NETWORKS_V4.entries,
    }
}

/// A power of two with room for a fifth more, because what is given up is not free at once.
fn room(spec: &MapSpec, entries: usize) -> u32 {
    spec.entries.max((entries as u32 / 5 * 6).next_power_of_two())
}

/// Key of a Service's ClusterIP.
pub(super) fn key(service: u32) -> FrontendKey<[u8; 4]> {
    FrontendKey { addr: world::cluster_ip(service).octets(), port: PORT.to_be_bytes(), proto: TCP, zero: 0 }
}

/// Opens the maps that an agent has pinned, beside it.
pub(super) fn open(pins: &Path, world: &World) -> Result<ImageMaps<[u8; 4]>> {
    let loaded = maps::load(maps::OBJECT, pins, &sizes(world))?;
    ensure!(loaded.is_adopted, "no agent has pinned its maps in {}", pins.display());
    loaded.pins.keep();
    Ok(loaded.v4.image)
}

/// Fails unless the maps lead from every ClusterIP to exactly the endpoints of the world.
pub(super) fn verify(maps: &ImageMaps<[u8; 4]>, world: &World) -> Result<()> {
    let found = maps.read().context("cannot read the maps")?;
    let frontends: HashMap<_, _> = found.frontends.into_iter().collect();
    let backends: HashMap<_, _> = found.backends.into_iter().collect();
    for service in world.services() {
        let name = world::port_name(service);
        let frontend = frontends.get(&key(service)).with_context(|| format!("{name} is not in the maps"))?;
        let ring = frontend.ring as usize..(frontend.ring + frontend.slots) as usize;
        let ring = found.rings.get(ring).with_context(|| format!("the ring of {name} is outside"))?;
        let there = ring.iter().filter_map(|id| Some(Ipv4Addr::from(backends.get(id)?.addr)));
        let wanted = world.pods(service).iter().map(|&pod| world.pod_address(pod));
        let (there, wanted): (BTreeSet<_>, BTreeSet<_>) = (there.collect(), wanted.collect());
        ensure!(there == wanted, "{name} leads to {there:?}, not to {wanted:?}");
    }
    Ok(())
}
