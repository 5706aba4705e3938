//! Objects as a whole: how changes make them, and which changes lead from one whole to another.

use std::{collections::BTreeMap, sync::Arc};

use super::{Change, ObjectName, Objects};
use crate::source::Kind;

impl Objects {
    /// Takes in a change.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Service(name, object) => set(&mut self.services, name, object),
            Change::Slice(name, object) => set(&mut self.slices, name, object),
            Change::Node(name, object) => set(&mut self.nodes, name, object),
            Change::ServiceCidr(name, object) => set(&mut self.service_cidrs, name, object),
        }
    }

    /// The change that brings an object, if there is such an object.
    pub fn get(&self, kind: Kind, name: &ObjectName) -> Option<Change> {
        match kind {
            Kind::Service => some(Change::Service, &self.services, name),
            Kind::EndpointSlice => some(Change::Slice, &self.slices, name),
            Kind::Node => some(Change::Node, &self.nodes, &name.name),
            Kind::ServiceCidr => some(Change::ServiceCidr, &self.service_cidrs, &name.name),
        }
    }

    /// The changes that make these objects of others.
    pub fn changes_from(&self, before: &Self) -> Vec<Change> {
        let mut changes = Vec::new();
        differences(&before.services, &self.services, Change::Service, &mut changes);
        differences(&before.slices, &self.slices, Change::Slice, &mut changes);
        differences(&before.nodes, &self.nodes, Change::Node, &mut changes);
        differences(&before.service_cidrs, &self.service_cidrs, Change::ServiceCidr, &mut changes);
        changes
    }
}

fn set<K: Ord, V>(map: &mut BTreeMap<K, Arc<V>>, name: K, object: Option<Arc<V>>) {
    match object {
        Some(object) => drop(map.insert(name, object)),
        None => drop(map.remove(&name)),
    }
}

fn some<K: Ord + Clone, V>(
    change: impl Fn(K, Option<Arc<V>>) -> Change,
    map: &BTreeMap<K, Arc<V>>,
    name: &K,
) -> Option<Change> {
    map.get(name).map(|object| change(name.clone(), Some(Arc::clone(object))))
}

fn differences<K: Ord + Clone, V: PartialEq>(
    before: &BTreeMap<K, Arc<V>>,
    now: &BTreeMap<K, Arc<V>>,
    change: impl Fn(K, Option<Arc<V>>) -> Change,
    changes: &mut Vec<Change>,
) {
    let gone = before.keys().filter(|name| !now.contains_key(*name));
    changes.extend(gone.map(|name| change(name.clone(), None)));
    let new = now.iter().filter(|(name, object)| before.get(*name) != Some(*object));
    changes.extend(new.map(|(name, object)| change(name.clone(), Some(Arc::clone(object)))));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::{Node, Service, ServiceCidr, Slice};

    #[test]
    fn the_changes_between_two_wholes_lead_from_one_to_the_other_and_are_no_more_than_that() {
        let name = |name: &str| ObjectName::new("shop", name);
        let slice = |service: &str| {
            let mut slice = Slice::default();
            slice.service = service.into();
            Arc::new(slice)
        };
        let mut before = Objects::default();
        before.services.insert(name("same"), Arc::new(Service::default()));
        before.slices.insert(name("changed"), slice("a"));
        before.nodes.insert("gone".to_owned(), Arc::new(Node::default()));
        let mut now = Objects::default();
        now.services.insert(name("same"), Arc::new(Service::default()));
        now.slices.insert(name("changed"), slice("b"));
        now.service_cidrs.insert("new".to_owned(), Arc::new(ServiceCidr::default()));
        let changes = now.changes_from(&before);
        assert_eq!(changes.len(), 3);
        let mut made = before.clone();
        changes.into_iter().for_each(|change| made.apply(change));
        assert_eq!(made, now);
        assert_eq!(now.changes_from(&now), []);
        assert_eq!(
            now.get(Kind::EndpointSlice, &name("changed")),
            Some(Change::Slice(name("changed"), Some(slice("b"))))
        );
        assert_eq!(now.get(Kind::Node, &ObjectName::new("", "gone")), None);
    }
}
