//! The table of established flows, as the garbage collection sees it: an array of slots, and a hash for what has found its places
//! there taken.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use anyhow::Context;
use aya::{
    Ebpf,
    maps::{HashMap, MapData},
};
use xdp_common::{
    net::FlowKey,
    select,
    tables::{Flow, Slot},
};

use super::{
    BPF_NOEXIST, Raw, batch, capacity, descriptor,
    handles::{absent_is_fine, absent_is_none, present_is_fine},
    io_error,
    known::Known,
    mapping::Mapping,
    missing, raw,
    slots::{self, Slots},
    take, zero,
};
use crate::{bpf::map_take, cluster::wanted::IpAddress};

/// Replaces what is there, and inserts nothing (include/uapi/linux/bpf.h).
const BPF_EXIST: u64 = 2;

/// Flows that have been answered.
pub struct EstablishedTable<A: IpAddress> {
    slots: Slots<A>,
    overflow: HashMap<MapData, Raw<FlowKey<A>>, Raw<Flow<A>>>,
    fd: OwnedFd,
    capacity: u32,
    overflow_capacity: u32,
    known: Known,
}

/// One entry of two of a key: the first, as far as both have been met.
fn merged<A: IpAddress>(one: Flow<A>, other: &Flow<A>) -> Flow<A> {
    Flow { seen: one.seen.max(other.seen), closing: one.closing | other.closing, ..one }
}

