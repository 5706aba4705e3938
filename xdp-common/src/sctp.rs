//! SCTP (RFC 9260): its headers, its checksum, and the answer to packets that are refused.
//!
//! Its packets meet the same decision as TCP's and UDP's. Chunks are told in the terms of TCP: INIT opens, ABORT resets, the
//! three chunks of a shutdown close the direction they come by, and all others go on.
//!
//! The checksum is a CRC over ports and payload without a pseudo-header, so addresses may change without touching it. When
//! ports change, it is updated by what they change, without looking at the payload: a CRC is linear, and how far the ports
//! are from the end is a power of x. One that was wrong is still wrong afterwards.

use network_types::{eth::EthHdr, ip::Ipv6Hdr};

use crate::{
    answer::{Answer, Finisher, copy, envelope},
    frame::{EXTENSIONS_LEN_MAX, Frame, Packet, View, dmac, tcp},
    icmp::Icmp,
    net::{Address, SCTP},
    tunnel,
};

/// Offset of the checksum in an SCTP header (RFC 9260, section 3.1).
pub const CHECK: usize = 8;
/// Length of the common header.
const HEADER: usize = 12;
/// Length of the header of a chunk.
const CHUNK: usize = 4;
/// Chunks that are looked at; what closes an association stands before its data.
const CHUNKS_MAX: usize = 4;
/// How far the headers of chunks are looked at, from the IP header on.
const REACH: usize = 1 << 9;
const IP: usize = EthHdr::LEN;
const _: () = assert!(IP + Ipv6Hdr::LEN + EXTENSIONS_LEN_MAX <= u8::MAX as usize, "offsets are bytes");

/// Types of chunks (RFC 9260, section 3.2).
pub mod chunk {
    /// User data.
    pub const DATA: u8 = 0;
    /// Opens an association.
    pub const INIT: u8 = 1;
    /// The answer to it.
    pub const INIT_ACK: u8 = 2;
    /// Ends an association at once.
    pub const ABORT: u8 = 6;
    /// Closes it.
    pub const SHUTDOWN: u8 = 7;
    /// The answer to that.
    pub const SHUTDOWN_ACK: u8 = 8;
    /// Reports an error, such as a stale cookie.
    pub const ERROR: u8 = 9;
    /// The end of the handshake.
    pub const COOKIE_ACK: u8 = 11;
    /// The end of the closing.
    pub const SHUTDOWN_COMPLETE: u8 = 14;
}

/// Reads the SCTP packet in a frame of the family; false for anything else, and for fragments, which are the kernel's.
///
/// The checksum of the packet says whether it is left to a device, whose sender writes zero; else it is zero itself, as for
/// UDP without one.
#[inline(always)] // bounds proofs do not survive a call
pub fn parse<F: Icmp, R: Frame + ?Sized>(frame: &R, ifindex: u32, packet: &mut Packet<F::Addr>) -> bool {
    let (Some(eth), Some(ip)) = (frame.view::<{ EthHdr::LEN }>(0), F::read(frame, IP)) else { return false };
    let (at, end) = (IP + ip.len, IP + ip.total_len as usize);
    if ip.proto != SCTP || ip.is_fragment || end < at + HEADER + CHUNK || !frame.reaches(end) {
        return false;
    }
    let Some(header) = frame.view::<HEADER>(at) else { return false };
    packet.key.src = ip.src;
    packet.key.dst = ip.dst;
    packet.key.sport = header.pair(0);
    packet.key.dport = header.pair(2);
    packet.key.proto = SCTP;
    packet.key.zero = [0; 3];
    packet.dmac = dmac(&eth);
    packet.is_tunnelled = tunnel::is_marked(&eth);
    packet.l4_offset = at as u8;
    packet.l4_len = (end - at) as u16;
    packet.total_len = ip.total_len;
    packet.tos = ip.tos;
    packet.ttl = ip.ttl;
    packet.tcp_flags = flags(frame, at + HEADER, end);
    packet.ifindex = ifindex;
    packet.check = 0;
    if header.quad(CHECK) == [0; 4] {
        packet.check = packet.offloaded_check();
    }
    true
}

/// What the chunks of a packet say, in the terms of TCP.
#[inline(always)] // as above
fn flags<R: Frame + ?Sized>(frame: &R, first: usize, end: usize) -> u8 {
    let (mut flags, mut at, mut step) = (tcp::ACK, first, 0);
    while step < CHUNKS_MAX && at < REACH && at + CHUNK <= end {
        let Some(header) = frame.view::<CHUNK>(at) else { break };
        let kind = header.u8(0);
        match kind {
            chunk::INIT => return tcp::SYN,
            chunk::INIT_ACK => return tcp::SYN | tcp::ACK,
            chunk::ABORT => return tcp::RST | tcp::ACK,
            chunk::SHUTDOWN | chunk::SHUTDOWN_ACK | chunk::SHUTDOWN_COMPLETE => flags |= tcp::FIN,
            chunk::DATA => break,
            _ => {}
        }
        let len = u16::from_be_bytes(header.pair(2)) as usize;
        // Each is filled up to whole words; one that is shorter than its header ends the packet. No longer than the reach: a sum
        // that may exceed 16 bits is no offset to the verifier of 6.1, which learns nothing from its comparison with another one.
        at += len.max(CHUNK).next_multiple_of(4).min(REACH);
        step += 1;
    }
    flags
}

