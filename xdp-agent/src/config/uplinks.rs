//! The interfaces of the default routes, for a start without `--iface`.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use tracing::warn;

use crate::{
    host::{
        routes::{HEADER_LEN, RTA_MULTIPATH},
        rtm,
    },
    neighbours,
    netlink::{Message, Protocol, Requests, attributes, number_u16, number_u32},
};

/// Attributes and values of routes (include/uapi/linux/rtnetlink.h).
const RTA_OIF: u16 = 4;
const RT_TABLE_MAIN: u8 = 254;
const RTN_UNICAST: u8 = 1;
/// Length of `struct rtnexthop`.
const HOP_LEN: usize = 8;

/// Names of the interfaces that default routes of the main table leave by, of both families.
///
/// # Errors
/// When there is none, or the kernel does not tell.
pub(super) fn names() -> anyhow::Result<Vec<String>> {
    let mut requests = Requests::open(Protocol::Route).context("cannot ask for the default route")?;
    let mut found = BTreeSet::new();
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        let mut body = [0; HEADER_LEN];
        body[0] = family;
        let routes = requests.dump(rtm::GETROUTE, &body).context("cannot read the routes; give --iface")?;
        found.extend(routes.iter().flat_map(default_links));
    }
    let host = neighbours::read_host().context("cannot read the interfaces")?;
    let links = found.iter().filter_map(|index| host.links.get(index)).filter(|link| !link.is_loopback);
    let (served, others): (Vec<_>, Vec<_>) = links.partition(|link| link.is_ethernet);
    for link in others {
        warn!(interface = %link.name, "a default route leaves by a device without an Ethernet header, which is not served");
    }
    let names: Vec<String> = served.into_iter().map(|link| link.name.clone()).collect();
    ensure!(
        !names.is_empty(),
        "there is no default route by a device with an Ethernet header to tell the interfaces from; name those that clients and other nodes are reached \
         through by --iface"
    );
    Ok(names)
}

/// Indices of the interfaces a route leaves by, if it is a default route of the main table.
fn default_links(route: &Message) -> Vec<u32> {
    let body = route.body.as_slice();
    let head = (body.get(1), body.get(2), body.get(4), body.get(7));
    if head != (Some(&0), Some(&0), Some(&RT_TABLE_MAIN), Some(&RTN_UNICAST)) {
        return Vec::new();
    }
    let mut links = Vec::new();
    for (kind, value) in attributes(body.get(HEADER_LEN..).unwrap_or_default()) {
        match kind {
            RTA_OIF => links.extend(number_u32(value, 0)),
            RTA_MULTIPATH => links.extend(hops(value)),
            _ => {}
        }
    }
    links
}

fn hops(mut rest: &[u8]) -> Vec<u32> {
    let mut links = Vec::new();
    while let (Some(length), Some(link)) = (number_u16(rest, 0), number_u32(rest, 4)) {
        links.push(link);
        // Hops are aligned to four bytes, and never shorter than their head.
        let next = usize::from(length).max(HOP_LEN).next_multiple_of(4);
        rest = rest.get(next..).unwrap_or_default();
    }
    links
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::put_attribute;

    fn route(length: u8, table: u8, attribute: u16, value: &[u8]) -> Message {
        let mut body = vec![libc::AF_INET as u8, length, 0, 0, table, 3, 0, RTN_UNICAST, 0, 0, 0, 0];
        put_attribute(&mut body, attribute, value);
        Message { kind: 24, body }
    }

    #[test]
    fn only_default_routes_of_the_main_table_count() {
        let oif = 7u32.to_ne_bytes();
        assert_eq!(default_links(&route(0, RT_TABLE_MAIN, RTA_OIF, &oif)), [7]);
        assert_eq!(default_links(&route(24, RT_TABLE_MAIN, RTA_OIF, &oif)), [0u32; 0], "a network");
        assert_eq!(default_links(&route(0, 100, RTA_OIF, &oif)), [0u32; 0], "another table");
        assert_eq!(default_links(&Message { kind: 24, body: vec![2, 0] }), [0u32; 0], "truncated");
    }

    #[test]
    fn every_hop_of_a_multipath_route_counts() {
        let mut hops = Vec::new();
        for link in [3u32, 4] {
            hops.extend_from_slice(&16u16.to_ne_bytes());
            hops.extend_from_slice(&[0, 0]);
            hops.extend_from_slice(&link.to_ne_bytes());
            hops.extend_from_slice(&[8, 0, 5, 0, 192, 0, 2, 1]);
        }
        assert_eq!(default_links(&route(0, RT_TABLE_MAIN, RTA_MULTIPATH, &hops)), [3, 4]);
    }
}
