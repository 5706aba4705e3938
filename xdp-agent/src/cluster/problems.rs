//! What is wrong with objects, by object.

use std::{collections::BTreeMap, fmt};

use crate::{
    objects::{Flaw, ObjectName},
    problem::Problem,
};

/// The problems that single objects have, and the slices of a Service beside other Services.
#[derive(Debug, Default)]
pub(super) struct Problems {
    by_object: BTreeMap<String, Box<[Problem]>>,
    by_service: BTreeMap<ObjectName, Box<[Problem]>>,
    version: u64,
}

impl Problems {
    /// Takes the flaws of an object in place of those that it had; none when it is gone.
    pub(super) fn set(&mut self, kind: &str, name: impl fmt::Display, flaws: Option<&[Flaw]>) {
        let flaws = flaws.unwrap_or_default();
        if flaws.is_empty() && self.by_object.is_empty() {
            return;
        }
        let object = format!("{kind} {name}");
        let flaws = flaws.iter().map(|flaw| Problem::of(flaw.kind, &object, &*flaw.sentence));
        let problems: Box<[Problem]> = flaws.collect();
        if problems.is_empty() {
            if self.by_object.remove(&object).is_some() {
                self.touch();
            }
        } else if self.by_object.get(&object) != Some(&problems) {
            self.by_object.insert(object, problems);
            self.touch();
        }
    }

    /// Takes what is wrong with the slices of a Service beside other Services, in place of what was.
    pub(super) fn set_of_service(&mut self, service: &ObjectName, problems: Vec<Problem>) {
        let before = self.by_service.get(service).map_or(&[][..], |before| before);
        if *before == *problems {
            return;
        }
        if problems.is_empty() {
            self.by_service.remove(service);
        } else {
            self.by_service.insert(service.clone(), problems.into());
        }
        self.touch();
    }

    /// Notes that problems beyond single objects have changed.
    pub(super) fn touch(&mut self) {
        self.version += 1;
    }

    /// Changes with the problems.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.by_object.values().chain(self.by_service.values()).flatten()
    }
}
