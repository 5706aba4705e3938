//! The range of source ports for translated flows: it must not meet ports that the host gives out or that clients use.

use std::{fmt, str::FromStr};

use anyhow::{Context, bail, ensure};

/// NodePorts of a cluster that does not say otherwise (`--service-node-port-range` of kube-apiserver).
pub const NODE_PORTS: PortRange = PortRange { min: 30_000, max: 32_767 };

/// Fewer ports than this exhaust on the first busy client.
pub const PORTS_MIN: u32 = 1024;

const EPHEMERAL_PATH: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// Ports that are free for everybody to use (RFC 6335: below are the system ports).
const UNPRIVILEGED: PortRange = PortRange { min: 1024, max: u16::MAX };

/// An inclusive range of ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// First port.
    pub min: u16,
    /// Last port.
    pub max: u16,
}

impl PortRange {
    /// Number of ports.
    pub fn ports(self) -> u32 {
        u32::from(self.max) - u32::from(self.min) + 1
    }

    /// Whether the ranges share a port.
    pub fn meets(self, other: Self) -> bool {
        self.min <= other.max && other.min <= self.max
    }

    /// The range for maps in which an earlier agent's flows have ports of `found`: that one as long as the host leaves it
    /// free, because answers to ports outside the range are not recognised.
    pub fn or_adopted(self, found: Self, ephemeral: Self) -> Self {
        let is_valid = found.min > 0 && found.min <= found.max && found.checked_against(ephemeral).is_ok();
        if is_valid { found } else { self }
    }

    /// The range, unless it meets the host's ephemeral ports or NodePorts.
    ///
    /// # Errors
    /// Naming both ranges, and the flag or the setting to change.
    pub fn checked_against(self, ephemeral: Self) -> anyhow::Result<Self> {
        ensure!(
            !self.meets(ephemeral),
            "--snat-ports {self} meets the host's own source ports {ephemeral} (net.ipv4.ip_local_port_range); choose a \
             range outside, or leave the flag out"
        );
        ensure!(
            !self.meets(NODE_PORTS),
            "--snat-ports {self} meets the NodePort range {NODE_PORTS}; choose a range outside, or leave the flag out"
        );
        ensure!(
            self.ports() >= PORTS_MIN,
            "--snat-ports {self} has fewer than {PORTS_MIN} ports; choose a wider range"
        );
        Ok(self)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.min, self.max)
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('-').and_then(|(min, max)| {
            Some(Self { min: min.trim().parse().ok()?, max: max.trim().parse().ok()? })
        });
        match parsed {
            Some(range) if range.min > 0 && range.min <= range.max => Ok(range),
            _ => Err("write it as MIN-MAX, as in 10000-29999".to_owned()),
        }
    }
}

/// The ports that the host gives to its own connections, in this network namespace.
///
/// # Errors
/// When the setting cannot be read or understood.
pub fn ephemeral() -> anyhow::Result<PortRange> {
    let text =
        std::fs::read_to_string(EPHEMERAL_PATH).with_context(|| format!("cannot read {EPHEMERAL_PATH}"))?;
    let mut ports = text.split_whitespace().map(str::parse);
    match (ports.next(), ports.next()) {
        (Some(Ok(min)), Some(Ok(max))) if min <= max => Ok(PortRange { min, max }),
        _ => bail!("cannot understand {EPHEMERAL_PATH}: {:?}", text.trim()),
    }
}

/// The widest range outside the host's ephemeral ports and NodePorts.
///
/// # Errors
/// When no gap is wide enough.
pub fn choose(ephemeral: PortRange) -> anyhow::Result<PortRange> {
    let mut taken = [ephemeral, NODE_PORTS];
    taken.sort_by_key(|range| range.min);
    let mut widest: Option<PortRange> = None;
    let mut from = u32::from(UNPRIVILEGED.min);
    for range in taken.into_iter().map(Some).chain([None]) {
        let until = range.map_or(u32::from(UNPRIVILEGED.max) + 1, |range| u32::from(range.min));
        if from < until {
            let gap = PortRange { min: from as u16, max: (until - 1) as u16 };
            if widest.is_none_or(|widest| gap.ports() > widest.ports()) {
                widest = Some(gap);
            }
        }
        from = range.map_or(from, |range| from.max(u32::from(range.max) + 1));
    }
    match widest {
        Some(range) if range.ports() >= PORTS_MIN => Ok(range),
        _ => bail!(
            "no {PORTS_MIN} ports are left for translated flows between the host's own source ports {ephemeral} \
             (net.ipv4.ip_local_port_range) and NodePorts {NODE_PORTS}; narrow net.ipv4.ip_local_port_range"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(min: u16, max: u16) -> PortRange {
        PortRange { min, max }
    }

    #[test]
    fn the_widest_gap_is_chosen() {
        for (ephemeral, chosen) in [
            (range(32_768, 60_999), range(1024, 29_999)),
            (range(1024, 29_999), range(32_768, 65_535)),
            (range(1024, 50_000), range(50_001, 65_535)),
            (range(15_000, 65_535), range(1024, 14_999)),
            (range(29_000, 31_000), range(32_768, 65_535)),
            (range(1, 10), range(32_768, 65_535)),
        ] {
            let range = choose(ephemeral).expect("there is room");
            assert_eq!(range, chosen, "ephemeral {ephemeral}");
            assert!(range.checked_against(ephemeral).is_ok());
        }
    }

    #[test]
    fn no_room_is_an_error_that_names_the_setting() {
        let error = choose(range(1024, 65_535)).expect_err("no room").to_string();
        assert!(error.contains("1024-65535") && error.contains("ip_local_port_range"), "{error}");
    }

    #[test]
    fn a_range_that_meets_other_ports_is_refused_by_both_names() {
        let ephemeral = range(32_768, 60_999);
        for (chosen, other) in [
            (range(30_000, 34_000), "32768-60999"),
            (range(20_000, 30_000), "30000-32767"),
            (range(2000, 2100), "1024 ports"),
        ] {
            let error = chosen.checked_against(ephemeral).expect_err("refused").to_string();
            assert!(error.contains(&chosen.to_string()) && error.contains(other), "{error}");
        }
    }

    #[test]
    fn the_range_of_adopted_flows_is_kept_while_it_can_be_used() {
        let (wanted, ephemeral) = (range(20_000, 29_999), range(32_768, 60_999));
        for (found, used) in [
            (range(1024, 29_999), range(1024, 29_999)),
            (wanted, wanted),
            (range(0, 0), wanted),
            (range(0, 9999), wanted),
            (range(9999, 2000), wanted),
            (range(40_000, 50_000), wanted),
            (range(2000, 2100), wanted),
        ] {
            assert_eq!(wanted.or_adopted(found, ephemeral), used, "found {found}");
        }
    }

    #[test]
    fn ranges_are_read_as_they_are_written() {
        assert_eq!("10000-29999".parse(), Ok(range(10_000, 29_999)));
        for bad in ["", "1", "2-1", "0-5", "1-70000", "a-b"] {
            assert!(bad.parse::<PortRange>().is_err(), "{bad}");
        }
    }
}
