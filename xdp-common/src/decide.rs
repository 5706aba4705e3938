//! The decision: what becomes of a packet.
//!
//! [`decide()`] serves XDP, [`ingress`] tc ingress with the same decision as a verdict, [`egress`] tc egress. A packet of a known flow is found by one lookup;
//! any other may open one. What cannot be finished here goes up the stack half-translated, and `egress` finishes it.

mod apply;
mod direct;
mod opening;
pub mod related;
mod sending;
pub mod socket;

use crate::{
    conntrack::{closing_after, is_ingress_kind, mirror, opens, opposite, rewrite},
    frame::{Packet, tcp},
    gate,
    net::{Address, Family, FlowKey, UDP},
    select::known_bit,
    tables::{Config, Entry, Flow, Insertion, Table, Tables, Work, closing, device, exit, kind, network},
    verdict::{Action, Counter, Event, Reason, Verdict},
};

pub use self::apply::{Apply, counted};
use self::{
    apply::Told,
    opening::{Origin, open, reserve, route_new, still_holds},
    sending::{by_cache, send},
};

/// Which hook asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// XDP: rewrites bytes, may send frames on, must not touch a checksum its sender has left to the device.
    Xdp,
    /// tc ingress behind XDP: takes the frames XDP has left to it; everything goes on up the stack.
    Tc,
    /// tc ingress, for fragments and frames with a tag that gives a priority alone, all of which XDP leaves to it; everything goes
    /// on up the stack.
    Fragment,
    /// On the way out of a process of this node, wherever it is translated; `explain` asks so.
    Host,
    /// tc ingress of a pod's device: everything that the pod sends, and nothing else.
    Pod,
    /// tc egress of an interface, for what processes of this node send where no socket hook has translated it.
    Out,
}

/// Whether frames that a hook sees have come in by an interface that may pick up those for other stations.
#[inline(always)] // a comparison
fn is_by_wire(hook: Hook) -> bool {
    matches!(hook, Hook::Xdp | Hook::Tc | Hook::Fragment)
}

/// Whether a frame is for another station: a promiscuous interface picks up such. One that is not known yet picks up none, so
/// that flows go on when it has come back with another index.
#[inline(never)] // a frame of its own on a stack of 512 bytes
fn is_for_another<F: Family, T: Tables<F>>(tables: T, packet: &Packet<F::Addr>) -> bool {
    tables.device(packet.ifindex).is_some_and(|entry| entry.mac != packet.dmac)
}

/// What comes next for a packet whose flow has been looked for.
///
/// The parts that the kernel compiles as calls of their own return this and write the flow through a reference: a BPF
/// function returns one number.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Not ours.
    Pass,
    /// Dropped.
    Drop(Reason),
    /// Refused, and its sender told.
    Reject(Reason),
    /// The flow, which is in this table, says where it goes.
    Send(Table),
    /// The same, in the embryonic table, and forward: its other half may have been evicted meanwhile.
    Embryo,
    /// The same, in the embryonic table: the first answer to a new flow.
    Answer,
    /// Of no known flow: it may open one.
    Open,
    /// A new flow whose packets go to the node of its backend as they are, if there is a way.
    Direct,
    /// A new flow whose backend is elsewhere: it needs a way there, and with it a source address.
    Route,
    /// A new flow: it needs a source port, the client's own one if it stays on this node.
    Reserve(bool),
}

/// Decides on a packet that has come in.
#[inline(always)] // one caller per hook
pub fn ingress<F: Family, T: Tables<F>>(tables: T, packet: &Packet<F::Addr>, hook: Hook) -> Verdict<F::Addr> {
    decide::<F, T, _>(tables, packet, hook, Told { tables, packet })
}

