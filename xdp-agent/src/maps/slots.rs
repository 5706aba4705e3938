//! The slots of a flow table, in memory that the programs share.

use std::{
    marker::PhantomData,
    sync::atomic::{AtomicU64, Ordering, fence},
};

use xdp_common::{
    conntrack::rewrite,
    net::{FlowKey, Plain},
    tables::{CLAIMED, FREE, Flow, Slot},
};

use super::mapping::Mapping;
use crate::cluster::wanted::IpAddress;

/// Words of the longest slot.
const WORDS_MAX: usize = 16;
/// How often a change is tried again that a packet has crossed.
const TRIES_MAX: usize = 16;

/// Words of a slot: the kernel keeps the values of an array at multiples of eight bytes.
pub(super) const fn words<A: IpAddress>() -> usize {
    size_of::<Slot<A>>().div_ceil(8)
}

/// Slots, whose entries programs insert, change and remove at any time.
#[derive(Debug)]
pub(super) struct Slots<A, W = Mapping> {
    words: W,
    family: PhantomData<A>,
}

impl<A: IpAddress, W: AsRef<[AtomicU64]>> Slots<A, W> {
    pub(super) fn new(words: W) -> Self {
        Self { words, family: PhantomData }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.words.as_ref().len() / words::<A>()
    }

    /// The bytes of a slot, whatever they are.
    pub(super) fn copy(&self, index: usize) -> Slot<A> {
        const { assert!(words::<A>() <= WORDS_MAX) };
        let mut copy = [0u64; WORDS_MAX];
        for (copy, word) in copy.iter_mut().zip(self.of(index)) {
            *copy = word.load(Ordering::Relaxed);
        }
        from_words(&copy)
    }

    /// The entry in a slot that a key word publishes, if it did not change hands while it was read.
    pub(super) fn entry(&self, index: usize) -> Option<Slot<A>> {
        let end = self.end(index).load(Ordering::Acquire);
        if end == FREE || end & CLAIMED != 0 {
            return None;
        }
        let slot = self.copy(index);
        fence(Ordering::Acquire);
        (self.end(index).load(Ordering::Relaxed) == end && slot.key.end() == end).then_some(slot)
    }

    /// Removes the entry of a key from a slot, and says what it was; nothing when the slot is not the key's.
    pub(super) fn take(&self, index: usize, key: &FlowKey<A>) -> Option<Flow<A>> {
        self.take_as_seen(index, &self.entry(index).filter(|slot| slot.key == *key)?)
    }

