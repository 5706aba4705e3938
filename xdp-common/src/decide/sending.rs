//! How a packet of a known flow leaves: by the cached next hop, by a new one, or half-translated through the kernel.

use super::{Hook, direct, is_for_another, note_reset};
use crate::{
    conntrack::{rewrite, translate, translated},
    frame::{Packet, tcp},
    net::{Address, Family, FlowKey},
    tables::{Config, Device, Entry, Flow, Route, Table, Tables, Work, closing, device, exit, kind},
    verdict::{Action, Counter, Event, Reason},
};

/// How a packet of a flow leaves: what a function of its own can return in BPF, one number.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Up the stack.
    Stack,
    /// Out of the interface it came in by.
    Transmit,
    /// Out of another interface.
    Redirect,
    /// In a packet to the backend's node.
    Tunnel,
    /// As it is, to the kernel.
    Pass,
    /// Not at all: the table of new flows refused an entry.
    Refused,
    /// Not at all: the endpoint is gone.
    Reset,
    /// Not at all: it is too long for the tunnel.
    TooLong,
    /// Not at all: it has no hops left for the tunnel.
    TooFar,
    /// Not at all: there is no way to the other end of the tunnel.
    Nowhere,
}

impl Way {
    /// What becomes of the packet.
    #[inline(always)]
    pub(super) fn action(self) -> Action {
        match self {
            Self::Stack => Action::Stack,
            Self::Transmit => Action::Transmit,
            Self::Redirect => Action::Redirect,
            Self::Tunnel => Action::Tunnel,
            Self::Pass => Action::Pass,
            Self::Refused => Action::Drop(Reason::FlowInsert),
            Self::Reset => Action::Reject(Reason::EndpointRemoved),
            Self::TooLong => Action::Reject(Reason::TunnelMtu),
            Self::TooFar => Action::Reject(Reason::TunnelHops),
            Self::Nowhere => Action::Drop(Reason::TunnelWay),
        }
    }
}

/// What the cached next hop allows: nothing when it may be stale, or when the packet is one for the kernel to answer
/// with ICMP (over the MTU, or on its last hop).
#[inline(always)] // the fast path itself
pub(super) fn by_cache<F: Family, T: Tables<F>>(
    tables: T,
    config: &Config,
    packet: &Packet<F::Addr>,
    flow: &Flow<F::Addr>,
) -> Option<Way> {
    if flow.exit == exit::LOCAL {
        return (!is_for_another(tables, packet)).then_some(Way::Stack);
    }
    // In this order the verifier goes on from here once; in others it follows the rest of the program once more for each family
    // (kernel 6.18).
    if packet.ttl <= 1
        || flow.routing != tag_from(tables, packet, config.epoch)
        || packet.total_len > flow.mtu
    {
        return None;
    }
    match flow.exit {
        exit::TRANSMIT => Some(Way::Transmit),
        exit::REDIRECT => Some(Way::Redirect),
        exit::TUNNEL => Some(Way::Tunnel),
        _ => None,
    }
}

/// The routing tag of next hops for packets that come in by an interface, for its station. The way out depends on the interface:
/// what leaves where it came in is sent otherwise than what leaves elsewhere, and with two uplinks a flow may change between them.
/// And a frame for another station, which a promiscuous interface has picked up, must not go the way of a flow; the last four
/// bytes of its address tell.
///
/// A number that the tag's steps reach only by chance, and in months; it comes to a flow that has been idle so long, or
/// has no next hop, and then costs a packet or a bucket of the clock on the kernel's way. One comparison answers for all,
/// because the verifier follows each to the end of the program.
#[inline(always)] // a few instructions on the established path
pub(super) fn tag_from<F: Family, T: Tables<F>>(tables: T, packet: &Packet<F::Addr>, epoch: u32) -> u32 {
    let [_, _, station @ ..] = packet.dmac;
    // The odd number next to the golden ratio of 2^64 spreads neighbours over the upper half (Knuth, volume 3, 6.4).
    let from = u64::from(packet.ifindex) << 32 | u64::from(u32::from_ne_bytes(station));
    let spread = from.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    tables.routing_tag(epoch).wrapping_add((spread >> 32) as u32)
}

/// Sends a packet on its way off the fast path: asks for the next hop, or takes the slow path; the flow's
/// translation becomes what is to be done to this packet.
#[inline(never)] // keeps the established path short
pub(super) fn send<F: Family, T: Tables<F>>(
    tables: T,
    packet: &Packet<F::Addr>,
    hook: Hook,
    table: Table,
    work: &mut Work<F::Addr>,
) -> Way {
    let flow = &mut work.flow;
    if flow.exit & exit::RESET != 0 && ends(tables, packet, table, flow) {
        return Way::Reset;
    }
    if flow.exit == exit::LOCAL {
        return Way::Stack;
    }
    if flow.kind == kind::TUNNEL {
        return direct::send(tables, packet, hook, table, flow);
    }
    if hook == Hook::Xdp {
        if flow.routing != tag_from(tables, packet, tables.config().epoch)
            && refresh(tables, packet, table, flow)
        {
            tables.count(Counter::Event(Event::HopRefreshed));
        }
        if let Some(way) = by_cache(tables, &tables.config(), packet, flow) {
            return way;
        }
    } else if let Some(way) = of_this_node(flow) {
        return way;
    }
    if !hand_up(tables, &packet.key, work) {
        return Way::Refused;
    }
    work.flow.exit = exit::KERNEL;
    Way::Stack
}

