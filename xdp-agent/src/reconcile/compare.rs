//! Mends what differs from the plan, whoever changed it.

use std::{collections::BTreeMap, io};

use tracing::{debug, warn};
use xdp_common::tables::Device;

use super::Reconciler;

/// Rings are computed anew to be compared, so they are compared less often: at every tenth comparison.
const RING_COMPARE_EVERY: u32 = 10;

impl Reconciler {
    pub(super) fn write_devices(&mut self, wanted: &BTreeMap<u32, Device<[u8; 4]>>) -> io::Result<()> {
        let there: BTreeMap<_, _> = self.parts.maps.devices()?.into_iter().collect();
        for (ifindex, device) in wanted {
            if there.get(ifindex) != Some(device) {
                self.parts.maps.set_device(*ifindex, *device)?;
            }
        }
        for ifindex in there.keys().filter(|ifindex| !wanted.contains_key(ifindex)) {
            self.parts.maps.remove_device(*ifindex)?;
        }
        Ok(())
    }

    pub(super) fn compare(&mut self) {
        // While a write waits to be repeated the maps differ from the plan on purpose.
        if !self.pending.is_empty() {
            return;
        }
        self.comparisons = self.comparisons.wrapping_add(1);
        let with_rings = self.comparisons.is_multiple_of(RING_COMPARE_EVERY);
        match self.mend(with_rings) {
            Ok(0) => {}
            Ok(repairs) => {
                self.parts.metrics.repairs.inc_by(repairs.into());
                warn!(
                    repairs,
                    "the maps differed from the plan and were mended; something else writes to them"
                );
            }
            Err(error) => {
                self.parts.metrics.map_write_failures.inc();
                warn!(%error, "cannot compare the maps with the plan; trying again at the next comparison");
            }
        }
    }

    fn mend(&mut self, with_rings: bool) -> io::Result<u32> {
        let mut repairs = self.parts.maps.repair(&self.plan.image())?;
        if with_rings {
            for (offset, slots) in self.plan.rings() {
                repairs.rings += u32::from(self.parts.maps.repair_ring(offset, &slots)?);
            }
        }
        if repairs.total() > 0 {
            debug!(?repairs, "mended");
        }
        let devices = self.picture.devices.clone();
        self.write_devices(&devices)?;
        Ok(repairs.total())
    }
}
