//! Answers to packets that are refused: a TCP reset (RFC 9293, section 3.5.2), or an ICMP port unreachable (RFC 792,
//! RFC 4443).

use network_types::eth::EthHdr;

use crate::{
    checksum,
    frame::{Headers, View, tcp},
    net::{TCP, V4, V6},
};

/// Length of a frame with a reset: Ethernet, IP and TCP headers without options.
pub const fn reset_len<F: Answer>() -> usize {
    IP + F::LEN + 20
}

/// Length of a frame with an ICMP error: Ethernet, IP and ICMP headers, and the quote.
pub const fn unreachable_len<F: Answer>() -> usize {
    IP + F::LEN + 8 + F::LEN + 8
}

/// The same for one that tells how long a packet may be, which quotes more: room for a fragment header too.
pub const fn too_big_len<F: Answer>() -> usize {
    unreachable_len::<F>() + 8
}

/// How far from the beginning of a frame its transport header may be, so that the quote of this length has the ports.
pub const fn too_big_reach<F: Answer>() -> usize {
    IP + F::LEN + 8
}

/// Room for the longest answer, in whole words.
pub type AnswerFrame = [u8; too_big_len::<V6>().next_multiple_of(4)];

const IP: usize = EthHdr::LEN;
/// Time to live of what is sent here (RFC 1700).
pub(crate) const TTL: u8 = 64;

/// What answers of a family look like.
pub trait Answer: Headers {
    /// IP protocol number of its ICMP.
    const ICMP: u8;
    /// Type and code of "destination unreachable, port unreachable".
    const PORT_UNREACHABLE: [u8; 2];
    /// Type and code of "destination unreachable, host unreachable", or "address unreachable".
    const HOST_UNREACHABLE: [u8; 2];
    /// Type and code of "fragmentation needed", or "packet too big".
    const TOO_BIG: [u8; 2];
    /// Type and code of "time to live exceeded in transit", or "hop limit exceeded".
    const TIME_EXCEEDED: [u8; 2];
    /// Whether its ICMP checksum covers the pseudo-header.
    const ICMP_PSEUDO_HEADER: bool;
    /// Writes an IP header that leads back to where a frame came from; the sum of both addresses.
    fn header<W: View>(headers: &W, out: &mut [u8], proto: u8) -> u32;
}

impl Answer for V4 {
    const ICMP: u8 = 1;
    const PORT_UNREACHABLE: [u8; 2] = [3, 3];
    const HOST_UNREACHABLE: [u8; 2] = [3, 1];
    const TOO_BIG: [u8; 2] = [3, 4];
    const TIME_EXCEEDED: [u8; 2] = [11, 0];
    const ICMP_PSEUDO_HEADER: bool = false;

    #[inline(always)] // offsets must fold
    fn header<W: View>(headers: &W, out: &mut [u8], proto: u8) -> u32 {
        let (src, dst) = (headers.quad(IP + 12), headers.quad(IP + 16));
        out[IP] = 0x45;
        copy(((out.len() - IP) as u16).to_be_bytes(), out, IP + 2);
        out[IP + 6] = 0x40; // don't fragment
        out[IP + 8] = TTL;
        out[IP + 9] = proto;
        copy(dst, out, IP + 12);
        copy(src, out, IP + 16);
        let check = !checksum::fold(words(out, IP, IP + Self::LEN));
        copy(check.to_ne_bytes(), out, IP + 10);
        words_of(src) + words_of(dst)
    }
}

impl Answer for V6 {
    const ICMP: u8 = 58;
    const PORT_UNREACHABLE: [u8; 2] = [1, 4];
    const HOST_UNREACHABLE: [u8; 2] = [1, 3];
    const TOO_BIG: [u8; 2] = [2, 0];
    const TIME_EXCEEDED: [u8; 2] = [3, 0];
    const ICMP_PSEUDO_HEADER: bool = true;

