//! Maps as the kernel has them, that check after every single change what a packet could meet.

use std::collections::BTreeSet;

use xdp_common::{
    gate::{backend_destination_bit, backend_source_bit},
    tables::{Backend, GATE_WORDS, backend},
};

use super::*;
use crate::plan::service::key;

/// Addresses and ports that a frontend leads to.
type Targets = BTreeSet<(Addr, [u8; 2], u8)>;

pub(super) struct Model {
    pub(super) frontends: HashMap<FrontendKey<Addr>, Frontend>,
    pub(super) backends: Vec<Backend<Addr>>,
    pub(super) rings: Vec<u32>,
    pub(super) ingress: Vec<u64>,
    pub(super) egress: Vec<u64>,
    pub(super) flows: Vec<Flow>,
    limits: Limits,
    /// Slices that were named until a moment ago.
    left: Vec<(u32, u32, u64)>,
}

/// A flow that was made from what the maps said.
#[derive(Clone, Debug)]
pub(super) struct Flow {
    pub(super) ingress_bit: u32,
    pub(super) id: u32,
    pub(super) backend: Backend<Addr>,
}

impl Model {
    pub(super) fn new(limits: Limits) -> Self {
        let nothing = Backend { addr: [0; 4], port: [0; 2], proto: 0, flags: 0, generation: 0, service: 0 };
        Self {
            frontends: HashMap::new(),
            backends: vec![nothing; limits.backends as usize],
            rings: vec![0; limits.ring_slots as usize],
            ingress: vec![0; GATE_WORDS as usize],
            egress: vec![0; GATE_WORDS as usize],
            flows: Vec::new(),
            limits,
            left: Vec::new(),
        }
    }

    /// Lets so much time pass that no program still reads what it found before, as the start of an agent does.
    pub(super) fn outlive_programs(&mut self) {
        self.left.clear();
    }

    /// What a new agent finds.
    pub(super) fn adopted(&self) -> Adopted {
        Adopted {
            frontends: self.frontends.iter().map(|(key, value)| (*key, *value)).collect(),
            backends: (0..).zip(self.backends.iter().copied()).skip(1).collect(),
            ingress_gate: self.ingress.clone(),
            egress_gate: self.egress.clone(),
        }
    }

    /// Applies an update on the way from one wish to another and checks every step.
    pub(super) fn apply_all(&mut self, update: &Update, before: &Desired, after: &Desired, now_ms: u64) {
        let mut allowed: HashMap<FrontendKey<Addr>, Vec<Targets>> = HashMap::new();
        for key in self.frontends.keys() {
            allowed.entry(*key).or_default().push(self.targets(key).unwrap());
        }
        for port in before.services.iter().chain(&after.services) {
            for frontend in &port.frontends {
                allowed.entry(key(&port.name, frontend)).or_default().push(wanted(port, frontend.policy));
            }
        }
        for change in &update.changes {
            self.apply(change, now_ms);
            self.check(&allowed);
        }
    }

    fn apply(&mut self, change: &Change, now_ms: u64) {
        match change {
            Change::Backend { id, value } => {
                assert_ne!(*id, 0);
                let before = std::mem::replace(&mut self.backends[*id as usize], *value);
                let is_same =
                    (before.addr, before.port, before.proto) == (value.addr, value.port, value.proto);
                assert!(
                    is_same || before.proto == 0 || value.proto == 0,
                    "an id changes hands only when it is free"
                );
                let raised = value.generation.wrapping_sub(before.generation);
                assert!(
                    raised == 1 || (raised == 0 && (is_same || value.proto == 0)),
                    "{before:?} to {value:?}"
                );
            }
            Change::Ring { offset, slots } => {
                let (start, end) = (*offset, *offset + slots.len() as u32);
                let named = self.frontends.values().filter(|f| f.slots > 0).map(|f| (f.ring, f.slots));
                let rest = |(_, _, at): &&(u32, u32, u64)| now_ms < at + QUARANTINE_MS;
                let left = self.left.iter().filter(rest).map(|&(offset, len, _)| (offset, len));
                for (other, len) in named.chain(left) {
                    assert!(
                        end <= other || other + len <= start,
                        "{start}..{end} is in use at {other}+{len}"
                    );
                }
                self.rings[start as usize..end as usize].copy_from_slice(slots);
            }
            Change::IngressGate { word, bits } => self.ingress[*word as usize] = *bits,
            Change::EgressGate { word, bits } => self.egress[*word as usize] = *bits,
            Change::Frontend { key, value } => {
                let before = self.frontends.insert(*key, *value);
                assert_ne!(before, Some(*value), "a change that changes nothing");
                self.leave(before, now_ms);
                assert!(self.frontends.len() <= self.limits.frontends as usize);
            }
            Change::RemoveFrontend { key } => {
                let before = self.frontends.remove(key);
                assert!(before.is_some());
                self.leave(before, now_ms);
            }
        }
    }

