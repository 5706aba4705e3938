//! Who owns which part of the ring array.

use std::collections::{BTreeMap, BTreeSet};

/// How long a freed slice rests before it is written again, in milliseconds: longer than any run of a program that may
/// still be reading it.
pub const QUARANTINE_MS: u64 = 1_000;

/// The ring array as slices: free, resting, or in use.
#[derive(Debug)]
pub(super) struct Slices {
    /// Free slices: first slot to length. Neighbours are merged.
    free: BTreeMap<u32, u32>,
    /// The same by length, to find the smallest that fits.
    by_len: BTreeSet<(u32, u32)>,
    /// Given up: offset, length and, once the switch away from it has surely been applied, since when.
    resting: Vec<(u32, u32, Option<u64>)>,
    used: u32,
}

impl Slices {
    pub(super) fn new(slots: u32) -> Self {
        let mut new = Self { free: BTreeMap::new(), by_len: BTreeSet::new(), resting: Vec::new(), used: 0 };
        new.insert(0, slots);
        new
    }

    /// Takes the smallest free slice that fits.
    pub(super) fn allocate(&mut self, len: u32) -> Option<u32> {
        let &(room, offset) = self.by_len.range((len, 0)..).next()?;
        self.take(offset, room);
        self.insert(offset + len, room - len);
        self.used += len;
        Some(offset)
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
    pub(super) fn release(&mut self, offset: u32, len: u32) {
        if len > 0 {
            self.resting.push((offset, len, None));
        }
    }

    /// Gives a slice back that was never named.
    pub(super) fn undo(&mut self, offset: u32, len: u32) {
        self.used -= len;
        self.insert(offset, len);
    }

    /// Starts the rest of what was given up in earlier calls, and ends it where it is over.
    pub(super) fn tick(&mut self, now_ms: u64) {
        let mut rested = Vec::new();
        self.resting.retain_mut(|(offset, len, since)| {
            let since = *since.get_or_insert(now_ms);
            let over = now_ms.saturating_sub(since) >= QUARANTINE_MS;
            if over {
                rested.push((*offset, *len));
            }
            !over
        });
        for (offset, len) in rested {
            self.undo(offset, len);
        }
    }

    /// Slots in use or resting.
    pub(super) fn used(&self) -> u32 {
        self.used
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

    #[test]
    fn a_slice_rests_before_it_is_used_again() {
        let mut slices = Slices::new(10);
        let first = slices.allocate(10).unwrap();
        slices.release(first, 10);
        slices.tick(5_000); // the switch was applied before this call, no one knows when
        assert_eq!(slices.allocate(1), None);
        slices.tick(5_999);
        assert_eq!((slices.allocate(1), slices.used()), (None, 10));
        slices.tick(6_000);
        assert_eq!((slices.allocate(10), slices.is_resting()), (Some(0), false));
    }

    #[test]
    fn occupied_room_is_not_given_out() {
        let mut slices = Slices::new(100);
        slices.occupy(10, 20);
        slices.occupy(20, 30); // overlaps
        slices.occupy(95, 50); // beyond the end
        assert_eq!(slices.used(), 45);
        assert_eq!(slices.allocate(46), None);
        assert_eq!((slices.allocate(45), slices.allocate(10)), (Some(50), Some(0)));
    }

    proptest! {
        #[test]
        fn slices_never_overlap_and_all_room_comes_back(script in proptest::collection::vec((1u32..40, any::<bool>()), 1..60)) {
            let mut slices = Slices::new(200);
            let mut held: Vec<(u32, u32)> = Vec::new();
            let mut now = 0;
            for (number, gives) in script {
                now += QUARANTINE_MS / 2;
                slices.tick(now);
                if gives && !held.is_empty() {
                    let (offset, len) = held.swap_remove(number as usize % held.len());
                    slices.release(offset, len);
                } else if let Some(offset) = slices.allocate(number) {
                    prop_assert!(offset + number <= 200);
                    prop_assert!(held.iter().all(|&(start, len)| offset >= start + len || start >= offset + number));
                    held.push((offset, number));
                }
            }
            for (offset, len) in held {
                slices.release(offset, len);
            }
            slices.tick(now);
            slices.tick(now + QUARANTINE_MS);
            prop_assert_eq!((slices.used(), slices.allocate(200)), (0, Some(0)));
        }
    }
}
