//! The kernel programs: each turns its context into a frame, asks [`xdp_common::decide`], and applies the verdict.
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod embryonic;
mod family;
mod fragments;
mod icmp;
mod maps;
mod node;
mod packet;
mod sctp;
mod skb;
mod socket;
mod sockets;
#[cfg(feature = "trace")]
mod trace;

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action, xdp_md},
    macros::{classifier, map, xdp},
    maps::{Array, PerCpuArray, RingBuf},
    programs::{TcContext, XdpContext},
};
use xdp_common::{
    answer::AnswerFrame,
    decide::{self, Hook},
    fragment::{Hold, Side, Step},
    frame,
    icmp::Icmp,
    net::{Family, V4, V6},
    tables,
    verdict::{Action, Counter, Event, Rewrite, Verdict},
};

use crate::{
    family::{Found, Maps},
    fragments::fragment,
    maps::{Kernel, count, parse, place},
    packet::{Wire, XdpFrame},
    skb::{TcFrame, Turn},
};

#[map]
static ANSWERS: PerCpuArray<tables::Answers> = PerCpuArray::with_max_entries(tables::ANSWERS.entries, 0);
#[map]
static CONFIG: Array<tables::Config> = Array::with_max_entries(tables::CONFIG.entries, 0);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(tables::COUNTERS.entries, 0);
#[map]
static HELD: RingBuf = RingBuf::with_byte_size(tables::HELD.entries, 0);
#[map]
static HOLDS: PerCpuArray<Hold> = PerCpuArray::with_max_entries(tables::HOLDS.entries, 0);

/// For the agent, which has no other place to note things.
#[map]
static RESERVED_PORTS: Array<u64> = Array::with_max_entries(tables::RESERVED_PORTS.entries, 0);

/// XDP on a managed interface.
#[xdp]
pub(crate) fn xdp_ingress(ctx: XdpContext) -> u32 {
    xdp::<false>(ctx.ctx)
}

/// The same for drivers that hand over long frames in several buffers; the headers are always in the first.
#[xdp(frags)]
pub(crate) fn xdp_ingress_frags(ctx: XdpContext) -> u32 {
    xdp::<true>(ctx.ctx)
}

#[inline(always)] // the two entry points differ in their section only
fn xdp<const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    // What is no TCP or UDP goes on beside their functions, not below: those need the whole stack.
    match frame::ethertype(&XdpFrame::new(ctx, FRAGS)) {
        V4::ETHERTYPE => match xdp_of::<V4, FRAGS>(ctx) {
            OTHER => others::<V4, FRAGS>(ctx),
            action => action,
        },
        V6::ETHERTYPE => match xdp_of::<V6, FRAGS>(ctx) {
            OTHER => others::<V6, FRAGS>(ctx),
            action => action,
        },
        _ => xdp_action::XDP_PASS,
    }
}

/// No action of the kernel's: the frame holds neither TCP nor UDP that can be read.
const OTHER: u32 = u32::MAX;

/// What is neither TCP nor UDP.
#[inline(always)] // a level of calls less
fn others<F: Maps + Wire + Icmp, const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    match sctp::xdp::<F, FRAGS>(ctx) {
        OTHER => icmp::xdp::<F, FRAGS>(ctx),
        action => action,
    }
}

#[inline(never)] // each family has the stack of 512 bytes to itself
fn xdp_of<F: Maps + Wire, const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    let frame = &XdpFrame::new(ctx, FRAGS);
    match parse::<F, _>(frame, frame.ifindex()) {
        Some(packet) => decided::<F, FRAGS, false>(frame, packet),
        None => OTHER,
    }
}

/// Asks for the decision on a packet, and does what it says.
#[inline(always)] // the fast path
fn decided<F: Maps + Wire, const FRAGS: bool, const IS_SCTP: bool>(
    frame: &XdpFrame,
    packet: &frame::Packet<F::Addr>,
) -> u32 {
    let verdict = decide::ingress::<F, _>(Kernel::new(frame.context()), packet, Hook::Xdp);
    #[cfg(feature = "trace")]
    trace::verdict::<F, _>(frame.ctx(), "xdp", &packet.key, &verdict);
    match verdict.action {
        Action::Pass => xdp_action::XDP_PASS,
        Action::Drop(_) => xdp_action::XDP_DROP,
        Action::Reject(_) if IS_SCTP => sctp::abort::<F, FRAGS>(frame.context().cast()),
        Action::Reject(_) => answer(|area| frame.answer::<F>(packet, area)).unwrap_or(xdp_action::XDP_DROP),
        Action::Stack => {
            rewrite::<F, IS_SCTP>(frame, packet, &verdict.rewrite);
            xdp_action::XDP_PASS
        }
        Action::Transmit => {
            F::address(frame, packet, &verdict.hop);
            rewrite::<F, IS_SCTP>(frame, packet, &verdict.rewrite);
            xdp_action::XDP_TX
        }
        Action::Redirect => {
            F::address(frame, packet, &verdict.hop);
            rewrite::<F, IS_SCTP>(frame, packet, &verdict.rewrite);
            frame.redirect(verdict.hop.ifindex)
        }
    }
}

