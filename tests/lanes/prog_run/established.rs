//! The established table as tests see it: its slots, and the hash behind them.

use std::os::fd::{AsFd as _, OwnedFd};

use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData},
};
use xdp_common::{
    net::FlowKey,
    select,
    tables::{Flow, Mapped as _, Slot},
};

use crate::{
    batch,
    family::Hosts,
    maps::{Raw, descriptor, map},
};

/// Words of 64 bits that the kernel gives a slot.
const fn words<F: Hosts>() -> usize {
    size_of::<Slot<F::Addr>>().div_ceil(8)
}

/// The hash.
type Overflow<A> = HashMap<MapData, Raw<FlowKey<A>>, Raw<Flow<A>>>;
/// A key and its flow.
type Entry<A> = (FlowKey<A>, Flow<A>);

/// Both maps of a family.
pub(crate) struct Established<F: Hosts> {
    slots: Array<MapData, Raw<Slot<F::Addr>>>,
    slots_fd: OwnedFd,
    overflow: Overflow<F::Addr>,
}

impl<F: Hosts> Established<F> {
    pub(crate) fn of(object: &Ebpf) -> Self {
        let maps = F::Addr::MAPS;
        Self {
            slots: map(object, &maps.established),
            slots_fd: descriptor(object, maps.established.name),
            overflow: map(object, &maps.overflow),
        }
    }

    /// Every entry.
    pub(crate) fn entries(&self) -> Vec<Entry<F::Addr>> {
        let (slots, words) = (self.slots.len(), words::<F>());
        let mut read = vec![0u64; slots as usize * words];
        let is_read = batch::read(self.slots_fd.as_fd(), &mut read, slots);
        let used = (0..slots).zip(read.chunks(words));
        let used = used.filter(|(_, slot)| !is_read || slot.iter().any(|word| *word != 0));
        let slots = used.map(|(index, _)| self.slots.get(&index, 0).expect("a slot").0);
        let overflow = self.overflow.iter().flatten().map(|(key, flow)| (key.0, flow.0));
        slots.filter(|slot| slot.key.proto != 0).map(|slot| (slot.key, slot.flow)).chain(overflow).collect()
    }

    /// How many entries have found no place among the slots.
    pub(crate) fn overflowed(&self) -> usize {
        self.overflow.keys().count()
    }

    /// The entry of a key.
    pub(crate) fn get(&self, key: &FlowKey<F::Addr>) -> Option<Flow<F::Addr>> {
        match self.slot_of(key) {
            Some((_, slot)) => Some(slot.flow),
            None => self.overflow.get(&Raw(*key), 0).ok().map(|flow| flow.0),
        }
    }

    /// Writes another flow over the entry of a key.
    pub(crate) fn replace(&mut self, key: &FlowKey<F::Addr>, flow: Flow<F::Addr>) {
        match self.slot_of(key) {
            Some((index, slot)) => self.slots.set(index, Raw(Slot { flow, ..slot }), 0).expect("a slot"),
            None => self.overflow.insert(Raw(*key), Raw(flow), 0).expect("a flow that is there"),
        }
    }

    /// Removes every entry.
    pub(crate) fn clear(&mut self) {
        let slots = self.slots.len();
        if !batch::clear(self.slots_fd.as_fd(), slots, words::<F>()) {
            let free = Raw(Slot { key: FlowKey::ZERO, flow: Flow::ZERO });
            (0..slots).for_each(|index| self.slots.set(index, free, 0).expect("a slot"));
        }
        let keys: Vec<_> = self.overflow.keys().flatten().collect();
        keys.iter().for_each(|key| self.overflow.remove(key).expect("a flow that is there"));
    }

    fn slot_of(&self, key: &FlowKey<F::Addr>) -> Option<(u32, Slot<F::Addr>)> {
        let mut slots = select::places(key, self.slots.len()).filter_map(|index| {
            let slot = self.slots.get(&index, 0).ok()?;
            Some((index, slot.0))
        });
        slots.find(|(_, slot)| slot.key == *key)
    }
}
