//! Errors about packets around those of clients, which are told to the clients (RFC 2003, section 4; RFC 2473, section 8).

use network_types::eth::EthHdr;

use super::{IP, Tunnel};
use crate::{
    frame::{Frame, Packet, View, dmac},
    net::{Address, SCTP, TCP, UDP},
};

/// Length of an ICMP header, behind which the quote begins.
const HEADER: usize = 8;
/// How much of the client's packet is quoted to it behind the IP header.
const QUOTED: usize = 16;

/// What an error says of a packet around a client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relay<A> {
    /// Whence the packet around came: whom the error is addressed to.
    pub from: A,
    /// Where it was to go.
    pub to: A,
    /// How long packets of the client may be, in bytes; 0 where none gets there.
    pub mtu: u16,
}

/// Offset of the client's packet in the frame of an error about the packet around it.
pub const fn inner<F: Tunnel>() -> usize {
    IP + F::LEN + HEADER + F::LEN
}

/// Reads an error that quotes a packet with one of the family in it, and into `packet` what is asked of that: its key, as it is quoted,
/// with station and interface of the error's frame.
///
/// Nothing where the quote is too short to tell a client, or a header is not the shortest.
#[inline(always)] // bounds proofs do not survive a call
pub fn parse<F: Tunnel, R: Frame + ?Sized>(
    frame: &R,
    ifindex: u32,
    packet: &mut Packet<F::Addr>,
) -> Option<Relay<F::Addr>> {
    let eth = frame.view::<{ EthHdr::LEN }>(0)?;
    let (outer, at) = (F::read(frame, IP)?, IP + F::LEN);
    let end = IP + outer.total_len as usize;
    let is_plain = outer.proto == F::ICMP && outer.len == F::LEN && !outer.is_fragment;
    if !is_plain || inner::<F>() + F::LEN + QUOTED > end || !frame.reaches(end) {
        return None;
    }
    let icmp = frame.view::<HEADER>(at)?;
    let around = F::read(frame, at + HEADER)?;
    let is_around = around.proto == F::IN_IP && around.len == F::LEN && !around.is_fragment;
    // An error goes to the source of what it quotes.
    if !F::is_error(icmp.u8(0)) || !is_around || around.src.differs(outer.dst) != 0 {
        return None;
    }
    let header = F::read(frame, inner::<F>())?;
    if !matches!(header.proto, TCP | UDP | SCTP) || header.len > F::LEN + QUOTED / 2 {
        return None;
    }
    let ports = frame.view::<4>(inner::<F>() + header.len)?;
    packet.key.src = header.src;
    packet.key.dst = header.dst;
    packet.key.sport = ports.pair(0);
    packet.key.dport = ports.pair(2);
    packet.key.proto = header.proto;
    packet.key.zero = [0; 3];
    packet.dmac = dmac(&eth);
    packet.ifindex = ifindex;
    let mtu = F::told_mtu([icmp.u8(0), icmp.u8(1)], icmp.quad(4));
    Some(Relay { from: around.src, to: around.dst, mtu: mtu.map_or(0, |mtu| inside::<F>(mtu)) })
}

/// How long packets may be of which those around may have so many bytes. Who tells less than every link has says nothing of use:
/// routers from before RFC 1191 say 0.
#[inline(always)] // a few instructions
fn inside<F: Tunnel>(mtu: u32) -> u16 {
    let fits = mtu.min(u16::MAX as u32).saturating_sub(F::LEN as u32) as u16;
    if fits < F::MTU_MIN { F::MTU_MIN } else { fits }
}
