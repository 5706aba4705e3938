//! How large rings are and where they come from.
//!
//! A ring should have [`maglev::SLOTS_PER_BACKEND`] slots per backend. Where the array is too small for that, all rings are
//! made smaller rather than some left out, by two rules that look at nothing but the plan:
//!
//! - What all rings would need at 100, 50 and 25 slots per backend decides where to begin: 100 and 50 as long as that
//!   is half of the array at most, 25 up to three quarters, else 10. A start, where all service ports come at once, so
//!   gives all of them the same.
//! - Rings that were made before may have more than that. So once they fill half of the array, the next ones begin at 25,
//!   and from seven eighths on at 10.
//!
//! From there the next smaller size is taken as long as there is no slice that long. A ring of too few slots grows when
//! its list changes, like any other then made anew.

use super::{
    Owner, Plan,
    adopted::named,
    maglev,
    refused::Refusal,
    service::{self, POLICIES, Planned, Rings, is_same, key, list, sizes},
    slices::Slice,
};
use crate::cluster::wanted::{IpAddress, Policy, ServicePort};

/// Rings for a service port, of which nothing has been written yet.
pub(super) struct NewRings {
    pub(super) rings: Rings,
    /// Those whose slices are new.
    pub(super) fresh: Vec<(Policy, Slice)>,
    /// Slices of a previous agent that hold just what they should.
    pub(super) adopted: Vec<Slice>,
}

impl<A: IpAddress> Plan<A> {
    /// Finds a slice for each list in use: the one it has, or that of a previous agent, or a new one.
    pub(super) fn find_rings(&mut self, port: &ServicePort<A>, id: u32) -> Result<NewRings, Refusal> {
        let mut new = NewRings { rings: Rings::default(), fresh: Vec::new(), adopted: Vec::new() };
        for policy in POLICIES {
            let wanted = list(port, policy);
            if wanted.is_empty() {
                continue;
            }
            if policy == Policy::Local && is_same(wanted, list(port, Policy::Cluster)) {
                new.rings.set(policy, new.rings.of(Policy::Cluster));
                continue;
            }
            let before = self.services.get(&id);
            if let Some(slice) = before.and_then(|before| ring_of(before, port, policy)) {
                new.rings.set(policy, slice);
            } else if let Some(slice) = self.adopted_ring(port, policy, id) {
                new.rings.set(policy, slice);
                new.adopted.push(slice);
            } else if let Some(slice) = self.allocate(wanted.len(), id) {
                new.rings.set(policy, slice);
                new.fresh.push((policy, slice));
            } else {
                new.fresh.iter().for_each(|(_, slice)| self.slices.undo(*slice));
                let wanted = sizes(wanted.len()).last().unwrap_or(0);
                return Err(Refusal::Rings { wanted });
            }
        }
        Ok(new)
    }

    fn allocate(&mut self, backends: usize, id: u32) -> Option<Slice> {
        let before: u32 =
            self.services.get(&id).map_or(0, |old| old.rings.each().map(|(_, slice)| slice.slots).sum());
        let per_backend = self.slots_per_backend(before);
        let largest = maglev::slots(backends, per_backend);
        sizes(backends).filter(|size| *size <= largest).find_map(|size| self.slices.allocate(size))
    }

    /// Where the search for room begins, for a service port that gives up so many slots.
    fn slots_per_backend(&self, given_up: u32) -> u32 {
        let all = u64::from(self.limits.ring_slots);
        let settled = u64::from(self.slices.settled().saturating_sub(given_up));
        let by_need = match self.ring_room {
            room if room * 100 <= all / 2 => 100,
            room if room * 50 <= all / 2 => 50,
            room if room * 25 <= all / 4 * 3 => 25,
            _ => 10,
        };
        let by_fill = match settled {
            settled if settled <= all / 2 => 100,
            settled if settled <= all / 8 * 7 => 25,
            _ => 10,
        };
        by_need.min(by_fill)
    }

    /// The slice by which a previous agent served a list, if all that name it are frontends of the service port and it holds
    /// what it should.
    fn adopted_ring(&self, port: &ServicePort<A>, policy: Policy, id: u32) -> Option<Slice> {
        let found = port.frontends.iter().filter_map(|wanted| {
            let placed = self.frontends.get(&key(port, wanted))?;
            (placed.owner == Owner::Adopted).then_some((wanted, placed.value))
        });
        let candidate = found.clone().find_map(|(wanted, value)| {
            let outer = Slice { offset: value.ring, slots: value.slots };
            let inner = Slice { offset: value.inner_ring, slots: value.inner_slots };
            let by_policy = [(wanted.external, outer), (wanted.internal, inner)];
            by_policy.into_iter().find(|(of, slice)| *of == policy && slice.slots > 0)
        });
        let (_, slice) = candidate?;
        let namings = found.flat_map(|(_, value)| named(&value)).filter(|other| *other == slice).count();
        let content = self.adopted.content(slice, namings as u32)?;
        if !sizes(list(port, policy).len()).any(|size| size == slice.slots) {
            return None;
        }
        let wanted = service::content(port, policy, slice.slots, id, &self.backends)?;
        (content == wanted).then_some(slice)
    }
}

/// The ring that a service port has for a list of another version of it.
fn ring_of<A: IpAddress>(before: &Planned<A>, port: &ServicePort<A>, policy: Policy) -> Option<Slice> {
    let rings = before.rings.each();
    rings
        .filter(|(of, _)| is_same(list(&before.port, *of), list(port, policy)))
        .map(|(_, slice)| slice)
        .next()
}
