//! tc programs on the devices of overlays, by which pods of other nodes are reached: a CNI makes them when it likes.
//!
//! What leaves by one is encapsulated by the kernel, so that XDP has nothing to send there, and generic XDP would copy every long
//! packet between pods. The kernel's way does both halves: `tc_egress` ends what XDP on an uplink has begun, and `tc_ingress`
//! begins with the answers.

use std::collections::BTreeMap;

use tracing::{info, warn};

use super::{Attached, Attacher, take_off};
use crate::{
    devices::Mode,
    host::{Host, Link},
};

/// Kinds of devices whose packets have an Ethernet header (`IFLA_INFO_KIND`, drivers/net/vxlan and geneve.c).
const KINDS: [&str; 2] = ["vxlan", "geneve"];

/// Beginning of the names of flannel's devices. It masquerades whatever it has not been told of into its overlay, so that answers come
/// back and are restored on the uplink; a second address and port, which the kernel knows nothing of, would only be in its way.
const OF_FLANNEL: &str = "flannel";

/// Why they carry no XDP program.
const REASON: &str = "the kernel puts packets into the overlay, so programs of tc do";

/// The devices of overlays.
#[derive(Debug)]
pub(super) struct Overlays {
    are_followed: bool,
    /// Those that have refused, by index, with their names and reasons.
    refused: BTreeMap<u32, (String, String)>,
}

impl Overlays {
    pub(super) fn new(are_followed: bool) -> Self {
        Self { are_followed, refused: BTreeMap::new() }
    }
}

/// Whether pods of other nodes are reached by a device: without an address of its own nothing is routed there, as where a switch
/// in software uses it.
pub fn is_overlay(host: &Host, link: &Link) -> bool {
    KINDS.contains(&link.kind.as_str())
        && !link.name.starts_with(OF_FLANNEL)
        && host.has_own_address(link.index)
}

impl Attacher {
    /// Follows the devices of overlays that are not attached to by name; how many attachments failed is the answer.
    pub fn follow_overlays(&mut self, host: &Host) -> u64 {
        if !self.overlays.are_followed {
            return 0;
        }
        let is_gone = |name: &str, index: u32| host.link(name).map(|link| link.index) != Some(index);
        let overlays = self.attached.iter().filter(|(_, attached)| attached.mode == Mode::Tc);
        let gone = overlays.filter(|(name, attached)| is_gone(name, attached.ifindex));
        for name in gone.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            info!(interface = %name, "the device of an overlay is gone");
            self.forget(&name);
        }
        self.overlays.refused.retain(|index, (name, _)| !is_gone(name, *index));
        let mut failures = 0;
        for link in host.links.values().filter(|link| is_overlay(host, link)) {
            if self.attached.contains_key(&link.name) {
                continue;
            }
            match self.attach_overlay(link) {
                Ok(attached) => {
                    info!(interface = %link.name, "attached to the device of an overlay");
                    self.overlays.refused.remove(&link.index);
                    self.attached.insert(link.name.clone(), attached);
                }
                Err(error) => {
                    failures += 1;
                    let reason = format!("{error:#}");
                    let told = self.overlays.refused.insert(link.index, (link.name.clone(), reason.clone()));
                    if told.is_none_or(|(_, before)| before != reason) {
                        warn!(interface = %link.name, error = %reason, "cannot attach to the device of an overlay; \
                            answers of backends behind it may miss this node");
                    }
                }
            }
        }
        failures
    }

    /// The overlays' devices that are to carry programs.
    pub fn overlays_ahead<'a>(&self, host: &'a Host) -> impl Iterator<Item = &'a Link> {
        let are_followed = self.overlays.are_followed;
        host.links.values().filter(move |link| are_followed && is_overlay(host, link))
    }

    /// Names of the overlays' devices that carry programs.
    pub fn overlays(&self) -> impl Iterator<Item = &str> {
        self.attached.iter().filter(|(_, attached)| attached.mode == Mode::Tc).map(|(name, _)| name.as_str())
    }

    /// Those that have refused, and why.
    pub fn refused_overlays(&self) -> impl Iterator<Item = (&str, &str)> {
        self.overlays.refused.values().map(|(name, reason)| (name.as_str(), reason.as_str()))
    }

    fn attach_overlay(&mut self, link: &Link) -> anyhow::Result<Attached> {
        let mut links = Vec::new();
        let programs = self.programs_of_interfaces();
        match self.attach_tc(link, &programs, &mut links) {
            Ok(()) => Ok(Attached { ifindex: link.index, mode: Mode::Tc, reason: REASON.to_owned(), links }),
            Err(error) => {
                take_off(links.into_iter().filter(|link| !link.is_adopted));
                Err(error)
            }
        }
    }
}
