use std::{vec, vec::Vec};

use proptest::prelude::*;

use super::*;

const IP: usize = EthHdr::LEN;
const PORTS: [u8; 4] = [0x9c, 0x40, 0, 53];

/// A fragment of IPv4 with an offset in units of eight bytes.
fn v4(proto: u8, offset: u16, has_more: bool, body: &[u8]) -> Vec<u8> {
    let [o0, o1] = (offset | if has_more { 0x2000 } else { 0 }).to_be_bytes();
    let [l0, l1] = (20 + body.len() as u16).to_be_bytes();
    let ip = [0x45, 0xb8, l0, l1, 0x12, 0x34, o0, o1, 64, proto, 0, 0, 198, 51, 100, 2, 203, 0, 113, 10];
    [&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0][..], &ip, body].concat()
}

/// The same of IPv6, with headers before the one of the fragment, whose types are named first.
fn v6(types: &[u8], before: &[u8], next: u8, offset: u16, has_more: bool, body: &[u8]) -> Vec<u8> {
    let [l0, l1] = (before.len() as u16 + 8 + body.len() as u16).to_be_bytes();
    let first = types.first().copied().unwrap_or(extension::FRAGMENT);
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x86, 0xdd];
    frame.extend([0x6b, 0x80, 0, 0, l0, l1, first, 64]);
    frame.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10]);
    frame.extend(before);
    let [o0, o1] = (offset << 3 | u16::from(has_more)).to_be_bytes();
    frame.extend([next, 0, o0, o1, 0xca, 0xfe, 0x12, 0x34]);
    frame.extend(body);
    frame
}

fn parse<F: Fragmented>(frame: &[u8]) -> Option<(Packet<F::Addr>, FragmentKey<F::Addr>)> {
    let (mut packet, mut key) = (Packet::ZERO, FragmentKey::ZERO);
    F::parse_fragment(frame, 7, &mut packet, &mut key).then_some((packet, key))
}

fn body(proto: u8) -> Vec<u8> {
    let mut body = PORTS.to_vec();
    body.resize(32, 0);
    body[if proto == TCP { TCP_FLAGS_AT } else { 5 }] = if proto == TCP { tcp::SYN } else { 32 };
    body
}

const TCP_FLAGS_AT: usize = 13;

#[test]
fn the_first_fragment_tells_its_ports_and_a_later_one_does_not() {
    for proto in [TCP, UDP] {
        let (first, key) = parse::<V4>(&v4(proto, 0, true, &body(proto))).expect("a first fragment");
        assert_eq!((first.key.sport, first.key.dport), ([0x9c, 0x40], [0, 53]));
        assert_eq!((first.l4_offset as usize, first.l4_len, first.total_len), (IP + 20, 32, 52));
        assert_eq!((first.ttl, first.tos, first.ifindex, first.dmac), (64, 0xb8, 7, [2, 0, 0, 0, 0, 2]));
        assert_eq!(first.tcp_flags, if proto == TCP { tcp::SYN } else { 0 });
        assert!(!first.is_later_fragment());
        assert_eq!((key.id, key.proto), ([0x12, 0x34, 0, 0], proto));
        for has_more in [true, false] {
            let (later, same) = parse::<V4>(&v4(proto, 4, has_more, &[0xff; 5])).expect("a later fragment");
            assert_eq!(same, key);
            assert!(later.is_later_fragment());
            assert_eq!((later.key.sport, later.key.dport), ([0; 2], [0; 2]));
            assert_eq!(later.tcp_flags, if proto == TCP { tcp::ACK } else { 0 }, "no opener");
        }
    }
}

#[test]
fn fragments_of_ipv6_are_found_behind_other_headers() {
    let options = [extension::FRAGMENT, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for (types, before) in
        [(&[][..], &[][..]), (&[extension::HOP_BY_HOP], &options), (&[extension::DESTINATION], &options)]
    {
        let (first, key) =
            parse::<V6>(&v6(types, before, UDP, 0, true, &body(UDP))).expect("a first fragment");
        assert_eq!((first.key.sport, first.key.dport), ([0x9c, 0x40], [0, 53]));
        assert_eq!(first.l4_offset as usize, IP + 40 + before.len() + 8);
        assert_eq!((first.l4_len, first.total_len as usize), (32, 40 + before.len() + 8 + 32));
        assert_eq!((first.tos, key.id, key.proto), (0xb8, [0xca, 0xfe, 0x12, 0x34], UDP));
        let (later, same) = parse::<V6>(&v6(types, before, UDP, 9, false, &[1])).expect("a later fragment");
        assert!(later.is_later_fragment() && same == key);
    }
}

#[test]
fn what_is_whole_or_of_another_protocol_or_too_short_is_no_fragment_of_ours() {
    let nothing = [
        v4(UDP, 0, false, &body(UDP)),
        v4(1, 0, true, &body(UDP)),
        v4(UDP, 0, true, &PORTS),
        v4(TCP, 0, true, &[0; 16]),
    ];
    for frame in nothing {
        assert_eq!(parse::<V4>(&frame), None, "{frame:?}");
    }
    let cut = v4(UDP, 9, true, &[0; 64]);
    assert_eq!(parse::<V4>(&cut[..cut.len() - 1]), None, "a packet longer than its frame");
    let nothing = [
        v6(&[], &[], UDP, 0, false, &body(UDP)),
        v6(&[], &[], 58, 0, true, &body(UDP)),
        v6(&[], &[], UDP, 0, true, &PORTS),
        v6(&[43], &[extension::FRAGMENT, 0, 0, 0, 0, 0, 0, 0], UDP, 0, true, &body(UDP)),
    ];
    for frame in nothing {
        assert_eq!(parse::<V6>(&frame), None, "{frame:?}");
    }
}

fn agrees<F: Fragmented>(frame: &[u8]) {
    let whole = F::parse(frame, 7);
    if parse::<F>(frame).is_some() {
        assert_eq!(whole, crate::frame::Parsed::Fragment, "{frame:?}");
    }
}

proptest! {
    #[test]
    fn whatever_parses_as_a_fragment_is_none_to_the_parser_of_packets(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..160),
        is_v6: bool,
        proto in prop_oneof![Just(TCP), Just(UDP), Just(extension::FRAGMENT), Just(0), any::<u8>()],
    ) {
        // Headers that lead somewhere.
        if bytes.len() > 60 {
            let (ethertype, version, proto_at, len_at, len) =
                if is_v6 { (V6::ETHERTYPE, 0x60, 6, 4, bytes.len() - 54) } else { (V4::ETHERTYPE, 0x45, 9, 2, bytes.len() - 14) };
            bytes[12..14].copy_from_slice(&ethertype.to_be_bytes());
            bytes[14] = version;
            bytes[14 + proto_at] = proto;
            bytes[14 + len_at..][..2].copy_from_slice(&(len as u16).to_be_bytes());
        }
        agrees::<V4>(&bytes);
        agrees::<V6>(&bytes);
    }
}
