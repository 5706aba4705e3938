//! Clients as they are met: curl, a resolver that asks twice at once, one long connection, bulk, a client that insists on its
//! port; toward endpoints here, elsewhere, and on their way out; by socket hooks and by the devices of pods.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::caller::Caller;
use xdp_agent_tests::lab::manifests::Endpoint;
use xdp_agent_tests::lab::world::{
    NODE, Pod, World, WorldOptions, http_frontends, standard_service, udp_frontends,
};

use crate::callers::Place;

const BULK: usize = 24 << 20;
/// Reserved ports are what clients of NFS take.
const FIXED_PORT: u16 = 907;

#[test]
fn clients_of_every_kind_reach_endpoints_wherever_they_are() -> Result<()> {
    for has_hooks in [true, false] {
        let world = World::build(WorldOptions::default())?;
        let mut place = match has_hooks {
            true => Place::serve(world, &[], &[])?,
            false => Place::without_hooks(world, &["--pod-iface", "pod*"])?,
        };
        place.pod.hold("long", http_frontends()[0].1)?;
        let met = place.pod.ask_held("long")??;
        for state in ["remote", "local", "terminating"] {
            let context = || format!("{state} endpoints, socket hooks: {has_hooks}");
            publish(&mut place, state).with_context(context)?;
            every_client(&mut place, true, |_| true).with_context(context)?;
            // What is addressed to the node itself does not leave it.
            every_client(&mut place, false, |target| has_hooks || target.ip() != NODE)
                .with_context(context)?;
            ensure!(place.pod.ask_held("long")?? == met, "{}: another backend answers", context());
        }
        place.stop()?;
    }
    Ok(())
}

fn every_client(place: &mut Place, is_pod: bool, is_served: impl Fn(&SocketAddr) -> bool) -> Result<()> {
    let http: Vec<_> = http_frontends().into_iter().filter(|(_, target)| is_served(target)).collect();
    for &(kind, target) in &http {
        let text = place.curl(is_pod, target).with_context(|| format!("curl, {kind}"))?;
        ensure!(text.contains("\"backend\""), "{kind}: curl got {text:?}");
    }
    let caller = if is_pod { &mut place.pod } else { &mut place.node };
    for (kind, target) in http {
        let bytes = caller.fetch(BULK, target)?.with_context(|| format!("bulk, {kind}"))?;
        ensure!(bytes == BULK, "{kind}: {bytes} bytes have come");
        fixed(caller, kind, target)?;
    }
    for (kind, target) in udp_frontends().into_iter().filter(|(_, target)| is_served(target)) {
        let socket = format!("resolver-{kind}").replace(' ', "-");
        caller.open(&socket, false)?;
        for _ in 0..8 {
            let answers = caller.ask_both(&socket, target)?.with_context(|| format!("resolver, {kind}"))?;
            ensure!(answers.iter().all(|answer| answer.from == target), "{kind}: {answers:?}");
        }
    }
    Ok(())
}

/// Connects again and again from one port, to whatever backend that leads.
fn fixed(caller: &mut Caller, kind: &str, target: SocketAddr) -> Result<()> {
    for _ in 0..5 {
        let answer = caller.http_from(FIXED_PORT, target)?.with_context(|| format!("fixed port, {kind}"))?;
        ensure!(answer.from == target, "{kind}: {answer:?}");
    }
    Ok(())
}

/// Publishes endpoints of one kind and waits until they are served.
fn publish(place: &mut Place, state: &str) -> Result<()> {
    let is_wanted = |pod: &&Pod| state == "terminating" || pod.is_local() == (state == "local");
    let endpoints: Vec<Endpoint> = place.world.pods.iter().filter(is_wanted).map(Pod::endpoint).collect();
    if state != "terminating" {
        return place.world.change_endpoints(&place.agent, &endpoints);
    }
    // None is ready any more, but they still serve: better than nobody.
    place.world.change_endpoints(&place.agent, &[])?;
    let leaving: Vec<_> =
        endpoints.into_iter().map(|endpoint| Endpoint { ready: false, ..endpoint }).collect();
    let slice = standard_service().slice_yaml(&leaving);
    let slice =
        slice.replace("serving: false\n    terminating: false", "serving: true\n    terminating: true");
    place.world.manifests.write("web-slice.yaml", &[slice])?;
    place.wait_until("terminating endpoints to be served", |place| {
        place.pod.http(http_frontends()[0].1)??;
        Ok(())
    })
}
