//! The table of established flows, as the garbage collection sees it.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use aya::{
    Ebpf,
    maps::{HashMap, MapData},
};
use xdp_common::{net::FlowKey, tables::Flow};

use super::{
    BPF_NOEXIST, Raw, batch, descriptor,
    handles::{absent_is_fine, absent_is_none, present_is_fine},
    io_error,
    known::Known,
    raw, take, zero,
};
use crate::{bpf::map_take, cluster::wanted::IpAddress};

/// Replaces what is there, and inserts nothing (include/uapi/linux/bpf.h).
const BPF_EXIST: u64 = 2;

/// Flows that have been answered.
pub struct EstablishedTable<A: IpAddress> {
    map: HashMap<MapData, Raw<FlowKey<A>>, Raw<Flow<A>>>,
    fd: OwnedFd,
    capacity: u32,
    known: Known,
}

impl<A: IpAddress> std::fmt::Debug for EstablishedTable<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EstablishedTable").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl<A: IpAddress> EstablishedTable<A> {
    pub(super) fn open(ebpf: &mut Ebpf) -> anyhow::Result<Self> {
        let map = take(ebpf, &A::MAPS.established)?;
        let fd = descriptor(&map)?;
        let capacity = super::capacity(&map)?;
        let map = HashMap::try_from(map)?;
        let known = Known::open(ebpf, &A::MAPS.known, map.keys().next().is_some())?;
        Ok(Self { map, fd, capacity, known })
    }

    /// Entries it has room for.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Calls `visit` with every entry, and lets the programs forget the keys of those that are gone.
    ///
    /// # Errors
    /// When the kernel refuses a read.
    pub fn walk(&mut self, mut visit: impl FnMut(&FlowKey<A>, &Flow<A>)) -> io::Result<()> {
        let notes = self.known.begin();
        let result = batch::walk(&self.fd, (zero(), zero()), |key, flow| {
            if notes {
                self.known.note(&key.0);
            }
            visit(&key.0, &flow.0);
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
        absent_is_none(self.map.get(&raw(*key), 0))
    }

    /// Replaces an entry that is there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn replace(&mut self, key: &FlowKey<A>, flow: &Flow<A>) -> io::Result<()> {
        absent_is_fine(self.map.insert(raw(*key), raw(*flow), BPF_EXIST).map_err(io_error))
    }

    /// Removes an entry if it is there, and says what it was; before kernel 5.14 what it was a moment before.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn take(&mut self, key: &FlowKey<A>) -> io::Result<Option<Flow<A>>> {
        let (key_raw, mut flow): (_, Raw<Flow<A>>) = (raw(*key), zero());
        // SAFETY: the map was opened with these types, whose sizes were checked then, and any bytes are a flow.
        let taken = unsafe { map_take(self.fd.as_fd(), (&raw const key_raw).cast(), (&raw mut flow).cast()) };
        match taken {
            Ok(()) => Ok(Some(flow.0)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) if batch::is_missing(&error) => {
                let found = self.get(key)?;
                absent_is_fine(self.map.remove(&key_raw).map_err(io_error))?;
                Ok(found)
            }
            Err(error) => Err(error),
        }
    }

    /// Puts an entry back that was taken, unless there is another by now.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn put_back(&mut self, key: &FlowKey<A>, flow: &Flow<A>) -> io::Result<()> {
        present_is_fine(self.map.insert(raw(*key), raw(*flow), BPF_NOEXIST).map_err(io_error))
    }

    fn walk_one_by_one(&self, mut visit: impl FnMut(&FlowKey<A>, &Flow<A>)) -> io::Result<()> {
        // A key that goes while it is the cursor sends the walk back to the start; the capacity bounds that.
        for entry in self.map.iter().take(2 * self.capacity as usize) {
            let (key, flow) = entry.map_err(io_error)?;
            visit(&key.0, &flow.0);
        }
        Ok(())
    }
}
