use core::cell::RefCell;
use std::{vec, vec::Vec};

use proptest::prelude::*;

use super::{
    header::{ERRORS_V4, ERRORS_V6},
    *,
};
use crate::{
    conntrack::rewrite_between,
    frame::extension,
    net::{FlowKey, Ip6, V4, V6},
};

/// A frame in memory that is written to as the kernel's are.
struct Buffer(RefCell<Vec<u8>>);

impl Frame for Buffer {
    type View<const N: usize> = [u8; N];

    fn view<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.borrow().as_slice().view(offset)
    }

    fn reaches(&self, length: usize) -> bool {
        self.0.borrow().len() >= length
    }
}

impl Patch for Buffer {
    fn put_pair(&self, at: usize, bytes: [u8; 2]) {
        self.0.borrow_mut()[at..at + 2].copy_from_slice(&bytes);
    }

    fn put_quad(&self, at: usize, bytes: [u8; 4]) {
        self.0.borrow_mut()[at..at + 4].copy_from_slice(&bytes);
    }
}

/// Headers of a family, built from their fields; every checksum over the finished bytes.
trait Build: Tunnel {
    /// An IP header, with options or extension headers, that says its packet is so long.
    fn build(src: Self::Addr, dst: Self::Addr, proto: u8, ttl: u8, extra: u8, payload: usize) -> Vec<u8>;
    fn addr(bytes: [u8; 16]) -> Self::Addr;
}

impl Build for V4 {
    fn build(src: [u8; 4], dst: [u8; 4], proto: u8, ttl: u8, extra: u8, payload: usize) -> Vec<u8> {
        let options = usize::from(extra % 11) * 4;
        let mut header = vec![0x45 + extra % 11, 0, 0, 0, 0x12, 0x34, 0x40, 0, ttl, proto, 0, 0];
        header[2..4].copy_from_slice(&((20 + options + payload) as u16).to_be_bytes());
        header.extend(src.into_iter().chain(dst));
        header.extend(vec![1; options]);
        let check = !checksum::fold(sum(&header));
        header[10..12].copy_from_slice(&check.to_ne_bytes());
        header
    }

    fn addr(bytes: [u8; 16]) -> [u8; 4] {
        [bytes[0], bytes[1], bytes[2], bytes[3]]
    }
}

impl Build for V6 {
    fn build(src: Ip6, dst: Ip6, proto: u8, ttl: u8, extra: u8, payload: usize) -> Vec<u8> {
        // Hop-by-hop options, then a fragment header of a whole packet, then destination options of 24 bytes.
        let chain: &[(u8, usize)] = match extra % 4 {
            0 => &[],
            1 => &[(extension::HOP_BY_HOP, 8)],
            2 => &[(extension::FRAGMENT, 8), (extension::DESTINATION, 24)],
            _ => &[(extension::HOP_BY_HOP, 16), (extension::FRAGMENT, 8), (extension::DESTINATION, 8)],
        };
        let len: usize = chain.iter().map(|(_, len)| len).sum();
        let mut header = vec![0x60, 0, 0, 0];
        header.extend(((len + payload) as u16).to_be_bytes());
        header.extend([chain.first().map_or(proto, |first| first.0), ttl]);
        header.extend(src.octets().into_iter().chain(dst.octets()));
        for (index, (_, len)) in chain.iter().enumerate() {
            let next = chain.get(index + 1).map_or(proto, |next| next.0);
            let mut extension = vec![0; *len];
            (extension[0], extension[1]) = (next, (len / 8 - 1) as u8);
            header.extend(extension);
        }
        header
    }

    fn addr(bytes: [u8; 16]) -> Ip6 {
        bytes.into()
    }
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u16::from_ne_bytes([pair[0], *pair.get(1).unwrap_or(&0)]) as u32).sum()
}

/// An error, and the packet that it quotes.
#[derive(Clone, Debug)]
struct Error<A> {
    from: A,
    /// The quoted packet.
    quote: FlowKey<A>,
    kind: u8,
    /// Options or extension headers of the outer header and the quoted one.
    extras: (u8, u8),
    ttl: u8,
    /// Bytes of the TCP or UDP packet, and how many of them are quoted.
    payload: Vec<u8>,
    quoted: usize,
    has_check: bool,
}

