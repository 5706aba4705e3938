//! The bits of a gate and who needs them.

use std::collections::{BTreeSet, HashMap, HashSet};

use xdp_common::tables::GATE_WORDS;

use super::slices::QUARANTINE_MS;

/// One of the two gates. Several items may share a bit.
#[derive(Debug)]
pub(super) struct Gate {
    words: Vec<u64>,
    /// How many items of the plan need a bit.
    needed: HashMap<u32, u32>,
    /// Bits that are set although no item needs them, as flows may: since when, once the change that ended the need has
    /// surely been applied.
    idle: HashMap<u32, Option<u64>>,
    /// Those of them whose wait has not begun.
    leaving: Vec<u32>,
    dirty: BTreeSet<u32>,
}

impl Gate {
    /// A gate with the words that it has in the map; bits nobody asks for stay until flows are known not to need them.
    pub(super) fn new(mut words: Vec<u64>) -> Self {
        words.resize(GATE_WORDS as usize, 0);
        let mut idle = HashMap::new();
        for (word, bits) in (0..).zip(&words).filter(|(_, bits)| **bits != 0) {
            idle.extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| (word * 64 + bit, None)));
        }
        let leaving = idle.keys().copied().collect();
        Self { words, needed: HashMap::new(), idle, leaving, dirty: BTreeSet::new() }
    }

    /// An item needs a bit from now on.
    pub(super) fn need(&mut self, bit: u32) {
        *self.needed.entry(bit).or_default() += 1;
        self.idle.remove(&bit);
        let word = &mut self.words[(bit / 64) as usize];
        let set = *word | 1 << (bit % 64);
        if set != *word {
            *word = set;
            self.dirty.insert(bit / 64);
        }
    }

    /// An item needs a bit no more, but flows may.
    pub(super) fn leave(&mut self, bit: u32) {
        if self.forget(bit) {
            self.idle(bit);
        }
    }

    /// An item needs a bit no more, and its own flows are known to be gone.
    pub(super) fn drop(&mut self, bit: u32, in_use: &HashSet<u32>) {
        if self.forget(bit) {
            if in_use.contains(&bit) {
                self.idle(bit);
            } else {
                self.clear(bit);
            }
        }
    }

    /// Starts the wait for bits that were left in earlier calls.
    pub(super) fn tick(&mut self, now_ms: u64) {
        for bit in self.leaving.drain(..) {
            if let Some(since) = self.idle.get_mut(&bit) {
                since.get_or_insert(now_ms);
            }
        }
    }

    /// Clears the bits that a walk over the flow tables, begun at `started_ms`, did not find in use.
    pub(super) fn collect(&mut self, in_use: &HashSet<u32>, started_ms: u64) {
        let free = |(bit, since): (&u32, &Option<u64>)| {
            let waited = since.is_some_and(|since| since.saturating_add(QUARANTINE_MS) <= started_ms);
            (waited && !in_use.contains(bit)).then_some(*bit)
        };
        let free: Vec<u32> = self.idle.iter().filter_map(free).collect();
        for bit in free {
            self.idle.remove(&bit);
            self.clear(bit);
        }
    }

    /// The words that changed since the last call, with their new values.
    pub(super) fn take_changes(&mut self) -> Vec<(u32, u64)> {
        let dirty = std::mem::take(&mut self.dirty);
        dirty.into_iter().map(|word| (word, self.words[word as usize])).collect()
    }

    /// Every word.
    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    fn idle(&mut self, bit: u32) {
        self.idle.insert(bit, None);
        self.leaving.push(bit);
    }

    /// Takes one need back; true when it was the last.
    fn forget(&mut self, bit: u32) -> bool {
        let Some(count) = self.needed.get_mut(&bit) else { return false };
        *count -= 1;
        let last = *count == 0;
        if last {
            self.needed.remove(&bit);
        }
        last
    }

    fn clear(&mut self, bit: u32) {
        self.words[(bit / 64) as usize] &= !(1 << (bit % 64));
        self.dirty.insert(bit / 64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_bit_stays_until_the_last_item_and_the_last_flow_are_gone() {
        let mut gate = Gate::new(Vec::new());
        gate.need(70);
        gate.need(70);
        assert_eq!(gate.take_changes(), [(1, 1 << 6)]);
        gate.leave(70);
        gate.leave(70);
        gate.tick(0);
        gate.collect(&HashSet::new(), 999);
        assert_eq!(gate.take_changes(), [], "a walk begun too early must not judge");
        gate.collect(&HashSet::from([70]), 1_000);
        assert_eq!(gate.take_changes(), []);
        gate.collect(&HashSet::new(), 1_000);
        assert_eq!(gate.take_changes(), [(1, 0)]);
    }

    #[test]
    fn a_bit_that_is_needed_again_is_not_cleared() {
        let mut gate = Gate::new(vec![0b11]);
        gate.tick(0);
        gate.need(0);
        gate.collect(&HashSet::new(), 5_000);
        assert_eq!(gate.take_changes(), [(0, 0b01)]);
    }
}
