//! Programs of the lab and the benches; none of them is part of the product.
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[allow(dead_code, reason = "the tc half of the frame access is the product's")]
mod packet;

use core::arch::asm;

use aya_ebpf::{
    bindings::xdp_action,
    macros::{map, xdp},
    maps::{Array, LruHashMap, PerCpuArray, ProgramArray},
    programs::XdpContext,
};
use xdp_common::{
    frame::{Headers as _, Packet, Parsed},
    net::{Family, FlowKey, Ip6, V4, V6},
    tables::{self, Account, Flow},
};

use crate::packet::{Bytes, Wire, XdpFrame};

/// Bytes of the template that are restored before each run: Ethernet, IPv6 and TCP headers, or the shorter ones of IPv4.
const TEMPLATE_LEN: usize = 76;
/// Length of the frames that the bench gives; what a run has put in front is taken off before the next.
const FRAME_LEN: usize = 80;
/// Parts of eight bytes, the first of which is at this offset.
const EIGHTS: usize = (TEMPLATE_LEN - EIGHTS_AT) / 8;
const EIGHTS_AT: usize = 6;
/// The part of which the second half varies: the last four bytes of the source address.
const SOURCE_V4: usize = (22 - EIGHTS_AT) / 8;
const SOURCE_V6: usize = (30 - EIGHTS_AT) / 8;

/// What [`replay`] sends.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Replay {
    /// Frames sent so far.
    count: u32,
    /// Distinct source addresses minus one: a power of two minus one.
    mask: u32,
    /// First source address, in host order.
    source: u32,
    /// 1 when the headers are those of IPv6.
    is_v6: u32,
    /// Keeps what follows aligned.
    gap: [u8; 2],
    /// The headers, in the parts that they are stored by: whatever a program reads, an address or a port at an odd multiple of two,
    /// lies in one of them. A load that spans two stores waits until both have left the CPU, and nothing that a device has written
    /// makes it wait.
    first: [u8; 2],
    second: [u8; 4],
    eights: [u64; EIGHTS],
    third: [u8; 4],
    last: [u8; 2],
}

#[map]
static REPLAY: Array<Replay> = Array::with_max_entries(1, 0);
#[map]
static TARGET: ProgramArray = ProgramArray::with_max_entries(1, 0);
/// What load balancers keep flows in, with room for as many as the established tables.
type FlowTable<A> = LruHashMap<FlowKey<A>, Flow<A>>;
#[map]
static LIMIT: FlowTable<[u8; 4]> = FlowTable::with_max_entries(tables::ESTABLISHED_V4.entries, 0);
#[map]
static LIMIT_V6: FlowTable<Ip6> = FlowTable::with_max_entries(tables::ESTABLISHED_V6.entries, 0);
/// Where headers are read to; the stack would have to be filled with zeros first.
#[map]
static PLACE: PerCpuArray<Packet<[u8; 4]>> = PerCpuArray::with_max_entries(1, 0);
#[map]
static PLACE_V6: PerCpuArray<Packet<Ip6>> = PerCpuArray::with_max_entries(1, 0);
#[map]
static STATS: PerCpuArray<Account> = PerCpuArray::with_max_entries(tables::ACCOUNTS_V4.entries, 0);

