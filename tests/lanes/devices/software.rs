//! Devices that the kernel makes of others, and what keeps a device from running natively.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use nix::unistd::{SysconfVar, sysconf};
use rtnetlink::packet_route::link::LinkAttribute;
use xdp_agent::preflight::KernelVersion;
use xdp_agent_tests::lab::agent::Mode;
use xdp_agent_tests::lab::link::{veth, veth_with};
use xdp_agent_tests::lab::pass::PassProgram;
use xdp_agent_tests::lab::tap::{TapCable, tun};

use crate::cable::Cable;

const GENERIC: &str = "native: not supported by the driver";

/// A node connected to the client by a veth, which has no addresses yet.
fn veth_pair() -> Result<Cable> {
    let cable = Cable::unplugged()?;
    veth(&cable.node, "eth0", &cable.client, "eth0")?;
    Ok(cable)
}

#[test]
fn a_bridge_falls_back_and_serves() -> Result<()> {
    let mut cable = veth_pair()?;
    cable.node.bridge("br0")?;
    cable.node.enslave("eth0", "br0")?;
    cable.plug("br0", "eth0")?;
    cable.runs("br0", "generic", GENERIC)
}

/// veth has native XDP, and so the kernel would take a native program for the bond.
/// The driver of TAP devices runs programs natively, on frames that a process has written: a hypervisor, or here a cable.
#[test]
fn a_tap_runs_natively() -> Result<()> {
    let mut cable = Cable::unplugged()?;
    let _plugged = TapCable::new(&cable.node, "tap0", &cable.client, "tap0")?;
    cable.plug("tap0", "tap0")?;
    cable.runs("tap0", "native", "the driver takes it")
}

/// The driver would take the program, which would take what it gets for something else.
#[test]
fn a_device_without_an_ethernet_header_is_refused() -> Result<()> {
    let mut cable = veth_pair()?;
    let _tun = tun(&cable.node, "tun0")?;
    cable.plug("tun0", "eth0")?;
    for mode in [Mode::Auto, Mode::Generic] {
        let said = cable.refusal("tun0", mode)?;
        ensure!(said.contains("tun0 has no Ethernet header"), "{said}");
    }
    let report = cable.doctor("tun0")?;
    ensure!(report["works"] == false, "{report}");
    Ok(())
}

#[test]
fn a_bond_falls_back_and_serves() -> Result<()> {
    let mut cable = veth_pair()?;
    cable.node.bond("bond0", "eth0")?;
    cable.plug("bond0", "eth0")?;
    cable.runs("bond0", "generic", "native: not supported by the driver [a bond runs programs on the devices")
}

#[test]
fn a_vlan_device_falls_back_and_serves() -> Result<()> {
    let mut cable = veth_pair()?;
    cable.node.vlan("eth0.70", "eth0", 70)?;
    cable.client.vlan("eth0.70", "eth0", 70)?;
    cable.plug("eth0.70", "eth0.70")?;
    cable.runs("eth0.70", "generic", GENERIC)
}

#[test]
fn a_vxlan_device_falls_back_and_serves() -> Result<()> {
    let mut cable = veth_pair()?;
    let [near, far] = [1, 2].map(|last| Ipv4Addr::new(172, 16, 70, last));
    cable.node.address("eth0", near, 24)?;
    cable.client.address("eth0", far, 24)?;
    cable.node.vxlan("vx0", "eth0", far)?;
    cable.client.vxlan("vx0", "eth0", near)?;
    cable.plug("vx0", "vx0")?;
    // Both ends know what the tunnel takes away, and so does the pod, as by a CNI: it would lose its first long datagram else.
    for (namespace, device) in [(&cable.node, "vx0"), (&cable.client, "vx0"), (&cable.pod, "eth0")] {
        namespace.mtu(device, 1_450)?;
    }
    cable.runs("vx0", "generic", GENERIC)
}

#[test]
fn a_veth_of_long_frames_runs_with_several_buffers_where_the_kernel_can() -> Result<()> {
    let mut cable = veth_pair()?;
    // A buffer is a page, of which some kernels of arm64 have larger ones.
    let page = sysconf(SysconfVar::PAGE_SIZE)?.context("pages have a size")?;
    let mtu = 2 * u32::try_from(page)?;
    cable.client.mtu("eth0", mtu)?;
    cable.node.mtu("eth0", mtu)?;
    cable.plug("eth0", "eth0")?;
    // veth learned frames in several buffers in 5.18 (kernel commit 718a18a0c8a6).
    let mode = if KernelVersion::current()? >= KernelVersion(5, 18) { "native-frags" } else { "generic" };
    cable.runs("eth0", mode, &format!("native: MTU over the driver's limit ({mtu})"))
}

#[test]
fn a_veth_with_fewer_queues_than_its_peer_falls_back_and_serves() -> Result<()> {
    let mut cable = Cable::unplugged()?;
    // Queues to receive from remain as they are by default: one.
    veth_with(&cable.node, "eth0", &cable.client, "eth0", &[LinkAttribute::NumTxQueues(2)])?;
    cable.plug("eth0", "eth0")?;
    cable.runs("eth0", "generic", "native: too few queues [veth: XDP expects number of rx queues")
}

#[test]
fn a_program_of_somebody_else_is_never_replaced() -> Result<()> {
    let mut cable = veth_pair()?;
    cable.plug("eth0", "eth0")?;
    let theirs = PassProgram::attach(&cable.node, "eth0")?;
    let said = cable.refusal("eth0", Mode::Auto)?;
    ensure!(said.contains("already carries XDP program"), "{said}");
    let report = cable.doctor("eth0")?;
    ensure!(report["works"] == false, "{report}");
    drop(theirs);
    cable.runs("eth0", "native", "the driver takes it")
}

#[test]
fn a_mode_that_a_device_refuses_is_not_replaced_by_another_when_it_is_asked_for() -> Result<()> {
    let mut cable = veth_pair()?;
    cable.node.bridge("br0")?;
    cable.node.enslave("eth0", "br0")?;
    cable.plug("br0", "eth0")?;
    let said = cable.refusal("br0", Mode::Native)?;
    ensure!(said.contains("no XDP mode works: native: not supported by the driver"), "{said}");
    let said = cable.refusal("br0", Mode::Offload)?;
    ensure!(
        said.contains("no XDP mode works: offload: not supported by the driver [Underlying driver"),
        "{said}"
    );
    let agent = cable.start("br0", Mode::Generic)?;
    cable.serves()?;
    agent.stop()
}
