//! How a flow is opened: frontend, backend, way, source port.

use super::{
    Hook, Next, direct, is_by_wire, is_for_other_node, reply_of,
    sending::{set_hop, tag_from},
};
use crate::{
    conntrack::{complete, forget_hop, mirror, opposite, point_back},
    frame::Packet,
    net::{Address, Family, FlowKey, UDP},
    select,
    tables::{
        Affinity, AffinityKey, BackendKey, Device, Flow, Frontend, FrontendKey, Insertion, Route, Table,
        Tables, Work, backend, device, exit, frontend, kind, network,
    },
    verdict::{Counter, Event, Reason, SNAT_ATTEMPTS_MAX},
};

/// Where a packet has come from, as policies see it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    External,
    Pod,
    Host,
}

/// Opens a flow, if the packet is addressed to a frontend.
#[inline(never)] // a frame of its own on a stack of 512 bytes
pub(super) fn open<F: Family, T: Tables<F>>(
    tables: T,
    packet: &Packet<F::Addr>,
    hook: Hook,
    work: &mut Work<F::Addr>,
) -> Next {
    let key = &packet.key;
    let mut at = FrontendKey { addr: key.dst, port: key.dport, proto: key.proto, zero: 0 };
    let mut found = tables.frontend(&at);
    if found.is_none() && is_for_other_node(tables, packet) {
        at.addr = F::Addr::UNSPECIFIED;
        found = tables.frontend(&at);
        if found.is_none() {
            return Next::Drop(Reason::UnknownPort);
        }
    }
    // Nothing is addressed to the key of other nodes' NodePorts.
    let is_unicast = key.src.is_unicast() && key.dst.differs(F::Addr::UNSPECIFIED) != 0;
    // A frame for another station that a promiscuous interface has picked up is not ours.
    let is_wire = is_by_wire(hook);
    let at_device = if hook == Hook::Pod { device::OF_PODS } else { packet.ifindex };
    let Some(entry) = tables.device(at_device) else { return Next::Pass };
    if (is_wire && entry.mac != packet.dmac) || !is_unicast {
        return Next::Pass;
    }
    let Some(frontend) = found else { return without_frontend(tables, key, can_answer(hook, &entry)) };
    let origin = match hook {
        Hook::Host | Hook::Out => Origin::Host,
        Hook::Pod => Origin::Pod,
        Hook::Xdp | Hook::Tc | Hook::Fragment => {
            let may_be_pod = frontend.flags & frontend::DISTINGUISHES_PODS != 0;
            let is_pod = may_be_pod && tables.network(network::PODS, key.src);
            if is_pod { Origin::Pod } else { Origin::External }
        }
    };
    if frontend.flags & frontend::RESTRICTED != 0
        && !tables.network(network::sources_of(frontend.service), key.src)
    {
        return Next::Drop(Reason::SourceRange);
    }
    let client = AffinityKey { client: key.src, service: frontend.service };
    let id = choose(tables, &client, select::flow_hash(key, 0), &frontend, origin);
    if id == 0 {
        return without_endpoint(tables, &frontend, can_answer(hook, &entry));
    }
    let Some(backend) = tables.backend(id) else { return Next::Drop(Reason::NoBackend) };
    // Field by field, all but the zeros at its end, which nobody changes: the compiler would call a function to fill it with zeros
    // first.
    let flow = &mut work.flow;
    flow.src = key.src;
    flow.dst = backend.addr;
    flow.dport = backend.port;
    forget_hop(flow);
    flow.seen = tables.config().clock;
    flow.backend = id;
    flow.generation = backend.generation;
    flow.service = frontend.service;
    flow.kind = kind::FORWARD;
    flow.exit = exit::LOCAL;
    flow.closing = 0;
    flow.replied = 0;
    let is_here = backend.flags & backend::LOCAL != 0;
    if hook == Hook::Out {
        // From the node's own address nothing may come in; to that of the frontend answers leave by this interface again.
        flow.src = if is_here { key.dst } else { entry.snat };
        flow.exit = if is_here { exit::BACK } else { exit::OUT };
        return Next::Reserve(false);
    }
    if key.src == backend.addr {
        // An endpoint that reaches itself would drop a packet from its own address.
        if is_here {
            flow.src = entry.snat;
            flow.exit = if hook == Hook::Pod { exit::HAIRPIN } else { exit::KERNEL };
            return Next::Reserve(false);
        }
    } else {
        let is_masqueraded =
            frontend.flags & masquerades(origin) != 0 || (is_wire && tables.config().masquerade_wire != 0);
        if is_here || !is_masqueraded {
            return Next::Reserve(true);
        }
    }
    if direct::may_apply(tables, packet, hook, origin, frontend.flags) { Next::Direct } else { Next::Route }
}

