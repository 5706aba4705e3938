//! Pods of other nodes behind an overlay of the CNI, which nobody has named to the agent and which is made when it runs already.
//!
//! The far end of the overlay knows no way to the client: only answers to the node's own address come back.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::{
    agent::{Agent, AgentOptions},
    link::veth,
    manifests::Manifests,
    netns::{Namespace, PrivateBpffs},
    pass::PassProgram,
    wait_for,
};

use crate::{
    dual::{self, Both, PORT, TARGET, VIP},
    setup::{Setup, nft},
};

const CLIENT: Both = (Ipv4Addr::new(198, 51, 100, 2), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2));
const NODE: Both = (Ipv4Addr::new(198, 51, 100, 1), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1));
/// What the overlay is made of, at the node and at the other one.
const BELOW: [Ipv4Addr; 2] = [Ipv4Addr::new(172, 16, 70, 1), Ipv4Addr::new(172, 16, 70, 2)];
const NODE_OVERLAY: Both = (Ipv4Addr::new(10, 244, 2, 1), Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1));
const BACKEND: Both = (Ipv4Addr::new(10, 244, 2, 2), Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2));
/// A Service with a port where nobody listens on its backend.
const SHUT: Both = (Ipv4Addr::new(10, 96, 0, 11), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x11));
const BODY: usize = 1 << 18;
const PATIENCE: Duration = Duration::from_secs(10);

struct World {
    client: Namespace,
    node: Namespace,
    other: Namespace,
    tx_offload: bool,
    _peer: PassProgram,
}

/// What others write: pods are masqueraded toward the world only, and what is no part of a connection is dropped.
const USUAL: &str = "table inet usual {
  chain postrouting {
    type nat hook postrouting priority srcnat;
    ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade fully-random
    ip6 saddr 2001:db8:2::/48 ip6 daddr != 2001:db8:2::/48 masquerade fully-random
  }
  chain forward {
    type filter hook forward priority filter;
    ct state invalid drop
  }
}
";

