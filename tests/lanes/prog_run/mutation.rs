//! Frames that are almost right: every field that a parser looks at takes the values that it may trip over.

use xdp_common::net::{TCP, UDP};

use crate::{
    dice::Dice,
    family::Family,
    frames::{ETHERNET, Frame, words_sum},
    world::HOSTS,
};

/// Mutations of a frame at a time.
const MUTATIONS_MAX: usize = 3;
/// Protocols and extension headers that mean something to somebody (IANA protocol numbers).
const PROTOCOLS: [u8; 14] = [0, 1, 4, 6, 17, 41, 43, 44, 50, 51, 58, 59, 60, 132];
/// Values at the edges of what a length may be.
const EDGES: [u16; 12] = [0, 1, 7, 8, 19, 20, 27, 28, 39, 40, 1_500, u16::MAX];

/// The bytes of a frame after some mutations.
pub(crate) fn mutated(dice: &mut Dice, frame: &Frame) -> Vec<u8> {
    let mut frame = frame.clone();
    if frame.family == Family::V6 && dice.once_in(3) {
        for _ in 0..=dice.below(5) {
            frame.extensions.push(extension(dice));
        }
    }
    let mut bytes = frame.bytes();
    let l4 = ETHERNET + frame.total_len() - frame.payload.len() - crate::frames::l4_header_len(frame.proto);
    for _ in 0..=dice.below(MUTATIONS_MAX) {
        mutate(dice, frame.family, l4, &mut bytes);
    }
    if frame.family == Family::V4 && dice.once_in(2) {
        repair(&mut bytes);
    }
    bytes
}

/// An extension header, mostly a sound one.
fn extension(dice: &mut Dice) -> (u8, Vec<u8>) {
    let number = dice.of(&[0, 0, 60, 60, 60, 44, 43, 51, 59]);
    let units = dice.of(&[0, 0, 0, 1, 2, 7, 8]);
    let mut body = vec![0; 7 + 8 * usize::from(units)];
    if number == 44 {
        // Reserved byte, offset and flags; a whole packet more often than not.
        body = vec![0, 0, dice.of(&[0, 0, 0, 1, 6, 8]), 0, 0, 0, dice.byte()];
    } else {
        body[0] = if dice.once_in(8) { dice.byte() } else { units };
    }
    (number, body)
}

/// Changes one thing in a frame whose transport header is at an offset.
pub(crate) fn mutate(dice: &mut Dice, family: Family, l4: usize, bytes: &mut Vec<u8>) {
    let (len_at, proto_at, addrs) = match family {
        Family::V4 => (ETHERNET + 2, ETHERNET + 9, ETHERNET + 12),
        Family::V6 => (ETHERNET + 4, ETHERNET + 6, ETHERNET + 8),
    };
    match dice.below(20) {
        // The link.
        0 => put(
            bytes,
            12,
            &dice.of(&[[0x08, 0], [0x86, 0xdd], [0x08, 0x06], [0x81, 0], [0x88, 0xa8], [0, 46]]),
        ),
        1 => {
            let tag = [0x81, 0, 0, dice.byte()];
            bytes.splice(12..12, tag);
        }
        2 => put(bytes, dice.below(12), &[dice.byte()]),
        // Version and header length, and what is beside them.
        3 => put(bytes, ETHERNET, &[dice.byte()]),
        4 => put(bytes, ETHERNET, &[0x40 | dice.below(16) as u8]),
        5 => put(bytes, ETHERNET + dice.below(8), &[dice.byte()]),
        // Lengths, of the packet and of its frame.
        6 => put(bytes, len_at, &dice.of(&EDGES).to_be_bytes()),
        7 => {
            let by = dice.of(&[1u16, 2, u16::MAX, 8, 0u16.wrapping_sub(8)]);
            let old = u16::from_be_bytes([
                bytes.get(len_at).copied().unwrap_or(0),
                bytes.get(len_at + 1).copied().unwrap_or(0),
            ]);
            put(bytes, len_at, &old.wrapping_add(by).to_be_bytes());
        }
        8 => bytes.truncate(ETHERNET.max(dice.below(bytes.len() + 1))),
        9 => bytes.truncate(ETHERNET.max(bytes.len() - dice.below(9).min(bytes.len()))),
        10 => bytes.extend(std::iter::repeat_n(dice.byte(), dice.below(70))),
        // Fragments, time to live, protocol.
        11 => {
            let field = dice.of(&[0x2000u16, 0x4000, 0x8000, 0x1fff, 1, 0x2001]);
            put(bytes, ETHERNET + 6, &field.to_be_bytes());
        }
        12 => put(bytes, ETHERNET + 7 + dice.below(2), &dice.of(&[[0], [1], [2], [255]])),
        13 => put(bytes, proto_at, &dice.of(&PROTOCOLS.map(|number| [number]))),
        14 => put(bytes, proto_at, &dice.of(&[[TCP], [UDP]])),
        // Another host, and both of them turned round.
        15 => {
            let host = family.octets(dice.of(&HOSTS));
            let at = addrs + dice.below(2) * host.len();
            put(bytes, at, &host);
        }
        16 => {
            let len = family.octets(HOSTS[0]).len();
            if bytes.len() >= addrs + 2 * len {
                bytes[addrs..addrs + 2 * len].rotate_left(len);
            }
            if bytes.len() >= l4 + 4 {
                bytes[l4..l4 + 4].rotate_left(2);
            }
        }
        // Ports, checksum, flags and lengths of the transport.
        17 => put(bytes, l4 + 2 * dice.below(2), &dice.of(&[80u16, 81, 8080, 2_000, 0]).to_be_bytes()),
        18 => put(bytes, l4 + dice.of(&[6, 16]), &dice.of(&[[0u8, 0], [0xff, 0xff], [0x12, 0x34]])),
        _ => put(bytes, l4 + 4 + dice.below(16), &[dice.byte()]),
    }
}

/// Overwrites what of these bytes lies within the frame.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (byte, value) in bytes.iter_mut().skip(at).zip(value) {
        *byte = *value;
    }
}

/// Makes the checksum of an IPv4 header right again, where there is one.
pub(crate) fn repair(bytes: &mut [u8]) {
    let Some(header) = bytes.get_mut(ETHERNET..) else { return };
    let len = header.first().map_or(0, |first| usize::from(first & 0x0f) * 4);
    if len < 20 || header.len() < len {
        return;
    }
    header[10..12].fill(0);
    let check = !words_sum(&header[..len]);
    header[10..12].copy_from_slice(&check.to_be_bytes());
}
