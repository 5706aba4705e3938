//! Packets that another node has sent on in packets of its own: they are taken out, and go on as if their clients had sent
//! them here. And errors about packets around those of clients that this node has sent on, which are told to the clients.

use aya_ebpf::{
    bindings::{xdp_action, xdp_md},
    macros::xdp,
};
use xdp_common::{
    decide::related,
    frame, icmp,
    net::{Family, V4, V6},
    tables::next,
    tunnel::{self, relay},
    verdict::{Action, Counter, Event},
};

use crate::{
    family::Maps,
    maps::{Kernel, answer_room, count, message},
    packet::{Wire, XdpFrame},
    xdp::go_on,
};

/// A packet in a packet, or an error about one.
#[xdp]
pub(crate) fn xdp_tunnel(ctx: aya_ebpf::programs::XdpContext) -> u32 {
    untunnel::<false>(ctx.ctx)
}

/// The same for long frames.
#[xdp(frags)]
pub(crate) fn xdp_tunnel_frags(ctx: aya_ebpf::programs::XdpContext) -> u32 {
    untunnel::<true>(ctx.ctx)
}

#[inline(always)] // the two entry points differ in their section only
fn untunnel<const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    match frame::ethertype(&XdpFrame::new(ctx, FRAGS)) {
        V4::ETHERTYPE => untunnel_of::<V4, FRAGS>(ctx),
        V6::ETHERTYPE => untunnel_of::<V6, FRAGS>(ctx),
        _ => xdp_action::XDP_PASS,
    }
}

#[inline(always)] // as above
fn untunnel_of<F: Maps + Wire, const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    if icmp::is_plain::<F, _>(&XdpFrame::new(ctx, FRAGS)) {
        return relayed::<F, FRAGS>(ctx);
    }
    if !is_taken_out::<F, FRAGS>(ctx) {
        return xdp_action::XDP_PASS;
    }
    count(Counter::Event(Event::Untunnelled));
    go_on::<FRAGS, { next::INGRESS }>(ctx)
}

/// Takes a packet for this node out of the one around it.
#[inline(never)] // a frame of its own on a stack of 512 bytes
fn is_taken_out<F: Maps + Wire, const FRAGS: bool>(ctx: *mut xdp_md) -> bool {
    let frame = &XdpFrame::new(ctx, FRAGS);
    tunnel::parse::<F, _>(frame, frame.ifindex()).is_some_and(|packet| {
        tunnel::is_ours::<F, _>(Kernel::new(frame.context()), &packet) && frame.untunnel::<F>()
    })
}

/// An error about a packet around a client's.
#[inline(always)] // three calls
fn relayed<F: Maps + Wire, const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    match judged::<F, FRAGS>(ctx) {
        LEFT => xdp_action::XDP_PASS,
        mtu if is_told::<F, FRAGS>(ctx, mtu as u16) => sent::<F, FRAGS>(ctx, mtu & ON_WIRE != 0),
        _ => xdp_action::XDP_PASS,
    }
}

/// No MTU: the error is not about a packet of ours.
const LEFT: u32 = u32::MAX;
/// Bit beside the MTU, where XDP sends the error itself.
const ON_WIRE: u32 = 1 << 16;

/// What is to be told of an error, as a number that a function can return; the next hop is left where translations are.
#[inline(never)] // a frame of its own on a stack of 512 bytes
fn judged<F: Maps + Wire, const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    let frame = &XdpFrame::new(ctx, FRAGS);
    let Some((message, translation)) = message::<F>() else { return LEFT };
    let packet = &mut message.packet;
    let Some(said) = relay::parse::<F, _>(frame, frame.ifindex(), packet) else { return LEFT };
    let tables = Kernel::<F>::new(frame.context());
    match related::relay(tables, packet, &said, &mut translation.hop) {
        Action::Transmit | Action::Redirect => said.mtu as u32 | ON_WIRE,
        Action::Stack => said.mtu as u32,
        Action::Pass | Action::Tunnel | Action::Drop(_) | Action::Reject(_) => LEFT,
    }
}

/// Puts together what a client is told.
#[inline(never)] // as above
fn is_told<F: Maps + Wire, const FRAGS: bool>(ctx: *mut xdp_md, mtu: u16) -> bool {
    answer_room().is_some_and(|area| F::relay(&XdpFrame::new(ctx, FRAGS), mtu, area))
}

/// Sends it instead of what has come in.
#[inline(never)] // as above
fn sent<F: Maps + Wire, const FRAGS: bool>(ctx: *mut xdp_md, is_on_wire: bool) -> u32 {
    let frame = &XdpFrame::new(ctx, FRAGS);
    let (Some((_, translation)), Some(area)) = (message::<F>(), answer_room()) else {
        return xdp_action::XDP_PASS;
    };
    let hop = &translation.hop;
    if !F::relayed(frame, is_on_wire.then_some(hop), area) || !is_on_wire {
        xdp_action::XDP_PASS
    } else if hop.ifindex == frame.ifindex() {
        xdp_action::XDP_TX
    } else {
        frame.redirect(hop.ifindex)
    }
}
