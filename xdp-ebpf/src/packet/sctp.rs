//! What SCTP has of its own in a frame: its checksum, and the answer to what is refused.

use aya_ebpf::{bindings::xdp_md, programs::XdpContext};
use xdp_common::{
    answer::{Answer, AnswerFrame, Finisher},
    frame::{Packet, View},
    sctp,
    verdict::Rewrite,
};

use super::{Bytes, Replace, XdpFrame};

/// Both ports, as they are on the wire.
#[inline(always)] // moves only
pub(crate) fn ports(sport: [u8; 2], dport: [u8; 2]) -> [u8; 4] {
    let ([a, b], [c, d]) = (sport, dport);
    [a, b, c, d]
}

/// The ports of a packet before and after, as numbers that a function can be handed; nothing where they stay the same.
#[inline(always)] // one caller per hook
pub(crate) fn changed<A>(packet: &Packet<A>, rewrite: &Rewrite<A>) -> Option<(u32, u32)> {
    let before = u32::from_ne_bytes(ports(packet.key.sport, packet.key.dport));
    let after = u32::from_ne_bytes(ports(rewrite.sport, rewrite.dport));
    (before != after).then_some((before, after))
}

/// Updates the checksum of a packet whose ports are rewritten.
#[inline(always)] // one caller per program
pub(crate) fn update<A>(frame: &XdpFrame, packet: &Packet<A>, rewrite: &Rewrite<A>) {
    if let Some((before, after)) = changed(packet, rewrite) {
        update_at(frame.context().cast(), packet.l4_offset, packet.l4_len, before, after);
    }
}

#[inline(never)] // as above
fn update_at(ctx: *mut xdp_md, l4_offset: u8, len: u16, before: u32, after: u32) {
    let ctx = XdpContext::new(ctx);
    let at = l4_offset as usize + sctp::CHECK;
    let Some(check) = Bytes::<4>::within(ctx.data(), ctx.data_end(), at) else { return };
    let delta = sctp::checksum_delta(before.to_ne_bytes(), after.to_ne_bytes(), len);
    check.set_quad(0, sctp::updated(check.quad(0), delta));
}

#[inline(never)] // as above
pub(crate) fn delta_of(before: u32, after: u32, len: u16) -> u32 {
    u32::from_ne_bytes(sctp::checksum_delta(before.to_ne_bytes(), after.to_ne_bytes(), len))
}

/// Turns a refused packet into the answer to it.
#[inline(always)] // bounds proofs do not survive a call
pub(super) fn abort<F: Answer, R: Replace, const ABORT: usize>(
    frame: &R,
    finisher: Finisher,
    area: &mut AnswerFrame,
) -> bool {
    let (Some(headers), Some(out)) = (frame.view::<ABORT>(0), area.first_chunk_mut::<ABORT>()) else {
        return false;
    };
    let initiate = match frame.view::<4>(ABORT) {
        Some(tag) => tag.quad(0),
        None => [0; 4],
    };
    sctp::abort::<F, _>(&headers, initiate, finisher, out) && frame.replace(out)
}
