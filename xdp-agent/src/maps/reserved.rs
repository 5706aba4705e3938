//! Which ports the agent has taken from the kernel's choice: the one map that no program reads.

use std::{io, path::Path};

use aya::{
    Ebpf,
    maps::{Array, Map, MapData},
};
use xdp_common::tables::{self, MapSpec};

use super::{Layout, io_error, of, take};
use crate::reserved::Ports;

/// It outlives the agent, as what it tells of does.
pub(super) const PINNED: (&MapSpec, Layout) = (&tables::RESERVED_PORTS, of::<u32, u64>());

/// A bit for each port.
pub struct ReservedPorts(Array<MapData, u64>);

impl std::fmt::Debug for ReservedPorts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReservedPorts").finish_non_exhaustive()
    }
}

impl ReservedPorts {
    pub(super) fn of(ebpf: &mut Ebpf) -> anyhow::Result<Self> {
        Ok(Self(Array::try_from(take(ebpf, &tables::RESERVED_PORTS)?)?))
    }

    /// The map that an agent has pinned in a directory, if it has.
    ///
    /// # Errors
    /// When the pin is of something else.
    pub fn open(maps: &Path) -> io::Result<Option<Self>> {
        let path = maps.join(tables::RESERVED_PORTS.name);
        if !path.exists() {
            return Ok(None);
        }
        let map = MapData::from_pin(path).map_err(io_error)?;
        Array::try_from(Map::Array(map)).map(|map| Some(Self(map))).map_err(io_error)
    }

    /// The ports.
    ///
    /// # Errors
    /// When the kernel refuses a read.
    pub fn get(&self) -> io::Result<Ports> {
        let words = self.0.iter().map(|word| word.map_err(io_error));
        Ok(Ports::of_words(words.collect::<Result<Vec<_>, _>>()?))
    }

    /// Notes other ports.
    ///
    /// # Errors
    /// When the kernel refuses a write.
    pub fn set(&mut self, ports: &Ports) -> io::Result<()> {
        for (index, word) in (0..).zip(ports.words()) {
            self.0.set(index, word, 0).map_err(io_error)?;
        }
        Ok(())
    }
}