/// Decides on a packet that has come in, for a hook that applies the decision in its own way.
#[inline(always)] // one caller per hook
pub fn decide<F: Family, T: Tables<F>, D: Apply<F::Addr>>(
    tables: T,
    packet: &Packet<F::Addr>,
    hook: Hook,
    hand: D,
) -> D::Done {
    let config = tables.config();
    if !admits(tables, &config, packet) {
        return hand.alone(stray(tables, packet));
    }
    let is_left_by_xdp = hook == Hook::Tc && !packet.looks_offloaded() && !is_without_xdp(tables, packet);
    if is_left_by_xdp && config.direct == 0 {
        return hand.alone(Action::Pass);
    }
    let may_be_known = !is_left_by_xdp && (!opens(packet) || tables.may_know(known_bit(&packet.key)));
    // At other hooks `find` looks for it: with a look here too, the verifier of 6.1 has too much to follow at tc ingress.
    let found =
        if hook == Hook::Xdp && may_be_known { tables.established(&config, &packet.key) } else { None };
    let pseudo_sum = match found {
        Some(ref entry) => entry.pseudo_sum,
        None => packet.key.pseudo_sum(),
    };
    if hook == Hook::Xdp && packet.looks_offloaded_by(pseudo_sum) {
        tables.count(Counter::Event(Event::Deferred));
        return hand.alone(Action::Pass);
    }
    let way = match found {
        Some(ref entry) if hook == Hook::Xdp && !is_over(tables, &config, packet, entry) => {
            by_cache(tables, &config, packet, entry)
        }
        _ => None,
    };
    let mut work;
    let (action, flow): (Action, &Flow<F::Addr>) = match (&found, way) {
        (Some(entry), Some(way)) => {
            note(tables, packet, Table::Established, entry, config.clock);
            (way.action(), entry)
        }
        _ => {
            let Some(area) = tables.work() else { return hand.alone(Action::Pass) };
            work = area;
            let may_be_there = found.is_some() || (hook != Hook::Xdp && may_be_known);
            let table = if may_be_there { Table::Established } else { Table::Embryonic };
            let action = match is_left_by_xdp {
                true => direct::left_by_xdp(tables, packet, &mut work).action(),
                false => followed(tables, packet, hook, table, &mut work),
            };
            (action, &work.flow)
        }
    };
    hand.by_flow(action, flow)
}

/// Decides on a packet that does not simply leave by an established flow. Its flow is in this table, if it has one, and in the
/// work area afterwards.
#[inline(always)] // one caller
fn followed<F: Family, T: Tables<F>>(
    tables: T,
    packet: &Packet<F::Addr>,
    hook: Hook,
    table: Table,
    work: &mut Work<F::Addr>,
) -> Action {
    let mut next = find(tables, packet, hook, table, work);
    if next == Next::Embryo && !still_holds(tables, &packet.key, work) {
        // The source port is another flow's by now.
        tables.remove(Table::Embryonic, &packet.key);
        next = Next::Open;
    }
    if next == Next::Answer {
        answered(tables, &packet.key, work);
        next = Next::Send(Table::Embryonic);
    }
    if next == Next::Open {
        next = open(tables, packet, hook, work);
    }
    if next == Next::Direct {
        next = direct::enter(tables, packet, work);
    }
    if next == Next::Route {
        next = Next::Reserve(!route_new(tables, packet, &mut work.flow));
    }
    match next {
        Next::Pass | Next::Open | Next::Direct | Next::Route | Next::Answer => Action::Pass,
        Next::Drop(reason) => Action::Drop(reason),
        Next::Reject(reason) => Action::Reject(reason),
        Next::Send(table) => send(tables, packet, hook, table, work).action(),
        Next::Embryo => {
            let is_established = establishes(packet, &work.flow);
            let table = if is_established { establish(tables, &packet.key, work) } else { Table::Embryonic };
            send(tables, packet, hook, table, work).action()
        }
        Next::Reserve(is_local) => match reserve(tables, &packet.key, work, is_local) {
            Ok(()) => send(tables, packet, hook, Table::Embryonic, work).action(),
            Err(reason) => Action::Drop(reason),
        },
    }
}

