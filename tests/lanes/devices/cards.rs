//! Network cards: those of the machine's description (`CARDS` in xtask), by the number of their cable.

use anyhow::{Result, ensure};
use xdp_agent::preflight::KernelVersion;
use xdp_agent_tests::lab::devices::driver_of;

use crate::cable::Cable;

const UNSUPPORTED: &str = "native: not supported by the driver";

/// A card by the number of its cable: its driver, and what the agent makes of it.
fn card(cable: u8, driver: &str, mode: &str, says: &str) -> Result<()> {
    card_of(cable, driver, 1_500, mode, says)
}

/// As [`card`], with an MTU at both ends; a card keeps the one of the case before.
fn card_of(cable: u8, driver: &str, mtu: u32, mode: &str, says: &str) -> Result<()> {
    let [near, far] = [1, 2].map(|end| format!("52:54:00:00:{cable:02x}:{end:02x}"));
    let found = driver_of(&near)?;
    ensure!(found == driver, "the card of cable {cable} is driven by {found}, not {driver}");
    let mut world = Cable::unplugged()?;
    let (near, far) = (world.node.take_card(&near)?, world.client.take_card(&far)?);
    world.node.mtu(&near, mtu)?;
    world.client.mtu(&far, mtu)?;
    world.plug(&near, &far)?;
    world.runs(&near, mode, says)
}

#[test]
fn virtio_with_many_queues_runs_natively() -> Result<()> {
    card(0, "virtio_net", "native", "the driver takes it")
}

#[test]
fn virtio_with_one_queue_runs_natively() -> Result<()> {
    card(1, "virtio_net", "native", "the driver takes it")
}

#[test]
fn virtio_that_merges_frames_for_the_guest_falls_back_and_serves() -> Result<()> {
    card(
        6,
        "virtio_net",
        "generic",
        "native: receive offloads are on [virtio_net: Can't set XDP while host is implementing",
    )
}

#[test]
fn e1000_falls_back_and_serves() -> Result<()> {
    card(2, "e1000", "generic", UNSUPPORTED)
}

#[test]
fn e1000e_falls_back_and_serves() -> Result<()> {
    card(3, "e1000e", "generic", UNSUPPORTED)
}

#[test]
fn igb_runs_natively() -> Result<()> {
    card(4, "igb", "native", "the driver takes it")
}

#[test]
fn igb_with_frames_longer_than_its_buffers_falls_back_and_serves() -> Result<()> {
    card_of(4, "igb", 9_000, "generic", "native: MTU over the driver's limit (9000)")
}

#[test]
fn vmxnet3_runs_natively_since_its_driver_can() -> Result<()> {
    // Kernel commit 54f00cce1178, of 6.3.
    if KernelVersion::current()? >= KernelVersion(6, 3) {
        card(5, "vmxnet3", "native", "the driver takes it")
    } else {
        card(5, "vmxnet3", "generic", UNSUPPORTED)
    }
}
