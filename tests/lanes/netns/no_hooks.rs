//! Processes of the node reach Services without socket hooks: they are translated on their way out of it.

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::manifests::Endpoint;
use xdp_agent_tests::lab::servers::Server;
use xdp_agent_tests::lab::world::{
    CLUSTER_IP, NODE, Pod, World, WorldOptions, http_frontends, udp_frontends,
};

use crate::callers::{Place, all_places, refused, repeated};

/// What is on one of the node's own addresses does not leave it.
const OWN: &str = "NodePort";

#[test]
fn the_node_reaches_services_on_their_way_out() -> Result<()> {
    // With programs on the devices of pods answers of those come by them first.
    for extra in [&[][..], &["--pod-iface", "pod*"]] {
        let mut place = Place::without_hooks(World::build(WorldOptions::default())?, extra)?;
        for (kind, target) in http_frontends().into_iter().filter(|(kind, _)| *kind != OWN) {
            let answers = repeated(|| place.node.http(target)).with_context(|| format!("TCP, {kind}"))?;
            all_places(&answers, target)?;
            place.node.hold(&target.to_string(), target)?;
        }
        for (kind, target) in udp_frontends().into_iter().filter(|(kind, _)| *kind != OWN) {
            let answers = repeated(|| place.node.udp(target)).with_context(|| format!("UDP, {kind}"))?;
            all_places(&answers, target)?;
        }
        place.node.open("socket", false)?;
        place.node.connect("socket", udp_frontends()[0].1)?;
        for _ in 0..3 {
            place.node.ask("socket")??;
        }
        // A connection outlives its endpoint.
        place.world.change_endpoints(&place.agent, &[])?;
        for (_, target) in http_frontends().into_iter().filter(|(kind, _)| *kind != OWN) {
            place.node.ask_held(&target.to_string())??;
        }
        for (kind, target) in http_frontends() {
            refused(kind, libc::ECONNREFUSED, || place.node.http(target))?;
        }
        for (kind, target) in udp_frontends() {
            refused(kind, libc::ECONNREFUSED, || place.node.udp(target))?;
        }
        refused("unknown port", libc::ECONNREFUSED, || place.node.http((CLUSTER_IP, 81).into()))?;
        place.stop()?;
    }
    Ok(())
}

#[test]
fn the_node_reaches_an_endpoint_on_its_own_address_on_the_way_out() -> Result<()> {
    let world = World::build(WorldOptions { local: 1, remote: 0, ..WorldOptions::default() })?;
    let server = Server::start(&world.node, "node-1", NODE)?;
    let mut place = Place::without_hooks(world, &[])?;
    let own = Endpoint::new(NODE, "node");
    place.world.change_endpoints(&place.agent, &[own])?;
    for target in [http_frontends()[0].1, http_frontends()[3].1] {
        let answer = place.node.http(target)??;
        ensure!(answer.backend == "node-1" && answer.from == target, "{answer:?}");
    }
    let (_, target) = udp_frontends()[0];
    let answer = place.node.udp(target)??;
    ensure!(answer.backend == "node-1" && answer.from == target, "{answer:?}");
    // Pods' own traffic to the same Service is none of this: it goes by their devices or not at all.
    let pods: Vec<_> = place.world.pods.iter().map(Pod::endpoint).collect();
    place.world.change_endpoints(&place.agent, &pods)?;
    ensure!(place.node.http(http_frontends()[0].1)??.backend == "local-1");
    place.stop()?;
    drop(server);
    Ok(())
}
