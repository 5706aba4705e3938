//! Sockets and the hooks over time: agents that go and come, backends that go.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, Map, MapData};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xdp_agent_tests::lab::agent::{Agent, Mode, PIN_DIR};
use xdp_agent_tests::lab::caller::Caller;
use xdp_agent_tests::lab::cgroup::Cgroup;
use xdp_agent_tests::lab::wait_for;
use xdp_agent_tests::lab::world::{Pod, World, WorldOptions, http_frontends, udp_frontends};
use xdp_common::tables::{LAYOUT_VERSION, SOCKET_WAYS, TCP_COOKIES, UDP_CONNECTED};

use crate::callers::{Place, answer_once_connected_again, binary, more_answers, told_of_its_end};

const WAYS: usize = SOCKET_WAYS as usize;
const ANSWERS_TIMEOUT: Duration = Duration::from_secs(30);
/// Answers in each phase: enough that a gap of milliseconds would show.
const ANSWERS: u64 = 300;

#[test]
fn a_killed_agent_that_starts_again_fails_no_connection() -> Result<()> {
    let Place { agent, mut pod, mut node, options, cgroup, world, _cgroups } = hammered(&[])?;
    agent.kill()?;
    more([&mut pod, &mut node])?;
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    more([&mut pod, &mut node])?;
    are_whole([&mut pod, &mut node], &world)?;
    agent.stop()?;
    drop((pod, node, _cgroups, cgroup));
    Ok(())
}

#[test]
fn an_agent_stopped_with_keep_leaves_its_hooks_serving_and_cleanup_removes_them() -> Result<()> {
    let Place { agent, mut pod, mut node, mut options, cgroup, world, _cgroups } = hammered(&["--keep"])?;
    agent.stop()?;
    more([&mut pod, &mut node])?;
    are_whole([&mut pod, &mut node], &world)?;
    options.extra.push("--cleanup".into());
    let ended = Agent::refuse(&world.node, &world.bpffs, &options)?;
    ensure!(ended.status.success(), "{}", ended.log);
    wait_for("connections to fail without hooks", ANSWERS_TIMEOUT, || {
        ensure!(pod.tally()?.failed > 0 && node.tally()?.failed > 0, "every connection is still answered");
        Ok(())
    })?;
    let left = world.bpffs.list(PIN_DIR)?;
    ensure!(left.is_empty(), "{left:?}");
    drop((pod, node, _cgroups, cgroup));
    Ok(())
}

#[test]
fn a_start_with_fresh_fails_no_connection_whatever_the_layout_was() -> Result<()> {
    let Place { mut agent, mut pod, mut node, mut options, cgroup, world, _cgroups } = hammered(&["--keep"])?;
    options.extra.push("--fresh".into());
    let dir = |layout: u32| format!("{PIN_DIR}/v{layout}");
    for layout in [LAYOUT_VERSION, LAYOUT_VERSION - 1] {
        agent.stop()?;
        world.bpffs.run(|| std::fs::rename(dir(LAYOUT_VERSION), dir(layout)))??;
        agent = Agent::start(&world.node, &world.bpffs, &options)?;
        more([&mut pod, &mut node])?;
        are_whole([&mut pod, &mut node], &world)?;
        let of_layout = world.bpffs.list(&dir(LAYOUT_VERSION))?;
        ensure!(of_layout.iter().all(|dir| dir == "maps" || dir == "links"), "{of_layout:?}");
    }
    let left = ["maps", "links"].map(|pins| world.bpffs.list(&format!("{}/{pins}", dir(LAYOUT_VERSION - 1))));
    ensure!(left.iter().flatten().all(Vec::is_empty), "{left:?}");
    agent.stop()?;
    drop((pod, node, _cgroups, cgroup));
    Ok(())
}

