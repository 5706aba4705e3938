//! One pass over service ports: what each needs and gives up, and the order of the changes.

use std::{
    collections::{BTreeSet, hash_map::Entry},
    sync::Arc,
};

use xdp_common::{
    net::UDP,
    tables::{ACCOUNTS_V4, Frontend, FrontendKey, network::sources_of},
};

use super::{
    Change, Owner, Placed, Plan, gate_bits,
    refused::Refusal,
    service::{self, Planned, address_key, addresses, endpoints, identity, key},
};
use crate::cluster::wanted::{Delta, IpAddress, Network, ServicePort, ServicePortName};

/// Changes of one pass, by the phase in which they are applied.
pub(super) struct Pass<A> {
    pub(super) networks: Vec<Change<A>>,
    backends: Vec<Change<A>>,
    rings: Vec<Change<A>>,
    frontends: Vec<Change<A>>,
    /// Addresses as such, behind the frontends: until those are in, their ports are better dropped than refused.
    addresses: Vec<Change<A>>,
    /// Entries that their owners no longer want.
    leaving: Vec<(FrontendKey<A>, Owner)>,
    pub(super) left_networks: Vec<(u32, Network<A>)>,
    left_backends: Vec<Change<A>>,
}

impl<A> Default for Pass<A> {
    fn default() -> Self {
        Self {
            networks: Vec::new(),
            backends: Vec::new(),
            rings: Vec::new(),
            frontends: Vec::new(),
            addresses: Vec::new(),
            leaving: Vec::new(),
            left_networks: Vec::new(),
            left_backends: Vec::new(),
        }
    }
}

impl<A: IpAddress> Plan<A> {
    /// Adds up what rings will need before the first of them is made.
    pub(super) fn note_wishes(&mut self, delta: &Delta<A>) {
        for (name, port) in &delta.ports {
            let planned =
                self.ids.get(name).and_then(|id| self.services.get(id)).map(|planned| &planned.port);
            let before = self.refused.get(name).or(planned).map_or(0, |port| service::room(port));
            let after = port.as_ref().map_or(0, |port| service::room(port));
            self.ring_room = self.ring_room - before + after;
        }
    }

    /// Plans one service port, or leaves it exactly as it is.
    pub(super) fn apply(&mut self, port: &Arc<ServicePort<A>>, pass: &mut Pass<A>) {
        let known = self.ids.get(&port.name).and_then(|id| self.services.get_mut(id));
        if let Some(planned) = known
            && planned.port == *port
        {
            planned.port = Arc::clone(port); // one copy in memory
            self.refused.remove(&port.name);
            return;
        }
        match self.try_apply(port, pass) {
            Ok(()) => self.refused.remove(&port.name),
            Err(why) => self.refused.insert(Arc::clone(port), why),
        }
    }

    fn try_apply(&mut self, port: &Arc<ServicePort<A>>, pass: &mut Pass<A>) -> Result<(), Refusal> {
        let keys: Vec<_> = port.frontends.iter().map(|frontend| key(port, frontend)).collect();
        let id = match self.ids.get(&port.name) {
            Some(id) => *id,
            None => self.new_id(&keys),
        };
        self.check_room(port, &keys, id)?;
        let found = self.find_rings(port, id)?;
        // Nothing is refused from here on.
        found.adopted.into_iter().for_each(|slice| self.adopted.take(slice));
        for network in &port.sources {
            self.networks.put(sources_of(id), *network, 1, &mut pass.networks);
        }
        let before = self.services.remove(&id);
        self.reduced -= before.as_ref().map_or(0, |before| u32::from(before.is_reduced()));
        let wanted = endpoints(port);
        for (&endpoint, &used) in &wanted {
            let identity = identity(port, id, endpoint);
            // Who only serves on needs an id for its flows, which it has if there are any.
            if used.flags & LISTED != 0 || self.backends.serving_id(&identity).is_some() {
                let (egress, writes) = (&mut self.egress, &mut pass.backends);
                self.backends.acquire(identity, used, egress, writes);
            }
        }
        for (policy, slice) in found.fresh {
            if let Some(slots) = service::content(port, policy, slice.slots, id, &self.backends) {
                pass.rings.push(Change::Ring { offset: slice.offset, slots });
            }
        }
        let new = Planned { port: Arc::clone(port), rings: found.rings };
        for (key, frontend) in keys.iter().zip(&port.frontends) {
            let value = new.frontend(id, frontend, self.knows_pods);
            self.place(*key, value, Owner::Service(id), &mut pass.frontends);
        }
        for (addr, is_cluster_ip) in addresses(port) {
            let claims = self.addresses.entry(addr).or_default();
            claims.add(is_cluster_ip);
            let value = claims.value();
            self.place(address_key(addr), value, Owner::Address, &mut pass.addresses);
        }
        if let Some(before) = before {
            self.leave(id, &before, Some(&new), pass);
        } else {
            self.ids.insert(port.name.clone(), id);
        }
        self.reduced += u32::from(new.is_reduced());
        self.services.insert(id, new);
        Ok(())
    }

