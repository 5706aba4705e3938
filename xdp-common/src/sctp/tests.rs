use std::{vec, vec::Vec};

use proptest::prelude::*;

use super::*;
use crate::net::{Ip6, V4, V6};

/// CRC32c bit by bit, as RFC 9260 defines it: over the packet with a checksum of zero, lowest byte first.
fn crc32c(packet: &[u8]) -> [u8; 4] {
    let mut crc = u32::MAX;
    for (at, byte) in packet.iter().enumerate() {
        crc ^= u32::from(if (CHECK..HEADER).contains(&at) { 0 } else { *byte });
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { POLYNOMIAL } else { 0 };
        }
    }
    (!crc).to_le_bytes()
}

fn with_checksum(mut packet: Vec<u8>) -> Vec<u8> {
    let check = crc32c(&packet);
    packet[CHECK..HEADER].copy_from_slice(&check);
    packet
}

#[test]
fn the_checksum_is_crc32c() {
    // RFC 3720, appendix B.4, with the bytes of the checksum outside what is known to be zero.
    let mut crc = u32::MAX;
    for _ in 0..8 {
        crc = product(crc, ONE_WORD);
    }
    assert_eq!((!crc).to_le_bytes(), [0xaa, 0x36, 0x91, 0x8a], "32 bytes of zeros");
    let packet = with_checksum(vec![1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 6, 1, 0, 4]);
    let words: Vec<u32> = packet.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    assert_eq!(checksum_of(words[0], words[1], 0, words[3]).to_le_bytes(), packet[CHECK..HEADER]);
}

proptest! {
    #[test]
    fn a_checksum_follows_the_ports_whatever_the_length(
        before in proptest::collection::vec(any::<u8>(), 16..3_000), ports: [u8; 4], error: [u8; 4],
    ) {
        let before = with_checksum(before);
        let mut after = before.clone();
        after[..4].copy_from_slice(&ports);
        let old: [u8; 4] = before[..4].try_into().unwrap();
        let delta = checksum_delta(old, ports, before.len() as u16);
        let check: [u8; 4] = before[CHECK..HEADER].try_into().unwrap();
        prop_assert_eq!(updated(check, delta), crc32c(&after));
        // What was wrong by so much still is.
        prop_assert_eq!(updated(updated(check, error), delta), updated(crc32c(&after), error));
    }
}

#[test]
fn the_longest_packet_is_no_exception() {
    for len in [usize::from(u16::MAX), 65_280, 512, 256, 255] {
        let before = with_checksum((0..len).map(|at| at as u8).collect());
        let mut after = before.clone();
        after[..4].copy_from_slice(&[0x9c, 0x40, 0x1f, 0x90]);
        let delta = checksum_delta([0, 1, 2, 3], [0x9c, 0x40, 0x1f, 0x90], len as u16);
        assert_eq!(updated(before[CHECK..HEADER].try_into().unwrap(), delta), crc32c(&after), "{len} bytes");
    }
}

