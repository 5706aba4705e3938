//! Bad input gets one clear message that says what to do, and leaves the host's network as it was.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Result, ensure};
use xdp_agent_tests::lab::agent::{Agent, AgentOptions, Mode, Privileges, Source};
use xdp_agent_tests::lab::block_on;
use xdp_agent_tests::lab::clients::whoami_once;
use xdp_agent_tests::lab::link::veth;
use xdp_agent_tests::lab::manifests::{Endpoint, Service};
use xdp_agent_tests::lab::netns::PrivateBpffs;
use xdp_agent_tests::lab::servers::HTTP_PORT;
use xdp_agent_tests::lab::snapshot::Snapshot;
use xdp_agent_tests::lab::wait_for;
use xdp_agent_tests::lab::world::{
    LOAD_BALANCER_IP, SERVICE_HTTP, World, WorldOptions, http_frontends, standard_service,
};

use crate::setup::{counted, says};

const REACTION_TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn an_unknown_interface_is_refused_by_name() -> Result<()> {
    let world = small_world()?;
    let options = AgentOptions { interfaces: vec!["eth0".into(), "nosuch0".into()], ..options(&world) };
    let log = refused(&world, &world.bpffs, &options)?;
    says(&log, &["nosuch0"])
}

#[test]
fn an_interface_without_an_address_is_named() -> Result<()> {
    let world = small_world()?;
    veth(&world.node, "bare0", &world.node2, "bare1")?;
    let before = Snapshot::take(&world.node)?;
    let options = AgentOptions { interfaces: vec!["bare0".into()], ..options(&world) };
    let mut agent = Agent::spawn(&world.node, &world.bpffs, &options)?;
    // Refusing and starting with a warning are both right: an address may come later.
    let ready = agent.wait_ready();
    wait_for("a message about bare0", REACTION_TIMEOUT, || says(&agent.log(), &["bare0", "address"]))?;
    if ready.is_ok() {
        agent.stop()?;
    }
    unchanged(&before, &world)
}

#[test]
fn missing_privileges_are_refused_with_the_remedy() -> Result<()> {
    let world = small_world()?;
    let options = AgentOptions { privileges: Privileges::None, ..options(&world) };
    let log = refused(&world, &world.bpffs, &options)?;
    says(&log, &["CAP_"])
}

#[test]
fn a_missing_bpffs_is_refused_with_the_remedy() -> Result<()> {
    let world = small_world()?;
    let log = refused(&world, &PrivateBpffs::missing()?, &options(&world))?;
    says(&log, &["mount -t bpf"])
}

#[test]
fn a_missing_manifest_path_is_refused_by_name() -> Result<()> {
    let world = small_world()?;
    let options = AgentOptions {
        source: Source::Manifests(world.manifests.scratch().join("nowhere")),
        ..options(&world)
    };
    let log = refused(&world, &world.bpffs, &options)?;
    says(&log, &["nowhere"])
}

#[test]
fn a_broken_document_does_not_stop_the_good_ones() -> Result<()> {
    let world = small_world()?;
    let broken = "apiVersion: v1\nkind: Service\nmetadata: [this, is, no, mapping\n";
    let wrong = "apiVersion: v1\nkind: Service\nmetadata:\n  name: wrong\nspec:\n  clusterIP: 10.96.0.300\n  ports:\n  - port: 80\n";
    world.publish()?;
    let documents = [wrong.to_string(), standard_service().yaml(), broken.to_string()];
    world.manifests.write("web.yaml", &documents)?;
    let agent = Agent::start(&world.node, &world.bpffs, &options(&world))?;
    ask(&world)?;
    says(&agent.log(), &["web.yaml"])?;
    counted(&agent, "syntax")?;
    counted(&agent, "invalid")?;
    agent.stop()
}

