//! Which address packets get that leave an interface: what the kernel would give to those that it masquerades.

use std::net::{IpAddr, Ipv6Addr};

use super::{Address, Host};
use crate::cluster::wanted::{Ip6, IpAddress, Network};

/// Unique local addresses (RFC 4193), which RFC 6724 keeps apart from others.
const UNIQUE_LOCAL: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0));
const UNIQUE_LOCAL_LEN: u8 = 7;

impl Host {
    /// The address that packets leaving an interface are translated to: its first global one that is not link-local, or else
    /// that of the loopback, where unnumbered uplinks have theirs and where the kernel looks next too (`inet_select_addr` in
    /// net/ipv4/devinet.c, RFC 6724 section 5 rule 2).
    pub fn source_address<A: IpAddress>(&self, index: u32) -> Option<A> {
        self.first_address(index).or_else(|| self.first_address(self.loopback()?))
    }

    /// Whether an interface has an address that packets can be translated to.
    pub fn has_source_address(&self, index: u32) -> bool {
        self.source_address::<[u8; 4]>(index).is_some() || self.source_address::<Ip6>(index).is_some()
    }

    /// Whether an interface has an address of its own that packets can be translated to.
    pub fn has_own_address(&self, index: u32) -> bool {
        self.first_address::<[u8; 4]>(index).is_some() || self.first_address::<Ip6>(index).is_some()
    }

    /// The addresses that packets leaving an interface in several networks are translated to, by network of the next hop, in IPv6
    /// of the destination; none where one address serves them all.
    ///
    /// IPv4 takes the first address whose network holds the next hop (`inet_select_addr` in net/ipv4/devinet.c). IPv6 prefers
    /// one of the destination's kind, and then one that begins as it does (RFC 6724, section 5, rules 6 and 8); of the
    /// second rule this knows what networks tell.
    pub fn sources<A: IpAddress>(&self, index: u32) -> Vec<(Network<A>, A)> {
        let own = self.addresses.get(&index).into_iter().flatten();
        let primary: Vec<&Address> =
            own.filter(|address| address.is_global() && !address.is_secondary).collect();
        let mut found: Vec<(Network<A>, A)> = Vec::new();
        let mut add = |network: Network<A>, addr| {
            // An earlier one is taken even if a later one says more.
            let is_held = |earlier: &Network<A>| earlier.len <= network.len && earlier.contains(network.addr);
            if !found.iter().any(|(earlier, _)| is_held(earlier)) {
                found.push((network, addr));
            }
        };
        for address in &primary {
            // Nobody else is in the network of a single address, as floating ones have.
            let is_alone =
                address.peer == address.addr && address.len == if address.addr.is_ipv4() { 32 } else { 128 };
            if let (Some(addr), Some(peer), false) =
                (A::from_ip(address.addr), A::from_ip(address.peer), is_alone)
            {
                add(Network::of(peer, address.len), addr);
            }
        }
        if let Some(local) = A::from_ip(UNIQUE_LOCAL) {
            let local = Network { addr: local, len: UNIQUE_LOCAL_LEN };
            let of_kind = |is_local| {
                let mut addresses = primary.iter().filter_map(|address| A::from_ip(address.addr));
                addresses.find(|addr| local.contains(*addr) == is_local)
            };
            if let (Some(unique_local), Some(other)) = (of_kind(true), of_kind(false)) {
                add(local, unique_local);
                add(Network { addr: A::UNSPECIFIED, len: 0 }, other);
            }
        }
        let first = self.first_address(index);
        if found.iter().all(|(_, addr)| Some(*addr) == first) { Vec::new() } else { found }
    }

    fn first_address<A: IpAddress>(&self, index: u32) -> Option<A> {
        let addresses = self.addresses.get(&index)?.iter().filter(|address| address.is_global());
        let mut usable =
            addresses.filter_map(|address| Some((A::from_ip(address.addr)?, address.is_secondary)));
        let first = usable.next()?;
        if !first.1 {
            return Some(first.0);
        }
        Some(usable.find(|(_, is_secondary)| !is_secondary).unwrap_or(first).0)
    }

    fn loopback(&self) -> Option<u32> {
        self.links.values().find(|link| link.is_loopback).map(|link| link.index)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Link, *};

