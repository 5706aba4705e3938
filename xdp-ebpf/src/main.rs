//! The kernel programs: each turns its context into a frame, asks [`xdp_common::decide`], and applies the verdict.
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod embryonic;
mod maps;
mod packet;
mod socket;
mod sockets;
#[cfg(feature = "trace")]
mod trace;

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    macros::{classifier, map, xdp},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray},
    programs::{TcContext, XdpContext},
};
use xdp_common::{
    answer::AnswerFrame,
    decide::{self, Hook},
    frame::{self, Parsed},
    net::V4,
    tables,
    verdict::{Action, Counter, Event, Verdict},
};

use crate::{
    maps::{Kernel, count},
    packet::{TcFrame, XdpFrame},
};

type AddrV4 = [u8; 4];

#[map]
static ESTABLISHED_V4: HashMap<xdp_common::net::FlowKey<AddrV4>, tables::Flow<AddrV4>> =
    HashMap::with_max_entries(tables::ESTABLISHED_V4.entries, 0);
#[map]
static KNOWN_V4: Array<u64> = Array::with_max_entries(tables::KNOWN_V4.entries, BPF_F_MMAPABLE);
#[map]
static EMBRYONIC_V4: Array<tables::Embryo<AddrV4>> =
    Array::with_max_entries(tables::EMBRYONIC_V4.entries, BPF_F_MMAPABLE);
#[map]
static TAGS_V4: Array<embryonic::Tags> = Array::with_max_entries(tables::TAGS_V4.entries, BPF_F_MMAPABLE);
#[map]
static FRONTENDS_V4: HashMap<tables::FrontendKey<AddrV4>, tables::Frontend> =
    HashMap::with_max_entries(tables::FRONTENDS_V4.entries, 0);
#[map]
static BACKENDS_V4: Array<tables::Backend<AddrV4>> = Array::with_max_entries(tables::BACKENDS_V4.entries, 0);
#[map]
static RINGS: Array<u32> = Array::with_max_entries(tables::RINGS.entries, 0);
#[map]
static NETWORKS_V4: LpmTrie<tables::NetworkKey<AddrV4>, u32> =
    LpmTrie::with_max_entries(tables::NETWORKS_V4.entries, BPF_F_NO_PREALLOC);
#[map]
static AFFINITY_V4: LruHashMap<tables::AffinityKey<AddrV4>, tables::Affinity> =
    LruHashMap::with_max_entries(tables::AFFINITY_V4.entries, 0);
#[map]
static ACCOUNTS: PerCpuArray<tables::Account> = PerCpuArray::with_max_entries(tables::ACCOUNTS.entries, 0);
#[map]
static ANSWERS: PerCpuArray<tables::Answers> = PerCpuArray::with_max_entries(tables::ANSWERS.entries, 0);
#[map]
static DEVICES_V4: HashMap<u32, tables::Device<AddrV4>> =
    HashMap::with_max_entries(tables::DEVICES_V4.entries, 0);
#[map]
static GATE_INGRESS: Array<u64> = Array::with_max_entries(tables::GATE_INGRESS.entries, 0);
#[map]
static GATE_EGRESS: Array<u64> = Array::with_max_entries(tables::GATE_EGRESS.entries, 0);
#[map]
static CONFIG: Array<tables::Config> = Array::with_max_entries(tables::CONFIG.entries, 0);
#[map]
static WORK_V4: PerCpuArray<tables::Work<AddrV4>> = PerCpuArray::with_max_entries(tables::WORK_V4.entries, 0);
#[map]
static HOPS_V4: PerCpuArray<tables::KnownHop<AddrV4>> =
    PerCpuArray::with_max_entries(tables::HOPS_V4.entries, 0);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(tables::COUNTERS.entries, 0);

/// XDP on a managed interface.
#[xdp]
pub(crate) fn xdp_ingress(ctx: XdpContext) -> u32 {
    ingress(&XdpFrame::new(&ctx))
}

/// The same for drivers that hand over long frames in several buffers; the headers are always in the first.
#[xdp(frags)]
pub(crate) fn xdp_ingress_frags(ctx: XdpContext) -> u32 {
    ingress(&XdpFrame::with_frags(&ctx))
}

