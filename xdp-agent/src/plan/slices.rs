//! Who owns which part of the ring array.

use std::collections::{BTreeMap, BTreeSet};

/// How long a freed slice rests before it is written again, in milliseconds: longer than any run of a program that may
/// still be reading it.
pub const QUARANTINE_MS: u64 = 1_000;

/// A part of the ring array; nothing when it has no slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Slice {
    /// First slot.
    pub(super) offset: u32,
    /// Number of slots.
    pub(super) slots: u32,
}

/// The ring array as slices: free, resting, or in use.
#[derive(Debug)]
pub(super) struct Slices {
    /// Free slices: first slot to length. Neighbours are merged.
    free: BTreeMap<u32, u32>,
    /// The same by length, to find the smallest that fits.
    by_len: BTreeSet<(u32, u32)>,
    /// Given up and, once the switch away from it has surely been applied, since when.
    resting: Vec<(Slice, Option<u64>)>,
    used: u32,
    /// Slots of them that rest.
    resting_slots: u32,
}

impl Slices {
    pub(super) fn new(slots: u32) -> Self {
        let mut new = Self {
            free: BTreeMap::new(),
            by_len: BTreeSet::new(),
            resting: Vec::new(),
            used: 0,
            resting_slots: 0,
        };
        new.insert(0, slots);
        new
    }

    /// Takes the smallest free slice that fits.
    pub(super) fn allocate(&mut self, len: u32) -> Option<Slice> {
        let &(room, offset) = self.by_len.range((len, 0)..).next()?;
        self.take(offset, room);
        self.insert(offset + len, room - len);
        self.used += len;
        Some(Slice { offset, slots: len })
    }

    /// Takes a given slice out of the free room, as far as it is free.
    pub(super) fn occupy(&mut self, offset: u32, len: u32) {
        let end = offset.saturating_add(len);
        let from = self.free.range(..=offset).next_back().map_or(offset, |(&start, _)| start);
        let touched: Vec<(u32, u32)> =
            self.free.range(from..end).map(|(&start, &room)| (start, room)).collect();
        for (start, room) in touched {
            let (low, high) = (start.max(offset), (start + room).min(end));
            if low >= high {
                continue;
            }
            self.take(start, room);
            self.insert(start, low - start);
            self.insert(high, start + room - high);
            self.used += high - low;
        }
    }

    /// Gives a slice back that no frontend will name once the current changes are applied.
    pub(super) fn release(&mut self, slice: Slice) {
        if slice.slots > 0 {
            self.resting.push((slice, None));
            self.resting_slots += slice.slots;
        }
    }

    /// Gives a slice back that was never named.
    pub(super) fn undo(&mut self, slice: Slice) {
        self.used -= slice.slots;
        self.insert(slice.offset, slice.slots);
    }

    /// Starts the rest of what was given up in earlier calls, and ends it where it is over; true when that made room.
    pub(super) fn tick(&mut self, now_ms: u64) -> bool {
        let mut rested = Vec::new();
        self.resting.retain_mut(|(slice, since)| {
            let since = *since.get_or_insert(now_ms);
            let over = now_ms.saturating_sub(since) >= QUARANTINE_MS;
            if over {
                rested.push(*slice);
            }
            !over
        });
        for &slice in &rested {
            self.resting_slots -= slice.slots;
            self.undo(slice);
        }
        !rested.is_empty()
    }

    /// Slots in use or resting.
    pub(super) fn used(&self) -> u32 {
        self.used
    }

    /// Slots in use.
    pub(super) fn settled(&self) -> u32 {
        self.used - self.resting_slots
    }

    /// Whether room is about to become free.
    pub(super) fn is_resting(&self) -> bool {
        !self.resting.is_empty()
    }

    fn take(&mut self, offset: u32, len: u32) {
        self.free.remove(&offset);
        self.by_len.remove(&(len, offset));
    }

    fn insert(&mut self, mut offset: u32, mut len: u32) {
        if len == 0 {
            return;
        }
        if let Some((&before, &room)) = self.free.range(..offset).next_back()
            && before + room == offset
        {
            self.take(before, room);
            (offset, len) = (before, len + room);
        }
        if let Some(&room) = self.free.get(&(offset + len)) {
            self.take(offset + len, room);
            len += room;
        }
        self.free.insert(offset, len);
        self.by_len.insert((len, offset));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(offset: u32, slots: u32) -> Option<Slice> {
        Some(Slice { offset, slots })
    }

    #[test]
    fn a_slice_rests_before_it_is_used_again() {
        let mut slices = Slices::new(10);
        let first = slices.allocate(10).unwrap();
        slices.release(first);
        slices.tick(5_000); // the switch was applied before this call, no one knows when
        assert_eq!(slices.allocate(1), None);
        slices.tick(5_999);
        assert_eq!((slices.allocate(1), slices.used()), (None, 10));
        slices.tick(6_000);
        assert_eq!((slices.allocate(10), slices.is_resting()), (at(0, 10), false));
    }

    #[test]
    fn occupied_room_is_not_given_out() {
        let mut slices = Slices::new(100);
        slices.occupy(10, 20);
        slices.occupy(20, 30); // overlaps
        slices.occupy(95, 50); // beyond the end
        assert_eq!(slices.used(), 45);
        assert_eq!(slices.allocate(46), None);
        assert_eq!((slices.allocate(45), slices.allocate(10)), (at(50, 45), at(0, 10)));
    }

    proptest! {
        #[test]
        fn slices_never_overlap_and_all_room_comes_back(script in proptest::collection::vec((1u32..40, any::<bool>()), 1..60)) {
            let mut slices = Slices::new(200);
            let mut held: Vec<Slice> = Vec::new();
            let mut now = 0;
            for (number, gives) in script {
                now += QUARANTINE_MS / 2;
                slices.tick(now);
                if gives && !held.is_empty() {
                    slices.release(held.swap_remove(number as usize % held.len()));
                } else if let Some(slice) = slices.allocate(number) {
                    let end = slice.offset + number;
                    prop_assert!(end <= 200);
                    prop_assert!(held.iter().all(|old| slice.offset >= old.offset + old.slots || old.offset >= end));
                    held.push(slice);
                }
                let settled: u32 = held.iter().map(|slice| slice.slots).sum();
                prop_assert_eq!(slices.settled(), settled);
            }
            for slice in held {
                slices.release(slice);
            }
            slices.tick(now);
            slices.tick(now + QUARANTINE_MS);
            prop_assert_eq!((slices.used(), slices.allocate(200)), (0, at(0, 200)));
        }
    }
}