/// Passes everything: what the receiving end of a veth needs to take frames sent by XDP.
#[xdp]
pub(crate) fn xdp_pass(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// Drops everything: the cheapest thing a program can do with a frame.
#[xdp]
pub(crate) fn xdp_drop(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_DROP
}

/// Restores the template with the next source address, in a scattered order, and calls the program under test.
#[xdp]
pub(crate) fn replay(ctx: XdpContext) -> u32 {
    let Some(replay) = REPLAY.get_ptr_mut(0) else { return xdp_action::XDP_ABORTED };
    let frame = XdpFrame::new(ctx.ctx, false);
    let surplus = ctx.data_end() - ctx.data() - FRAME_LEN;
    if surplus > 0 && !frame.move_head(surplus as i32) {
        return xdp_action::XDP_ABORTED;
    }
    let start = ctx.data();
    let Some(bytes) = Bytes::<TEMPLATE_LEN>::within(start, ctx.data_end(), 0) else {
        return xdp_action::XDP_ABORTED;
    };
    // SAFETY: the one slot of an array; the bench runs on one CPU at a time.
    let replay = unsafe { &mut *replay };
    replay.count = replay.count.wrapping_add(1);
    // An odd factor visits every value below a power of two once.
    let index = replay.count.wrapping_mul(0x9e37_79b1) & replay.mask;
    let source = (replay.source + index).to_be();
    bytes.set_pair(0, replay.first);
    bytes.set_quad(2, replay.second);
    for (part, eight) in replay.eights.iter().enumerate() {
        let varies = if replay.is_v6 == 0 { part == SOURCE_V4 } else { part == SOURCE_V6 };
        let eight = if varies { *eight & 0xffff_ffff | (source as u64) << 32 } else { *eight };
        // SAFETY: `bytes` are those from here on, and the last of these parts ends before their end.
        unsafe { store(start + EIGHTS_AT + 8 * part, eight) }
    }
    bytes.set_quad(EIGHTS_AT + 8 * EIGHTS, replay.third);
    bytes.set_pair(TEMPLATE_LEN - 2, replay.last);
    // SAFETY: a tail call; what follows runs only when the slot is empty.
    unsafe { TARGET.tail_call(&ctx, 0) };
    xdp_action::XDP_ABORTED
}

/// Stores eight bytes of a frame at once, which the compiler would store one by one.
///
/// # Safety
///
/// They have been proven to lie within the frame.
#[inline(always)] // one instruction
unsafe fn store(at: usize, value: u64) {
    // SAFETY: as the caller says.
    unsafe { asm!("*(u64 *)({at} + 0) = {value}", at = in(reg) at, value = in(reg) value) }
}

/// The least that a translated packet can cost with a flow table of the kernel: parse, one lookup, rewrite, statistics, transmit.
#[xdp]
pub(crate) fn limit(ctx: XdpContext) -> u32 {
    translated::<V4>(&ctx, &LIMIT, &PLACE)
}

/// The same for IPv6: what the kernel's hash of the longer key costs, nobody saves.
#[xdp]
pub(crate) fn limit_v6(ctx: XdpContext) -> u32 {
    translated::<V6>(&ctx, &LIMIT_V6, &PLACE_V6)
}

#[inline(always)] // the whole of a program
fn translated<F: Wire>(
    ctx: &XdpContext,
    table: &'static FlowTable<F::Addr>,
    place: &'static PerCpuArray<Packet<F::Addr>>,
) -> u32 {
    let frame = XdpFrame::new(ctx.ctx, false);
    let Some((packet, flow)) = looked_up::<F>(&frame, table, place) else { return xdp_action::XDP_ABORTED };
    let (translation, hop) = packet::parts(flow);
    F::address(&frame, packet, hop);
    F::rewrite(&frame, packet, translation);
    counted(flow.service, packet.total_len)
}

/// The least that a packet can cost which is sent on in another one: the same with room in front and a header there.
#[xdp]
pub(crate) fn limit_tunnel(ctx: XdpContext) -> u32 {
    let frame = XdpFrame::new(ctx.ctx, false);
    let Some((packet, flow)) = looked_up::<V4>(&frame, &LIMIT, &PLACE) else {
        return xdp_action::XDP_ABORTED;
    };
    let (_, hop) = packet::parts(flow);
    if !V4::tunnel(&frame, packet, hop, flow.src, flow.dst) {
        return xdp_action::XDP_ABORTED;
    }
    counted(flow.service, packet.total_len)
}

/// A packet and its flow.
type Known<F> = (&'static Packet<<F as Family>::Addr>, &'static Flow<<F as Family>::Addr>);

/// Reads the headers of a frame, and looks for its flow.
#[inline(always)] // bounds proofs do not survive a call
fn looked_up<F: Wire>(
    frame: &XdpFrame,
    table: &'static FlowTable<F::Addr>,
    place: &'static PerCpuArray<Packet<F::Addr>>,
) -> Option<Known<F>> {
    // SAFETY: the slot belongs to this CPU.
    let packet = unsafe { &mut *place.get_ptr_mut(0)? };
    if F::parse_to(frame, 0, packet) != Parsed::Packet(()) {
        return None;
    }
    let packet = &*packet;
    let key = &packet.key;
    // SAFETY: nothing is removed from the table while the bench runs.
    Some((packet, unsafe { table.get(key) }?))
}

/// Counts a packet that is sent, and its bytes, for its Service.
#[inline(always)] // array increments
fn counted(service: u32, bytes: u16) -> u32 {
    if let Some(stats) = STATS.get_ptr_mut(service) {
        // SAFETY: the slot belongs to this CPU.
        unsafe {
            (*stats).packets += 1;
            (*stats).bytes += bytes as u64;
        }
    }
    xdp_action::XDP_TX
}

/// Makes room in front of a frame and drops it: with what `replay` does then, twice the cost of that.
#[xdp]
pub(crate) fn move_head(ctx: XdpContext) -> u32 {
    if XdpFrame::new(ctx.ctx, false).move_head(-(V4::LEN as i32)) {
        xdp_action::XDP_DROP
    } else {
        xdp_action::XDP_ABORTED
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