#[test]
fn a_file_that_breaks_while_the_agent_runs_keeps_what_was_served() -> Result<()> {
    let world = small_world()?;
    let mut agent = world.start_agent(Mode::Auto)?;
    agent.wait_ready()?;
    ask(&world)?;
    world.manifests.write_raw("web.yaml", "kind: [Service\n")?;
    wait_for("a message about web.yaml", REACTION_TIMEOUT, || says(&agent.log(), &["web.yaml"]))?;
    ask(&world)?;
    world.publish()?;
    ask(&world)?;
    agent.stop()
}

#[test]
fn duplicate_frontends_are_reported_and_one_service_answers() -> Result<()> {
    let world = World::build(WorldOptions { local: 2, remote: 0, ..WorldOptions::default() })?;
    world.publish_endpoints(&[world.pods[0].endpoint()])?;
    let mut other =
        Service::new("other", Ipv4Addr::new(10, 96, 0, 11)).port("http", "TCP", SERVICE_HTTP, HTTP_PORT, 0);
    other.load_balancer_ips.push(LOAD_BALANCER_IP);
    let slice = other.slice_yaml(&[world.pods[1].endpoint()]);
    world.manifests.write("other.yaml", &[other.yaml(), slice])?;
    let agent = Agent::start(&world.node, &world.bpffs, &options(&world))?;
    let first = block_on(whoami_once(&world.client, (LOAD_BALANCER_IP, SERVICE_HTTP)))?.backend;
    for _ in 0..20 {
        let again = block_on(whoami_once(&world.client, (LOAD_BALANCER_IP, SERVICE_HTTP)))?.backend;
        ensure!(again == first, "the shared frontend answers as {first} and as {again}");
    }
    // What the two do not share works for both.
    ensure!(block_on(whoami_once(&world.client, (other.cluster_ip, SERVICE_HTTP)))?.backend == "local-2");
    says(&agent.log(), &[&LOAD_BALANCER_IP.to_string(), "default/web", "default/other"])?;
    counted(&agent, "duplicate_frontend")?;
    agent.stop()
}

#[test]
fn an_endpoint_with_an_impossible_address_is_reported_and_gets_no_traffic() -> Result<()> {
    let world = small_world()?;
    world.publish()?;
    let impossible = Endpoint::new(Ipv4Addr::new(10, 244, 1, 250), "node");
    let slice = standard_service().slice_yaml(&[world.pods[0].endpoint(), impossible]);
    world.manifests.write("web-slice.yaml", &[slice.replace("10.244.1.250", "10.244.1.350")])?;
    let agent = Agent::start(&world.node, &world.bpffs, &options(&world))?;
    for _ in 0..20 {
        ask(&world)?;
    }
    says(&agent.log(), &["10.244.1.350"])?;
    counted(&agent, "invalid")?;
    agent.stop()
}

fn small_world() -> Result<World> {
    World::build(WorldOptions { local: 1, remote: 0, ..WorldOptions::default() })
}

fn options(world: &World) -> AgentOptions {
    world.agent_options(Mode::Auto)
}

fn ask(world: &World) -> Result<()> {
    let [(_, target), ..] = http_frontends();
    let whoami = block_on(whoami_once(&world.client, target))?;
    ensure!(whoami.backend == "local-1", "{whoami:?}");
    Ok(())
}

/// Starts an agent that must refuse, and returns its log if it left the node as it was.
fn refused(world: &World, bpffs: &PrivateBpffs, options: &AgentOptions) -> Result<String> {
    world.publish()?;
    let before = Snapshot::take(&world.node)?;
    let refusal = Agent::refuse(&world.node, bpffs, options)?;
    println!("{}", refusal.log);
    ensure!(!refusal.status.success(), "the agent ended well");
    ensure!(!refusal.log.contains("panicked"), "the agent panicked");
    unchanged(&before, world)?;
    Ok(refusal.log)
}

fn unchanged(before: &Snapshot, world: &World) -> Result<()> {
    let difference = before.difference(&Snapshot::take(&world.node)?);
    ensure!(difference.is_empty(), "the node changed: {difference:#?}");
    Ok(())
}
