//! Direct server return: flows whose packets go to the node of their backend as they are ([`crate::tunnel`]).
//!
//! Such a flow has one entry, which says where its packets go while the ring changes. Losing it costs nothing but that: the
//! next packet is placed by hash again. So it reserves nothing, and no table that is full drops a packet of it.

use super::{
    Hook, Next, Origin, is_for_another,
    opening::route_new,
    sending::{Way, by_cache, refresh, tag_from},
};
use crate::{
    conntrack::opens,
    frame::{Packet, tcp},
    net::{Address, Family, FlowKey, SCTP, TCP, UDP},
    select::known_bit,
    tables::{Config, Flow, Insertion, Table, Tables, Work, direct, exit, frontend, kind, network},
    verdict::{Counter, Event},
};

/// Whether a new flow's packets may go to the node of its backend: those of clients outside the cluster, whose answers that
/// node can send by the way they came. A packet that has come by a tunnel goes through no other. An address of this node is
/// none of the other's, but for NodePorts, where the others know it.
#[inline(always)] // one caller
pub(super) fn may_apply<F: Family, T: Tables<F>>(
    tables: T,
    packet: &Packet<F::Addr>,
    hook: Hook,
    origin: Origin,
    frontend_flags: u32,
) -> bool {
    matches!(hook, Hook::Xdp | Hook::Fragment)
        && origin == Origin::External
        && is_wanted(&tables.config(), packet)
        && !packet.is_tunnelled
        && match frontend_flags & (frontend::NODE_PORT | frontend::NODE_ADDRESS) {
            0 => true,
            frontend::NODE_ADDRESS => false,
            _ => {
                tables.config().direct & direct::NODE_PORTS != 0
                    && tables.network(network::SELF, packet.key.dst)
            }
        }
}

/// Finds the way of a new flow to the node of its backend, and enters it; where there is none, or its client is a pod or a
/// node, whose packets nobody takes out of a tunnel, or a device is still to finish its checksum, which would have to be
/// finished on the way, the flow takes the way of others.
#[inline(never)] // a frame of its own on a stack of 512 bytes
pub(super) fn enter<F: Family, T: Tables<F>>(
    tables: T,
    packet: &Packet<F::Addr>,
    work: &mut Work<F::Addr>,
) -> Next {
    let flow = &mut work.flow;
    let Some(backend) = tables.backend(flow.backend) else { return Next::Route };
    let is_inside =
        || [network::PODS, network::NODES].into_iter().any(|owner| tables.network(owner, packet.key.src));
    if backend.node.differs(F::Addr::UNSPECIFIED) == 0 || packet.looks_offloaded() || is_inside() {
        return Next::Route;
    }
    flow.dst = backend.node;
    // The other node takes packets from addresses that it knows this one by.
    if !route_new(tables, packet, flow) || flow.ifindex == 0 || !tables.network(network::SELF, flow.src) {
        flow.src = packet.key.src;
        flow.dst = backend.addr;
        return Next::Route;
    }
    flow.kind = kind::TUNNEL;
    flow.sport = packet.key.sport;
    flow.dport = packet.key.dport;
    flow.addr_delta = 0;
    flow.l4_delta = 0;
    flow.pseudo_sum = packet.key.pseudo_sum();
    through::<F>(flow);
    match tables.insert(&packet.key, flow) {
        Insertion::Done => tables.count(Counter::Event(Event::FlowNew)),
        Insertion::Exists => match tables.flow(Table::Embryonic, &packet.key) {
            // An opener that is sent again goes where it went before.
            Some(entry)
                if entry.kind == kind::TUNNEL && !is_over(tables, &tables.config(), packet, &entry) =>
            {
                *flow = *entry
            }
            _ => _ = tables.store(Table::Embryonic, &packet.key, flow),
        },
        Insertion::Refused => {}
    }
    Next::Send(Table::Embryonic)
}

/// Makes the way of a flow, as the routing table has told it, one through a tunnel.
#[inline(always)] // a few instructions
pub(super) fn through<F: Family>(flow: &mut Flow<F::Addr>) {
    if flow.exit == exit::TRANSMIT || flow.exit == exit::REDIRECT {
        flow.exit = exit::TUNNEL;
    }
    flow.mtu = flow.mtu.saturating_sub(F::HEADER_LEN);
}

