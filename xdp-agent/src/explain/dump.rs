//! The maps as text: sorted, with names in place of ids, so that two of them can be compared line by line.

use std::{
    collections::BTreeMap,
    fmt::{self, Write},
};

use xdp_common::{
    gate::{
        address_bit, backend_destination_bit, backend_source_bit, frontend_bit, service_network_bit, snat_bit,
    },
    net::Address,
    tables::{Backend, Frontend, FrontendKey, backend, frontend, network},
};

use super::{answer::endpoint, tables::Maps};
use crate::cluster::wanted::{IpAddress, Network, Protocol};

/// Names of the flags of a frontend.
const FRONTEND_FLAGS: [(u32, &str); 12] = [
    (frontend::ADDRESS, "ADDRESS"),
    (frontend::ECHO, "ECHO"),
    (frontend::NODE_ADDRESS, "NODE_ADDRESS"),
    (frontend::NODE_PORT, "NODE_PORT"),
    (frontend::HAS_ENDPOINTS, "HAS_ENDPOINTS"),
    (frontend::RESTRICTED, "RESTRICTED"),
    (frontend::DISTINGUISHES_PODS, "DISTINGUISHES_PODS"),
    (frontend::MASQUERADE_EXTERNAL, "MASQUERADE_EXTERNAL"),
    (frontend::MASQUERADE_POD, "MASQUERADE_POD"),
    (frontend::MASQUERADE_HOST, "MASQUERADE_HOST"),
    (frontend::LOCAL, "LOCAL"),
    (frontend::INNER_LOCAL, "INNER_LOCAL"),
];

/// Names of the flags of a backend.
const BACKEND_FLAGS: [(u32, &str); 3] = [
    (backend::LOCAL as u32, "LOCAL"),
    (backend::IN_CLUSTER_LIST as u32, "IN_CLUSTER_LIST"),
    (backend::IN_LOCAL_LIST as u32, "IN_LOCAL_LIST"),
];

/// In any list: others serve flows that they have already, and nothing new.
const LISTED: u8 = backend::IN_CLUSTER_LIST | backend::IN_LOCAL_LIST;

/// Title of what only flows may still use, which depends on what was before.
pub(super) const ENDING: &str = "backends that get nothing new";

/// The most networks of which a gate's bits are told apart; a ServiceCIDR is rarely larger than one.
const NETWORKS_MAX: u64 = 1 << 12;

/// The maps of a family for people; empty when nothing is in them.
pub(super) struct Dump<'a, A> {
    /// The maps.
    pub(super) maps: &'a Maps<A>,
    /// What a service id stands for.
    pub(super) service: &'a dyn Fn(u32) -> String,
}

impl<A: IpAddress> fmt::Display for Dump<'_, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sections = [
            ("frontends", self.frontends()),
            ("backends", self.backends(|flags| flags & LISTED != 0)),
            (ENDING, self.backends(|flags| flags & LISTED == 0)),
            ("networks", self.networks()),
            ("ingress gate", self.gate(&self.maps.ingress_gate, self.ingress_bits())),
            ("egress gate", self.gate(&self.maps.egress_gate, self.egress_bits())),
        ];
        for (title, lines) in sections.into_iter().filter(|(_, lines)| !lines.is_empty()) {
            writeln!(f, "{} {title}", A::FAMILY)?;
            for line in lines {
                writeln!(f, "  {line}")?;
            }
        }
        Ok(())
    }
}

