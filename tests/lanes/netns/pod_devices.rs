//! Pods that no socket hook serves, as virtual machines are, reach Services by the programs on their devices.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::agent::{Agent, PIN_DIR};
use xdp_agent_tests::lab::link::veth;
use xdp_agent_tests::lab::manifests::Service;
use xdp_agent_tests::lab::netns::Namespace;
use xdp_agent_tests::lab::snapshot::Snapshot;
use xdp_agent_tests::lab::wait_for;
use xdp_agent_tests::lab::world::{
    CLUSTER_IP, NODE, World, WorldOptions, http_frontends, standard_service, udp_frontends,
};

use crate::callers::{Place, all_places, more_answers, places, refused, repeated};

const PATTERN: [&str; 2] = ["--pod-iface", "pod*"];
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Answers in each phase: enough that a gap of milliseconds would show.
const ANSWERS: u64 = 200;

#[test]
fn a_pod_reaches_every_frontend_by_its_device_and_itself_among_the_endpoints() -> Result<()> {
    for tx_offload in [true, false] {
        let world = World::build(WorldOptions { tx_offload, ..WorldOptions::default() })?;
        let mut place = Place::without_hooks(world, &PATTERN)?;
        let pod = place.world.pod("local-1")?.server.address();
        for (kind, target) in http_frontends() {
            let answers = repeated(|| place.pod.http(target)).with_context(|| format!("TCP, {kind}"))?;
            all_places(&answers, target)?;
            for answer in answers {
                // A pod that meets itself would drop what comes from its own address.
                let client = if answer.backend == "local-1" { NODE } else { pod };
                // Without --cluster-cidr all but ClusterIPs masquerade whoever they serve elsewhere.
                let is_masqueraded = kind != "ClusterIP" && answer.backend.starts_with("remote");
                let client = if is_masqueraded { NODE } else { client };
                ensure!(answer.client.ip() == client, "{kind}: {answer:?}");
            }
        }
        for (kind, target) in udp_frontends() {
            let answers = repeated(|| place.pod.udp(target)).with_context(|| format!("UDP, {kind}"))?;
            all_places(&answers, target)?;
            ensure!(answers.iter().any(|answer| answer.backend == "local-1"), "{kind}: never itself");
        }
        place.stop()?;
    }
    Ok(())
}

#[test]
fn a_pod_is_refused_at_once_by_its_device_what_has_no_endpoint_or_no_service() -> Result<()> {
    for tx_offload in [true, false] {
        let world = World::build(WorldOptions { tx_offload, ..WorldOptions::default() })?;
        let mut place = Place::without_hooks(world, &PATTERN)?;
        refused("unknown port", libc::ECONNREFUSED, || place.pod.http((CLUSTER_IP, 81).into()))?;
        refused("unknown port", libc::ECONNREFUSED, || place.pod.udp((CLUSTER_IP, 81).into()))?;
        place.world.change_endpoints(&place.agent, &[])?;
        for (kind, target) in http_frontends() {
            refused(kind, libc::ECONNREFUSED, || place.pod.http(target))?;
        }
        for (kind, target) in udp_frontends() {
            refused(kind, libc::ECONNREFUSED, || place.pod.udp(target))?;
        }
        place.stop()?;
    }
    Ok(())
}

#[test]
fn policies_affinity_and_source_ranges_hold_at_devices() -> Result<()> {
    let mut place = Place::without_hooks(World::build(WorldOptions::default())?, &PATTERN)?;
    let [(_, cluster_ip), (_, node_port), _, (_, balancer)] = http_frontends();
    let local =
        Service { internal_traffic_policy: "Local", external_traffic_policy: "Local", ..standard_service() };
    place.world.manifests.write("web.yaml", &[local.yaml()])?;
    place.wait_until("the policies to hold", |place| {
        let answers = repeated(|| place.pod.http(cluster_ip))?;
        ensure!(places(&answers) == ["local"], "{answers:?}");
        Ok(())
    })?;
    // A pod is inside the cluster, whichever frontend it uses.
    ensure!(places(&repeated(|| place.pod.http(node_port))?) == ["local", "remote"]);
    let keeping = standard_service().yaml().replace("sessionAffinity: None", "sessionAffinity: ClientIP");
    place.world.manifests.write("web.yaml", &[keeping])?;
    place.wait_until("the pod to keep its backend", |place| {
        let mut met = BTreeSet::new();
        for (_, target) in http_frontends() {
            met.extend(repeated(|| place.pod.http(target))?.into_iter().map(|answer| answer.backend));
        }
        ensure!(met.len() == 1, "{met:?}");
        Ok(())
    })?;
    let ranges = format!("spec:\n  loadBalancerSourceRanges:\n  - {NODE}/32\n");
    let restricted = standard_service().yaml().replacen("spec:\n", &ranges, 1);
    place.world.manifests.write("web.yaml", &[restricted])?;
    place.wait_until("the range to hold", |place| {
        ensure!(place.pod.http(balancer)?.is_err());
        Ok(())
    })?;
    place.pod.http(cluster_ip)??;
    ensure!(place.agent.metric("drops", "source_range")? > 0.0);
    place.stop()
}

#[test]
fn a_pod_left_out_by_host_only_is_served_by_its_device() -> Result<()> {
    let extra = ["--socket-lb", "host-only", PATTERN[0], PATTERN[1]];
    let mut place = Place::start(WorldOptions::default(), &extra)?;
    let (_, target) = http_frontends()[0];
    all_places(&repeated(|| place.pod.http(target))?, target)?;
    all_places(&repeated(|| place.node.http(target))?, target)?;
    let calls = place.agent.metric("socket_calls", "call=\"tcp_connect\",result=\"translated\"")?;
    ensure!(
        calls == 40.0,
        "{calls} connections were translated at their sockets, not those of the node alone"
    );
    place.stop()
}

