//! What ICMP asks of the headers of each family, in a frame and in a quote.

use core::mem::offset_of;

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use super::Patch;
use crate::{
    answer::Answer,
    frame::{EXTENSION_LEN_MIN, EXTENSIONS_LEN_MAX, EXTENSIONS_MAX, Frame, View, address, extension},
    net::{Ip6, V4, V6},
};

/// What an IP header says, with the extension headers behind it.
pub struct Header<A> {
    pub(crate) src: A,
    pub(crate) dst: A,
    pub(crate) proto: u8,
    pub(crate) is_fragment: bool,
    /// Length up to what it carries, in bytes.
    pub(crate) len: usize,
    /// Length of the whole packet, in bytes.
    pub(crate) total_len: u16,
    pub(crate) tos: u8,
    pub(crate) ttl: u8,
}

/// ICMP of a family.
pub trait Icmp: Answer {
    /// Type of an echo request.
    const ECHO_REQUEST: u8;
    /// Type of the reply to it.
    const ECHO_REPLY: u8;
    /// Type of "time exceeded".
    const HOPS_USED_UP: u8;
    /// Offset of the source address in an IP header; the destination follows.
    const ADDRS: usize;
    /// Offset of the number of what an IP header is followed by.
    const PROTO: usize;
    /// Offset of the word that holds the time to live, or hop limit, in an IP header; the protocol is the rest of it.
    const TTL: usize;
    /// Offset of the checksum of the IP header, where there is one.
    const CHECK: Option<usize>;
    /// The word at that offset, of an ICMP packet.
    fn ttl(ttl: u8) -> [u8; 2];
    /// Whether a type is that of an error that quotes a packet.
    fn is_error(kind: u8) -> bool;
    /// Reads an IP header; nothing for later fragments, which have no ports.
    fn read<R: Frame + ?Sized>(frame: &R, at: usize) -> Option<Header<Self::Addr>>;
    /// Reads the destination of an IP header, whatever else it says.
    fn destination<R: Frame + ?Sized>(frame: &R, at: usize) -> Option<Self::Addr>;
    /// Writes an address.
    fn put_addr<P: Patch>(frame: &P, at: usize, addr: Self::Addr);
}

/// Types that quote a packet (RFC 792): destination unreachable, of which "fragmentation needed" is one, time exceeded,
/// parameter problem. A redirect is for the sender's own routing.
pub(super) const ERRORS_V4: [u8; 3] = [3, 11, 12];
/// Types that quote a packet (RFC 4443): destination unreachable, packet too big, time exceeded, parameter problem.
pub(super) const ERRORS_V6: [u8; 4] = [1, 2, 3, 4];

impl Icmp for V4 {
    const ECHO_REQUEST: u8 = 8;
    const ECHO_REPLY: u8 = 0;
    const HOPS_USED_UP: u8 = ERRORS_V4[1];
    const ADDRS: usize = offset_of!(Ipv4Hdr, src_addr);
    const PROTO: usize = offset_of!(Ipv4Hdr, proto);
    const TTL: usize = offset_of!(Ipv4Hdr, ttl);
    const CHECK: Option<usize> = Some(offset_of!(Ipv4Hdr, check));

    #[inline(always)] // a constant
    fn ttl(ttl: u8) -> [u8; 2] {
        [ttl, Self::ICMP]
    }

    #[inline(always)] // three comparisons
    fn is_error(kind: u8) -> bool {
        let [a, b, c] = ERRORS_V4;
        kind == a || kind == b || kind == c
    }

    #[inline(always)] // bounds proofs do not survive a call
    fn read<R: Frame + ?Sized>(frame: &R, at: usize) -> Option<Header<[u8; 4]>> {
        let ip = frame.view::<{ Ipv4Hdr::LEN }>(at)?;
        let vihl = ip.u8(0);
        let len = ((vihl & 0x0f) as usize) << 2;
        let fragment = u16::from_be_bytes(ip.pair(offset_of!(Ipv4Hdr, frags)));
        if vihl >> 4 != 4 || len < Ipv4Hdr::LEN || fragment & 0x1fff != 0 {
            return None;
        }
        Some(Header {
            src: ip.quad(offset_of!(Ipv4Hdr, src_addr)),
            dst: ip.quad(offset_of!(Ipv4Hdr, dst_addr)),
            proto: ip.u8(offset_of!(Ipv4Hdr, proto)),
            is_fragment: fragment & 0x3fff != 0,
            len,
            total_len: u16::from_be_bytes(ip.pair(offset_of!(Ipv4Hdr, tot_len))),
            tos: ip.u8(offset_of!(Ipv4Hdr, tos)),
            ttl: ip.u8(offset_of!(Ipv4Hdr, ttl)),
        })
    }

