//! Uplinks that the kernel makes of other devices, in both address families: whatever XDP cannot do there the kernel's way does.
//! Those that the kernel of a small machine may lack are in the lane `devices`.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::{
    agent::{Agent, AgentOptions, Mode},
    link::veth,
    manifests::Manifests,
    netns::{Namespace, PrivateBpffs},
};

use crate::dual::{self, Both, VIP};

const FAR: Both = (Ipv4Addr::new(198, 51, 100, 2), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2));
const NODE: Both = (Ipv4Addr::new(198, 51, 100, 1), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1));
const POD: Both = (Ipv4Addr::new(10, 244, 1, 2), Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2));
const GATEWAY: Both = (Ipv4Addr::new(10, 244, 1, 1), Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1));
/// What a tunnel is made of.
const BELOW: [Ipv4Addr; 2] = [Ipv4Addr::new(172, 16, 70, 1), Ipv4Addr::new(172, 16, 70, 2)];
/// More than the buffers of any queue, so that frames of full length go by in trains.
const BODY: usize = 1 << 18;
const DATAGRAM: usize = 1_200;
const PATIENCE: Duration = Duration::from_secs(10);

/// A node with a pod, and a machine at the other end of its cable that is client and another node's pod at once.
pub(crate) struct Machines {
    pub(crate) node: Namespace,
    pub(crate) far: Namespace,
    pod: Namespace,
}

impl Machines {
    pub(crate) fn new() -> Result<Self> {
        let [node, far, pod] = ["layer-node", "layer-far", "layer-pod"].map(Namespace::new);
        let machines = Self { node: node?, far: far?, pod: pod? };
        veth(&machines.node, "eth0", &machines.far, "eth0")?;
        dual::link(&machines.pod, "eth0", POD, &machines.node, "pod1", GATEWAY, true)?;
        dual::forward(&machines.node)?;
        Ok(machines)
    }

    /// Gives the uplink its addresses, and has Services reached through it.
    pub(crate) fn serve_by(&self, near: &str, far: &str) -> Result<()> {
        for (namespace, device, (v4, v6)) in [(&self.node, near, NODE), (&self.far, far, FAR)] {
            namespace.enable_v6(device)?;
            namespace.up(device)?;
            namespace.address(device, v4, 24)?;
            namespace.address(device, v6, 64)?;
        }
        self.far.route_via(Ipv4Addr::UNSPECIFIED, 0, NODE.0)?;
        self.far.default_route_v6(NODE.1)?;
        for host in [&self.pod, &self.far] {
            dual::serve(host, dual::give_back, |_, question| question.to_vec())?;
        }
        for (place, endpoint) in [("node", POD), ("other", FAR)] {
            self.reach(near, place, endpoint).with_context(|| format!("an endpoint of {place}"))?;
        }
        Ok(())
    }

    fn reach(&self, device: &str, place: &str, endpoint: Both) -> Result<()> {
        let (manifests, bpffs) = (Manifests::new()?, PrivateBpffs::new()?);
        let [v4, v6] = dual::slices(&[(endpoint, place)]);
        manifests.write("web.yaml", &[dual::service(VIP, &[]), v4, v6])?;
        let mut options = AgentOptions::new(manifests.directory(), Mode::Auto);
        options.interfaces = vec![device.into()];
        let agent = Agent::start(&self.node, &bpffs, &options)?;
        for to in dual::each(VIP).into_iter().chain(dual::each(NODE)) {
            for _ in 0..3 {
                self.ask(to).with_context(|| to.to_string())?;
            }
        }
        let drops: Vec<_> = agent.metrics()?.into_iter().filter(|(name, _)| name.contains("drops")).collect();
        ensure!(drops.iter().all(|(_, times)| *times == 0.0), "{drops:?}");
        // Six of TCP and six of UDP in each family.
        let flows = agent.metric("xdp_agent_events_total", r#"event="flow_new""#)?;
        ensure!(flows >= 24.0, "{flows} flows were ours");
        agent.stop()
    }

    fn ask(&self, to: IpAddr) -> Result<()> {
        dual::get_back(&self.far, to, BODY, PATIENCE)?;
        let (question, mut answer) = ([7; DATAGRAM], [0; 2 * DATAGRAM]);
        let socket = dual::socket(&self.far, to, PATIENCE)?;
        socket.send(&question)?;
        let len = socket.recv(&mut answer).context("a datagram")?;
        ensure!(answer[..len] == question, "a datagram came back as {len} bytes");
        Ok(())
    }
}

#[test]
fn services_answer_by_a_bridge() -> Result<()> {
    let machines = Machines::new()?;
    machines.node.bridge("br0")?;
    machines.node.enslave("eth0", "br0")?;
    machines.serve_by("br0", "eth0")
}

#[test]
fn services_answer_by_a_vxlan() -> Result<()> {
    let machines = Machines::new()?;
    let ends = [&machines.node, &machines.far];
    for (number, namespace) in ends.into_iter().enumerate() {
        namespace.address("eth0", BELOW[number], 24)?;
        namespace.vxlan("vx0", "eth0", BELOW[1 - number])?;
        namespace.mtu("vx0", 1_450)?;
    }
    machines.serve_by("vx0", "vx0")
}