/// A frame of IPv4 or IPv6 around an SCTP packet, between addresses that end in 1 and 2.
fn frame(is_v4: bool, packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    if is_v4 {
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((20 + packet.len() as u16).to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, SCTP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((packet.len() as u16).to_be_bytes());
        frame.extend([SCTP, 64]);
        for last in [1, 2] {
            frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        }
    }
    frame.extend(packet);
    frame
}

/// A packet with these chunks, each with a value of some bytes.
fn packet(chunks: &[(u8, usize)]) -> Vec<u8> {
    let mut packet = vec![0x9c, 0x40, 0x0b, 0x59, 0xaa, 0xbb, 0xcc, 0xdd, 0, 0, 0, 0];
    for (kind, len) in chunks {
        packet.extend([*kind, 0]);
        packet.extend((4 + *len as u16).to_be_bytes());
        packet.resize(packet.len() + len.next_multiple_of(4), 0x11);
    }
    with_checksum(packet)
}

fn read(is_v4: bool, frame: &[u8]) -> Option<(u8, u16, bool)> {
    fn of<F: Icmp>(frame: &[u8]) -> Option<Packet<F::Addr>> {
        let mut packet = Packet::ZERO;
        parse::<F, _>(frame, 3, &mut packet).then_some(packet)
    }
    if is_v4 {
        of::<V4>(frame).map(|packet| (packet.tcp_flags, packet.l4_len, packet.looks_offloaded()))
    } else {
        of::<V6>(frame).map(|packet| (packet.tcp_flags, packet.l4_len, packet.looks_offloaded()))
    }
}

#[test]
fn chunks_are_told_in_the_terms_of_tcp() {
    const HEARTBEAT: u8 = 4;
    const SACK: u8 = 3;
    const COOKIE_ECHO: u8 = 10;
    let cases: [(&[(u8, usize)], u8); 11] = [
        (&[(chunk::INIT, 16)], tcp::SYN),
        (&[(chunk::INIT_ACK, 200)], tcp::SYN | tcp::ACK),
        (&[(COOKIE_ECHO, 100), (chunk::DATA, 13)], tcp::ACK),
        (&[(chunk::COOKIE_ACK, 0)], tcp::ACK),
        (&[(chunk::DATA, 1_000)], tcp::ACK),
        (&[(HEARTBEAT, 41)], tcp::ACK),
        (&[(chunk::SHUTDOWN, 4)], tcp::FIN | tcp::ACK),
        (&[(SACK, 13), (chunk::SHUTDOWN, 4)], tcp::FIN | tcp::ACK),
        (&[(chunk::SHUTDOWN_ACK, 0)], tcp::FIN | tcp::ACK),
        (&[(chunk::ERROR, 9), (chunk::ABORT, 0)], tcp::RST | tcp::ACK),
        (&[(chunk::DATA, 5), (chunk::ABORT, 0)], tcp::ACK),
    ];
    for (chunks, flags) in cases {
        let packet = packet(chunks);
        for is_v4 in [true, false] {
            let expected = Some((flags, packet.len() as u16, false));
            assert_eq!(read(is_v4, &frame(is_v4, &packet)), expected, "{chunks:?}");
        }
    }
}

#[test]
fn a_checksum_of_zero_is_left_to_the_device_and_what_is_cut_short_to_the_kernel() {
    let mut unfinished = packet(&[(chunk::DATA, 20)]);
    unfinished[CHECK..HEADER].fill(0);
    for is_v4 in [true, false] {
        let whole = frame(is_v4, &unfinished);
        assert_eq!(read(is_v4, &whole), Some((tcp::ACK, unfinished.len() as u16, true)));
        for len in 0..whole.len() {
            assert_eq!(read(is_v4, &whole[..len]), None, "{len} bytes");
        }
        assert_eq!(read(is_v4, &frame(is_v4, &unfinished[..HEADER])), None, "no chunk");
        // A chunk of no length ends the walk.
        let mut broken = unfinished.clone();
        broken[HEADER + 2..][..2].fill(0);
        assert!(read(is_v4, &frame(is_v4, &broken)).is_some());
    }
    let mut fragment = frame(true, &unfinished);
    fragment[IP + 6] = 0x20;
    assert_eq!(read(true, &fragment), None, "a fragment");
}

#[test]
fn who_is_refused_is_answered_as_one_of_no_association() {
    let tag = [0xaa, 0xbb, 0xcc, 0xdd];
    let cases = [
        (chunk::INIT, Some((chunk::ABORT, 0, [0x11; 4]))),
        (chunk::DATA, Some((chunk::ABORT, 1, tag))),
        (chunk::SHUTDOWN, Some((chunk::ABORT, 1, tag))),
        (chunk::SHUTDOWN_ACK, Some((chunk::SHUTDOWN_COMPLETE, 1, tag))),
        (chunk::ABORT, None),
        (chunk::SHUTDOWN_COMPLETE, None),
        (chunk::COOKIE_ACK, None),
        (chunk::ERROR, None),
    ];
    for (kind, expected) in cases {
        check_answer::<V4>(&frame(true, &packet(&[(kind, 16)])), kind, expected);
        check_answer::<V6>(&frame(false, &packet(&[(kind, 16)])), kind, expected);
    }
}

fn check_answer<F: Icmp>(sent: &[u8], kind: u8, expected: Option<(u8, u8, [u8; 4])>) {
    let mut headers = [0; 80];
    headers[..abort_len::<F>()].copy_from_slice(&sent[..abort_len::<F>()]);
    let initiate = sent[abort_len::<F>()..].first_chunk().copied().unwrap_or_default();
    let mut out = vec![0; abort_len::<F>()];
    let is_answered = abort::<F, _>(&headers, initiate, Finisher::Nobody, &mut out);
    assert_eq!(is_answered, expected.is_some(), "chunk {kind}");
    let without = abort::<F, _>(&headers, [0; 4], Finisher::Nobody, &mut out.clone());
    assert_eq!(without, expected.is_some() && kind != chunk::INIT, "chunk {kind}");
    let Some((answer, flags, tag)) = expected else { return };
    let l4 = IP + F::LEN;
    let plain = [0x0b, 0x59, 0x9c, 0x40, tag[0], tag[1], tag[2], tag[3], 0, 0, 0, 0, answer, flags, 0, 4];
    assert_eq!(out[l4..], with_checksum(plain.to_vec()), "chunk {kind}");
    assert_eq!((&out[..6], &out[6..12]), (&sent[6..12], &sent[..6]));
    let mut back = Packet::<F::Addr>::ZERO;
    assert!(parse::<F, _>(&out[..], 3, &mut back), "it is SCTP itself");
    assert!(!back.looks_offloaded());
    let mut left = vec![0; abort_len::<F>()];
    abort::<F, _>(&headers, initiate, Finisher::Device, &mut left);
    assert_eq!(left[l4 + CHECK..l4 + HEADER], [0; 4], "the device writes it");
}

#[test]
fn addresses_and_ports_are_where_they_are_in_any_packet() {
    let mut v4 = Packet::<[u8; 4]>::ZERO;
    assert!(parse::<V4, _>(&frame(true, &packet(&[(chunk::INIT, 16)]))[..], 3, &mut v4));
    let key = v4.key;
    assert_eq!((key.src, key.dst, key.proto), ([10, 0, 0, 1], [10, 0, 0, 2], SCTP));
    assert_eq!((key.sport, key.dport), (40_000u16.to_be_bytes(), 2_905u16.to_be_bytes()));
    assert_eq!((v4.dmac, v4.ttl, v4.ifindex, v4.l4_offset), ([2, 0, 0, 0, 0, 2], 64, 3, 34));
    let mut v6 = Packet::<Ip6>::ZERO;
    assert!(parse::<V6, _>(&frame(false, &packet(&[(chunk::INIT, 16)]))[..], 3, &mut v6));
    assert_eq!((v6.key.sport, v6.key.dport, v6.l4_offset), (key.sport, key.dport, 54));
}
