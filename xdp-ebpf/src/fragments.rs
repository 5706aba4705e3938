//! Fragments at tc: what is known of them, and those that come before it is.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use xdp_common::{
    fragment::{self, FragmentKey, Side, Step},
    verdict::{Counter, Event},
};

use crate::{
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
    maps::hold_area().is_some_and(|area| {
        area.ifindex = ifindex;
        TcFrame::of(skb).copy_to(&mut area.frame).is_some_and(|len| maps::hold(area, len))
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
