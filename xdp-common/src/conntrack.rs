//! What an entry says about its flow: the translation, the other half, how far it has closed, when it is over.

use crate::{
    checksum,
    frame::{Packet, tcp},
    net::{Address, FlowKey, SCTP, TCP},
    tables::{Flow, closing, kind},
    verdict::Rewrite,
};

/// The packet that leaves, as a key: what the wire or the stack sees after the translation.
#[inline(always)] // field moves only
pub fn translated<A: Address>(key: &FlowKey<A>, flow: &Flow<A>) -> FlowKey<A> {
    FlowKey {
        src: flow.src,
        dst: flow.dst,
        sport: flow.sport,
        dport: flow.dport,
        proto: key.proto,
        zero: [0; 3],
    }
}

/// Key of the other half of a flow: what an answer to the translated packet looks like.
#[inline(always)]
pub fn opposite<A: Address>(key: &FlowKey<A>, flow: &Flow<A>) -> FlowKey<A> {
    translated(key, flow).reversed()
}

/// Rebuilds the other half of a flow from this one, in place; its next hop is unknown.
#[inline(always)]
pub fn mirror<A: Address>(key: &FlowKey<A>, flow: &Flow<A>, kind: u8, exit: u8, other: &mut Flow<A>) {
    other.seen = flow.seen;
    other.backend = flow.backend;
    other.generation = flow.generation;
    other.service = flow.service;
    forget_hop(other);
    other.kind = kind;
    other.exit = exit;
    other.closing = flow.closing & closing::RST;
    other.replied = flow.replied;
    point_back(key, flow, other);
}

/// Makes the next hop of a flow unknown.
#[inline(always)] // stores
pub fn forget_hop<A: Address>(flow: &mut Flow<A>) {
    // Zeros that the compiler does not know for such: for a row that it knows it calls a function in BPF, which takes longer.
    let [a, b, c, d, e, f, ..] = core::hint::black_box(0u64).to_ne_bytes();
    flow.dmac = [a, b, c, d, e, f];
    flow.smac = [a, b, c, d, e, f];
    flow.ifindex = 0;
    flow.routing = 0;
    flow.mtu = 0;
}

/// Makes the other half of a flow lead back to where packets with the key come from. Says the same as translating what
/// `opposite` gives to the reversed key, without either of them.
#[inline(always)]
pub fn point_back<A: Address>(key: &FlowKey<A>, flow: &Flow<A>, other: &mut Flow<A>) {
    other.src = key.dst;
    other.dst = key.src;
    other.sport = key.dport;
    other.dport = key.sport;
    let (addresses, ports) = sums(flow);
    other.pseudo_sum = checksum::pseudo_sum(addresses, key.proto);
    other.addr_delta = checksum::delta(addresses, key.addresses_sum());
    other.l4_delta = checksum::add(other.addr_delta, checksum::delta(ports, key.ports_sum()));
}

/// Completes a flow whose addresses and ports are set, for packets with the key.
#[inline(always)]
pub fn complete<A: Address>(key: &FlowKey<A>, flow: &mut Flow<A>) {
    let (addresses, ports) = sums(flow);
    flow.pseudo_sum = key.pseudo_sum();
    flow.addr_delta = checksum::delta(key.addresses_sum(), addresses);
    flow.l4_delta = checksum::add(flow.addr_delta, checksum::delta(key.ports_sum(), ports));
}

/// The sums of a flow's addresses and of its ports, not folded.
#[inline(always)]
fn sums<A: Address>(flow: &Flow<A>) -> (u32, u32) {
    let ports = u16::from_ne_bytes(flow.sport) as u32 + u16::from_ne_bytes(flow.dport) as u32;
    (flow.src.sum() + flow.dst.sum(), ports)
}

