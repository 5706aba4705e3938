//! Backend ids: which endpoint has which, and when an id may go to another.

use std::collections::{BTreeSet, HashMap};

use xdp_common::{
    gate::{backend_destination_bit, backend_source_bit},
    tables::{Backend, backend},
};

use super::{Addr, InUse, gates::Gate, slices::QUARANTINE_MS};
use crate::cluster::Endpoint;

/// What an id stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Identity {
    addr: Addr,
    port: u16,
    proto: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No endpoint and no flow.
    Free,
    /// In the plan.
    Live,
    /// From a previous agent, and not yet claimed.
    Adopted,
    /// Its endpoint is gone but flows may still use it: since when, once that has surely been applied.
    Gone(Option<u64>),
}

#[derive(Clone, Debug)]
struct Slot {
    state: State,
    /// How many rings and keepers use it, and how many of them say that it is on this node.
    uses: u32,
    local_uses: u32,
    /// The value that the map holds once the changes given out so far are applied.
    written: Backend<Addr>,
    generation: u32,
    identity: Identity,
    /// Whether its bits of the egress gate are held.
    source_bit: bool,
    destination_bit: bool,
}

/// Every backend slot.
#[derive(Debug)]
pub(super) struct Backends {
    /// By id; slot 0 is never used.
    slots: Vec<Slot>,
    limit: u32,
    ids: HashMap<Identity, u32>,
    free: BTreeSet<u32>,
    /// Ids whose uses changed since they were last settled.
    touched: BTreeSet<u32>,
    /// Ids whose endpoint is gone.
    gone: BTreeSet<u32>,
    /// Those of them whose wait has not begun.
    leaving: Vec<u32>,
}

const NOTHING: Backend<Addr> =
    Backend { addr: [0; 4], port: [0; 2], proto: 0, flags: 0, generation: 0, service: 0 };

impl Slot {
    const EMPTY: Self = Self {
        state: State::Free,
        uses: 0,
        local_uses: 0,
        written: NOTHING,
        generation: 0,
        identity: Identity { addr: [0; 4], port: 0, proto: 0 },
        source_bit: false,
        destination_bit: false,
    };

    /// The value of the slot with its identity.
    fn value(&self, flags: u8) -> Backend<Addr> {
        let Identity { addr, port, proto } = self.identity;
        Backend { addr, port: port.to_be_bytes(), proto, flags, generation: self.generation, service: 0 }
    }

    fn hold_bits(&mut self, egress: &mut Gate) {
        let Backend { addr, port, proto, flags, .. } = self.written;
        if !self.source_bit {
            self.source_bit = true;
            egress.need(backend_source_bit(addr, port, proto));
        }
        if !self.destination_bit && flags & backend::LOCAL == 0 {
            self.destination_bit = true;
            egress.need(backend_destination_bit(addr, port, proto));
        }
    }

    fn drop_bits(&mut self, egress: &mut Gate, in_use: &InUse) {
        let Backend { addr, port, proto, .. } = self.written;
        if std::mem::take(&mut self.source_bit) {
            egress.drop(backend_source_bit(addr, port, proto), &in_use.egress_bits);
        }
        if std::mem::take(&mut self.destination_bit) {
            egress.drop(backend_destination_bit(addr, port, proto), &in_use.egress_bits);
        }
    }
}

impl Backends {
    /// No backends; ids run from 1 to `limit` - 1.
    pub(super) fn new(limit: u32) -> Self {
        let (slots, ids) = (vec![Slot::EMPTY], HashMap::new());
        let (free, touched, gone) = Default::default();
        Self { slots, limit, ids, free, touched, gone, leaving: Vec::new() }
    }

    /// Takes over the slots of a previous agent.
    pub(super) fn adopt(limit: u32, backends: Vec<(u32, Backend<Addr>)>, egress: &mut Gate) -> Self {
        let mut new = Self::new(limit);
        let last = backends.iter().map(|(id, _)| *id).filter(|id| *id < limit).max().unwrap_or(0);
        new.slots.resize(last as usize + 1, Slot::EMPTY);
        new.free = (1..=last).collect();
        for (id, value) in backends {
            if id == 0 || id >= limit {
                continue;
            }
            let slot = &mut new.slots[id as usize];
            (slot.written, slot.generation) = (value, value.generation);
            if value.proto == 0 {
                continue;
            }
            slot.identity =
                Identity { addr: value.addr, port: u16::from_be_bytes(value.port), proto: value.proto };
            slot.state = State::Adopted;
            slot.hold_bits(egress);
            new.ids.entry(slot.identity).or_insert(id);
            new.free.remove(&id);
            new.touched.insert(id);
        }
        new
    }

    /// Uses the id of an endpoint, giving it one if it has none; none when all are taken.
    pub(super) fn acquire(&mut self, endpoint: &Endpoint, proto: u8) -> Option<u32> {
        let identity = Identity { addr: endpoint.addr, port: endpoint.port, proto };
        let id = match self.ids.get(&identity) {
            Some(&id) => id,
            None => self.assign(identity)?,
        };
        self.use_id(id, endpoint.local);
        Some(id)
    }