/// Whether a connection ends here because its endpoint is gone, with a reset for whoever goes on; then both halves say so. The
/// endpoint, if it is there still, hears of it from the client, which knows of no connection any more.
#[inline(never)] // rare
fn ends<F: Family, T: Tables<F>>(
    tables: T,
    packet: &Packet<F::Addr>,
    table: Table,
    flow: &mut Flow<F::Addr>,
) -> bool {
    if packet.tcp_flags & tcp::RST != 0 {
        flow.exit &= !exit::RESET;
        return false;
    }
    if let Some(entry) = tables.flow(table, &packet.key) {
        entry.set_closing(entry.closing | closing::RST);
    }
    note_reset(tables, &packet.key, table, flow);
    true
}

/// How packets of pods and processes of this node leave that need no second half: the hook that translates them sends them.
#[inline(always)]
fn of_this_node<A: Address>(flow: &Flow<A>) -> Option<Way> {
    match flow.exit {
        exit::HAIRPIN | exit::BACK => Some(Way::Transmit),
        exit::OUT => Some(Way::Redirect),
        _ => None,
    }
}

/// Asks for the next hop again; true when an established flow keeps the answer.
#[inline(never)] // once per flow and routing change
pub(super) fn refresh<F: Family, T: Tables<F>>(
    tables: T,
    packet: &Packet<F::Addr>,
    table: Table,
    flow: &mut Flow<F::Addr>,
) -> bool {
    let tag = tag_from(tables, packet, tables.config().epoch);
    let route = tables.route(packet.ifindex, packet.key.src, flow.dst, packet.tos, packet.key.proto);
    let out = match route {
        Route::Hop { ifindex, .. } => tables.device(ifindex),
        Route::NoNeighbour { .. } | Route::Local | Route::Kernel => None,
    };
    let is_known = set_hop(tables, packet.ifindex, route, out, tag, flow);
    if flow.kind == kind::TUNNEL && flow.ifindex != 0 {
        direct::through::<F>(flow);
    }
    // Kept only where an entry's tag is taken away while its next hop is written, so that no other CPU goes by half an address.
    is_known && table == Table::Established && tables.store(table, &packet.key, flow)
}

/// Writes the answer of the routing table, and the device it names, into a flow; false when it is not worth keeping.
#[inline(always)]
pub(super) fn set_hop<F: Family, T: Tables<F>>(
    tables: T,
    in_ifindex: u32,
    route: Route,
    out: Option<Device<F::Addr>>,
    tag: u32,
    flow: &mut Flow<F::Addr>,
) -> bool {
    flow.exit = exit::KERNEL;
    match route {
        Route::Hop { ifindex, dmac, smac, mtu } => {
            flow.exit = match out {
                Some(ref out) => way_out(tables, in_ifindex, ifindex, out),
                None => exit::KERNEL,
            };
            flow.mtu = match (mtu, out) {
                (0, Some(out)) => out.mtu.min(u16::MAX as u32) as u16,
                (mtu, _) => mtu,
            };
            flow.ifindex = ifindex;
            flow.dmac = dmac;
            flow.smac = smac;
            flow.routing = tag;
            true
        }
        Route::NoNeighbour { ifindex } => {
            flow.ifindex = ifindex;
            flow.mtu = 0;
            flow.routing = 0;
            false
        }
        Route::Local | Route::Kernel => {
            flow.ifindex = 0;
            flow.routing = tag;
            true
        }
    }
}

/// How frames from one interface get out of another.
#[inline(always)]
fn way_out<F: Family, T: Tables<F>>(tables: T, from: u32, to: u32, out: &Device<F::Addr>) -> u8 {
    if from == to {
        return if out.flags & device::TRANSMIT != 0 { exit::TRANSMIT } else { exit::KERNEL };
    }
    let is_generic = tables.device(from).is_some_and(|entry| entry.flags & device::GENERIC != 0);
    let wanted = if is_generic { device::ETHERNET } else { device::REDIRECT };
    if out.flags & wanted != 0 { exit::REDIRECT } else { exit::KERNEL }
}

/// The slow path: translates what the kernel must see, and leaves the rest to egress in an entry of its own; false when
/// that cannot be stored. The flow's translation becomes the first half.
///
/// A packet with one of the node's own addresses as its source would be dropped as a martian, so the source address is
/// left for later. The ports are chosen so that the half-translated packet still names its flow: it bears the reserved
/// source port on the client's side.
#[inline(never)] // the stack it goes up costs a hundred times as much
fn hand_up<F: Family, T: Tables<F>>(tables: T, key: &FlowKey<F::Addr>, work: &mut Work<F::Addr>) -> bool {
    let Work { flow, other_key: half, .. } = work;
    let whole = translated(key, flow);
    *half = if flow.kind == kind::FORWARD {
        FlowKey { src: key.src, ..whole }
    } else {
        FlowKey { dst: flow.dst, ..*key }
    };
    let kind = flow.kind;
    translate(flow, half, &whole);
    flow.kind = kind::TRANSIT;
    let is_known = tables
        .flow(Table::Embryonic, half)
        .is_some_and(|entry| entry.kind == kind::TRANSIT && rewrite(&entry) == rewrite(flow));
    let is_stored = is_known || tables.store(Table::Embryonic, half, flow);
    flow.kind = kind;
    translate(flow, key, half);
    is_stored
}
