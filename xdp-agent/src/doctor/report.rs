//! The whole report, for programs and for people.

use std::{env, fmt};

use serde::Serialize;

use super::{
    checks::{Check, Health},
    interface::InterfaceReport,
};

/// What `doctor` has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Version of the agent.
    pub version: &'static str,
    /// The processor's architecture.
    pub architecture: &'static str,
    /// Whether `run` would work; where an agent is running, once that has ended.
    pub works: bool,
    /// Whether an agent is running over the directory of pins.
    pub is_running: bool,
    /// What has to be there.
    pub checks: Vec<Check>,
    /// The interfaces.
    pub interfaces: Vec<InterfaceReport>,
}

impl Report {
    /// Sums up: one bad finding is enough.
    pub(super) fn new(checks: Vec<Check>, interfaces: Vec<InterfaceReport>, is_running: bool) -> Self {
        let mut all = checks
            .iter()
            .map(|check| check.health)
            .chain(interfaces.iter().map(|interface| interface.health));
        Self {
            version: env!("CARGO_PKG_VERSION"),
            architecture: env::consts::ARCH,
            works: all.all(|health| health != Health::Bad),
            is_running,
            checks,
            interfaces,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "xdp-agent {} on {}", self.version, self.architecture)?;
        for Check { name, health, found, advice } in &self.checks {
            writeln!(f, "{} {name:<13} {found}", mark(*health))?;
            if let Some(advice) = advice {
                writeln!(f, "{:19}{advice}", "")?;
            }
        }
        for interface in &self.interfaces {
            let InterfaceReport { name, driver, mtu, mode, health, reason, transmits } = interface;
            let mode = mode.map_or("?", |mode| mode.label());
            let way = if *transmits { "frames leave at XDP" } else { "frames leave by the kernel" };
            writeln!(f, "{} {name:<13} {mode} (driver {driver}, MTU {mtu}; {way})", mark(*health))?;
            writeln!(f, "{:19}{reason}", "")?;
        }
        writeln!(
            f,
            "{}",
            match (self.works, self.is_running) {
                (true, false) => "`run` would work",
                (true, true) => "`run` would work once the agent that runs here has ended",
                (false, _) => "`run` would not work",
            }
        )
    }
}

fn mark(health: Health) -> &'static str {
    match health {
        Health::Good => "ok  ",
        Health::Warning => "warn",
        Health::Bad => "BAD ",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Mode;

    fn interface(health: Health) -> InterfaceReport {
        InterfaceReport {
            name: "eth0".to_owned(),
            driver: "e1000e".to_owned(),
            mtu: 1500,
            mode: Some(Mode::Generic),
            health,
            reason: "the driver has no native XDP".to_owned(),
            transmits: true,
        }
    }

    #[test]
    fn one_bad_finding_is_enough() {
        assert!(Report::new(vec![], vec![interface(Health::Warning)], false).works);
        assert!(!Report::new(vec![], vec![interface(Health::Bad)], false).works);
        let checks = vec![Check::bad("bpffs", "/tmp", "mount one")];
        assert!(!Report::new(checks, vec![interface(Health::Good)], false).works);
        let beside = Report::new(vec![], vec![interface(Health::Good)], true);
        assert!(
            beside.works
                && beside.to_string().ends_with("would work once the agent that runs here has ended\n")
        );
    }

    #[test]
    fn a_report_reads_line_by_line_and_as_json() {
        let report = Report::new(
            vec![Check::bad("bpffs", "/tmp", "mount one")],
            vec![interface(Health::Warning)],
            false,
        );
        let text = report.to_string();
        let expected = "\
BAD  bpffs         /tmp
                   mount one
warn eth0          generic (driver e1000e, MTU 1500; frames leave at XDP)
                   the driver has no native XDP
`run` would not work
";
        assert_eq!(text.split_once('\n').map(|(_, rest)| rest), Some(expected));
        let json = serde_json::to_value(&report).expect("JSON");
        assert_eq!(json["works"], false);
        assert_eq!(json["interfaces"][0]["mode"], "generic");
        assert_eq!(json["checks"][0]["health"], "bad");
    }
}
