//! Says in the log, the metrics and the status what is served and what is not.

use std::collections::BTreeMap;

use tracing::{info, warn};

use super::Reconciler;
use crate::{
    cluster::wanted::Ip6,
    problem::{Place, Problem, ProblemKind},
    status::ProblemStatus,
};

/// Lines of the log about problems a second, so that ten thousand broken objects do not drown everything else.
const LINES_MAX: usize = 50;

/// What makes a problem the same as before.
type Identity = (ProblemKind, Option<Place>, Option<String>, String);

/// What is known of problems, and what of that the log has said.
#[derive(Debug, Default)]
pub(super) struct Reported {
    /// Of the source and the cluster: they are long to list, and seldom change.
    versions: (u64, u64),
    node: Vec<Problem>,
    now: BTreeMap<Identity, Problem>,
    said: BTreeMap<Identity, Problem>,
    /// Whether the two differ, as far as is known.
    is_behind: bool,
}

/// What the log is to say next.
#[derive(Debug, Default, PartialEq)]
struct Lines {
    new: Vec<Problem>,
    gone: Vec<Problem>,
    /// How many of either are left for later.
    left: usize,
}

impl Reported {
    /// Takes all the problems that there are now.
    fn take(&mut self, problems: impl Iterator<Item = Problem>) {
        self.now = problems.map(|problem| (identity(&problem), problem)).collect();
        self.is_behind = true;
    }

    /// What the log has not said yet, as much as it takes at a time. A problem that was over before its turn is left out.
    fn next_lines(&mut self) -> Lines {
        if !self.is_behind {
            return Lines::default();
        }
        let new = self.now.iter().filter(|(key, _)| !self.said.contains_key(key));
        let gone = self.said.iter().filter(|(key, _)| !self.now.contains_key(key));
        let (new_count, gone_count) = (new.clone().count(), gone.clone().count());
        let new: Vec<_> = new.take(LINES_MAX).map(|(key, value)| (key.clone(), value.clone())).collect();
        let gone: Vec<_> = gone.take(LINES_MAX - new.len()).map(|(key, _)| key.clone()).collect();
        let left = new_count + gone_count - new.len() - gone.len();
        self.is_behind = left > 0;
        let gone = gone.iter().filter_map(|key| self.said.remove(key)).collect();
        self.said.extend(new.iter().cloned());
        Lines { new: new.into_iter().map(|(_, problem)| problem).collect(), gone, left }
    }
}

impl Reconciler {
    /// Says in the log, the metrics and the status what is served and what is not.
    pub(super) fn report(&mut self) {
        self.tell_fill();
        let versions = (self.source_problems_version, self.cluster.problems_version());
        let of_node = [self.v4.plan.problems(), self.v6.plan.problems(), self.without_address()].concat();
        if self.reported.versions == versions && self.reported.node == of_node {
            return;
        }
        let is_quiet = !self.reported.is_behind;
        let all = self.source_problems.iter().cloned().chain(self.cluster.problems());
        self.reported.take(all.chain(of_node.iter().cloned()));
        self.reported.versions = versions;
        self.reported.node = of_node;
        self.told.metrics.problems(self.reported.now.values());
        let status =
            |problem: &Problem| ProblemStatus { kind: problem.kind.label(), message: problem.to_string() };
        let of_status = self.reported.now.values().map(status).collect();
        self.told.shared.update(|all| all.problems = of_status);
        // Otherwise it is not their turn yet.
        if is_quiet {
            self.log_problems();
        }
    }

    /// Families of Services that no interface has an address of, so that nothing of theirs can be sent on.
    fn without_address(&self) -> Vec<Problem> {
        let families = [
            ("IPv4", self.v4.plan.services() > 0 && self.picture.v4.snat.is_empty()),
            ("IPv6", self.v6.plan.services() > 0 && self.picture.v6.snat.is_empty()),
        ];
        let problem = |(family, _)| {
            let message = format!(
                "no interface of --iface has an address of {family}, nor has the loopback, so that Services are not served \
                 over it to clients from outside"
            );
            Problem::general(ProblemKind::NoAddress, message)
        };
        families.into_iter().filter(|(_, is_without)| *is_without).map(problem).collect()
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

    /// Names each problem once in the log, so many at a time; each second has its turn.
    pub(super) fn log_problems(&mut self) {
        let is_first = self.reported.said.is_empty();
        let Lines { new, gone, left } = self.reported.next_lines();
        for problem in &new {
            warn!(kind = problem.kind.label(), %problem, "problem");
        }
        for problem in &gone {
            info!(kind = problem.kind.label(), %problem, "no problem any more");
        }
        if left > 0 && is_first {
            warn!(problems = left, per_second = LINES_MAX, "further problems follow; /status lists all");
        }
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
        | ProblemKind::Unsupported
        | ProblemKind::NoAddress => problem.message.clone(),
    };
    (problem.kind, problem.place.clone(), problem.object.clone(), message)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn bad(object: usize) -> Problem {
        Problem::of(ProblemKind::Invalid, format!("Service a/s{object:04}"), "no port")
    }

    #[test]
    fn of_a_thousand_problems_each_is_named_once_and_so_is_its_end() {
        let mut reported = Reported::default();
        let all: BTreeSet<_> = (0..1_000).map(bad).collect();
        reported.take(all.iter().cloned());
        let mut named = Vec::new();
        for left in (0..1_000).rev().step_by(LINES_MAX).map(|last| last + 1 - LINES_MAX) {
            let lines = reported.next_lines();
            assert_eq!((lines.new.len(), lines.gone.len(), lines.left), (LINES_MAX, 0, left));
            named.extend(lines.new);
        }
        assert_eq!(named.into_iter().collect::<BTreeSet<_>>(), all);
        reported.take(all.iter().cloned());
        assert_eq!(reported.next_lines(), Lines::default(), "they are the same as before");
        reported.take([bad(1_000)].into_iter());
        let lines = reported.next_lines();
        assert_eq!((lines.new, lines.gone.len(), lines.left), (vec![bad(1_000)], LINES_MAX - 1, 951));
        let mut gone: BTreeSet<_> = lines.gone.into_iter().collect();
        loop {
            let lines = reported.next_lines();
            assert_eq!(lines.new, []);
            gone.extend(lines.gone);
            if lines.left == 0 {
                break;
            }
        }
        assert_eq!(gone, all);
        assert_eq!(reported.next_lines(), Lines::default());
    }

    #[test]
    fn a_problem_that_comes_while_others_wait_has_its_turn_and_one_that_goes_needs_none() {
        let mut reported = Reported::default();
        reported.take((0..60).map(bad));
        assert_eq!(reported.next_lines().left, 10);
        reported.take((0..55).chain([100]).map(bad));
        let lines = reported.next_lines();
        let expected: Vec<_> = (50..55).chain([100]).map(bad).collect();
        assert_eq!(lines, Lines { new: expected, gone: Vec::new(), left: 0 });
    }

    #[test]
    fn a_map_that_is_full_in_another_way_is_the_same_problem() {
        let full = |used: u32| Problem::general(ProblemKind::RingsReduced, format!("{used} in use"));
        assert_eq!(identity(&full(1)), identity(&full(2)));
        let bad = |message: &str| Problem::of(ProblemKind::Invalid, "Service a/b", message);
        assert_ne!(identity(&bad("one port")), identity(&bad("another port")));
    }
}
