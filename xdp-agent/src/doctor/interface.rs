//! One interface: its driver, the mode it would get, and what would make it a better one.

use std::{fs, path::Path};

use serde::Serialize;

use super::checks::Health;
use crate::{
    attach::{
        self,
        xdp::{BOND, OF_BONDS},
    },
    config::ModeChoice,
    devices::{self, Mode},
    host::{Host, Link},
    netdev,
};

/// Longest MTU that every driver takes with frames in one buffer: a page of 4 KiB less headroom and tail.
const MTU_OF_ONE_BUFFER: u32 = 3_498;

/// How XDP would run on an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InterfaceReport {
    /// Its name.
    pub name: String,
    /// Its driver, or its kind where it is made of software.
    pub driver: String,
    /// Its MTU.
    pub mtu: u32,
    /// The mode it has, or would get.
    pub mode: Option<Mode>,
    /// How it is.
    pub health: Health,
    /// How that is known, and why it is so.
    pub reason: String,
    /// Whether frames can leave by it at XDP.
    pub transmits: bool,
}

/// What is known of a mode.
struct Expectation {
    mode: Option<Mode>,
    health: Health,
    reason: String,
}

impl InterfaceReport {
    /// Looks at an interface; `tried` is what a trial found, where there was one.
    pub(super) fn new(
        link: &Link,
        host: &Host,
        choice: ModeChoice,
        tried: Option<anyhow::Result<(Mode, String)>>,
    ) -> Self {
        // What a bond announces is what the devices below it can do.
        let is_bond = link.kind == BOND;
        let features = if is_bond { Some(0) } else { devices::features(host, link.index) };
        let owner = attach::owner(link);
        let Expectation { mode, health, reason } = match tried {
            Some(Ok((mode, reason))) => {
                Expectation { mode: Some(mode), health: health(mode, choice), reason }
            }
            Some(Err(error)) => Expectation { mode: None, health: Health::Bad, reason: format!("{error:#}") },
            None => match owner {
                Some(owner) => carried(link, owner.as_deref()),
                None => expected(link.mtu, features, if is_bond { OF_BONDS } else { NOT_NATIVE }, choice),
            },
        };
        let transmit = devices::transmit(link, mode.unwrap_or(Mode::Absent), features);
        Self {
            driver: driver(link),
            name: link.name.clone(),
            mtu: link.mtu,
            mode,
            health,
            reason,
            transmits: transmit.transmit,
        }
    }
}

/// Falling back is worth a word, unless it was asked for.
fn health(mode: Mode, choice: ModeChoice) -> Health {
    match (mode, choice) {
        (Mode::Native | Mode::NativeFrags | Mode::Offload | Mode::Tc, _)
        | (Mode::Generic, ModeChoice::Generic) => Health::Good,
        (Mode::Generic, ModeChoice::Auto | ModeChoice::Native | ModeChoice::Offload) => Health::Warning,
        (Mode::Absent, _) => Health::Bad,
    }
}

/// What to expect of an interface that carries a program already, by the name of the program.
fn carried(link: &Link, owner: Option<&str>) -> Expectation {
    // IFLA_XDP_ATTACHED (include/uapi/linux/if_link.h): 1 native, 2 generic, 3 on the card.
    let mode = match link.xdp.attached {
        2 => Mode::Generic,
        3 => Mode::Offload,
        _ => Mode::Native,
    };
    if owner.is_some_and(|name| name.starts_with("xdp_ingress")) {
        let reason = "an xdp-agent runs here, or has left its program; a start takes it over".to_owned();
        return Expectation { mode: Some(mode), health: Health::Good, reason };
    }
    let name = owner.map(|name| format!(" ({name})")).unwrap_or_default();
    Expectation {
        mode: None,
        health: Health::Bad,
        reason: format!(
            "it carries XDP program {}{name}, which is never replaced; stop its owner, or leave the interface out of --iface",
            link.xdp.program
        ),
    }
}

/// Why a device is not native of whose driver nothing else is known.
const NOT_NATIVE: &str = "the driver has no native XDP, and a newer one may";

