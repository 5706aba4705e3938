//! From what should be to an ordered list of map changes: pure, incremental, and never half a service.

use std::{
    collections::{BTreeSet, HashMap, HashSet, hash_map::Entry},
    sync::Arc,
};

use xdp_common::{
    gate::{frontend_bit, snat_bit},
    tables::{Frontend, FrontendKey},
};

use self::{
    adopted::AdoptedRings,
    backends::Backends,
    gates::Gate,
    service::{Planned, key},
    slices::Slices,
};
pub use self::{
    change::{Addr, Adopted, Change, Fill, Image, InUse, Limits, Update},
    slices::QUARANTINE_MS,
};
use crate::{
    cluster::{Desired, ServicePort, ServicePortName},
    problem::{Problem, ProblemKind},
};

mod adopted;
mod backends;
mod change;
mod gates;
pub mod maglev;
mod service;
mod slices;
#[cfg(test)]
mod tests;

/// A frontend as the map holds it once the changes given out so far are applied.
#[derive(Clone, Copy, Debug)]
struct Placed {
    value: Frontend,
    /// Service id, or none while it is a previous agent's.
    owner: Option<u32>,
}

/// The state of the maps as planned.
///
/// What is given up rests twice: until the next call, because only then its changes have surely been applied, and for
/// [`QUARANTINE_MS`] from there, because a program may still be running on what it read before.
#[derive(Debug)]
pub struct Plan {
    limits: Limits,
    frontends: HashMap<FrontendKey<Addr>, Placed>,
    services: HashMap<ServicePortName, Planned>,
    /// Service ids in use.
    names: HashMap<u32, ServicePortName>,
    last_service: u32,
    backends: Backends,
    slices: Slices,
    adopted: AdoptedRings,
    ingress: Gate,
    egress: Gate,
    snat_addresses: BTreeSet<Addr>,
    /// Frontends of a previous agent.
    unclaimed: usize,
    /// Why services did not fit at the last update.
    refusals: Vec<Refusal>,
    /// Number of the current update.
    round: u64,
}

/// Changes of one pass, by the phase in which they are applied.
#[derive(Default)]
struct Pass {
    rings: Vec<Change>,
    frontends: Vec<Change>,
    /// Frontends that services no longer want, with the service that let go.
    leaving: Vec<(FrontendKey<Addr>, u32)>,
    refused: Vec<(Arc<ServicePort>, Refusal)>,
}

/// Why a service does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    Frontends { wanted: usize },
    Backends { wanted: usize },
    Rings { wanted: u32 },
}

impl Plan {
    /// A plan for empty maps.
    pub fn new(limits: Limits) -> Self {
        Self::adopt(limits, Adopted::default())
    }

    /// A plan for the maps of a previous agent: nothing of theirs changes until [`Plan::update`] says so. What the previous
    /// agent gave up may be used at once, because starting an agent takes longer than any run of a program.
    pub fn adopt(limits: Limits, adopted: Adopted) -> Self {
        let (mut ingress, mut egress) = (Gate::new(adopted.ingress_gate), Gate::new(adopted.egress_gate));
        let mut slices = Slices::new(limits.ring_slots);
        let rings = AdoptedRings::new(adopted.frontends.iter().map(|(_, value)| value));
        rings.ranges().for_each(|(offset, len)| slices.occupy(offset, len));
        let backends = Backends::adopt(limits.backends, adopted.backends, &mut egress);
        let last_service = adopted.frontends.iter().map(|(_, value)| value.service).max().unwrap_or(0);
        let mut frontends = HashMap::new();
        for (key, value) in adopted.frontends {
            ingress.need(frontend_bit(key.addr, key.port, key.proto));
            frontends.insert(key, Placed { value, owner: None });
        }
        let unclaimed = frontends.len();
        Self {
            limits,
            frontends,
            services: HashMap::new(),
            names: HashMap::new(),
            last_service,
            backends,
            slices,
            adopted: rings,
            ingress,
            egress,
            snat_addresses: BTreeSet::new(),
            unclaimed,
            refusals: Vec::new(),
            round: 0,
        }
    }

