//! The maps of one address family and the plan for them.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    time::Duration,
};

use tokio::time::Instant;
use tracing::{debug, warn};

use super::{RETRY_PAUSE, ServiceNames};
use crate::{
    cluster::wanted::{Delta, IpAddress},
    interfaces::FamilyPicture,
    maps::ImageMaps,
    metrics::Metrics,
    plan::{Change, InUse, Limits, Plan, Update},
};

/// A write that is refused more often is left to the next comparison, so that those behind it go on.
const ATTEMPTS_MAX: u32 = 5;
/// A buffer for so many writes is kept; those of a start take more, and give it back.
const PENDING_KEPT: usize = 4096;

/// What the writer needs for an address family.
#[derive(Debug)]
pub struct SideParts<A: IpAddress> {
    /// The maps.
    pub maps: ImageMaps<A>,
    /// Their sizes.
    pub limits: Limits,
    /// Names for accounts.
    pub names: ServiceNames,
}

/// One address family of the writer.
#[derive(Debug)]
pub(super) struct Side<A: IpAddress> {
    pub(super) maps: ImageMaps<A>,
    pub(super) limits: Limits,
    pub(super) plan: Plan<A>,
    names: ServiceNames,
    /// Changes that wait for one that was refused.
    pending: VecDeque<Change<A>>,
    attempts: u32,
    pub(super) retry_at: Option<Instant>,
    /// When something that did not fit may fit.
    pub(super) update_at: Option<Instant>,
}

impl<A: IpAddress> Side<A> {
    /// A side over maps that are empty or an earlier agent's.
    pub(super) fn new(parts: SideParts<A>, is_adopted: bool) -> io::Result<Self> {
        let SideParts { maps, limits, names } = parts;
        let plan = if is_adopted { Plan::adopt(limits, maps.read()?) } else { Plan::new(limits) };
        Ok(Self {
            maps,
            limits,
            plan,
            names,
            pending: VecDeque::new(),
            attempts: 0,
            retry_at: None,
            update_at: None,
        })
    }

    /// Plans the way to what should be and takes it; how many writes that asks for.
    pub(super) fn update(&mut self, delta: &Delta<A>, snat: &[A], now_ms: u64, metrics: &Metrics) -> usize {
        self.names.forget(delta, &self.plan);
        let update = self.plan.update(delta, true, snat, now_ms);
        self.names.learn(delta, &self.plan);
        let changes = update.changes.len();
        self.take(update, metrics);
        changes
    }

    /// Frees what no flow uses any more.
    pub(super) fn collect(&mut self, in_use: &InUse, now_ms: u64, metrics: &Metrics) {
        let update = self.plan.collect(in_use, now_ms);
        self.take(update, metrics);
    }

    /// Goes on with writes that were refused, when it is time.
    pub(super) fn retry(&mut self, metrics: &Metrics) {
        if self.retry_at.is_some_and(|at| at <= Instant::now()) {
            self.drain(metrics);
        }
    }

    /// Whether everything planned is written.
    pub(super) fn is_written(&self) -> bool {
        self.pending.is_empty()
    }

    /// Whether frontends of UDP are in the maps that were not when this was last asked.
    pub(super) fn take_new_udp_frontends(&mut self) -> bool {
        self.is_written() && self.plan.take_new_udp_frontends()
    }

    /// Writes what the interfaces are like.
    pub(super) fn write_devices(&mut self, wanted: &FamilyPicture<A>) -> io::Result<()> {
        // Before the devices that ask for them.
        self.maps.repair_sources(&wanted.sources)?;
        let there: BTreeMap<_, _> = self.maps.devices()?.into_iter().collect();
        for (ifindex, device) in &wanted.devices {
            if there.get(ifindex) != Some(device) {
                self.maps.set_device(*ifindex, *device)?;
            }
        }
        for ifindex in there.keys().filter(|ifindex| !wanted.devices.contains_key(ifindex)) {
            self.maps.remove_device(*ifindex)?;
        }
        Ok(())
    }

    fn take(&mut self, update: Update<A>, metrics: &Metrics) {
        self.pending.extend(update.changes);
        self.update_at = update.retry_in_ms.map(|ms| Instant::now() + Duration::from_millis(ms.max(1)));
        if self.retry_at.is_none() {
            self.drain(metrics);
        }
    }

    /// Writes what is pending, in order; stops at a refusal, because later writes may count on the refused one.
    fn drain(&mut self, metrics: &Metrics) {
        self.retry_at = None;
        while !self.pending.is_empty() {
            let (made, result) = self.maps.apply(self.pending.make_contiguous());
            self.pending.drain(..made);
            metrics.map_writes.inc_by(made as u64);
            if made > 0 {
                self.attempts = 0;
            }
            let Err(error) = result else { continue };
            metrics.map_write_failures.inc();
            self.attempts += 1;
            let change = self.pending.front().map(|change| change.summary());
            if self.attempts < ATTEMPTS_MAX {
                debug!(%error, change, "a write to a map was refused");
                self.retry_at = Some(Instant::now() + RETRY_PAUSE);
                return;
            }
            warn!(%error, change, "a write to a map is refused again and again; leaving it to the next comparison");
            self.pending.pop_front();
            self.attempts = 0;
        }
        self.pending.shrink_to(PENDING_KEPT);
    }
}