each_mode_and_offload!(an_overlay_is_served_as_it_comes_and_goes);
fn an_overlay_is_served_as_it_comes_and_goes(setup: Setup) -> Result<()> {
    let world = World::build(setup)?;
    nft(&world.node, USUAL)?;
    let (manifests, bpffs) = (world.manifests()?, PrivateBpffs::new()?);
    let mut options = AgentOptions::new(manifests.directory(), setup.mode);
    options.interfaces = vec!["out0".into()];
    let agent = Agent::start(&world.node, &bpffs, &options)?;
    ensure!(mode_of_overlay(&agent)?.is_none(), "there is none yet");
    world.lay("vx0")?;
    served(&agent)?;
    world.ask_all()?;
    world.ask_where_nobody_listens()?;
    world.node.delete("vx0")?;
    world.other.delete("vx0")?;
    wait_for("the overlay to be gone", PATIENCE, || {
        ensure!(mode_of_overlay(&agent)?.is_none());
        let modes = agent.metrics()?.into_keys().filter(|name| name.contains("attach_mode"));
        ensure!(modes.into_iter().all(|name| !name.contains("vx0")), "a metric speaks of it still");
        Ok(())
    })?;
    world.lay("vx0")?;
    served(&agent)?;
    world.ask_all()?;
    let unmanaged = agent.metric("xdp_agent_events_total", r#"event="unmanaged_egress""#)?;
    ensure!(unmanaged == 0.0, "{unmanaged} flows left by an interface that is not managed");
    let mut held = dual::connect(&world.client, VIP.0.into(), PATIENCE)?;
    held.write_all(b"first, ")?;
    agent.kill()?;
    world.ask_all()?;
    let agent = Agent::start(&world.node, &bpffs, &options)?;
    world.ask_all()?;
    held.write_all(b"then")?;
    held.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    held.read_to_string(&mut answer)?;
    ensure!(answer == "first, then", "{answer:?} has come of a connection over a restart");
    ensure!(mode_of_overlay(&agent)?.as_deref() == Some("tc"));
    ensure!(agent.metric("xdp_agent_attach_mode", r#"interface="vx0",mode="tc""#)? == 1.0);
    agent.stop()
}

/// What flannel writes on each node (`masqRules` in its pkg/trafficmngr), for two networks of pods of which a part is here.
const FLANNEL: &str = "table inet flannel {
  chain postrouting {
    type nat hook postrouting priority srcnat;
    ip saddr 10.244.1.0/24 ip daddr 10.244.0.0/16 return
    ip saddr 10.244.0.0/16 ip daddr 10.244.1.0/24 return
    ip saddr != 10.244.0.0/16 ip daddr 10.244.1.0/24 return
    ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
    ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random
    ip6 saddr 2001:db8:2::/48 ip6 daddr != ff00::/8 masquerade fully-random
    ip6 saddr != 2001:db8:2::/48 ip6 daddr 2001:db8:2::/48 masquerade fully-random
  }
}
";

each_mode_and_offload!(an_overlay_of_flannel_is_left_to_its_own_masquerade);
fn an_overlay_of_flannel_is_left_to_its_own_masquerade(setup: Setup) -> Result<()> {
    let world = World::build(setup)?;
    nft(&world.node, FLANNEL)?;
    let (manifests, bpffs) = (world.manifests()?, PrivateBpffs::new()?);
    let mut options = AgentOptions::new(manifests.directory(), setup.mode);
    options.interfaces = vec!["out0".into()];
    world.lay("flannel.1")?;
    let agent = Agent::start(&world.node, &bpffs, &options)?;
    world.ask_all()?;
    ensure!(agent.status()?["interfaces"].as_array().is_some_and(|all| all.len() == 1));
    agent.stop()
}

#[test]
fn overlays_are_left_alone_when_that_is_wanted() -> Result<()> {
    let node = Namespace::new("lay-alone")?;
    let far = Namespace::new("lay-far")?;
    dual::link(&far, "eth0", CLIENT, &node, "out0", NODE, true)?;
    node.vxlan("vx0", "out0", CLIENT.0)?;
    node.address("vx0", NODE_OVERLAY.0, 24)?;
    let (manifests, bpffs) = (Manifests::new()?, PrivateBpffs::new()?);
    let mut options = AgentOptions::new(manifests.directory(), xdp_agent_tests::lab::agent::Mode::Auto);
    options.interfaces = vec!["out0".into()];
    let agent = Agent::start(&node, &bpffs, &options)?;
    ensure!(mode_of_overlay(&agent)?.as_deref() == Some("tc"), "found at the start");
    agent.stop()?;
    options.extra = vec!["--overlays=false".into()];
    let agent = Agent::start(&node, &bpffs, &options)?;
    ensure!(mode_of_overlay(&agent)?.is_none());
    agent.stop()?;
    // One that is named is an interface like any other.
    options.extra.clear();
    options.interfaces.push("vx0".into());
    let agent = Agent::start(&node, &bpffs, &options)?;
    ensure!(mode_of_overlay(&agent)?.as_deref() == Some("generic"));
    agent.stop()
}

/// How the agent runs on the overlay's device, if it does.
fn mode_of_overlay(agent: &Agent) -> Result<Option<String>> {
    let status = agent.status()?;
    let interfaces = status["interfaces"].as_array().context("no interfaces in /status")?;
    let found = interfaces.iter().find(|interface| interface["name"] == "vx0");
    Ok(found.and_then(|interface| interface["mode"].as_str()).map(str::to_owned))
}

/// Waits until the agent has seen the overlay.
fn served(agent: &Agent) -> Result<()> {
    wait_for("the overlay to be served", PATIENCE, || {
        let status = agent.status()?;
        let interfaces = status["interfaces"].as_array().context("no interfaces in /status")?;
        let found = interfaces.iter().find(|interface| interface["name"] == "vx0").context("not yet")?;
        let addresses = found["addresses"].as_array().context("no addresses")?;
        ensure!(found["mode"] == "tc" && addresses.len() == 2, "{found}");
        Ok(())
    })
}

impl World {
    fn build(setup: Setup) -> Result<Self> {
        let [client, node, other] = ["lay-client", "lay-node", "lay-other"].map(Namespace::new);
        let (client, node, other) = (client?, node?, other?);
        dual::link(&client, "eth0", CLIENT, &node, "out0", NODE, setup.tx_offload)?;
        veth(&other, "eth0", &node, "in0")?;
        node.address("in0", BELOW[0], 24)?;
        other.address("eth0", BELOW[1], 24)?;
        dual::forward(&node)?;
        dual::serve(&other, dual::give_back, |peer, _| peer.ip().to_canonical().to_string().into_bytes())?;
        // Without it, what a native program sends to a veth is lost.
        let peer = PassProgram::attach(&client, "eth0")?;
        Ok(Self { client, node, other, tx_offload: setup.tx_offload, _peer: peer })
    }

    fn manifests(&self) -> Result<Manifests> {
        let manifests = Manifests::new()?;
        let [v4, v6] = dual::slices(&[(BACKEND, "other")]);
        let shut = [dual::service(SHUT, &[]), v4.clone(), v6.clone()].map(|document| {
            let document = document.replace("web", "shut").replace("type: NodePort", "type: ClusterIP");
            document.replace(&format!(", nodePort: {PORT}"), "").replace(&TARGET.to_string(), "9")
        });
        manifests.write("shut.yaml", &shut)?;
        manifests.write("web.yaml", &[dual::service(VIP, &[]), v4, v6])?;
        Ok(manifests)
    }

    /// Makes an overlay.
    fn lay(&self, name: &str) -> Result<()> {
        let ends = [(&self.node, "in0", NODE_OVERLAY), (&self.other, "eth0", BACKEND)];
        // Of a packet that has come over a wire the checksum is complete.
        self.other.tx_offload("eth0", self.tx_offload)?;
        for (number, (namespace, below, (v4, v6))) in ends.into_iter().enumerate() {
            namespace.vxlan(name, below, BELOW[1 - number])?;
            namespace.mtu(name, 1_450)?;
            namespace.enable_v6(name)?;
            namespace.tx_offload(name, self.tx_offload)?;
            namespace.address(name, v4, 24)?;
            namespace.address(name, v6, 64)?;
        }
        Ok(())
    }

    fn ask_all(&self) -> Result<()> {
        for to in dual::each(VIP).into_iter().chain(dual::each(NODE)) {
            self.ask(to).with_context(|| to.to_string())?;
        }
        Ok(())
    }

    /// The backend says so, by the overlay.
    fn ask_where_nobody_listens(&self) -> Result<()> {
        for to in dual::each(SHUT) {
            let socket = dual::socket(&self.client, to, PATIENCE)?;
            socket.send(b"?")?;
            let answer = socket.recv(&mut [0]);
            ensure!(
                answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused),
                "{to}: {answer:?}"
            );
        }
        Ok(())
    }

    fn ask(&self, to: IpAddr) -> Result<()> {
        dual::get_back(&self.client, to, BODY, PATIENCE)?;
        let socket = dual::socket(&self.client, to, PATIENCE)?;
        socket.send(b"?")?;
        let mut answer = [0; 64];
        let len = socket.recv(&mut answer).context("a datagram")?;
        let seen: IpAddr = if to.is_ipv4() { NODE_OVERLAY.0.into() } else { NODE_OVERLAY.1.into() };
        ensure!(answer[..len] == *seen.to_string().as_bytes(), "the backend has seen another address");
        Ok(())
    }
}
