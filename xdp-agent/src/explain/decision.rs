//! The decision, run once for every backend that a new connection may get.

use xdp_common::{
    checksum,
    decide::{Hook, ingress},
    frame::{Packet, tcp},
    net::{Address, Family, FlowKey, TCP},
    tables::{Backend, Frontend, FrontendKey, Tables, backend, kind, network},
    verdict::{Action, Event, Reason},
};

use super::{
    answer::{Source, Verdict},
    tables::{Maps, UPLINK, UPLINK_MAC},
};
use crate::cluster::wanted::IpAddress;

/// What becomes of a new connection in one family.
pub(super) struct Decision<A> {
    pub(super) verdict: Verdict,
    pub(super) source: Source,
    /// The frontend it is addressed to, if there is one.
    pub(super) frontend: Option<Frontend>,
    /// Every backend it may get, and whether that sees an address of this node; sorted.
    pub(super) targets: Vec<Target<A>>,
    /// Why it is not forwarded; nothing for what is nobody's.
    pub(super) reason: Option<&'static str>,
}

/// A backend that a connection may get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Target<A> {
    pub(super) addr: A,
    pub(super) port: u16,
    pub(super) is_local: bool,
    pub(super) is_masqueraded: bool,
}

/// Asks the decision what a connection meets.
pub(super) fn decide<F: Family<Addr: IpAddress>>(
    maps: &Maps<F::Addr>,
    key: FlowKey<F::Addr>,
    is_host: bool,
) -> Decision<F::Addr> {
    let packet = packet(key, if key.proto == TCP { tcp::SYN } else { 0 });
    let hook = if is_host { Hook::Host } else { Hook::Xdp };
    let is_pod = Tables::<F>::network(maps, network::PODS, key.src);
    let source = match hook {
        Hook::Host | Hook::Out => Source::Host,
        Hook::Pod => Source::Pod,
        Hook::Xdp | Hook::Tc | Hook::Fragment if is_pod => Source::Pod,
        Hook::Xdp | Hook::Tc | Hook::Fragment => Source::External,
    };
    let at = FrontendKey { addr: key.dst, port: key.dport, proto: key.proto, zero: 0 };
    let frontend = maps.frontends.get(&at).copied();
    let met = meet::<F>(maps, &packet, hook);
    let mut decision =
        Decision { verdict: Verdict::Pass, source, frontend, targets: Vec::new(), reason: None };
    (decision.verdict, decision.reason) = match met.action {
        Action::Stack | Action::Transmit | Action::Redirect | Action::Tunnel => (Verdict::Forward, None),
        Action::Drop(reason) => (Verdict::Drop, Some(text(reason))),
        Action::Reject(reason) => (Verdict::Reject, Some(text(reason))),
        Action::Pass if met.events.contains(&Event::NoEndpointPassed) => (
            Verdict::Reject,
            Some("The service has no usable endpoint anywhere; the node's own kernel refuses."),
        ),
        Action::Pass if !key.src.is_unicast() => {
            (Verdict::Pass, Some("Its source is no address that clients have; it is left to the kernel."))
        }
        Action::Pass => (Verdict::Pass, None),
    };
    if let (Verdict::Forward, Some(slot), Some(frontend)) = (decision.verdict, met.slot, &frontend) {
        for id in maps.ring_of(frontend, slot) {
            maps.answer_with(Some(id));
            decision.targets.extend(meet::<F>(maps, &packet, hook).target);
        }
        maps.answer_with(None);
    }
    decision.targets.sort_unstable();
    decision
}

/// What one run of the decision has shown.
struct Met<A> {
    action: Action,
    events: Vec<Event>,
    /// The ring slot it has looked at.
    slot: Option<u32>,
    /// The backend of the flow it has made.
    target: Option<Target<A>>,
}

fn meet<F: Family<Addr: IpAddress>>(
    maps: &Maps<F::Addr>,
    packet: &Packet<F::Addr>,
    hook: Hook,
) -> Met<F::Addr> {
    let action = ingress::<F, _>(maps, packet, hook).action;
    let mut flows = maps.take_flows().into_iter();
    // A new flow has the half by which answers are recognised; what the kernel has to finish is noted beside it.
    let tells = [kind::REPLY_LOCAL, kind::REPLY_REMOTE, kind::TUNNEL];
    let reply = flows.find(|(_, flow)| tells.contains(&flow.kind));
    let target = reply.and_then(|(key, flow)| {
        let Backend { addr, port, flags, .. } = *maps.backends.get(&flow.backend)?;
        // Masqueraded, a process of the node keeps the node's address, but its answers are recognised on their way in.
        let is_masqueraded = match flow.kind {
            kind::TUNNEL => false,
            _ => flow.kind == kind::REPLY_REMOTE || key.dst != packet.key.src,
        };
        let is_local = flags & backend::LOCAL != 0;
        Some(Target { addr, port: u16::from_be_bytes(port), is_local, is_masqueraded })
    });
    Met { action, events: maps.take_events(), slot: maps.take_asked_slot(), target }
}

/// A packet with this key, as it comes in by the uplink.
pub(super) fn packet<A: Address>(key: FlowKey<A>, tcp_flags: u8) -> Packet<A> {
    const L4_LEN: u16 = 40;
    Packet {
        key,
        dmac: UPLINK_MAC,
        l4_offset: 34,
        l4_len: L4_LEN,
        total_len: L4_LEN + 20,
        // Any but the one that a device would have to finish.
        check: !checksum::pseudo_header(key.addresses_sum(), key.proto, L4_LEN),
        tos: 0,
        ttl: 64,
        tcp_flags,
        is_tunnelled: false,
        ifindex: UPLINK,
    }
}

fn text(reason: Reason) -> &'static str {
    reason.text().trim()
}
