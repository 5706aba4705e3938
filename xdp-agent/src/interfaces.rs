//! The managed interfaces over time: they come and go, and change addresses and abilities.

use std::{
    collections::{BTreeMap, BTreeSet},
    iter,
    net::IpAddr,
};

use tracing::{info, warn};
use xdp_common::tables::{Device, device};

use crate::{
    attach::Attacher,
    cgroup::Cgroup,
    cluster::wanted::{Ip6, IpAddress, Network},
    devices::{self, Mode, Transmit},
    host::{Host, Link},
    status::{InterfaceStatus, RefusedStatus},
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
    /// For IPv4.
    pub v4: FamilyPicture<[u8; 4]>,
    /// For IPv6.
    pub v6: FamilyPicture<Ip6>,
    /// For people.
    pub status: Vec<InterfaceStatus>,
    /// The devices of pods that carry programs.
    pub pods: Vec<String>,
    /// Those that have refused.
    pub refused_pods: Vec<RefusedStatus>,
}

/// What the maps of an address family have to know.
#[derive(Clone, Debug, PartialEq)]
pub struct FamilyPicture<A> {
    /// Entries of the device map, by interface index.
    pub devices: BTreeMap<u32, Device<A>>,
    /// Addresses of interfaces in several networks, by index and network of the next hop, in IPv6 of the destination.
    pub sources: BTreeMap<(u32, Network<A>), A>,
    /// Addresses that flows are translated to.
    pub snat: Vec<A>,
}

impl<A> Default for FamilyPicture<A> {
    fn default() -> Self {
        Self { devices: BTreeMap::new(), sources: BTreeMap::new(), snat: Vec::new() }
    }
}

impl<A: IpAddress> FamilyPicture<A> {
    /// Adds an interface that has an address of the family; the answer is which ones packets get that leave there.
    fn add(&mut self, host: &Host, link: &Link, mode: Mode, xmit: Transmit) -> Vec<IpAddr> {
        let Some(address) = host.source_address::<A>(link.index) else { return Vec::new() };
        let mut device = devices::device(link, address, mode, xmit);
        let sources = host.sources::<A>(link.index);
        if !sources.is_empty() {
            device = devices::in_several(device);
        }
        self.devices.insert(link.index, device);
        let mut addresses = Vec::new();
        for addr in iter::once(address).chain(sources.iter().map(|(_, addr)| *addr)) {
            if !addresses.contains(&addr.to_ip()) {
                addresses.push(addr.to_ip());
            }
            // Interfaces without an address of their own share that of the loopback.
            if !self.snat.contains(&addr) {
                self.snat.push(addr);
            }
        }
        self.sources.extend(sources.into_iter().map(|(network, addr)| ((link.index, network), addr)));
        addresses
    }

    /// Adds what stands for all devices of pods: a pod that reaches itself sees the node's address.
    fn add_pods(&mut self) {
        if let Some(&snat) = self.snat.first() {
            self.devices.insert(device::OF_PODS, devices::of_pods(snat));
        }
    }
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
    /// When one refuses; nothing is attached then that was not before. What was there of an earlier agent may have been replaced.
    pub async fn attach_all(&mut self) -> anyhow::Result<()> {
        self.attacher.attach_all(&self.names).await
    }

