//! Packets that another node has sent on in packets of its own: they are taken out, and go on as if their clients had sent
//! them here.

use aya_ebpf::{
    bindings::{xdp_action, xdp_md},
    macros::xdp,
};
use xdp_common::{
    frame,
    net::{Family, V4, V6},
    tables::next,
    tunnel,
    verdict::{Counter, Event},
};

use crate::{
    family::Maps,
    maps::{Kernel, count},
    packet::{Wire, XdpFrame},
    xdp::go_on,
};

/// A packet in a packet.
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
    let frame = &XdpFrame::new(ctx, FRAGS);
    let Some(packet) = tunnel::parse::<F, _>(frame, frame.ifindex()) else { return xdp_action::XDP_PASS };
    if !tunnel::is_ours::<F, _>(Kernel::new(frame.context()), &packet) || !frame.untunnel::<F>() {
        return xdp_action::XDP_PASS;
    }
    count(Counter::Event(Event::Untunnelled));
    go_on::<FRAGS, { next::INGRESS }>(ctx)
}
