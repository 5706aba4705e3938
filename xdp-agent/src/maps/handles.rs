//! Typed handles of maps that are written: hashes, arrays, and the trie of networks.

use std::{io, ops::Range, os::fd::OwnedFd};

use aya::{
    Pod,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, lpm_trie},
};
use xdp_common::tables::NetworkKey;

use super::{Raw, batch, capacity, descriptor, io_error, raw};
use crate::cluster::wanted::{IpAddress, Network};

/// What a group of writes has come to: how many are done, and why not the next one.
pub(super) type Written = (usize, io::Result<()>);

pub(super) struct Hash<K, V> {
    pub(super) map: HashMap<MapData, K, V>,
    fd: OwnedFd,
    pub(super) capacity: u32,
}

impl<K: Pod, V: Pod> Hash<K, V> {
    pub(super) fn of(map: Map) -> anyhow::Result<Self> {
        let (fd, capacity) = (descriptor(&map)?, capacity(&map)?);
        Ok(Self { map: HashMap::try_from(map)?, fd, capacity })
    }

    pub(super) fn insert(&mut self, key: K, value: V) -> io::Result<()> {
        self.map.insert(key, value, 0).map_err(io_error)
    }

    pub(super) fn insert_all(&mut self, entries: impl Iterator<Item = (K, V)>) -> Written {
        let (keys, values): (Vec<K>, Vec<V>) = entries.unzip();
        match batch::write(&self.fd, &keys, &values) {
            (_, Err(error)) if batch::is_missing(&error) => {
                batch::each(keys.into_iter().zip(values), |(key, value)| self.insert(key, value))
            }
            written => written,
        }
    }

    pub(super) fn remove(&mut self, key: &K) -> io::Result<()> {
        absent_is_fine(self.map.remove(key).map_err(io_error))
    }

    /// Every entry; `zero` is any value of the types.
    pub(super) fn read(&self, zero: (K, V)) -> io::Result<Vec<(K, V)>> {
        let mut found = Vec::new();
        match batch::walk(&self.fd, zero, |key, value| found.push((key, value))) {
            Err(error) if batch::is_missing(&error) => {
                // A key that goes while it is the cursor sends the walk back to the start; the capacity bounds that.
                let entries = self.map.iter().take(2 * self.capacity as usize);
                entries.map(|entry| entry.map_err(io_error)).collect()
            }
            result => result.map(|()| found),
        }
    }
}

pub(super) struct Slots<V: Pod> {
    pub(super) map: Array<MapData, V>,
    fd: OwnedFd,
    pub(super) capacity: u32,
}

impl<V: Pod> Slots<V> {
    pub(super) fn of(map: Map) -> anyhow::Result<Self> {
        let (fd, capacity) = (descriptor(&map)?, capacity(&map)?);
        Ok(Self { map: Array::try_from(map)?, fd, capacity })
    }

    pub(super) fn set(&mut self, index: u32, value: V) -> io::Result<()> {
        self.map.set(index, value, 0).map_err(io_error)
    }

    pub(super) fn set_all(&mut self, entries: impl Iterator<Item = (u32, V)>) -> Written {
        let (keys, values): (Vec<u32>, Vec<V>) = entries.unzip();
        self.write_all(&keys, &values)
    }

    /// Writes consecutive entries.
    pub(super) fn write(&mut self, first: u32, values: &[V]) -> io::Result<()> {
        let keys: Vec<u32> = (first..).take(values.len()).collect();
        self.write_all(&keys, values).1
    }

    fn write_all(&mut self, keys: &[u32], values: &[V]) -> Written {
        match batch::write(&self.fd, keys, values) {
            (_, Err(error)) if batch::is_missing(&error) => {
                batch::each(keys.iter().zip(values), |(key, value)| self.set(*key, *value))
            }
            written => written,
        }
    }

    /// All of it, in order; `zero` is any value of the type.
    pub(super) fn read(&self, zero: V) -> io::Result<Vec<V>> {
        let mut found = Vec::with_capacity(self.capacity as usize);
        match batch::walk(&self.fd, (0u32, zero), |_, value| found.push(value)) {
            Err(error) if batch::is_missing(&error) => {
                self.map.iter().map(|value| value.map_err(io_error)).collect()
            }
            result => result.map(|()| found),
        }
    }

