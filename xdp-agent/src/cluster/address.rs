//! Addresses as Kubernetes reads them: leading zeros are allowed and mean nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Reads an address like Kubernetes' `ParseIPSloppy`: octets with leading zeros are decimal, and an IPv4 address mapped
/// into IPv6 is IPv4.
pub fn parse_ip_sloppy(text: &str) -> Option<IpAddr> {
    if !text.contains(':') {
        return parse_ipv4_sloppy(text).map(IpAddr::V4);
    }
    let address: Ipv6Addr = text.parse().ok()?;
    Some(address.to_canonical())
}

/// Reads a network like Kubernetes' `ParseCIDRSloppy`, as its address and prefix length.
pub fn parse_cidr_sloppy(text: &str) -> Option<(IpAddr, u8)> {
    let (address, length) = text.split_once('/')?;
    let address = parse_ip_sloppy(address)?;
    let length: u8 = length.parse().ok()?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    (length <= longest).then_some((address, length))
}

/// What an address is that no client can connect to on a network.
pub(crate) fn unreachable(address: IpAddr) -> Option<&'static str> {
    [
        (address.is_unspecified(), "unspecified"),
        (address.is_loopback(), "loopback"),
        (address.is_multicast(), "multicast"),
        (address == IpAddr::V4(Ipv4Addr::BROADCAST), "broadcast"),
    ]
    .into_iter()
    .find_map(|(is_it, what)| is_it.then_some(what))
}

/// What an address is that no endpoint can have, because it means something else or nothing beyond one link
/// (`ValidateEndpointIP` in Kubernetes' pkg/apis/core/validation; all of multicast and broadcast beside).
pub(crate) fn special(address: IpAddr) -> Option<&'static str> {
    let is_link_local = match address {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    if is_link_local { Some("link-local") } else { unreachable(address) }
}

fn parse_ipv4_sloppy(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.is_empty() || !part.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let digits = part.trim_start_matches('0');
        *octet = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    }
    parts.next().is_none().then(|| octets.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn leading_zeros_are_decimal() {
        let cases = [
            ("10.0.0.1", Some("10.0.0.1")),
            ("010.000.0.01", Some("10.0.0.1")),
            ("172.30.0.041", Some("172.30.0.41")),
            ("0000192.168.1.1", Some("192.168.1.1")),
            ("::ffff:10.0.0.1", Some("10.0.0.1")),
            ("fd00:10::2", Some("fd00:10::2")),
            ("256.0.0.1", None),
            ("1.2.3", None),
            ("1.2.3.4.5", None),
            ("1..3.4", None),
            ("+1.2.3.4", None),
            (" 1.2.3.4", None),
            ("0x10.0.0.1", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_ip_sloppy(text).map(|ip| ip.to_string()).as_deref(), expected, "{text:?}");
        }
    }

    #[test]
    fn networks_have_a_length_that_fits() {
        assert_eq!(parse_cidr_sloppy("010.0.0.0/8"), Some((IpAddr::from([10, 0, 0, 0]), 8)));
        for bad in ["10.0.0.0", "10.0.0.0/33", "10.0.0.0/", "x/8", "::/129"] {
            assert_eq!(parse_cidr_sloppy(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_address_is_read_back(octets: [u8; 4], zeros in 0usize..3) {
            let pad = "0".repeat(zeros);
            let text = octets.map(|octet| format!("{pad}{octet}")).join(".");
            prop_assert_eq!(parse_ip_sloppy(&text), Some(IpAddr::from(octets)));
        }

        #[test]
        fn no_text_makes_it_panic(text: String) {
            let _ = (parse_ip_sloppy(&text), parse_cidr_sloppy(&text));
        }
    }
}