/// Sets a flow's translation from `before` to `after`, with its checksum deltas.
#[inline(always)]
pub fn translate<A: Address>(flow: &mut Flow<A>, before: &FlowKey<A>, after: &FlowKey<A>) {
    let rewrite = rewrite_between(before, after);
    flow.src = rewrite.src;
    flow.dst = rewrite.dst;
    flow.sport = rewrite.sport;
    flow.dport = rewrite.dport;
    flow.pseudo_sum = before.pseudo_sum();
    flow.addr_delta = rewrite.addr_delta;
    flow.l4_delta = rewrite.l4_delta;
}

/// What turns a packet with the key `before` into one with the key `after`.
#[inline(always)]
pub fn rewrite_between<A: Address>(before: &FlowKey<A>, after: &FlowKey<A>) -> Rewrite<A> {
    let addr_delta = checksum::delta(before.addresses_sum(), after.addresses_sum());
    let port_delta = checksum::delta(before.ports_sum(), after.ports_sum());
    Rewrite {
        src: after.src,
        dst: after.dst,
        sport: after.sport,
        dport: after.dport,
        addr_delta,
        l4_delta: checksum::add(addr_delta, port_delta),
    }
}

/// The precomputed translation of a flow.
#[inline(always)]
pub fn rewrite<A: Address>(flow: &Flow<A>) -> Rewrite<A> {
    Rewrite {
        src: flow.src,
        dst: flow.dst,
        sport: flow.sport,
        dport: flow.dport,
        addr_delta: flow.addr_delta,
        l4_delta: flow.l4_delta,
    }
}

/// Whether a packet opens a connection: SYN without ACK.
#[inline(always)]
pub fn opens<A: Address>(packet: &Packet<A>) -> bool {
    packet.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST) == tcp::SYN
}

/// The [`closing`] bits of a direction after one of its packets.
///
/// A direction that goes on after a reset takes the reset back, for itself: its ends have not taken it for theirs
/// (RFC 5961).
#[inline(always)]
pub fn closing_after(before: u8, tcp_flags: u8) -> u8 {
    if tcp_flags & (tcp::SYN | tcp::FIN | tcp::RST) == 0 {
        return before & !closing::RST;
    }
    before
        | (if tcp_flags & tcp::FIN != 0 { closing::FIN } else { 0 })
        | (if tcp_flags & tcp::RST != 0 { closing::RST } else { 0 })
}

/// How long flows may idle, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// An open TCP connection.
    pub tcp_established: u32,
    /// A TCP connection that one side has closed (the kernel's CLOSE_WAIT).
    pub tcp_half_closed: u32,
    /// A TCP connection that both sides have closed, or that was reset.
    pub tcp_closed: u32,
    /// UDP.
    pub udp: u32,
    /// An open SCTP association.
    pub sctp_established: u32,
    /// An SCTP association that is being closed, or was aborted.
    pub sctp_closed: u32,
}

impl Default for Timeouts {
    /// kube-proxy's values where it has them (pkg/proxy/apis/config/v1alpha1/defaults.go), else netfilter's
    /// (net/netfilter/nf_conntrack_proto_{tcp,udp,sctp}.c).
    fn default() -> Self {
        Self {
            tcp_established: 86_400,
            tcp_half_closed: 3_600,
            tcp_closed: 10,
            udp: 120,
            sctp_established: 210,
            sctp_closed: 10,
        }
    }
}

/// Whether a flow is over, from this half and the other, at `clock`.
pub fn expired<A: Address>(
    flow: &Flow<A>,
    other: Option<&Flow<A>>,
    proto: u8,
    clock: u32,
    timeouts: &Timeouts,
) -> bool {
    // Half of the number space is the past: a packet may be newer than the look at the clock.
    let age = |flow: &Flow<A>| match clock.wrapping_sub(flow.seen) {
        age if age < u32::MAX / 2 => age,
        _ => 0,
    };
    let idle = other.map_or(age(flow), |other| age(flow).min(age(other)));
    idle > limit(flow, other, proto, timeouts)
}