/// Rewrites a frame; of SCTP [`Wire::rewrite`] leaves the checksum.
#[inline(always)] // the fast path
fn rewrite<F: Maps + Wire, const IS_SCTP: bool>(
    frame: &XdpFrame,
    packet: &frame::Packet<F::Addr>,
    rewrite: &Rewrite<F::Addr>,
) {
    F::rewrite(frame, packet, rewrite);
    if IS_SCTP {
        packet::sctp::update(frame, packet, rewrite);
    }
}

/// tc ingress behind XDP: frames whose checksum their sender left to the device, and fragments.
#[classifier]
pub(crate) fn tc_ingress(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    // What a VLAN carries is for the device of the VLAN, as at XDP, where the tag is still in the frame.
    if TcFrame::of(skb).is_tagged() {
        return TC_ACT_UNSPEC;
    }
    match TcFrame::of(skb).ethertype() {
        V4::ETHERTYPE => tc_ingress_of::<V4>(skb),
        V6::ETHERTYPE => tc_ingress_of::<V6>(skb),
        _ => TC_ACT_UNSPEC,
    }
}

#[inline(never)] // as for XDP
fn tc_ingress_of<F: Maps + Wire + Icmp>(skb: *mut __sk_buff) -> i32 {
    let frame = &TcFrame::new::<F>(skb);
    let Some(packet) = place::<F>() else { return TC_ACT_UNSPEC };
    let hook = match F::parse_into(frame, frame.ifindex(), packet) {
        Found::Nothing if !sctp::at_tc::<F>(skb) => return TC_ACT_UNSPEC,
        Found::Packet | Found::Nothing => Hook::Tc,
        Found::Fragment => match fragment::<F>(skb, Side::Ingress) {
            Step::Pass => return TC_ACT_UNSPEC,
            Step::Hold => return fragments::hold(skb),
            Step::Decide => Hook::Fragment,
        },
    };
    let verdict = decide::ingress::<F, _>(Kernel::new(frame.context()), packet, hook);
    apply::<F>(skb, "tc ingress", packet, &verdict)
}

/// tc egress: replies of backends on this node, and the second half of slow-path translations.
#[classifier]
pub(crate) fn tc_egress(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    match TcFrame::of(skb).ethertype() {
        V4::ETHERTYPE => tc_egress_of::<V4>(skb),
        V6::ETHERTYPE => tc_egress_of::<V6>(skb),
        _ => TC_ACT_UNSPEC,
    }
}

#[inline(never)] // as for XDP
fn tc_egress_of<F: Maps + Wire + Icmp>(skb: *mut __sk_buff) -> i32 {
    let frame = &TcFrame::new::<F>(skb);
    let Some(packet) = place::<F>() else { return TC_ACT_UNSPEC };
    match F::parse_into(frame, frame.ifindex(), packet) {
        Found::Nothing if !sctp::at_tc::<F>(skb) => return icmp::tc_egress::<F>(skb),
        Found::Packet | Found::Nothing => {}
        Found::Fragment => match fragment::<F>(skb, Side::Egress) {
            Step::Pass | Step::Hold => return TC_ACT_UNSPEC,
            Step::Decide => {}
        },
    }
    let verdict = decide::egress::<F, _>(Kernel::new(frame.context()), packet);
    apply::<F>(skb, "tc egress", packet, &verdict)
}

#[inline(never)] // a frame of its own on a stack of 512 bytes
fn apply<F: Maps + Wire>(
    skb: *mut __sk_buff,
    _hook: &str,
    packet: &frame::Packet<F::Addr>,
    verdict: &Verdict<F::Addr>,
) -> i32 {
    let frame = &TcFrame::of(skb);
    #[cfg(feature = "trace")]
    trace::verdict::<F, _>(frame.ctx(), _hook, &packet.key, verdict);
    match verdict.action {
        Action::Pass => TC_ACT_UNSPEC,
        Action::Drop(_) => TC_ACT_SHOT,
        Action::Reject(_) => answer(|area| frame.answer::<F>(packet, area, Turn::Out)).unwrap_or(TC_ACT_SHOT),
        Action::Stack | Action::Transmit | Action::Redirect => {
            frame.rewrite::<F>(packet, &verdict.rewrite);
            TC_ACT_UNSPEC
        }
    }
}

/// Answers a refused packet, if there have not been too many of late.
#[inline(always)] // two callers
fn answer<R>(send: impl FnOnce(&mut AnswerFrame) -> Option<R>) -> Option<R> {
    let sent = maps::answer_area().and_then(send);
    let event = if sent.is_some() { Event::Answered } else { Event::Unanswered };
    count(Counter::Event(event));
    sent
}

// Checked on the host, by clippy and editors, the crate takes its panic handler from std.
#[cfg(not(target_arch = "bpf"))]
extern crate std;

/// The verifier proves that nothing panics; the language still wants a handler.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// The kernel checks that programs calling some helpers are under a compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
