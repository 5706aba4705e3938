//! Which keys the established table may hold, begun anew now and then so that what is gone is forgotten.

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use aya::Ebpf;
use xdp_common::{
    net::{Address, FlowKey},
    select::known_bit,
    tables::{KNOWN_WORDS, MapSpec},
};

use super::{capacity, descriptor, mapping::Mapping, missing};

/// Words in a half.
const WORDS: usize = KNOWN_WORDS as usize;
/// The word that names the half in use in its lowest bit.
const IN_USE: usize = 2 * WORDS;
/// Bit of that word which says that the others mean something.
const VALID: u64 = 2;

/// The bits in both halves.
///
/// Programs set the bits of what they insert in both. A walk over the table fills the half that is not in use, and the
/// walk after it switches: so programs never read a half that is being emptied, and a key that one of them was about to
/// insert when its half was emptied has been noted again long before.
#[derive(Debug)]
pub(super) struct Known<W = Mapping> {
    mapping: W,
    /// Whether the half that is not in use has the bits of all keys.
    is_refilled: bool,
}

impl Known {
    /// Maps the bits. New ones beside a table that holds flows, whose own were lost, say of every key that it may be known.
    pub(super) fn open(ebpf: &Ebpf, spec: &MapSpec, holds_flows: bool) -> anyhow::Result<Self> {
        let map = ebpf.map(spec.name).with_context(|| missing(spec))?;
        let mapping = Mapping::new(&descriptor(map)?, capacity(map)?, 8)
            .with_context(|| format!("cannot map {} (it needs kernel 5.5)", spec.name))?;
        Ok(Self::new(mapping, holds_flows))
    }
}

impl<W: AsRef<[AtomicU64]>> Known<W> {
    fn new(mapping: W, holds_flows: bool) -> Self {
        let words = mapping.as_ref();
        if words[IN_USE].load(Ordering::SeqCst) & VALID == 0 {
            let all = if holds_flows { u64::MAX } else { 0 };
            words[..IN_USE].iter().for_each(|word| word.store(all, Ordering::SeqCst));
            words[IN_USE].store(VALID, Ordering::SeqCst);
        }
        Self { mapping, is_refilled: false }
    }

    /// Says whether the walk that begins now is to note its keys: every second one does.
    pub(super) fn begin(&mut self) -> bool {
        let words = self.mapping.as_ref();
        if std::mem::take(&mut self.is_refilled) {
            words[IN_USE].fetch_xor(1, Ordering::SeqCst);
            return false;
        }
        for word in &words[self.other()..][..WORDS] {
            word.store(0, Ordering::SeqCst);
        }
        true
    }

    /// Notes a key that a walk has found.
    pub(super) fn note<A: Address>(&self, key: &FlowKey<A>) {
        let bit = known_bit(key);
        let word = &self.mapping.as_ref()[self.other() + bit as usize / 64];
        word.fetch_or(1 << (bit % 64), Ordering::SeqCst);
    }

    /// The walk has found every key.
    pub(super) fn finish(&mut self) {
        self.is_refilled = true;
    }

    /// First word of the half that is not in use.
    fn other(&self) -> usize {
        let in_use = self.mapping.as_ref()[IN_USE].load(Ordering::SeqCst) as usize & 1;
        (1 - in_use) * WORDS
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    type Addr = [u8; 4];
    type Words = Vec<AtomicU64>;

    fn words() -> Words {
        (0..=IN_USE).map(|_| AtomicU64::new(0)).collect()
    }

    fn key(number: u16) -> FlowKey<Addr> {
        FlowKey {
            src: [198, 51, 100, 7],
            dst: [10, 96, 0, 1],
            sport: number.to_be_bytes(),
            dport: [0, 80],
            proto: 6,
            zero: [0; 3],
        }
    }

    /// What a program reads.
    fn may_know(words: &Words, key: &FlowKey<Addr>) -> bool {
        let bit = known_bit(key);
        let half = words[IN_USE].load(Ordering::SeqCst) as usize & 1;
        words[half * WORDS + bit as usize / 64].load(Ordering::SeqCst) >> (bit % 64) & 1 == 1
    }

    /// What a program writes.
    fn note_known(words: &Words, key: &FlowKey<Addr>) {
        let bit = known_bit(key);
        for half in [0, WORDS] {
            words[half + bit as usize / 64].fetch_or(1 << (bit % 64), Ordering::SeqCst);
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u16),
        Remove(u16),
        /// A walk during which this key is inserted after its bucket was passed.
        Walk(u16),
    }

    proptest! {
        #[test]
        fn what_the_table_holds_is_known_at_every_moment(
            steps in proptest::collection::vec(prop_oneof![
                any::<u16>().prop_map(Step::Insert),
                any::<u16>().prop_map(Step::Remove),
                any::<u16>().prop_map(Step::Walk),
            ], 1..60),
        ) {
            let mut known = Known::new(words(), false);
            let mut table = HashSet::new();
            for step in steps {
                match step {
                    Step::Insert(number) => {
                        note_known(&known.mapping, &key(number));
                        table.insert(number);
                    }
                    Step::Remove(number) => _ = table.remove(&number),
                    Step::Walk(late) => {
                        let notes = known.begin();
                        table.iter().filter(|_| notes).for_each(|number| known.note(&key(*number)));
                        note_known(&known.mapping, &key(late));
                        table.insert(late);
                        if notes {
                            known.finish();
                        }
                    }
                }
                for number in &table {
                    prop_assert!(may_know(&known.mapping, &key(*number)));
                }
            }
        }
    }

    #[test]
    fn what_is_gone_is_forgotten_after_two_walks() {
        let mut known = Known::new(words(), false);
        note_known(&known.mapping, &key(1));
        for _ in 0..2 {
            if known.begin() {
                known.finish();
            }
        }
        assert!(!may_know(&known.mapping, &key(1)));
    }

    #[test]
    fn new_bits_beside_old_flows_hide_none_of_them() {
        let known = Known::new(words(), true);
        assert!((0..100).all(|number| may_know(&known.mapping, &key(number))));
        let again = Known::new(known.mapping, true);
        assert!(may_know(&again.mapping, &key(1)), "once they mean something they stay");
    }
}
