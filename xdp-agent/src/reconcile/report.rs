//! Says in the log, the metrics and the status what is served and what is not.

use std::collections::BTreeMap;

use tracing::{info, warn};

use super::Reconciler;
use crate::{
    cluster::wanted::Ip6,
    problem::{Place, Problem, ProblemKind},
    status::ProblemStatus,
};

/// Problems logged at a time; all of them are in the status.
const LOGGED_MAX: usize = 20;

/// What makes a problem the same as before.
type Identity = (ProblemKind, Option<Place>, Option<String>, String);

/// Problems that were reported last.
#[derive(Debug, Default)]
pub(super) struct Reported {
    /// Of the source and the cluster: they are long to list, and seldom change.
    versions: (u64, u64),
    plan: Vec<Problem>,
    said: BTreeMap<Identity, Problem>,
}

impl Reconciler {
    /// Says in the log, the metrics and the status what is served and what is not.
    pub(super) fn report(&mut self) {
        self.tell_fill();
        let versions = (self.source_problems_version, self.cluster.problems_version());
        let of_plan = [self.v4.plan.problems(), self.v6.plan.problems()].concat();
        if self.reported.versions != versions || self.reported.plan != of_plan {
            let all = self.source_problems.iter().cloned().chain(self.cluster.problems());
            let now =
                all.chain(of_plan.iter().cloned()).map(|problem| (identity(&problem), problem)).collect();
            self.report_problems(&now);
            self.reported = Reported { versions, plan: of_plan, said: now };
        }
    }

    /// Service ports that are served, of the family that has more of them.
    pub(super) fn services(&self) -> usize {
        self.v4.plan.services().max(self.v6.plan.services())
    }

    /// Says how much is served and how full the maps are.
    pub(super) fn tell_fill(&self) {
        let services = self.services();
        let (v4, v6) = (self.v4.plan.fill(), self.v6.plan.fill());
        self.told.metrics.services.set(services as i64);
        self.told.metrics.fill::<[u8; 4]>(v4);
        self.told.metrics.fill::<Ip6>(v6);
        self.told.shared.update(|status| {
            status.services = services;
            status.frontends = v4.frontends + v6.frontends;
            status.backends = v4.backends + v6.backends;
        });
    }

    fn report_problems(&self, now: &BTreeMap<Identity, Problem>) {
        let said = &self.reported.said;
        let new: Vec<_> = now.iter().filter(|(key, _)| !said.contains_key(key)).collect();
        for (_, problem) in new.iter().take(LOGGED_MAX) {
            warn!(kind = problem.kind.label(), %problem, "problem");
        }
        if new.len() > LOGGED_MAX {
            warn!(problems = new.len() - LOGGED_MAX, "further problems, listed by /status");
        }
        let gone = said.iter().filter(|(key, _)| !now.contains_key(key));
        for (_, problem) in gone.take(LOGGED_MAX) {
            info!(kind = problem.kind.label(), %problem, "no problem any more");
        }
        self.told.metrics.problems(now.values());
        let status =
            |problem: &Problem| ProblemStatus { kind: problem.kind.label(), message: problem.to_string() };
        let of_status = now.values().map(status).collect();
        self.told.shared.update(|all| all.problems = of_status);
    }

    /// Counts the objects.
    pub(super) fn report_objects(&self) {
        for (kind, count) in self.cluster.objects() {
            self.told.metrics.objects.get_or_create(&[("kind", kind)]).set(count as i64);
        }
    }
}

fn identity(problem: &Problem) -> Identity {
    let message = match problem.kind {
        // How full a map is changes all the time.
        ProblemKind::FrontendsFull
        | ProblemKind::BackendsFull
        | ProblemKind::RingsFull
        | ProblemKind::RingsReduced
        | ProblemKind::NetworksFull => String::new(),
        ProblemKind::Unreadable
        | ProblemKind::Syntax
        | ProblemKind::Invalid
        | ProblemKind::DuplicateObject
        | ProblemKind::DuplicateFrontend
        | ProblemKind::Unsupported => problem.message.clone(),
    };
    (problem.kind, problem.place.clone(), problem.object.clone(), message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_that_is_full_in_another_way_is_the_same_problem() {
        let full = |used: u32| Problem::general(ProblemKind::RingsReduced, format!("{used} in use"));
        assert_eq!(identity(&full(1)), identity(&full(2)));
        let bad = |message: &str| Problem::of(ProblemKind::Invalid, "Service a/b", message);
        assert_ne!(identity(&bad("one port")), identity(&bad("another port")));
    }
}