    #[inline(always)] // one load
    fn destination<R: Frame + ?Sized>(frame: &R, at: usize) -> Option<[u8; 4]> {
        Some(frame.view::<4>(at + offset_of!(Ipv4Hdr, dst_addr))?.quad(0))
    }

    #[inline(always)] // one store
    fn put_addr<P: Patch>(frame: &P, at: usize, addr: [u8; 4]) {
        frame.put_quad(at, addr);
    }
}

impl Icmp for V6 {
    const ECHO_REQUEST: u8 = 128;
    const ECHO_REPLY: u8 = 129;
    const HOPS_USED_UP: u8 = ERRORS_V6[2];
    const ADDRS: usize = offset_of!(Ipv6Hdr, src_addr);
    const PROTO: usize = offset_of!(Ipv6Hdr, next_hdr);
    const TTL: usize = offset_of!(Ipv6Hdr, next_hdr);
    const CHECK: Option<usize> = None;

    #[inline(always)] // a constant
    fn ttl(ttl: u8) -> [u8; 2] {
        [Self::ICMP, ttl]
    }

    #[inline(always)] // two comparisons
    fn is_error(kind: u8) -> bool {
        let [first, .., last] = ERRORS_V6;
        kind >= first && kind <= last
    }

    #[inline(always)] // bounds proofs do not survive a call
    fn read<R: Frame + ?Sized>(frame: &R, at: usize) -> Option<Header<Ip6>> {
        let ip = frame.view::<{ Ipv6Hdr::LEN }>(at)?;
        let first = ip.quad(0);
        let payload_len = u16::from_be_bytes(ip.pair(offset_of!(Ipv6Hdr, payload_len)));
        let (mut proto, mut len) = (ip.u8(offset_of!(Ipv6Hdr, next_hdr)), Ipv6Hdr::LEN);
        if first[0] >> 4 != 6 {
            return None;
        }
        let (mut is_fragment, mut step) = (false, 0);
        while step < EXTENSIONS_MAX {
            let is_fragment_header = proto == extension::FRAGMENT;
            // Hop-by-hop options come first or not at all (RFC 8200, section 4.1).
            let is_option = (proto == extension::HOP_BY_HOP && step == 0) || proto == extension::DESTINATION;
            if !is_fragment_header && !is_option {
                break;
            }
            let header = frame.view::<EXTENSION_LEN_MIN>(at + len)?;
            let mut units = header.u8(1) as usize;
            if is_fragment_header {
                let fragment = u16::from_be_bytes(header.pair(2));
                if fragment & 0xfff8 != 0 {
                    return None;
                }
                is_fragment |= fragment & 1 != 0;
                units = 0;
            }
            len += (units + 1) * EXTENSION_LEN_MIN;
            if len > Ipv6Hdr::LEN + EXTENSIONS_LEN_MAX {
                return None;
            }
            proto = header.u8(0);
            step += 1;
        }
        Some(Header {
            src: address(&ip, offset_of!(Ipv6Hdr, src_addr)),
            dst: address(&ip, offset_of!(Ipv6Hdr, dst_addr)),
            proto,
            is_fragment,
            len,
            total_len: payload_len.saturating_add(Ipv6Hdr::LEN as u16),
            tos: first[0] << 4 | first[1] >> 4,
            ttl: ip.u8(offset_of!(Ipv6Hdr, hop_limit)),
        })
    }

    #[inline(always)] // four loads
    fn destination<R: Frame + ?Sized>(frame: &R, at: usize) -> Option<Ip6> {
        Some(address(&frame.view::<{ Ipv6Hdr::LEN }>(at)?, offset_of!(Ipv6Hdr, dst_addr)))
    }

    #[inline(always)] // four stores
    fn put_addr<P: Patch>(frame: &P, at: usize, addr: Ip6) {
        let [a, b, c, d] = addr.words().map(u32::to_ne_bytes);
        frame.put_quad(at, a);
        frame.put_quad(at + 4, b);
        frame.put_quad(at + 8, c);
        frame.put_quad(at + 12, d);
    }
}
