//! The kernel programs: each turns its context into a frame, asks [`xdp_common::decide`], and does what it says.
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod atomic;
mod embryonic;
mod established;
mod family;
mod fragments;
mod icmp;
mod maps;
mod node;
mod packet;
mod routes;
mod sctp;
mod skb;
mod socket;
mod sockets;
mod tcp_sockets;
#[cfg(feature = "trace")]
mod trace;
mod tunnel;
mod xdp;

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::{classifier, map},
    maps::{Array, PerCpuArray, RingBuf},
    programs::TcContext,
};
use xdp_common::{
    answer::AnswerFrame,
    decide::{self, Hook},
    fragment::{Hold, Side, Step},
    frame,
    icmp::Icmp,
    net::{Family, V4, V6},
    tables,
    verdict::{Action, Counter, Event, Reason, Rewrite, Verdict},
};

use crate::{
    family::{Found, Maps},
    fragments::fragment,
    maps::{Kernel, count, place},
    packet::Wire,
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
#[map]
static READERS: Array<tables::Reader> = Array::with_max_entries(tables::READERS.entries, 0);

/// For the agent, which has no other place to note things.
#[map]
static RESERVED_PORTS: Array<u64> = Array::with_max_entries(tables::RESERVED_PORTS.entries, 0);

/// tc ingress behind XDP: frames whose checksum their sender left to the device, and fragments.
#[classifier]
pub(crate) fn tc_ingress(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    // What a VLAN carries is for the device of the VLAN, as at XDP, where the tag is still in the frame.
    if TcFrame::of(skb).is_tagged() {
        return TC_ACT_UNSPEC;
    }
    match TcFrame::of(skb).ethertype() {
        V4::ETHERTYPE if is_icmp::<V4>(skb) => icmp::tc_ingress::<V4>(skb),
        V4::ETHERTYPE => tc_ingress_of::<V4>(skb),
        V6::ETHERTYPE if is_icmp::<V6>(skb) => icmp::tc_ingress::<V6>(skb),
        V6::ETHERTYPE => tc_ingress_of::<V6>(skb),
        _ => TC_ACT_UNSPEC,
    }
}

/// Whether a frame is one of the few that hold ICMP, which has too little of the stack left behind the path of TCP and UDP.
#[inline(always)] // two comparisons, and a pull that the path of TCP and UDP finds done
fn is_icmp<F: Icmp + Wire>(skb: *mut __sk_buff) -> bool {
    xdp_common::icmp::is_plain::<F, _>(&TcFrame::new::<F>(skb))
}

#[inline(never)] // each family has the stack of 512 bytes to itself
fn tc_ingress_of<F: Maps + Wire + Icmp>(skb: *mut __sk_buff) -> i32 {
    let frame = &TcFrame::new::<F>(skb);
    let Some(packet) = place::<F>() else { return TC_ACT_UNSPEC };
    let hook = match F::parse_into(frame, frame.ifindex(), packet) {
        Found::Nothing if !sctp::at_tc::<F>(skb) => return TC_ACT_UNSPEC,
        Found::Packet | Found::Nothing if frame.has_tag() => Hook::Fragment,
        Found::Packet | Found::Nothing => Hook::Tc,
        Found::Fragment => match fragment::<F>(skb, Side::Ingress) {
            Step::Pass => return TC_ACT_UNSPEC,
            Step::Hold => return fragments::hold(skb),
            Step::Decide => Hook::Fragment,
            Step::Tell => {
                fragments::tell(skb);
                Hook::Fragment
            }
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

#[inline(never)] // as above
fn tc_egress_of<F: Maps + Wire + Icmp>(skb: *mut __sk_buff) -> i32 {
    let frame = &TcFrame::new::<F>(skb);
    let Some(packet) = place::<F>() else { return TC_ACT_UNSPEC };
    match F::parse_into(frame, frame.ifindex(), packet) {
        Found::Nothing if !sctp::at_tc::<F>(skb) => return icmp::tc_egress::<F>(skb),
        Found::Packet | Found::Nothing => {}
        Found::Fragment => match fragment::<F>(skb, Side::Egress) {
            Step::Pass | Step::Hold => return TC_ACT_UNSPEC,
            Step::Decide | Step::Tell => {}
        },
    }
    let verdict = decide::egress::<F, _>(Kernel::new(frame.context()), packet);
    apply::<F>(skb, "tc egress", packet, &verdict)
}

/// Does with a frame what has been decided.
///
/// The branches are here, where the verdict is on the program's own stack. A function that is given it by reference must not
/// branch by what is in there: verifiers before 6.8 do not know then that the value matters, take one that they have not
/// followed for one that they have, and cut the other branches off.
#[inline(always)] // as said
fn apply<F: Maps + Wire>(
    skb: *mut __sk_buff,
    _hook: &str,
    packet: &frame::Packet<F::Addr>,
    verdict: &Verdict<F::Addr>,
) -> i32 {
    #[cfg(feature = "trace")]
    trace::verdict::<F, _>(TcFrame::of(skb).ctx(), _hook, &packet.key, verdict);
    match verdict.action {
        Action::Pass => TC_ACT_UNSPEC,
        Action::Drop(_) => TC_ACT_SHOT,
        Action::Reject(Reason::TunnelMtu | Reason::TunnelHops) => too_big::<F>(skb, packet, verdict.mtu),
        Action::Reject(_) => refused::<F>(skb, packet, Turn::Out),
        Action::Tunnel => tunnelled::<F>(skb, packet, verdict),
        Action::Stack | Action::Transmit | Action::Redirect => {
            rewritten::<F>(skb, packet, &verdict.rewrite);
            TC_ACT_UNSPEC
        }
    }
}

#[inline(never)] // a frame of its own on a stack of 512 bytes
fn too_big<F: Maps + Wire>(skb: *mut __sk_buff, packet: &frame::Packet<F::Addr>, mtu: u16) -> i32 {
    let frame = &TcFrame::of(skb);
    answer(|area| F::too_big(frame, packet, mtu, area).then(|| frame.redirect(Turn::Out)))
        .unwrap_or(TC_ACT_SHOT)
}

#[inline(never)] // as above
fn refused<F: Maps + Wire>(skb: *mut __sk_buff, packet: &frame::Packet<F::Addr>, way: Turn) -> i32 {
    let frame = &TcFrame::of(skb);
    answer(|area| frame.answer::<F>(packet, area, way)).unwrap_or(TC_ACT_SHOT)
}

#[inline(never)] // as above
fn tunnelled<F: Maps + Wire>(
    skb: *mut __sk_buff,
    packet: &frame::Packet<F::Addr>,
    verdict: &Verdict<F::Addr>,
) -> i32 {
    TcFrame::of(skb).tunnel::<F>(packet, verdict)
}

#[inline(never)] // as above
fn rewritten<F: Maps + Wire>(
    skb: *mut __sk_buff,
    packet: &frame::Packet<F::Addr>,
    rewrite: &Rewrite<F::Addr>,
) {
    TcFrame::of(skb).rewrite::<F>(packet, rewrite);
}

/// Answers a refused packet, if there have not been too many of late.
#[inline(always)] // what it is given writes the frame, whose bounds are proven there
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