#[test]
fn a_start_with_fresh_that_fails_leaves_the_earlier_agents_maps_to_the_next() -> Result<()> {
    let place = Place::start(WorldOptions::default(), &["--keep"])?;
    let Place { agent, mut pod, node, mut options, cgroup, world, _cgroups } = place;
    pod.http(http_frontends()[0].1)??;
    agent.stop()?;
    let pins = || -> Result<[Vec<String>; 3]> {
        let dir = format!("{PIN_DIR}/v{LAYOUT_VERSION}");
        Ok([
            world.bpffs.list(&dir)?,
            world.bpffs.list(&format!("{dir}/maps"))?,
            world.bpffs.list(&format!("{dir}/links"))?,
        ])
    };
    let before = pins()?;
    options.extra.push("--fresh".into());
    // Enough for what comes before the maps, not for them.
    options.files_max = Some(40);
    let ended = Agent::refuse(&world.node, &world.bpffs, &options)?;
    ensure!(ended.log.contains("Too many open files") && ended.log.contains("BPF"), "{}", ended.log);
    ensure!(!ended.status.success() && pins()? == before, "{:?}, {:?}:\n{}", before, pins()?, ended.log);
    pod.http(http_frontends()[0].1)??;
    options.extra.pop();
    options.files_max = None;
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    ensure!(agent.log().contains("adopting the maps of an earlier agent"), "{}", agent.log());
    pod.http(http_frontends()[0].1)??;
    agent.stop()?;
    drop((pod, node, _cgroups, cgroup));
    Ok(())
}

#[test]
fn an_agent_without_socket_hooks_takes_those_of_an_earlier_one_off() -> Result<()> {
    let place = Place::start(WorldOptions::default(), &["--keep"])?;
    let Place { agent, mut pod, node, mut options, cgroup, world, _cgroups } = place;
    let target = http_frontends()[0].1;
    pod.http(target)??;
    agent.stop()?;
    options.cgroup = None;
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    let links = world.bpffs.list(&links())?;
    ensure!(!links.iter().any(|link| link.starts_with("socket-")), "{links:?}");
    ensure!(pod.http(target)?.is_err(), "a hook is still there");
    agent.stop()?;
    drop((pod, node, _cgroups, cgroup));
    Ok(())
}

#[test]
fn hooks_move_with_the_cgroup_that_is_named() -> Result<()> {
    let place = Place::start(WorldOptions::default(), &["--keep"])?;
    let Place { agent, mut pod, mut node, mut options, cgroup, world, _cgroups } = place;
    agent.stop()?;
    let other = Cgroup::new("other")?;
    options.cgroup = Some(other.path().to_path_buf());
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    let target = http_frontends()[0].1;
    let mut newcomer = Caller::start(binary(), &world.node, &other)?;
    newcomer.http(target)??;
    ensure!(node.http(target)?.is_err() && pod.http(target)?.is_err(), "the old cgroup is still served");
    agent.stop()?;
    drop((newcomer, other, pod, node, _cgroups, cgroup));
    Ok(())
}

#[test]
fn agents_of_two_nodes_on_one_kernel_serve_their_own_cgroups() -> Result<()> {
    let options = WorldOptions { local: 1, remote: 0, ..WorldOptions::default() };
    let (mut one, mut other) = (Place::start(options, &[])?, Place::start(options, &[])?);
    let target = http_frontends()[0].1;
    // The same addresses in both worlds: each caller has to meet the pod of its own.
    for place in [&mut one, &mut other] {
        let before = place.world.pods[0].server.http_served().len();
        for caller in [&mut place.pod, &mut place.node] {
            caller.http(target)??;
        }
        ensure!(place.world.pods[0].server.http_served().len() == before + 2);
    }
    one.stop()?;
    other.pod.http(target)??;
    other.node.http(target)??;
    other.stop()
}