/// The polynomial of CRC32c, the lowest power in the highest bit (RFC 9260, appendix A).
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// The polynomial 1.
const ONE: u32 = 1 << 31;

/// The product of two polynomials modulo that of the CRC.
#[inline(always)] // without branches on values, so that the verifier follows it once
const fn product(a: u32, b: u32) -> u32 {
    let (mut b, mut sum, mut bit) = (b, 0, 0);
    while bit < 32 {
        sum ^= b & ((a >> (31 - bit)) & 1).wrapping_neg();
        b = (b >> 1) ^ (POLYNOMIAL & (b & 1).wrapping_neg());
        bit += 1;
    }
    sum
}

/// x to the power of 8 n, for n of these steps.
const fn powers(step: u32) -> [u32; 256] {
    // x^8 is the ninth highest bit.
    let (mut base, mut count) = (ONE, 0);
    while count < step {
        base = product(base, ONE >> 8);
        count += 1;
    }
    let (mut powers, mut n) = ([ONE; 256], 1);
    while n < powers.len() {
        powers[n] = product(powers[n - 1], base);
        n += 1;
    }
    powers
}

/// x^(8 n) for n bytes, and for n times 256 bytes.
static POWERS: [[u32; 256]; 2] = [powers(1), powers(256)];

/// What the checksum of a packet of a length in bytes changes by when its ports change, both as on the wire.
#[inline(always)] // one caller per hook, in a function of its own
pub fn checksum_delta(before: [u8; 4], after: [u8; 4], len: u16) -> [u8; 4] {
    let changed = u32::from_le_bytes(before) ^ u32::from_le_bytes(after);
    let [low, high] = [len as usize & 0xff, len as usize >> 8];
    let (Some(low), Some(high)) = (POWERS[0].get(low), POWERS[1].get(high)) else { return [0; 4] };
    product(product(changed, *low), *high).to_le_bytes()
}

/// A checksum after a change.
#[inline(always)]
pub fn updated(check: [u8; 4], delta: [u8; 4]) -> [u8; 4] {
    (u32::from_ne_bytes(check) ^ u32::from_ne_bytes(delta)).to_ne_bytes()
}

/// The checksum of four words, as on the wire.
#[inline(never)] // rare, and the verifier follows it word by word
fn checksum_of(a: u32, b: u32, c: u32, d: u32) -> u32 {
    let mut crc = u32::MAX;
    crc = product(crc ^ a, ONE_WORD);
    crc = product(crc ^ b, ONE_WORD);
    crc = product(crc ^ c, ONE_WORD);
    !product(crc ^ d, ONE_WORD)
}

/// x^32.
const ONE_WORD: u32 = POLYNOMIAL;

/// Length of a frame with an ABORT: Ethernet, IP and SCTP headers, one chunk. In an INIT the tag of its sender follows there.
pub const fn abort_len<F: Answer>() -> usize {
    IP + F::LEN + HEADER + CHUNK
}

/// Writes the answer to a packet of no association into [`abort_len`] bytes; false where there is none (RFC 9260, section 8.4).
///
/// `headers` are the frame up to [`abort_len`], and `initiate` what follows in it: zeros, which no
/// tag is, where the frame ends before.
#[inline(always)] // as `answer::reset`
pub fn abort<F: Answer, W: View>(headers: &W, initiate: [u8; 4], finisher: Finisher, out: &mut [u8]) -> bool {
    const SAME_TAG: u8 = 1;
    let l4 = IP + F::LEN;
    let kind = headers.u8(l4 + HEADER);
    let (answer, flags, tag) = match kind {
        chunk::ABORT | chunk::SHUTDOWN_COMPLETE | chunk::COOKIE_ACK | chunk::ERROR => return false,
        chunk::INIT if initiate == [0; 4] => return false,
        chunk::INIT => (chunk::ABORT, 0, initiate),
        chunk::SHUTDOWN_ACK => (chunk::SHUTDOWN_COMPLETE, SAME_TAG, headers.quad(l4 + 4)),
        _ => (chunk::ABORT, SAME_TAG, headers.quad(l4 + 4)),
    };
    out.fill(0);
    envelope::<F, W>(headers, out, SCTP);
    let ([s0, s1], [d0, d1]) = (headers.pair(l4), headers.pair(l4 + 2));
    let (ports, head) = ([d0, d1, s0, s1], [answer, flags, 0, CHUNK as u8]);
    copy(ports, out, l4);
    copy(tag, out, l4 + 4);
    copy(head, out, l4 + HEADER);
    if finisher == Finisher::Nobody {
        let [ports, tag, head] = [ports, tag, head].map(u32::from_le_bytes);
        copy(checksum_of(ports, tag, 0, head).to_le_bytes(), out, l4 + CHECK);
    }
    true
}

impl<A: Address> Packet<A> {
    /// Whether an SCTP packet bears no checksum: its sender leaves that to the device.
    #[inline(always)] // one comparison
    pub fn is_unsummed(&self) -> bool {
        self.check != 0
    }

    /// What makes the packet look as if its checksum were left to the device.
    #[inline(always)]
    fn offloaded_check(&self) -> u16 {
        crate::checksum::pseudo_header(self.key.addresses_sum(), self.key.proto, self.l4_len)
    }
}

#[cfg(test)]
mod tests;
