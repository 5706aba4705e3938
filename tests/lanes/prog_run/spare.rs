//! Loaded objects that tests hand on: the verifier takes most of a test's time, and emptied maps are as good as new ones.

use std::{
    ops::{Deref, DerefMut},
    os::fd::{AsFd as _, OwnedFd},
    sync::{Mutex, PoisonError},
    thread,
};

use aya::{
    Ebpf,
    maps::{Map, MapData, MapType, RingBuf},
    util::nr_cpus,
};

use crate::{batch, programs::Sizes};

/// Flag of a map that programs cannot write to (include/uapi/linux/bpf.h).
const BPF_F_RDONLY_PROG: u32 = 1 << 7;

/// What no test uses now.
static SPARE: Mutex<Vec<(Sizes, Ebpf)>> = Mutex::new(Vec::new());
/// How many are kept: for as many tests at a time, and some of other sizes.
const SPARE_MAX: usize = 6;

/// An object that goes back when its test is over.
pub(crate) struct Spare {
    sizes: Sizes,
    /// There until it goes back.
    object: Option<Ebpf>,
}

impl Spare {
    /// A new object.
    pub(crate) fn new(sizes: Sizes, object: Ebpf) -> Self {
        Self { sizes, object: Some(object) }
    }

    /// One that an earlier test has left, with empty maps.
    pub(crate) fn take(sizes: Sizes) -> Option<Self> {
        let object = {
            let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
            let at = spare.iter().position(|(has, _)| *has == sizes)?;
            spare.remove(at).1
        };
        for (name, map) in object.maps() {
            empty(map).unwrap_or_else(|error| panic!("{name} cannot be emptied: {error:#}"));
        }
        Some(Self::new(sizes, object))
    }
}

impl Deref for Spare {
    type Target = Ebpf;

    fn deref(&self) -> &Ebpf {
        self.object.as_ref().expect("it has not gone back")
    }
}

impl DerefMut for Spare {
    fn deref_mut(&mut self) -> &mut Ebpf {
        self.object.as_mut().expect("it has not gone back")
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        let Some(object) = self.object.take() else { return };
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        // Who looks into a failure shall not wonder what another test has to do with it.
        if !thread::panicking() {
            spare.push((self.sizes, object));
        }
        // The first has not been wanted for longest.
        if spare.len() > SPARE_MAX {
            spare.remove(0);
        }
    }
}

/// A descriptor of a map beside the object's own.
pub(crate) fn descriptor(map: &Map) -> anyhow::Result<OwnedFd> {
    let (Map::Array(data)
    | Map::PerCpuArray(data)
    | Map::HashMap(data)
    | Map::LruHashMap(data)
    | Map::LpmTrie(data)
    | Map::ProgramArray(data)
    | Map::RingBuf(data)
    | Map::SkStorage(data)) = map
    else {
        anyhow::bail!("{map:?} is of no kind that the programs use");
    };
    Ok(data.fd().as_fd().try_clone_to_owned()?)
}

/// Makes a map what it was when the object was loaded.
fn empty(map: &Map) -> anyhow::Result<()> {
    let fd = descriptor(map)?;
    let info = MapData::from_fd(fd.try_clone()?)?.info()?;
    let kind = info.map_type()?;
    // What is read-only stays, and no test runs the programs that keep something for a socket.
    if info.map_flags() & BPF_F_RDONLY_PROG != 0 || matches!(kind, MapType::ProgramArray | MapType::SkStorage)
    {
        return Ok(());
    }
    if matches!(kind, MapType::Array | MapType::PerCpuArray) {
        let copies = if kind == MapType::Array { 1 } else { nr_cpus().map_err(|(_, error)| error)? };
        let words = info.value_size().div_ceil(8) as usize * copies;
        anyhow::ensure!(batch::clear(fd.as_fd(), info.max_entries(), words), "no batches");
    } else if kind == MapType::RingBuf {
        let mut ring = RingBuf::try_from(Map::from_map_data(MapData::from_fd(fd)?)?)?;
        while ring.next().is_some() {}
    } else {
        batch::remove_all(fd.as_fd(), info.key_size() as usize)?;
    }
    Ok(())
}
