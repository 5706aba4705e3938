//! The managed interfaces over time: they come and go, and change addresses and abilities.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use tracing::{info, warn};
use xdp_common::tables::Device;

use crate::{
    attach::Attacher,
    devices::{self, Mode, Transmit},
    host::Host,
    status::InterfaceStatus,
};

/// The interfaces that the flags name.
#[derive(Debug)]
pub struct Interfaces {
    attacher: Attacher,
    names: Vec<String>,
    /// Those whose frames take the kernel's way, which was said once.
    warned: BTreeSet<String>,
    /// Those without an address, which was said once.
    addressless: BTreeSet<String>,
    /// Interfaces that refused when they returned; they are tried again when something changes.
    refused: BTreeMap<String, String>,
}

/// What the maps and people have to know.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Picture {
    /// Entries of the device map, by interface index.
    pub devices: BTreeMap<u32, Device<[u8; 4]>>,
    /// Addresses that flows are translated to.
    pub snat: Vec<[u8; 4]>,
    /// For people.
    pub status: Vec<InterfaceStatus>,
}

impl Interfaces {
    /// The interfaces, with an engine that may have attached to them already.
    pub fn new(attacher: Attacher, names: Vec<String>) -> Self {
        Self {
            attacher,
            names,
            warned: BTreeSet::new(),
            addressless: BTreeSet::new(),
            refused: BTreeMap::new(),
        }
    }

    /// Attaches to all of them.
    ///
    /// # Errors
    /// When one refuses; nothing is attached then that was not before.
    pub fn attach_all(&mut self) -> anyhow::Result<()> {
        self.attacher.attach_all(&self.names)
    }

    /// Follows the kernel's view: forgets interfaces that are gone, and attaches to those that have returned. How many
    /// attachments failed is the answer.
    pub fn follow(&mut self, host: &Host) -> u64 {
        let mut failures = 0;
        for name in self.names.clone() {
            let link = host.link(&name);
            let attached = self.attacher.attached().get(&name).map(|attached| attached.ifindex);
            if attached.is_some() && attached != link.map(|link| link.index) {
                warn!(interface = %name, "the interface is gone; its clients are not served until it returns");
                self.attacher.forget(&name);
            }
            let Some(link) = link else { continue };
            let is_new = attached != Some(link.index);
            if !is_new || host.source_address(link.index).is_none() {
                continue;
            }
            info!(interface = %name, "the interface has returned");
            match self.attacher.attach(link) {
                Ok(()) => drop(self.refused.remove(&name)),
                Err(error) => {
                    failures += 1;
                    let message = format!("{error:#}");
                    warn!(interface = %name, error = %message, "cannot attach; trying again when the interface changes");
                    self.refused.insert(name, message);
                }
            }
        }
        failures
    }

    /// The picture as it is now.
    pub fn picture(&mut self, host: &Host) -> Picture {
        let mut picture = Picture::default();
        for name in self.names.clone() {
            let link = host.link(&name);
            let attached = self.attacher.attached().get(&name);
            let (Some(link), Some(attached)) = (link, attached) else {
                picture.status.push(self.absent(&name));
                continue;
            };
            let (mode, reason) = (attached.mode, attached.reason.clone());
            let xmit = devices::transmit(link, mode, devices::features(host, link.index));
            let address = host.source_address(link.index);
            if let Some(address) = address {
                picture.devices.insert(link.index, devices::device(link, address, mode, xmit));
                picture.snat.push(address.octets());
            }
            self.say_once(&name, mode, xmit, address);
            picture.status.push(InterfaceStatus {
                name,
                ifindex: link.index,
                mode,
                reason,
                xmit,
                address: address.map(|address| address.to_string()),
            });
        }
        picture
    }

    /// Takes every program off and removes what is pinned.
    ///
    /// # Errors
    /// When a pin cannot be removed.
    pub fn detach_all(self) -> anyhow::Result<()> {
        self.attacher.detach_all()
    }

    /// Ends a start that failed.
    pub fn give_up(self) {
        self.attacher.give_up();
    }

    /// Leaves every program attached and pinned.
    pub fn leave(self) {
        self.attacher.leave();
    }

    fn absent(&self, name: &str) -> InterfaceStatus {
        let reason = self.refused.get(name).cloned();
        InterfaceStatus {
            name: name.to_owned(),
            ifindex: 0,
            mode: Mode::Absent,
            reason: reason.unwrap_or_else(|| "the interface is not there, or has no IPv4 address".to_owned()),
            xmit: Transmit { transmit: false, redirect: false },
            address: None,
        }
    }

    fn say_once(&mut self, name: &str, mode: Mode, xmit: Transmit, address: Option<Ipv4Addr>) {
        if address.is_some() {
            self.addressless.remove(name);
        } else if self.addressless.insert(name.to_owned()) {
            warn!(interface = %name, "the interface has no IPv4 address any more; its clients are not served");
        }
        if xmit.transmit {
            if self.warned.remove(name) {
                info!(interface = %name, "the veth's peer is ready now; frames leave at XDP");
            }
        } else if mode.is_native() && self.warned.insert(name.to_owned()) {
            warn!(
                interface = %name,
                "frames to other nodes take the kernel's way: this is a veth whose peer carries no XDP program and would \
                 lose what XDP sends; attach a pass program to the peer, or use --mode generic"
            );
        }
    }
}
