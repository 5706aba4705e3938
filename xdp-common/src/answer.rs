//! Answers to packets that are refused: a TCP reset (RFC 9293, section 3.5.2), or an ICMP port unreachable (RFC 792).

use network_types::eth::EthHdr;

use crate::{
    checksum,
    frame::{View, tcp},
    net::TCP,
};

/// Length of a frame with a reset: Ethernet, IPv4 and TCP headers without options.
pub const RESET_LEN: usize = IP + 20 + 20;
/// Room for the longest answer, in whole words.
pub type AnswerFrame = [u8; UNREACHABLE_LEN.next_multiple_of(4)];
/// Length of what an ICMP error quotes: an IPv4 header without options, and 8 bytes of what it carries.
const QUOTE_LEN: usize = 20 + 8;
/// Length of a frame with an ICMP error: Ethernet, IPv4 and ICMP headers, and the quote.
pub const UNREACHABLE_LEN: usize = IP + 20 + 8 + QUOTE_LEN;

const IP: usize = EthHdr::LEN;
const L4: usize = IP + 20;
const ICMP: u8 = 1;
/// Destination unreachable, port unreachable.
const PORT_UNREACHABLE: [u8; 2] = [3, 3];
/// Time to live of what is sent here (RFC 1700).
const TTL: u8 = 64;

/// Who finishes the TCP or ICMP checksum of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finisher {
    /// Nobody: the answer's is complete.
    Nobody,
    /// The device, as it would have done for the packet that is answered: the sum from the transport header on goes to
    /// where that packet's checksum was.
    Device,
}

/// Writes the reset that answers a segment; false when it is a reset itself.
///
/// `headers` are the frame up to the end of the TCP header without options; `l4_len` is the length of TCP header and
/// payload in bytes.
#[inline(always)] // one caller per hook, in a function of its own
pub fn reset<V: View>(headers: &V, l4_len: u16, finisher: Finisher, out: &mut [u8; RESET_LEN]) -> bool {
    let flags = headers.u8(L4 + 13);
    if flags & tcp::RST != 0 {
        return false;
    }
    *out = [0; RESET_LEN];
    let sum = envelope(headers, out, TCP);
    copy(headers.pair(L4 + 2), out, L4);
    copy(headers.pair(L4), out, L4 + 2);
    if flags & tcp::ACK != 0 {
        copy(headers.quad(L4 + 8), out, L4 + 4);
        out[L4 + 13] = tcp::RST;
    } else {
        let header_len = (headers.u8(L4 + 12) >> 4) as u32 * 4;
        let occupied = u32::from(flags & tcp::SYN != 0) + u32::from(flags & tcp::FIN != 0);
        let seq = u32::from_be_bytes(headers.quad(L4 + 4));
        let ack = seq.wrapping_add((l4_len as u32).saturating_sub(header_len)).wrapping_add(occupied);
        copy(ack.to_be_bytes(), out, L4 + 8);
        out[L4 + 13] = tcp::RST | tcp::ACK;
    }
    out[L4 + 12] = 5 << 4;
    let pseudo = checksum::pseudo_header(sum, TCP, 20);
    let check = match finisher {
        Finisher::Nobody => !checksum::fold(pseudo as u32 + words::<L4, RESET_LEN>(out)),
        Finisher::Device => pseudo,
    };
    copy(check.to_ne_bytes(), out, L4 + 16);
    true
}

/// Writes the ICMP error that answers a datagram.
///
/// `headers` are the frame up to the end of the UDP header. A device that finishes the checksum of a UDP datagram writes
/// it into what RFC 792 leaves unused, where it makes the sum right all the same.
#[inline(always)] // as above
pub fn unreachable<V: View>(headers: &V, finisher: Finisher, out: &mut [u8; UNREACHABLE_LEN]) {
    *out = [0; UNREACHABLE_LEN];
    envelope(headers, out, ICMP);
    copy(PORT_UNREACHABLE, out, L4);
    let mut at = 0;
    while at < QUOTE_LEN {
        copy(headers.quad(IP + at), out, L4 + 8 + at);
        at += 4;
    }
    if finisher == Finisher::Nobody {
        let check = !checksum::fold(words::<L4, UNREACHABLE_LEN>(out));
        copy(check.to_ne_bytes(), out, L4 + 2);
    }
}

/// Writes Ethernet and IPv4 headers that lead back to where a frame came from; the sum of both addresses.
#[inline(always)]
fn envelope<V: View, const N: usize>(headers: &V, out: &mut [u8; N], proto: u8) -> u32 {
    let (dmac, dmac_end) = (headers.quad(0), headers.pair(4));
    copy(headers.pair(6), out, 0);
    copy(headers.quad(8), out, 2);
    copy(dmac, out, 6);
    copy(dmac_end, out, 10);
    copy(headers.pair(12), out, 12);
    let (src, dst) = (headers.quad(IP + 12), headers.quad(IP + 16));
    out[IP] = 0x45;
    copy(((N - IP) as u16).to_be_bytes(), out, IP + 2);
    out[IP + 6] = 0x40; // don't fragment
    out[IP + 8] = TTL;
    out[IP + 9] = proto;
    copy(dst, out, IP + 12);
    copy(src, out, IP + 16);
    let check = !checksum::fold(words::<IP, L4>(out));
    copy(check.to_ne_bytes(), out, IP + 10);
    words_of(src) + words_of(dst)
}

#[inline(always)]
fn words_of(addr: [u8; 4]) -> u32 {
    u16::from_ne_bytes([addr[0], addr[1]]) as u32 + u16::from_ne_bytes([addr[2], addr[3]]) as u32
}

