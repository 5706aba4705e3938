//! The rings of a previous agent, as far as its frontends tell.

use std::collections::BTreeMap;

use xdp_common::tables::Frontend;

use super::slices::Slices;

/// Ring slices that frontends of a previous agent name, merged where they meet.
#[derive(Debug, Default)]
pub(super) struct AdoptedRings {
    /// First slot to length and number of frontends.
    ranges: BTreeMap<u32, (u32, u32)>,
}

impl AdoptedRings {
    pub(super) fn new<'a>(frontends: impl Iterator<Item = &'a Frontend>) -> Self {
        let mut named: Vec<(u32, u32)> =
            frontends.filter(|f| f.slots > 0).map(|f| (f.ring, f.ring.saturating_add(f.slots))).collect();
        named.sort_unstable();
        let mut ranges: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
        for (start, end) in named {
            match ranges.last_entry() {
                Some(mut last) if start < *last.key() + last.get().0 => {
                    let first = *last.key();
                    let (len, count) = last.get_mut();
                    *len = (*len).max(end - first);
                    *count += 1;
                }
                Some(_) | None => {
                    ranges.insert(start, (end - start, 1));
                }
            }
        }
        Self { ranges }
    }

    /// Every slice, as first slot and length.
    pub(super) fn ranges(&self) -> impl Iterator<Item = (u32, u32)> {
        self.ranges.iter().map(|(&start, &(len, _))| (start, len))
    }

    /// A frontend names its slice no more; the last one gives it back.
    pub(super) fn leave(&mut self, frontend: &Frontend, slices: &mut Slices) {
        if frontend.slots == 0 {
            return;
        }
        let Some((&start, (len, count))) = self.ranges.range_mut(..=frontend.ring).next_back() else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            slices.release(start, *len);
            self.ranges.remove(&start);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}
