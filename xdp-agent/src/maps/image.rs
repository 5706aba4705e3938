//! The maps that say what is served: one writer.

use std::{io, os::fd::OwnedFd};

use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData},
};
use xdp_common::tables::{self, Backend, Config, Device, Frontend, FrontendKey, GATE_WORDS, MapSpec};

use super::{Addr, Raw, batch, capacity, descriptor, io_error, raw, take};
use crate::plan::{Adopted, Change, Image};

/// Frontends, backends, rings, gates, devices and settings.
pub struct ImageMaps {
    frontends: Hash<Raw<FrontendKey<Addr>>, Raw<Frontend>>,
    backends: Slots<Raw<Backend<Addr>>>,
    rings: Slots<u32>,
    ingress_gate: Slots<u64>,
    egress_gate: Slots<u64>,
    devices: Hash<u32, Raw<Device<Addr>>>,
    config: Slots<Raw<Config>>,
}

struct Hash<K, V> {
    map: HashMap<MapData, K, V>,
    fd: OwnedFd,
    capacity: u32,
}

struct Slots<V: aya::Pod> {
    map: Array<MapData, V>,
    fd: OwnedFd,
    capacity: u32,
}

/// What a comparison with the plan has mended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repairs {
    /// Frontends that were missing or different.
    pub frontends: u32,
    /// Frontends that should not have been there.
    pub strangers: u32,
    /// Backend slots.
    pub backends: u32,
    /// Ring slices.
    pub rings: u32,
    /// Words of the gates.
    pub gate_words: u32,
}

impl Repairs {
    /// How many there were.
    pub fn total(self) -> u32 {
        self.frontends + self.strangers + self.backends + self.rings + self.gate_words
    }
}

impl std::fmt::Debug for ImageMaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageMaps").finish_non_exhaustive()
    }
}

