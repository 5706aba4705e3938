//! The gate: a bit filter that turns away what is not ours, before any table is asked.
//!
//! Most of what a node receives and sends is nobody's service. One inlined array read answers for it. The filter has no
//! false negatives; a false positive costs a table lookup and changes nothing. The agent is its only writer: it sets a
//! bit before it adds the frontend, and clears it only when no flow needs it any more.

use crate::{
    net::{Address, Family, FlowKey, Port},
    tables::{Config, GATE_WORDS, Tables},
};

/// Bits in a gate.
pub const GATE_BITS: u32 = GATE_WORDS * 64;

/// What a bit stands for, so that the same address and port have different bits in different roles.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Role {
    Frontend = 1,
    SnatAddress = 2,
    BackendSource = 3,
    BackendDestination = 4,
    ServiceNetwork = 5,
    FrontendAddress = 6,
}

#[inline(always)] // it must fold into the caller: the whole gate is about ten instructions
fn bit(role: Role, word: u64, port: Port, proto: u8) -> u32 {
    let port = u16::from_be_bytes(port) as u64;
    let mut hash = word ^ (port << 40) ^ ((proto as u64) << 56) ^ ((role as u64) << 32);
    // Multiplication carries upward only, so the highest bits see every input bit once the word is turned over.
    hash = (hash ^ (hash >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (hash >> (64 - GATE_BITS.ilog2())) as u32
}

/// Bit of a frontend in the ingress gate.
#[inline(always)]
pub fn frontend_bit<A: Address>(addr: A, port: Port, proto: u8) -> u32 {
    bit(Role::Frontend, addr.word(), port, proto)
}

/// Bit in the ingress gate of an address that has frontends, whatever their ports: all that a later fragment tells.
#[inline(always)]
pub fn address_bit<A: Address>(addr: A) -> u32 {
    bit(Role::FrontendAddress, addr.word(), [0; 2], 0)
}

/// Bit of a SNAT address in the ingress gate; it lets the ports of the SNAT range through.
#[inline(always)]
pub fn snat_bit<A: Address>(addr: A) -> u32 {
    bit(Role::SnatAddress, addr.word(), [0; 2], 0)
}

/// Bit in the ingress gate of a network that holds ClusterIPs; it lets all ports and protocols of it through. A network is
/// what addresses share in [`Address::network`].
#[inline(always)]
pub fn service_network_bit(network: u64) -> u32 {
    bit(Role::ServiceNetwork, network, [0; 2], 0)
}

/// Bit of a backend in the egress gate, as the source of replies.
#[inline(always)]
pub fn backend_source_bit<A: Address>(addr: A, port: Port, proto: u8) -> u32 {
    bit(Role::BackendSource, addr.word(), port, proto)
}

/// Bit of a backend elsewhere in the egress gate, as the destination of half-translated packets.
#[inline(always)]
pub fn backend_destination_bit<A: Address>(addr: A, port: Port, proto: u8) -> u32 {
    bit(Role::BackendDestination, addr.word(), port, proto)
}

/// Whether a packet may be ours at ingress: addressed to a frontend, to where ClusterIPs are, or to a SNAT address within
/// the range.
#[inline(always)] // the hottest test of all
pub fn admits_ingress<F: Family, T: Tables<F>>(tables: T, config: &Config, key: &FlowKey<F::Addr>) -> bool {
    let port = u16::from_be_bytes(key.dport);
    if port >= config.snat_port_min && port <= config.snat_port_max {
        let at = snat_bit(key.dst);
        if is_set(tables.ingress_gate(at / 64), at) {
            return true;
        }
    }
    let at = frontend_bit(key.dst, key.dport, key.proto);
    if is_set(tables.ingress_gate(at / 64), at) {
        return true;
    }
    let at = service_network_bit(key.dst.network());
    is_set(tables.ingress_gate(at / 64), at)
}

/// Whether a packet that has come out of a tunnel may be addressed to a NodePort of the node that has sent it on.
#[inline(always)] // one caller
pub fn admits_tunnelled<F: Family, T: Tables<F>>(tables: T, key: &FlowKey<F::Addr>) -> bool {
    let at = frontend_bit(F::Addr::UNSPECIFIED, key.dport, key.proto);
    is_set(tables.ingress_gate(at / 64), at)
}

/// Whether a packet may be addressed to a frontend.
#[inline(always)] // one caller
pub fn admits_frontend<F: Family, T: Tables<F>>(tables: T, key: &FlowKey<F::Addr>) -> bool {
    let at = frontend_bit(key.dst, key.dport, key.proto);
    is_set(tables.ingress_gate(at / 64), at)
}

/// Whether an address may be that of a service, by the bit of its network or by its own.
#[inline(always)] // one caller
pub fn admits_echo<F: Family, T: Tables<F>>(tables: T, addr: F::Addr) -> bool {
    let (network, own) = (service_network_bit(addr.network()), frontend_bit(addr, [0; 2], 0));
    is_set(tables.ingress_gate(network / 64), network) || is_set(tables.ingress_gate(own / 64), own)
}

/// Whether a fragment that has come in may be ours, as far as its destination address says.
#[inline(always)] // one caller
pub fn admits_address<F: Family, T: Tables<F>>(tables: T, addr: F::Addr) -> bool {
    let bits = [address_bit(addr), service_network_bit(addr.network()), snat_bit(addr)];
    bits.into_iter().any(|at| is_set(tables.ingress_gate(at / 64), at))
}

/// Whether a packet may be ours at egress: from a backend, or half-translated toward one.
#[inline(always)]
pub fn admits_egress<F: Family, T: Tables<F>>(tables: T, key: &FlowKey<F::Addr>) -> bool {
    let source = backend_source_bit(key.src, key.sport, key.proto);
    if is_set(tables.egress_gate(source / 64), source) {
        return true;
    }
    let destination = backend_destination_bit(key.dst, key.dport, key.proto);
    is_set(tables.egress_gate(destination / 64), destination)
}

#[inline(always)]
fn is_set(word: u64, bit: u32) -> bool {
    word >> (bit % 64) & 1 == 1
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, vec::Vec};

    use super::*;

    #[test]
    fn bits_of_many_frontends_spread() {
        let mut bits: HashSet<u32> = HashSet::new();
        let mut frontends = 0;
        for service in 0..10_000u32 {
            let addr = (0x0a60_0000 + service).to_be_bytes();
            for port in [80u16, 443] {
                bits.insert(frontend_bit(addr, port.to_be_bytes(), 6));
                frontends += 1;
            }
        }
        // With 20,000 keys in a million bits about 190 collisions are expected.
        assert!(bits.len() > frontends - 400, "{} of {frontends}", bits.len());
    }

    #[test]
    fn strangers_are_rarely_admitted() {
        let set: HashSet<u32> =
            (0..20_000u32).map(|n| frontend_bit((0x0a60_0000 + n).to_be_bytes(), [0, 80], 6)).collect();
        let strangers: Vec<u32> =
            (0..100_000u32).map(|n| frontend_bit((0xc0a8_0000 + n).to_be_bytes(), [0x1f, 0x90], 6)).collect();
        let admitted = strangers.iter().filter(|bit| set.contains(bit)).count();
        assert!(admitted < 4_000, "{admitted} of {}", strangers.len());
    }
}