    #[inline(always)] // offsets must fold
    fn header<W: View>(headers: &W, out: &mut [u8], proto: u8) -> u32 {
        out[IP] = 0x60;
        copy(((out.len() - IP - Self::LEN) as u16).to_be_bytes(), out, IP + 4);
        out[IP + 6] = proto;
        out[IP + 7] = TTL;
        let (mut sum, mut at) = (0, 0);
        while at < 16 {
            let (src, dst) = (headers.quad(IP + 8 + at), headers.quad(IP + 24 + at));
            copy(dst, out, IP + 8 + at);
            copy(src, out, IP + 24 + at);
            sum += words_of(src) + words_of(dst);
            at += 4;
        }
        sum
    }
}

/// Who finishes the TCP or ICMP checksum of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finisher {
    /// Nobody: the answer's is complete.
    Nobody,
    /// The device, as it would have done for the packet that is answered: the sum from the transport header on goes to
    /// where that packet's checksum was.
    Device,
}

/// Writes the reset that answers a segment into [`reset_len`] bytes; false when it is a reset itself.
///
/// `headers` are the frame up to the end of the IP header without options, `tcp` is the TCP header without options, wherever it
/// lies; `l4_len` is the length of TCP header and payload in bytes.
#[inline(always)] // one caller per hook, in a function of its own
pub fn reset<F: Answer, W: View, T: View>(
    headers: &W,
    tcp: &T,
    l4_len: u16,
    finisher: Finisher,
    out: &mut [u8],
) -> bool {
    let l4 = IP + F::LEN;
    let flags = tcp.u8(13);
    if flags & tcp::RST != 0 {
        return false;
    }
    out.fill(0);
    let sum = envelope::<F, W>(headers, out, TCP);
    copy(tcp.pair(2), out, l4);
    copy(tcp.pair(0), out, l4 + 2);
    if flags & tcp::ACK != 0 {
        copy(tcp.quad(8), out, l4 + 4);
        out[l4 + 13] = tcp::RST;
    } else {
        let header_len = (tcp.u8(12) >> 4) as u32 * 4;
        let occupied = u32::from(flags & tcp::SYN != 0) + u32::from(flags & tcp::FIN != 0);
        let seq = u32::from_be_bytes(tcp.quad(4));
        let ack = seq.wrapping_add((l4_len as u32).saturating_sub(header_len)).wrapping_add(occupied);
        copy(ack.to_be_bytes(), out, l4 + 8);
        out[l4 + 13] = tcp::RST | tcp::ACK;
    }
    out[l4 + 12] = 5 << 4;
    let pseudo = checksum::pseudo_header(sum, TCP, 20);
    let check = match finisher {
        Finisher::Nobody => !checksum::fold(pseudo as u32 + words(out, l4, reset_len::<F>())),
        Finisher::Device => pseudo,
    };
    copy(check.to_ne_bytes(), out, l4 + 16);
    true
}

/// Writes the ICMP error that answers a datagram into [`unreachable_len`] bytes.
///
/// `headers` are the frame up to the end of the UDP header. A device that finishes the checksum of a UDP datagram writes
/// it into what the RFCs leave unused, where it makes the sum right all the same.
#[inline(always)] // as above
pub fn unreachable<F: Answer, W: View>(headers: &W, finisher: Finisher, out: &mut [u8]) {
    error::<F, W>(headers, F::PORT_UNREACHABLE, 0, F::LEN + 8, finisher, out);
}

/// The same for a datagram behind 8 bytes of options or of an extension header, such as a first fragment of IPv6, into
/// [`too_big_len`] bytes. `headers` are the frame up to 16 bytes behind the IP header.
#[inline(always)] // as above
pub fn unreachable_behind_options<F: Answer, W: View>(headers: &W, out: &mut [u8]) {
    error::<F, W>(headers, F::PORT_UNREACHABLE, 0, F::LEN + 16, Finisher::Nobody, out);
}

