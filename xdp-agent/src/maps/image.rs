//! The maps that say what is served: one writer.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    mem::discriminant,
    ops::Range,
    path::Path,
};

use anyhow::Context;
use aya::maps::{Map, MapData};
use xdp_common::tables::{self, Backend, Config, Device, Frontend, FrontendKey, GATE_WORDS, MapSpec, Source};

use super::{
    Raw, batch,
    handles::{Hash, NetworkTrie, OwnedNetwork, Slots, Written},
    io_error, raw, zero,
};
use crate::{
    cluster::wanted::{IpAddress, Network},
    plan::{Adopted, Change},
};

/// Frontends, backends, rings, networks, gates, devices and settings.
pub struct ImageMaps<A: IpAddress> {
    frontends: Hash<Raw<FrontendKey<A>>, Raw<Frontend>>,
    backends: Slots<Raw<Backend<A>>>,
    rings: Slots<u32>,
    networks: NetworkTrie<A>,
    sources: NetworkTrie<A, Raw<Source<A>>>,
    ingress_gate: Slots<u64>,
    egress_gate: Slots<u64>,
    devices: Hash<u32, Raw<Device<A>>>,
}

impl<A: IpAddress> std::fmt::Debug for ImageMaps<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageMaps").finish_non_exhaustive()
    }
}

impl<A: IpAddress> ImageMaps<A> {
    /// Handles of the maps that `find` finds.
    pub(super) fn open(mut find: impl FnMut(&MapSpec) -> anyhow::Result<Map>) -> anyhow::Result<Self> {
        let maps = A::MAPS;
        Ok(Self {
            frontends: Hash::of(find(&maps.frontends)?)?,
            backends: Slots::of(find(&maps.backends)?)?,
            rings: Slots::of(find(&maps.rings)?)?,
            networks: NetworkTrie::of(find(&maps.networks)?)?,
            sources: NetworkTrie::of(find(&maps.sources)?)?,
            ingress_gate: Slots::of(find(&maps.gate_ingress)?)?,
            egress_gate: Slots::of(find(&maps.gate_egress)?)?,
            devices: Hash::of(find(&maps.devices)?)?,
        })
    }

    /// Handles of the maps that an agent has pinned in a directory, for somebody who only looks.
    ///
    /// # Errors
    /// When they are not there, or the kernel lets nobody but root look.
    pub fn pinned(dir: &Path) -> anyhow::Result<Self> {
        Self::open(|spec| open_pinned(dir, spec))
    }

    /// Entries there is room for.
    pub fn frontends_capacity(&self) -> u32 {
        self.frontends.capacity
    }

    /// Ids there are, of which 0 is never used.
    pub fn backends_capacity(&self) -> u32 {
        self.backends.capacity
    }

    /// Slots there are.
    pub fn rings_capacity(&self) -> u32 {
        self.rings.capacity
    }

    /// Networks there is room for.
    pub fn networks_capacity(&self) -> u32 {
        self.networks.capacity
    }

    /// What an earlier agent has left.
    ///
    /// # Errors
    /// When the kernel refuses a read.
    pub fn read(&self) -> io::Result<Adopted<A>> {
        let backends = (0..).zip(self.backends.read(zero())?).map(|(id, Raw(slot))| (id, slot));
        Ok(Adopted {
            frontends: self.read_frontends()?,
            backends: backends.filter(|(_, backend)| *backend != zero().0).collect(),
            ingress_gate: self.ingress_gate.read(0)?,
            egress_gate: self.egress_gate.read(0)?,
            rings: self.rings.read(0)?,
            networks: self.networks.read(0)?,
        })
    }

    /// Makes changes in their order; how many are made, which are all of them unless one was refused.
    ///
    /// # Errors
    /// What the kernel has against the first that is not made: `E2BIG` or `ENOSPC` for a full map.
    pub fn apply(&mut self, changes: &[Change<A>]) -> (usize, io::Result<()>) {
        let mut done = 0;
        let alike = changes.chunk_by(|one, next| discriminant(one) == discriminant(next));
        for group in alike.flat_map(|group| group.chunks(batch::BATCH)) {
            let (made, result) = self.apply_group(group);
            done += made;
            if result.is_err() {
                return (done, result);
            }
        }
        (done, Ok(()))
    }