fn limit<A: Address>(flow: &Flow<A>, other: Option<&Flow<A>>, proto: u8, timeouts: &Timeouts) -> u32 {
    let theirs = other.map_or(0, |other| other.closing);
    match proto {
        TCP => {}
        // No side has more to say once one of them shuts down.
        SCTP if flow.closing | theirs != 0 => return timeouts.sctp_closed,
        SCTP => return timeouts.sctp_established,
        _ => return timeouts.udp,
    }
    if (flow.closing | theirs) & closing::RST != 0 || flow.closing & theirs & closing::FIN != 0 {
        return timeouts.tcp_closed;
    }
    if (flow.closing | theirs) & closing::FIN != 0 {
        return timeouts.tcp_half_closed;
    }
    timeouts.tcp_established
}

/// Whether an entry is met at ingress (the others are met at egress).
#[inline(always)]
pub fn is_ingress_kind(kind: u8) -> bool {
    kind == kind::FORWARD || kind == kind::REPLY_REMOTE || kind == kind::TUNNEL
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{net::UDP, tables::exit};

    type Key = FlowKey<[u8; 4]>;

    fn keys() -> impl Strategy<Value = Key> {
        any::<([u8; 4], [u8; 4], [u8; 2], [u8; 2])>().prop_map(|(src, dst, sport, dport)| FlowKey {
            src,
            dst,
            sport,
            dport,
            proto: TCP,
            zero: [0; 3],
        })
    }

    fn flow(seen: u32, closing: u8) -> Flow<[u8; 4]> {
        Flow { seen, closing, kind: kind::FORWARD, ..Flow::ZERO }
    }

    proptest! {
        #[test]
        fn a_mirror_undoes_its_flow(client in keys(), backend in keys()) {
            let mut forward = flow(0, 0);
            translate(&mut forward, &client, &backend);
            let reply_key = opposite(&client, &forward);
            let mut reply = Flow::ZERO;
            mirror(&client, &forward, kind::REPLY_REMOTE, exit::KERNEL, &mut reply);
            prop_assert_eq!(translated(&reply_key, &reply), client.reversed());
            prop_assert_eq!(opposite(&reply_key, &reply), client);
            let mut again = Flow::ZERO;
            mirror(&reply_key, &reply, kind::FORWARD, exit::KERNEL, &mut again);
            prop_assert_eq!(translated(&client, &again), backend);
        }
    }

    #[test]
    fn a_flow_is_over_when_both_halves_have_idled_its_limit() {
        let timeouts = Timeouts::default();
        let now = 1_000_000;
        let open = |age| flow(now - age, 0);
        assert!(!expired(&open(86_400), None, TCP, now, &timeouts));
        assert!(expired(&open(86_401), None, TCP, now, &timeouts));
        assert!(!expired(&open(86_401), Some(&open(5)), TCP, now, &timeouts), "the other half is busy");
        assert!(expired(&open(121), None, UDP, now, &timeouts));
        let fin = |age| flow(now - age, closing::FIN);
        assert!(!expired(&fin(11), Some(&open(11)), TCP, now, &timeouts), "only one side has closed");
        assert!(expired(&fin(3_601), Some(&open(3_601)), TCP, now, &timeouts));
        assert!(expired(&fin(11), Some(&fin(11)), TCP, now, &timeouts));
        assert!(expired(&flow(now - 11, closing::RST), Some(&open(11)), TCP, now, &timeouts));
        assert!(!expired(&flow(now + 3, 0), None, UDP, now, &timeouts), "newer than the look");
        assert!(
            !expired(&open(210), None, SCTP, now, &timeouts)
                && expired(&open(211), None, SCTP, now, &timeouts)
        );
        assert!(!expired(&fin(10), Some(&open(11)), SCTP, now, &timeouts));
        assert!(expired(&open(11), Some(&fin(11)), SCTP, now, &timeouts), "whichever side shuts down");
    }
}