/// Whether a packet has come in by an interface where XDP has not seen it.
#[inline(never)] // what is ours comes to tc seldom
fn is_without_xdp<F: Family, T: Tables<F>>(tables: T, packet: &Packet<F::Addr>) -> bool {
    tables.device(packet.ifindex).is_some_and(|entry| entry.flags & device::WITHOUT_XDP != 0)
}

/// Whether a packet may be ours: by where it goes, or because another node has sent it on.
#[inline(always)] // the gate
fn admits<F: Family, T: Tables<F>>(tables: T, config: &Config, packet: &Packet<F::Addr>) -> bool {
    gate::admits_ingress(tables, config, &packet.key)
        || (packet.is_tunnelled && gate::admits_tunnelled(tables, &packet.key))
}

/// Whether a packet has been sent on by another node, to whose NodePort it is addressed.
#[inline(always)] // false on every path but one, by one test
fn is_for_other_node<F: Family, T: Tables<F>>(tables: T, packet: &Packet<F::Addr>) -> bool {
    packet.is_tunnelled && tables.network(network::NODES, packet.key.dst)
}

/// What becomes of a packet that is nobody's: the kernel would only send it back to the node that has sent it on, and that
/// one would again.
#[inline(always)] // as above
fn stray<F: Family, T: Tables<F>>(tables: T, packet: &Packet<F::Addr>) -> Action {
    if !is_for_other_node(tables, packet) {
        return Action::Pass;
    }
    tables.count(Counter::Drop(Reason::UnknownPort));
    Action::Drop(Reason::UnknownPort)
}

/// Finds the flow of a packet that the fast path has not sent, and puts it into the work area.
///
/// A call of its own, so that the fast path stays short: it costs one call, where a new flow costs five lookups.
#[inline(never)]
fn find<F: Family, T: Tables<F>>(
    tables: T,
    packet: &Packet<F::Addr>,
    hook: Hook,
    from: Table,
    work: &mut Work<F::Addr>,
) -> Next {
    for table in [Table::Established, Table::Embryonic] {
        let is_known_absent = from == Table::Embryonic && table == Table::Established;
        // An opener need not look: if its flow is known, the reservation of its source port says so. One that is addressed to
        // no frontend may be the answer to another that it has crossed on its way (RFC 9293, section 3.5).
        let is_opener =
            table == Table::Embryonic && opens(packet) && gate::admits_frontend(tables, &packet.key);
        if is_known_absent || is_opener {
            continue;
        }
        let Some(entry) = tables.flow(table, &packet.key) else { continue };
        work.flow = *entry;
        let flow = &work.flow;
        if !is_ingress_kind(flow.kind) || (is_by_wire(hook) && is_for_another(tables, packet)) {
            return Next::Pass;
        }
        if is_over(tables, &tables.config(), packet, flow) {
            forget(tables, &packet.key, flow);
            continue;
        }
        note(tables, packet, table, &entry, tables.config().clock);
        // The copy may be stored again.
        work.flow.seen = tables.config().clock;
        work.flow.closing = closing_after(work.flow.closing, packet.tcp_flags);
        if table == Table::Embryonic {
            match work.flow.kind {
                kind::FORWARD | kind::TUNNEL => return Next::Embryo,
                _ if work.flow.replied == 0 => return Next::Answer,
                _ => {}
            }
        }
        return Next::Send(table);
    }
    Next::Open
}

/// Notes a packet on the entry of its flow.
#[inline(always)] // a few instructions on the established path
fn note<F: Family, T: Tables<F>>(
    tables: T,
    packet: &Packet<F::Addr>,
    table: Table,
    entry: &T::Entry,
    clock: u32,
) {
    if entry.seen != clock {
        entry.set_seen(clock);
    }
    let closing = closing_after(entry.closing, packet.tcp_flags);
    if closing != entry.closing {
        entry.set_closing(closing);
    }
    if packet.tcp_flags & tcp::RST != 0 {
        note_reset(tables, &packet.key, table, entry);
    }
}

