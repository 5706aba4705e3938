//! Maps as the kernel has them, that check after every single change what a packet could meet.

use std::collections::BTreeSet;

use xdp_common::{
    gate::{backend_destination_bit, backend_source_bit},
    tables::{Backend, GATE_WORDS},
};

use super::*;
use crate::plan::{
    networks::holds,
    service::{address_key, addresses, key},
};

/// Addresses and ports that a ring leads to.
type Targets<A> = BTreeSet<(A, [u8; 2])>;

/// Where a frontend leads clients outside and inside.
type Leads<A> = (Targets<A>, Targets<A>);

pub(super) struct Model<A> {
    pub(super) frontends: HashMap<FrontendKey<A>, Frontend>,
    pub(super) backends: Vec<Backend<A>>,
    pub(super) rings: Vec<u32>,
    pub(super) networks: HashMap<(u32, Network<A>), u32>,
    pub(super) ingress: Vec<u64>,
    pub(super) egress: Vec<u64>,
    pub(super) flows: Vec<Flow<A>>,
    limits: Limits,
    /// Slices that were named until a moment ago.
    left: Vec<(u32, u32, u64)>,
}

/// A flow that was made from what the maps said.
#[derive(Clone, Debug)]
pub(super) struct Flow<A> {
    pub(super) ingress_bit: u32,
    pub(super) id: u32,
    pub(super) backend: Backend<A>,
}

/// What may be met on the way from one wish to another.
struct Allowed<A> {
    leads: HashMap<FrontendKey<A>, Vec<Leads<A>>>,
    /// By frontend, as frontends may move between service ports.
    sources: HashMap<FrontendKey<A>, Vec<BTreeSet<Network<A>>>>,
}

