//! UDP sockets that were connected to a Service when no hook saw it.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::agent::Agent;
use xdp_agent_tests::lab::caller::Caller;
use xdp_agent_tests::lab::manifests::Service;
use xdp_agent_tests::lab::servers::UDP_PORT;
use xdp_agent_tests::lab::world::{CLUSTER_IP, SERVICE_UDP, World, WorldOptions, udp_frontends};

use crate::callers::{Place, answer_once_connected_again, binary, told_of_its_end};

#[test]
fn sockets_that_were_connected_before_the_hooks_are_told() -> Result<()> {
    let targets = udp_frontends().map(|(_, target)| target);
    let mut outsider = None;
    let mut place = meanwhile(&[], |pod, node, world| {
        let direct = (world.pod("local-2")?.server.address(), UDP_PORT).into();
        open(pod, "direct", direct)?;
        for caller in [pod, node] {
            for target in targets {
                open(caller, &target.to_string(), target)?;
            }
        }
        let caller = outsider.insert(Caller::start_beside(binary(), &world.pod("local-1")?.namespace)?);
        open(caller, "outsider", targets[0])
    })?;
    let mut outsider = outsider.context("a process in no cgroup that is served")?;
    ended(&mut place, 2 * targets.len())?;
    for caller in [&mut place.pod, &mut place.node] {
        for target in targets {
            let socket = target.to_string();
            told_of_its_end(caller.ask(&socket)?).context(socket.clone())?;
            answer_once_connected_again(caller, &socket, target)?;
        }
    }
    // Whose addresses lead where they say, and whom the hooks do not serve.
    place.pod.ask("direct")??;
    is_silent(&mut outsider, "outsider")?;
    ended(&mut place, 2 * targets.len())?;
    drop(outsider);
    place.stop()
}

#[test]
fn a_socket_that_was_connected_before_its_service_was_there_is_told() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &[])?;
    let mut late =
        Service::new("late", Ipv4Addr::new(10, 96, 0, 77)).port("udp", "UDP", SERVICE_UDP, UDP_PORT, 0);
    late.external_ips.push(Ipv4Addr::new(203, 0, 113, 77));
    let target = (late.external_ips[0], SERVICE_UDP).into();
    open(&mut place.pod, "early", target)?;
    is_silent(&mut place.pod, "early")?;
    let endpoints = [place.world.pods[0].endpoint()];
    place.world.manifests.write("late.yaml", &[late.yaml(), late.slice_yaml(&endpoints)])?;
    ended(&mut place, 1)?;
    told_of_its_end(place.pod.ask("early")?)?;
    answer_once_connected_again(&mut place.pod, "early", target)?;
    place.stop()
}

#[test]
fn sockets_of_pods_that_are_served_by_their_devices_are_left_alone() -> Result<()> {
    let target = (CLUSTER_IP, SERVICE_UDP).into();
    let mut place = meanwhile(&["--socket-lb", "host-only"], |pod, node, _| {
        open(pod, "socket", target)?;
        open(node, "socket", target)
    })?;
    ended(&mut place, 1)?;
    told_of_its_end(place.node.ask("socket")?)?;
    is_silent(&mut place.pod, "socket")?;
    ended(&mut place, 1)?;
    place.stop()
}

/// A place whose agent has gone, left nothing behind, and comes back after something was done.
fn meanwhile(
    extra: &[&str],
    act: impl FnOnce(&mut Caller, &mut Caller, &World) -> Result<()>,
) -> Result<Place> {
    let Place { agent, mut pod, mut node, options, _cgroups, cgroup, world } =
        Place::start(WorldOptions::default(), extra)?;
    agent.stop()?;
    act(&mut pod, &mut node, &world)?;
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    Ok(Place { agent, pod, node, options, _cgroups, cgroup, world })
}

fn open(caller: &mut Caller, socket: &str, target: SocketAddr) -> Result<()> {
    caller.open(socket, false)?;
    caller.connect(socket, target)
}

/// Waits until so many sockets have been ended, and no more.
fn ended(place: &mut Place, sockets: usize) -> Result<()> {
    place.wait_until("the sockets to be ended", |place| {
        let destroyed = place.agent.metric("sockets_destroyed", "")?;
        ensure!(destroyed == sockets as f64, "{destroyed} sockets were ended, not {sockets}");
        Ok(())
    })
}

fn is_silent(caller: &mut Caller, socket: &str) -> Result<()> {
    let failed = caller.ask(socket)?.err().context("somebody answers")?;
    ensure!(failed.errno == libc::EAGAIN, "{failed}");
    Ok(())
}