    /// Makes changes that are all of the same kind.
    fn apply_group(&mut self, group: &[Change<A>]) -> Written {
        match group.first() {
            None => (0, Ok(())),
            Some(Change::Backend { .. }) => self.backends.set_all(group.iter().filter_map(|change| {
                let Change::Backend { id, value } = change else { return None };
                Some((*id, raw(*value)))
            })),
            Some(Change::IngressGate { .. }) => {
                self.ingress_gate.set_all(group.iter().filter_map(|change| {
                    let Change::IngressGate { word, bits } = change else { return None };
                    Some((*word, *bits))
                }))
            }
            Some(Change::EgressGate { .. }) => self.egress_gate.set_all(group.iter().filter_map(|change| {
                let Change::EgressGate { word, bits } = change else { return None };
                Some((*word, *bits))
            })),
            Some(Change::Frontend { .. }) => self.frontends.insert_all(group.iter().filter_map(|change| {
                let Change::Frontend { key, value } = change else { return None };
                Some((raw(*key), raw(*value)))
            })),
            Some(Change::Ring { .. } | Change::RemoveFrontend { .. } | Change::Network { .. }) => {
                batch::each(group, |change| self.apply_one(change))
            }
        }
    }

    fn apply_one(&mut self, change: &Change<A>) -> io::Result<()> {
        match change {
            Change::Backend { id, value } => self.backends.set(*id, raw(*value)),
            Change::Ring { offset, slots } => self.rings.write(*offset, slots),
            Change::IngressGate { word, bits } => self.ingress_gate.set(*word, *bits),
            Change::EgressGate { word, bits } => self.egress_gate.set(*word, *bits),
            Change::Frontend { key, value } => self.frontends.insert(raw(*key), raw(*value)),
            Change::RemoveFrontend { key } => self.frontends.remove(&raw(*key)),
            Change::Network { owner, network, value: Some(value) } => {
                self.networks.insert(*owner, *network, *value)
            }
            Change::Network { owner, network, value: None } => self.networks.remove(*owner, *network),
        }
    }

    /// Mends the gates; how many words were not as wanted.
    ///
    /// # Errors
    /// When the kernel refuses a read or a write.
    pub fn repair_gates(&mut self, ingress: &[u64], egress: &[u64]) -> io::Result<u32> {
        Ok(mend(&mut self.ingress_gate, ingress)? + mend(&mut self.egress_gate, egress)?)
    }

    /// Mends some of the backends, given with what they should be; how many were not.
    ///
    /// # Errors
    /// When the kernel refuses a read or a write.
    pub fn repair_backends(
        &mut self,
        ids: Range<u32>,
        wanted: impl Iterator<Item = (u32, Backend<A>)>,
    ) -> io::Result<u32> {
        let there = self.backends.read_part(ids.clone(), zero())?;
        let mut mended = 0;
        for (id, wanted) in wanted.filter(|(id, _)| ids.contains(id)) {
            if there.get((id - ids.start) as usize).is_none_or(|Raw(there)| *there != wanted) {
                self.backends.set(id, raw(wanted))?;
                mended += 1;
            }
        }
        Ok(mended)
    }

    /// Mends the frontends: there must be these and no other; how many were not as wanted.
    ///
    /// # Errors
    /// When the kernel refuses a read or a write.
    pub fn repair_frontends(
        &mut self,
        wanted: impl Iterator<Item = (FrontendKey<A>, Frontend)>,
    ) -> io::Result<u32> {
        let mut there: HashMap<_, _> = self.read_frontends()?.into_iter().collect();
        let mut mended = 0;
        for (key, wanted) in wanted {
            if there.remove(&key) != Some(wanted) {
                self.frontends.insert(raw(key), raw(wanted))?;
                mended += 1;
            }
        }
        for key in there.keys() {
            self.frontends.remove(&raw(*key))?;
            mended += 1;
        }
        Ok(mended)
    }

    /// Mends the networks: there must be these and no other; how many were not as wanted.
    ///
    /// # Errors
    /// When the kernel refuses a read or a write.
    pub fn repair_networks(&mut self, wanted: impl Iterator<Item = OwnedNetwork<A>>) -> io::Result<u32> {
        let there = self.networks.read(0)?.into_iter();
        let mut there: HashMap<_, _> =
            there.map(|(owner, network, value)| ((owner, network), value)).collect();
        let mut mended = 0;
        for (owner, network, value) in wanted {
            if there.remove(&(owner, network)) != Some(value) {
                self.networks.insert(owner, network, value)?;
                mended += 1;
            }
        }
        for (owner, network) in there.into_keys() {
            self.networks.remove(owner, network)?;
            mended += 1;
        }
        Ok(mended)
    }

