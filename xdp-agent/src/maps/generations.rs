//! The generations of backends, read by those who do not write them.

use std::{io, path::Path};

use xdp_common::tables::Backend;

use super::{Raw, handles::Slots, image::open_pinned, io_error};
use crate::cluster::wanted::IpAddress;

/// A second handle of the backends, by their pin.
pub struct Generations<A: IpAddress>(Slots<Raw<Backend<A>>>);

impl<A: IpAddress> std::fmt::Debug for Generations<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generations").finish_non_exhaustive()
    }
}

impl<A: IpAddress> Generations<A> {
    pub(super) fn open(dir: &Path) -> anyhow::Result<Self> {
        Ok(Self(Slots::of(open_pinned(dir, &A::MAPS.backends)?)?))
    }

    /// The generation of a backend, unless its slot is free.
    ///
    /// # Errors
    /// When the kernel refuses the read.
    pub fn generation(&self, id: u32) -> io::Result<Option<u32>> {
        let Raw(backend) = self.0.map.get(&id, 0).map_err(io_error)?;
        Ok((backend.proto != 0).then_some(backend.generation))
    }
}
