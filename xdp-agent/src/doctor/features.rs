//! What kernels have had since different versions, one line each: which way the agent takes here. docs/compatibility.md has
//! them for the kernels that were run.

use std::io;

use super::checks::Check;
use crate::{bpf, maps::Constants, netdev::Netdev, netlink::Refused};

/// How tc programs are attached, who knows what drivers can do, and which error a refused socket ends with.
pub(super) fn of_kernel() -> Vec<Check> {
    let constants = Constants::of_this_machine();
    vec![tc(&bpf::has_tcx()), drivers(&Netdev::find()), errors(constants.is_ok_and(Constants::names_errors))]
}

fn tc(has_links: &io::Result<bool>) -> Check {
    match has_links {
        Ok(true) => Check::good("tc", "links"),
        Ok(false) => {
            Check::good("tc", "filters: without links (TCX, kernel 6.6) a start replaces one after the other")
        }
        Err(error) => Check::warning("tc", "unknown", format!("the kernel does not answer: {error}")),
    }
}

fn drivers(family: &Result<Option<Netdev>, Refused>) -> Check {
    match family {
        Ok(Some(_)) => Check::good("drivers", "announce what they can do at XDP"),
        Ok(None) => Check::good(
            "drivers",
            "have to be tried: before kernel 6.3 none says what it can do at XDP (--try)",
        ),
        Err(error) => {
            Check::warning("drivers", "unknown", format!("generic netlink does not answer: {error}"))
        }
    }
}

fn errors(are_named: bool) -> Check {
    let found = if are_named {
        "named: a connection without a backend is refused as such"
    } else {
        "EPERM: before kernel 6.0 a socket hook cannot name another"
    };
    Check::good("errors", found)
}

/// Whether frames in several buffers can be met natively.
pub(super) fn frags(refused: Option<&str>) -> Check {
    match refused {
        None => Check::good("frags", "taken: a long MTU runs natively where the driver can"),
        Some(words) => {
            Check::warning("frags", "refused: a long MTU runs in generic mode (kernel 5.18)", words)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::checks::Health, *};

    #[test]
    fn what_an_older_kernel_lacks_is_named_and_no_fault() {
        assert_eq!(tc(&Ok(true)).found, "links");
        for check in [tc(&Ok(false)), drivers(&Ok(None)), errors(false)] {
            assert!(check.health == Health::Good && check.found.contains("kernel 6."), "{check:?}");
        }
    }

    #[test]
    fn what_is_not_known_or_refused_is_a_warning_with_the_kernels_words() {
        let refused = io::Error::from_raw_os_error(libc::EPERM);
        for check in [tc(&Err(refused)), frags(Some("the kernel refuses program xdp_v6_frags"))] {
            assert!(check.health == Health::Warning && check.advice.is_some(), "{check:?}");
        }
        assert_eq!(frags(None).health, Health::Good);
    }
}