/// Notes a reset on the other half of its flow.
#[inline(never)] // rare, and its key takes room on a stack of 512 bytes
fn note_reset<F: Family, T: Tables<F>>(
    tables: T,
    key: &FlowKey<F::Addr>,
    table: Table,
    flow: &Flow<F::Addr>,
) {
    if flow.kind != kind::TUNNEL
        && let Some(other) = tables.flow(table, &opposite(key, flow))
    {
        other.set_closing(other.closing | closing::RST);
    }
}

/// Whether a flow must not carry this packet on: its backend is gone and the packet would start something new, or the
/// tuple is used again after the old connection closed.
#[inline(always)] // one comparison for most packets
fn is_over<F: Family, T: Tables<F>>(
    tables: T,
    config: &Config,
    packet: &Packet<F::Addr>,
    flow: &Flow<F::Addr>,
) -> bool {
    if flow.kind == kind::TUNNEL {
        return direct::is_over(tables, config, packet, flow);
    }
    if flow.kind != kind::FORWARD || (packet.key.proto != UDP && !opens(packet)) {
        return false;
    }
    let is_current =
        tables.backend(flow.backend).is_some_and(|backend| backend.generation == flow.generation);
    !is_current || flow.closing != 0
}

/// Forgets both halves of a flow that is over.
#[inline(never)] // rare, and its key takes room on a stack of 512 bytes
fn forget<F: Family, T: Tables<F>>(tables: T, key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) {
    tables.count(Counter::Event(Event::FlowRenewed));
    if flow.kind == kind::TUNNEL {
        tables.remove(Table::Established, key);
        return tables.remove(Table::Embryonic, key);
    }
    let other = opposite(key, flow);
    for table in [Table::Established, Table::Embryonic] {
        tables.remove(table, key);
        tables.remove(table, &other);
    }
}

/// Notes that an embryonic flow has been answered, and gives it its forward half: until now it had only the half that
/// answers are recognised by, and packets of its initiator were placed anew by hash.
#[inline(never)] // once per flow, from two programs
fn answered<F: Family, T: Tables<F>>(tables: T, key: &FlowKey<F::Addr>, work: &mut Work<F::Addr>) {
    let Work { flow: reply, reply: forward, other_key: forward_key } = work;
    reply.replied = 1;
    mirror(key, reply, kind::FORWARD, forward_exit(reply), forward);
    *forward_key = opposite(key, reply);
    let is_noted = match tables.insert(forward_key, forward) {
        Insertion::Exists => match tables.flow(Table::Embryonic, forward_key) {
            // Two backends have answered one opener, sent twice while the ring changed: the first answer counts. But
            // what an older connection of this tuple has left behind does not.
            Some(entry)
                if entry.closing == 0 && forward.seen.wrapping_sub(entry.seen) <= ANSWER_SECONDS_MAX =>
            {
                entry.set_replied();
                true
            }
            _ => tables.store(Table::Embryonic, forward_key, forward),
        },
        Insertion::Done => true,
        Insertion::Refused => false,
    };
    if is_noted && let Some(entry) = tables.flow(Table::Embryonic, key) {
        entry.set_replied();
    }
}

/// For how long answers are taken for those to one opener.
const ANSWER_SECONDS_MAX: u32 = 2;

/// Whether an embryonic flow is established by this packet: its initiator speaks again after an answer.
///
/// A flood of openers, even one that draws answers, so never reaches the established table; netfilter calls this state
/// "assured". One that also acknowledges blindly what it has not seen can fill that table, but evicts nothing from it.
#[inline(always)]
fn establishes<A: Address>(packet: &Packet<A>, flow: &Flow<A>) -> bool {
    let is_answered = match flow.kind {
        kind::TUNNEL => direct::establishes(packet),
        _ => flow.kind == kind::FORWARD && flow.replied != 0,
    };
    is_answered && flow.closing & closing::RST == 0 && packet.tcp_flags & tcp::SYN == 0
}