/// Whether a flow through a tunnel must not carry a packet on: because it has come by one itself, tunnels have been switched off,
/// its backend is gone or has another node and the packet would start something new, or the tuple is used again after the old
/// connection closed.
#[inline(always)] // as for other flows
pub(super) fn is_over<F: Family, T: Tables<F>>(
    tables: T,
    config: &Config,
    packet: &Packet<F::Addr>,
    flow: &Flow<F::Addr>,
) -> bool {
    packet.is_tunnelled
        || !is_wanted(config, packet)
        || ((packet.key.proto == UDP || opens(packet))
            && (flow.closing != 0
                || tables
                    .backend(flow.backend)
                    .is_none_or(|now| now.generation != flow.generation || now.node.differs(flow.dst) != 0)))
}

/// Whether packets of this protocol go to the node of their backend at all.
#[inline(always)] // two callers
fn is_wanted<A: Address>(config: &Config, packet: &Packet<A>) -> bool {
    let wanted = if packet.key.proto == TCP { direct::TCP } else { direct::OTHERS };
    config.direct & wanted != 0
}

/// Whether a flow is established by this packet. No answer comes by here; that the client goes on says that it got one.
#[inline(always)] // one caller
pub(super) fn establishes<A: Address>(packet: &Packet<A>) -> bool {
    match packet.key.proto {
        TCP => packet.tcp_flags & tcp::ACK != 0,
        SCTP => !opens(packet),
        _ => true,
    }
}

/// Moves a flow to the established table, and says where it is now.
#[inline(never)] // once per flow
pub(super) fn establish<F: Family, T: Tables<F>>(
    tables: T,
    key: &FlowKey<F::Addr>,
    flow: &Flow<F::Addr>,
) -> Table {
    let bit = known_bit(key);
    tables.note_known(bit);
    if !tables.store(Table::Established, key, flow) {
        tables.count(Counter::Event(Event::EstablishedFull));
        return Table::Embryonic;
    }
    tables.note_known(bit);
    tables.remove(Table::Embryonic, key);
    tables.count(Counter::Event(Event::FlowEstablished));
    Table::Established
}

/// How a packet leaves that has no hops left, or no way: to the kernel as it is, which says so to its sender. Of what is addressed to
/// this node itself, to a NodePort, the kernel would say that nobody listens, and end the connection.
#[inline(never)] // rare
fn by_kernel<F: Family, T: Tables<F>>(tables: T, packet: &Packet<F::Addr>, flow: &mut Flow<F::Addr>) -> Way {
    if !tables.network(network::SELF, packet.key.dst) {
        return Way::Pass;
    }
    // An error from here would have its checksum finished by a device where the packet has its own, and SCTP is answered otherwise.
    if packet.ttl > 1 || packet.key.proto == SCTP || packet.looks_offloaded() {
        return Way::Nowhere;
    }
    flow.mtu = 0;
    Way::TooFar
}

/// Sends a packet through the tunnel off the fast path. What XDP cannot send is left to tc ingress, behind which the kernel
/// finds the neighbour.
#[inline(always)] // two callers, off whose stack it would be too deep
pub(super) fn send<F: Family, T: Tables<F>>(
    tables: T,
    packet: &Packet<F::Addr>,
    hook: Hook,
    table: Table,
    flow: &mut Flow<F::Addr>,
) -> Way {
    if flow.routing != tag_from(tables, packet, tables.config().epoch) && refresh(tables, packet, table, flow)
    {
        tables.count(Counter::Event(Event::HopRefreshed));
    }
    if packet.ttl <= 1 || flow.ifindex == 0 {
        return by_kernel(tables, packet, flow);
    }
    // What the kernel has merged has the length of many packets, which are shortened one by one; its checksum is left to a device.
    let is_merged = packet.looks_offloaded();
    if flow.mtu != 0 && packet.total_len > flow.mtu && !is_merged {
        return Way::TooLong;
    }
    match hook {
        Hook::Xdp => by_cache(tables, &tables.config(), packet, flow).unwrap_or(Way::Pass),
        Hook::Tc | Hook::Fragment | Hook::Host | Hook::Pod | Hook::Out => Way::Tunnel,
    }
}

/// How a packet leaves that XDP has left alone though it could have changed it, at tc ingress: through its tunnel, if it is of
/// a flow that has one. All others are nobody's.
#[inline(never)] // rare, and a frame of its own
pub(super) fn left_by_xdp<F: Family, T: Tables<F>>(
    tables: T,
    packet: &Packet<F::Addr>,
    work: &mut Work<F::Addr>,
) -> Way {
    for table in [Table::Established, Table::Embryonic] {
        let Some(entry) = tables.flow(table, &packet.key) else { continue };
        if entry.kind != kind::TUNNEL
            || is_over(tables, &tables.config(), packet, &entry)
            || is_for_another(tables, packet)
        {
            return Way::Pass;
        }
        work.flow = *entry;
        return send(tables, packet, Hook::Tc, table, &mut work.flow);
    }
    Way::Pass
}