#[test]
fn hooks_follow_a_cgroup_that_is_removed_and_made_again() -> Result<()> {
    let world = World::build(WorldOptions::default())?;
    world.publish()?;
    let parent = Cgroup::new("parent")?;
    let first = parent.child("pods")?;
    let path = first.path().to_path_buf();
    let mut options = world.agent_options(Mode::Generic);
    options.cgroup = Some(path.clone());
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    let shown = || -> Result<serde_json::Value> {
        Ok(serde_json::from_str::<serde_json::Value>(&agent.get("/status")?)?["sockets"].take())
    };
    let of_leaf = shown()?;
    ensure!(of_leaf["warning"].as_str().is_some_and(|text| text.contains("--cgroup")), "{of_leaf}");
    drop(first);
    wait_for("the loss to be shown", ANSWERS_TIMEOUT, || {
        let now = shown()?;
        let warning = now["warning"].as_str().unwrap_or_default();
        ensure!(now["cgroup"].is_null() && warning.contains("the cgroup is gone"), "{now}");
        Ok(())
    })?;
    // Before the agent notices.
    let signal = |signal| kill(Pid::from_raw(agent.pid() as i32), signal);
    signal(Signal::SIGSTOP)?;
    let again = parent.child("pods")?;
    let of_pod = again.child("pod")?;
    let mut early = Caller::start(binary(), &world.pod("local-1")?.namespace, &of_pod)?;
    early.open("socket", false)?;
    early.connect("socket", udp_frontends()[0].1)?;
    signal(Signal::SIGCONT)?;
    wait_for("the hooks to return", ANSWERS_TIMEOUT, || {
        ensure!(shown()?["cgroup"].as_str().map(Into::into) == Some(path.clone()));
        Ok(())
    })?;
    wait_for("the warning to end", ANSWERS_TIMEOUT, || {
        let now = shown()?;
        ensure!(now["warning"].is_null(), "{now}");
        Ok(())
    })?;
    wait_for("a socket that was connected before to be told", ANSWERS_TIMEOUT, || {
        told_of_its_end(early.ask("socket")?)
    })?;
    let mut pod = Caller::start(binary(), &world.pod("local-1")?.namespace, &of_pod)?;
    pod.http(http_frontends()[0].1)??;
    agent.stop()?;
    drop((pod, early, of_pod, again));
    Ok(())
}

#[test]
fn a_connected_udp_socket_learns_that_its_backend_is_gone() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &[])?;
    let target = udp_frontends()[0].1;
    let mut met = Vec::new();
    for caller in [&mut place.pod, &mut place.node] {
        caller.open("socket", false)?;
        caller.connect("socket", target)?;
        met.push(caller.ask("socket")??.backend);
    }
    // Who has connected to a pod itself is not the agent's to end.
    let direct = place.world.pods.iter().find(|pod| pod.server.name() == met[0]).context("the pod")?;
    let direct = (direct.server.address(), xdp_agent_tests::lab::servers::UDP_PORT).into();
    place.pod.open("direct", false)?;
    place.pod.connect("direct", direct)?;
    place.pod.ask("direct")??;
    let is_other = |pod: &&Pod| !met.iter().any(|met| met == pod.server.name());
    let others: Vec<_> = place.world.pods.iter().filter(is_other).map(Pod::endpoint).collect();
    place.world.change_endpoints(&place.agent, &others)?;
    for is_pod in [true, false] {
        place.wait_until("the socket to be told", |place| {
            let caller = if is_pod { &mut place.pod } else { &mut place.node };
            told_of_its_end(caller.ask("socket")?)
        })?;
        let caller = if is_pod { &mut place.pod } else { &mut place.node };
        let now = answer_once_connected_again(caller, "socket", target)?;
        ensure!(!met.contains(&now.backend), "{now:?} is gone");
    }
    place.pod.ask("direct")??;
    place.wait_until("both to be counted", |place| {
        let destroyed = place.agent.metric("sockets_destroyed", "")?;
        ensure!(destroyed >= 2.0, "{destroyed}");
        Ok(())
    })?;
    place.stop()
}

