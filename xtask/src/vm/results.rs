//! What a guest has said: results of its lanes, and everything that is missing.

use super::Lane;
use crate::test::{Tally, result_line};
use std::collections::{BTreeMap, BTreeSet};

/// In the agent's words to a kernel that lacks what the programs need.
const REFUSAL: &str = "is too old";

/// The outcome of one guest.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The kernel, in its own words.
    pub(crate) kernel: Option<String>,
    /// The modes that the agent has found for drivers, and whether it holds that a start would work.
    pub(crate) doctor: Option<Doctor>,
    /// What each lane counted.
    pub(crate) lanes: Vec<(Lane, Tally)>,
    /// What the agent said to a kernel that is too old.
    pub(crate) refusal: Option<String>,
    /// What went wrong, beside tests that failed.
    pub(crate) problems: Vec<String>,
}

/// What `doctor` says of a kernel, whatever its devices: each has a line, and a column of docs/compatibility.md.
pub(crate) const FEATURES: [&str; 4] = ["tc", "drivers", "errors", "frags"];

/// What `doctor --try` has said.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Doctor {
    takes_programs: bool,
    is_well: bool,
    /// Drivers by their mode.
    modes: BTreeMap<String, BTreeSet<String>>,
    /// The words before the first colon, of [`FEATURES`].
    pub(crate) features: BTreeMap<&'static str, String>,
}

impl Doctor {
    /// Reads a line: `ok   programs      taken by the kernel`, `ok   eth2   native (driver virtio_net, MTU 1500; …)`.
    fn read(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["ok", "programs", ..] => self.takes_programs = true,
            ["ok" | "warn", name, ref found @ ..] if FEATURES.contains(&name) => {
                let found = found.join(" ");
                let found = found.split(':').next().unwrap_or_default().to_owned();
                self.features.extend(
                    FEATURES.into_iter().filter(|feature| *feature == name).map(|name| (name, found.clone())),
                );
            }
            [_, _, mode, "(driver", driver, ..] => {
                let drivers = self.modes.entry(mode.to_owned()).or_default();
                drivers.insert(driver.trim_end_matches(',').to_owned());
            }
            _ => {}
        }
    }

    fn is_good(&self) -> bool {
        let is_whole = !self.modes.is_empty() && self.features.len() == FEATURES.len();
        self.takes_programs && self.is_well && is_whole
    }

    fn cell(&self) -> String {
        let of_mode = |(mode, drivers): (&String, &BTreeSet<String>)| {
            format!("{mode} {}", drivers.iter().cloned().collect::<Vec<_>>().join(", "))
        };
        // Natively is what is wanted, and comes first.
        let modes: Vec<_> = self.modes.iter().rev().map(of_mode).collect();
        format!("{}{}", if self.is_good() { "" } else { "FAILED " }, modes.join("; "))
    }
}

impl Outcome {
    /// Reads a console.
    pub(crate) fn read(console: &str, lanes: &[Lane]) -> Self {
        let mut outcome = Self::default();
        let mut running: Option<(&str, Option<Tally>)> = None;
        let mut is_over = false;
        for line in console.lines() {
            if let Some(tally) = result_line(line) {
                if let Some((_, found)) = &mut running {
                    *found = Some(tally);
                }
                continue;
            }
            if running.is_some_and(|(name, _)| name == "doctor") {
                outcome.doctor.get_or_insert_default().read(line);
            }
            if line.contains(REFUSAL) && running.is_some_and(|(name, _)| name == "refusal") {
                outcome.refusal = Some(line.to_owned());
            }
            let Some(said) = line.strip_prefix("##vm ") else { continue };
            match said.split_once(' ').unwrap_or((said, "")) {
                ("kernel", release) => outcome.kernel = Some(release.to_owned()),
                ("begin", name) => running = Some((name, None)),
                ("end", rest) => outcome.end(running.take(), rest, lanes),
                ("broken", what) => outcome.problems.push(what.to_owned()),
                ("over", _) => is_over = true,
                (other, _) => outcome.problems.push(format!("the guest said {other:?}")),
            }
        }
        if let Some((name, _)) = running {
            outcome.problems.push(format!("{name} did not end"));
        }
        for lane in lanes {
            let has_result = match lane {
                Lane::Doctor => outcome.doctor.is_some(),
                Lane::ProgRun | Lane::Netns | Lane::Devices | Lane::Image => {
                    outcome.lanes.iter().any(|(known, _)| known == lane)
                }
            };
            if !has_result {
                outcome.problems.push(format!("no result of {}", lane.name()));
            }
        }
        if !is_over {
            outcome.problems.push("the guest did not come to its end".to_owned());
        }
        outcome
    }

    fn end(&mut self, running: Option<(&str, Option<Tally>)>, rest: &str, lanes: &[Lane]) {
        let (name, status) = rest.split_once(' ').unwrap_or((rest, ""));
        let Some((begun, tally)) = running.filter(|(begun, _)| *begun == name) else {
            self.problems.push(format!("{name} ended and never began"));
            return;
        };
        if name == "refusal" && status == "0" {
            self.problems.push("the agent has started".to_owned());
        }
        if let Some(doctor) = self.doctor.as_mut().filter(|_| name == "doctor") {
            doctor.is_well = status == "0";
        }
        let Some(lane) = lanes.iter().find(|lane| lane.name() == begun) else { return };
        match tally {
            Some(tally) if (status == "0") == (tally.failed == 0) => self.lanes.push((*lane, tally)),
            Some(tally) => {
                self.lanes.push((*lane, tally));
                self.problems.push(format!("{name} ended with status {status}"));
            }
            None => {}
        }
    }

