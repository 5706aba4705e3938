//! The rings of a previous agent, as far as its frontends tell.

use std::collections::BTreeMap;

use xdp_common::tables::Frontend;

use super::slices::{Slice, Slices};

/// Ring slices that frontends of a previous agent name, merged where they overlap.
#[derive(Debug, Default)]
pub(super) struct AdoptedRings {
    /// First slot to length and number of frontends.
    ranges: BTreeMap<u32, (u32, u32)>,
    /// The ring array.
    slots: Vec<u32>,
}

/// The slices that a frontend names, each once.
pub(super) fn named(frontend: &Frontend) -> impl Iterator<Item = Slice> + use<> {
    let outer = Slice { offset: frontend.ring, slots: frontend.slots };
    let inner = Slice { offset: frontend.inner_ring, slots: frontend.inner_slots };
    let inner = (inner != outer).then_some(inner);
    [Some(outer), inner].into_iter().flatten().filter(|slice| slice.slots > 0)
}

impl AdoptedRings {
    pub(super) fn new<'a>(frontends: impl Iterator<Item = &'a Frontend>, slots: Vec<u32>) -> Self {
        let mut slices: Vec<Slice> = frontends.flat_map(named).collect();
        slices.sort_unstable_by_key(|slice| (slice.offset, slice.slots));
        let mut ranges: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
        for Slice { offset: start, slots } in slices {
            let end = start.saturating_add(slots);
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
        Self { ranges, slots }
    }

    /// Every slice, as first slot and length.
    pub(super) fn ranges(&self) -> impl Iterator<Item = (u32, u32)> {
        self.ranges.iter().map(|(&start, &(len, _))| (start, len))
    }

    /// What a slice holds, if so many frontends name it and no other overlaps it.
    pub(super) fn content(&self, slice: Slice, namings: u32) -> Option<&[u32]> {
        let is_whole = self.ranges.get(&slice.offset) == Some(&(slice.slots, namings));
        let end = slice.offset.checked_add(slice.slots)?;
        self.slots.get(slice.offset as usize..end as usize).filter(|_| is_whole)
    }

    /// Hands a slice over to the plan.
    pub(super) fn take(&mut self, slice: Slice) {
        self.ranges.remove(&slice.offset);
        self.forget_slots();
    }

    /// A frontend names its slices no more; the last one gives each back, unless the plan has taken it.
    pub(super) fn leave(&mut self, frontend: &Frontend, slices: &mut Slices) {
        for slice in named(frontend) {
            let found = self.ranges.range_mut(..=slice.offset).next_back();
            let Some((&start, (len, count))) = found.filter(|(start, (len, _))| slice.offset < *start + *len)
            else {
                continue;
            };
            *count -= 1;
            if *count == 0 {
                slices.release(Slice { offset: start, slots: *len });
                self.ranges.remove(&start);
            }
        }
        self.forget_slots();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Frees the copy of the array once nobody needs it.
    pub(super) fn forget_slots(&mut self) {
        if self.ranges.is_empty() {
            self.slots = Vec::new();
        }
    }
}
