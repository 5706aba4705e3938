//! The table of new flows, as the garbage collection sees it: an array of slots, and the tags that say which are used.

use std::sync::atomic::{Ordering, fence};

use anyhow::Context;
use aya::Ebpf;
use xdp_common::{
    net::FlowKey,
    tables::{Flow, MapSpec, WAYS},
};

use super::{
    capacity, descriptor,
    mapping::Mapping,
    missing,
    slots::{self, Slots},
};
use crate::cluster::wanted::IpAddress;

/// Words of the tags of a bucket: a lock, and one tag a way.
pub(super) const TAG_WORDS: usize = WAYS as usize + 1;

/// New flows.
#[derive(Debug)]
pub struct EmbryonicTable<A> {
    tags: Mapping,
    slots: Slots<A>,
    buckets: u32,
}

/// An entry as it was found.
#[derive(Clone, Copy, Debug)]
pub struct Found<A> {
    /// Its key.
    pub key: FlowKey<A>,
    /// Its flow.
    pub flow: Flow<A>,
    /// Index of its tag.
    place: usize,
    /// Its tag, which changes with every packet.
    tag: u64,
}

impl<A: IpAddress> EmbryonicTable<A> {
    /// Maps the table; the maps stay with the loader, because programs are loaded by their descriptors.
    pub(super) fn open(ebpf: &Ebpf) -> anyhow::Result<Self> {
        let open = |spec: &MapSpec, value_size| {
            let map = ebpf.map(spec.name).with_context(|| missing(spec))?;
            let entries = capacity(map)?;
            let mapping = Mapping::new(&descriptor(map)?, entries, value_size)
                .with_context(|| format!("cannot map {} (it needs kernel 5.5)", spec.name))?;
            anyhow::Ok((mapping, entries))
        };
        let (tags, buckets) = open(&A::MAPS.tags, TAG_WORDS * 8)?;
        let (slots, entries) = open(&A::MAPS.embryonic, slots::words::<A>() * 8)?;
        anyhow::ensure!(
            entries == buckets * WAYS,
            "the pinned maps {} and {} do not fit each other; start with --fresh",
            A::MAPS.embryonic.name,
            A::MAPS.tags.name
        );
        Ok(Self { tags, slots: Slots::new(slots), buckets })
    }

    /// Buckets, of [`WAYS`] slots each.
    pub fn buckets(&self) -> u32 {
        self.buckets
    }

    /// Entries it has room for.
    pub fn capacity(&self) -> u32 {
        self.buckets * WAYS
    }

    /// Every entry that did not change while it was read.
    pub fn read(&self) -> Vec<Found<A>> {
        let mut found = Vec::new();
        for bucket in 0..self.buckets as usize {
            for way in 0..WAYS as usize {
                let place = bucket * TAG_WORDS + 1 + way;
                let tag = self.tags.words()[place].load(Ordering::Acquire);
                if tag == 0 {
                    continue;
                }
                let embryo = self.slots.copy(bucket * WAYS as usize + way);
                fence(Ordering::Acquire);
                if self.tags.words()[place].load(Ordering::Relaxed) == tag {
                    found.push(Found { key: embryo.key, flow: embryo.flow, place, tag });
                }
            }
        }
        found
    }

    /// Frees an entry, unless a packet has touched it since it was read.
    pub fn remove(&mut self, found: &Found<A>) -> bool {
        let place = &self.tags.words()[found.place];
        place.compare_exchange(found.tag, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}