/// The flag by which a frontend masquerades clients from there.
#[inline(always)]
fn masquerades(origin: Origin) -> u32 {
    match origin {
        Origin::External => frontend::MASQUERADE_EXTERNAL,
        Origin::Pod => frontend::MASQUERADE_POD,
        Origin::Host => frontend::MASQUERADE_HOST,
    }
}

/// The id of the backend for a new flow: the one its client has met before, if the frontend keeps to that and it is
/// still to be had, or one by hash; 0 when there is none.
#[inline(never)] // off the stack of its caller
pub(super) fn choose<F: Family, T: Tables<F>>(
    tables: T,
    client: &AffinityKey<F::Addr>,
    hash: u32,
    frontend: &Frontend,
    origin: Origin,
) -> u32 {
    let (ring, slots, is_local) = match origin {
        Origin::External => (frontend.ring, frontend.slots, frontend.flags & frontend::LOCAL),
        Origin::Pod | Origin::Host => {
            (frontend.inner_ring, frontend.inner_slots, frontend.flags & frontend::INNER_LOCAL)
        }
    };
    if slots == 0 {
        return 0;
    }
    let by_hash = ring.wrapping_add(select::slot(hash, slots));
    if frontend.affinity_seconds == 0 {
        return tables.ring(by_hash);
    }
    let list = if is_local != 0 { backend::IN_LOCAL_LIST } else { backend::IN_CLUSTER_LIST };
    let clock = tables.config().clock;
    if let Some(known) = tables.affinity(client)
        && clock.wrapping_sub(known.seen) < frontend.affinity_seconds
        && let Some(backend) = tables.backend(known.backend)
        && backend.generation == known.generation
        && backend.service == frontend.service
        && backend.flags & list != 0
    {
        if known.seen != clock {
            // Refused, the client is remembered from its earlier connection on.
            tables.set_affinity(client, &Affinity { seen: clock, ..known });
        }
        return known.backend;
    }
    let id = tables.ring(by_hash);
    if let Some(backend) = tables.backend(id) {
        let affinity = Affinity { backend: id, generation: backend.generation, seen: clock };
        if !tables.set_affinity(client, &affinity) {
            tables.count(Counter::Event(Event::AffinityRefused));
        }
    }
    id
}

/// Whether answers can go out where their cause came in.
#[inline(always)]
fn can_answer<A: Address>(hook: Hook, entry: &Device<A>) -> bool {
    hook != Hook::Xdp || entry.flags & device::TRANSMIT != 0
}

/// Refuses a packet, with an answer where that is possible.
#[inline(always)]
fn refuse(can_answer: bool, reason: Reason) -> Next {
    if can_answer { Next::Reject(reason) } else { Next::Drop(reason) }
}

/// What is addressed to a ClusterIP whose port no service has is refused, and what is addressed to a ServiceCIDR where
/// no service is, dropped; both as kube-proxy's nftables mode does.
#[inline(never)] // rare
fn without_frontend<F: Family, T: Tables<F>>(tables: T, key: &FlowKey<F::Addr>, can_answer: bool) -> Next {
    let at = FrontendKey { addr: key.dst, port: [0; 2], proto: 0, zero: 0 };
    if tables.frontend(&at).is_some_and(|address| address.flags & frontend::ADDRESS != 0) {
        return refuse(can_answer, Reason::UnknownPort);
    }
    if tables.network(network::SERVICES, key.dst) {
        return Next::Drop(Reason::UnknownServiceAddress);
    }
    tables.count(Counter::Event(Event::Unclaimed));
    Next::Pass
}

#[inline(always)]
fn without_endpoint<F: Family, T: Tables<F>>(tables: T, frontend: &Frontend, can_answer: bool) -> Next {
    if frontend.flags & frontend::HAS_ENDPOINTS != 0 {
        return Next::Drop(Reason::NoLocalEndpoint);
    }
    if frontend.flags & frontend::NODE_ADDRESS != 0 {
        tables.count(Counter::Event(Event::NoEndpointPassed));
        return Next::Pass;
    }
    refuse(can_answer, Reason::NoEndpoint)
}

