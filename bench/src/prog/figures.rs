//! What the cases of `bench prog` cost, and whether that is within their budgets.
//!
//! Other work on the machine only ever adds to a figure, so the fastest round of a load is the least disturbed one; where
//! memory falls differs from load to load, so the median of the loads counts.

use std::fmt;

use super::case::{Budget, Case};
use crate::median;

/// Nanoseconds per packet of some cases. The first case is the reference that is subtracted.
#[derive(Debug)]
pub(super) struct Figures {
    cases: &'static [Case],
    /// Of each load the fastest round of each case, the wrapper included.
    loads: Vec<Vec<f64>>,
}

impl Figures {
    pub(super) fn new(cases: &'static [Case]) -> Self {
        Self { cases, loads: Vec::new() }
    }

    pub(super) fn cases(&self) -> &'static [Case] {
        self.cases
    }

    /// Adds a load of the programs by its rounds, each of which has a figure for every case.
    pub(super) fn add(&mut self, rounds: &[Vec<f64>]) {
        let fastest =
            |at| rounds.iter().filter_map(|round| round.get(at)).copied().fold(f64::INFINITY, f64::min);
        self.loads.push((0..self.cases.len()).map(fastest).collect());
    }

    /// The cases over their budgets, with what they cost.
    pub(super) fn over_budget(&self) -> impl Iterator<Item = String> {
        self.cases.iter().filter_map(|&case| {
            let (within, what) = self.judge(case, case.budget()?);
            (!within).then(|| format!("{}: {what}", case.label()))
        })
    }

    /// Whether a case keeps its budget, and in which words.
    fn judge(&self, case: Case, budget: Budget) -> (bool, String) {
        match budget {
            Budget::Nanoseconds(most) => {
                let over = self.over(case);
                (over <= most, format!("{over:.0} of {most:.0} ns"))
            }
            Budget::Times(most, of) => {
                let times = self.times(case, of);
                (times <= most, format!("{times:.2} of {most:.2} x {}", of.label()))
            }
        }
    }

    /// The case that none of its kind can be cheaper than.
    fn limit(&self) -> Case {
        if self.cases.contains(&Case::TunnelLimit) { Case::TunnelLimit } else { Case::Limit }
    }

    /// Median over loads of what a case costs, the wrapper included.
    fn total(&self, case: Case) -> f64 {
        self.median(|load| self.of(load, case))
    }

    /// Median over loads of what a case costs over `drop` of the same load.
    fn over(&self, case: Case) -> f64 {
        self.median(|load| self.over_in(load, case))
    }

    /// Median over loads of what a case costs in terms of another one of the same load.
    fn times(&self, case: Case, of: Case) -> f64 {
        self.median(|load| self.over_in(load, case) / self.over_in(load, of))
    }

    fn median(&self, figure: impl Fn(&[f64]) -> f64) -> f64 {
        median(&self.loads.iter().map(|load| figure(load)).collect::<Vec<_>>())
    }

    fn over_in(&self, load: &[f64], case: Case) -> f64 {
        let wrapper = self.of(load, Case::Drop);
        // Where a frame has grown, the wrapper shrinks it again, which costs as much as making room.
        let shrinking = if case.grows() { (self.of(load, Case::MoveHead) - wrapper) / 2.0 } else { 0.0 };
        self.of(load, case) - wrapper - shrinking
    }

    fn of(&self, load: &[f64], case: Case) -> f64 {
        self.cases.iter().zip(load).find(|(of, _)| **of == case).map_or(f64::NAN, |(_, figure)| *figure)
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<28}{:>8}{:>11}{:>9}  budget", "path", "ns", "over drop", "x limit")?;
        for &case in self.cases {
            let (total, over, times) = (self.total(case), self.over(case), self.times(case, self.limit()));
            let note = case.budget().map_or_else(
                || String::from("-"),
                |budget| {
                    let (within, what) = self.judge(case, budget);
                    format!("{} {what}", if within { "ok  " } else { "OVER" })
                },
            );
            write!(f, "\n{:<28}{total:>8.1}{over:>11.1}{times:>9.2}  {note}", case.label())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CASES: [Case; 4] = [Case::Drop, Case::Limit, Case::Forward, Case::Stranger];

    fn figures(loads: &[&[[f64; 4]]]) -> Figures {
        let mut figures = Figures::new(&CASES);
        for rounds in loads {
            figures.add(&rounds.iter().map(|round| round.to_vec()).collect::<Vec<_>>());
        }
        figures
    }

    #[test]
    fn what_other_work_adds_does_not_count() {
        let quiet = [40.0, 90.0, 110.0, 60.0];
        let figures = figures(&[&[[80.0, 90.0, 220.0, 120.0], quiet, [40.0, 180.0, 110.0, 60.0]]]);
        assert!((figures.times(Case::Forward, Case::Limit) - 1.4).abs() < 1e-9);
        assert!((figures.over(Case::Stranger) - 20.0).abs() < 1e-9);
        assert_eq!(figures.over_budget().count(), 0);
    }

    #[test]
    fn a_load_is_compared_with_itself_and_the_middle_one_counts() {
        let loads = [[40.0, 90.0, 100.0, 60.0], [40.0, 140.0, 180.0, 62.0], [40.0, 60.0, 90.0, 90.0]];
        let figures = figures(&[&loads[..1], &loads[1..2], &loads[2..]]);
        assert!((figures.times(Case::Forward, Case::Limit) - 1.4).abs() < 1e-9);
        assert!((figures.over(Case::Stranger) - 22.0).abs() < 1e-9);
    }

    #[test]
    fn what_is_over_its_budget_is_named() {
        let figures = figures(&[&[[40.0, 90.0, 116.0, 66.0]]]);
        let over: Vec<_> = figures.over_budget().collect();
        assert_eq!(over, ["established, forward: 1.52 of 1.50 x limit", "not ours: 26 of 25 ns"]);
        assert!(figures.to_string().contains("OVER 26 of 25 ns"), "{figures}");
    }

    #[test]
    fn what_shrinking_costs_is_no_part_of_a_tunnel() {
        let mut figures = Figures::new(&Case::DIRECT);
        figures.add(&[vec![40.0, 60.0, 110.0, 125.0]]);
        assert!((figures.over(Case::Tunnel) - 75.0).abs() < 1e-9);
        assert!((figures.times(Case::Tunnel, Case::TunnelLimit) - 1.25).abs() < 1e-9);
    }
}