const MACS: [u8; 12] = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];

impl<A: Address> Error<A> {
    fn bytes<F: Build<Addr = A>>(&self) -> Vec<u8> {
        let key = &self.quote;
        let mut transport = [&key.sport[..], &key.dport[..], &self.payload].concat();
        let at = if key.proto == TCP { TCP_CHECK } else { UDP_CHECK };
        transport[at..at + 2].fill(0);
        if self.has_check {
            let pseudo = checksum::pseudo_header(key.addresses_sum(), key.proto, transport.len() as u16);
            let mut check = !checksum::fold(checksum::fold(sum(&transport)) as u32 + pseudo as u32);
            if key.proto == UDP && check == 0 {
                check = 0xffff;
            }
            transport[at..at + 2].copy_from_slice(&check.to_ne_bytes());
        }
        let mut quote = F::build(key.src, key.dst, key.proto, 1, self.extras.1, transport.len());
        quote.extend(&transport[..self.quoted]);
        let mut icmp = vec![self.kind, 4, 0, 0, 0, 0, 0x05, 0x14];
        icmp.extend(quote);
        let pseudo = match F::ICMP_PSEUDO_HEADER {
            true => checksum::pseudo_header(self.from.sum() + key.src.sum(), F::ICMP, icmp.len() as u16),
            false => 0,
        };
        let check = !checksum::fold(checksum::fold(sum(&icmp)) as u32 + pseudo as u32);
        icmp[2..4].copy_from_slice(&check.to_ne_bytes());
        let ip = F::build(self.from, key.src, F::ICMP, self.ttl, self.extras.0, icmp.len());
        [&MACS[..], &F::ETHERTYPE.to_be_bytes(), &ip, &icmp].concat()
    }
}

prop_compose! {
    fn errors()(
        addrs: [[u8; 16]; 3],
        ports: [[u8; 2]; 2],
        is_tcp: bool,
        has_check: bool,
        is_from_target in proptest::bool::weighted(0.3),
        kind in 0usize..4,
        outer in 0u8..2,
        extra: u8,
        ttl in 1u8..,
        payload in proptest::collection::vec(any::<u8>(), 20..600),
        quoted in 8usize..600,
    ) -> ([[u8; 16]; 3], Error<[u8; 4]>) {
        let quote = FlowKey {
            src: V4::addr(addrs[1]),
            dst: V4::addr(addrs[2]),
            sport: ports[0],
            dport: ports[1],
            proto: if is_tcp { TCP } else { UDP },
            zero: [0; 3],
        };
        // Half a checksum stays as it is.
        let quoted = if is_tcp && quoted == TCP_CHECK + 1 { TCP_CHECK } else { quoted.min(payload.len() + 4) };
        let from = V4::addr(addrs[if is_from_target { 2 } else { 0 }]);
        // An outer header of IPv6 with extensions is the kernel's.
        let extras = (outer, extra);
        let error =
            Error { from, quote, kind: kind as u8, extras, ttl, payload, quoted, has_check: is_tcp || has_check };
        (addrs, error)
    }
}

/// The same error in a family.
fn of<F: Build>(
    ([from, src, dst], error): &([[u8; 16]; 3], Error<[u8; 4]>),
    errors: &[u8],
) -> Error<F::Addr> {
    let from = if error.from == error.quote.dst { dst } else { from };
    Error {
        from: F::addr(*from),
        quote: FlowKey {
            src: F::addr(*src),
            dst: F::addr(*dst),
            sport: error.quote.sport,
            dport: error.quote.dport,
            proto: error.quote.proto,
            zero: [0; 3],
        },
        kind: errors[error.kind as usize % errors.len()],
        extras: (if F::HEADER_CHECKSUM { error.extras.0 } else { 0 }, error.extras.1),
        ttl: error.ttl,
        payload: error.payload.clone(),
        quoted: error.quoted,
        has_check: error.has_check,
    }
}