/// The sum of the 16-bit words of a frame from one constant offset to another, not folded.
#[inline(always)]
fn words<const FROM: usize, const TO: usize>(frame: &[u8]) -> u32 {
    let (mut sum, mut at) = (0, FROM);
    while at + 1 < TO && at + 1 < frame.len() {
        sum += u16::from_ne_bytes([frame[at], frame[at + 1]]) as u32;
        at += 2;
    }
    sum
}

#[inline(always)]
fn copy<const N: usize>(from: [u8; N], out: &mut [u8], at: usize) {
    let mut byte = 0;
    while byte < N && at + byte < out.len() {
        out[at + byte] = from[byte];
        byte += 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::{Parsed, parse_v4};

    /// A frame of 60 bytes to 203.0.113.10:80.
    fn frame(proto: u8) -> [u8; 60] {
        let mut frame = [0u8; 60];
        frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
        frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14..24].copy_from_slice(&[0x45, 0, 0, 46, 0x12, 0x34, 0x40, 0, 64, proto]);
        frame[26..30].copy_from_slice(&[198, 51, 100, 2]);
        frame[30..34].copy_from_slice(&[203, 0, 113, 10]);
        frame[34..38].copy_from_slice(&[0x9c, 0x40, 0, 80]);
        frame
    }

    fn finished(out: &[u8], pseudo: bool) -> bool {
        let mut sum: u32 =
            out[L4..].chunks(2).map(|pair| u16::from_ne_bytes([pair[0], pair[1]]) as u32).sum();
        if pseudo {
            let addresses = out[26..34].chunks(2);
            let addresses = addresses.map(|pair| u16::from_ne_bytes([pair[0], pair[1]]) as u32).sum();
            sum += checksum::pseudo_header(addresses, TCP, (out.len() - L4) as u16) as u32;
        }
        let header: u32 =
            out[IP..L4].chunks(2).map(|pair| u16::from_ne_bytes([pair[0], pair[1]]) as u32).sum();
        checksum::fold(sum) == 0xffff && checksum::fold(header) == 0xffff
    }

    proptest! {
        #[test]
        fn a_reset_acknowledges_what_the_segment_held(seq: u32, ack: u32, flags in 0u8..0x40, options in 0u8..2) {
            let mut frame = frame(TCP);
            frame[38..42].copy_from_slice(&seq.to_be_bytes());
            frame[42..46].copy_from_slice(&ack.to_be_bytes());
            frame[46] = (5 + options) << 4;
            frame[47] = flags;
            let l4_len = 26;
            let mut out = [0; RESET_LEN];
            if !reset(&frame, l4_len, Finisher::Nobody, &mut out) {
                prop_assert!(flags & tcp::RST != 0);
                return Ok(());
            }
            prop_assert!(finished(&out, true));
            let Parsed::Packet(packet) = parse_v4(&out[..], 1) else { panic!("{out:?}") };
            prop_assert_eq!((packet.key.src, packet.key.dst), ([203, 0, 113, 10], [198, 51, 100, 2]));
            prop_assert_eq!((packet.key.sport, packet.key.dport), ([0, 80], [0x9c, 0x40]));
            prop_assert_eq!((packet.dmac, &out[6..12]), ([2, 0, 0, 0, 0, 1], &[2, 0, 0, 0, 0, 2][..]));
            let (sent_seq, sent_ack) = (&out[38..42], &out[42..46]);
            if flags & tcp::ACK != 0 {
                prop_assert_eq!((packet.tcp_flags, sent_seq, sent_ack), (tcp::RST, &ack.to_be_bytes()[..], &[0; 4][..]));
            } else {
                let payload = 6 - u32::from(options) * 4;
                let syn_fin = (flags & tcp::SYN) as u32 / 2 + (flags & tcp::FIN) as u32;
                let expected = seq.wrapping_add(payload + syn_fin).to_be_bytes();
                prop_assert_eq!((packet.tcp_flags, sent_seq, sent_ack), (tcp::RST | tcp::ACK, &[0; 4][..], &expected[..]));
            }
        }

        #[test]
        fn a_device_finishes_what_is_left_to_it(seq: u32, payload: [u8; 18]) {
            let mut segment = frame(TCP);
            segment[38..42].copy_from_slice(&seq.to_be_bytes());
            let mut out = [0; RESET_LEN];
            prop_assert!(reset(&segment, 20, Finisher::Device, &mut out));
            finish_by_device(&mut out, 16);
            prop_assert!(finished(&out, true));
            let mut datagram = frame(17);
            datagram[42..].copy_from_slice(&payload);
            let mut out = [0; UNREACHABLE_LEN];
            unreachable(&datagram, Finisher::Device, &mut out);
            finish_by_device(&mut out, 6);
            prop_assert!(finished(&out, false));
        }
    }

    /// What `skb_checksum_help` does: the sum from the transport header on, with what the field holds, goes into it.
    fn finish_by_device(out: &mut [u8], offset: usize) {
        let sum = out[L4..].chunks(2).map(|pair| u16::from_ne_bytes([pair[0], pair[1]]) as u32).sum();
        out[L4 + offset..L4 + offset + 2].copy_from_slice(&(!checksum::fold(sum)).to_ne_bytes());
    }

    #[test]
    fn an_unreachable_port_quotes_the_datagram() {
        let datagram = frame(17);
        let mut out = [0; UNREACHABLE_LEN];
        unreachable(&datagram, Finisher::Nobody, &mut out);
        assert!(finished(&out, false));
        assert_eq!((out[IP + 9], &out[L4..L4 + 2]), (ICMP, &[3, 3][..]));
        assert_eq!((&out[26..30], &out[30..34]), (&datagram[30..34], &datagram[26..30]));
        assert_eq!(out[42..], datagram[14..42]);
    }
}
