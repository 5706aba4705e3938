//! ICMP about flows: where an error belongs, and what it is to say there; which echo requests are answered.
//!
//! An error comes from behind the translation and quotes a packet as it looks there. The entry that recognises answers to
//! that packet knows what it was before, and so whom the error concerns. No error makes a flow, ends one or keeps it alive.

use super::{
    Hook, admits, is_without_xdp,
    sending::{Way, by_cache, refresh, set_hop, tag_from},
    stray,
};
use crate::{
    conntrack::{is_ingress_kind, opposite, rewrite, rewrite_between, translated},
    frame::Packet,
    gate,
    icmp::{Icmp, Message, Translation},
    net::{Address, Family, FlowKey},
    tables::{Flow, FrontendKey, Route, Table, Tables, device, exit, frontend, kind, network},
    tunnel::relay::Relay,
    verdict::{Action, Counter, Event, Hop, Reason, Rewrite},
};

/// Decides on an error that has come in.
///
/// Sent on to the client, it comes from the service, whoever has sent it; sent on to a backend that sees this node as the client,
/// from this node. The network may let nothing else through, and a router on both sides of this node drops what comes back with
/// its own address. Netfilter does the same (`nf_nat_icmp_reply_translation` in net/netfilter/nf_nat_core.c). But who tells a
/// client that a packet had no hops left keeps its name: for that traceroute asks, and nothing else depends on it.
///
/// At tc that is where XDP has not seen it, for want of a program or because of its tag, and what is sent on goes to the neighbour
/// that the kernel finds.
#[inline(always)] // one caller per hook
pub fn ingress<F: Family, T: Tables<F>>(
    tables: T,
    message: &Message<F::Addr>,
    hook: Hook,
    out: &mut Translation<F::Addr>,
) -> Action {
    let packet = &message.packet;
    let key = &packet.key;
    if hook == Hook::Tc && !is_without_xdp(tables, packet) {
        return Action::Pass;
    }
    if !admits(tables, &tables.config(), packet) {
        return stray(tables, packet);
    }
    if !is_ours(tables, packet) {
        return Action::Pass;
    }
    let Some(mut work) = tables.work() else { return Action::Pass };
    let mut table = Table::Established;
    let mut found = tables.flow(table, key);
    if found.is_none() {
        table = Table::Embryonic;
        found = tables.flow(table, key);
    }
    let Some(entry) = found else { return stray(tables, packet) };
    if !is_ingress_kind(entry.kind) {
        return Action::Pass;
    }
    if entry.kind == kind::TUNNEL && packet.is_tunnelled {
        // Through no second tunnel, as packets.
        return Action::Pass;
    }
    let flow = &mut work.flow;
    *flow = *entry;
    // The client may still learn about what it has sent.
    flow.exit &= !exit::RESET;
    if flow.exit != exit::LOCAL && flow.routing != tag_from(tables, packet, tables.config().epoch) {
        // The answer serves the flow too, whether it is kept or not.
        refresh(tables, packet, table, flow);
    }
    // Left alone where the backend's node cannot be reached from here: the kernel has no use for it.
    let otherwise = if flow.kind == kind::TUNNEL { Way::Pass } else { Way::Stack };
    let goes_on = flow.exit != exit::LOCAL && flow.kind != kind::TUNNEL && flow.ifindex != 0;
    let way = if hook == Hook::Xdp {
        by_cache(tables, &tables.config(), packet, flow)
    } else {
        (goes_on && packet.ttl > 1).then_some(Way::Redirect)
    };
    let action = way.unwrap_or(otherwise).action();
    if action == Action::Pass {
        return action;
    }
    out.quote = if action == Action::Tunnel { rewrite(flow) } else { quoted(flow) };
    out.hop = Hop { dmac: flow.dmac, smac: flow.smac, ifindex: flow.ifindex };
    let is_translated = flow.kind != kind::TUNNEL && flow.src.differs(key.src) != 0;
    let is_hop = message.is_time_exceeded && flow.kind != kind::FORWARD;
    let is_renamed = (is_translated && !is_hop) || message.from.differs(key.src) == 0;
    // The stack drops what comes in from an address of its own; egress renames the sender.
    out.source = if is_renamed && action != Action::Stack { flow.src } else { message.from };
    tables.count(Counter::Event(Event::Related));
    action
}

/// Decides on an error that is about to leave: one that the kernel itself has made about a packet on its way through, or a
/// backend on this node; or the rest of one that [`ingress`] has handed up.
#[inline(always)] // one caller
pub fn egress<F: Family, T: Tables<F>>(
    tables: T,
    message: &Message<F::Addr>,
    out: &mut Translation<F::Addr>,
) -> Action {
    let Some(mut work) = tables.work() else { return Action::Pass };
    let key = &message.packet.key;
    let quote = &mut work.other_key;
    *quote = key.reversed();
    let is_known = gate::admits_egress(tables, key)
        || gate::admits_egress(tables, quote)
        || gate::admits_ingress(tables, &tables.config(), quote);
    if !is_known {
        return Action::Pass;
    }
    out.source = message.from;
    if let Some(reply) = known::<F, T>(tables, key)
        && reply.kind == kind::REPLY_LOCAL
    {
        out.quote = quoted(&reply);
        if message.from.differs(key.src) == 0 {
            out.source = reply.src;
        }
        tables.count(Counter::Event(Event::Related));
        return Action::Stack;
    }
    let Some(entry) = known::<F, T>(tables, quote) else { return Action::Pass };
    if entry.kind == kind::TRANSIT {
        // The kernel quotes what it was handed, half-translated.
        let whole = opposite(quote, &entry);
        let Some(other) = known::<F, T>(tables, &whole) else { return Action::Pass };
        let original = translated(&whole, &other).reversed();
        out.quote = rewrite_between(quote, &original);
        tables.count(Counter::Event(Event::Related));
        return Action::Stack;
    }
    // The quote is as it should be; the sender may not be.
    out.source = match entry.kind {
        kind::FORWARD if message.is_time_exceeded && message.from.differs(entry.dst) != 0 => message.from,
        kind::FORWARD | kind::REPLY_REMOTE => quote.dst,
        _ => return Action::Pass,
    };
    if out.source.differs(message.from) == 0 {
        return Action::Pass;
    }
    out.quote = rewrite_between(quote, quote);
    tables.count(Counter::Event(Event::Finished));
    Action::Stack
}

