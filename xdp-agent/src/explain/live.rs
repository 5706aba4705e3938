//! The maps of the agent that runs here, read once.

use std::{collections::BTreeSet, net::IpAddr, path::Path};

use anyhow::{Context, ensure};
use xdp_common::net::{FlowKey, V4};

use super::{
    answer::Answer, decision::decide, dump::Dump, names::Names, question::Question, tables::Maps,
    world::World,
};
use crate::{cluster::wanted::IpAddress, maps::ImageMaps, neighbours, preflight};

/// Stands for an address that an interface does not have.
const UNKNOWN: [u8; 4] = [0; 4];

/// What a running agent has written, beside what is known of the objects.
///
/// The maps hold no names: those of Services are known as far as their objects are given, or the agent tells them.
pub(super) struct Live {
    maps: Maps<[u8; 4]>,
    /// Addresses of this host.
    own: BTreeSet<IpAddr>,
    world: World,
    names: Names,
}

impl Live {
    /// Reads the maps that are pinned below a directory.
    pub(super) fn open(pin_dir: &Path, world: World, names: Names) -> anyhow::Result<Self> {
        let dir = preflight::maps_dir(pin_dir);
        ensure!(dir.exists(), "no agent of this version has its maps in {}; give --pin-dir", dir.display());
        let image = ImageMaps::pinned(&dir)?;
        let found = image.read().context("cannot read the maps")?;
        let devices = image.devices().context("cannot read the map of interfaces")?;
        let snat = devices.into_iter().map(|(_, device)| device.snat).find(|addr| *addr != UNKNOWN);
        let host = neighbours::read_host().context("cannot read the addresses of this host")?;
        let own = host.own_addresses().into_iter().map(IpAddr::from).collect();
        Ok(Self { maps: Maps::of(found, snat.unwrap_or(UNKNOWN)), own, world, names })
    }

    /// What a new connection meets.
    pub(super) fn ask(&self, question: &Question) -> Result<Answer, String> {
        match question {
            Question::V4(key) => Ok(self.answer(key)),
            Question::V6(_) => Err("the maps of a running agent are IPv4 only".to_owned()),
        }
    }

    /// What the maps hold, as text.
    pub(super) fn dump(&self) -> String {
        let service = |id| {
            let places = self.maps.frontends.iter().filter(|(_, frontend)| frontend.service == id);
            let mut named =
                places.filter_map(|(key, _)| self.world.v4.claimant(key.addr, key.port, key.proto));
            named.next().map_or_else(|| self.name(id), |(port, _)| port.name.to_string())
        };
        Dump { maps: &self.maps, service: &service }.to_string()
    }

    fn answer(&self, key: &FlowKey<[u8; 4]>) -> Answer {
        let from = key.src.to_ip();
        let decision = decide::<V4>(&self.maps, *key, from.is_loopback() || self.own.contains(&from));
        let claimant = self.world.v4.claimant(key.dst, key.dport, key.proto);
        let mut answer = Answer::of(&decision, claimant);
        if let (Some(frontend), None) = (decision.frontend, claimant) {
            answer.service = Some(self.name(frontend.service));
        }
        self.world.with_health_check(answer, key, self.own.contains(&key.dst.to_ip()))
    }

    /// The name of a service port, or its number.
    fn name(&self, id: u32) -> String {
        self.names.get(&id).cloned().unwrap_or_else(|| format!("service #{id}"))
    }
}