impl<A: IpAddress> std::fmt::Debug for EstablishedTable<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EstablishedTable").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl<A: IpAddress> EstablishedTable<A> {
    pub(super) fn open(ebpf: &mut Ebpf) -> anyhow::Result<Self> {
        // The map stays with the loader, because programs are loaded by its descriptor.
        let spec = &A::MAPS.established;
        let map = ebpf.map(spec.name).with_context(|| missing(spec))?;
        let capacity = capacity(map)?;
        let mapping = Mapping::new(&descriptor(map)?, capacity, slots::words::<A>() * 8)
            .with_context(|| format!("cannot map {} (it needs kernel 5.5)", spec.name))?;
        let slots = Slots::new(mapping);
        let map = take(ebpf, &A::MAPS.overflow)?;
        let fd = descriptor(&map)?;
        let overflow_capacity = super::capacity(&map)?;
        let overflow = HashMap::try_from(map)?;
        let holds_flows =
            overflow.keys().next().is_some() || (0..slots.len()).any(|index| slots.entry(index).is_some());
        let known = Known::open(ebpf, &A::MAPS.known, holds_flows)?;
        Ok(Self { slots, overflow, fd, capacity, overflow_capacity, known })
    }

    /// Slots that the places of a key may begin at.
    pub fn homes(&self) -> u32 {
        select::homes(self.capacity)
    }

    /// Entries it has room for.
    pub fn capacity(&self) -> u32 {
        self.capacity + self.overflow_capacity
    }

    /// Calls `visit` with every entry, and lets the programs forget the keys of those that are gone. None is missed that is there all
    /// the time: entries stay where they are.
    ///
    /// # Errors
    /// When the kernel refuses a read.
    pub fn walk(&mut self, mut visit: impl FnMut(&FlowKey<A>, &Flow<A>)) -> io::Result<()> {
        let notes = self.known.begin();
        let mut visit_noted = |known: &Known, key: &FlowKey<A>, flow: &Flow<A>| {
            if notes {
                known.note(key);
            }
            visit(key, flow);
        };
        for Slot { key, flow } in (0..self.slots.len()).filter_map(|index| self.slots.entry(index)) {
            visit_noted(&self.known, &key, &flow);
        }
        let result = batch::walk(&self.fd, (zero(), zero()), |key, flow| {
            visit_noted(&self.known, &key.0, &flow.0);
        });
        match result {
            // One by one, entries that move meanwhile may be missed, so nothing is forgotten.
            Err(error) if batch::is_missing(&error) => self.walk_one_by_one(visit),
            Ok(()) if notes => {
                // Batches take whole buckets, so no entry that was there all the time is missed.
                self.known.finish();
                Ok(())
            }
            result => result,
        }
    }

    /// The entry of a key.
    ///
    /// # Errors
    /// When the kernel refuses the read.
    pub fn get(&self, key: &FlowKey<A>) -> io::Result<Option<Flow<A>>> {
        let mut slots = self.places(key).filter_map(|index| self.slots.entry(index));
        match slots.find(|slot| slot.key == *key) {
            Some(slot) => Ok(Some(slot.flow)),
            None => absent_is_none(self.overflow.get(&raw(*key), 0)),
        }
    }

    /// Changes an entry if it is there, beside what packets change in it meanwhile.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn change(&mut self, key: &FlowKey<A>, change: impl Fn(&mut Flow<A>)) -> io::Result<()> {
        if self.places(key).any(|index| self.slots.change(index, key, &change)) {
            return Ok(());
        }
        let Some(mut flow) = absent_is_none(self.overflow.get(&raw(*key), 0))? else { return Ok(()) };
        change(&mut flow);
        absent_is_fine(self.overflow.insert(raw(*key), raw(flow), BPF_EXIST).map_err(io_error))
    }

    /// Removes an entry if it is there, and says what it was; before kernel 5.14 what it was a moment before.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn take(&mut self, key: &FlowKey<A>) -> io::Result<Option<Flow<A>>> {
        // Two processors that have stored it at once may have left two.
        let taken = self.places(key).filter_map(|index| self.slots.take(index, key));
        match taken.reduce(|one, other| merged(one, &other)) {
            Some(flow) => Ok(Some(self.take_from_hash(key)?.map_or(flow, |other| merged(flow, &other)))),
            None => self.take_from_hash(key),
        }
    }

    fn take_from_hash(&mut self, key: &FlowKey<A>) -> io::Result<Option<Flow<A>>> {
        let (key_raw, mut flow): (_, Raw<Flow<A>>) = (raw(*key), zero());
        // SAFETY: the map was opened with these types, whose sizes were checked then, and any bytes are a flow.
        let taken = unsafe { map_take(self.fd.as_fd(), (&raw const key_raw).cast(), (&raw mut flow).cast()) };
        match taken {
            Ok(()) => Ok(Some(flow.0)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) if batch::is_missing(&error) => {
                let found = absent_is_none(self.overflow.get(&key_raw, 0))?;
                absent_is_fine(self.overflow.remove(&key_raw).map_err(io_error))?;
                Ok(found)
            }
            Err(error) => Err(error),
        }
    }

    /// Puts an entry back that was taken, unless there is another by now: where it was, or else into the hash, because who ends while it
    /// has claimed a slot leaves it claimed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn put_back(&mut self, key: &FlowKey<A>, flow: &Flow<A>) -> io::Result<()> {
        if self.places(key).any(|index| self.slots.entry(index).is_some_and(|slot| slot.key == *key)) {
            return Ok(());
        }
        if self.places(key).any(|index| self.slots.restore(index, key, flow)) {
            return Ok(());
        }
        present_is_fine(self.overflow.insert(raw(*key), raw(*flow), BPF_NOEXIST).map_err(io_error))
    }

    fn places(&self, key: &FlowKey<A>) -> impl Iterator<Item = usize> + use<A> {
        select::places(key, self.capacity).map(|index| index as usize)
    }

    fn walk_one_by_one(&self, mut visit: impl FnMut(&FlowKey<A>, &Flow<A>)) -> io::Result<()> {
        // A key that goes while it is the cursor sends the walk back to the start; the capacity bounds that.
        for entry in self.overflow.iter().take(2 * self.overflow_capacity as usize) {
            let (key, flow) = entry.map_err(io_error)?;
            visit(&key.0, &flow.0);
        }
        Ok(())
    }
}
