//! Says in the log, the metrics and the status what is served and what is not.

use std::collections::BTreeSet;

use tracing::{info, warn};

use super::Reconciler;
use crate::{problem::Problem, status::ProblemStatus};

/// Problems logged at a time; all of them are in the status.
const LOGGED_MAX: usize = 20;

impl Reconciler {
    /// Says in the log, the metrics and the status what is served and what is not.
    pub(super) fn report(&mut self) {
        let problems: Vec<&Problem> = self.problems().collect();
        self.parts.metrics.problems(problems.iter().copied());
        let now: BTreeSet<Problem> = problems.into_iter().cloned().collect();
        for problem in now.difference(&self.said).take(LOGGED_MAX) {
            warn!(kind = problem.kind.label(), %problem, "problem");
        }
        for problem in self.said.difference(&now).take(LOGGED_MAX) {
            info!(kind = problem.kind.label(), %problem, "no problem any more");
        }
        let unsaid = now.difference(&self.said).count().saturating_sub(LOGGED_MAX);
        if unsaid > 0 {
            warn!(problems = unsaid, "further problems, listed by /status");
        }
        let fill = self.plan.fill();
        let objects = &self.snapshot.objects;
        for (kind, count) in [
            ("service", objects.services.len()),
            ("endpointslice", objects.slices.len()),
            ("node", objects.nodes.len()),
        ] {
            self.parts.metrics.objects.get_or_create(&[("kind", kind)]).set(count as i64);
        }
        self.parts.metrics.services.set(self.desired.services.len() as i64);
        self.parts.metrics.fill(fill);
        let of_status = now
            .iter()
            .map(|problem| ProblemStatus { kind: problem.kind.label(), message: problem.to_string() })
            .collect();
        let services = self.desired.services.len();
        self.parts.shared.update(|status| {
            status.problems = of_status;
            status.services = services;
            status.frontends = fill.frontends;
            status.backends = fill.backends;
        });
        self.said = now;
    }

    fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.snapshot.problems.iter().chain(&self.desired.problems).chain(&self.plan_problems)
    }
}
