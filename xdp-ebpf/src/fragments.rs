//! Fragments at tc: what is known of them, and those that come before it is.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_INGRESS, BPF_RB_AVAIL_DATA, BPF_RB_CONS_POS, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers,
    macros::classifier,
    programs::TcContext,
};
use xdp_common::{
    fragment::{self, FragmentKey, Hold, Side, Step},
    tables,
    verdict::{Counter, Event},
};

use crate::{
    HELD, HOLDS, READERS,
    family::Maps,
    maps::{self, Kernel, count},
    packet::Wire,
    skb::TcFrame,
};

/// Reads a fragment into the place of the packet at hand, and says what is to be done with it.
#[inline(never)] // a frame of its own beside the decision's, on a stack of 512 bytes
pub(crate) fn fragment<F: Maps + Wire>(skb: *mut __sk_buff, side: Side) -> Step {
    let frame = &TcFrame::of(skb);
    let Some(packet) = maps::place::<F>() else { return Step::Pass };
    let mut key = FragmentKey::ZERO;
    if !F::parse_fragment(frame, frame.ifindex(), packet, &mut key) {
        return Step::Pass;
    }
    fragment::step::<F, _>(Kernel::new(frame.context()), packet, &key, side)
}

/// Keeps a fragment until its first has come, or leaves it alone where that is impossible.
#[inline(never)] // rare, and of both families
pub(crate) fn hold(skb: *mut __sk_buff) -> i32 {
    let is_held = hand_over(skb, TcFrame::of(skb).ifindex());
    count(Counter::Event(if is_held { Event::FragmentHeld } else { Event::FragmentLost }));
    if is_held { TC_ACT_SHOT } else { TC_ACT_UNSPEC }
}

/// Tells the agent that a first fragment has come which others wait for. Those go back without that word too, only later.
#[inline(never)] // as above
pub(crate) fn tell(skb: *mut __sk_buff) {
    hand_over(skb, 0);
}

#[inline(always)] // two callers
fn hand_over(skb: *mut __sk_buff, ifindex: u32) -> bool {
    hold_area().is_some_and(|area| {
        area.ifindex = ifindex;
        TcFrame::of(skb).copy_to(&mut area.frame).is_some_and(|len| give(area, len))
    })
}

/// Gives a fragment back that was kept. The agent runs it on the frame; it is attached nowhere.
#[classifier]
pub(crate) fn tc_release(ctx: TcContext) -> i32 {
    let ifindex = TcFrame::of(ctx.skb.skb).ifindex();
    match ctx.clone_redirect(ifindex, BPF_F_INGRESS as u64) {
        Ok(()) => 0,
        Err(error) => error as i32,
    }
}

/// Where a fragment is made ready for the agent.
#[inline(always)] // a lookup
fn hold_area() -> Option<&'static mut Hold> {
    let area = HOLDS.get_ptr_mut(0)?;
    // SAFETY: the slot belongs to this CPU, and programs do not interrupt each other on it.
    Some(unsafe { &mut *area })
}

/// Gives a fragment to the agent, up to the end of its frame; false when the ring is full, or nobody reads it.
#[inline(always)] // one caller
fn give(area: &Hold, len: usize) -> bool {
    if !is_read() {
        return false;
    }
    // SAFETY: callers give no more than the frame has room for; the bytes are all valid.
    let bytes = unsafe { core::slice::from_raw_parts((&raw const *area).cast::<u8>(), HOLD_HEAD + len) };
    HELD.output::<[u8]>(bytes, 0).is_ok()
}

/// Whether an agent takes what is held: what waits for one that has ended would be lost, the node's own traffic too.
#[inline(always)] // as above
fn is_read() -> bool {
    let Some(slot) = READERS.get_ptr_mut(0) else { return false };
    // SAFETY: a value of the map. CPUs that write at once tell it much the same, and the next look sets it right.
    let reader = unsafe { &mut *slot };
    // SAFETY: the helper takes nothing.
    let now = unsafe { helpers::bpf_ktime_get_ns() };
    let (position, waiting) = (HELD.query(BPF_RB_CONS_POS as u64), HELD.query(BPF_RB_AVAIL_DATA as u64));
    if waiting == 0 || position != reader.position {
        (reader.position, reader.since) = (position, now);
    }
    // Another CPU may have written since this one has asked for the time.
    now.saturating_sub(reader.since) < tables::READ_WITHIN_NS
}

const HOLD_HEAD: usize = core::mem::offset_of!(Hold, frame);
