//! The maps that say what is served: one writer.

use std::{collections::HashMap, io, mem::discriminant, ops::Range, path::Path};

use anyhow::Context;
use aya::maps::{Map, MapData};
use xdp_common::tables::{self, Backend, Config, Device, Frontend, FrontendKey, GATE_WORDS, MapSpec};

use super::{
    Addr, Raw, batch,
    handles::{Hash, NetworkTrie, OwnedNetwork, Slots, Written},
    io_error, raw,
};
use crate::plan::{Adopted, Change};

/// Frontends, backends, rings, networks, gates, devices and settings.
pub struct ImageMaps {
    frontends: Hash<Raw<FrontendKey<Addr>>, Raw<Frontend>>,
    backends: Slots<Raw<Backend<Addr>>>,
    rings: Slots<u32>,
    networks: NetworkTrie,
    ingress_gate: Slots<u64>,
    egress_gate: Slots<u64>,
    devices: Hash<u32, Raw<Device<Addr>>>,
    config: Slots<Raw<Config>>,
}

impl std::fmt::Debug for ImageMaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageMaps").finish_non_exhaustive()
    }
}

impl ImageMaps {
    /// Handles of the maps that `find` finds.
    pub(super) fn open(mut find: impl FnMut(&MapSpec) -> anyhow::Result<Map>) -> anyhow::Result<Self> {
        Ok(Self {
            frontends: Hash::of(find(&tables::FRONTENDS_V4)?)?,
            backends: Slots::of(find(&tables::BACKENDS_V4)?)?,
            rings: Slots::of(find(&tables::RINGS)?)?,
            networks: NetworkTrie::of(find(&tables::NETWORKS_V4)?)?,
            ingress_gate: Slots::of(find(&tables::GATE_INGRESS)?)?,
            egress_gate: Slots::of(find(&tables::GATE_EGRESS)?)?,
            devices: Hash::of(find(&tables::DEVICES_V4)?)?,
            config: Slots::of(find(&tables::CONFIG)?)?,
        })
    }

    /// Handles of the maps that an agent has pinned in a directory, for somebody who only looks.
    ///
    /// # Errors
    /// When they are not there, or the kernel lets nobody but root look.
    pub fn pinned(dir: &Path) -> anyhow::Result<Self> {
        Self::open(|spec| {
            let path = dir.join(spec.name);
            let map = MapData::from_pin(&path).and_then(Map::from_map_data);
            map.with_context(|| format!("cannot open the pinned map {}", path.display()))
        })
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
    pub fn read(&self) -> io::Result<Adopted<Addr>> {
        let backends = (0..).zip(self.backends.read(raw(ZERO_BACKEND))?).map(|(id, Raw(slot))| (id, slot));
        Ok(Adopted {
            frontends: self.read_frontends()?,
            backends: backends.filter(|(_, backend)| *backend != ZERO_BACKEND).collect(),
            ingress_gate: self.ingress_gate.read(0)?,
            egress_gate: self.egress_gate.read(0)?,
            rings: self.rings.read(0)?,
            networks: self.networks.read()?,
        })
    }

    /// Makes changes in their order; how many are made, which are all of them unless one was refused.
    ///
    /// # Errors
    /// What the kernel has against the first that is not made: `E2BIG` or `ENOSPC` for a full map.
    pub fn apply(&mut self, changes: &[Change<Addr>]) -> (usize, io::Result<()>) {
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
    fn apply_group(&mut self, group: &[Change<Addr>]) -> Written {
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

    fn apply_one(&mut self, change: &Change<Addr>) -> io::Result<()> {
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
        wanted: impl Iterator<Item = (u32, Backend<Addr>)>,
    ) -> io::Result<u32> {
        let there = self.backends.read_part(ids.clone(), raw(ZERO_BACKEND))?;
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
        wanted: impl Iterator<Item = (FrontendKey<Addr>, Frontend)>,
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
    pub fn repair_networks(&mut self, wanted: impl Iterator<Item = OwnedNetwork>) -> io::Result<u32> {
        let there = self.networks.read()?.into_iter();
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

    /// The settings.
    ///
    /// # Errors
    /// When the kernel refuses the read.
    pub fn config(&self) -> io::Result<Config> {
        self.config.map.get(&0, 0).map(|config| config.0).map_err(io_error)
    }

    /// Writes the settings.
    ///
    /// # Errors
    /// When the kernel refuses the write.
    pub fn set_config(&mut self, config: Config) -> io::Result<()> {
        self.config.set(0, raw(config))
    }

    /// Inserts or replaces an interface.
    ///
    /// # Errors
    /// When the kernel refuses the write.
    pub fn set_device(&mut self, ifindex: u32, device: Device<Addr>) -> io::Result<()> {
        self.devices.insert(ifindex, raw(device))
    }

    /// Removes an interface if it is there.
    ///
    /// # Errors
    /// When the kernel refuses the write.
    pub fn remove_device(&mut self, ifindex: u32) -> io::Result<()> {
        self.devices.remove(&ifindex)
    }

    /// The interfaces that are in the map.
    ///
    /// # Errors
    /// When the kernel refuses a read.
    pub fn devices(&self) -> io::Result<Vec<(u32, Device<Addr>)>> {
        self.devices
            .map
            .iter()
            .map(|entry| entry.map(|(key, value)| (key, value.0)))
            .collect::<Result<_, _>>()
            .map_err(io_error)
    }

    fn read_frontends(&self) -> io::Result<Vec<(FrontendKey<Addr>, Frontend)>> {
        let found = self.frontends.read((raw(ZERO_FRONTEND_KEY), raw(ZERO_FRONTEND)))?;
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

const ZERO_BACKEND: Backend<Addr> =
    Backend { addr: [0; 4], port: [0; 2], proto: 0, flags: 0, generation: 0, service: 0 };
const ZERO_FRONTEND_KEY: FrontendKey<Addr> = FrontendKey { addr: [0; 4], port: [0; 2], proto: 0, zero: 0 };
const ZERO_FRONTEND: Frontend =
    Frontend { service: 0, ring: 0, slots: 0, inner_ring: 0, inner_slots: 0, flags: 0, affinity_seconds: 0 };
const _: () =
    assert!(GATE_WORDS == tables::GATE_INGRESS.entries && GATE_WORDS == tables::GATE_EGRESS.entries);