    /// Follows the kernel's view: forgets interfaces that are gone, and attaches to those that have returned. How many
    /// attachments failed is the answer.
    pub fn follow(&mut self, host: &Host) -> u64 {
        let mut failures = self.attacher.follow_pods(host);
        for name in self.names.clone() {
            let link = host.link(&name);
            let attached = self.attacher.attached().get(&name).map(|attached| attached.ifindex);
            if attached.is_some() && attached != link.map(|link| link.index) {
                warn!(interface = %name, "the interface is gone; its clients are not served until it returns");
                self.attacher.forget(&name);
            }
            let Some(link) = link else { continue };
            let is_new = attached != Some(link.index);
            if !is_new || !host.has_source_address(link.index) {
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
        // Behind those that have been named, which may be overlays too.
        failures + self.attacher.follow_overlays(host)
    }

    /// Whether it is time to look again, though nothing has changed.
    pub fn are_due(&self) -> bool {
        self.attacher.pods_are_due()
    }

    /// Follows the cgroup of the socket hooks; what is to be said of them, if it has changed.
    pub fn follow_cgroup(&mut self) -> Option<Option<&Cgroup>> {
        self.attacher.follow_cgroup().then(|| self.attacher.cgroup())
    }

    /// The picture as it is now.
    pub fn picture(&mut self, host: &Host) -> Picture {
        let mut picture = Picture::default();
        let overlays = self.attacher.overlays().map(str::to_owned);
        let overlays: Vec<String> = overlays.filter(|name| !self.names.contains(name)).collect();
        for name in self.names.iter().chain(&overlays).cloned().collect::<Vec<_>>() {
            let link = host.link(&name);
            let attached = self.attacher.attached().get(&name);
            let (Some(link), Some(attached)) = (link, attached) else {
                picture.status.push(self.absent(&name));
                continue;
            };
            let (mode, reason) = (attached.mode, attached.reason.clone());
            let xmit = devices::transmit(link, mode, devices::features(host, link.index));
            let addresses = [picture.v4.add(host, link, mode, xmit), picture.v6.add(host, link, mode, xmit)];
            let addresses: Vec<String> = addresses.concat().iter().map(IpAddr::to_string).collect();
            self.say_once(&name, mode, xmit, !addresses.is_empty());
            picture.status.push(InterfaceStatus { name, ifindex: link.index, mode, reason, xmit, addresses });
        }
        let refused = self.attacher.refused_overlays();
        let refused: Vec<_> = refused.map(|(name, reason)| (name.to_owned(), reason.to_owned())).collect();
        picture.status.extend(refused.into_iter().map(|(name, reason)| absent(name, reason)));
        picture.pods = self.attacher.pod_devices().map(str::to_owned).collect();
        let refused = self.attacher.refused_pod_devices();
        picture.refused_pods = refused.map(|(name, reason)| RefusedStatus::new(name, reason)).collect();
        if self.attacher.serves_pods() {
            picture.v4.add_pods();
            picture.v6.add_pods();
        }
        picture
    }

    /// What the maps of both families have to know before anything is attached.
    pub fn families_ahead(&self, host: &Host) -> (FamilyPicture<[u8; 4]>, FamilyPicture<Ip6>) {
        let (mut v4, mut v6) = (FamilyPicture::default(), FamilyPicture::default());
        let named = self.names.iter().filter_map(|name| host.link(name)).map(|link| (link, Mode::Absent));
        let overlays = self.attacher.overlays_ahead(host).filter(|link| !self.names.contains(&link.name));
        for (link, mode) in named.chain(overlays.map(|link| (link, Mode::Tc))) {
            let xmit = devices::transmit(link, mode, None);
            v4.add(host, link, mode, xmit);
            v6.add(host, link, mode, xmit);
        }
        if self.attacher.serves_pods() {
            v4.add_pods();
            v6.add_pods();
        }
        (v4, v6)
    }

    /// Takes every program off and removes what is pinned.
    ///
    /// # Errors
    /// When a pin cannot be removed.
    pub async fn detach_all(self) -> anyhow::Result<()> {
        self.attacher.detach_all().await
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
        let reason = reason.unwrap_or_else(|| "the interface is not there, or has no address".to_owned());
        absent(name.to_owned(), reason)
    }

    fn say_once(&mut self, name: &str, mode: Mode, xmit: Transmit, has_address: bool) {
        if has_address {
            self.addressless.remove(name);
        } else if self.addressless.insert(name.to_owned()) {
            warn!(interface = %name, "the interface has no address any more; its clients are not served");
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

/// An interface without programs.
fn absent(name: String, reason: String) -> InterfaceStatus {
    let xmit = Transmit { transmit: false, redirect: false };
    InterfaceStatus { name, ifindex: 0, mode: Mode::Absent, reason, xmit, addresses: Vec::new() }
}
