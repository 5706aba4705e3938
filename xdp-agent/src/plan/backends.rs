//! Backend ids: which endpoint has which, and when an id may go to another.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
};

use xdp_common::{
    gate::{backend_destination_bit, backend_source_bit},
    tables::{Backend, backend},
};

use super::{Change, InUse, gates::Gate, service::Use, slices::QUARANTINE_MS};
use crate::cluster::wanted::IpAddress;

/// What an id stands for: an endpoint of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity<A> {
    pub(super) service: u32,
    pub(super) addr: A,
    pub(super) port: u16,
    /// IP protocol number; a service id may come back for another protocol.
    pub(super) proto: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No endpoint and no flow.
    Free,
    /// Of a service port in the plan.
    Live,
    /// From a previous agent, and not yet claimed.
    Adopted,
    /// Its endpoint is gone but flows may still use it: since when, once that has surely been applied.
    Gone(Option<u64>),
}

#[derive(Clone, Debug)]
struct Slot<A> {
    state: State,
    /// What the map holds once the changes given out so far are applied.
    value: Backend<A>,
    /// Whether its bits of the egress gate are held.
    source_bit: bool,
    destination_bit: bool,
}

/// Every backend slot.
#[derive(Debug)]
pub(super) struct Backends<A> {
    /// By id; slot 0 is never used.
    slots: Vec<Slot<A>>,
    limit: u32,
    ids: HashMap<Identity<A>, u32>,
    free: BTreeSet<u32>,
    /// Ids of a previous agent that nobody has claimed.
    adopted: BTreeSet<u32>,
    /// Ids whose endpoint is gone.
    gone: BTreeSet<u32>,
    /// Those of them whose wait has not begun.
    leaving: Vec<u32>,
}

impl<A: IpAddress> Slot<A> {
    const EMPTY: Self =
        Self { state: State::Free, value: nothing(0), source_bit: false, destination_bit: false };

    fn identity(&self) -> Identity<A> {
        let Backend { service, addr, port, proto, .. } = self.value;
        Identity { service, addr, port: u16::from_be_bytes(port), proto }
    }

    fn hold_bits(&mut self, egress: &mut Gate) {
        let Backend { addr, port, proto, .. } = self.value;
        if !self.source_bit {
            self.source_bit = true;
            egress.need(backend_source_bit(addr, port, proto));
        }
        // Of those on this node too: what one of them sends to itself by a managed interface comes back half-translated.
        if !self.destination_bit {
            self.destination_bit = true;
            egress.need(backend_destination_bit(addr, port, proto));
        }
    }

    fn drop_bits(&mut self, egress: &mut Gate, in_use: &InUse) {
        let Backend { addr, port, proto, .. } = self.value;
        if std::mem::take(&mut self.source_bit) {
            egress.drop(backend_source_bit(addr, port, proto), &in_use.egress_bits);
        }
        if std::mem::take(&mut self.destination_bit) {
            egress.drop(backend_destination_bit(addr, port, proto), &in_use.egress_bits);
        }
    }
}

impl<A: IpAddress> Backends<A> {
    /// Takes over the slots of a previous agent; ids run from 1 to `limit` - 1.
    pub(super) fn adopt(limit: u32, backends: Vec<(u32, Backend<A>)>, egress: &mut Gate) -> Self {
        let last = backends.iter().map(|(id, _)| *id).filter(|id| *id < limit).max().unwrap_or(0);
        let mut new = Self {
            slots: vec![Slot::EMPTY; last as usize + 1],
            limit,
            ids: HashMap::new(),
            free: (1..=last).collect(),
            adopted: BTreeSet::new(),
            gone: BTreeSet::new(),
            leaving: Vec::new(),
        };
        for (id, value) in backends.into_iter().filter(|(id, _)| (1..limit).contains(id)) {
            let slot = &mut new.slots[id as usize];
            slot.value = value;
            if value.proto == 0 {
                continue;
            }
            slot.state = State::Adopted;
            slot.hold_bits(egress);
            new.ids.entry(slot.identity()).or_insert(id);
            new.free.remove(&id);
            new.adopted.insert(id);
        }
        new
    }

    /// The id of an endpoint, if it has one; its flows may be all that is left of it.
    pub(super) fn id(&self, identity: &Identity<A>) -> Option<u32> {
        self.ids.get(identity).copied()
    }

