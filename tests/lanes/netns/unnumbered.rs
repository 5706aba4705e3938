//! Uplinks without addresses of their own: the node's are those of its loopback, and routes lead by link-local neighbours, as
//! where nodes speak BGP with their switch (RFC 5549, RFC 7404).

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rtnetlink::RouteMessageBuilder;
use xdp_agent_tests::lab::{
    agent::{Agent, AgentOptions},
    block_on,
    link::veth,
    manifests::Manifests,
    netns::{Namespace, PrivateBpffs},
    pass::PassProgram,
    wait_for,
};

use crate::{
    dual::{self, Both, VIP},
    seen,
    setup::Setup,
};

const CLIENT: Both = (Ipv4Addr::new(198, 51, 100, 2), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2));
const NODE: Both = (Ipv4Addr::new(192, 0, 2, 1), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
const BACKEND: Both = (Ipv4Addr::new(10, 244, 1, 2), Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2));
/// Of the node's end of each link, and of the other.
const NEAR: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const FAR: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

each_mode!(an_uplink_without_addresses_serves_with_those_of_the_loopback, false);
fn an_uplink_without_addresses_serves_with_those_of_the_loopback(setup: Setup) -> Result<()> {
    let [client, node, backend] = ["bgp-client", "bgp-node", "bgp-backend"].map(Namespace::new);
    let (client, node, backend) = (client?, node?, backend?);
    attach(&client, CLIENT, &node, "out0")?;
    attach(&backend, BACKEND, &node, "in0")?;
    dual::forward(&node)?;
    node.enable_v6("lo")?;
    node.address("lo", NODE.0, 32)?;
    // Without them, what a native program sends to a veth is lost.
    let _peers = [PassProgram::attach(&client, "eth0")?, PassProgram::attach(&backend, "eth0")?];
    seen::serve(&backend)?;
    let (manifests, bpffs) = (Manifests::new()?, PrivateBpffs::new()?);
    let [v4, v6] = dual::slices(&[(BACKEND, "other")]);
    manifests.write("web.yaml", &[dual::service(VIP, &[]), v4, v6])?;
    let mut options = AgentOptions::new(manifests.directory(), setup.mode);
    options.interfaces = vec!["out0".into(), "in0".into()];
    let agent = Agent::start(&node, &bpffs, &options)?;
    ask_all(&client, [VIP.0.into(), NODE.0.into()])?;
    let said = unaddressed(&agent)?;
    ensure!(said.iter().any(|message| message.contains("has an address of IPv6")), "{said:?}");
    node.address("lo", NODE.1, 128)?;
    wait_for("the address to be taken", ANSWER_TIMEOUT, || {
        let said = unaddressed(&agent)?;
        ensure!(said.is_empty(), "{said:?}");
        Ok(())
    })?;
    ask_all(&client, [VIP.1.into(), NODE.1.into()])?;
    let metrics = agent.metrics()?;
    let drops: Vec<_> =
        metrics.iter().filter(|(key, value)| key.contains("drops") && **value > 0.0).collect();
    ensure!(drops.is_empty(), "{drops:?}");
    let sent = agent.metric("xdp_agent_events_total", r#"event="redirected""#)?;
    ensure!(sent > 20.0, "{sent} frames were sent on at XDP");
    agent.stop()
}

/// Links a host to the node; both know the way by link-local addresses only.
fn attach(host: &Namespace, address: Both, node: &Namespace, device: &str) -> Result<()> {
    veth(host, "eth0", node, device)?;
    for (namespace, device, own) in [(host, "eth0", FAR), (node, device, NEAR)] {
        namespace.enable_v6(device)?;
        namespace.address(device, own, 64)?;
        namespace.tx_offload(device, false)?;
    }
    host.address("eth0", address.0, 32)?;
    host.address("eth0", address.1, 128)?;
    let any = (Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED);
    route(host, any, 0, "eth0", NEAR)?;
    route(node, address, u8::MAX, device, FAR)
}

/// Routes to a network, or one host, of each family by a link-local neighbour.
fn route(namespace: &Namespace, to: Both, prefix: u8, device: &str, by: Ipv6Addr) -> Result<()> {
    let index = namespace.index(device)?;
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to.0, prefix.min(32));
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(to.1, prefix.min(128));
    for route in [v4.via(by).output_interface(index).build(), v6.gateway(by).output_interface(index).build()]
    {
        block_on(namespace.netlink().route().add(route).execute())
            .with_context(|| format!("route to {to:?} via {by} in {namespace:?}"))?;
    }
    Ok(())
}

/// Asks each address, several times; the backend sees the node's address of the family.
fn ask_all(client: &Namespace, addresses: [IpAddr; 2]) -> Result<()> {
    for to in addresses {
        for _ in 0..5 {
            seen::seen_as(client, to, NODE, ANSWER_TIMEOUT)?;
        }
    }
    Ok(())
}

/// Problems of families without an address.
fn unaddressed(agent: &Agent) -> Result<Vec<String>> {
    let status = agent.status()?;
    let problems = status["problems"].as_array().context("no problems in /status")?;
    let of_kind = problems.iter().filter(|problem| problem["kind"] == "no_address");
    Ok(of_kind.map(|problem| problem["message"].to_string()).collect())
}
