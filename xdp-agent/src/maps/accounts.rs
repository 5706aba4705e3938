//! What every service port has carried.

use std::{io, os::fd::OwnedFd};

use aya::{
    Ebpf,
    maps::{MapData, PerCpuArray},
    util::nr_cpus,
};
use xdp_common::tables::{Account, MapSpec};

use super::{Raw, batch, capacity, descriptor, io_error, raw, take};

/// Accounts of service ports, by service id.
pub struct Accounts {
    map: PerCpuArray<MapData, Raw<Account>>,
    fd: OwnedFd,
    capacity: u32,
    cpus: usize,
}

impl std::fmt::Debug for Accounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accounts").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl Accounts {
    pub(super) fn open(ebpf: &mut Ebpf, spec: &MapSpec) -> anyhow::Result<Self> {
        let map = take(ebpf, spec)?;
        let (fd, capacity) = (descriptor(&map)?, capacity(&map)?);
        let cpus = nr_cpus().map_err(|(file, error)| anyhow::Error::new(error).context(file))?;
        Ok(Self { map: PerCpuArray::try_from(map)?, fd, capacity, cpus })
    }

    /// Service id, packets and bytes of every account that has any, summed over all CPUs. Slot 0 is what service ports
    /// beyond the end of the map share.
    ///
    /// # Errors
    /// When the kernel refuses a read.
    pub fn read(&self) -> io::Result<Vec<(u32, u64, u64)>> {
        let mut found = Vec::new();
        let mut values = Vec::new();
        for first in (0..self.capacity).step_by(batch::BATCH) {
            let count = (self.capacity - first).min(batch::BATCH as u32);
            values.resize(count as usize * self.cpus, raw(NOTHING));
            match batch::read_array(&self.fd, first, &mut values, self.cpus) {
                Err(error) if batch::is_missing(&error) => return self.read_one_by_one(),
                result => result?,
            }
            found.extend((first..).zip(values.chunks(self.cpus)).map(|(id, of_cpus)| sum(id, of_cpus)));
        }
        found.retain(|(_, packets, _)| *packets > 0);
        Ok(found)
    }

    fn read_one_by_one(&self) -> io::Result<Vec<(u32, u64, u64)>> {
        let sums = (0..).zip(self.map.iter());
        let sums = sums.map(|(id, of_cpus)| Ok(sum(id, &of_cpus.map_err(io_error)?)));
        sums.filter(|sum| !matches!(sum, Ok((_, 0, _)))).collect()
    }
}

fn sum(id: u32, of_cpus: &[Raw<Account>]) -> (u32, u64, u64) {
    let add = |(packets, bytes), Raw(account): &Raw<Account>| {
        (u64::wrapping_add(packets, account.packets), u64::wrapping_add(bytes, account.bytes))
    };
    let (packets, bytes) = of_cpus.iter().fold((0, 0), add);
    (id, packets, bytes)
}

const NOTHING: Account = Account { packets: 0, bytes: 0 };
