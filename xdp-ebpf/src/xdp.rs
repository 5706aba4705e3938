//! XDP on a managed interface: TCP and UDP over IPv4, and the programs that it goes on to with all else.
//!
//! A program each, because a call and its return cost a packet some 8 ns where the kernel guards returns against
//! speculation; a tail call with a constant slot is a jump. Nothing is handed over but the frame.

use aya_ebpf::{
    bindings::{xdp_action, xdp_md},
    macros::{map, xdp},
    maps::ProgramArray,
    programs::XdpContext,
};
use xdp_common::{
    answer::{AnswerFrame, Finisher},
    decide::{self, Apply, Hook},
    frame::{self, Packet, Parsed},
    icmp::Icmp,
    net::{Family, V4, V6},
    tables::{self, Flow, next},
    tunnel as tunnels,
    verdict::{Action, Counter, Event, Hop, Reason, Rewrite},
};

#[cfg(feature = "trace")]
use crate::trace;
use crate::{
    answer,
    family::Maps,
    icmp,
    maps::{self, Kernel, count, place},
    packet::{self, Wire, XdpFrame},
    sctp,
};
#[cfg(feature = "trace")]
use xdp_common::verdict::Verdict;

#[map]
static XDP_NEXT: ProgramArray = ProgramArray::with_max_entries(tables::XDP_NEXT.entries, 0);
#[map]
static XDP_NEXT_FRAGS: ProgramArray = ProgramArray::with_max_entries(tables::XDP_NEXT_FRAGS.entries, 0);

/// XDP on a managed interface.
#[xdp]
pub(crate) fn xdp_ingress(ctx: XdpContext) -> u32 {
    ingress::<false>(ctx.ctx)
}

/// The same for drivers that hand over long frames in several buffers; the headers are always in the first.
#[xdp(frags)]
pub(crate) fn xdp_ingress_frags(ctx: XdpContext) -> u32 {
    ingress::<true>(ctx.ctx)
}

/// TCP and UDP over IPv6.
#[xdp]
pub(crate) fn xdp_v6(ctx: XdpContext) -> u32 {
    transport::<V6, false>(ctx.ctx)
}

/// The same for long frames.
#[xdp(frags)]
pub(crate) fn xdp_v6_frags(ctx: XdpContext) -> u32 {
    transport::<V6, true>(ctx.ctx)
}

/// What is neither TCP nor UDP.
#[xdp]
pub(crate) fn xdp_others(ctx: XdpContext) -> u32 {
    others::<false>(ctx.ctx)
}

/// The same for long frames.
#[xdp(frags)]
pub(crate) fn xdp_others_frags(ctx: XdpContext) -> u32 {
    others::<true>(ctx.ctx)
}

#[inline(always)] // the two entry points differ in their section only
fn ingress<const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    match frame::ethertype(&XdpFrame::new(ctx, FRAGS)) {
        V4::ETHERTYPE => transport::<V4, FRAGS>(ctx),
        V6::ETHERTYPE => go_on::<FRAGS, { next::V6 }>(ctx),
        _ => xdp_action::XDP_PASS,
    }
}

#[inline(always)] // the whole of a program
fn transport<F: Maps + Wire, const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    let frame = &XdpFrame::new(ctx, FRAGS);
    let Some(place) = place::<F>() else { return xdp_action::XDP_PASS };
    match F::parse_ip(frame, frame.ifindex(), place) {
        Parsed::Packet(()) => {}
        Parsed::Other => return go_on::<FRAGS, { next::OTHERS }>(ctx),
        // For tc ingress, which the kernel gives them next.
        Parsed::Fragment => return xdp_action::XDP_PASS,
        Parsed::Malformed => {
            count(Counter::Event(Event::Malformed));
            return xdp_action::XDP_PASS;
        }
    }
    decided::<F, FRAGS, false>(frame, place)
}

/// No action of the kernel's: the frame is for another function, or another program.
pub(crate) const OTHER: u32 = u32::MAX;

#[inline(always)] // as for `ingress`
fn others<const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    match frame::ethertype(&XdpFrame::new(ctx, FRAGS)) {
        V4::ETHERTYPE => others_of::<V4, FRAGS>(ctx),
        V6::ETHERTYPE => others_of::<V6, FRAGS>(ctx),
        _ => xdp_action::XDP_PASS,
    }
}

#[inline(always)] // a level of calls less
fn others_of<F: Maps + Wire + Icmp, const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    if tunnels::is_plain::<F, _>(&XdpFrame::new(ctx, FRAGS)) {
        return go_on::<FRAGS, { next::TUNNEL }>(ctx);
    }
    match sctp::xdp::<F, FRAGS>(ctx) {
        OTHER => {}
        action => return action,
    }
    match icmp::xdp::<F, FRAGS>(ctx) {
        OTHER => go_on::<FRAGS, { next::TUNNEL }>(ctx),
        action => action,
    }
}

/// Asks for the decision on a packet, and does what it says.
#[inline(always)] // the fast path
pub(crate) fn decided<F: Maps + Wire, const FRAGS: bool, const IS_SCTP: bool>(
    frame: &XdpFrame,
    packet: &Packet<F::Addr>,
) -> u32 {
    let hand = Hand::<F, FRAGS, IS_SCTP> { frame, packet };
    decide::decide::<F, _, _>(Kernel::new(frame.context()), packet, Hook::Xdp, hand)
}