/// An error with a quote of one form becomes the error with a quote of the other, to the byte.
fn check_translation<F: Build>(
    error: &Error<F::Addr>,
    source: F::Addr,
    after: &FlowKey<F::Addr>,
) -> Result<(), TestCaseError> {
    let frame = Buffer(RefCell::new(error.bytes::<F>()));
    let mut message = Message::ZERO;
    prop_assert_eq!(parse::<F, _>(&frame, 7, &mut message), Found::Error);
    prop_assert_eq!(message.packet.key, error.quote.reversed());
    prop_assert_eq!((message.from, message.packet.ttl, message.packet.ifindex), (error.from, error.ttl, 7));
    let quote = rewrite_between(&error.quote, after);
    let hop = Hop { dmac: [0; 6], smac: [0; 6], ifindex: 0 };
    translate::<F, _>(&frame, &message, &Translation { source, quote, hop });
    let expected = Error { from: source, quote: *after, ..error.clone() };
    prop_assert_eq!(frame.0.into_inner(), expected.bytes::<F>());
    Ok(())
}

fn found<F: Build>(bytes: &[u8]) -> Found {
    let mut message = Message::ZERO;
    parse::<F, _>(bytes, 7, &mut message)
}

fn check_others<F: Build>(error: &Error<F::Addr>, others: &[u8]) -> Result<(), TestCaseError> {
    let bytes = error.bytes::<F>();
    let ip = IP + F::build(error.from, error.from, 0, 0, error.extras.0, 0).len();
    for kind in others {
        let other = Error { kind: *kind, ..error.clone() };
        prop_assert_eq!(found::<F>(&other.bytes::<F>()), Found::Other, "type {}", kind);
    }
    let stranger = FlowKey { proto: 50, ..error.quote };
    prop_assert_eq!(found::<F>(&Error { quote: stranger, ..error.clone() }.bytes::<F>()), Found::Other);
    for cut in 0..(ip + HEADER + F::LEN + PORTS).min(bytes.len()) {
        prop_assert_eq!(found::<F>(&bytes[..cut]), Found::Other, "{} bytes", cut);
    }
    let mut elsewhere = bytes.clone();
    elsewhere[IP + F::ADDRS + F::Addr::LEN] ^= 1;
    prop_assert_eq!(found::<F>(&elsewhere), Found::Other, "not to the sender of what it quotes");
    Ok(())
}

fn check_echo<F: Build>(
    src: F::Addr,
    dst: F::Addr,
    ttl: u8,
    extra: u8,
    data: &[u8],
) -> Result<(), TestCaseError> {
    let build = |src: F::Addr, dst: F::Addr, ttl, kind: u8, macs: [u8; 12]| {
        let mut icmp = [&[kind, 0, 0, 0][..], data].concat();
        let pseudo = match F::ICMP_PSEUDO_HEADER {
            true => checksum::pseudo_header(src.sum() + dst.sum(), F::ICMP, icmp.len() as u16),
            false => 0,
        };
        let check = !checksum::fold(checksum::fold(sum(&icmp)) as u32 + pseudo as u32);
        icmp[2..4].copy_from_slice(&check.to_ne_bytes());
        let ip = F::build(src, dst, F::ICMP, ttl, extra, icmp.len());
        [&macs[..], &F::ETHERTYPE.to_be_bytes(), &ip, &icmp].concat()
    };
    let frame = Buffer(RefCell::new(build(src, dst, ttl, F::ECHO_REQUEST, MACS)));
    let mut message = Message::ZERO;
    prop_assert_eq!(parse::<F, _>(&frame, 7, &mut message), Found::Echo);
    prop_assert_eq!((message.packet.key.src, message.packet.key.dst), (src, dst));
    reply::<F, _>(&frame, &message);
    let [d @ .., s0, s1, s2, s3, s4, s5] = MACS;
    let macs = [s0, s1, s2, s3, s4, s5, d[0], d[1], d[2], d[3], d[4], d[5]];
    prop_assert_eq!(frame.0.into_inner(), build(dst, src, answer::TTL, F::ECHO_REPLY, macs));
    Ok(())
}