    /// A part of it.
    pub(super) fn read_part(&self, part: Range<u32>, zero: V) -> io::Result<Vec<V>> {
        let part = part.start..part.end.min(self.capacity);
        let mut found = vec![zero; part.len()];
        if found.is_empty() {
            return Ok(found);
        }
        match batch::read_array(&self.fd, part.start, &mut found, 1) {
            Err(error) if batch::is_missing(&error) => {
                part.map(|at| self.map.get(&at, 0).map_err(io_error)).collect()
            }
            result => result.map(|()| found),
        }
    }
}

/// A network with its owner and its value, as the plan has it.
pub(super) type OwnedNetwork<A, V = u32> = (u32, Network<A>, V);

type TrieKey<A> = lpm_trie::Key<Raw<NetworkKey<A>>>;

/// Networks; prefix lengths in the map count the bits of the owner too.
pub(super) struct NetworkTrie<A: IpAddress, V: Pod = u32> {
    map: LpmTrie<MapData, Raw<NetworkKey<A>>, V>,
    fd: OwnedFd,
    pub(super) capacity: u32,
}

const OWNER_BITS: u32 = u32::BITS;

impl<A: IpAddress, V: Pod> NetworkTrie<A, V> {
    pub(super) fn of(map: Map) -> anyhow::Result<Self> {
        let (fd, capacity) = (descriptor(&map)?, capacity(&map)?);
        Ok(Self { map: LpmTrie::try_from(map)?, fd, capacity })
    }

    pub(super) fn insert(&mut self, owner: u32, network: Network<A>, value: V) -> io::Result<()> {
        self.map.insert(&trie_key(owner, network), value, 0).map_err(io_error)
    }

    pub(super) fn remove(&mut self, owner: u32, network: Network<A>) -> io::Result<()> {
        absent_is_fine(self.map.remove(&trie_key(owner, network)).map_err(io_error))
    }

    /// All of them; `zero` is any value of the type.
    pub(super) fn read(&self, zero: V) -> io::Result<Vec<OwnedNetwork<A, V>>> {
        let mut found = Vec::new();
        let first = trie_key(0, Network { addr: A::UNSPECIFIED, len: 0 });
        match batch::walk(&self.fd, (first, zero), |key, value| found.push(network(key, value))) {
            Err(error) if batch::is_missing(&error) => {
                let entries = self.map.iter().take(2 * self.capacity as usize);
                entries.map(|entry| entry.map(|(key, value)| network(key, value)).map_err(io_error)).collect()
            }
            result => result.map(|()| found),
        }
    }
}

fn trie_key<A: IpAddress>(owner: u32, network: Network<A>) -> TrieKey<A> {
    let key = NetworkKey { owner: owner.to_be_bytes(), addr: network.addr };
    lpm_trie::Key::new(OWNER_BITS + u32::from(network.len), raw(key))
}

fn network<A: IpAddress, V>(key: TrieKey<A>, value: V) -> OwnedNetwork<A, V> {
    let (bits, Raw(NetworkKey { owner, addr })) = (key.prefix_len(), key.data());
    // Shorter ones would span owners; nobody writes such.
    let len = bits.saturating_sub(OWNER_BITS) as u8;
    (u32::from_be_bytes(owner), Network { addr, len }, value)
}

pub(super) fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// What a look at an entry has found, or nothing where there is none.
pub(super) fn absent_is_none<T>(found: Result<Raw<T>, MapError>) -> io::Result<Option<T>> {
    match found.map_err(io_error) {
        Ok(Raw(value)) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// An entry that was to be put where there is none, and there is one by now.
pub(super) fn present_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_read_as_it_was_written() {
        for len in [0, 12, 32] {
            let written = Network { addr: [10, 96, 0, 0], len };
            let key = trie_key(1 << 31 | 7, written);
            assert_eq!(key.prefix_len(), 32 + u32::from(len));
            assert_eq!(network(key, 1), (1 << 31 | 7, written, 1));
        }
    }
}