    fn address(text: &str, scope: u8) -> Address {
        let (addr, len) = text.split_once('/').unwrap_or((text, "24"));
        let addr = addr.parse().unwrap();
        Address {
            addr,
            peer: addr,
            len: len.parse().unwrap(),
            scope,
            is_secondary: false,
            is_tentative: false,
        }
    }

    fn sources<A: IpAddress>(addresses: &[&str]) -> Vec<String> {
        let mut host = Host::default();
        host.addresses.insert(2, addresses.iter().map(|text| address(text, 0)).collect());
        let found = host.sources::<A>(2).into_iter();
        found.map(|(network, addr)| format!("{network} {}", addr.to_ip())).collect()
    }

    #[test]
    fn an_unnumbered_interface_takes_the_address_of_the_loopback() {
        let mut host = Host::default();
        host.links.insert(1, Link { index: 1, is_loopback: true, ..Link::default() });
        host.links.insert(2, Link { index: 2, ..Link::default() });
        host.addresses.insert(1, vec![address("127.0.0.1", 254), address("::1", 254)]);
        host.addresses.insert(2, vec![address("fe80::2", 253)]);
        assert!(!host.has_source_address(2), "what is only for the host is no source");
        host.addresses.get_mut(&1).unwrap().extend([address("192.0.2.7", 0), address("2001:db8::7", 0)]);
        assert_eq!(host.source_address::<[u8; 4]>(2), Some([192, 0, 2, 7]));
        let v6 = host.source_address::<Ip6>(2).map(|addr| addr.to_ip().to_string());
        assert_eq!(v6.as_deref(), Some("2001:db8::7"));
        host.addresses.get_mut(&2).unwrap().push(address("198.51.100.1", 0));
        assert_eq!(host.source_address::<[u8; 4]>(2), Some([198, 51, 100, 1]), "its own is better");
    }

    #[test]
    fn an_interface_in_one_network_needs_no_choice() {
        assert_eq!(sources::<[u8; 4]>(&["192.0.2.1/24", "192.0.2.9/32", "fd00::1/64"]), [""; 0]);
        assert_eq!(sources::<[u8; 4]>(&["192.0.2.1/24", "203.0.113.9/32"]), [""; 0], "one that floats");
        assert_eq!(sources::<Ip6>(&["2001:db8::1/64", "2001:db8:1::9/128"]), [""; 0], "the same");
        assert_eq!(sources::<Ip6>(&["192.0.2.1/24", "10.0.0.1/8", "fd00::1/64"]), [""; 0]);
        assert_eq!(sources::<Ip6>(&[]), [""; 0]);
    }

    #[test]
    fn ipv4_takes_the_first_network_that_holds_the_next_hop() {
        assert_eq!(
            sources::<[u8; 4]>(&["192.0.2.1/24", "10.20.0.1/16", "fd00::1/64"]),
            ["192.0.2.0/24 192.0.2.1", "10.20.0.0/16 10.20.0.1"]
        );
        // Not the longest.
        assert_eq!(
            sources::<[u8; 4]>(&["10.0.0.1/8", "10.20.0.1/16", "172.16.0.1/12"]),
            ["10.0.0.0/8 10.0.0.1", "172.16.0.0/12 172.16.0.1"]
        );
        let mut host = Host::default();
        let tunnel = Address { peer: [10, 9, 0, 2].into(), ..address("10.1.0.1/32", 0) };
        host.addresses.insert(2, vec![address("192.0.2.1/24", 0), tunnel]);
        let found = host.sources::<[u8; 4]>(2);
        assert_eq!(found[1], (Network { addr: [10, 9, 0, 2], len: 32 }, [10, 1, 0, 1]), "the other end's");
    }

    #[test]
    fn ipv6_prefers_the_network_of_the_destination_and_then_its_kind() {
        assert_eq!(
            sources::<Ip6>(&["192.0.2.1/24", "2001:db8::1/64", "fd00:20::1/64", "fd00:30::1/64"]),
            [
                "2001:db8::/64 2001:db8::1",
                "fd00:20::/64 fd00:20::1",
                "fd00:30::/64 fd00:30::1",
                "fc00::/7 fd00:20::1",
                "::/0 2001:db8::1"
            ]
        );
    }
}