#[inline(always)] // the two entry points differ in their section only
fn ingress(frame: &XdpFrame) -> u32 {
    let Some(packet) = parse(frame, frame.ifindex()) else { return xdp_action::XDP_PASS };
    let verdict = decide::ingress::<V4, _>(Kernel { ctx: frame.context() }, &packet, Hook::Xdp);
    #[cfg(feature = "trace")]
    trace::verdict(frame.ctx(), "xdp", &packet.key, &verdict);
    match verdict.action {
        Action::Pass => xdp_action::XDP_PASS,
        Action::Drop(_) => xdp_action::XDP_DROP,
        Action::Reject(_) => {
            answer(&packet, |packet, area| frame.answer(packet, area)).unwrap_or(xdp_action::XDP_DROP)
        }
        Action::Stack => {
            frame.rewrite(&packet, &verdict.rewrite);
            xdp_action::XDP_PASS
        }
        Action::Transmit => {
            frame.address(&packet, &verdict.hop);
            frame.rewrite(&packet, &verdict.rewrite);
            xdp_action::XDP_TX
        }
        Action::Redirect => {
            frame.address(&packet, &verdict.hop);
            frame.rewrite(&packet, &verdict.rewrite);
            frame.redirect(verdict.hop.ifindex)
        }
    }
}

/// tc ingress behind XDP: frames whose checksum their sender left to the device.
#[classifier]
pub(crate) fn tc_ingress(ctx: TcContext) -> i32 {
    let frame = TcFrame::new(&ctx);
    let Some(packet) = parse(&frame, frame.ifindex()) else { return TC_ACT_UNSPEC };
    apply(
        &frame,
        "tc ingress",
        &packet,
        decide::ingress::<V4, _>(Kernel { ctx: frame.context() }, &packet, Hook::Tc),
    )
}

/// tc egress: replies of backends on this node, and the second half of slow-path translations.
#[classifier]
pub(crate) fn tc_egress(ctx: TcContext) -> i32 {
    let frame = TcFrame::new(&ctx);
    let Some(packet) = parse(&frame, frame.ifindex()) else { return TC_ACT_UNSPEC };
    apply(&frame, "tc egress", &packet, decide::egress::<V4, _>(Kernel { ctx: frame.context() }, &packet))
}

#[inline(always)] // three lines in two programs
fn apply(frame: &TcFrame, _hook: &str, packet: &frame::Packet<AddrV4>, verdict: Verdict<AddrV4>) -> i32 {
    #[cfg(feature = "trace")]
    trace::verdict(frame.ctx(), _hook, &packet.key, &verdict);
    match verdict.action {
        Action::Pass => TC_ACT_UNSPEC,
        Action::Drop(_) => TC_ACT_SHOT,
        Action::Reject(_) => answer(packet, |packet, area| frame.answer(packet, area)).unwrap_or(TC_ACT_SHOT),
        Action::Stack | Action::Transmit | Action::Redirect => {
            frame.rewrite(packet, &verdict.rewrite);
            TC_ACT_UNSPEC
        }
    }
}

/// Answers a refused packet, if there have not been too many of late.
#[inline(always)] // two callers
fn answer<R>(
    packet: &frame::Packet<AddrV4>,
    send: impl FnOnce(&frame::Packet<AddrV4>, &mut AnswerFrame) -> Option<R>,
) -> Option<R> {
    let sent = maps::answer_area().and_then(|area| send(packet, area));
    let event = if sent.is_some() { Event::Answered } else { Event::Unanswered };
    count(Counter::Event(event));
    sent
}

#[inline(always)] // bounds proofs do not survive a call
fn parse<R: frame::Frame>(frame: &R, ifindex: u32) -> Option<frame::Packet<AddrV4>> {
    match frame::parse_v4(frame, ifindex) {
        Parsed::Packet(packet) => Some(packet),
        Parsed::Other => None,
        Parsed::Fragment => {
            count(Counter::Event(Event::Fragment));
            None
        }
        Parsed::Malformed => {
            count(Counter::Event(Event::Malformed));
            None
        }
    }
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
