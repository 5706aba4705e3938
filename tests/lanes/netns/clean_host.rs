//! The host's network is as it was once the agent is gone, however it went.

use anyhow::{Result, ensure};
use xdp_agent_tests::lab::agent::{Agent, PIN_DIR};
use xdp_agent_tests::lab::block_on;
use xdp_agent_tests::lab::snapshot::Snapshot;
use xdp_agent_tests::lab::world::{WorldOptions, http_frontends};

use crate::setup::{Setup, connection_to};

each_mode!(stopping_leaves_the_host_as_it_was);
fn stopping_leaves_the_host_as_it_was(setup: Setup) -> Result<()> {
    let world = setup.world(WorldOptions::default())?;
    let before = Snapshot::take(&world.node)?;
    let agent = world.start_agent(setup.mode)?;
    ensure!(!before.difference(&Snapshot::take(&world.node)?).is_empty(), "a running agent must be visible");
    block_on(connection_to(&world.client, http_frontends()[0].1, "remote"))?;
    agent.stop()?;
    let difference = before.difference(&Snapshot::take(&world.node)?);
    ensure!(difference.is_empty(), "{difference:#?}");
    let pins = world.bpffs.list(PIN_DIR)?;
    ensure!(pins.is_empty(), "pinned objects are left: {pins:?}");
    Ok(())
}

each_mode!(killing_starting_and_stopping_leaves_the_host_as_it_was);
fn killing_starting_and_stopping_leaves_the_host_as_it_was(setup: Setup) -> Result<()> {
    let world = setup.world(WorldOptions::default())?;
    let before = Snapshot::take(&world.node)?;
    let agent = world.start_agent(setup.mode)?;
    let running = Snapshot::take(&world.node)?;
    agent.kill()?;
    let agent = Agent::start(&world.node, &world.bpffs, &world.agent_options(setup.mode))?;
    let again = running.difference(&Snapshot::take(&world.node)?);
    ensure!(again.is_empty(), "the second start found or left something else: {again:#?}");
    agent.stop()?;
    let difference = before.difference(&Snapshot::take(&world.node)?);
    ensure!(difference.is_empty(), "{difference:#?}");
    Ok(())
}