#[test]
fn devices_of_pods_are_followed_as_they_come_and_go() -> Result<()> {
    const PODS: usize = 60;
    let world = World::build(WorldOptions::default())?;
    let place = Place::without_hooks(world, &PATTERN)?;
    ensure!(served(&place)? == ["pod1", "pod2"], "{:?}", served(&place)?);
    let far = Namespace::new("far")?;
    let began = Instant::now();
    for number in 0..PODS {
        veth(&place.world.node, &format!("pod-n{number}"), &far, &format!("eth{number}"))?;
        veth(&place.world.node, &format!("other{number}"), &far, &format!("other{number}"))?;
    }
    wait_for("the new devices to be served", CHANGE_TIMEOUT, || {
        let served = served(&place)?.len();
        ensure!(served == 2 + PODS, "{served} are");
        Ok(())
    })?;
    eprintln!("{PODS} devices were made and attached to within {:?}", began.elapsed());
    let pins = place.world.bpffs.list(&links())?;
    ensure!(pins.iter().filter(|pin| pin.starts_with("pod-")).count() == 2 * (2 + PODS), "{pins:?}");
    for number in 0..PODS {
        place.world.node.delete(&format!("pod-n{number}"))?;
    }
    wait_for("the old devices to be forgotten", CHANGE_TIMEOUT, || {
        let served = served(&place)?;
        ensure!(served == ["pod1", "pod2"], "{served:?} are left");
        Ok(())
    })?;
    let pins = place.world.bpffs.list(&links())?;
    ensure!(pins.iter().filter(|pin| pin.starts_with("pod-")).count() == 4, "{pins:?}");
    place.stop()
}

/// A directory where the program is to be pinned stands for all that keeps one off a device for a while.
#[test]
fn a_device_that_has_refused_is_tried_again() -> Result<()> {
    let place = Place::without_hooks(World::build(WorldOptions::default())?, &PATTERN)?;
    let (far, node) = (Namespace::new("far")?, &place.world.node);
    veth(node, "other", &far, "eth0")?;
    let obstacle = format!("{}/pod-egress-{}", links(), node.index("other")?);
    place.world.bpffs.run(|| std::fs::create_dir(&obstacle))??;
    node.rename("other", "pod-late")?;
    wait_for("the device to refuse", CHANGE_TIMEOUT, || {
        let status = place.agent.status()?;
        let refused = &status["refused_pod_interfaces"];
        ensure!(refused[0]["name"] == "pod-late", "{refused}");
        ensure!(refused[0]["reason"].as_str().is_some_and(|reason| reason.contains(&obstacle)), "{refused}");
        Ok(())
    })?;
    ensure!(served(&place)? == ["pod1", "pod2"], "{:?}", served(&place)?);
    ensure!(place.agent.metric("attach_failures", "")? > 0.0);
    place.world.bpffs.run(|| std::fs::remove_dir(&obstacle))??;
    wait_for("the device to be served", CHANGE_TIMEOUT, || {
        let served = served(&place)?;
        ensure!(served == ["pod1", "pod2", "pod-late"], "{served:?}");
        Ok(())
    })?;
    ensure!(place.agent.status()?["refused_pod_interfaces"].as_array().is_some_and(Vec::is_empty));
    place.stop()
}

#[test]
fn a_killed_agent_that_starts_again_fails_no_connection_of_a_pod_and_leaves_nothing() -> Result<()> {
    let world = World::build(WorldOptions::default())?;
    let before = Snapshot::take(&world.node)?;
    let mut place = Place::without_hooks(world, &PATTERN)?;
    place.pod.hold("long", http_frontends()[0].1)?;
    let met = place.pod.ask_held("long")??;
    place.pod.hammer(http_frontends()[0].1)?;
    more(&mut place.pod)?;
    let Place { agent, mut pod, node, options, cgroup, world, _cgroups } = place;
    agent.kill()?;
    more(&mut pod)?;
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    more(&mut pod)?;
    pod.tally()?.is_whole()?;
    ensure!(pod.ask_held("long")?? == met);
    drop((pod, node));
    agent.stop()?;
    let difference = before.difference(&Snapshot::take(&world.node)?);
    ensure!(difference.is_empty(), "{difference:#?}");
    drop((_cgroups, cgroup));
    Ok(())
}

#[test]
fn a_start_with_fresh_ends_connections_of_a_pod_that_are_open_and_refuses_none_after() -> Result<()> {
    let mut place = Place::without_hooks(World::build(WorldOptions::default())?, &PATTERN)?;
    place.pod.hammer(http_frontends()[0].1)?;
    more(&mut place.pod)?;
    let Place { agent, mut pod, node, mut options, cgroup, world, _cgroups } = place;
    agent.kill()?;
    options.extra.push("--fresh".into());
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    more(&mut pod)?;
    let tally = pod.tally()?;
    ensure!(tally.failed + tally.reset <= 2, "{tally:?}");
    agent.stop()?;
    drop((pod, node, _cgroups, cgroup));
    Ok(())
}

/// The devices that carry programs, by index.
fn served(place: &Place) -> Result<Vec<String>> {
    let status = place.agent.status()?;
    let names = status["pod_interfaces"].as_array().context("no pod_interfaces")?;
    Ok(names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect())
}

fn links() -> String {
    format!("{PIN_DIR}/v{}/links", xdp_common::tables::LAYOUT_VERSION)
}

fn more(caller: &mut xdp_agent_tests::lab::caller::Caller) -> Result<()> {
    more_answers(caller, ANSWERS, CHANGE_TIMEOUT)
}