impl<A: IpAddress> Dump<'_, A> {
    fn frontends(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (key, value) in &self.maps.frontends {
            let mut line = place(key);
            if value.service != 0 {
                let _ = write!(line, " of {}", (self.service)(value.service));
            }
            line.push_str(&flags(value.flags, &FRONTEND_FLAGS));
            if value.affinity_seconds != 0 {
                let _ = write!(line, " affinity={}s", value.affinity_seconds);
            }
            lines.push(line);
            if value.flags & (frontend::ADDRESS | frontend::ECHO) == 0 {
                lines.extend(self.rings(value));
            }
        }
        lines
    }

    fn rings(&self, frontend: &Frontend) -> Vec<String> {
        let (outer, inner) = ((frontend.ring, frontend.slots), (frontend.inner_ring, frontend.inner_slots));
        if outer == inner {
            return vec![format!("  ring {}", self.ring(outer))];
        }
        vec![format!("  ring {}", self.ring(outer)), format!("  inner ring {}", self.ring(inner))]
    }

    fn ring(&self, (start, len): (u32, u32)) -> String {
        if len == 0 {
            return "is empty".to_owned();
        }
        let ids = self.maps.ring_ids(start, len);
        let backends = ids.into_iter().map(|id| match self.maps.backends.get(&id) {
            Some(backend) => (backend.addr.to_ip(), u16::from_be_bytes(backend.port)),
            None => (A::UNSPECIFIED.to_ip(), 0),
        });
        let mut backends: Vec<_> = backends.collect();
        backends.sort_unstable();
        let backends: Vec<_> = backends.into_iter().map(|(addr, port)| endpoint(addr, port)).collect();
        format!("of {len}: {}", backends.join(" "))
    }

    fn backends(&self, has: fn(u8) -> bool) -> Vec<String> {
        let in_use = self.maps.backends.values().filter(|backend| backend.proto != 0);
        let mut lines: Vec<(String, A, [u8; 2], String)> = in_use
            .filter(|backend| has(backend.flags))
            .map(|backend| {
                let Backend { addr, port, proto, node, .. } = *backend;
                let service = (self.service)(backend.service);
                let text = format!(
                    "{} of {service}{}{}",
                    address(addr, port, proto),
                    if node == A::UNSPECIFIED { String::new() } else { format!(" on {}", node.to_ip()) },
                    flags(backend.flags.into(), &BACKEND_FLAGS)
                );
                (service, addr, port, text)
            })
            .collect();
        lines.sort_unstable();
        lines.into_iter().map(|(.., text)| text).collect()
    }

    fn networks(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (owner, networks) in &self.maps.networks {
            let owner = match *owner {
                network::PODS => "pods".to_owned(),
                network::SERVICES => "services".to_owned(),
                network::NODES => "nodes".to_owned(),
                network::SELF => "this node".to_owned(),
                sources => format!("sources of {}", (self.service)(sources & !(1 << 31))),
            };
            for (network, is_in) in networks {
                lines.push(format!("{owner} {}{network}", if *is_in { "" } else { "but not " }));
            }
        }
        lines.sort_unstable();
        lines
    }

    /// The bits that are set, by what they stand for, as far as it has a name.
    fn gate(&self, words: &[u64], known: BTreeMap<u32, String>) -> Vec<String> {
        let is_set = |bit: u32| words.get(bit as usize / 64).is_some_and(|word| word >> (bit % 64) & 1 == 1);
        let set: u32 = words.iter().map(|word| word.count_ones()).sum();
        let mut lines: Vec<String> =
            known.into_iter().filter(|(bit, _)| is_set(*bit)).map(|(_, name)| name).collect();
        let others = set - lines.len() as u32;
        lines.retain(|name| !name.is_empty());
        lines.sort_unstable();
        lines.dedup(); // a wide network has many bits
        if others > 0 {
            lines.push(format!("{others} bits that stand for none of this"));
        }
        lines
    }

    fn ingress_bits(&self) -> BTreeMap<u32, String> {
        let mut bits =
            BTreeMap::from([(snat_bit(self.maps.snat), format!("snat {}", self.maps.snat.to_ip()))]);
        for (key, value) in &self.maps.frontends {
            // What the address serves says it already.
            bits.entry(address_bit(key.addr)).or_default();
            if value.flags & frontend::ADDRESS == 0 {
                bits.insert(frontend_bit(key.addr, key.port, key.proto), place(key));
            } else {
                let network = format!("network of {}", key.addr.to_ip());
                bits.entry(service_network_bit(key.addr.network())).or_insert(network);
            }
        }
        let services = self.maps.networks.get(&network::SERVICES).into_iter().flatten();
        for (network, _) in services.filter(|(_, is_in)| **is_in) {
            for bit in network_bits(network) {
                bits.insert(bit, format!("network of {network}"));
            }
        }
        bits
    }

    fn egress_bits(&self) -> BTreeMap<u32, String> {
        let mut bits = BTreeMap::new();
        for Backend { addr, port, proto, .. } in
            self.maps.backends.values().filter(|backend| backend.proto != 0)
        {
            let name = address(*addr, *port, *proto);
            bits.insert(backend_source_bit(*addr, *port, *proto), format!("from {name}"));
            bits.insert(backend_destination_bit(*addr, *port, *proto), format!("to {name}"));
        }
        bits
    }
}

/// The gate's bits of a network: one, or as many as it holds networks that the gate knows.
fn network_bits<A: Address>(network: &Network<A>) -> impl Iterator<Item = u32> + use<A> {
    let spread = A::NETWORK_BITS.saturating_sub(network.len);
    let count = 1u64.checked_shl(spread.into()).unwrap_or(u64::MAX).min(NETWORKS_MAX);
    let first = network.addr.network();
    (first..first.saturating_add(count)).map(service_network_bit)
}

fn place<A: IpAddress>(key: &FrontendKey<A>) -> String {
    if key.proto == 0 { key.addr.to_ip().to_string() } else { address(key.addr, key.port, key.proto) }
}

fn address<A: IpAddress>(addr: A, port: [u8; 2], proto: u8) -> String {
    let at = endpoint(addr.to_ip(), u16::from_be_bytes(port));
    match Protocol::of_number(proto) {
        Some(protocol) => format!("{at}/{}", protocol.name()),
        None => format!("{at}/{proto}"),
    }
}

/// The flags by name, each after a space; those without a name as a number.
fn flags(bits: u32, names: &[(u32, &str)]) -> String {
    let mut text = String::new();
    let mut rest = bits;
    for (flag, name) in names.iter().filter(|(flag, _)| bits & flag != 0) {
        let _ = write!(text, " {name}");
        rest &= !flag;
    }
    if rest != 0 {
        let _ = write!(text, " {rest:#x}");
    }
    text
}
