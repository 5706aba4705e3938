//! SCTP at the hooks: it is read beside the path of TCP and UDP, and then meets the same decision.

use aya_ebpf::bindings::{__sk_buff, xdp_action, xdp_md};
use xdp_common::{
    answer::Finisher,
    frame::{Frame, Packet, View},
    icmp::Icmp,
    net::Address,
    sctp,
    tables::{Flow, Table, Tables},
    verdict::{Hop, Rewrite},
};

use crate::{
    family::Maps,
    maps::{self, Kernel},
    packet::{
        Wire, XdpFrame,
        sctp::{changed, delta_of, ports},
    },
    skb::TcFrame,
    xdp::{self, OTHER, decided},
};

/// A frame at XDP in which the path of TCP and UDP has found nothing.
#[inline(never)] // a frame of its own on a stack of 512 bytes, beside that path: what is read before it would make it slower
pub(crate) fn xdp<F: Maps + Wire + Icmp, const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    let frame = &XdpFrame::new(ctx, FRAGS);
    if !read::<F, FRAGS>(ctx) {
        return OTHER;
    }
    maps::parsed::<F>().map_or(OTHER, |packet| decided::<F, FRAGS, true>(frame, packet))
}

/// Answers a refused packet; what the program then does with the frame.
#[inline(never)] // as above
pub(crate) fn abort<F: Maps + Wire, const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    let frame = &XdpFrame::new(ctx, FRAGS);
    let sent = maps::parsed::<F>()
        .map(|packet| xdp::answered(|area| F::abort(frame, packet, Finisher::Nobody, area)));
    sent.unwrap_or(xdp_action::XDP_DROP)
}

/// The packet at hand and its flow, once more: a verdict takes too much of the stack to be handed on. What is not established has
/// its next hop in the work area only.
#[inline(always)] // two callers
fn known<F: Maps, R>(
    tables: Kernel<F>,
    then: impl FnOnce(&'static Packet<F::Addr>, &Flow<F::Addr>) -> R,
) -> Option<R> {
    let packet = maps::parsed::<F>()?;
    match Tables::<F>::flow(tables, Table::Established, &packet.key) {
        Some(flow) => Some(then(packet, &flow)),
        None => Some(then(packet, &Tables::<F>::work(tables)?.flow)),
    }
}

/// Tells the sender of a packet how long it may be; what the program then does with the frame.
#[inline(never)] // as above
pub(crate) fn too_big<F: Maps + Wire, const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    let frame = &XdpFrame::new(ctx, FRAGS);
    let sent = known(Kernel::<F>::new(frame.context()), |packet, flow| {
        xdp::answered(|area| F::too_big(frame, packet, flow.mtu, area))
    });
    sent.unwrap_or(xdp_action::XDP_DROP)
}

/// Sends the packet on in another one; what the program then does with the frame.
#[inline(never)] // as above
pub(crate) fn tunnel<F: Maps + Wire, const FRAGS: bool>(ctx: *mut xdp_md) -> u32 {
    let frame = &XdpFrame::new(ctx, FRAGS);
    let sent = known(Kernel::<F>::new(frame.context()), |packet, flow| {
        let hop = Hop { dmac: flow.dmac, smac: flow.smac, ifindex: flow.ifindex };
        xdp::tunnel::<F>(frame, packet, &hop, flow.src, flow.dst)
    });
    sent.unwrap_or(xdp_action::XDP_PASS)
}

#[inline(never)] // as above
fn read<F: Maps + Icmp, const FRAGS: bool>(ctx: *mut xdp_md) -> bool {
    let frame = &XdpFrame::new(ctx, FRAGS);
    maps::place::<F>().is_some_and(|place| sctp::parse::<F, _>(frame, frame.ifindex(), place))
}

/// Reads a frame at tc, where the decision is the same function for all, into the place of the packet at hand.
#[inline(never)] // as above
pub(crate) fn at_tc<F: Maps + Icmp>(skb: *mut __sk_buff) -> bool {
    let frame = &TcFrame::of(skb);
    maps::place::<F>().is_some_and(|place| sctp::parse::<F, _>(frame, frame.ifindex(), place))
}

impl TcFrame {
    /// Rewrites the ports of an SCTP packet. A checksum of zero is the device's to write, and stays zero (RFC 9653 gives it that
    /// meaning on the wire too).
    #[inline(always)] // one caller
    pub(crate) fn rewrite_sctp<A: Address>(&self, packet: &Packet<A>, rewrite: &Rewrite<A>) {
        let Some((before, after)) = changed(packet, rewrite) else { return };
        let at = packet.l4_offset as usize;
        if !packet.is_unsummed() {
            let Some(check) = self.view::<4>(at + sctp::CHECK) else { return };
            let delta = delta_of(before, after, packet.l4_len).to_ne_bytes();
            self.put(at + sctp::CHECK, &sctp::updated(check.quad(0), delta));
        }
        self.put(at, &ports(rewrite.sport, rewrite.dport));
    }
}