/// Writes the ICMP error that answers a packet which is longer than `mtu` bytes into [`too_big_len`] bytes (RFC 1191,
/// RFC 8201), or with an `mtu` of 0 one that has no hops left (RFC 792, RFC 4443). `headers` are the frame up to 16 bytes behind the IP
/// header.
#[inline(always)] // as above
pub fn too_big<F: Answer, W: View>(headers: &W, mtu: u16, out: &mut [u8]) {
    let what = if mtu == 0 { F::TIME_EXCEEDED } else { F::TOO_BIG };
    error::<F, W>(headers, what, mtu, F::LEN + 16, Finisher::Nobody, out);
}

/// The same where the packet has met that on its way in another one; with an `mtu` of 0 it does not reach its host. The Ethernet header is
/// the caller's to write but for the EtherType, as is that of `headers` to ignore.
#[inline(always)] // as above
pub fn relayed<F: Answer, W: View>(headers: &W, mtu: u16, out: &mut [u8]) {
    let what = if mtu == 0 { F::HOST_UNREACHABLE } else { F::TOO_BIG };
    error::<F, W>(headers, what, mtu, F::LEN + 16, Finisher::Nobody, out);
    copy(F::ETHERTYPE.to_be_bytes(), out, 12);
}

#[inline(always)] // as above
fn error<F: Answer, W: View>(
    headers: &W,
    what: [u8; 2],
    mtu: u16,
    quoted: usize,
    finisher: Finisher,
    out: &mut [u8],
) {
    let l4 = IP + F::LEN;
    let end = l4 + 8 + quoted;
    out.fill(0);
    let sum = envelope::<F, W>(headers, out, F::ICMP);
    copy(what, out, l4);
    // Of IPv6 it is the lower half of the field.
    copy(mtu.to_be_bytes(), out, l4 + 6);
    let mut at = 0;
    while at < quoted {
        copy(headers.quad(IP + at), out, l4 + 8 + at);
        at += 4;
    }
    let pseudo = match F::ICMP_PSEUDO_HEADER {
        true => checksum::pseudo_header(sum, F::ICMP, (end - l4) as u16),
        false => 0,
    };
    match finisher {
        Finisher::Nobody => {
            let check = !checksum::fold(pseudo as u32 + words(out, l4, end));
            copy(check.to_ne_bytes(), out, l4 + 2);
        }
        Finisher::Device => copy(pseudo.to_ne_bytes(), out, l4 + 6),
    }
}

/// Writes Ethernet and IP headers that lead back to where a frame came from; the sum of both addresses.
#[inline(always)]
pub(crate) fn envelope<F: Answer, W: View>(headers: &W, out: &mut [u8], proto: u8) -> u32 {
    let (dmac, dmac_end) = (headers.quad(0), headers.pair(4));
    copy(headers.pair(6), out, 0);
    copy(headers.quad(8), out, 2);
    copy(dmac, out, 6);
    copy(dmac_end, out, 10);
    copy(headers.pair(12), out, 12);
    F::header(headers, out, proto)
}

#[inline(always)]
fn words_of(quad: [u8; 4]) -> u32 {
    u16::from_ne_bytes([quad[0], quad[1]]) as u32 + u16::from_ne_bytes([quad[2], quad[3]]) as u32
}

/// The sum of the 16-bit words of a frame from one constant offset to another, not folded.
#[inline(always)]
fn words(frame: &[u8], from: usize, to: usize) -> u32 {
    let (mut sum, mut at) = (0, from);
    while at + 1 < to && at + 1 < frame.len() {
        sum += u16::from_ne_bytes([frame[at], frame[at + 1]]) as u32;
        at += 2;
    }
    sum
}

