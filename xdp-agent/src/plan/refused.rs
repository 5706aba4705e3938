//! Service ports that do not fit: why, and when it is worth to try them again.

use std::{
    collections::{BTreeMap, HashSet},
    ops::Bound,
    sync::Arc,
};

use xdp_common::tables::FrontendKey;

use super::{
    Fill, Limits,
    service::{address_key, addresses, key},
};
use crate::{
    cluster::wanted::{IpAddress, ServicePort, ServicePortName},
    problem::{Problem, ProblemKind},
};

/// Service ports that are named one by one; the others are counted.
const NAMED_MAX: usize = 100;
/// Service ports that are tried again at a time; the next ones follow at the next update.
const RETRIES_MAX: usize = 64;

/// Why a service port does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Frontends { wanted: usize },
    Backends { wanted: usize },
    Rings { wanted: u32 },
    Networks { wanted: usize },
}

/// Of which map there is room that was not there before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) frontends: bool,
    pub(super) backends: bool,
    pub(super) rings: bool,
    pub(super) networks: bool,
}

/// Every service port that does not fit, as it should be served.
#[derive(Debug)]
pub(super) struct Refused<A> {
    ports: BTreeMap<ServicePortName, (Arc<ServicePort<A>>, Refusal)>,
    /// The last one that was tried again.
    tried: Option<ServicePortName>,
    /// How many wait for room in the map of rings.
    wait_for_rings: usize,
}

impl Room {
    pub(super) fn or(self, other: Self) -> Self {
        Self {
            frontends: self.frontends || other.frontends,
            backends: self.backends || other.backends,
            rings: self.rings || other.rings,
            networks: self.networks || other.networks,
        }
    }

    fn is_for(self, why: Refusal) -> bool {
        match why {
            Refusal::Frontends { .. } => self.frontends,
            Refusal::Backends { .. } => self.backends,
            Refusal::Rings { .. } => self.rings,
            Refusal::Networks { .. } => self.networks,
        }
    }
}

impl<A: IpAddress> Refused<A> {
    pub(super) fn new() -> Self {
        Self { ports: BTreeMap::new(), tried: None, wait_for_rings: 0 }
    }

    pub(super) fn get(&self, name: &ServicePortName) -> Option<&Arc<ServicePort<A>>> {
        self.ports.get(name).map(|(port, _)| port)
    }

    pub(super) fn insert(&mut self, port: Arc<ServicePort<A>>, why: Refusal) {
        self.remove(&port.name);
        self.wait_for_rings += usize::from(matches!(why, Refusal::Rings { .. }));
        self.ports.insert(port.name.clone(), (port, why));
    }

    pub(super) fn remove(&mut self, name: &ServicePortName) {
        if let Some((_, Refusal::Rings { .. })) = self.ports.remove(name) {
            self.wait_for_rings -= 1;
        }
    }

    pub(super) fn len(&self) -> usize {
        self.ports.len()
    }

    pub(super) fn waits_for_rings(&self) -> bool {
        self.wait_for_rings > 0
    }

    pub(super) fn waits_for_backends(&self) -> bool {
        self.ports.values().any(|(_, why)| matches!(why, Refusal::Backends { .. }))
    }

    /// Those to try again, in turn: who waits for room that has come.
    pub(super) fn worth_trying(&mut self, room: Room) -> Vec<Arc<ServicePort<A>>> {
        if room == Room::default() || self.ports.is_empty() {
            return Vec::new();
        }
        let (first, second) = match &self.tried {
            None => (self.ports.range::<ServicePortName, _>(..), None),
            Some(tried) => {
                let behind = (Bound::Excluded(tried), Bound::Unbounded);
                (self.ports.range(behind), Some(self.ports.range(..=tried)))
            }
        };
        let waiting = first.chain(second.into_iter().flatten()).filter(|(_, (_, why))| room.is_for(*why));
        let chosen: Vec<_> = waiting.take(RETRIES_MAX).map(|(_, (port, _))| Arc::clone(port)).collect();
        self.tried = chosen.last().map(|port| port.name.clone());
        chosen
    }

    /// The frontends that they would have, which stay as they are meanwhile.
    pub(super) fn keys(&self) -> HashSet<FrontendKey<A>> {
        let ports = self.ports.values().map(|(port, _)| port);
        ports
            .flat_map(|port| {
                let frontends = port.frontends.iter().map(|frontend| key(port, frontend));
                frontends.chain(addresses(port).into_keys().map(address_key))
            })
            .collect()
    }

    pub(super) fn problems(&self, fill: Fill, limits: Limits) -> Vec<Problem> {
        let named = self.ports.iter().take(NAMED_MAX);
        let mut problems: Vec<_> = named
            .map(|(name, (_, why))| {
                Problem::of(why.kind(), format!("Service {name}"), why.text(fill, limits))
            })
            .collect();
        if let Some((_, (_, why))) = self.ports.iter().nth(NAMED_MAX) {
            let others = self.ports.len() - NAMED_MAX;
            problems.push(Problem::general(
                why.kind(),
                format!("{others} more service ports do not fit; they stay as they were"),
            ));
        }
        problems
    }
}

impl Refusal {
    fn kind(self) -> ProblemKind {
        match self {
            Self::Frontends { .. } => ProblemKind::FrontendsFull,
            Self::Backends { .. } => ProblemKind::BackendsFull,
            Self::Rings { .. } => ProblemKind::RingsFull,
            Self::Networks { .. } => ProblemKind::NetworksFull,
        }
    }

    fn text(self, fill: Fill, limits: Limits) -> String {
        let (what, used, limit, flag) = match self {
            Self::Frontends { wanted } => {
                (format!("{wanted} more frontends"), fill.frontends, limits.frontends, "--max-frontends")
            }
            Self::Backends { wanted } => {
                let limit = limits.backends.saturating_sub(1);
                (format!("{wanted} more backends"), fill.backends, limit, "--max-backends")
            }
            Self::Rings { wanted } => {
                let what = format!("a ring of {wanted} slots in one piece");
                (what, fill.ring_slots, limits.ring_slots, "--max-ring-slots")
            }
            Self::Networks { wanted } => {
                (format!("{wanted} more source ranges"), fill.networks, limits.networks, "--max-networks")
            }
        };
        format!("no room for {what} ({used} of {limit} in use), so it stays as it was; raise {flag}")
    }
}
