//! Whether routes depend on more than the destination.

use super::{FAMILIES, looks_at_destination_only, rtm};
use crate::netlink::{Refused, Requests, attributes};

/// Attributes of routes that have, or may have, several next hops (include/uapi/linux/rtnetlink.h).
pub(crate) const RTA_MULTIPATH: u16 = 9;
const RTA_NH_ID: u16 = 30;
/// Length of `struct rtmsg`, and where in it the type of service is.
pub(crate) const HEADER_LEN: usize = 12;
const TOS: usize = 3;

/// Whether the next hop by a route depends on more than the destination: one of several, or one for a type of service.
pub(super) fn has_several_ways(route: &[u8]) -> bool {
    let mut attributes = attributes(route.get(HEADER_LEN..).unwrap_or_default());
    route.get(TOS).is_some_and(|tos| *tos != 0)
        || attributes.any(|(kind, _)| matches!(kind, RTA_MULTIPATH | RTA_NH_ID))
}

/// Whether rules of the routing policy look at more than the destination.
///
/// # Errors
/// When the kernel refuses the dump.
pub(crate) fn read_policy(requests: &mut Requests) -> Result<bool, Refused> {
    for family in FAMILIES {
        let rules = requests.dump(rtm::GETRULE, &[family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])?;
        if rules.iter().any(|rule| !looks_at_destination_only(&rule.body)) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        host::{FAMILIES, Host, rtm},
        netlink::{Message, put_attribute},
    };

    fn route(tos: u8, attribute: u16) -> Message {
        let mut body = vec![0; HEADER_LEN];
        (body[0], body[TOS]) = (FAMILIES[0], tos);
        put_attribute(&mut body, attribute, &[0; 8]);
        Message { kind: rtm::NEWROUTE, body }
    }

    #[test]
    fn one_next_hop_is_shared_between_flows_and_several_are_not() {
        const RTA_GATEWAY: u16 = 5;
        for (message, expected) in [
            (route(0, RTA_GATEWAY), false),
            (route(0, RTA_MULTIPATH), true),
            (route(0, RTA_NH_ID), true),
            (route(0x10, RTA_GATEWAY), true),
        ] {
            let mut host = Host::default();
            let change = host.apply(&message);
            assert!(change.routing);
            assert_eq!((change.devices, host.has_several_ways), (expected, expected), "{message:?}");
            assert!(!host.apply(&message).devices, "known already");
            host.apply(&Message { kind: rtm::DELROUTE, ..message });
            assert_eq!(host.has_several_ways, expected, "there may be others");
        }
    }
}