/// Writes bytes at an offset, as far as there is room.
#[inline(always)] // offsets must fold
pub fn copy<const N: usize>(from: [u8; N], out: &mut [u8], at: usize) {
    let mut byte = 0;
    while byte < N && at + byte < out.len() {
        out[at + byte] = from[byte];
        byte += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::{vec, vec::Vec};

    use proptest::prelude::*;

    use super::*;
    use crate::{
        frame::Parsed,
        net::{FlowKey, UDP},
    };

    /// An IP header over 26 bytes, with its addresses.
    trait Sample: Answer {
        const HEADER: &'static [u8];
        /// Where the addresses are in it, and how long each is.
        const ADDRESSES: (usize, usize);
        const PROTO: usize;
    }

    impl Sample for V4 {
        const HEADER: &'static [u8] =
            &[0x45, 0, 0, 46, 0x12, 0x34, 0x40, 0, 64, 0, 0, 0, 198, 51, 100, 2, 203, 0, 113, 10];
        const ADDRESSES: (usize, usize) = (12, 4);
        const PROTO: usize = 9;
    }

    impl Sample for V6 {
        const HEADER: &'static [u8] = &[
            0x60, 0, 0, 0, 0, 26, 0, 64, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0xfd, 0, 0,
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 10,
        ];
        const ADDRESSES: (usize, usize) = (8, 16);
        const PROTO: usize = 6;
    }

    /// The headers and payload of a frame to port 80.
    fn frame<F: Sample>(proto: u8) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        frame.extend(F::ETHERTYPE.to_be_bytes());
        frame.extend(F::HEADER);
        frame[IP + F::PROTO] = proto;
        frame.extend([0x9c, 0x40, 0, 80]);
        frame.resize(IP + F::LEN + 26, 0);
        frame
    }

    /// As much of a frame as is looked at.
    fn head(frame: &[u8]) -> [u8; 80] {
        let mut head = [0; 80];
        let len = frame.len().min(80);
        head[..len].copy_from_slice(&frame[..len]);
        head
    }

    fn tcp_header(frame: &[u8], l4: usize) -> [u8; 20] {
        *frame[l4..].first_chunk().expect("a whole header")
    }

    fn sum(bytes: &[u8]) -> u32 {
        bytes.chunks(2).map(|pair| u16::from_ne_bytes([pair[0], pair[1]]) as u32).sum()
    }

    /// Whether every checksum of an answer is right.
    fn is_finished<F: Sample>(out: &[u8], proto: u8) -> bool {
        let l4 = IP + F::LEN;
        let (at, len) = F::ADDRESSES;
        let addresses = sum(&out[IP + at..][..2 * len]);
        let has_pseudo_header = proto == TCP || F::ICMP_PSEUDO_HEADER;
        let pseudo = checksum::pseudo_header(addresses, proto, (out.len() - l4) as u16) as u32;
        let total = sum(&out[l4..]) + if has_pseudo_header { pseudo } else { 0 };
        checksum::fold(total) == 0xffff
            && (!F::HEADER_CHECKSUM || checksum::fold(sum(&out[IP..l4])) == 0xffff)
    }

    fn key<F: Sample>(frame: &[u8]) -> FlowKey<F::Addr> {
        let Parsed::Packet(packet) = F::parse(frame, 1) else { panic!("{frame:?}") };
        packet.key
    }

    fn check_reset<F: Sample>(seq: u32, ack: u32, flags: u8, options: u8) -> Result<(), TestCaseError> {
        let (l4, mut frame) = (IP + F::LEN, frame::<F>(TCP));
        frame[l4 + 4..][..4].copy_from_slice(&seq.to_be_bytes());
        frame[l4 + 8..][..4].copy_from_slice(&ack.to_be_bytes());
        frame[l4 + 12] = (5 + options) << 4;
        frame[l4 + 13] = flags;
        let mut out = vec![0xff; reset_len::<F>()];
        if !reset::<F, _, _>(&head(&frame), &tcp_header(&frame, l4), 26, Finisher::Nobody, &mut out) {
            prop_assert!(flags & tcp::RST != 0);
            return Ok(());
        }
        prop_assert!(is_finished::<F>(&out, TCP));
        prop_assert_eq!(key::<F>(&out), key::<F>(&frame).reversed());
        prop_assert_eq!((&out[..6], &out[6..12]), (&[2, 0, 0, 0, 0, 1][..], &[2, 0, 0, 0, 0, 2][..]));
        let (sent_seq, sent_ack) = (&out[l4 + 4..][..4], &out[l4 + 8..][..4]);
        if flags & tcp::ACK != 0 {
            prop_assert_eq!(
                (out[l4 + 13], sent_seq, sent_ack),
                (tcp::RST, &ack.to_be_bytes()[..], &[0; 4][..])
            );
        } else {
            let payload = 6 - u32::from(options) * 4;
            let syn_fin = (flags & tcp::SYN) as u32 / 2 + (flags & tcp::FIN) as u32;
            let expected = seq.wrapping_add(payload + syn_fin).to_be_bytes();
            prop_assert_eq!(
                (out[l4 + 13], sent_seq, sent_ack),
                (tcp::RST | tcp::ACK, &[0; 4][..], &expected[..])
            );
        }
        Ok(())
    }

    fn check_device<F: Sample>(seq: u32, payload: [u8; 18]) -> Result<(), TestCaseError> {
        let (l4, mut segment) = (IP + F::LEN, frame::<F>(TCP));
        segment[l4 + 4..][..4].copy_from_slice(&seq.to_be_bytes());
        let mut out = vec![0xff; reset_len::<F>()];
        let header = tcp_header(&segment, l4);
        prop_assert!(reset::<F, _, _>(&head(&segment), &header, 20, Finisher::Device, &mut out));
        finish_by_device(&mut out, l4, 16);
        prop_assert!(is_finished::<F>(&out, TCP));
        let mut datagram = frame::<F>(UDP);
        datagram[l4 + 8..].copy_from_slice(&payload);
        let mut out = vec![0xff; unreachable_len::<F>()];
        unreachable::<F, _>(&head(&datagram), Finisher::Device, &mut out);
        finish_by_device(&mut out, l4, 6);
        prop_assert!(is_finished::<F>(&out, F::ICMP));
        Ok(())
    }

    /// What `skb_checksum_help` does: the sum from the transport header on, with what the field holds, goes into it.
    fn finish_by_device(out: &mut [u8], l4: usize, offset: usize) {
        let check = !checksum::fold(sum(&out[l4..]));
        out[l4 + offset..][..2].copy_from_slice(&check.to_ne_bytes());
    }

    proptest! {
        #[test]
        fn a_reset_acknowledges_what_the_segment_held(seq: u32, ack: u32, flags in 0u8..0x40, options in 0u8..2) {
            check_reset::<V4>(seq, ack, flags, options)?;
            check_reset::<V6>(seq, ack, flags, options)?;
        }

        #[test]
        fn a_device_finishes_what_is_left_to_it(seq: u32, payload: [u8; 18]) {
            check_device::<V4>(seq, payload)?;
            check_device::<V6>(seq, payload)?;
        }
    }

    fn check_quote<F: Sample>(unreachable_port: [u8; 2]) {
        let (l4, datagram) = (IP + F::LEN, frame::<F>(UDP));
        let mut out = vec![0xff; unreachable_len::<F>()];
        unreachable::<F, _>(&head(&datagram), Finisher::Nobody, &mut out);
        assert!(is_finished::<F>(&out, F::ICMP));
        assert_eq!((out[IP + F::PROTO], &out[l4..l4 + 2]), (F::ICMP, &unreachable_port[..]));
        let (at, len) = F::ADDRESSES;
        let addresses = |frame: &[u8], first: usize| frame[IP + at + first * len..][..len].to_vec();
        assert_eq!(
            (addresses(&out, 0), addresses(&out, 1)),
            (addresses(&datagram, 1), addresses(&datagram, 0))
        );
        assert_eq!(out[l4 + 8..], datagram[IP..l4 + 8]);
    }

    #[test]
    fn an_unreachable_port_quotes_the_datagram() {
        check_quote::<V4>([3, 3]);
        check_quote::<V6>([1, 4]);
    }
}
