//! The networks in the map, and the bits of the ingress gate for ServiceCIDRs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use xdp_common::{
    gate::service_network_bit,
    tables::network::{NODES, PODS, SELF, SERVICES},
};

use super::{Change, gates::Gate};
use crate::{
    cluster::wanted::{IpAddress, Network, Networks},
    problem::{Problem, ProblemKind},
};

/// Bits of the gate that one ServiceCIDR may take: as many as an IPv4 network of 4 bits needs.
const BITS_MAX: u64 = 4096;

/// Whose a network is, and which.
type Key<A> = (u32, Network<A>);

/// Every network, as the map has it once the changes given out so far are applied.
#[derive(Debug)]
pub(super) struct NetworkTable<A> {
    limit: u32,
    entries: BTreeMap<Key<A>, u32>,
    /// Those of a previous agent that nobody has claimed.
    adopted: BTreeSet<Key<A>>,
    /// Those of all services together.
    common: BTreeMap<Key<A>, u32>,
    /// Bits of the ingress gate for ServiceCIDRs.
    bits: Vec<u32>,
    problems: Vec<Problem>,
}

impl<A: IpAddress> NetworkTable<A> {
    /// Takes over the networks of a previous agent.
    pub(super) fn adopt(limit: u32, networks: Vec<(u32, Network<A>, u32)>) -> Self {
        let entries: BTreeMap<_, _> =
            networks.into_iter().map(|(owner, network, value)| ((owner, network), value)).collect();
        let adopted = entries.keys().copied().collect();
        Self { limit, entries, adopted, common: BTreeMap::new(), bits: Vec::new(), problems: Vec::new() }
    }

    /// How many more fit.
    pub(super) fn room(&self) -> usize {
        (self.limit as usize).saturating_sub(self.entries.len())
    }

    /// How many of an owner's networks are not in yet.
    pub(super) fn missing(&self, owner: u32, networks: &[Network<A>]) -> usize {
        networks.iter().filter(|network| !self.entries.contains_key(&(owner, **network))).count()
    }

    /// Puts a network in, for which there must be room.
    pub(super) fn put(&mut self, owner: u32, network: Network<A>, value: u32, writes: &mut Vec<Change<A>>) {
        self.adopted.remove(&(owner, network));
        if self.entries.insert((owner, network), value) != Some(value) {
            writes.push(Change::Network { owner, network, value: Some(value) });
        }
    }

    pub(super) fn remove(&mut self, owner: u32, network: Network<A>, writes: &mut Vec<Change<A>>) {
        self.adopted.remove(&(owner, network));
        if self.entries.remove(&(owner, network)).is_some() {
            writes.push(Change::Network { owner, network, value: None });
        }
    }

    /// Replaces the networks of all services together. Exceptions come before what they except, and go after it.
    pub(super) fn set_common(
        &mut self,
        networks: &Networks<A>,
        ingress: &mut Gate,
        writes: &mut Vec<Change<A>>,
        leaving: &mut Vec<Key<A>>,
    ) {
        self.problems.clear();
        let mut wanted = wanted(networks);
        if wanted.keys().filter(|key| !self.entries.contains_key(key)).count() > self.room() {
            let message = format!(
                "no room for {} networks of pods, nodes and ServiceCIDRs ({} of {} in use), so nothing is dropped for being \
                 addressed to a ServiceCIDR; raise --max-networks",
                wanted.len(),
                self.entries.len(),
                self.limit
            );
            self.problems.push(Problem::general(ProblemKind::NetworksFull, message));
            wanted.retain(|(owner, _), _| [PODS, NODES, SELF].contains(owner));
        }
        let mut puts: Vec<_> = wanted.iter().map(|(key, value)| (*value, *key)).collect();
        puts.sort_unstable();
        for (value, (owner, network)) in puts {
            if self.entries.contains_key(&(owner, network)) || self.room() > 0 {
                self.put(owner, network, value, writes);
            } else {
                wanted.remove(&(owner, network));
            }
        }
        let mut gone: Vec<_> = self.common.iter().filter(|(key, _)| !wanted.contains_key(key)).collect();
        gone.sort_unstable_by_key(|(key, value)| (std::cmp::Reverse(**value), **key));
        leaving.extend(gone.into_iter().map(|(key, _)| *key));
        self.common = wanted;
        let mut bits = Vec::new();
        for network in &networks.services {
            bits.extend(spanned(network).map(service_network_bit));
            if span(network) > BITS_MAX {
                let message = format!(
                    "spans {} networks of {} bits; what is addressed to no Service is dropped in the first {BITS_MAX} of \
                     them only; use a smaller one",
                    span(network),
                    A::NETWORK_BITS
                );
                self.problems.push(Problem::of(
                    ProblemKind::Unsupported,
                    format!("ServiceCIDR {network}"),
                    message,
                ));
            }
        }
        bits.iter().for_each(|bit| ingress.need(*bit));
        std::mem::replace(&mut self.bits, bits).into_iter().for_each(|bit| ingress.leave(bit));
    }