/// Decides whether the client of a flow through a tunnel is told of an error about the packet around its own, and how that goes there: as
/// an answer to what it has sent. On the kernel's way that cannot come from an address of this node.
#[inline(always)] // one caller
pub fn relay<F: Icmp, T: Tables<F>>(
    tables: T,
    packet: &Packet<F::Addr>,
    said: &Relay<F::Addr>,
    hop: &mut Hop,
) -> Action {
    let key = &packet.key;
    if !gate::admits_ingress(tables, &tables.config(), key) || !is_ours(tables, packet) {
        return Action::Pass;
    }
    let (Some(entry), Some(mut work)) = (known::<F, T>(tables, key), tables.work()) else {
        return Action::Pass;
    };
    if entry.kind != kind::TUNNEL || entry.src.differs(said.from) != 0 || entry.dst.differs(said.to) != 0 {
        return Action::Pass;
    }
    let flow = &mut work.flow;
    *flow = *entry;
    let route = tables.route(packet.ifindex, key.dst, key.src, 0, F::ICMP);
    let out = match route {
        Route::Hop { ifindex, .. } => tables.device(ifindex),
        Route::NoNeighbour { .. } | Route::Local | Route::Kernel => None,
    };
    set_hop(tables, packet.ifindex, route, out, 0, flow);
    *hop = Hop { dmac: flow.dmac, smac: flow.smac, ifindex: flow.ifindex };
    let action = match flow.exit {
        exit::TRANSMIT => Action::Transmit,
        exit::REDIRECT => Action::Redirect,
        _ if tables.network(network::SELF, key.dst) => return Action::Pass,
        _ => Action::Stack,
    };
    tables.count(Counter::Event(Event::Related));
    action
}

/// Whether an echo request is to be answered: to the address of a service that is none of the node's own.
#[inline(always)] // one caller
pub fn echoes<F: Family, T: Tables<F>>(tables: T, packet: &Packet<F::Addr>) -> bool {
    let at = FrontendKey { addr: packet.key.dst, port: [0; 2], proto: 0, zero: 0 };
    tables.config().echo != 0
        && gate::admits_echo(tables, at.addr)
        && is_ours(tables, packet)
        && !packet.is_tunnelled
        && packet.key.src.is_unicast()
        && tables.device(packet.ifindex).is_some_and(|entry| entry.flags & device::TRANSMIT != 0)
        && tables
            .frontend(&at)
            .is_some_and(|address| address.flags & (frontend::ADDRESS | frontend::ECHO) != 0)
}

/// Why a ping that is not answered, or a packet of a protocol that no service has, is kept from the routing table. What is
/// addressed to a ClusterIP, or to where there is none, would be sent back by the way it came, again and again.
#[inline(always)] // one caller
pub fn unserved<F: Family, T: Tables<F>>(tables: T, packet: &Packet<F::Addr>) -> Option<Reason> {
    let at = FrontendKey { addr: packet.key.dst, port: [0; 2], proto: 0, zero: 0 };
    if !gate::admits_echo(tables, at.addr) || !is_ours(tables, packet) {
        return None;
    }
    match tables.frontend(&at) {
        Some(address) if address.flags & frontend::ADDRESS != 0 => Some(Reason::UnknownPort),
        Some(_) => None,
        None if tables.network(network::SERVICES, at.addr) => Some(Reason::UnknownServiceAddress),
        None => None,
    }
}

/// Whether a frame is for this station: a promiscuous interface picks up others.
#[inline(always)]
fn is_ours<F: Family, T: Tables<F>>(tables: T, packet: &Packet<F::Addr>) -> bool {
    tables.device(packet.ifindex).is_some_and(|entry| entry.mac == packet.dmac)
}

/// The flow of a key, in whichever table it is.
#[inline(always)]
fn known<F: Family, T: Tables<F>>(tables: T, key: &FlowKey<F::Addr>) -> Option<T::Entry> {
    tables.flow(Table::Established, key).or_else(|| tables.flow(Table::Embryonic, key))
}

/// What a quote becomes, when answers to the quoted packet are translated by a flow. The sums are the same either way round.
#[inline(always)]
fn quoted<A: Address>(flow: &Flow<A>) -> Rewrite<A> {
    let answer = rewrite(flow);
    Rewrite { src: answer.dst, dst: answer.src, sport: answer.dport, dport: answer.sport, ..answer }
}