    fn check_room(&self, port: &ServicePort<A>, keys: &[FrontendKey<A>], id: u32) -> Result<(), Refusal> {
        let own = addresses(port).into_keys().map(address_key);
        let wanted = keys.iter().copied().chain(own).filter(|key| !self.frontends.contains_key(key)).count();
        if self.frontends.len() + wanted > self.limits.frontends as usize {
            return Err(Refusal::Frontends { wanted });
        }
        let wanted = self.networks.missing(sources_of(id), &port.sources);
        if wanted > self.networks.room() {
            return Err(Refusal::Networks { wanted });
        }
        let listed = endpoints(port).into_iter().filter(|(_, used)| used.flags & LISTED != 0);
        let wanted =
            listed.filter(|(endpoint, _)| self.backends.id(&identity(port, id, *endpoint)).is_none()).count();
        if wanted > self.backends.room() {
            return Err(Refusal::Backends { wanted });
        }
        Ok(())
    }

    /// An id for a service port: the one that a previous agent gave to one of its frontends, or a new one. Ids stay within the
    /// accounts as long as they can, and come back as late as they can.
    fn new_id(&mut self, keys: &[FrontendKey<A>]) -> u32 {
        let is_free = |id: &u32| *id != 0 && !self.services.contains_key(id) && !self.left_ids.contains(id);
        let adopted = keys
            .iter()
            .filter_map(|key| self.frontends.get(key))
            .filter(|placed| placed.owner == Owner::Adopted);
        if let Some(known) = adopted.map(|placed| placed.value.service).find(is_free) {
            return known;
        }
        let taken = (self.services.len() + self.left_ids.len()) as u32;
        let is_crowded = taken > ACCOUNTS_V4.entries / 8 * 7;
        let end = if is_crowded { (2 * taken).next_power_of_two() } else { ACCOUNTS_V4.entries };
        let next = (self.last_id.saturating_add(1)..end).find(is_free);
        self.last_id = next.or_else(|| (1..end).find(is_free)).unwrap_or(end);
        self.last_id
    }

    fn place(&mut self, key: FrontendKey<A>, value: Frontend, owner: Owner, writes: &mut Vec<Change<A>>) {
        match self.frontends.entry(key) {
            Entry::Vacant(free) => {
                gate_bits(&key, &value).into_iter().for_each(|bit| self.ingress.need(bit));
                free.insert(Placed { value, owner });
                self.has_new_udp_frontends |= key.proto == UDP;
            }
            Entry::Occupied(mut taken) => {
                let before = taken.insert(Placed { value, owner });
                if before.owner == Owner::Adopted {
                    self.unclaimed.remove(&key);
                    self.adopted.leave(&before.value, &mut self.slices);
                }
                if before.value == value {
                    return;
                }
                let (left, needed) = (gate_bits(&key, &before.value), gate_bits(&key, &value));
                if left != needed {
                    needed.into_iter().for_each(|bit| self.ingress.need(bit));
                    left.into_iter().for_each(|bit| self.ingress.leave(bit));
                }
            }
        }
        writes.push(Change::Frontend { key, value });
    }

    /// Lets go of a service port that is not wanted any more.
    pub(super) fn drop_service(&mut self, name: &ServicePortName, pass: &mut Pass<A>) {
        self.refused.remove(name);
        let Some(id) = self.ids.remove(name) else { return };
        let Some(before) = self.services.remove(&id) else { return };
        self.reduced -= u32::from(before.is_reduced());
        self.left_ids.insert(id);
        self.leave(id, &before, None, pass);
    }

