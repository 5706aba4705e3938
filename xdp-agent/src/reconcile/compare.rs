//! Mends what differs from the plan, whoever changed it.

use std::io;

use tracing::warn;

use super::{Reconciler, side::Side};
use crate::{cluster::wanted::IpAddress, interfaces::FamilyPicture, sockets::Hooks};

/// Rings are computed anew to be compared, so they are compared less often: at every tenth comparison.
const RING_COMPARE_EVERY: u32 = 10;
/// Backends that are compared at a time.
const BACKENDS_PER_STEP: u32 = 1 << 14;
/// Parts in which rings are compared: at four million slots one takes some milliseconds.
const RING_PARTS: u32 = 64;

/// What a comparison looks at next. It goes step by step, so that changes wait for one of them at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Gates,
    Frontends,
    Networks,
    /// From this id on.
    Backends(u32),
    /// This part of them.
    Rings(u32),
}

/// A comparison under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Comparison {
    step: Step,
    with_rings: bool,
    repairs: u32,
}

impl Comparison {
    /// The next step, of so many backends.
    fn next(self, backends: u32) -> Option<Step> {
        match self.step {
            Step::Gates => Some(Step::Frontends),
            Step::Frontends => Some(Step::Networks),
            Step::Networks => Some(Step::Backends(0)),
            Step::Backends(first) if backends - first > BACKENDS_PER_STEP => {
                Some(Step::Backends(first + BACKENDS_PER_STEP))
            }
            Step::Backends(_) => self.with_rings.then_some(Step::Rings(0)),
            Step::Rings(part) => (part + 1 < RING_PARTS).then_some(Step::Rings(part + 1)),
        }
    }
}

impl Reconciler {
    /// Begins a comparison, which [`Reconciler::compare_step`] goes on with.
    pub(super) fn compare(&mut self) {
        self.comparisons = self.comparisons.wrapping_add(1);
        let with_rings = self.comparisons.is_multiple_of(RING_COMPARE_EVERY);
        self.comparison = Some(Comparison { step: Step::Gates, with_rings, repairs: 0 });
    }

    /// Compares some more.
    pub(super) fn compare_step(&mut self) {
        // While a write waits to be repeated the maps differ from the plan on purpose.
        let Some(mut comparison) =
            self.comparison.take().filter(|_| self.v4.is_written() && self.v6.is_written())
        else {
            return;
        };
        match self.mend(comparison.step) {
            Ok(repairs) => comparison.repairs += repairs,
            Err(error) => {
                self.told.metrics.map_write_failures.inc();
                warn!(%error, "cannot compare the maps with the plan; trying again at the next comparison");
                return;
            }
        }
        if let Some(step) = comparison.next(self.v4.limits.backends.max(self.v6.limits.backends)) {
            self.comparison = Some(Comparison { step, ..comparison });
        } else if comparison.repairs > 0 {
            self.told.metrics.repairs.inc_by(comparison.repairs.into());
            // Frontends may be among them.
            self.hooks.iter().for_each(Hooks::look_again);
            warn!(
                repairs = comparison.repairs,
                "the maps differed from the plan and were mended; something else writes to them"
            );
        }
    }

    fn mend(&mut self, step: Step) -> io::Result<u32> {
        Ok(self.v4.mend(step, &self.picture.v4)? + self.v6.mend(step, &self.picture.v6)?)
    }
}

impl<A: IpAddress> Side<A> {
    fn mend(&mut self, step: Step, picture: &FamilyPicture<A>) -> io::Result<u32> {
        let (plan, maps) = (&self.plan, &mut self.maps);
        match step {
            Step::Gates => {
                let mended = maps.repair_gates(plan.ingress_gate(), plan.egress_gate())?;
                self.write_devices(picture)?;
                Ok(mended)
            }
            Step::Frontends => maps.repair_frontends(plan.frontends()),
            Step::Networks => maps.repair_networks(plan.networks()),
            Step::Backends(first) => {
                let ids = first..first.saturating_add(BACKENDS_PER_STEP).min(self.limits.backends);
                maps.repair_backends(ids.clone(), plan.backends(ids))
            }
            Step::Rings(part) => {
                let mut mended = 0;
                for (offset, slots) in plan.rings(part, RING_PARTS) {
                    mended += u32::from(maps.repair_ring(offset, &slots)?);
                }
                Ok(mended)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comparison_comes_to_its_end_after_every_backend_and_every_part_of_the_rings() {
        for (backends, with_rings, steps) in [(1, false, 4), (16_384, false, 4), (131_072, true, 3 + 8 + 64)]
        {
            let mut comparison = Comparison { step: Step::Gates, with_rings, repairs: 0 };
            let mut taken = vec![comparison.step];
            while let Some(step) = comparison.next(backends) {
                comparison.step = step;
                taken.push(step);
            }
            assert_eq!(taken.len(), steps, "{backends} backends");
            assert!(taken.contains(&Step::Backends((backends - 1) / BACKENDS_PER_STEP * BACKENDS_PER_STEP)));
        }
    }
}