    fn leave(&mut self, frontend: Option<Frontend>, now_ms: u64) {
        self.left.extend(frontend.map(|frontend| (frontend.ring, frontend.slots, now_ms)));
    }

    /// What a packet to any frontend would meet now.
    fn check(&self, allowed: &HashMap<FrontendKey<Addr>, Vec<Targets>>) {
        for key in self.frontends.keys() {
            assert!(is_set(&self.ingress, frontend_bit(key.addr, key.port, key.proto)));
            let targets = self.targets(key).expect("every slot names a backend that is there");
            assert!(allowed[key].contains(&targets), "{key:?} leads to {targets:?}");
        }
        for flow in &self.flows {
            let now = self.backends[flow.id as usize];
            let (addr, port, proto) = (flow.backend.addr, flow.backend.port, flow.backend.proto);
            assert_eq!((now.addr, now.port, now.proto), (addr, port, proto), "a flow kept its backend id");
            assert!(is_set(&self.ingress, flow.ingress_bit));
            assert!(is_set(&self.egress, backend_source_bit(addr, port, proto)));
            if flow.backend.flags & backend::LOCAL == 0 {
                assert!(is_set(&self.egress, backend_destination_bit(addr, port, proto)));
            }
        }
    }

    /// Where a frontend leads, or none when a slot of it names nothing.
    fn targets(&self, key: &FrontendKey<Addr>) -> Option<Targets> {
        let frontend = self.frontends[key];
        let slots = &self.rings[frontend.ring as usize..(frontend.ring + frontend.slots) as usize];
        let mut named = vec![false; self.backends.len()];
        slots.iter().for_each(|id| named[*id as usize] = true);
        let mut targets = Targets::new();
        for (id, _) in named.into_iter().enumerate().filter(|(_, named)| *named) {
            let to = self.backends[id];
            let bits = is_set(&self.egress, backend_source_bit(to.addr, to.port, to.proto))
                && (to.flags & backend::LOCAL != 0
                    || is_set(&self.egress, backend_destination_bit(to.addr, to.port, to.proto)));
            if id == 0 || to.proto != key.proto || !bits {
                return None;
            }
            targets.insert((to.addr, to.port, to.proto));
        }
        Some(targets)
    }

    /// Makes a flow through some frontend and slot, as a client would.
    pub(super) fn connect(&mut self, choice: u32) {
        let mut keys: Vec<_> = self.frontends.iter().filter(|(_, value)| value.slots > 0).collect();
        keys.sort_by_key(|(key, _)| (key.addr, key.port));
        let Some((key, value)) = keys.get(choice as usize % keys.len().max(1)) else { return };
        let id = self.rings[(value.ring + choice % value.slots) as usize];
        let ingress_bit = frontend_bit(key.addr, key.port, key.proto);
        self.flows.push(Flow { ingress_bit, id, backend: self.backends[id as usize] });
    }

    /// What a walk over the flow tables would find.
    pub(super) fn in_use(&self, started_ms: u64) -> InUse {
        let mut in_use = InUse { started_ms, ..InUse::default() };
        for flow in &self.flows {
            let (addr, port, proto) = (flow.backend.addr, flow.backend.port, flow.backend.proto);
            in_use.ingress_bits.insert(flow.ingress_bit);
            in_use.egress_bits.insert(backend_source_bit(addr, port, proto));
            in_use.egress_bits.insert(backend_destination_bit(addr, port, proto));
            in_use.backends.insert(flow.id);
        }
        in_use
    }

    /// Whether the maps hold exactly what the plan says.
    pub(super) fn is_like(&self, plan: &Plan) -> bool {
        let image = plan.image();
        let frontends: HashMap<_, _> = image.frontends.into_iter().collect();
        let backends = image.backends.iter().all(|(id, value)| self.backends[*id as usize] == *value);
        let rings =
            plan.rings().all(|(at, slots)| self.rings[at as usize..at as usize + slots.len()] == slots);
        let gates = (&self.ingress, &self.egress) == (&image.ingress_gate, &image.egress_gate);
        frontends == self.frontends && backends && rings && gates
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frontends.is_empty()
            && self.backends.iter().all(|backend| backend.proto == 0)
            && self.ingress.iter().chain(&self.egress).all(|word| *word == 0)
    }
}

fn wanted(port: &ServicePort, policy: Policy) -> Targets {
    let list = match policy {
        Policy::Cluster => &port.cluster,
        Policy::Local => &port.local,
    };
    list.iter().map(|e| (e.addr, e.port.to_be_bytes(), port.name.protocol.number())).collect()
}

fn is_set(words: &[u64], bit: u32) -> bool {
    words[(bit / 64) as usize] >> (bit % 64) & 1 == 1
}
