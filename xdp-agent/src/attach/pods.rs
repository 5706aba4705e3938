//! tc programs on the host-side devices of pods, which come and go: tens a second on a busy node.
//!
//! The pod behind a device that refuses does without, as all do that match no pattern, until the device lets programs in: it is
//! tried again when it changes, and every few seconds.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tracing::{debug, info, warn};

use super::{Attacher, PinnedLink, Programs, TcProgram, legacy, take_off};
use crate::{
    bpf::AttachType,
    config::Pattern,
    host::{Host, Link},
};

/// Answers are restored before anything is translated.
const PROGRAMS: [TcProgram; 2] = [
    TcProgram { name: "tc_egress", pin: "pod-egress", at: AttachType::TcxEgress },
    TcProgram { name: "tc_pod", pin: "pod-ingress", at: AttachType::TcxIngress },
];

/// How often a device is tried again that has refused.
const RETRY_PERIOD: Duration = Duration::from_secs(5);

/// The devices of pods.
#[derive(Debug)]
pub(super) struct PodDevices {
    patterns: Vec<Pattern>,
    /// Those with programs, by index.
    attached: BTreeMap<u32, PodDevice>,
    /// Those that have refused, by index.
    refused: BTreeMap<u32, Refused>,
}

#[derive(Debug)]
struct PodDevice {
    link: Link,
    links: Vec<PinnedLink>,
}

/// A device that has refused.
#[derive(Debug)]
struct Refused {
    /// What it was like then.
    link: Link,
    reason: String,
    /// When it is tried again unless it changes; never if time makes no difference.
    retry_at: Option<Instant>,
}

impl Refused {
    fn is_to_be_tried(&self, link: &Link, now: Instant) -> bool {
        self.link != *link || self.retry_at.is_some_and(|at| at <= now)
    }
}

impl PodDevices {
    pub(super) fn new(patterns: Vec<Pattern>) -> Self {
        Self { patterns, attached: BTreeMap::new(), refused: BTreeMap::new() }
    }

    /// Whether there can be any.
    pub(super) fn are_wanted(&self) -> bool {
        !self.patterns.is_empty()
    }

    /// Names of those with programs.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.attached.values().map(|device| device.link.name.as_str())
    }

    /// Those that have refused, and why.
    pub(super) fn refused(&self) -> impl Iterator<Item = (&str, &str)> {
        self.refused.values().map(|refused| (refused.link.name.as_str(), refused.reason.as_str()))
    }

    /// Whether it is time to try one again.
    pub(super) fn are_due(&self) -> bool {
        let now = Instant::now();
        self.refused.values().any(|refused| refused.retry_at.is_some_and(|at| at <= now))
    }

    pub(super) fn links(&self) -> impl Iterator<Item = &PinnedLink> {
        self.attached.values().flat_map(|device| &device.links)
    }

    /// Takes every program off, or those only that this agent has attached.
    pub(super) fn detach(&mut self, are_adopted_kept: bool) {
        for (_, device) in std::mem::take(&mut self.attached) {
            if device.links.is_empty() {
                legacy::remove(&device.link);
            }
            // What translates goes before what restores.
            take_off(device.links.into_iter().rev().filter(|link| !(are_adopted_kept && link.is_adopted)));
        }
    }

    fn wants(&self, link: &Link) -> bool {
        !link.is_loopback && self.patterns.iter().any(|pattern| pattern.matches(&link.name))
    }
}

/// Loads the programs that pods' devices need.
pub(super) fn load(programs: &mut Programs) -> anyhow::Result<()> {
    PROGRAMS.iter().try_for_each(|program| programs.classifier(program.name).map(drop))
}

impl Attacher {
    /// Follows the devices of pods; how many attachments failed is the answer.
    pub fn follow_pods(&mut self, host: &Host) -> u64 {
        if !self.pods.are_wanted() {
            return 0;
        }
        let is_there = |index: u32, name: &str| host.links.get(&index).is_some_and(|link| link.name == name);
        let gone = self.pods.attached.extract_if(.., |index, device| !is_there(*index, &device.link.name));
        for (_, device) in gone {
            debug!(interface = %device.link.name, "a pod's device is gone");
            // One that was only renamed, or has moved to another network namespace, still carries them.
            take_off(device.links.into_iter().rev());
        }
        let refused = &mut self.pods.refused;
        refused.retain(|index, refused| {
            is_there(*index, &refused.link.name) && !self.attached.contains_key(&refused.link.name)
        });
        let mut failures = 0;
        let now = Instant::now();
        for link in host.links.values() {
            let before = self.pods.refused.get(&link.index);
            let is_settled = self.pods.attached.contains_key(&link.index)
                || before.is_some_and(|refused| !refused.is_to_be_tried(link, now));
            if is_settled || !self.pods.wants(link) || self.attached.contains_key(&link.name) {
                continue;
            }
            if !link.is_ethernet {
                let reason = "it has no Ethernet header; leave it out of --pod-iface";
                self.refuse_pod(link, reason.to_owned(), None);
                continue;
            }
            match self.attach_pod(link) {
                Ok(links) => {
                    if self.pods.refused.remove(&link.index).is_some() {
                        info!(interface = %link.name, "attached to a pod's device that had refused");
                    } else {
                        debug!(interface = %link.name, "attached to a pod's device");
                    }
                    self.pods.attached.insert(link.index, PodDevice { link: link.clone(), links });
                }
                Err(error) => {
                    failures += 1;
                    self.refuse_pod(link, format!("{error:#}"), Some(now + RETRY_PERIOD));
                }
            }
        }
        failures
    }

    /// Notes that a device has refused, and says so if that is new.
    fn refuse_pod(&mut self, link: &Link, reason: String, retry_at: Option<Instant>) {
        if self.pods.refused.get(&link.index).is_none_or(|before| before.reason != reason) {
            // Gone already, the next look says so; there is nobody to be told.
            warn!(interface = %link.name, error = %reason, "cannot attach to a pod's device; \
                what socket hooks do not translate for this pod reaches no Service");
        }
        self.pods.refused.insert(link.index, Refused { link: link.clone(), reason, retry_at });
    }

    /// What `follow_pods` says of the first look.
    pub(super) fn tell_pods(&self) {
        if self.pods.are_wanted() {
            info!(
                interfaces = self.pods.attached.len(),
                "pods are served at their devices too, as they come and go"
            );
        }
    }

    fn attach_pod(&mut self, link: &Link) -> anyhow::Result<Vec<PinnedLink>> {
        let mut links = Vec::new();
        let filters = self.programs.legacy.len();
        let result = self.attach_tc(link, &PROGRAMS, &mut links);
        if !self.has_tcx {
            // They go with the device, or by their names when the agent goes.
            self.programs.legacy.drain(filters..).for_each(std::mem::forget);
        }
        match result {
            Ok(()) => Ok(links),
            Err(error) => {
                take_off(links.into_iter().filter(|link| !link.is_adopted));
                Err(error)
            }
        }
    }
}
