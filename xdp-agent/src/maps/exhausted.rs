//! Toward which backends new flows have found no source port.

use std::{io, net::SocketAddr};

use aya::Ebpf;
use xdp_common::tables::{BackendKey, Mapped};

use super::{Raw, handles::Hash, raw, take};
use crate::cluster::wanted::{IpAddress, Protocol};

/// How often new flows have found no source port, by backend.
pub struct ExhaustedMap<A: IpAddress>(Hash<Raw<BackendKey<A>>, u64>);

impl<A: IpAddress> std::fmt::Debug for ExhaustedMap<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExhaustedMap").finish_non_exhaustive()
    }
}

impl<A: IpAddress> ExhaustedMap<A> {
    pub(super) fn open(ebpf: &mut Ebpf) -> anyhow::Result<Self> {
        Hash::of(take(ebpf, &<A as Mapped>::MAPS.exhausted)?).map(Self)
    }

    /// Backends, their protocols, and how often.
    ///
    /// # Errors
    /// When the kernel refuses a read.
    pub fn read(&self) -> io::Result<Vec<(SocketAddr, Protocol, u64)>> {
        let zero = BackendKey { addr: A::UNSPECIFIED, port: [0; 2], proto: 0, zero: 0 };
        let entries = self.0.read((raw(zero), 0))?;
        let named = |(Raw(key), times): (Raw<BackendKey<A>>, u64)| {
            let socket = SocketAddr::new(key.addr.to_ip(), u16::from_be_bytes(key.port));
            Some((socket, Protocol::of_number(key.proto)?, times))
        };
        Ok(entries.into_iter().filter_map(named).collect())
    }
}