    /// Gives up what a service port had and does not have after.
    fn leave(&mut self, id: u32, before: &Planned<A>, after: Option<&Planned<A>>, pass: &mut Pass<A>) {
        let (port, now) = (&before.port, after.map(|after| &after.port));
        let kept: BTreeSet<_> = now
            .into_iter()
            .flat_map(|port| port.frontends.iter().map(|frontend| key(port, frontend)))
            .collect();
        let keys = port.frontends.iter().map(|frontend| key(port, frontend));
        pass.leaving.extend(keys.filter(|key| !kept.contains(key)).map(|key| (key, Owner::Service(id))));
        for (addr, is_cluster_ip) in addresses(port) {
            let Some(claims) = self.addresses.get_mut(&addr) else { continue };
            claims.remove(is_cluster_ip);
            if claims.is_none() {
                self.addresses.remove(&addr);
                pass.leaving.push((address_key(addr), Owner::Address));
            } else {
                let value = claims.value();
                self.place(address_key(addr), value, Owner::Address, &mut pass.addresses);
            }
        }
        let sources =
            port.sources.iter().filter(|source| now.is_none_or(|now| !now.sources.contains(source)));
        pass.left_networks.extend(sources.map(|source| (sources_of(id), *source)));
        let wanted = now.map(|now| endpoints(now)).unwrap_or_default();
        for endpoint in endpoints(port).into_keys().filter(|endpoint| !wanted.contains_key(endpoint)) {
            if let Some(gone) = self.backends.serving_id(&identity(port, id, endpoint)) {
                self.backends.leave(gone, &mut pass.left_backends);
            }
        }
        for (_, slice) in before.rings.each() {
            if after.is_none_or(|after| after.rings.each().all(|(_, kept)| kept != slice)) {
                self.slices.release(slice);
            }
        }
    }

    /// Lets go of what a previous agent had, nobody has claimed, and nobody waits for.
    pub(super) fn leave_unclaimed(&mut self, pass: &mut Pass<A>) {
        if !self.is_complete {
            return;
        }
        if !self.unclaimed.is_empty() {
            let wanted = self.refused.keys();
            let leaving = self.unclaimed.iter().filter(|key| !wanted.contains(key));
            pass.leaving.extend(leaving.map(|key| (*key, Owner::Adopted)));
        }
    }

    /// Sets whether frontends that treat pods otherwise have to ask for their networks.
    pub(super) fn set_knows_pods(&mut self, knows_pods: bool, pass: &mut Pass<A>) {
        if std::mem::replace(&mut self.knows_pods, knows_pods) == knows_pods {
            return;
        }
        let values: Vec<_> = self
            .services
            .iter()
            .flat_map(|(id, planned)| {
                let frontends = planned.port.frontends.iter();
                frontends.map(|frontend| {
                    (*id, key(&planned.port, frontend), planned.frontend(*id, frontend, knows_pods))
                })
            })
            .collect();
        for (id, key, value) in values {
            // Where another service port has the frontend by now, it is that one's.
            if self.frontends.get(&key).is_some_and(|placed| placed.owner == Owner::Service(id)) {
                self.place(key, value, Owner::Service(id), &mut pass.frontends);
            }
        }
    }

    /// Puts the changes of a pass in order.
    pub(super) fn finish(&mut self, mut pass: Pass<A>, changes: &mut Vec<Change<A>>) {
        // Gates first: they must let through what a backend that moved off this node now needs.
        self.take_gates(changes);
        for phase in [pass.networks, pass.backends, pass.rings, pass.frontends, pass.addresses] {
            changes.extend(phase);
        }
        for (key, owner) in pass.leaving {
            let Entry::Occupied(placed) = self.frontends.entry(key) else { continue };
            let is_used = owner == Owner::Address && self.addresses.contains_key(&key.addr);
            if placed.get().owner != owner || is_used {
                continue; // somebody else has it now
            }
            let value = placed.remove().value;
            if owner == Owner::Adopted {
                self.unclaimed.remove(&key);
                self.adopted.leave(&value, &mut self.slices);
            }
            gate_bits(&key, &value).into_iter().for_each(|bit| self.ingress.leave(bit));
            changes.push(Change::RemoveFrontend { key });
            self.room.frontends = true;
        }
        if self.is_complete {
            let unclaimed = self.unclaimed.iter().filter_map(|key| self.frontends.get(key));
            let kept = unclaimed.map(|placed| sources_of(placed.value.service)).collect();
            pass.left_networks.extend(self.networks.unclaimed(&kept));
        }
        for (owner, network) in pass.left_networks {
            self.networks.remove(owner, network, changes);
            self.room.networks = true;
        }
        if self.is_complete && self.adopted.is_empty() {
            self.backends.leave_adopted(&mut pass.left_backends);
        }
        changes.extend(pass.left_backends);
    }
}

/// Flags of a backend that new flows may get.
const LISTED: u8 = xdp_common::tables::backend::IN_CLUSTER_LIST | xdp_common::tables::backend::IN_LOCAL_LIST;