proptest! {
    #[test]
    fn a_translated_error_is_the_one_about_the_other_packet(
        error in errors(),
        source: [u8; 16],
        addrs: [[u8; 16]; 2],
        ports: [[u8; 2]; 2],
    ) {
        let after = FlowKey {
            src: V4::addr(addrs[0]),
            dst: V4::addr(addrs[1]),
            sport: ports[0],
            dport: ports[1],
            proto: error.1.quote.proto,
            zero: [0; 3],
        };
        check_translation::<V4>(&of::<V4>(&error, &ERRORS_V4), V4::addr(source), &after)?;
        let after = FlowKey {
            src: addrs[0].into(),
            dst: addrs[1].into(),
            sport: ports[0],
            dport: ports[1],
            proto: after.proto,
            zero: [0; 3],
        };
        check_translation::<V6>(&of::<V6>(&error, &ERRORS_V6), source.into(), &after)?;
    }

    #[test]
    fn what_quotes_nothing_of_ours_is_left_alone(error in errors()) {
        // Redirect, timestamp, router advertisement; those of IPv6 for groups, neighbours and redirects.
        check_others::<V4>(&of::<V4>(&error, &ERRORS_V4), &[0, 4, 5, 9, 13, 18])?;
        check_others::<V6>(&of::<V6>(&error, &ERRORS_V6), &[0, 5, 127, 129, 130, 133, 134, 135, 136, 137])?;
    }

    #[test]
    fn an_echo_is_answered_with_its_own_data(
        addrs: [[u8; 16]; 2],
        ttl: u8,
        extra in 0u8..3,
        data in proptest::collection::vec(any::<u8>(), 4..1400),
    ) {
        check_echo::<V4>(V4::addr(addrs[0]), V4::addr(addrs[1]), ttl, extra, &data)?;
        check_echo::<V6>(addrs[0].into(), addrs[1].into(), ttl, 0, &data)?;
    }

    #[test]
    fn no_frame_makes_the_parser_read_or_promise_what_is_not_there(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), is_v6: bool) {
        if let Some(ip) = bytes.get_mut(IP) {
            *ip = if is_v6 { 0x60 } else { 0x45 };
        }
        let check = |found: Found, packet: (u8, u8, u8)| {
            let (at, ports_at, check_at) = (packet.0 as usize, packet.1 as usize, packet.2 as usize);
            let end = bytes.len();
            assert!(found != Found::Error || (at + HEADER <= end && ports_at + 4 <= end && check_at + 2 <= end));
        };
        let mut message = Message::ZERO;
        let found = parse::<V4, _>(bytes.as_slice(), 1, &mut message);
        check(found, (message.packet.l4_offset, message.ports_at, message.check_at));
        let mut message = Message::ZERO;
        let found = parse::<V6, _>(bytes.as_slice(), 1, &mut message);
        check(found, (message.packet.l4_offset, message.ports_at, message.check_at));
    }
}

#[test]
fn later_fragments_are_of_nobody() {
    let quote = FlowKey {
        src: [198, 51, 100, 2],
        dst: [10, 0, 0, 1],
        sport: [1, 1],
        dport: [0, 80],
        proto: UDP,
        zero: [0; 3],
    };
    let (payload, extras) = (vec![7; 30], (0, 0));
    let error =
        Error { from: [10, 0, 0, 9], quote, kind: 3, extras, ttl: 9, payload, quoted: 20, has_check: true };
    let with = |at: usize, fragment: [u8; 2]| {
        let mut bytes = error.bytes::<V4>();
        bytes[at + 6..at + 8].copy_from_slice(&fragment);
        found::<V4>(&bytes)
    };
    let quote_at = IP + 20 + HEADER;
    assert_eq!(with(quote_at, [0x20, 0]), Found::Error, "a first fragment has ports");
    assert_eq!(with(quote_at, [0x20, 1]), Found::Other);
    assert_eq!(with(quote_at, [0, 9]), Found::Other);
    assert_eq!(with(IP, [0x20, 0]), Found::Other, "the error itself is a fragment");
}
