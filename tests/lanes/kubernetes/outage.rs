//! Traffic goes on while the API server is gone, slow, or back with something else to say.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Result, ensure};
use xdp_agent_tests::lab::agent::{Agent, AgentOptions, METRICS};
use xdp_agent_tests::lab::clients::{http_get, whoami_once};
use xdp_agent_tests::lab::load::{Kind, Load};
use xdp_agent_tests::lab::world::{WorldOptions, http_frontends, udp_frontends};
use xdp_agent_tests::lab::{block_on, wait_for};

use crate::objects::{web, web_slice};
use crate::setup::{APPLY_TIMEOUT, Site};

const ANSWERS_TIMEOUT: Duration = Duration::from_secs(30);
/// Where kubelets ask whether kube-proxy lives.
const HEALTHZ: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 10_256);
/// Answers in each phase, of each kind of traffic.
const ANSWERS: u64 = 300;

/// A world whose API server has the standard Service with every pod.
fn serving() -> Result<Site> {
    let site = Site::build(WorldOptions::default())?;
    site.server.put(web());
    site.server.put(web_slice(&site.world.pods));
    Ok(site)
}

fn start_loads(site: &Site) -> Vec<Load> {
    let client = &site.world.client;
    let [(_, http), (_, node_port), ..] = http_frontends();
    let [(_, udp), ..] = udp_frontends();
    vec![
        Load::start(client, http, Kind::KeptConnection, 16),
        Load::start(client, node_port, Kind::NewConnections, 4),
        Load::start(client, udp, Kind::Datagrams, 8),
    ]
}

fn wait_answered(loads: &[Load]) -> Result<()> {
    loads.iter().try_for_each(|load| load.wait_answered(ANSWERS, ANSWERS_TIMEOUT))
}

fn all_answered(loads: Vec<Load>) -> Result<()> {
    loads.into_iter().try_for_each(|load| load.stop().all_answered())
}

#[test]
fn traffic_flows_while_the_api_server_is_gone_and_the_agent_starts_again() -> Result<()> {
    let mut site = serving()?;
    let agent = site.start_agent()?;
    let loads = start_loads(&site);
    wait_answered(&loads)?;
    site.server.go()?;
    wait_answered(&loads)?;
    agent.kill()?;
    // With nobody to tell what is served, what was served is.
    let mut agent = site.spawn_agent()?;
    wait_for("the agent to miss the API server", APPLY_TIMEOUT, || {
        ensure!(agent.log().contains("cannot reach the API server"), "it says {}", agent.log());
        Ok(())
    })?;
    wait_answered(&loads)?;
    ensure!(
        agent.metric("watch_failures", "service")? > 0.0,
        "an agent without an API server runs, and says so"
    );
    site.server.back()?;
    agent.wait_ready()?;
    wait_answered(&loads)?;
    all_answered(loads)?;
    agent.stop()
}

#[test]
fn a_start_with_fresh_without_an_api_server_leaves_the_earlier_agents_programs_serving() -> Result<()> {
    let mut site = serving()?;
    let mut options = site.options()?;
    options.extra.push("--keep".into());
    let start =
        |site: &Site, options: &AgentOptions| Agent::spawn(&site.world.node, &site.world.bpffs, options);
    let mut agent = start(&site, &options)?;
    agent.wait_ready()?;
    let loads = start_loads(&site);
    wait_answered(&loads)?;
    agent.stop()?;
    site.server.go()?;
    options.extra.push("--fresh".into());
    // One is killed while it waits, the next is stopped.
    for is_killed in [true, false] {
        let agent = start(&site, &options)?;
        wait_for("the agent to miss the objects", APPLY_TIMEOUT, || {
            ensure!(agent.log().contains("the earlier agent's programs serve"), "it says {}", agent.log());
            Ok(())
        })?;
        wait_answered(&loads)?;
        // Who looks at it sees what it waits for, and no reason to kill it or to send traffic elsewhere.
        ensure!(agent.metric("watch_failures", "service")? > 0.0);
        let (status, body) = block_on(http_get(&site.world.node, METRICS, "/readyz"))?;
        ensure!(status == 503, "/readyz is {status}: {body}");
        for path in ["/livez", "/healthz"] {
            let (status, body) = block_on(http_get(&site.world.node, HEALTHZ, path))?;
            ensure!(status == 200, "{path} is {status}: {body}");
        }
        if is_killed { agent.kill() } else { agent.stop() }?;
        wait_answered(&loads)?;
    }
    options.extra.pop();
    let mut agent = start(&site, &options)?;
    wait_for("the agent to adopt", APPLY_TIMEOUT, || {
        ensure!(agent.log().contains("adopting the maps of an earlier agent"), "it says {}", agent.log());
        Ok(())
    })?;
    wait_answered(&loads)?;
    site.server.back()?;
    agent.wait_ready()?;
    wait_answered(&loads)?;
    all_answered(loads)?;
    agent.stop()
}

#[test]
fn a_restart_beside_a_slow_api_server_keeps_connections_and_learns_what_changed_meanwhile() -> Result<()> {
    let site = serving()?;
    let agent = site.start_agent()?;
    let loads = start_loads(&site);
    wait_answered(&loads)?;
    agent.kill()?;
    site.server.slow_down(Duration::from_secs(1));
    let mut agent = site.spawn_agent()?;
    wait_answered(&loads)?;
    agent.wait_ready()?;
    wait_answered(&loads)?;
    all_answered(loads)?;
    agent.kill()?;
    // A Service gains its last word while nobody listens.
    let kept = site.world.pod("remote-1")?;
    site.server.put(web_slice([kept]));
    let agent = site.start_agent()?;
    let [(_, http), ..] = http_frontends();
    for _ in 0..20 {
        let whoami = block_on(whoami_once(&site.world.client, http))?;
        ensure!(whoami.backend == "remote-1", "{whoami:?} is no endpoint any more");
    }
    agent.stop()
}

#[test]
fn endpoints_that_come_and_go_reach_traffic() -> Result<()> {
    let site = serving()?;
    let agent = site.start_agent()?;
    let [(_, http), ..] = http_frontends();
    for name in ["local-1", "remote-2", "local-2"] {
        site.server.put(web_slice([site.world.pod(name)?]));
        wait_for("the endpoint to be the only one", APPLY_TIMEOUT, || {
            let whoami = block_on(whoami_once(&site.world.client, http))?;
            ensure!(whoami.backend == name, "{whoami:?} answers");
            Ok(())
        })?;
    }
    agent.stop()
}