/// Finds the way to a new flow's backend, and with it the source address it needs; false when it needs none.
///
/// A backend that is reached through an interface without our programs is treated as one of this node: its replies come
/// back through the stack, never through a hook that could undo a SNAT.
#[inline(never)] // a frame of its own on a stack of 512 bytes
pub(super) fn route_new<F: Family, T: Tables<F>>(
    tables: T,
    packet: &Packet<F::Addr>,
    flow: &mut Flow<F::Addr>,
) -> bool {
    let tag = tag_from(tables, packet, tables.config().epoch);
    let route = tables.route(packet.ifindex, packet.key.src, flow.dst, packet.tos, packet.key.proto);
    let by = match route {
        Route::Hop { ifindex, .. } | Route::NoNeighbour { ifindex } => ifindex,
        Route::Kernel => packet.ifindex,
        Route::Local => return false,
    };
    let out = tables.device(by);
    let Some(device) = out else {
        tables.count(Counter::Event(Event::UnmanagedEgress));
        return false;
    };
    flow.src = device.snat;
    if device.flags & device::SEVERAL != 0
        && let Some(source) = tables.source(packet, by, flow.dst)
    {
        flow.src = source;
    }
    set_hop(tables, packet.ifindex, route, out, tag, flow);
    true
}

/// Reserves a source port: the reply's key must not exist in either table. The client's own port comes first, where it
/// may be used. Writes the translation into the flow and inserts the reply's half, the only one that a new flow has.
#[inline(never)] // a frame of its own on a stack of 512 bytes
pub(super) fn reserve<F: Family, T: Tables<F>>(
    tables: T,
    key: &FlowKey<F::Addr>,
    work: &mut Work<F::Addr>,
    is_local: bool,
) -> Result<(), Reason> {
    let (reply_kind, reply_exit) = reply_of(&work.flow);
    mirror(key, &work.flow, reply_kind, reply_exit, &mut work.reply);
    let mut attempt = 0;
    while attempt < SNAT_ATTEMPTS_MAX {
        let port = candidate(tables, key, attempt, is_local);
        work.flow.sport = port.to_be_bytes();
        let idle = if attempt < FREE_ATTEMPTS { u32::MAX } else { EMBRYONIC_SECONDS_MIN };
        match claim(tables, key, work, idle) {
            Claim::New => {
                tables.count(Counter::SnatAttempt(attempt));
                tables.count(Counter::Event(Event::FlowNew));
                return Ok(());
            }
            Claim::Ours => {
                enter(tables, key, &mut work.flow);
                return Ok(());
            }
            Claim::Taken => attempt += 1,
            Claim::Refused => return Err(Reason::FlowInsert),
        }
    }
    count_exhausted(tables, key.proto, &work.flow);
    Err(Reason::SnatExhausted)
}

#[inline(never)] // rare, and off the stack of its caller
fn count_exhausted<F: Family, T: Tables<F>>(tables: T, proto: u8, flow: &Flow<F::Addr>) {
    tables.count_exhausted(&BackendKey { addr: flow.dst, port: flow.dport, proto, zero: 0 });
}

/// The source port that an attempt tries.
#[inline(never)] // off the stack of its caller
fn candidate<F: Family, T: Tables<F>>(
    tables: T,
    key: &FlowKey<F::Addr>,
    attempt: u32,
    is_local: bool,
) -> u16 {
    let config = tables.config();
    let (min, max) = (config.snat_port_min, config.snat_port_max);
    let own = u16::from_be_bytes(key.sport);
    if attempt == 0 && (is_local || (min..=max).contains(&own)) {
        return own;
    }
    // Early attempts find this flow's own reservation again; later ones differ from second to second, so that a
    // client that finds no port does not meet the same ones with each repetition.
    let salt = if attempt < 2 { 0 } else { config.clock << 8 };
    select::snat_port(select::flow_hash(key, PORT_SEED), attempt | salt, min, max)
}

