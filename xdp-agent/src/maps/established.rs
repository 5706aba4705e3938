//! The table of established flows, as the garbage collection sees it.

use std::{io, os::fd::OwnedFd};

use aya::{
    Ebpf,
    maps::{HashMap, MapData},
};
use xdp_common::{
    net::FlowKey,
    tables::{self, Flow},
};

use super::{Addr, Raw, batch, descriptor, io_error, known::Known, raw, take};

/// Flows that have been answered.
pub struct EstablishedTable {
    map: HashMap<MapData, Raw<FlowKey<Addr>>, Raw<Flow<Addr>>>,
    fd: OwnedFd,
    capacity: u32,
    known: Known,
}

impl std::fmt::Debug for EstablishedTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EstablishedTable").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl EstablishedTable {
    pub(super) fn open(ebpf: &mut Ebpf) -> anyhow::Result<Self> {
        let map = take(ebpf, &tables::ESTABLISHED_V4)?;
        let fd = descriptor(&map)?;
        let capacity = super::capacity(&map)?;
        let map = HashMap::try_from(map)?;
        let known = Known::open(ebpf, map.keys().next().is_some())?;
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
    pub fn walk(&mut self, mut visit: impl FnMut(&FlowKey<Addr>, &Flow<Addr>)) -> io::Result<()> {
        let notes = self.known.begin();
        let result = batch::walk(&self.fd, (raw(ZERO_KEY), raw(Flow::ZERO)), |key, flow| {
            if notes {
                self.known.note(&key.0);
            }
            visit(&key.0, &flow.0);
        });
        match result {
            // One by one, entries that move meanwhile may be missed, so nothing is forgotten.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.walk_one_by_one(visit),
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
    pub fn get(&self, key: &FlowKey<Addr>) -> io::Result<Option<Flow<Addr>>> {
        match self.map.get(&raw(*key), 0).map_err(io_error) {
            Ok(flow) => Ok(Some(flow.0)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes an entry if it is there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove(&mut self, key: &FlowKey<Addr>) -> io::Result<()> {
        match self.map.remove(&raw(*key)).map_err(io_error) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
            _ => Ok(()),
        }
    }

    fn walk_one_by_one(&self, mut visit: impl FnMut(&FlowKey<Addr>, &Flow<Addr>)) -> io::Result<()> {
        // A key that goes while it is the cursor sends the walk back to the start; the capacity bounds that.
        for entry in self.map.iter().take(2 * self.capacity as usize) {
            let (key, flow) = entry.map_err(io_error)?;
            visit(&key.0, &flow.0);
        }
        Ok(())
    }
}

const ZERO_KEY: FlowKey<Addr> =
    FlowKey { src: [0; 4], dst: [0; 4], sport: [0; 2], dport: [0; 2], proto: 0, zero: [0; 3] };