    /// Networks of a previous agent that nobody has claimed, without those of the owners in `kept`.
    pub(super) fn unclaimed(&self, kept: &BTreeSet<u32>) -> Vec<Key<A>> {
        self.adopted.iter().filter(|(owner, _)| !kept.contains(owner)).copied().collect()
    }

    /// The owners of networks of a previous agent.
    pub(super) fn owners(&self) -> impl Iterator<Item = u32> {
        self.entries.keys().map(|(owner, _)| *owner)
    }

    pub(super) fn problems(&self) -> &[Problem] {
        &self.problems
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn written(&self) -> impl Iterator<Item = (u32, Network<A>, u32)> {
        self.entries.iter().map(|((owner, network), value)| (*owner, *network, *value))
    }
}

/// What the map should hold for all services together; the node's own addresses are no part of a ServiceCIDR.
fn wanted<A: IpAddress>(networks: &Networks<A>) -> BTreeMap<Key<A>, u32> {
    let pods = networks.pods.iter().map(|network| ((PODS, *network), 1));
    let services = networks.services.iter().map(|network| ((SERVICES, *network), 1));
    let own = networks.own.iter().filter(|own| networks.services.iter().any(|network| holds(network, **own)));
    let alone = |addr: &A| Network { addr: *addr, len: A::LEN as u8 * 8 };
    let own = own.map(|own| ((SERVICES, alone(own)), 0));
    let nodes = networks.nodes.iter().map(|node| ((NODES, alone(node)), 1));
    let this = networks.this.iter().map(|this| ((SELF, alone(this)), 1));
    pods.chain(services).chain(own).chain(nodes).chain(this).collect()
}

/// How many networks, as the gate sees them, a network is spread over.
fn span<A: IpAddress>(network: &Network<A>) -> u64 {
    1u64.checked_shl(u32::from(A::NETWORK_BITS.saturating_sub(network.len))).unwrap_or(u64::MAX)
}

fn spanned<A: IpAddress>(network: &Network<A>) -> impl Iterator<Item = u64> + use<A> {
    let first = network.addr.network();
    (0..span(network).min(BITS_MAX)).map(move |at| first.wrapping_add(at))
}

/// Whether an address is in a network.
pub(super) fn holds<A: IpAddress>(network: &Network<A>, addr: A) -> bool {
    let mask = u128::MAX.checked_shl(128 - u32::from(network.len)).unwrap_or(0);
    (bits(network.addr) ^ bits(addr)) & mask == 0
}

/// The bits of an address, the first one leftmost.
fn bits<A: IpAddress>(addr: A) -> u128 {
    match addr.to_ip() {
        IpAddr::V4(ip) => u128::from(ip.to_bits()) << 96,
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::wanted::Ip6;

    #[test]
    fn an_address_is_in_a_network_when_its_leading_bits_are() {
        let cases = [([10, 96, 0, 0], 12, true), ([10, 96, 0, 0], 32, false), ([0; 4], 0, true)];
        for (addr, len, expected) in cases {
            assert_eq!(holds(&Network { addr, len }, [10, 97, 3, 4]), expected, "{addr:?}/{len}");
        }
        let mut addr = [0; 16];
        addr[0] = 0xfd;
        let addr = Ip6::from(addr);
        let inside =
            [Ip6::from([0xfd; 16]), [0xfc; 16].into()].map(|other| holds(&Network { addr, len: 8 }, other));
        assert_eq!(inside, [true, false]);
    }

    #[test]
    fn a_wide_service_cidr_takes_a_bounded_number_of_bits_and_says_so() {
        let cases = [(20, 1, 0), (16, 1, 0), (8, 256, 0), (4, 4096, 0), (3, 4096, 1), (0, 4096, 1)];
        for (len, bits, problems) in cases {
            let mut table = NetworkTable::<[u8; 4]>::adopt(8, Vec::new());
            let services = vec![Network { addr: [0; 4], len }];
            let networks = Networks { services, ..Networks::default() };
            table.set_common(&networks, &mut Gate::new(Vec::new()), &mut Vec::new(), &mut Vec::new());
            assert_eq!((table.bits.len(), table.problems.len()), (bits, problems), "/{len}");
        }
        for (len, bits) in [(108, 1), (64, 1), (52, 4096), (48, 4096), (0, 4096)] {
            assert_eq!(spanned(&Network { addr: Ip6::default(), len }).count(), bits, "/{len}");
        }
    }

    #[test]
    fn networks_that_do_not_fit_drop_nothing() {
        let mut table = NetworkTable::<[u8; 4]>::adopt(2, Vec::new());
        let network = |b: u8| Network { addr: [10, b, 0, 0], len: 16 };
        let networks = Networks {
            pods: vec![network(1)],
            services: vec![network(2)],
            own: vec![[10, 2, 0, 1]],
            ..Networks::NONE
        };
        let mut writes = Vec::new();
        table.set_common(&networks, &mut Gate::new(Vec::new()), &mut writes, &mut Vec::new());
        assert_eq!(writes, [Change::Network { owner: PODS, network: network(1), value: Some(1) }]);
        assert!(table.problems[0].message.contains("--max-networks"));
    }
}