/// Moves both halves to the established table, the reply first: its key is the reservation of the source port. Says
/// where the flow is now: when the table is full it stays where it was.
#[inline(never)] // once per flow
fn establish<F: Family, T: Tables<F>>(tables: T, key: &FlowKey<F::Addr>, work: &mut Work<F::Addr>) -> Table {
    let Work { flow, reply, other_key: reply_key } = work;
    if flow.kind == kind::TUNNEL {
        return direct::establish(tables, key, flow);
    }
    *reply_key = opposite(key, flow);
    let reply_key = &*reply_key;
    let (reply_kind, reply_exit) = reply_of(flow);
    mirror(key, flow, reply_kind, reply_exit, reply);
    tables.note_known(known_bit(reply_key));
    tables.note_known(known_bit(key));
    if !tables.store(Table::Established, reply_key, reply) {
        tables.count(Counter::Event(Event::EstablishedFull));
        return Table::Embryonic;
    }
    if !tables.store(Table::Established, key, flow) {
        tables.remove(Table::Established, reply_key);
        tables.count(Counter::Event(Event::EstablishedFull));
        return Table::Embryonic;
    }
    tables.note_known(known_bit(reply_key));
    tables.note_known(known_bit(key));
    tables.remove(Table::Embryonic, reply_key);
    tables.remove(Table::Embryonic, key);
    tables.count(Counter::Event(Event::FlowEstablished));
    Table::Established
}

/// Kind and exit of the reply's half.
#[inline(always)]
fn reply_of<A: Address>(flow: &Flow<A>) -> (u8, u8) {
    match flow.exit {
        exit::LOCAL => (kind::REPLY_LOCAL, exit::LOCAL),
        exit::HAIRPIN => (kind::REPLY_REMOTE, exit::HAIRPIN),
        exit::BACK => (kind::REPLY_LOCAL, exit::BACK),
        exit::OUT => (kind::REPLY_REMOTE, exit::LOCAL),
        _ => (kind::REPLY_REMOTE, exit::KERNEL),
    }
}

/// Exit of the forward half, by the reply's.
#[inline(always)]
fn forward_exit<A: Address>(reply: &Flow<A>) -> u8 {
    match (reply.kind, reply.exit) {
        (kind::REPLY_LOCAL, exit) => exit,
        (_, exit::HAIRPIN) => exit::HAIRPIN,
        (_, exit::LOCAL) => exit::OUT,
        _ => exit::KERNEL,
    }
}

/// Decides on a packet that is about to leave. [`Action::Transmit`] sends it back in: it is for a process of this node.
#[inline(always)] // one caller
pub fn egress<F: Family, T: Tables<F>>(tables: T, packet: &Packet<F::Addr>) -> Verdict<F::Addr> {
    if !gate::admits_egress(tables, &packet.key) {
        return Verdict::PASS;
    }
    let mut table = Table::Established;
    let mut found = tables.flow(table, &packet.key);
    if found.is_none() {
        table = Table::Embryonic;
        found = tables.flow(table, &packet.key);
    }
    let Some(entry) = found else { return Verdict::PASS };
    let event = match entry.kind {
        kind::REPLY_LOCAL => Event::Restored,
        kind::TRANSIT => Event::Finished,
        _ => return Verdict::PASS,
    };
    if entry.kind == kind::TRANSIT {
        // Ingress has noted the packet on its flow; this entry only lives on.
        let clock = tables.config().clock;
        if entry.seen != clock {
            entry.set_seen(clock);
        }
    } else {
        note(tables, packet, table, &entry, tables.config().clock);
        tables.account(entry.service, packet.total_len);
        if table == Table::Embryonic
            && entry.replied == 0
            && let Some(mut work) = tables.work()
        {
            work.flow = *entry;
            work.flow.seen = tables.config().clock;
            work.flow.closing = closing_after(work.flow.closing, packet.tcp_flags);
            answered(tables, &packet.key, &mut work);
        }
    }
    tables.count(Counter::Event(event));
    let action = if entry.exit == exit::BACK { Action::Transmit } else { Action::Stack };
    Verdict { action, rewrite: rewrite(&entry), ..Verdict::PASS }
}