    /// Uses the id of an endpoint if it has one that still counts.
    pub(super) fn acquire_known(&mut self, endpoint: &Endpoint, proto: u8) -> Option<u32> {
        let identity = Identity { addr: endpoint.addr, port: endpoint.port, proto };
        let id = *self.ids.get(&identity)?;
        if matches!(self.slots[id as usize].state, State::Free | State::Gone(_)) {
            return None;
        }
        self.use_id(id, endpoint.local);
        Some(id)
    }

    /// Takes one use back.
    pub(super) fn release(&mut self, id: u32, local: bool) {
        let slot = &mut self.slots[id as usize];
        slot.uses -= 1;
        slot.local_uses -= u32::from(local);
        if slot.uses == 0 && slot.state == State::Live && slot.written.proto == 0 {
            // It was never written: a service that did not fit gives it back to those after it.
            (slot.state, slot.generation) = (State::Free, slot.written.generation);
            self.ids.remove(&slot.identity);
            self.free.insert(id);
            self.touched.remove(&id);
        } else {
            self.touched.insert(id);
        }
    }

    fn assign(&mut self, identity: Identity) -> Option<u32> {
        let id = match self.free.pop_first() {
            Some(id) => id,
            None => {
                let id = u32::try_from(self.slots.len()).ok().filter(|id| *id < self.limit)?;
                self.slots.push(Slot::EMPTY);
                id
            }
        };
        let slot = &mut self.slots[id as usize];
        (slot.state, slot.identity) = (State::Live, identity);
        slot.generation = slot.generation.wrapping_add(1);
        self.ids.insert(identity, id);
        Some(id)
    }

    fn use_id(&mut self, id: u32, local: bool) {
        let slot = &mut self.slots[id as usize];
        slot.uses += 1;
        slot.local_uses += u32::from(local);
        self.touched.insert(id);
    }

    /// Writes the slots that rings are about to name, and holds their bits.
    pub(super) fn settle_used(&mut self, egress: &mut Gate) -> Vec<(u32, Backend<Addr>)> {
        let mut writes = Vec::new();
        let (slots, gone) = (&mut self.slots, &mut self.gone);
        self.touched.retain(|&id| {
            let slot = &mut slots[id as usize];
            if slot.uses == 0 {
                return true;
            }
            if let State::Gone(_) = slot.state {
                gone.remove(&id);
            }
            slot.state = State::Live;
            let flags = if slot.local_uses > 0 { backend::LOCAL } else { 0 };
            if slot.written.proto != 0 && slot.written.flags != flags {
                // The address is on another node now: another Pod.
                slot.generation = slot.generation.wrapping_add(1);
            }
            let value = slot.value(flags);
            if value != slot.written {
                slot.written = value;
                writes.push((id, value));
            }
            slot.hold_bits(egress);
            false
        });
        writes
    }

    /// Raises the generation of the slots that nothing uses any more. With `keep_adopted`, slots of the previous agent wait, because its rings still name them.
    pub(super) fn settle_unused(&mut self, keep_adopted: bool) -> Vec<(u32, Backend<Addr>)> {
        let mut writes = Vec::new();
        let (slots, gone, leaving) = (&mut self.slots, &mut self.gone, &mut self.leaving);
        self.touched.retain(|&id| {
            let slot = &mut slots[id as usize];
            let is_unused = slot.uses == 0;
            match slot.state {
                State::Adopted if is_unused && keep_adopted => return true,
                State::Live | State::Adopted if is_unused => {
                    slot.state = State::Gone(None);
                    gone.insert(id);
                    leaving.push(id);
                    slot.generation = slot.generation.wrapping_add(1);
                    slot.written.generation = slot.generation;
                    writes.push((id, slot.written));
                }
                State::Live | State::Adopted | State::Free | State::Gone(_) => {}
            }
            false
        });
        writes
    }

    /// Starts the wait for slots that were given up in earlier calls.
    pub(super) fn tick(&mut self, now_ms: u64) {
        for id in self.leaving.drain(..) {
            if let State::Gone(since @ None) = &mut self.slots[id as usize].state {
                *since = Some(now_ms);
            }
        }
    }

    /// Empties the slots that a walk over the flow tables did not find in use.
    pub(super) fn collect(&mut self, in_use: &InUse, egress: &mut Gate) -> Vec<(u32, Backend<Addr>)> {
        let mut writes = Vec::new();
        let (slots, ids, free) = (&mut self.slots, &mut self.ids, &mut self.free);
        self.gone.retain(|&id| {
            let slot = &mut slots[id as usize];
            let State::Gone(Some(since)) = slot.state else { return true };
            if since.saturating_add(QUARANTINE_MS) > in_use.started_ms || in_use.backends.contains(&id) {
                return true;
            }
            slot.drop_bits(egress, in_use);
            slot.state = State::Free;
            slot.written = Backend { generation: slot.generation, ..NOTHING };
            if ids.get(&slot.identity) == Some(&id) {
                ids.remove(&slot.identity);
            }
            free.insert(id);
            writes.push((id, slot.written));
            false
        });
        writes
    }

    /// Ids given out, also those whose endpoint is gone.
    pub(super) fn count(&self) -> u32 {
        (self.slots.len() - 1 - self.free.len()) as u32
    }

    /// Every slot that was ever used.
    pub(super) fn written(&self) -> impl Iterator<Item = (u32, Backend<Addr>)> {
        (0..).zip(&self.slots).skip(1).map(|(id, slot)| (id, slot.written))
    }
}