/// Does with a frame what is decided.
struct Hand<'f, F: Maps + Wire, const FRAGS: bool, const IS_SCTP: bool> {
    frame: &'f XdpFrame,
    packet: &'f Packet<F::Addr>,
}

#[cfg(feature = "trace")]
impl<F: Maps + Wire, const FRAGS: bool, const IS_SCTP: bool> Hand<'_, F, FRAGS, IS_SCTP> {
    #[inline(always)] // a call
    fn trace(&self, verdict: Verdict<F::Addr>) {
        trace::verdict::<F, _>(self.frame.ctx(), "xdp", &self.packet.key, &verdict);
    }
}

impl<F: Maps + Wire, const FRAGS: bool, const IS_SCTP: bool> Apply<F::Addr> for Hand<'_, F, FRAGS, IS_SCTP> {
    type Done = u32;

    #[inline(always)] // two numbers
    fn alone(self, action: Action) -> u32 {
        #[cfg(feature = "trace")]
        self.trace(Verdict { action, ..Verdict::PASS });
        if action == Action::Pass { xdp_action::XDP_PASS } else { xdp_action::XDP_DROP }
    }

    #[inline(always)] // the fast path
    fn by_flow(self, action: Action, flow: &Flow<F::Addr>) -> u32 {
        let action = decide::counted::<F, _>(Kernel::new(self.frame.context()), self.packet, action, flow);
        let (translation, hop) = packet::parts(flow);
        #[cfg(feature = "trace")]
        self.trace(match action {
            Action::Drop(_) | Action::Reject(_) => Verdict { action, ..Verdict::PASS },
            Action::Pass | Action::Stack | Action::Transmit | Action::Redirect | Action::Tunnel => {
                Verdict { action, rewrite: *translation, ..Verdict::PASS }
            }
        });
        let Self { frame, packet } = self;
        match action {
            Action::Pass => xdp_action::XDP_PASS,
            Action::Drop(_) => xdp_action::XDP_DROP,
            Action::Reject(Reason::TunnelMtu) if IS_SCTP => sctp::too_big::<F, FRAGS>(frame.context().cast()),
            Action::Reject(Reason::TunnelMtu | Reason::TunnelHops) => {
                answered(|area| F::too_big(frame, packet, flow.mtu, area))
            }
            Action::Reject(_) if IS_SCTP => sctp::abort::<F, FRAGS>(frame.context().cast()),
            Action::Reject(_) => answered(|area| F::answer(frame, packet, Finisher::Nobody, area)),
            Action::Stack => {
                rewrite::<F, IS_SCTP>(frame, packet, translation);
                xdp_action::XDP_PASS
            }
            Action::Transmit => {
                F::address(frame, packet, hop);
                rewrite::<F, IS_SCTP>(frame, packet, translation);
                xdp_action::XDP_TX
            }
            Action::Redirect => {
                F::address(frame, packet, hop);
                rewrite::<F, IS_SCTP>(frame, packet, translation);
                frame.redirect(hop.ifindex)
            }
            Action::Tunnel if IS_SCTP => sctp::tunnel::<F, FRAGS>(frame.context().cast()),
            Action::Tunnel => tunnel::<F>(frame, packet, hop, flow.src, flow.dst),
        }
    }
}

/// Sends the answer out where the packet came in, if there is one.
#[inline(always)] // the work of a single call
pub(crate) fn answered(write: impl FnOnce(&mut AnswerFrame) -> bool) -> u32 {
    answer(|area| write(area).then_some(xdp_action::XDP_TX)).unwrap_or(xdp_action::XDP_DROP)
}

/// Sends a packet on in another one. Where the driver has left no room for that, tc ingress sees the frame next, and does it.
#[inline(always)] // the fast path
pub(crate) fn tunnel<F: Wire>(
    frame: &XdpFrame,
    packet: &Packet<F::Addr>,
    hop: &Hop,
    from: F::Addr,
    to: F::Addr,
) -> u32 {
    if !F::tunnel(frame, packet, hop, from, to) {
        xdp_action::XDP_PASS
    } else if hop.ifindex == packet.ifindex {
        xdp_action::XDP_TX
    } else {
        frame.redirect(hop.ifindex)
    }
}

/// Rewrites a frame; of SCTP [`Wire::rewrite`] leaves the checksum.
#[inline(always)] // the fast path
fn rewrite<F: Maps + Wire, const IS_SCTP: bool>(
    frame: &XdpFrame,
    packet: &Packet<F::Addr>,
    rewrite: &Rewrite<F::Addr>,
) {
    F::rewrite(frame, packet, rewrite);
    if IS_SCTP {
        packet::sctp::update(frame, packet, rewrite);
    }
}

/// Hands the frame to another program; without one in the slot it is the kernel's.
#[inline(always)] // a jump
pub(crate) fn go_on<const FRAGS: bool, const SLOT: u32>(ctx: *mut xdp_md) -> u32 {
    let programs = if FRAGS { &XDP_NEXT_FRAGS } else { &XDP_NEXT };
    maps::go_on::<_, SLOT>(programs, &XdpContext::new(ctx));
    xdp_action::XDP_PASS
}