impl<A: TestAddress> Model<A> {
    pub(super) fn new(limits: Limits) -> Self {
        let unspecified = A::UNSPECIFIED;
        let nothing = Backend {
            addr: unspecified,
            port: [0; 2],
            proto: 0,
            flags: 0,
            generation: 0,
            service: 0,
            node: unspecified,
        };
        Self {
            frontends: HashMap::new(),
            backends: vec![nothing; limits.backends as usize],
            rings: vec![0; limits.ring_slots as usize],
            networks: HashMap::new(),
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
    pub(super) fn adopted(&self) -> Adopted<A> {
        Adopted {
            frontends: self.frontends.iter().map(|(key, value)| (*key, *value)).collect(),
            backends: (0..).zip(self.backends.iter().copied()).skip(1).collect(),
            ingress_gate: self.ingress.clone(),
            egress_gate: self.egress.clone(),
            rings: self.rings.clone(),
            networks: self
                .networks
                .iter()
                .map(|((owner, network), value)| (*owner, *network, *value))
                .collect(),
        }
    }

    /// Applies an update on the way from one wish to another and checks every step.
    pub(super) fn apply_all(&mut self, update: &Update<A>, before: &Ports<A>, after: &Ports<A>, now_ms: u64) {
        let mut allowed = Allowed { leads: HashMap::new(), sources: HashMap::new() };
        for (key, value) in self.frontends.iter().filter(|(_, value)| value.service != 0) {
            allowed.leads.entry(*key).or_default().push(self.leads(key, value).unwrap());
            allowed.sources.entry(*key).or_default().push(self.sources(value.service));
        }
        for port in before.values().chain(after.values()) {
            for frontend in &port.frontends {
                let key = key(port, frontend);
                let leads = (targets(port, frontend.external), targets(port, frontend.internal));
                allowed.leads.entry(key).or_default().push(leads);
                allowed.sources.entry(key).or_default().push(port.sources.iter().copied().collect());
            }
        }
        for change in &update.changes {
            self.apply(change, now_ms);
            self.check(&allowed);
        }
    }

    fn apply(&mut self, change: &Change<A>, now_ms: u64) {
        match change {
            Change::Backend { id, value } => {
                assert_ne!(*id, 0);
                let before = std::mem::replace(&mut self.backends[*id as usize], *value);
                assert_ne!(before, *value, "a change that changes nothing");
                let identity = |of: &Backend<A>| (of.addr, of.port, of.proto, of.service);
                let is_same = identity(&before) == identity(value);
                assert!(
                    is_same || before.proto == 0 || value.proto == 0,
                    "an id changes hands only when it is free"
                );
                let raised = value.generation.wrapping_sub(before.generation);
                assert!(
                    raised == 1 || (raised == 0 && (is_same || value.proto == 0)),
                    "{before:?} to {value:?}"
                );
                let moves = (before.flags ^ value.flags) & backend::LOCAL != 0;
                assert!(raised == 1 || value.proto == 0 || !moves, "{before:?} to {value:?}");
            }
            Change::Ring { offset, slots } => {
                let (start, end) = (*offset, *offset + slots.len() as u32);
                let named = self.frontends.values().flat_map(slices);
                let rest = |(_, _, at): &&(u32, u32, u64)| now_ms < at + QUARANTINE_MS;
                let left = self.left.iter().filter(rest).map(|&(offset, len, _)| (offset, len));
                for (other, len) in named.chain(left).filter(|(_, len)| *len > 0) {
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
            Change::Network { owner, network, value: Some(value) } => {
                let before = self.networks.insert((*owner, *network), *value);
                assert_ne!(before, Some(*value), "a change that changes nothing");
                assert!(self.networks.len() <= self.limits.networks as usize);
            }
            Change::Network { owner, network, value: None } => {
                assert!(self.networks.remove(&(*owner, *network)).is_some());
            }
        }
    }

    fn leave(&mut self, frontend: Option<Frontend>, now_ms: u64) {
        let slices = frontend.iter().flat_map(slices).map(|(offset, len)| (offset, len, now_ms));
        self.left.extend(slices);
    }

    /// What a packet to any frontend would meet now.
    fn check(&self, allowed: &Allowed<A>) {
        for (key, value) in &self.frontends {
            assert!(gate_bits(key, value).into_iter().all(|bit| is_set(&self.ingress, bit)));
            if value.service == 0 {
                continue;
            }
            let leads = self.leads(key, value).expect("every slot names a backend that is there");
            assert!(allowed.leads[key].contains(&leads), "{key:?} leads to {leads:?}");
            if value.flags & frontend::RESTRICTED != 0 {
                let there = self.sources(value.service);
                let wanted = &allowed.sources[key];
                assert!(wanted.iter().any(|wanted| wanted.is_subset(&there)), "{there:?}, not {wanted:?}");
                let known: BTreeSet<_> = allowed.sources.values().flatten().flatten().collect();
                assert!(there.iter().all(|source| known.contains(source)));
            }
        }
        for flow in &self.flows {
            let now = self.backends[flow.id as usize];
            let (addr, port, proto) = (flow.backend.addr, flow.backend.port, flow.backend.proto);
            assert_eq!((now.addr, now.port, now.proto), (addr, port, proto), "a flow kept its backend id");
            assert!(is_set(&self.ingress, flow.ingress_bit));
            assert!(is_set(&self.egress, backend_source_bit(addr, port, proto)));
            assert!(is_set(&self.egress, backend_destination_bit(addr, port, proto)));
        }
    }

    /// Checks that nothing is ever dropped to these addresses for being in a ServiceCIDR.
    pub(super) fn check_own(&self, own: &[A]) {
        for addr in own {
            let covers = |((owner, network), _): &(&(u32, Network<A>), &u32)| {
                *owner == SERVICES && holds(network, *addr)
            };
            let longest = self.networks.iter().filter(covers).max_by_key(|((_, network), _)| network.len);
            assert!(longest.is_none_or(|(_, value)| *value == 0), "{:?}", longest);
        }
    }

    fn sources(&self, service: u32) -> BTreeSet<Network<A>> {
        let of_service = self.networks.keys().filter(|(owner, _)| *owner == sources_of(service));
        of_service.map(|(_, network)| *network).collect()
    }

    /// Where a frontend leads, or none when a slot of it names nothing.
    fn leads(&self, key: &FrontendKey<A>, value: &Frontend) -> Option<Leads<A>> {
        let [outer, inner] = slices(value).map(|slice| self.targets(key, value.service, slice));
        Some((outer?, inner?))
    }

    fn targets(&self, key: &FrontendKey<A>, service: u32, (ring, slots): (u32, u32)) -> Option<Targets<A>> {
        let slots = &self.rings[ring as usize..(ring + slots) as usize];
        let mut named = vec![false; self.backends.len()];
        slots.iter().for_each(|id| named[*id as usize] = true);
        let mut targets = Targets::new();
        for (id, _) in named.into_iter().enumerate().filter(|(_, named)| *named) {
            let to = self.backends[id];
            let bits = is_set(&self.egress, backend_source_bit(to.addr, to.port, to.proto))
                && is_set(&self.egress, backend_destination_bit(to.addr, to.port, to.proto));
            if id == 0 || to.proto != key.proto || to.service != service || !bits {
                return None;
            }
            targets.insert((to.addr, to.port));
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
    pub(super) fn is_like(&self, plan: &Plan<A>) -> bool {
        let frontends: HashMap<_, _> = plan.frontends().collect();
        let mut backends = plan.backends(0..u32::MAX);
        let rings = (0..3).flat_map(|part| plan.rings(part, 3));
        let mut rings = rings.map(|(at, slots)| self.rings[at as usize..at as usize + slots.len()] == slots);
        let networks = plan.networks().map(|(owner, network, value)| ((owner, network), value)).collect();
        frontends == self.frontends
            && backends.all(|(id, value)| self.backends[id as usize] == value)
            && rings.all(|is_same| is_same)
            && self.networks == networks
            && (&self.ingress[..], &self.egress[..]) == (plan.ingress_gate(), plan.egress_gate())
    }

    /// Checks that exactly what is wished is there, when nothing was refused.
    pub(super) fn check_complete(&self, ports: &Ports<A>) {
        let mut keys = HashSet::new();
        for port in ports.values() {
            keys.extend(port.frontends.iter().map(|frontend| key(port, frontend)));
            keys.extend(addresses(port).into_keys().map(address_key));
            for frontend in &port.frontends {
                let value = &self.frontends[&key(port, frontend)];
                self.check_lists(value, frontend);
                assert_eq!(self.sources(value.service), port.sources.iter().copied().collect());
            }
        }
        assert_eq!(keys, self.frontends.keys().copied().collect());
    }

    /// Every backend of a ring says that it is in the list that the ring is of.
    fn check_lists(&self, value: &Frontend, wanted: &DesiredFrontend<A>) {
        for ((ring, slots), policy) in slices(value).into_iter().zip([wanted.external, wanted.internal]) {
            let flag = match policy {
                Policy::Cluster => backend::IN_CLUSTER_LIST,
                Policy::Local => backend::IN_LOCAL_LIST,
            };
            let mut named = self.rings[ring as usize..(ring + slots) as usize].iter();
            assert!(named.all(|id| self.backends[*id as usize].flags & flag != 0));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frontends.is_empty()
            && self.networks.is_empty()
            && self.backends.iter().all(|backend| backend.proto == 0)
            && self.ingress.iter().chain(&self.egress).all(|word| *word == 0)
    }
}

fn slices(value: &Frontend) -> [(u32, u32); 2] {
    [(value.ring, value.slots), (value.inner_ring, value.inner_slots)]
}

fn targets<A: IpAddress>(port: &ServicePort<A>, policy: Policy) -> Targets<A> {
    let list = match policy {
        Policy::Cluster => &port.cluster,
        Policy::Local => &port.local,
    };
    list.iter().map(|e| (e.addr, e.port.to_be_bytes())).collect()
}

fn is_set(words: &[u64], bit: u32) -> bool {
    words[(bit / 64) as usize] >> (bit % 64) & 1 == 1
}