    /// The id of an endpoint, if it has one that still counts.
    pub(super) fn serving_id(&self, identity: &Identity<A>) -> Option<u32> {
        self.id(identity).filter(|id| match self.slots[*id as usize].state {
            State::Live | State::Adopted => true,
            State::Free | State::Gone(_) => false,
        })
    }

    /// How many ids are left.
    pub(super) fn room(&self) -> usize {
        self.free.len() + (self.limit as usize).saturating_sub(self.slots.len())
    }

    /// Gives an endpoint its id, for which there must be room, and these flags; writes what is new.
    pub(super) fn acquire(
        &mut self,
        identity: Identity<A>,
        Use { flags, node }: Use<A>,
        egress: &mut Gate,
        writes: &mut Vec<Change<A>>,
    ) -> u32 {
        let id = self.ids.get(&identity).copied().unwrap_or_else(|| self.assign(identity));
        match self.slots[id as usize].state {
            State::Gone(_) => _ = self.gone.remove(&id),
            State::Adopted => _ = self.adopted.remove(&id),
            State::Free | State::Live => {}
        }
        let slot = &mut self.slots[id as usize];
        slot.state = State::Live;
        let before = slot.value;
        let has_moved = before.proto != 0 && (before.flags ^ flags) & backend::LOCAL != 0;
        slot.value = Backend {
            addr: identity.addr,
            port: identity.port.to_be_bytes(),
            proto: identity.proto,
            flags,
            // An address that is on another node now is another Pod's.
            generation: before.generation.wrapping_add(u32::from(before.proto == 0 || has_moved)),
            service: identity.service,
            node,
        };
        slot.hold_bits(egress);
        if slot.value != before {
            writes.push(Change::Backend { id, value: slot.value });
        }
        id
    }

    fn assign(&mut self, identity: Identity<A>) -> u32 {
        let id = self.free.pop_first().unwrap_or_else(|| {
            self.slots.push(Slot::EMPTY);
            self.slots.len() as u32 - 1
        });
        self.ids.insert(identity, id);
        id
    }

    /// The endpoint of an id in use serves no more: its flows are told by the generation.
    pub(super) fn leave(&mut self, id: u32, writes: &mut Vec<Change<A>>) {
        let slot = &mut self.slots[id as usize];
        slot.state = State::Gone(None);
        slot.value.generation = slot.value.generation.wrapping_add(1);
        self.adopted.remove(&id);
        self.gone.insert(id);
        self.leaving.push(id);
        writes.push(Change::Backend { id, value: slot.value });
    }

    /// Lets go of what a previous agent had and nobody has claimed.
    pub(super) fn leave_adopted(&mut self, writes: &mut Vec<Change<A>>) {
        for id in std::mem::take(&mut self.adopted) {
            self.leave(id, writes);
        }
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
    pub(super) fn collect(&mut self, in_use: &InUse, egress: &mut Gate) -> Vec<Change<A>> {
        let mut writes = Vec::new();
        let (slots, ids, free) = (&mut self.slots, &mut self.ids, &mut self.free);
        self.gone.retain(|&id| {
            let slot = &mut slots[id as usize];
            let State::Gone(Some(since)) = slot.state else { return true };
            if since.saturating_add(QUARANTINE_MS) > in_use.started_ms || in_use.backends.contains(&id) {
                return true;
            }
            slot.drop_bits(egress, in_use);
            if ids.get(&slot.identity()) == Some(&id) {
                ids.remove(&slot.identity());
            }
            slot.state = State::Free;
            slot.value = nothing(slot.value.generation);
            free.insert(id);
            writes.push(Change::Backend { id, value: slot.value });
            false
        });
        writes
    }

    /// Ids given out, also those whose endpoint is gone.
    pub(super) fn count(&self) -> u32 {
        (self.slots.len() - 1 - self.free.len()) as u32
    }

    /// Every slot of these ids that was ever used.
    pub(super) fn written(&self, ids: Range<u32>) -> impl Iterator<Item = (u32, Backend<A>)> {
        let ids = ids.start.max(1)..ids.end.min(self.slots.len() as u32);
        ids.map(|id| (id, self.slots[id as usize].value))
    }
}

/// An empty slot, which keeps its generation so that it never repeats.
const fn nothing<A: IpAddress>(generation: u32) -> Backend<A> {
    Backend {
        addr: A::UNSPECIFIED,
        port: [0; 2],
        proto: 0,
        flags: 0,
        generation,
        service: 0,
        node: A::UNSPECIFIED,
    }
}
