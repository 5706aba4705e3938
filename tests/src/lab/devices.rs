//! Devices beside veth: cards of the machine, and what the kernel makes of other devices.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rtnetlink::packet_route::link::BondMode;
use rtnetlink::{LinkBond, LinkUnspec, LinkVlan, LinkVxlan};

use super::netns::Namespace;
use super::{block_on, wait_for};

/// How long a card may take to come back from the namespace that had it before.
const RETURN_TIMEOUT: Duration = Duration::from_secs(10);

impl Namespace {
    /// Moves a card of this machine into the namespace and brings it up; it returns when the namespace ends.
    pub fn take_card(&self, mac: &str) -> Result<String> {
        let name = wait_for("the card", RETURN_TIMEOUT, || card(mac))?;
        let index = std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex"))?.trim().parse()?;
        block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            let driver = tokio::spawn(connection);
            let message = LinkUnspec::new_with_index(index).setns_by_fd(self.as_fd().as_raw_fd()).build();
            let moved = handle.link().set(message).execute().await;
            driver.abort();
            moved.with_context(|| format!("moving {name} into {self:?}"))
        })?;
        self.up(&name)?;
        Ok(name)
    }

    /// Adds a device for the frames of one VLAN of another device.
    pub fn vlan(&self, name: &str, below: &str, id: u16) -> Result<()> {
        let message = LinkVlan::new(name, self.index(below)?, id).build();
        block_on(self.netlink().link().add(message).execute())
            .with_context(|| format!("VLAN device {name} in {self:?}"))?;
        self.up(name)
    }

    /// Makes a bond of a device, which loses its addresses; another would take over from it.
    pub fn bond(&self, name: &str, port: &str) -> Result<()> {
        let message = LinkBond::new(name).mode(BondMode::ActiveBackup).miimon(100).build();
        block_on(self.netlink().link().add(message).execute())
            .with_context(|| format!("bond {name} in {self:?}"))?;
        self.down(port)?;
        self.enslave(port, name)?;
        self.up(name)?;
        self.up(port)
    }

    /// Adds a VXLAN device that leads to one other machine.
    pub fn vxlan(&self, name: &str, below: &str, remote: Ipv4Addr) -> Result<()> {
        let message = LinkVxlan::new(name, 70).dev(self.index(below)?).remote(remote).port(4_789).build();
        block_on(self.netlink().link().add(message).execute())
            .with_context(|| format!("VXLAN device {name} in {self:?}"))?;
        self.up(name)
    }
}

/// The driver of a card that is in this process's own namespace.
pub fn driver_of(mac: &str) -> Result<String> {
    let name = wait_for("the card", RETURN_TIMEOUT, || card(mac))?;
    let driver = std::fs::read_link(format!("/sys/class/net/{name}/device/driver"))?;
    let driver = driver.file_name().with_context(|| format!("{name} has no driver"))?;
    let driver = driver.to_string_lossy().into_owned();
    // A virtio device lies below the device of its bus.
    Ok(driver.trim_end_matches("-pci").to_owned())
}

fn card(mac: &str) -> Result<String> {
    for entry in std::fs::read_dir("/sys/class/net")?.flatten() {
        let address = std::fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        if address.trim() == mac {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    bail!("no card {mac} in this namespace: `cargo xtask vm --lane devices` makes machines that have it")
}