    /// Compares a ring with what is planned, and mends it; whether it differed.
    ///
    /// # Errors
    /// When the kernel refuses a read or a write.
    pub fn repair_ring(&mut self, offset: u32, slots: &[u32]) -> io::Result<bool> {
        if self.rings.read_part(offset..offset + slots.len() as u32, 0)? == slots {
            return Ok(false);
        }
        self.rings.write(offset, slots)?;
        Ok(true)
    }

    /// Inserts or replaces an interface.
    ///
    /// # Errors
    /// When the kernel refuses the write.
    pub fn set_device(&mut self, ifindex: u32, device: Device<A>) -> io::Result<()> {
        self.devices.insert(ifindex, raw(device))
    }

    /// Removes an interface if it is there.
    ///
    /// # Errors
    /// When the kernel refuses the write.
    pub fn remove_device(&mut self, ifindex: u32) -> io::Result<()> {
        self.devices.remove(&ifindex)
    }

    /// Writes the addresses of interfaces in several networks: there must be these and no other, as far as there is room.
    ///
    /// # Errors
    /// When the kernel refuses a read or a write.
    pub fn repair_sources(&mut self, wanted: &BTreeMap<(u32, Network<A>), A>) -> io::Result<()> {
        let there = self.sources.read(zero())?.into_iter();
        let mut there: HashMap<_, _> =
            there.map(|(ifindex, network, Raw(source))| ((ifindex, network), source)).collect();
        for (key, addr) in wanted.iter().take(self.sources.capacity as usize) {
            let source = Source { addr: *addr };
            if there.remove(key) != Some(source) {
                self.sources.insert(key.0, key.1, raw(source))?;
            }
        }
        there.keys().try_for_each(|(ifindex, network)| self.sources.remove(*ifindex, *network))
    }

    /// The interfaces that are in the map.
    ///
    /// # Errors
    /// When the kernel refuses a read.
    pub fn devices(&self) -> io::Result<Vec<(u32, Device<A>)>> {
        self.devices
            .map
            .iter()
            .map(|entry| entry.map(|(key, value)| (key, value.0)))
            .collect::<Result<_, _>>()
            .map_err(io_error)
    }

    fn read_frontends(&self) -> io::Result<Vec<(FrontendKey<A>, Frontend)>> {
        let found = self.frontends.read((zero(), zero()))?;
        Ok(found.into_iter().map(|(key, value)| (key.0, value.0)).collect())
    }
}

fn mend(gate: &mut Slots<u64>, wanted: &[u64]) -> io::Result<u32> {
    let mut mended = 0;
    for (word, (there, wanted)) in (0..).zip(gate.read(0)?.into_iter().zip(wanted)) {
        if there != *wanted {
            gate.set(word, *wanted)?;
            mended += 1;
        }
    }
    Ok(mended)
}

/// The settings of the programs, which both families share.
pub struct Settings(Slots<Raw<Config>>);

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings").finish_non_exhaustive()
    }
}

impl Settings {
    pub(super) fn of(map: Map) -> anyhow::Result<Self> {
        Slots::of(map).map(Self)
    }

    /// The settings of an agent that has pinned them in a directory, for somebody who only looks.
    ///
    /// # Errors
    /// When they are not there, or the kernel lets nobody but root look.
    pub fn pinned(dir: &Path) -> anyhow::Result<Self> {
        Self::of(open_pinned(dir, &tables::CONFIG)?)
    }

    /// The settings as they are.
    ///
    /// # Errors
    /// When the kernel refuses the read.
    pub fn get(&self) -> io::Result<Config> {
        self.0.map.get(&0, 0).map(|config| config.0).map_err(io_error)
    }

    /// Writes the settings.
    ///
    /// # Errors
    /// When the kernel refuses the write.
    pub fn set(&mut self, config: Config) -> io::Result<()> {
        self.0.set(0, raw(config))
    }
}

pub(super) fn open_pinned(dir: &Path, spec: &MapSpec) -> anyhow::Result<Map> {
    let path = dir.join(spec.name);
    let map = MapData::from_pin(&path).and_then(Map::from_map_data);
    map.with_context(|| format!("cannot open the pinned map {}", path.display()))
}

const _: () = assert!(
    GATE_WORDS == tables::GATE_INGRESS_V4.entries && GATE_WORDS == tables::GATE_EGRESS_V4.entries,
    "gates are as long as the decision thinks"
);
