//! Fragments: the ports of their packets, and those that came before them.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
};

use aya::{
    Ebpf,
    maps::{HashMap, MapData, RingBuf},
};
use xdp_common::{
    fragment::{FragmentKey, FragmentPorts, Hold},
    tables::{self, Mapped},
};

use super::{Raw, handles::absent_is_none, io_error, raw, take};
use crate::cluster::wanted::IpAddress;

/// Ports of fragmented packets.
pub struct FragmentMap<A: IpAddress>(HashMap<MapData, Raw<FragmentKey<A>>, Raw<FragmentPorts>>);

impl<A: IpAddress> std::fmt::Debug for FragmentMap<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FragmentMap").finish_non_exhaustive()
    }
}

impl<A: IpAddress> FragmentMap<A> {
    pub(super) fn open(ebpf: &mut Ebpf) -> anyhow::Result<Self> {
        Ok(Self(HashMap::try_from(take(ebpf, &<A as Mapped>::MAPS.fragments)?)?))
    }

    /// What the first fragment of a packet has said, if it has come.
    ///
    /// # Errors
    /// When the kernel refuses the read.
    pub fn ports(&self, key: &FragmentKey<A>) -> io::Result<Option<FragmentPorts>> {
        absent_is_none(self.0.get(&raw(*key), 0))
    }

    /// Says it in the place of one that has not come.
    ///
    /// # Errors
    /// When the kernel refuses the write.
    pub fn set_ports(&mut self, key: &FragmentKey<A>, ports: FragmentPorts) -> io::Result<()> {
        self.0.insert(raw(*key), raw(ports), 0).map_err(io_error)
    }
}

/// A fragment that came before its first, or that first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldFragment {
    /// Index of the interface that it came in by; 0 for the first, which has not been kept.
    pub ifindex: u32,
    /// Its frame.
    pub frame: Vec<u8>,
}

impl HeldFragment {
    /// Whether it is the first, for which others wait.
    pub fn is_first(&self) -> bool {
        self.ifindex == 0
    }
}

/// Fragments that came before their first, as the programs hand them over.
pub struct HeldFragments(RingBuf<MapData>);

impl std::fmt::Debug for HeldFragments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeldFragments").finish_non_exhaustive()
    }
}

impl HeldFragments {
    pub(super) fn open(ebpf: &mut Ebpf) -> anyhow::Result<Self> {
        Ok(Self(RingBuf::try_from(take(ebpf, &tables::HELD)?)?))
    }

    /// Lets go what an earlier agent has left: it may be older than the kernel would put together. How many they were is the answer.
    pub fn forget(&mut self) -> usize {
        // As many as there can be; programs may go on while this does.
        (0..tables::HELD.entries).take_while(|_| self.0.next().is_some()).count()
    }

    /// The oldest of them, which is taken.
    pub fn take(&mut self) -> Option<HeldFragment> {
        self.0.next().and_then(|record| held(&record))
    }
}

/// Readable when there are any.
impl AsRawFd for HeldFragments {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A record of the ring: the beginning of a [`Hold`].
fn held(record: &[u8]) -> Option<HeldFragment> {
    let (ifindex, frame) = record.split_first_chunk::<{ std::mem::offset_of!(Hold, frame) }>()?;
    Some(HeldFragment { ifindex: u32::from_ne_bytes(*ifindex), frame: frame.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_an_interface_and_a_frame() {
        let record = [&7u32.to_ne_bytes()[..], b"frame"].concat();
        assert_eq!(held(&record), Some(HeldFragment { ifindex: 7, frame: b"frame".to_vec() }));
        assert_eq!(held(&record[..3]), None);
    }
}
