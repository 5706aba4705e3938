//! An uplink in several networks: what is translated there has the address that its way asks for, as masqueraded packets do.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Result, ensure};
use xdp_agent_tests::lab::{
    agent::{Agent, AgentOptions},
    link::veth,
    manifests::Manifests,
    netns::{Namespace, PrivateBpffs},
    pass::PassProgram,
    wait_for,
};

use crate::{
    dual::{self, Both, VIP, each},
    seen,
    setup::Setup,
};

const CLIENT: Both = (Ipv4Addr::new(198, 51, 100, 2), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2));
const GATEWAY: Both = (Ipv4Addr::new(198, 51, 100, 1), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1));
/// The node's addresses, in their order: the first is public, and nobody behind the uplink knows a way there.
const PUBLIC: Both = (Ipv4Addr::new(192, 0, 2, 1), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
const PRIVATE: Both = (Ipv4Addr::new(10, 20, 0, 1), Ipv6Addr::new(0xfd00, 0x20, 0, 0, 0, 0, 0, 1));
const LATER: Both = (Ipv4Addr::new(10, 30, 0, 1), Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, 1));
/// The other node's, in the last two.
const OTHER: Both = (Ipv4Addr::new(10, 20, 0, 2), Ipv6Addr::new(0xfd00, 0x20, 0, 0, 0, 0, 0, 2));
const OTHER_LATER: Both = (Ipv4Addr::new(10, 30, 0, 2), Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, 2));
/// A pod there, and the other node's address toward it.
const POD: Both = (Ipv4Addr::new(10, 244, 1, 2), Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, 2));
const POD_GATEWAY: Both = (Ipv4Addr::new(10, 244, 1, 1), Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, 1));
const PATIENCE: Duration = Duration::from_secs(5);

each_mode!(an_uplink_in_several_networks_is_left_by_the_address_of_the_way, false);
fn an_uplink_in_several_networks_is_left_by_the_address_of_the_way(setup: Setup) -> Result<()> {
    let [client, node, other, pod] =
        ["nets-client", "nets-node", "nets-other", "nets-pod"].map(Namespace::new);
    let (client, node, other, pod) = (client?, node?, other?, pod?);
    dual::link(&client, "eth0", CLIENT, &node, "out0", GATEWAY, setup.tx_offload)?;
    veth(&other, "eth0", &node, "in0")?;
    join(&node, "in0", PUBLIC)?;
    join(&node, "in0", PRIVATE)?;
    join(&other, "eth0", OTHER)?;
    dual::link(&pod, "eth0", POD, &other, "pod0", POD_GATEWAY, setup.tx_offload)?;
    node.route_via(POD.0, 32, OTHER.0)?;
    node.route_via_v6(POD.1, 128, OTHER.1)?;
    for (namespace, device) in [(&node, "in0"), (&other, "eth0")] {
        namespace.tx_offload(device, setup.tx_offload)?;
    }
    for node in [&node, &other] {
        dual::forward(node)?;
    }
    // Without them, what a native program sends to a veth is lost.
    let _peers = [PassProgram::attach(&client, "eth0")?, PassProgram::attach(&other, "eth0")?];
    for host in [&other, &pod] {
        seen::serve(host)?;
    }
    let (manifests, bpffs) = (Manifests::new()?, PrivateBpffs::new()?);
    let publish = |endpoint| {
        let [v4, v6] = dual::slices(&[(endpoint, "other")]);
        manifests.write("web.yaml", &[dual::service(VIP, &[]), v4, v6])
    };
    publish(POD)?;
    let mut options = AgentOptions::new(manifests.directory(), setup.mode);
    options.interfaces = vec!["out0".into(), "in0".into()];
    let agent = Agent::start(&node, &bpffs, &options)?;
    let ask = |seen| each(VIP).into_iter().try_for_each(|to| seen::seen_as(&client, to, seen, PATIENCE));
    for _ in 0..5 {
        ask(PRIVATE)?;
    }
    let addresses = agent.status()?["snat"]["addresses"].to_string();
    for address in each(PRIVATE).into_iter().chain(each(PUBLIC)) {
        ensure!(addresses.contains(&format!("\"{address}\"")), "{addresses}");
    }
    join(&node, "in0", LATER)?;
    join(&other, "eth0", OTHER_LATER)?;
    publish(OTHER_LATER)?;
    wait_for("a network of later to be known", PATIENCE, || ask(LATER))?;
    agent.stop()
}

/// Gives a device addresses in a network of each family.
fn join(namespace: &Namespace, device: &str, (v4, v6): Both) -> Result<()> {
    namespace.enable_v6(device)?;
    namespace.up(device)?;
    namespace.address(device, v4, 24)?;
    namespace.address(device, v6, 64)
}
