//! The agent comes and goes beside another proxy, under load: whoever calls does not notice.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use xdp_agent_tests::lab::agent::{Agent, AgentOptions, PIN_DIR};
use xdp_agent_tests::lab::caller::{Answer, Caller};
use xdp_agent_tests::lab::manifests::Service;
use xdp_agent_tests::lab::servers::{HTTP_PORT, UDP_PORT};
use xdp_agent_tests::lab::world::{
    CLUSTER_IP, SERVICE_HTTP, SERVICE_UDP, World, WorldOptions, http_frontends, udp_frontends,
};
use xdp_agent_tests::lab::{patient, wait_for};
use xdp_common::tables::LAYOUT_VERSION;

use crate::{
    callers::{Place, more_answers},
    setup::nft,
};

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
    nft(&place.world.node, &format!("table ip other {{\n{}{}}}\n", chain("prerouting"), chain("output")))?;
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
    more(&mut callers, &met).context("with an agent")?;
    agent.stop()?;
    more(&mut callers, &met).context("when it has stopped")?;
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    more(&mut callers, &met).context("with another")?;
    agent.kill()?;
    more(&mut callers, &met).context("when that was killed")?;
    let mut cleanup = options.clone();
    cleanup.extra.push("--cleanup".into());
    let ended = Agent::refuse(&world.node, &world.bpffs, &cleanup)?;
    ensure!(ended.status.success(), "{}", ended.log);
    let left = world.bpffs.list(PIN_DIR)?;
    ensure!(left.is_empty(), "{left:?}");
    more(&mut callers, &met).context("after its cleanup")?;
    options.extra.push("--fresh".into());
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    more(&mut callers, &met).context("with a third")?;
    for (caller, met) in callers.iter_mut().zip(&met) {
        caller.tally()?.is_whole()?;
        let (now, (met, _)) = (caller.ask_held("long")??, met);
        ensure!((&now.backend, now.client) == (&met.backend, met.client), "{met:?}, then {now:?}");
    }
    agent.stop()?;
    drop((pod, node, _cgroups, cgroup));
    Ok(())
}

#[test]
fn a_question_asked_before_the_hooks_go_is_answered_by_the_name_it_was_asked_by() -> Result<()> {
    an_answer_while(|agent, _, _| agent.stop())?;
    an_answer_while(|agent, world, options| {
        agent.kill()?;
        let mut cleanup = options.clone();
        cleanup.extra.push("--cleanup".into());
        let ended = Agent::refuse(&world.node, &world.bpffs, &cleanup)?;
        ensure!(ended.status.success(), "{}", ended.log);
        Ok(())
    })
}

/// Has a pod ask, and its backend answer once questions are no longer translated.
fn an_answer_while(end: impl FnOnce(Agent, &World, &AgentOptions) -> Result<()>) -> Result<()> {
    const PORT: u16 = 7_000;
    let world = World::build(WorldOptions::default())?;
    let service = Service::new("slow", Ipv4Addr::new(10, 96, 0, 11)).port("slow", "UDP", PORT, PORT, 0);
    let name = SocketAddr::from((service.cluster_ip, PORT));
    let slow = world.pod("local-2")?;
    let socket = slow.namespace.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)))?;
    socket.set_read_timeout(Some(patient(ANSWERS_TIMEOUT)))?;
    let objects = [service.yaml(), service.slice_yaml(&[slow.endpoint()])];
    let Place { agent, mut pod, node, options, cgroup, world, _cgroups } =
        Place::serve(world, &objects, &[])?;
    pod.open("asks", false)?;
    let bpffs = &world.bpffs;
    thread::scope(|scope| {
        let asked = scope.spawn(|| pod.ask_at("asks", name));
        let (_, client) = socket.recv_from(&mut [0; 64])?;
        let answers = scope.spawn(move || -> Result<()> {
            wait_for("questions to be left alone", ANSWERS_TIMEOUT, || {
                let links = bpffs.list(&format!("{PIN_DIR}/v{LAYOUT_VERSION}/links"))?;
                ensure!(!links.iter().any(|link| link.contains("sendmsg")), "{links:?}");
                Ok(())
            })?;
            socket.send_to(format!("slow {client}").as_bytes(), client)?;
            Ok(())
        });
        end(agent, &world, &options)?;
        answers.join().map_err(|_| anyhow!("whoever answers has panicked"))??;
        let answer = asked.join().map_err(|_| anyhow!("whoever asks has panicked"))???;
        ensure!(answer.from == name, "{answer:?}");
        Ok(())
    })?;
    drop((pod, node, _cgroups, cgroup));
    Ok(())
}

/// Waits for as many answers again, of each; a connected UDP socket stays with its backend meanwhile.
fn more(callers: &mut [&mut Caller; 2], met: &[(Answer, String)]) -> Result<()> {
    for (caller, (_, backend)) in callers.iter_mut().zip(met) {
        let answer = caller.ask("talk")??;
        ensure!(answer.backend == *backend, "a connected socket met {backend}, then {answer:?}");
        more_answers(caller, ANSWERS, ANSWERS_TIMEOUT)?;
        caller.tally()?.is_whole()?;
    }
    Ok(())
}