    /// Plans the way from what is to what should be; `now_ms` is any clock that only grows.
    pub fn update(&mut self, desired: &Desired, snat_addresses: &[Addr], now_ms: u64) -> Update {
        self.tick(now_ms);
        self.round += 1;
        self.set_snat_addresses(snat_addresses);
        let (changed, known) = self.changed(desired);
        let mut changes = Vec::new();
        let mut pass = Pass::default();
        if known < self.services.len() {
            self.drop_vanished(&mut pass);
        }
        if self.unclaimed > 0 {
            self.drop_unclaimed(desired, &mut pass);
        }
        for port in changed {
            self.apply(port, &mut pass);
        }
        let mut refused = std::mem::take(&mut pass.refused);
        let made_room = self.finish(pass, &mut changes);
        let lacks_frontends = refused.iter().any(|(_, why)| matches!(why, Refusal::Frontends { .. }));
        if made_room && lacks_frontends {
            let mut pass = Pass::default();
            for (port, _) in refused {
                self.apply(&port, &mut pass);
            }
            refused = std::mem::take(&mut pass.refused);
            self.finish(pass, &mut changes);
        }
        let gone = self.backends.settle_unused(!self.adopted.is_empty());
        changes.extend(gone.into_iter().map(|(id, value)| Change::Backend { id, value }));
        self.refusals = refused.iter().map(|(_, why)| *why).collect();
        let retry_in_ms = self.waits_for_rings().then_some(QUARANTINE_MS);
        let problems = refused.iter().map(|(port, why)| self.problem(port, *why)).collect();
        Update { changes, problems, retry_in_ms }
    }

    /// Frees what no flow uses any more, after a walk over the flow tables.
    pub fn collect(&mut self, in_use: &InUse, now_ms: u64) -> Update {
        self.tick(now_ms);
        // A ring of the previous agent may name any backend, and what it names is not known.
        let may_free = self.adopted.is_empty();
        let freed = if may_free { self.backends.collect(in_use, &mut self.egress) } else { Vec::new() };
        self.ingress.collect(&in_use.ingress_bits, in_use.started_ms);
        self.egress.collect(&in_use.egress_bits, in_use.started_ms);
        let has_freed = !freed.is_empty();
        let mut changes: Vec<Change> =
            freed.into_iter().map(|(id, value)| Change::Backend { id, value }).collect();
        self.take_gates(&mut changes);
        let waits_for_backends = self.refusals.iter().any(|why| matches!(why, Refusal::Backends { .. }));
        let retry_in_ms = match waits_for_backends && has_freed {
            true => Some(0),
            false => self.waits_for_rings().then_some(QUARANTINE_MS),
        };
        Update { changes, problems: Vec::new(), retry_in_ms }
    }

    /// How full the maps are.
    pub fn fill(&self) -> Fill {
        Fill {
            frontends: self.frontends.len() as u32,
            backends: self.backends.count(),
            ring_slots: self.slices.used(),
        }
    }

    /// The complete intended contents but the rings.
    pub fn image(&self) -> Image {
        Image {
            frontends: self.frontends.iter().map(|(key, placed)| (*key, placed.value)).collect(),
            backends: self.backends.written().collect(),
            ingress_gate: self.ingress.words().to_vec(),
            egress_gate: self.egress.words().to_vec(),
        }
    }

    /// Every ring in use with its first slot, computed one by one (they are too big to keep twice).
    pub fn rings(&self) -> impl Iterator<Item = (u32, Vec<u32>)> {
        self.services.values().flat_map(Planned::rings)
    }

    /// The service port behind a service id, for attribution.
    pub fn service(&self, id: u32) -> Option<&ServicePortName> {
        self.names.get(&id)
    }

    /// Whether a service that did not fit may fit once slices have rested.
    fn waits_for_rings(&self) -> bool {
        self.slices.is_resting() && self.refusals.iter().any(|why| matches!(why, Refusal::Rings { .. }))
    }

    fn tick(&mut self, now_ms: u64) {
        self.slices.tick(now_ms);
        self.backends.tick(now_ms);
        self.ingress.tick(now_ms);
        self.egress.tick(now_ms);
    }

