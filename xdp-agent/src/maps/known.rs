//! Which keys the established table may hold, begun anew now and then so that what is gone is forgotten.

use std::sync::atomic::Ordering;

use anyhow::Context;
use aya::Ebpf;
use xdp_common::{
    net::FlowKey,
    select::known_bit,
    tables::{self, KNOWN_WORDS},
};

use super::{Addr, capacity, descriptor, mapping::Mapping, missing};

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
pub(super) struct Known {
    mapping: Mapping,
    /// Whether the half that is not in use has the bits of all keys.
    is_refilled: bool,
}

impl Known {
    /// Maps the bits. New ones beside a table that holds flows, whose own were lost, say of every key that it may be known.
    pub(super) fn open(ebpf: &Ebpf, holds_flows: bool) -> anyhow::Result<Self> {
        let map = ebpf.map(tables::KNOWN_V4.name).with_context(|| missing(&tables::KNOWN_V4))?;
        let mapping = Mapping::new(&descriptor(map)?, capacity(map)?, 8)
            .with_context(|| format!("cannot map {} (it needs kernel 5.5)", tables::KNOWN_V4.name))?;
        let words = mapping.words();
        if words[IN_USE].load(Ordering::SeqCst) & VALID == 0 {
            let all = if holds_flows { u64::MAX } else { 0 };
            words[..IN_USE].iter().for_each(|word| word.store(all, Ordering::SeqCst));
            words[IN_USE].store(VALID, Ordering::SeqCst);
        }
        Ok(Self { mapping, is_refilled: false })
    }

    /// Says whether the walk that begins now is to note its keys: every second one does.
    pub(super) fn begin(&mut self) -> bool {
        let words = self.mapping.words();
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
    pub(super) fn note(&self, key: &FlowKey<Addr>) {
        let bit = known_bit(key);
        let word = &self.mapping.words()[self.other() + bit as usize / 64];
        word.fetch_or(1 << (bit % 64), Ordering::SeqCst);
    }

    /// The walk has found every key.
    pub(super) fn finish(&mut self) {
        self.is_refilled = true;
    }

    /// First word of the half that is not in use.
    fn other(&self) -> usize {
        let in_use = self.mapping.words()[IN_USE].load(Ordering::SeqCst) as usize & 1;
        (1 - in_use) * WORDS
    }
}