impl ImageMaps {
    pub(super) fn open(ebpf: &mut Ebpf) -> anyhow::Result<Self> {
        Ok(Self {
            frontends: Hash::open(ebpf, &tables::FRONTENDS_V4)?,
            backends: Slots::open(ebpf, &tables::BACKENDS_V4)?,
            rings: Slots::open(ebpf, &tables::RINGS)?,
            ingress_gate: Slots::open(ebpf, &tables::GATE_INGRESS)?,
            egress_gate: Slots::open(ebpf, &tables::GATE_EGRESS)?,
            devices: Hash::open(ebpf, &tables::DEVICES_V4)?,
            config: Slots::open(ebpf, &tables::CONFIG)?,
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

    /// What an earlier agent has left.
    ///
    /// # Errors
    /// When the kernel refuses a read.
    pub fn read(&self) -> io::Result<Adopted> {
        Ok(Adopted {
            frontends: self.read_frontends()?,
            backends: self.read_backends()?,
            ingress_gate: self.ingress_gate.read(0)?,
            egress_gate: self.egress_gate.read(0)?,
        })
    }

    /// Makes one change.
    ///
    /// # Errors
    /// When the kernel refuses it: `E2BIG` for a full map.
    pub fn apply(&mut self, change: &Change) -> io::Result<()> {
        match change {
            Change::Backend { id, value } => self.backends.set(*id, raw(*value)),
            Change::Ring { offset, slots } => self.rings.write(*offset, slots),
            Change::IngressGate { word, bits } => self.ingress_gate.set(*word, *bits),
            Change::EgressGate { word, bits } => self.egress_gate.set(*word, *bits),
            Change::Frontend { key, value } => self.frontends.insert(raw(*key), raw(*value)),
            Change::RemoveFrontend { key } => self.frontends.remove(&raw(*key)),
        }
    }

    /// Compares everything but the rings with what is planned, and mends what differs.
    ///
    /// # Errors
    /// When the kernel refuses a read or a write.
    pub fn repair(&mut self, image: &Image) -> io::Result<Repairs> {
        let mut repairs = Repairs {
            gate_words: mend(&mut self.ingress_gate, &image.ingress_gate)?
                + mend(&mut self.egress_gate, &image.egress_gate)?,
            ..Repairs::default()
        };
        let there: std::collections::HashMap<u32, Backend<Addr>> =
            self.read_backends()?.into_iter().collect();
        for (id, wanted) in &image.backends {
            if *wanted != there.get(id).copied().unwrap_or(ZERO_BACKEND) {
                self.backends.set(*id, raw(*wanted))?;
                repairs.backends += 1;
            }
        }
        let mut there: std::collections::HashMap<FrontendKey<Addr>, Frontend> =
            self.read_frontends()?.into_iter().collect();
        for (key, wanted) in &image.frontends {
            if there.remove(key) != Some(*wanted) {
                self.frontends.insert(raw(*key), raw(*wanted))?;
                repairs.frontends += 1;
            }
        }
        for key in there.keys() {
            self.frontends.remove(&raw(*key))?;
            repairs.strangers += 1;
        }
        Ok(repairs)
    }

    /// Compares a ring with what is planned, and mends it; whether it differed.
    ///
    /// # Errors
    /// When the kernel refuses a read or a write.
    pub fn repair_ring(&mut self, offset: u32, slots: &[u32]) -> io::Result<bool> {
        if self.rings.read_at(offset, slots.len())? == slots {
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
        let mut found = Vec::new();
        let zero = (raw(ZERO_FRONTEND_KEY), raw(ZERO_FRONTEND));
        match batch::walk(&self.frontends.fd, zero, |key, value| found.push((key.0, value.0))) {
            Ok(()) => Ok(found),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                let entries = self.frontends.map.iter().take(2 * self.frontends.capacity as usize);
                entries.map(|entry| entry.map(|(key, value)| (key.0, value.0)).map_err(io_error)).collect()
            }
            Err(error) => Err(error),
        }
    }

    /// Backend slots that are not empty for good.
    fn read_backends(&self) -> io::Result<Vec<(u32, Backend<Addr>)>> {
        let slots = self.backends.read(raw(ZERO_BACKEND))?;
        let used = slots.into_iter().zip(0..).map(|(slot, id)| (id, slot.0));
        Ok(used.filter(|(_, backend)| *backend != ZERO_BACKEND).collect())
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

impl<K: aya::Pod, V: aya::Pod> Hash<K, V> {
    fn open(ebpf: &mut Ebpf, spec: &MapSpec) -> anyhow::Result<Self> {
        let map = take(ebpf, spec)?;
        let (fd, capacity) = (descriptor(&map)?, capacity(&map)?);
        Ok(Self { map: HashMap::try_from(map)?, fd, capacity })
    }

    fn insert(&mut self, key: K, value: V) -> io::Result<()> {
        self.map.insert(key, value, 0).map_err(io_error)
    }

    fn remove(&mut self, key: &K) -> io::Result<()> {
        match self.map.remove(key).map_err(io_error) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
            _ => Ok(()),
        }
    }
}

impl<V: aya::Pod> Slots<V> {
    fn open(ebpf: &mut Ebpf, spec: &MapSpec) -> anyhow::Result<Self> {
        let map = take(ebpf, spec)?;
        let (fd, capacity) = (descriptor(&map)?, capacity(&map)?);
        Ok(Self { map: Array::try_from(map)?, fd, capacity })
    }

    fn set(&mut self, index: u32, value: V) -> io::Result<()> {
        self.map.set(index, value, 0).map_err(io_error)
    }

    /// All of it, in order.
    fn read(&self, zero: V) -> io::Result<Vec<V>> {
        let mut found = Vec::with_capacity(self.capacity as usize);
        match batch::walk(&self.fd, (0u32, zero), |_, value| found.push(value)) {
            Ok(()) => Ok(found),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                self.map.iter().map(|value| value.map_err(io_error)).collect()
            }
            Err(error) => Err(error),
        }
    }
}

impl Slots<u32> {
    fn read_at(&self, first: u32, count: usize) -> io::Result<Vec<u32>> {
        let mut found = vec![0; count];
        match batch::read_array(&self.fd, first, &mut found) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                (first..).take(count).map(|at| self.map.get(&at, 0).map_err(io_error)).collect()
            }
            result => result.map(|()| found),
        }
    }

    fn write(&mut self, first: u32, values: &[u32]) -> io::Result<()> {
        match batch::write_array(&self.fd, first, &mut values.to_vec()) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                (first..).zip(values).try_for_each(|(at, value)| self.set(at, *value))
            }
            result => result,
        }
    }
}

const ZERO_BACKEND: Backend<Addr> =
    Backend { addr: [0; 4], port: [0; 2], proto: 0, flags: 0, generation: 0, service: 0 };
const ZERO_FRONTEND_KEY: FrontendKey<Addr> = FrontendKey { addr: [0; 4], port: [0; 2], proto: 0, zero: 0 };
const ZERO_FRONTEND: Frontend =
    Frontend { service: 0, ring: 0, slots: 0, inner_ring: 0, inner_slots: 0, flags: 0, affinity_seconds: 0 };
const _: () =
    assert!(GATE_WORDS == tables::GATE_INGRESS.entries && GATE_WORDS == tables::GATE_EGRESS.entries);
