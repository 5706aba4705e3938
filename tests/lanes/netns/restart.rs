//! The agent may die and come back: traffic does not notice.

use std::time::Duration;

use anyhow::{Result, ensure};
use rtnetlink::packet_route::link::LinkAttribute;
use xdp_agent_tests::lab::agent::{Agent, Privileges};
use xdp_agent_tests::lab::load::{Kind, Load};
use xdp_agent_tests::lab::world::{World, http_frontends, udp_frontends};

use crate::setup::{Running, Setup};

const ANSWERS_TIMEOUT: Duration = Duration::from_secs(30);
/// Answers in each phase, of each kind of traffic: enough that every worker had its turn many times.
const ANSWERS: u64 = 300;
/// Connections of a worker that a start with `--fresh` may end: they are short, and made one after the other.
const ENDED_MAX: usize = 3;

each_mode!(a_killed_agent_that_starts_again_loses_no_connection);
fn a_killed_agent_that_starts_again_loses_no_connection(setup: Setup) -> Result<()> {
    let Running { agent, world } = setup.start()?;
    let carriers = carrier_changes(&world)?;
    let loads = start_loads(&world);
    wait_answered(&loads)?;
    agent.kill()?;
    // Nobody is there to help: programs and maps alone carry old flows and new ones.
    wait_answered(&loads)?;
    let agent = Agent::start(&world.node, &world.bpffs, &world.agent_options(setup.mode))?;
    setup.check_mode(&agent, "eth0")?;
    wait_answered(&loads)?;
    for load in loads {
        load.stop().all_answered()?;
    }
    ensure!(carrier_changes(&world)? == carriers, "the restart took the link down for a moment");
    agent.stop()
}

each_mode!(an_agent_stopped_with_keep_leaves_its_programs_serving);
fn an_agent_stopped_with_keep_leaves_its_programs_serving(setup: Setup) -> Result<()> {
    let world = setup.world(Default::default())?;
    world.publish()?;
    let mut options = world.agent_options(setup.mode);
    options.extra.push("--keep".into());
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    let loads = start_loads(&world);
    wait_answered(&loads)?;
    agent.stop()?;
    wait_answered(&loads)?;
    let agent = Agent::start(&world.node, &world.bpffs, &world.agent_options(setup.mode))?;
    wait_answered(&loads)?;
    for load in loads {
        load.stop().all_answered()?;
    }
    agent.stop()
}

each_mode!(a_start_with_fresh_ends_connections_of_its_moment_and_refuses_none_after);
fn a_start_with_fresh_ends_connections_of_its_moment_and_refuses_none_after(setup: Setup) -> Result<()> {
    let world = setup.world(Default::default())?;
    world.publish()?;
    let mut options = world.agent_options(setup.mode);
    options.extra.push("--keep".into());
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    let carriers = carrier_changes(&world)?;
    let loads =
        http_frontends().map(|(_, target)| Load::start(&world.client, target, Kind::NewConnections, 1));
    wait_answered(&loads)?;
    agent.stop()?;
    options.extra.push("--fresh".into());
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    setup.check_mode(&agent, "eth0")?;
    wait_answered(&loads)?;
    for load in loads {
        let report = load.stop();
        ensure!(report.errors.len() <= ENDED_MAX, "{} answered, but: {:#?}", report.answered, report.errors);
    }
    ensure!(carrier_changes(&world)? == carriers, "the restart took the link down for a moment");
    agent.stop()
}

each_mode!(an_agent_with_the_documented_capabilities_adopts_programs_and_serves);
fn an_agent_with_the_documented_capabilities_adopts_programs_and_serves(setup: Setup) -> Result<()> {
    let world = setup.world(Default::default())?;
    world.publish()?;
    let mut options = world.agent_options(setup.mode);
    options.privileges = Privileges::Documented;
    options.extra.push("--keep".into());
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    let loads = start_loads(&world);
    wait_answered(&loads)?;
    agent.stop()?;
    // The second start has pins to adopt, and the last one has to take everything off.
    options.extra.retain(|argument| argument != "--keep");
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    setup.check_mode(&agent, "eth0")?;
    wait_answered(&loads)?;
    for load in loads {
        load.stop().all_answered()?;
    }
    agent.stop()
}

fn start_loads(world: &World) -> Vec<Load> {
    let [(_, http), (_, node_port), ..] = http_frontends();
    let [(_, udp), ..] = udp_frontends();
    vec![
        Load::start(&world.client, http, Kind::KeptConnection, 16),
        Load::start(&world.client, node_port, Kind::NewConnections, 4),
        Load::start(&world.client, udp, Kind::Datagrams, 8),
    ]
}

fn wait_answered(loads: &[Load]) -> Result<()> {
    loads.iter().try_for_each(|load| load.wait_answered(ANSWERS, ANSWERS_TIMEOUT))
}

fn carrier_changes(world: &World) -> Result<Vec<LinkAttribute>> {
    let attributes = world.node.link("eth0")?.attributes.into_iter();
    Ok(attributes.filter(|attribute| matches!(attribute, LinkAttribute::CarrierChanges(_))).collect())
}
