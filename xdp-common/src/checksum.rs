//! The Internet checksum, updated incrementally (RFC 1071, RFC 1624).
//!
//! A delta is the folded one's-complement sum of (new − old) over the words that change. It is computed once, when a
//! flow is made, and added to the checksum of each of its packets. Words are taken in native order throughout: the
//! one's-complement sum does not care, as long as nobody mixes orders.

/// Folds a sum of 16-bit words into 16 bits.
#[inline(always)] // a few instructions on the hot path
pub fn fold(sum: u32) -> u16 {
    let sum = (sum >> 16) + (sum & 0xffff);
    ((sum >> 16) + (sum & 0xffff)) as u16
}

/// The delta of words whose sums are `old` before and `new` after a change (RFC 1624, equation 3).
#[inline(always)]
pub fn delta(old: u32, new: u32) -> u16 {
    fold(fold(new) as u32 + (!fold(old)) as u32)
}

/// The sum of two deltas.
#[inline(always)]
pub fn add(a: u16, b: u16) -> u16 {
    fold(a as u32 + b as u32)
}

/// The checksum after `delta`, where `check` is a finished checksum (the complement of the sum).
#[inline(always)]
pub fn update(check: u16, delta: u16) -> u16 {
    !fold((!check) as u32 + delta as u32)
}

/// The same for UDP, where zero means "no checksum" and so is written as its other representation (RFC 768).
#[inline(always)]
pub fn update_udp(check: u16, delta: u16) -> u16 {
    match update(check, delta) {
        0 => 0xffff,
        check => check,
    }
}

/// The delta of decrementing the TTL, the high byte of its 16-bit word (RFC 1141).
pub const TTL_DECREMENT: u16 = u16::from_ne_bytes([0xfe, 0xff]);

/// The field that a sender leaves when it hands the checksum to its device: the folded sum of the pseudo-header
/// (`tcp_v4_check` in the kernel, not complemented).
#[inline(always)]
pub fn pseudo_header(addresses_sum: u32, proto: u8, l4_len: u16) -> u16 {
    with_length(pseudo_sum(addresses_sum, proto), l4_len)
}

/// What a pseudo-header has beside the length, folded (RFC 9293, section 3.1).
#[inline(always)]
pub fn pseudo_sum(addresses_sum: u32, proto: u8) -> u16 {
    fold(addresses_sum + u16::from_ne_bytes([0, proto]) as u32)
}

/// The same from the folded sum of all but the length.
#[inline(always)]
pub fn with_length(pseudo_sum: u16, l4_len: u16) -> u16 {
    fold(pseudo_sum as u32 + u16::from_ne_bytes(l4_len.to_be_bytes()) as u32)
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn sum(words: &[u16]) -> u32 {
        words.iter().map(|&word| word as u32).sum()
    }

    fn full(words: &[u16]) -> u16 {
        !fold(sum(words))
    }

    proptest! {
        #[test]
        fn an_updated_checksum_is_valid_for_the_changed_words(
            words in proptest::collection::vec(any::<u16>(), 6..64),
            changed in proptest::collection::vec(any::<u16>(), 6),
        ) {
            let mut new: Vec<u16> = words.clone();
            new[..6].copy_from_slice(&changed);
            let updated = update(full(&words), delta(sum(&words[..6]), sum(&changed)));
            // A receiver adds everything up and wants all ones (RFC 1071).
            prop_assert_eq!(fold(fold(sum(&new)) as u32 + updated as u32), 0xffff);
        }

        #[test]
        fn deltas_add_up(a in any::<u16>(), b in any::<u16>(), c in any::<u16>(), check in any::<u16>()) {
            let once = update(check, add(delta(a as u32, b as u32), delta(b as u32, c as u32)));
            let whole = update(check, delta(a as u32, c as u32));
            // Zero has two representations.
            prop_assert!(once == whole || (once ^ whole) == 0xffff);
        }

        #[test]
        fn udp_never_says_no_checksum(check in any::<u16>(), delta in any::<u16>()) {
            prop_assert_ne!(update_udp(check, delta), 0);
        }
    }

    #[test]
    fn a_ttl_decrement_is_its_constant() {
        let before = u16::from_ne_bytes([64, 6]);
        let after = u16::from_ne_bytes([63, 6]);
        assert_eq!(delta(before as u32, after as u32), TTL_DECREMENT);
    }
}