    /// Whether everything ran and nothing failed; a lane without a test has not run.
    pub(crate) fn is_good(&self) -> bool {
        let is_good = |tally: &Tally| tally.failed == 0 && tally.passed > 0;
        let is_well = self.doctor.as_ref().is_none_or(Doctor::is_good);
        self.problems.is_empty() && is_well && self.lanes.iter().all(|(_, tally)| is_good(tally))
    }

    /// A cell of the table.
    pub(crate) fn cell(&self, lane: Lane) -> String {
        if let Some(doctor) = self.doctor.as_ref().filter(|_| lane == Lane::Doctor) {
            return doctor.cell();
        }
        let found = self.lanes.iter().find(|(known, _)| *known == lane);
        match found.map(|(_, tally)| tally) {
            Some(Tally { passed, failed: 0 }) => format!("{passed} passed"),
            Some(Tally { passed, failed }) => format!("{failed} FAILED, {passed} passed"),
            None if self.refusal.is_some() => "refused".to_owned(),
            None => "no result".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LANES: [Lane; 2] = [Lane::ProgRun, Lane::Netns];
    const GOOD: &str = "\
##vm kernel 6.1.0-56-amd64
##vm begin prog-run
test frames::a_frame ... ok
test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s
##vm end prog-run 0
##vm begin netns
test result: ok. 7 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s
##vm end netns 0
##vm over
";

    #[test]
    fn a_guest_is_good_only_when_everything_ran() {
        let outcome = Outcome::read(GOOD, &LANES);
        assert!(outcome.is_good(), "{outcome:?}");
        assert_eq!(outcome.kernel.as_deref(), Some("6.1.0-56-amd64"));
        assert_eq!(
            (outcome.cell(Lane::ProgRun), outcome.cell(Lane::Netns)),
            ("5 passed".into(), "7 passed".into())
        );
    }

    #[test]
    fn every_missing_line_is_a_failure() {
        for line in GOOD.lines() {
            if line.starts_with("test frames") || line.contains("kernel") {
                continue;
            }
            let without = GOOD.replace(&format!("{line}\n"), "");
            assert!(!Outcome::read(&without, &LANES).is_good(), "without {line:?}");
        }
        for end in 1..GOOD.len() {
            assert!(!Outcome::read(&GOOD[..end - 1], &LANES).is_good(), "cut at {end}");
        }
    }

    #[test]
    fn the_modes_of_drivers_are_what_doctor_says() {
        let said = "##vm kernel 6.1\n##vm begin doctor\nok   programs      taken by the kernel\n\
                    ok   tc            filters: without links (TCX, kernel 6.6) a start replaces them\n\
                    ok   drivers       have to be tried: before kernel 6.3\nok   errors        named: as such\n\
                    warn frags         refused: a long MTU runs in generic mode\n                   words\n\
                    ok   eth2          native (driver virtio_net, MTU 1500; frames leave at XDP)\n\
                    warn eth8          generic (driver e1000, MTU 1500; frames leave at XDP)\n\
                    \x20                  native: not supported by the driver\n`run` would work\n##vm end doctor 0\n##vm over\n";
        let outcome = Outcome::read(said, &[Lane::Doctor]);
        assert!(outcome.is_good(), "{outcome:?}");
        assert_eq!(outcome.cell(Lane::Doctor), "native virtio_net; generic e1000");
        let features = outcome.doctor.expect("doctor").features;
        let found = FEATURES.map(|name| features[name].as_str());
        assert_eq!(found, ["filters", "have to be tried", "named", "refused"]);
        for (good, bad) in [
            ("end doctor 0", "end doctor 1"),
            ("ok   programs", "BAD  programs"),
            ("ok   errors", "BAD  errors"),
        ] {
            let outcome = Outcome::read(&said.replace(good, bad), &[Lane::Doctor]);
            assert!(!outcome.is_good() && outcome.cell(Lane::Doctor).starts_with("FAILED"), "{outcome:?}");
        }
        assert!(!Outcome::read("##vm kernel 6.1\n##vm over\n", &[Lane::Doctor]).is_good());
    }

    #[test]
    fn a_refusal_takes_the_agents_words_and_its_status() {
        let refused = "##vm kernel 5.10.0-30-arm64\n##vm begin refusal\nError: kernel 5.10 is too old: the programs need\n\
                       ##vm end refusal 1\n##vm over\n";
        let outcome = Outcome::read(refused, &[]);
        assert!(outcome.is_good() && outcome.cell(Lane::Netns) == "refused", "{outcome:?}");
        assert!(Outcome::read(&refused.replace("is too old", "has no BPF"), &[]).refusal.is_none());
        assert!(!Outcome::read(&refused.replace("refusal 1", "refusal 0"), &[]).is_good());
    }

    #[test]
    fn a_module_that_does_not_load_is_a_failure() {
        let broken =
            GOOD.replace("##vm begin netns", "##vm broken cannot load /lib/modules/igb.ko\n##vm begin netns");
        assert!(!Outcome::read(&broken, &LANES).is_good());
        let failed =
            GOOD.replace("7 passed; 0 failed", "6 passed; 1 failed").replace("end netns 0", "end netns 101");
        let outcome = Outcome::read(&failed, &LANES);
        assert!(!outcome.is_good() && outcome.cell(Lane::Netns) == "1 FAILED, 6 passed");
    }
}