    /// The same for an entry that has been seen in the slot, and may be gone by now.
    fn take_as_seen(&self, index: usize, before: &Slot<A>) -> Option<Flow<A>> {
        let (key, end) = (&before.key, self.end(index));
        end.compare_exchange(key.end(), FREE, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        // A packet may have come in between. What it has left is there as long as nobody claims the slot.
        let after = self.copy(index);
        fence(Ordering::Acquire);
        if end.load(Ordering::Relaxed) != FREE {
            return Some(before.flow);
        }
        if (after.key.src, after.key.dst) != (key.src, key.dst) {
            // The slot had changed hands meanwhile, to a key of the same ports: it is that one's entry which was taken.
            let _ = end.compare_exchange(FREE, key.end(), Ordering::AcqRel, Ordering::Relaxed);
            return None;
        }
        Some(if is_of(&after, key, &before.flow) { after.flow } else { before.flow })
    }

    /// Puts an entry back into the slot that it was taken from; false when that holds something else by now.
    pub(super) fn restore(&self, index: usize, key: &FlowKey<A>, flow: &Flow<A>) -> bool {
        let is_left = || is_of(&self.copy(index), key, flow);
        let end = self.end(index);
        let exchange = |from, to| end.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if !is_left() || !exchange(FREE, key.end()) {
            return false;
        }
        fence(Ordering::Acquire);
        // Meanwhile another entry may have come and gone there.
        is_left() || !exchange(key.end(), FREE)
    }

    /// Changes the entry of a key in a slot, beside what packets change in it meanwhile; false when the slot is not the key's.
    pub(super) fn change(&self, index: usize, key: &FlowKey<A>, change: impl Fn(&mut Flow<A>)) -> bool {
        for _ in 0..TRIES_MAX {
            let Some(before) = self.entry(index).filter(|slot| slot.key == *key) else { return false };
            let mut after = before;
            change(&mut after.flow);
            let words = to_words(&before).into_iter().zip(to_words(&after)).zip(self.of(index));
            let changed: Vec<_> = words.filter(|((old, new), _)| old != new).collect();
            let is_done = changed.iter().all(|((old, new), word)| {
                word.compare_exchange(*old, *new, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            });
            if !is_done {
                continue;
            }
            if self.copy(index).key == *key {
                return true;
            }
            // The slot is another key's by now, whose entry had the same words.
            for ((old, new), word) in changed {
                let _ = word.compare_exchange(new, old, Ordering::AcqRel, Ordering::Relaxed);
            }
            return false;
        }
        false
    }

    /// The last key word of a slot.
    fn end(&self, index: usize) -> &AtomicU64 {
        &self.of(index)[std::mem::offset_of!(FlowKey<A>, sport) / 8]
    }

    fn of(&self, index: usize) -> &[AtomicU64] {
        &self.words.as_ref()[index * words::<A>()..][..words::<A>()]
    }
}

/// Whether a slot has what an entry of a key had left there, but for its last key word and what packets change.
fn is_of<A: IpAddress>(slot: &Slot<A>, key: &FlowKey<A>, flow: &Flow<A>) -> bool {
    (slot.key.src, slot.key.dst) == (key.src, key.dst) && rewrite(&slot.flow) == rewrite(flow)
}

fn from_words<A: IpAddress>(words: &[u64; WORDS_MAX]) -> Slot<A> {
    const { Slot::<A>::PROOF };
    // SAFETY: the array is longer than a `Slot`, of which any bytes are a value (`Plain`).
    unsafe { std::mem::transmute_copy(words) }
}

fn to_words<A: IpAddress>(slot: &Slot<A>) -> [u64; WORDS_MAX] {
    const { Slot::<A>::PROOF };
    let mut words = [0u64; WORDS_MAX];
    // SAFETY: the array is longer than a `Slot`, which has no padding (`Plain`).
    unsafe {
        std::ptr::copy_nonoverlapping(
            (&raw const *slot).cast::<u8>(),
            words.as_mut_ptr().cast(),
            size_of::<Slot<A>>(),
        )
    }
    words
}

#[cfg(test)]
mod tests {
    use xdp_common::{
        net::{Ip6, UDP},
        tables::{closing, kind},
    };

    use super::*;

    type Words = Vec<AtomicU64>;

    fn table<A: IpAddress>(entries: &[(usize, Slot<A>)]) -> Slots<A, Words> {
        let words: Words = (0..4 * words::<A>()).map(|_| AtomicU64::new(0)).collect();
        let slots = Slots::new(words);
        for (index, slot) in entries {
            for (place, word) in slots.of(*index).iter().zip(to_words(slot)) {
                place.store(word, Ordering::Relaxed);
            }
        }
        slots
    }

    fn slot<A: IpAddress>(port: u8) -> Slot<A> {
        let key = FlowKey { sport: [0, port], dport: [0, 53], proto: UDP, ..FlowKey::ZERO };
        let flow =
            Flow { sport: [128, port], seen: 7, kind: kind::FORWARD, closing: closing::FIN, ..Flow::ZERO };
        Slot { key, flow }
    }

    fn is_found_changed_and_taken<A: IpAddress>() {
        let slots = table(&[(1, slot::<A>(1)), (3, slot::<A>(2))]);
        assert_eq!(slots.len(), 4);
        let found: Vec<_> = (0..4).filter_map(|index| slots.entry(index)).collect();
        assert_eq!(found, [slot(1), slot(2)]);
        let key = slot::<A>(2).key;
        assert!(slots.change(3, &key, |flow| flow.closing |= closing::RST));
        let changed = Flow { closing: closing::FIN | closing::RST, ..slot::<A>(2).flow };
        assert_eq!(slots.entry(3), Some(Slot { key, flow: changed }));
        assert!(!slots.change(1, &key, |flow| flow.closing = 0), "another key's");
        assert_eq!(slots.take(1, &key), None, "another key's");
        assert_eq!(slots.take(3, &key), Some(changed));
        assert_eq!((slots.entry(3), slots.take(3, &key)), (None, None));
        assert!(!slots.restore(2, &key, &changed) && !slots.restore(1, &key, &changed), "where it was not");
        assert!(slots.restore(3, &key, &changed));
        assert_eq!(slots.take(3, &key), Some(changed));
        assert_eq!(slots.entry(1), Some(slot(1)), "the other is left alone");
    }

    #[test]
    fn an_entry_is_found_changed_and_taken() {
        is_found_changed_and_taken::<[u8; 4]>();
        is_found_changed_and_taken::<Ip6>();
    }

    #[test]
    fn a_slot_that_a_program_writes_is_nobodys() {
        let slots = table(&[(0, slot::<[u8; 4]>(1))]);
        slots.end(0).store(CLAIMED, Ordering::Relaxed);
        assert_eq!((slots.entry(0), slots.take(0, &slot(1).key)), (None, None));
        assert!(!slots.change(0, &slot(1).key, |flow| flow.closing = 0));
        assert_eq!(slots.end(0).load(Ordering::Relaxed), CLAIMED);
    }

    #[test]
    fn a_slot_that_has_come_to_another_key_of_the_same_ports_is_left_to_it() {
        let slots = table(&[(0, slot::<[u8; 4]>(1))]);
        let other = Slot { key: FlowKey { src: [10, 0, 0, 9], ..slot(1).key }, ..slot(1) };
        assert_eq!(slots.entry(0), Some(slot(1)));
        for (place, word) in slots.of(0).iter().zip(to_words(&other)) {
            place.store(word, Ordering::Relaxed);
        }
        assert_eq!(slots.take_as_seen(0, &slot(1)), None);
        assert_eq!(slots.entry(0), Some(other), "it is the other's, and there");
        assert_eq!(slots.take(0, &other.key), Some(other.flow));
    }

    #[test]
    fn a_change_that_packets_cross_is_tried_again() {
        let slots = table(&[(2, slot::<[u8; 4]>(1))]);
        let key = slot(1).key;
        let seen = (size_of::<FlowKey<[u8; 4]>>() + std::mem::offset_of!(Flow<[u8; 4]>, seen)) / 8;
        let comes = std::cell::Cell::new(3);
        // A packet comes between the look at the entry and each of the first writes.
        let is_changed = slots.change(2, &key, |flow| {
            if comes.replace(comes.get() - 1) > 0 {
                slots.of(2)[seen].fetch_add(1 << 32, Ordering::Relaxed);
            }
            (flow.closing, flow.seen) = (closing::RST, 100);
        });
        assert!(is_changed && comes.get() < 0, "tried until no packet came");
        assert_eq!(slots.entry(2).map(|slot| (slot.flow.closing, slot.flow.seen)), Some((closing::RST, 100)));
    }
}
