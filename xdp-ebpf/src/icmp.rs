//! ICMP at the hooks: functions of their own beside the path of TCP and UDP, which ends before them.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action, xdp_md};
use xdp_common::{
    decide::{Hook, related},
    frame::{Frame, Packet},
    icmp::{self, Found, Icmp, Patch},
    verdict::{Action, Counter, Event, Reason},
};

use crate::{
    family::Maps,
    maps::{self, Kernel, count, may_echo},
    packet::{Wire, XdpFrame},
    skb::TcFrame,
    xdp::{OTHER, tunnel},
};

/// A frame at XDP that is neither TCP nor UDP.
#[inline(never)] // a frame of its own on a stack of 512 bytes
pub(crate) fn xdp<F: Maps + Wire + Icmp, const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    let frame = &XdpFrame::new(ctx, FRAGS);
    let Some((message, translation)) = maps::message::<F>() else { return xdp_action::XDP_PASS };
    let tables = Kernel::<F>::new(frame.context());
    match icmp::parse::<F, _>(frame, frame.ifindex(), message) {
        Found::Other if icmp::addressed::<F, _>(frame, frame.ifindex(), message) => {
            unserved(tables, &message.packet)
        }
        Found::Other => xdp_action::XDP_PASS,
        // For the program of tunnels, which has a stack of its own.
        Found::Around => OTHER,
        Found::Echo => {
            if !related::echoes(tables, &message.packet) {
                return unserved(tables, &message.packet);
            }
            if !may_echo() {
                count(Counter::Drop(Reason::EchoLimit));
                return xdp_action::XDP_DROP;
            }
            icmp::reply::<F, _>(frame, message);
            count(Counter::Event(Event::EchoAnswered));
            xdp_action::XDP_TX
        }
        Found::Error => {
            let action = related::ingress(tables, message, Hook::Xdp, translation);
            if let Action::Drop(_) = action {
                return xdp_action::XDP_DROP;
            }
            if action == Action::Pass {
                return xdp_action::XDP_PASS;
            }
            // What goes on through a tunnel is translated at its other end.
            if action != Action::Tunnel {
                icmp::translate::<F, _>(frame, message, translation);
            }
            match action {
                Action::Transmit => {
                    F::address(frame, &message.packet, &translation.hop);
                    xdp_action::XDP_TX
                }
                Action::Redirect => {
                    F::address(frame, &message.packet, &translation.hop);
                    frame.redirect(translation.hop.ifindex)
                }
                Action::Tunnel => tunnel::<F>(
                    frame,
                    &message.packet,
                    &translation.hop,
                    translation.quote.src,
                    translation.quote.dst,
                ),
                Action::Pass | Action::Stack | Action::Drop(_) | Action::Reject(_) => xdp_action::XDP_PASS,
            }
        }
    }
}

/// A packet that no service takes.
#[inline(always)] // the rest of a program
fn unserved<F: Maps>(tables: Kernel<F>, packet: &Packet<F::Addr>) -> u32 {
    let Some(reason) = related::unserved(tables, packet) else { return xdp_action::XDP_PASS };
    count(Counter::Drop(reason));
    xdp_action::XDP_DROP
}

/// A frame with ICMP at tc ingress.
#[inline(never)] // as above
pub(crate) fn tc_ingress<F: Maps + Wire + Icmp>(skb: *mut __sk_buff) -> i32 {
    let frame = &TcFrame::pulled(skb, icmp::REACH);
    let Some((message, translation)) = maps::message::<F>() else { return TC_ACT_UNSPEC };
    if icmp::parse::<F, _>(frame, frame.ifindex(), message) != Found::Error {
        return TC_ACT_UNSPEC;
    }
    let tables = Kernel::<F>::new(frame.context());
    // A tag that gives a priority alone: XDP has not read it.
    let hook = if frame.has_tag() { Hook::Fragment } else { Hook::Tc };
    let action = related::ingress(tables, message, hook, translation);
    match action {
        Action::Pass | Action::Tunnel | Action::Reject(_) => return TC_ACT_UNSPEC,
        Action::Drop(_) => return TC_ACT_SHOT,
        Action::Stack | Action::Transmit | Action::Redirect => {}
    }
    icmp::translate::<F, _>(frame, message, translation);
    if action == Action::Stack {
        return TC_ACT_UNSPEC;
    }
    frame.age::<F>(message.packet.ttl, 0);
    frame.untag();
    frame.leave_by(translation.hop.ifindex)
}

/// A frame at tc egress that is neither TCP nor UDP.
#[inline(never)] // as above
pub(crate) fn tc_egress<F: Maps + Wire + Icmp>(skb: *mut __sk_buff) -> i32 {
    if !icmp::is_plain::<F, _>(&TcFrame::of(skb)) {
        return TC_ACT_UNSPEC;
    }
    let frame = &TcFrame::pulled(skb, icmp::REACH);
    let Some((message, translation)) = maps::message::<F>() else { return TC_ACT_UNSPEC };
    if icmp::parse::<F, _>(frame, frame.ifindex(), message) != Found::Error {
        return TC_ACT_UNSPEC;
    }
    let tables = Kernel::<F>::new(frame.context());
    if related::egress(tables, message, translation) != Action::Pass {
        icmp::translate::<F, _>(frame, message, translation);
    }
    TC_ACT_UNSPEC
}

impl Patch for XdpFrame {
    #[inline(always)] // bounds proofs do not survive a call
    fn put_pair(&self, at: usize, bytes: [u8; 2]) {
        let Some(place) = self.view::<2>(at) else { return };
        place.set_pair(0, bytes);
    }

    #[inline(always)] // as above
    fn put_quad(&self, at: usize, bytes: [u8; 4]) {
        let Some(place) = self.view::<4>(at) else { return };
        place.set_quad(0, bytes);
    }
}

impl Patch for TcFrame {
    #[inline(always)] // a helper call
    fn put_pair(&self, at: usize, bytes: [u8; 2]) {
        self.put(at, &bytes);
    }

    #[inline(always)] // a helper call
    fn put_quad(&self, at: usize, bytes: [u8; 4]) {
        self.put(at, &bytes);
    }
}
