//! What the agent's collection takes for idle, and what not.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::{agent::Mode, patient, wait_for};

use crate::{
    dual::each,
    setup::Setup,
    two_backends::{Place, Talk, TwoBackends, VIP},
};

/// Flows of each kind, so many that new ones would not all meet the old backend again.
const FLOWS: usize = 16;
/// Looks are ten seconds apart.
const LOOKS: Duration = Duration::from_secs(25);

#[test]
fn what_idles_is_forgotten_and_what_does_not_is_kept_by_every_look() -> Result<()> {
    let world = TwoBackends::build(Setup { mode: Mode::Native, tx_offload: false }, Place::Elsewhere)?;
    world.publish(&[0])?;
    let short = ["--udp-timeout", "2s", "--tcp-established-timeout", "2s", "--tcp-half-closed-timeout", "1s"];
    let agent = world.start_agent(&short)?;
    let [mut busy, mut idle] = [Vec::new(), Vec::new()];
    for flows in [&mut busy, &mut idle] {
        for vip in each(VIP) {
            for _ in 0..FLOWS / 2 {
                flows.push(Talk::udp(&world.client, vip)?);
                flows.push(Talk::tcp(&world.client, vip)?);
            }
        }
    }
    for talk in busy.iter_mut().chain(&mut idle) {
        for _ in 0..3 {
            ensure!(talk.ask()? == 0);
        }
    }
    // Flows made anew from here on may meet either.
    world.publish(&[0, 1])?;
    let began = Instant::now();
    while began.elapsed() < patient(LOOKS) {
        for (number, talk) in busy.iter_mut().enumerate() {
            ensure!(
                talk.ask().with_context(|| format!("flow {number}"))? == 0,
                "flow {number} was made anew"
            );
        }
    }
    wait_for("idle flows to be forgotten", Duration::from_secs(15), || {
        busy.iter_mut().try_for_each(|talk| talk.ask().map(|_| ()))?;
        for state in ["tcp", "udp"] {
            let flows = agent.metric("xdp_agent_flows", &format!("state=\"{state}\""))?;
            ensure!(flows as usize == FLOWS, "{flows} of {state}, {FLOWS} of which are busy");
        }
        Ok(())
    })?;
    ensure!(agent.metric("xdp_agent_gc_removed_total", "")? as usize >= 2 * 2 * FLOWS);
    agent.stop()
}
