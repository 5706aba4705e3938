//! The maps of the agent that runs here, read once.

use std::{collections::BTreeSet, net::IpAddr, path::Path};

use anyhow::{Context, ensure};
use xdp_common::net::{Address, Family, FlowKey, V4, V6};

use super::{
    answer::Answer,
    decision::decide,
    dump::Dump,
    names::{Names, NamesById},
    question::Question,
    tables::Maps,
    world::{self, World},
};
use crate::{
    cluster::wanted::IpAddress,
    maps::{ImageMaps, Settings},
    neighbours, pins,
};

/// What a running agent has written, beside what is known of the objects.
pub(super) struct Live {
    v4: Side<V4>,
    v6: Side<V6>,
    /// Addresses of this host.
    own: BTreeSet<IpAddr>,
    world: World,
}

/// What there is of one family.
///
/// The maps hold no names: those of Services are known as far as their objects are given, or the agent tells them.
struct Side<F: Family> {
    maps: Maps<F::Addr>,
    names: NamesById,
}

impl Live {
    /// Reads the maps that are pinned below a directory.
    pub(super) fn open(pin_dir: &Path, world: World, names: Names) -> anyhow::Result<Self> {
        let dir = pins::maps_dir(pin_dir);
        ensure!(dir.exists(), "no agent of this version has its maps in {}; give --pin-dir", dir.display());
        let host = neighbours::read_host().context("cannot read the addresses of this host")?;
        let settings = Settings::pinned(&dir)?.get().context("cannot read the settings of the programs")?;
        let v4 = Side::open(&dir, settings.direct, names.v4)?;
        let v6 = Side::open(&dir, settings.direct, names.v6)?;
        Ok(Self { v4, v6, own: host.own_addresses(), world })
    }

    /// What a new connection meets.
    pub(super) fn ask(&self, question: &Question) -> Answer {
        match question {
            Question::V4(key) => self.answer(&self.v4, &self.world.v4, key),
            Question::V6(key) => self.answer(&self.v6, &self.world.v6, key),
        }
    }

    /// What the maps hold, as text.
    pub(super) fn dump(&self) -> String {
        format!("{}{}", self.v4.dump(&self.world.v4), self.v6.dump(&self.world.v6))
    }

    fn answer<F: Family<Addr: IpAddress>>(
        &self,
        side: &Side<F>,
        objects: &world::Side<F>,
        key: &FlowKey<F::Addr>,
    ) -> Answer {
        let from = key.src.to_ip();
        let decision = decide::<F>(&side.maps, *key, from.is_loopback() || self.own.contains(&from));
        let claimant = objects.claimant(key.dst, key.dport, key.proto);
        let mut answer = Answer::of(&decision, claimant);
        if let (Some(frontend), None) = (decision.frontend, claimant) {
            answer.service = Some(side.name(frontend.service));
        }
        self.world.with_health_check(answer, key, self.own.contains(&key.dst.to_ip()))
    }
}

impl<F: Family<Addr: IpAddress>> Side<F> {
    fn open(dir: &Path, direct: u32, names: NamesById) -> anyhow::Result<Self> {
        let image = ImageMaps::<F::Addr>::pinned(dir)?;
        let found = image.read().context("cannot read the maps")?;
        let devices = image.devices().context("cannot read the map of interfaces")?;
        // Unspecified stands for an address that an interface does not have.
        let unknown = F::Addr::UNSPECIFIED;
        let snat = devices.into_iter().map(|(_, device)| device.snat).find(|addr| *addr != unknown);
        Ok(Self { maps: Maps::of(found, snat.unwrap_or(unknown), direct), names })
    }

    fn dump(&self, objects: &world::Side<F>) -> String {
        let service = |id| {
            let places = self.maps.frontends.iter().filter(|(_, frontend)| frontend.service == id);
            let mut named = places.filter_map(|(key, _)| objects.claimant(key.addr, key.port, key.proto));
            named.next().map_or_else(|| self.name(id), |(port, _)| port.name.to_string())
        };
        Dump { maps: &self.maps, service: &service }.to_string()
    }

    /// The name of a service port, or its number.
    fn name(&self, id: u32) -> String {
        self.names.get(&id).cloned().unwrap_or_else(|| format!("service #{id}"))
    }
}
