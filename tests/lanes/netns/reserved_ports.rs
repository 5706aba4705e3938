//! The agent's ports are kept from the kernel's choice, and given back.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::time::Duration;

use anyhow::{Result, ensure};
use xdp_agent_tests::lab::agent::{Agent, Mode};
use xdp_agent_tests::lab::manifests::Service;
use xdp_agent_tests::lab::netns::Namespace;
use xdp_agent_tests::lab::wait_for;
use xdp_agent_tests::lab::world::{World, WorldOptions};

const SETTING: &str = "net/ipv4/ip_local_reserved_ports";
/// Somebody else's: some of them among the agent's, some not.
const OTHERS: &str = "8080,32000-33000";
const FOLLOW_TIMEOUT: Duration = Duration::from_secs(20);

#[test]
fn ports_of_translated_flows_and_node_ports_are_reserved_and_given_back() -> Result<()> {
    let world = World::build(WorldOptions::default())?;
    world.node.sysctl(SETTING, OTHERS)?;
    let agent = world.start_agent(Mode::Generic)?;
    let range = agent.status()?["snat"]["range"].as_str().unwrap_or_default().to_owned();
    ensure!(range == "1024-29999", "the test is made for the usual range, not {range}");
    ensure!(reserved(&world.node)? == "1024-33000", "{}", reserved(&world.node)?);
    ensure!(agent.status()?["reserved_ports"] == "1024-32767");
    // Even where the kernel may choose from everything, it chooses none of them.
    world.node.sysctl("net/ipv4/ip_local_port_range", "29990 33010")?;
    let chosen = world.node.run(|| -> std::io::Result<u16> {
        let listener = TcpListener::bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0))?;
        Ok(listener.local_addr()?.port())
    })?;
    ensure!(chosen > 33_000, "the kernel has given {chosen} to a process");
    world.node.sysctl("net/ipv4/ip_local_port_range", "32768 60999")?;
    // What ends without a word leaves them, the next agent knows them for its own.
    agent.kill()?;
    ensure!(reserved(&world.node)? == "1024-33000");
    let agent = Agent::start(&world.node, &world.bpffs, &world.agent_options(Mode::Generic))?;
    ensure!(reserved(&world.node)? == "1024-33000");
    agent.stop()?;
    ensure!(reserved(&world.node)? == OTHERS, "{}", reserved(&world.node)?);
    Ok(())
}

/// As with `--service-node-port-range` of kube-apiserver.
#[test]
fn node_ports_outside_the_usual_range_are_reserved_while_there_are_any() -> Result<()> {
    let world = World::build(WorldOptions::default())?;
    world.node.sysctl(SETTING, OTHERS)?;
    let agent = world.start_agent(Mode::Generic)?;
    let holds = |expected: &str, status: &str| {
        wait_for("the setting to follow", FOLLOW_TIMEOUT, || {
            ensure!(reserved(&world.node)? == expected, "{}", reserved(&world.node)?);
            let shown = agent.status()?["reserved_ports"].clone();
            ensure!(shown == status, "{shown}");
            Ok(())
        })
    };
    holds("1024-33000", "1024-32767")?;
    let elsewhere = Service::new("far-port", Ipv4Addr::new(10, 96, 0, 77));
    let elsewhere = elsewhere.port("http", "TCP", 80, 8080, 40_123).port("web", "TCP", 81, 8081, 32_900);
    world.manifests.write("far.yaml", &[elsewhere.yaml()])?;
    holds("1024-33000,40123", "1024-32767,32900,40123")?;
    // The next agent knows of them by the maps before it has read anything.
    agent.kill()?;
    let agent = Agent::start(&world.node, &world.bpffs, &world.agent_options(Mode::Generic))?;
    wait_for("the next agent to keep them", FOLLOW_TIMEOUT, || {
        ensure!(reserved(&world.node)? == "1024-33000,40123", "{}", reserved(&world.node)?);
        ensure!(agent.status()?["reserved_ports"] == "1024-32767,32900,40123");
        Ok(())
    })?;
    world.manifests.remove("far.yaml")?;
    wait_for("the port to be given back", FOLLOW_TIMEOUT, || {
        ensure!(reserved(&world.node)? == "1024-33000", "{}", reserved(&world.node)?);
        Ok(())
    })?;
    agent.stop()?;
    ensure!(reserved(&world.node)? == OTHERS, "{}", reserved(&world.node)?);
    Ok(())
}

#[test]
fn cleanup_gives_reserved_ports_back_and_a_flag_leaves_the_setting_alone() -> Result<()> {
    let world = World::build(WorldOptions::default())?;
    let agent = world.start_agent(Mode::Generic)?;
    agent.kill()?;
    ensure!(reserved(&world.node)? == "1024-32767");
    let mut options = world.agent_options(Mode::Generic);
    options.extra.push("--cleanup".into());
    let ended = Agent::refuse(&world.node, &world.bpffs, &options)?;
    ensure!(ended.status.success(), "{}", ended.log);
    ensure!(reserved(&world.node)?.is_empty(), "{}", reserved(&world.node)?);
    let mut options = world.agent_options(Mode::Generic);
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    agent.kill()?;
    options.extra.push("--reserve-ports=false".into());
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    ensure!(reserved(&world.node)?.is_empty() && agent.status()?["reserved_ports"] == "");
    agent.stop()
}

fn reserved(node: &Namespace) -> Result<String> {
    let text = node.run(|| fs::read_to_string(format!("/proc/sys/{SETTING}")))?;
    Ok(text.trim().to_owned())
}