/// What to expect by what the driver announces, with the reason for a device without native XDP.
fn expected(mtu: u32, features: Option<u64>, not_native: &str, choice: ModeChoice) -> Expectation {
    let is = |mode, health, reason: &str| Expectation { mode, health, reason: reason.to_owned() };
    if choice == ModeChoice::Generic {
        return is(Some(Mode::Generic), Health::Good, "asked for by --mode generic");
    }
    if choice == ModeChoice::Offload {
        return is(None, Health::Bad, "no card is known that takes these programs; --try asks this one");
    }
    let Some(features) = features else {
        let reason =
            "native if the driver has it, else generic: this kernel does not say before it is tried (--try)";
        return is(None, Health::Good, reason);
    };
    let (is_native, has_frags) = (features & netdev::BASIC != 0, features & netdev::RX_SG != 0);
    if !is_native && choice == ModeChoice::Native {
        return is(None, Health::Bad, &format!("{not_native}; allow generic mode with --mode auto"));
    }
    if !is_native {
        let reason = format!("{not_native}: generic works, slower");
        return is(Some(Mode::Generic), Health::Warning, &reason);
    }
    if mtu <= MTU_OF_ONE_BUFFER {
        return is(Some(Mode::Native), Health::Good, "the driver announces it");
    }
    if has_frags {
        return is(
            Some(Mode::NativeFrags),
            Health::Good,
            "the MTU is longer than a buffer, and the driver has frags",
        );
    }
    let reason = "the MTU may be longer than the driver's buffers and it has no frags: a lower MTU (3498) is sure to run \
                  natively; --try finds out";
    is(None, Health::Warning, reason)
}

/// The driver of a device, the kind of one made of software.
fn driver(link: &Link) -> String {
    if !link.kind.is_empty() {
        return link.kind.clone();
    }
    let path = Path::new("/sys/class/net").join(&link.name).join("device/driver");
    let driver =
        fs::read_link(path).ok().and_then(|target| Some(target.file_name()?.to_string_lossy().into_owned()));
    driver.unwrap_or_else(|| "unknown".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::XdpState;

    #[test]
    fn the_mode_follows_from_what_the_driver_announces() {
        let both = netdev::BASIC | netdev::RX_SG;
        for (mtu, features, choice, mode, health) in [
            (1500, Some(netdev::BASIC), ModeChoice::Auto, Some(Mode::Native), Health::Good),
            (9000, Some(both), ModeChoice::Auto, Some(Mode::NativeFrags), Health::Good),
            (9000, Some(netdev::BASIC), ModeChoice::Auto, None, Health::Warning),
            (1500, Some(0), ModeChoice::Auto, Some(Mode::Generic), Health::Warning),
            (1500, Some(0), ModeChoice::Native, None, Health::Bad),
            (1500, Some(0), ModeChoice::Generic, Some(Mode::Generic), Health::Good),
            (1500, None, ModeChoice::Auto, None, Health::Good),
        ] {
            let expectation = expected(mtu, features, NOT_NATIVE, choice);
            assert_eq!(
                (expectation.mode, expectation.health),
                (mode, health),
                "{mtu} {features:?} {choice:?}"
            );
            assert!(!expectation.reason.is_empty());
        }
        let bond = expected(1500, Some(0), OF_BONDS, ModeChoice::Auto);
        assert_eq!(bond.mode, Some(Mode::Generic));
        assert!(bond.reason.starts_with(OF_BONDS), "{}", bond.reason);
    }

    #[test]
    fn a_foreign_program_is_a_refusal_and_an_agents_own_is_not() {
        let link = Link { xdp: XdpState { attached: 2, program: 7 }, ..Link::default() };
        assert_eq!(carried(&link, Some("xdp_ingress")).mode, Some(Mode::Generic));
        let foreign = carried(&link, Some("their_filter"));
        assert_eq!(foreign.health, Health::Bad);
        assert!(foreign.reason.contains("program 7 (their_filter)"), "{}", foreign.reason);
        assert_eq!(carried(&link, None).health, Health::Bad);
    }

    #[test]
    fn a_fallback_is_a_warning_unless_it_was_asked_for() {
        assert_eq!(health(Mode::Generic, ModeChoice::Auto), Health::Warning);
        assert_eq!(health(Mode::Generic, ModeChoice::Generic), Health::Good);
        assert_eq!(health(Mode::NativeFrags, ModeChoice::Auto), Health::Good);
    }
}
