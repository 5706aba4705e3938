//! tc programs for those on this node whom no socket hook serves: pods, by their devices, and processes of the node, on
//! their way out of it.

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use xdp_common::{
    decide::{self, Hook},
    fragment::{Side, Step},
    frame::Packet,
    icmp::Icmp,
    net::{Family, V4, V6},
    tables::{Route, Tables},
    verdict::{Action, Verdict},
};

use crate::{
    apply,
    family::{Found, Maps},
    fragments::fragment,
    icmp,
    maps::{Kernel, parse, parsed, place},
    packet::Wire,
    refused, sctp,
    skb::{TcFrame, Turn},
};

/// tc ingress of a pod's device: what the pod sends. Answers to it are restored by `tc_egress` there.
#[classifier]
pub(crate) fn tc_pod(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    match TcFrame::of(skb).ethertype() {
        V4::ETHERTYPE => tc_pod_of::<V4>(skb),
        V6::ETHERTYPE => tc_pod_of::<V6>(skb),
        _ => TC_ACT_UNSPEC,
    }
}

#[inline(never)] // each family has the stack of 512 bytes to itself
fn tc_pod_of<F: Maps + Wire + Icmp>(skb: *mut __sk_buff) -> i32 {
    let frame = &TcFrame::new::<F>(skb);
    let found = parse::<F, _>(frame, frame.ifindex());
    let sctp = || if sctp::at_tc::<F>(skb) { parsed::<F>() } else { None };
    let Some(packet) = found.or_else(sctp) else { return TC_ACT_UNSPEC };
    let verdict = decide::ingress::<F, _>(Kernel::new(frame.context()), packet, Hook::Pod);
    match verdict.action {
        Action::Transmit => turned::<F>(skb, packet, &verdict, Turn::Out),
        Action::Pass
        | Action::Drop(_)
        | Action::Reject(_)
        | Action::Stack
        | Action::Redirect
        | Action::Tunnel => apply::<F>(skb, "tc pod", packet, &verdict),
    }
}

/// tc egress where processes of this node are served without socket hooks: all that `tc_egress` does, and what they send
/// to Services.
#[classifier]
pub(crate) fn tc_host(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    match TcFrame::of(skb).ethertype() {
        V4::ETHERTYPE => tc_host_of::<V4>(skb),
        V6::ETHERTYPE => tc_host_of::<V6>(skb),
        _ => TC_ACT_UNSPEC,
    }
}

#[inline(always)] // a level of calls less: each would take its part of the stack that they share
fn tc_host_of<F: Maps + Wire + Icmp>(skb: *mut __sk_buff) -> i32 {
    let is_whole = match read::<F>(skb) {
        Found::Nothing if !sctp::at_tc::<F>(skb) => return icmp::tc_egress::<F>(skb),
        Found::Packet | Found::Nothing => true,
        Found::Fragment => match fragment::<F>(skb, Side::Egress) {
            Step::Pass | Step::Hold => return TC_ACT_UNSPEC,
            Step::Decide | Step::Tell => false,
        },
    };
    match restored::<F>(skb) {
        // Egress cannot hold fragments, so that the node's own to Services are not served.
        NOT_OURS if is_whole && TcFrame::of(skb).is_own() => sent::<F>(skb),
        NOT_OURS => TC_ACT_UNSPEC,
        action => action,
    }
}

/// No action of tc.
const NOT_OURS: i32 = i32::MIN;

#[inline(never)] // a frame of its own on a stack of 512 bytes
fn read<F: Maps + Wire>(skb: *mut __sk_buff) -> Found {
    let frame = &TcFrame::new::<F>(skb);
    let Some(packet) = place::<F>() else { return Found::Nothing };
    F::parse_into(frame, frame.ifindex(), packet)
}

#[inline(never)] // as above
fn restored<F: Maps + Wire>(skb: *mut __sk_buff) -> i32 {
    let Some(packet) = parsed::<F>() else { return NOT_OURS };
    let verdict = decide::egress::<F, _>(Kernel::new(skb.cast()), packet);
    match verdict.action {
        Action::Pass => NOT_OURS,
        Action::Transmit => turned::<F>(skb, packet, &verdict, Turn::In),
        Action::Drop(_) | Action::Reject(_) | Action::Stack | Action::Redirect | Action::Tunnel => {
            apply::<F>(skb, "tc host", packet, &verdict)
        }
    }
}

#[inline(never)] // as above
fn sent<F: Maps + Wire>(skb: *mut __sk_buff) -> i32 {
    let Some(packet) = parsed::<F>() else { return TC_ACT_UNSPEC };
    let verdict = decide::ingress::<F, _>(Kernel::new(skb.cast()), packet, Hook::Out);
    match verdict.action {
        Action::Transmit => turned::<F>(skb, packet, &verdict, Turn::In),
        Action::Redirect => sent_elsewhere::<F>(skb, packet, &verdict),
        Action::Reject(_) => refused::<F>(skb, packet, Turn::In),
        Action::Pass | Action::Drop(_) | Action::Stack | Action::Tunnel => {
            apply::<F>(skb, "tc host", packet, &verdict)
        }
    }
}

/// Rewrites a frame and sends it back to where it comes from.
#[inline(never)] // as above
fn turned<F: Maps + Wire>(
    skb: *mut __sk_buff,
    packet: &Packet<F::Addr>,
    verdict: &Verdict<F::Addr>,
    way: Turn,
) -> i32 {
    let frame = &TcFrame::of(skb);
    frame.rewrite::<F>(packet, &verdict.rewrite);
    let ctx = TcContext::new(skb);
    let Ok([a, b, c, d, e, f, g, h, i, j, k, l]) = ctx.load::<[u8; 12]>(0) else { return TC_ACT_SHOT };
    // Addresses of the link change places; a frame that was parsed has them.
    let _ = ctx.store(0, &[g, h, i, j, k, l, a, b, c, d, e, f], 0);
    frame.redirect(way)
}

/// Rewrites a frame and lets it leave by the way to its backend, which need not be the way to the Service.
#[inline(never)] // as above
fn sent_elsewhere<F: Maps + Wire>(
    skb: *mut __sk_buff,
    packet: &Packet<F::Addr>,
    verdict: &Verdict<F::Addr>,
) -> i32 {
    let frame = &TcFrame::of(skb);
    let Verdict { rewrite, .. } = verdict;
    frame.rewrite::<F>(packet, rewrite);
    let tables: Kernel<F> = Kernel::new(frame.context());
    match tables.route(frame.ifindex(), rewrite.src, rewrite.dst, packet.tos, packet.key.proto) {
        Route::Hop { ifindex, .. } | Route::NoNeighbour { ifindex } => frame.leave_by(ifindex),
        Route::Local | Route::Kernel => TC_ACT_UNSPEC,
    }
}