    fn set_snat_addresses(&mut self, addresses: &[Addr]) {
        let addresses: BTreeSet<Addr> = addresses.iter().copied().collect();
        for &addr in addresses.difference(&self.snat_addresses) {
            self.ingress.need(snat_bit(addr));
        }
        for &addr in self.snat_addresses.difference(&addresses) {
            self.ingress.leave(snat_bit(addr));
        }
        self.snat_addresses = addresses;
    }

    /// The service ports that are not as they should be, and how many there are at all of those wanted.
    fn changed<'a>(&mut self, desired: &'a Desired) -> (Vec<&'a Arc<ServicePort>>, usize) {
        let (mut changed, mut known) = (Vec::new(), 0);
        for port in &desired.services {
            if let Some(planned) = self.services.get_mut(&port.name) {
                known += usize::from(planned.round != self.round);
                planned.round = self.round;
                if !planned.is_behind && (Arc::ptr_eq(&planned.port, port) || planned.port == *port) {
                    planned.port = Arc::clone(port); // so that the pointers are equal next time
                    continue;
                }
            }
            changed.push(port);
        }
        (changed, known)
    }

    /// Lets go of services that are not wanted any more.
    fn drop_vanished(&mut self, pass: &mut Pass) {
        let vanished = self.services.iter().filter(|(_, planned)| planned.round != self.round);
        let vanished: Vec<ServicePortName> = vanished.map(|(name, _)| name.clone()).collect();
        for name in vanished {
            let Some(planned) = self.services.remove(&name) else { continue };
            pass.leaving.extend(planned.port.frontends.iter().map(|f| (key(&name, f), planned.id)));
            self.names.remove(&planned.id);
            planned.release(None, &mut self.backends, &mut self.slices);
        }
    }

    /// Lets go of a previous agent's frontends that nobody wants.
    fn drop_unclaimed(&mut self, desired: &Desired, pass: &mut Pass) {
        let unclaimed = self.frontends.iter().filter(|(_, placed)| placed.owner.is_none());
        let mut unclaimed: HashSet<_> = unclaimed.map(|(key, _)| *key).collect();
        for port in &desired.services {
            for frontend in &port.frontends {
                unclaimed.remove(&key(&port.name, frontend));
            }
        }
        // Service id 0 is nobody's, like the frontends.
        pass.leaving.extend(unclaimed.into_iter().map(|key| (key, 0)));
    }

    /// Plans one service port, or leaves it exactly as it is.
    fn apply(&mut self, port: &Arc<ServicePort>, pass: &mut Pass) {
        if let Err(why) = self.try_apply(port, pass) {
            if let Some(planned) = self.services.get_mut(&port.name) {
                planned.is_behind = true;
            }
            pass.refused.push((Arc::clone(port), why));
        }
    }

    fn try_apply(&mut self, port: &Arc<ServicePort>, pass: &mut Pass) -> Result<(), Refusal> {
        let keys: Vec<_> = port.frontends.iter().map(|frontend| key(&port.name, frontend)).collect();
        let added = keys.iter().filter(|key| !self.frontends.contains_key(key)).count();
        if self.frontends.len() + added > self.limits.frontends as usize {
            return Err(Refusal::Frontends { wanted: added });
        }
        let old = self.services.get(&port.name);
        let id = old.map(|old| old.id);
        let mut new = Planned::build(port, old, &mut self.backends, &mut self.slices)?;
        new.id = id.unwrap_or_else(|| self.service_id(&keys));
        new.round = self.round;
        pass.rings.extend(new.new_rings().map(|(offset, slots)| Change::Ring { offset, slots }));
        for (key, frontend) in keys.iter().zip(&port.frontends) {
            self.place(*key, new.frontend(frontend), pass);
        }
        self.names.insert(new.id, port.name.clone());
        let new_keys: HashSet<_> = keys.into_iter().collect();
        if let Some(old) = self.services.remove(&port.name) {
            let left = old.port.frontends.iter().map(|frontend| key(&port.name, frontend));
            pass.leaving.extend(left.filter(|key| !new_keys.contains(key)).map(|key| (key, old.id)));
            old.release(Some(&new), &mut self.backends, &mut self.slices);
        }
        self.services.insert(port.name.clone(), new);
        Ok(())
    }

    /// An id for a service port: the one that a previous agent gave to one of its frontends, or a new one.
    fn service_id(&mut self, keys: &[FrontendKey<Addr>]) -> u32 {
        let adopted =
            keys.iter().filter_map(|key| self.frontends.get(key)).filter(|placed| placed.owner.is_none());
        let known =
            adopted.map(|placed| placed.value.service).find(|id| *id != 0 && !self.names.contains_key(id));
        known.unwrap_or_else(|| {
            loop {
                self.last_service = self.last_service.wrapping_add(1).max(1);
                if !self.names.contains_key(&self.last_service) {
                    return self.last_service;
                }
            }
        })
    }

    fn place(&mut self, key: FrontendKey<Addr>, value: Frontend, pass: &mut Pass) {
        let owner = Some(value.service);
        match self.frontends.entry(key) {
            Entry::Vacant(free) => {
                self.ingress.need(frontend_bit(key.addr, key.port, key.proto));
                free.insert(Placed { value, owner });
            }
            Entry::Occupied(mut taken) => {
                let before = taken.insert(Placed { value, owner });
                if before.owner.is_none() {
                    self.unclaimed -= 1;
                    self.adopted.leave(&before.value, &mut self.slices);
                }
                if before.value == value {
                    return;
                }
            }
        }
        pass.frontends.push(Change::Frontend { key, value });
    }

    /// Puts the changes of a pass in order; true when frontends were removed.
    fn finish(&mut self, pass: Pass, changes: &mut Vec<Change>) -> bool {
        let backends = self.backends.settle_used(&mut self.egress);
        // Gates first: they must let through what a backend that moved off this node now needs.
        self.take_gates(changes);
        changes.extend(backends.into_iter().map(|(id, value)| Change::Backend { id, value }));
        changes.extend(pass.rings);
        changes.extend(pass.frontends);
        let mut removed = false;
        for (key, service) in pass.leaving {
            let Entry::Occupied(placed) = self.frontends.entry(key) else { continue };
            if placed.get().owner.unwrap_or(0) != service {
                continue; // another service has it now
            }
            let placed = placed.remove();
            if placed.owner.is_none() {
                self.unclaimed -= 1;
                self.adopted.leave(&placed.value, &mut self.slices);
            }
            self.ingress.leave(frontend_bit(key.addr, key.port, key.proto));
            changes.push(Change::RemoveFrontend { key });
            removed = true;
        }
        removed
    }

    fn take_gates(&mut self, changes: &mut Vec<Change>) {
        let ingress = self.ingress.take_changes().into_iter();
        changes.extend(ingress.map(|(word, bits)| Change::IngressGate { word, bits }));
        let egress = self.egress.take_changes().into_iter();
        changes.extend(egress.map(|(word, bits)| Change::EgressGate { word, bits }));
    }

    fn problem(&self, port: &ServicePort, why: Refusal) -> Problem {
        let (fill, limits) = (self.fill(), self.limits);
        let (kind, what, used, limit, flag) = match why {
            Refusal::Frontends { wanted } => (
                ProblemKind::FrontendsFull,
                format!("{wanted} more frontends"),
                fill.frontends,
                limits.frontends,
                "--max-frontends",
            ),
            Refusal::Backends { wanted } => {
                let what = format!("its {wanted} backends");
                (
                    ProblemKind::BackendsFull,
                    what,
                    fill.backends,
                    limits.backends.saturating_sub(1),
                    "--max-backends",
                )
            }
            Refusal::Rings { wanted } => {
                let what = format!("a ring of {wanted} slots in one piece");
                (ProblemKind::RingsFull, what, fill.ring_slots, limits.ring_slots, "--max-ring-slots")
            }
        };
        let message =
            format!("no room for {what} ({used} of {limit} in use), so it stays as it was; raise {flag}");
        Problem::of(kind, format!("Service {}", port.name), message)
    }
}