#[test]
fn connected_udp_sockets_of_one_address_and_port_are_all_told() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &[])?;
    let target = udp_frontends()[0].1;
    let IpAddr::V4(vip) = target.ip() else { bail!("{target} is of IPv6") };
    let mapped = SocketAddr::from((vip.to_ipv6_mapped(), target.port()));
    let endpoints: Vec<_> = place.world.pods.iter().map(Pod::endpoint).collect();
    place.world.change_endpoints(&place.agent, &endpoints[..1])?;
    let kinds = [false, true, false, true, true];
    for (number, is_v6) in kinds.into_iter().enumerate() {
        let socket = format!("socket{number}");
        place.pod.open_at(&socket, is_v6, 5999)?;
        place.pod.connect(&socket, if is_v6 { mapped } else { target })?;
    }
    place.world.change_endpoints(&place.agent, &endpoints[1..])?;
    place.wait_until("all to be told", |place| {
        let destroyed = place.agent.metric("sockets_destroyed", "")?;
        ensure!(destroyed == kinds.len() as f64, "{destroyed}");
        Ok(())
    })?;
    place.stop()
}

#[test]
fn a_connected_udp_socket_is_told_however_many_sockets_have_followed_it() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &[])?;
    let target = udp_frontends()[0].1;
    place.pod.open("socket", false)?;
    place.pod.connect("socket", target)?;
    // Until then nobody asks what the socket has been told.
    place.node.churn(2 * UDP_CONNECTED.entries + 2_000, target)?;
    let met = place.pod.ask("socket")??;
    ensure!(met.from == target, "{met:?} instead of {target}");
    let is_other = |pod: &&Pod| met.backend != pod.server.name();
    let others: Vec<_> = place.world.pods.iter().filter(is_other).map(Pod::endpoint).collect();
    place.world.change_endpoints(&place.agent, &others)?;
    place.wait_until("the socket to be told", |place| told_of_its_end(place.pod.ask("socket")?))?;
    place.stop()
}

#[test]
fn a_udp_socket_whose_backend_went_while_no_agent_ran_learns_it_from_the_next() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &[])?;
    place.pod.open("socket", false)?;
    place.pod.connect("socket", udp_frontends()[0].1)?;
    let met = place.pod.ask("socket")??.backend;
    let Place { agent, mut pod, node, options, cgroup, world, _cgroups } = place;
    agent.kill()?;
    let others: Vec<_> =
        world.pods.iter().filter(|pod| pod.server.name() != met).map(Pod::endpoint).collect();
    world.publish_endpoints(&others)?;
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    wait_for("the socket to be told", ANSWERS_TIMEOUT, || told_of_its_end(pod.ask("socket")?))?;
    agent.stop()?;
    drop((pod, node, _cgroups, cgroup));
    Ok(())
}

#[test]
fn a_udp_socket_that_names_its_target_goes_elsewhere_when_its_backend_is_gone() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &[])?;
    let target = udp_frontends()[0].1;
    place.pod.open("socket", false)?;
    let met = place.pod.ask_at("socket", target)??.backend;
    let others: Vec<_> =
        place.world.pods.iter().filter(|pod| pod.server.name() != met).map(Pod::endpoint).collect();
    place.world.change_endpoints(&place.agent, &others)?;
    let now = place.pod.ask_at("socket", target)??;
    ensure!(now.backend != met && now.from == target, "{now:?}");
    place.stop()
}

#[test]
fn a_tcp_connection_outlives_its_endpoint() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &[])?;
    let target = http_frontends()[0].1;
    place.pod.hold("long", target)?;
    let met = place.pod.ask_held("long")??;
    ensure!(met.from == target, "the peer is {}", met.from);
    // Terminating first, while others are ready: new connections go elsewhere.
    let terminating = place.world.pods.iter().map(|pod| {
        let endpoint = pod.endpoint();
        let is_met = pod.server.name() == met.backend;
        if is_met { xdp_agent_tests::lab::manifests::Endpoint { ready: false, ..endpoint } } else { endpoint }
    });
    place.world.change_endpoints(&place.agent, &terminating.collect::<Vec<_>>())?;
    for _ in 0..40 {
        ensure!(place.pod.http(target)??.backend != met.backend);
    }
    ensure!(place.pod.ask_held("long")?? == met);
    place.world.change_endpoints(&place.agent, &[])?;
    ensure!(place.pod.ask_held("long")?? == met);
    place.stop()
}

