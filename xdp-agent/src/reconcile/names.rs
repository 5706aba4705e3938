//! Which service port has which service id, for those who read accounts.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    cluster::wanted::{Delta, IpAddress, ServicePortName},
    plan::Plan,
};

/// Names of service ports by their ids, kept by the writer of the maps.
#[derive(Clone, Debug, Default)]
pub struct ServiceNames(Arc<Mutex<HashMap<u32, ServicePortName>>>);

impl ServiceNames {
    /// The service port of every account, where its id is known; packets and bytes of the others are nobody's.
    pub fn resolve(&self, accounts: Vec<(u32, u64, u64)>) -> Vec<(ServicePortName, u64, u64)> {
        let names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let named = |(id, packets, bytes)| Some((names.get(&id)?.clone(), packets, bytes));
        accounts.into_iter().filter_map(named).collect()
    }

    /// Every service port by its id, as `namespace/name:port`.
    pub fn by_id(&self) -> BTreeMap<u32, String> {
        let names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        names.iter().map(|(id, name)| (*id, name.without_protocol())).collect()
    }

    /// Forgets those that are about to go.
    pub(super) fn forget<A: IpAddress>(&self, delta: &Delta<A>, plan: &Plan<A>) {
        let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for id in delta.ports.keys().filter_map(|name| plan.service_id(name)) {
            names.remove(&id);
        }
    }

    /// Learns those that have come.
    pub(super) fn learn<A: IpAddress>(&self, delta: &Delta<A>, plan: &Plan<A>) {
        let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for name in delta.ports.keys() {
            names.extend(plan.service_id(name).map(|id| (id, name.clone())));
        }
    }
}