/// Whether an embryonic flow still has its source port; an evicted reply's half is put back where nobody else has it.
#[inline(never)] // a frame of its own on a stack of 512 bytes
pub(super) fn still_holds<F: Family, T: Tables<F>>(
    tables: T,
    key: &FlowKey<F::Addr>,
    work: &mut Work<F::Addr>,
) -> bool {
    if work.flow.kind == kind::TUNNEL {
        return true;
    }
    let (reply_kind, reply_exit) = reply_of(&work.flow);
    mirror(key, &work.flow, reply_kind, reply_exit, &mut work.reply);
    match claim(tables, key, work, u32::MAX) {
        Claim::New | Claim::Ours | Claim::Refused => true,
        Claim::Taken => false,
    }
}

/// Sets source ports apart from backends, which are chosen by the same hash.
const PORT_SEED: u32 = 1;
/// Attempts that look for a source port that nobody has; later ones take one from an embryonic flow that has been idle.
const FREE_ATTEMPTS: u32 = SNAT_ATTEMPTS_MAX / 2;
/// For how long such a flow keeps its source port from others even then, in seconds after its last packet.
const EMBRYONIC_SECONDS_MIN: u32 = 10;

/// How the reservation of a source port ended.
enum Claim {
    /// It is ours from now on.
    New,
    /// It was ours already: this is not the first packet of the flow.
    Ours,
    /// Another flow has it.
    Taken,
    /// The table refused.
    Refused,
}

/// Completes both halves for the source port that the flow has, and inserts the reply's. One that is there already is
/// ours if it leads back to the same client and frontend; another's loses it after so many seconds without a packet.
#[inline(never)] // the verifier follows it once per attempt, with a frame of its own
fn claim<F: Family, T: Tables<F>>(
    tables: T,
    key: &FlowKey<F::Addr>,
    work: &mut Work<F::Addr>,
    idle: u32,
) -> Claim {
    let Work { flow, reply, other_key: reply_key } = work;
    *reply_key = opposite(key, flow);
    complete(key, flow);
    point_back(key, flow, reply);
    let reply_key = &*reply_key;
    let mut inserted = tables.insert(reply_key, reply);
    if inserted == Insertion::Exists {
        let Some(entry) = tables.flow(Table::Embryonic, reply_key) else { return Claim::Taken };
        let is_ours = entry.kind == reply.kind && opposite(reply_key, &entry) == *key;
        if is_ours && entry.closing == 0 {
            return Claim::Ours;
        }
        // Ours but closed: an older connection of this tuple, over before it was established. Another's: flows that never
        // got further than one question and its answer must not keep all ports from those that want one. But an answered
        // connection may be one that the established table had no room for.
        let is_connected = entry.replied != 0 && key.proto != UDP && entry.closing == 0;
        // An entry may be newer than this packet's look at the clock.
        if !is_ours && (is_connected || flow.seen.saturating_sub(entry.seen) <= idle) {
            return Claim::Taken;
        }
        let event = if is_ours { Event::FlowRenewed } else { Event::PortTakenOver };
        tables.count(Counter::Event(event));
        tables.remove(Table::Embryonic, &opposite(reply_key, &entry));
        tables.remove(Table::Embryonic, reply_key);
        inserted = tables.insert(reply_key, reply);
    }
    if inserted != Insertion::Done {
        return Claim::Refused;
    }
    // Looked up after the insertion, because a flow enters the established table before it leaves this one.
    if !tables.may_know(select::known_bit(reply_key)) {
        return Claim::New;
    }
    let Some(entry) = tables.flow(Table::Established, reply_key) else { return Claim::New };
    tables.remove(Table::Embryonic, reply_key);
    if entry.kind != reply.kind || opposite(reply_key, &entry) != *key {
        return Claim::Taken;
    }
    // The forward half was lost: the next packet establishes the flow again.
    flow.replied = 1;
    Claim::Ours
}

/// Inserts the forward half of a flow that has spoken again before it was answered, so that it keeps its backend when
/// the ring changes; where another packet toward the same backend was faster, its entry counts.
#[inline(always)]
fn enter<F: Family, T: Tables<F>>(tables: T, key: &FlowKey<F::Addr>, flow: &mut Flow<F::Addr>) {
    // Refused, the flow goes on without it for now: its next packet is placed by hash again.
    if tables.insert(key, flow) == Insertion::Exists
        && let Some(winner) = tables.flow(Table::Embryonic, key)
        && winner.backend == flow.backend
        && winner.closing == 0
    {
        *flow = *winner;
    }
}