#[test]
fn what_a_tcp_socket_was_told_is_kept_until_it_is_closed() -> Result<()> {
    const CONNECTIONS: usize = 20;
    let mut place = Place::start(WorldOptions::default(), &[])?;
    let target = http_frontends()[0].1;
    for number in 0..CONNECTIONS {
        place.pod.hold(&format!("{number}"), target)?;
    }
    for _ in 0..2 * CONNECTIONS {
        place.pod.http(target)??;
    }
    ensure!(cookies(&place.world, |_| {})? == CONNECTIONS, "those that are closed are forgotten");
    // Full buckets: a new socket takes the place of another in its own, and nowhere else.
    let taken = cookies(&place.world, |ways| {
        ways.iter_mut().filter(|cookie| **cookie == 0).for_each(|cookie| *cookie = u64::MAX);
    })?;
    place.pod.hold("late", target)?;
    ensure!(place.pod.ask_held("late")??.from == target, "the late one is told");
    ensure!(cookies(&place.world, |_| {})? == taken);
    let mut forgotten = 0;
    for number in 0..CONNECTIONS {
        forgotten += usize::from(place.pod.ask_held(&format!("{number}"))??.from != target);
    }
    ensure!(forgotten <= 1, "{forgotten} sockets have forgotten whom they called");
    cookies(&place.world, |ways| {
        ways.iter_mut().filter(|cookie| **cookie == u64::MAX).for_each(|cookie| *cookie = 0);
    })?;
    let Place { agent, pod, node, options: _, cgroup, world, _cgroups } = place;
    drop(pod);
    wait_for("the end of the process to be noticed", ANSWERS_TIMEOUT, || {
        let left = cookies(&world, |_| {})?;
        ensure!(left == 0, "{left} are left");
        Ok(())
    })?;
    agent.stop()?;
    drop((node, _cgroups, cgroup));
    Ok(())
}

/// Lets a bucket of the cookies of TCP sockets be changed after the other, where that is wanted; how many cookies are there then
/// is the answer.
fn cookies(world: &World, change: impl Fn(&mut [u64; WAYS]) + Send + Sync) -> Result<usize> {
    let path = format!("{PIN_DIR}/v{LAYOUT_VERSION}/maps/{}", TCP_COOKIES.name);
    world.bpffs.run(|| {
        let map = Map::Array(MapData::from_pin(&path).context(path)?);
        let mut buckets: Array<_, [u64; WAYS]> = map.try_into()?;
        let mut count = 0;
        for index in 0..buckets.len() {
            let before = buckets.get(&index, 0)?;
            let mut ways = before;
            change(&mut ways);
            if ways != before {
                buckets.set(index, ways, 0)?;
            }
            count += ways.iter().filter(|cookie| **cookie != 0).count();
        }
        Ok(count)
    })?
}

/// Where links are pinned.
fn links() -> String {
    format!("{PIN_DIR}/v{LAYOUT_VERSION}/links")
}

/// A place whose callers open connections without a pause, all of them answered so far.
fn hammered(extra: &[&str]) -> Result<Place> {
    let mut place = Place::start(WorldOptions::default(), extra)?;
    for caller in [&mut place.pod, &mut place.node] {
        caller.hammer(http_frontends()[0].1)?;
    }
    more([&mut place.pod, &mut place.node])?;
    Ok(place)
}

/// Waits until so many more of each caller's connections are answered.
fn more(callers: [&mut Caller; 2]) -> Result<()> {
    for caller in callers {
        more_answers(caller, ANSWERS, ANSWERS_TIMEOUT)?;
    }
    Ok(())
}

/// Whether no connection has failed, and every hook is there.
fn are_whole(callers: [&mut Caller; 2], world: &World) -> Result<()> {
    for caller in callers {
        caller.tally()?.is_whole()?;
    }
    let links = world.bpffs.list(&links())?;
    ensure!(links.iter().filter(|link| link.starts_with("socket-")).count() == 11, "{links:?}");
    Ok(())
}
