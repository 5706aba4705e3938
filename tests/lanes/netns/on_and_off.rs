//! The agent comes and goes beside another proxy, under load: whoever calls does not notice.

use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::agent::{Agent, PIN_DIR};
use xdp_agent_tests::lab::caller::{Answer, Caller};
use xdp_agent_tests::lab::netns::Namespace;
use xdp_agent_tests::lab::servers::{HTTP_PORT, UDP_PORT};
use xdp_agent_tests::lab::wait_for;
use xdp_agent_tests::lab::world::{
    CLUSTER_IP, SERVICE_HTTP, SERVICE_UDP, WorldOptions, http_frontends, udp_frontends,
};

use crate::callers::Place;

const ANSWERS_TIMEOUT: Duration = Duration::from_secs(30);
/// Answers in each phase: enough that a gap of milliseconds would show.
const ANSWERS: u64 = 200;

#[test]
fn starting_stopping_killing_and_cleaning_up_under_load_fails_no_connection() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &[])?;
    let (target, udp_target) = (http_frontends()[0].1, udp_frontends()[0].1);
    // What kube-proxy would do, for whom no hook has translated.
    let pod = place.world.pods[1].server.address();
    let to = format!(
        "ip daddr {CLUSTER_IP} tcp dport {SERVICE_HTTP} dnat to {pod}:{HTTP_PORT}\n \
         ip daddr {CLUSTER_IP} udp dport {SERVICE_UDP} dnat to {pod}:{UDP_PORT}"
    );
    let chain = |hook: &str| format!("chain {hook} {{\n type nat hook {hook} priority -100;\n {to}\n }}\n");
    load(&place.world.node, &format!("table ip other {{\n{}{}}}\n", chain("prerouting"), chain("output")))?;
    let mut met = Vec::new();
    for caller in [&mut place.pod, &mut place.node] {
        caller.hold("long", target)?;
        caller.open("talk", false)?;
        caller.connect("talk", udp_target)?;
        met.push((caller.ask_held("long")??, caller.ask("talk")??.backend));
        caller.hammer(target)?;
        caller.hammer_udp(udp_target)?;
    }
    let Place { agent, mut pod, mut node, mut options, cgroup, world, _cgroups } = place;
    let mut callers = [&mut pod, &mut node];
    more(&mut callers, &met)?;
    agent.stop()?;
    more(&mut callers, &met)?;
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    more(&mut callers, &met)?;
    agent.kill()?;
    more(&mut callers, &met)?;
    let mut cleanup = options.clone();
    cleanup.extra.push("--cleanup".into());
    let ended = Agent::refuse(&world.node, &world.bpffs, &cleanup)?;
    ensure!(ended.status.success(), "{}", ended.log);
    let left = world.bpffs.list(PIN_DIR)?;
    ensure!(left.is_empty(), "{left:?}");
    more(&mut callers, &met)?;
    options.extra.push("--fresh".into());
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    more(&mut callers, &met)?;
    for (caller, met) in callers.iter_mut().zip(&met) {
        let tally = caller.tally()?;
        ensure!(tally.failed == 0, "{tally:?}");
        let (now, (met, _)) = (caller.ask_held("long")??, met);
        ensure!((&now.backend, now.client) == (&met.backend, met.client), "{met:?}, then {now:?}");
    }
    agent.stop()?;
    drop((pod, node, _cgroups, cgroup));
    Ok(())
}

fn load(node: &Namespace, rules: &str) -> Result<()> {
    let mut command = node.command("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped());
    let mut nft = command.spawn().context("cannot run nft; install nftables, the other proxy here")?;
    nft.stdin.take().context("nft has an input")?.write_all(rules.as_bytes())?;
    let status = nft.wait()?;
    ensure!(status.success(), "nft ended with {status} at {rules}");
    Ok(())
}

/// Waits for as many answers again, of each; a connected UDP socket stays with its backend meanwhile.
fn more(callers: &mut [&mut Caller; 2], met: &[(Answer, String)]) -> Result<()> {
    for (caller, (_, backend)) in callers.iter_mut().zip(met) {
        let answer = caller.ask("talk")??;
        ensure!(answer.backend == *backend, "a connected socket met {backend}, then {answer:?}");
        let before = caller.tally()?.answered;
        wait_for("further connections to be answered", ANSWERS_TIMEOUT, || {
            let tally = caller.tally()?;
            ensure!(tally.answered >= before + ANSWERS, "{tally:?}");
            Ok(())
        })?;
    }
    Ok(())
}
