//! Which backend a new flow gets: a hash into the ring of its frontend.

use crate::{
    net::{Address, FlowKey},
    tables::{KNOWN_WORDS, PLACES},
};

/// A well-mixed 32-bit hash of a flow, equal on every node (so that any node may take over a flow).
#[inline(always)] // used once per new flow, from one place
pub fn flow_hash<A: Address>(key: &FlowKey<A>, seed: u32) -> u32 {
    let ports = u32::from_be_bytes([key.sport[0], key.sport[1], key.dport[0], key.dport[1]]) as u64;
    let mut hash = key.src.word().wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ key.dst.word().rotate_left(32);
    hash ^= ports << 24 ^ key.proto as u64 ^ (seed as u64) << 8;
    // The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (hash >> 32) as u32
}

/// Sets apart what is known from what is chosen by the same hash.
const KNOWN_SEED: u32 = 2;

/// The bit of a key in the table of known keys.
#[inline(always)] // twice per new flow
pub fn known_bit<A: Address>(key: &FlowKey<A>) -> u32 {
    flow_hash(key, KNOWN_SEED) % (KNOWN_WORDS * 64)
}

/// The first of the places of a key in the established table, of `homes` that keys may begin at.
#[inline(always)] // many callers
pub fn home<A: Address>(key: &FlowKey<A>, homes: u32) -> u32 {
    home_of(key.src.folded(), key.dst.folded(), key.end(), homes)
}

/// The same from the key's addresses ([`Address::folded`]) and its last word ([`FlowKey::end`]).
#[inline(always)] // the established path
pub fn home_of(src: u64, dst: u64, end: u64, homes: u32) -> u32 {
    let mut hash = (src ^ dst.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    // Multiplication carries upward only: the upper half, which every bit has reached, is turned over once.
    hash = (hash ^ (hash >> 32) ^ end).wrapping_mul(0xd6e8_feb8_6659_fd93);
    slot((hash >> 32) as u32, homes)
}

/// The places of a key in an established table of `slots`.
pub fn places<A: Address>(key: &FlowKey<A>, slots: u32) -> core::ops::Range<u32> {
    let home = home(key, homes(slots));
    home..home + PLACES
}

/// How many slots of `slots` keys may begin at.
pub fn homes(slots: u32) -> u32 {
    slots.saturating_sub(PLACES - 1).max(1)
}

/// The slot of a ring with `slots` slots that a hash falls into (Lemire 2016: multiply, no division).
#[inline(always)]
pub fn slot(hash: u32, slots: u32) -> u32 {
    ((hash as u64 * slots as u64) >> 32) as u32
}

/// The source port to try at an attempt for a flow with this hash, within a range in host order.
#[inline(always)]
pub fn snat_port(hash: u32, attempt: u32, min: u16, max: u16) -> u16 {
    let ports = max.wrapping_sub(min) as u32 + 1;
    // Steps by the golden ratio keep attempts far apart (Knuth, TAOCP 6.4).
    let hash = hash.wrapping_add(attempt.wrapping_mul(0x9e37_79b9));
    min.wrapping_add(slot(hash, ports) as u16)
}

#[cfg(test)]
mod tests {
    use std::vec;

    use proptest::prelude::*;

    use super::*;
    use crate::{net::Ip6, tables::OVERFLOW_SHARE};

    fn key(client: u32, sport: u16) -> FlowKey<[u8; 4]> {
        FlowKey {
            src: client.to_be_bytes(),
            dst: [10, 96, 0, 10],
            sport: sport.to_be_bytes(),
            dport: [0, 80],
            proto: 6,
            zero: [0; 3],
        }
    }

    #[test]
    fn clients_that_differ_in_one_port_spread_over_the_slots() {
        let mut hits = vec![0u32; 101];
        for sport in 0..50_000u16 {
            hits[slot(flow_hash(&key(0xc633_6402, sport), 0), 101) as usize] += 1;
        }
        let expected = 50_000.0 / 101.0;
        let chi2: f64 = hits.iter().map(|&n| (n as f64 - expected).powi(2) / expected).sum();
        // 100 degrees of freedom: 170 is beyond the 99.999th percentile.
        assert!(chi2 < 170.0, "{chi2}");
    }

    /// How many of these keys find all their places taken, in a table of `slots`.
    fn without_place<A: Address>(keys: impl Iterator<Item = FlowKey<A>>, slots: u32) -> u32 {
        let mut taken = vec![false; slots as usize];
        let mut others = 0;
        for key in keys {
            match places(&key, slots).find(|place| !taken[*place as usize]) {
                Some(place) => taken[place as usize] = true,
                None => others += 1,
            }
        }
        others
    }

    /// Shares of keys without a place, in thousandths, when a table is filled to a quarter, a half, and as many as it has slots.
    fn shares<A: Address>(key: impl Fn(u32) -> FlowKey<A>) -> [u32; 3] {
        const SLOTS: u32 = 1 << 14;
        [SLOTS / 4, SLOTS / 2, SLOTS].map(|keys| without_place((0..keys).map(&key), SLOTS) * 1000 / keys)
    }

    #[test]
    fn the_hash_behind_the_slots_has_room_for_what_finds_no_place() {
        let by_port = |n: u32| key(0xc633_6400 + n / 50_000, (n % 50_000) as u16);
        let by_client = |n: u32| key(0x0a00_0000 + n, 50_000);
        let wide = |n: u32| FlowKey {
            src: Ip6::from_quads([[0xfd, 0, 0, 1], [0; 4], [0; 4], n.to_be_bytes()]),
            dst: Ip6::from_quads([[0xfd, 0, 0, 2], [0; 4], [0; 4], [0, 0, 0, 10]]),
            sport: [0xc0, 1],
            dport: [0, 80],
            proto: 6,
            zero: [0; 3],
        };
        let subnets = |n: u32| FlowKey {
            src: Ip6::from_quads([[0x20, 1, 0xd, 0xb8], n.to_be_bytes(), [0; 4], [0, 0, 0, 1]]),
            ..wide(0)
        };
        for [quarter, half, whole] in [shares(by_port), shares(by_client), shares(wide), shares(subnets)] {
            assert!(
                quarter <= 5 && half <= 40 && whole <= 1000 / OVERFLOW_SHARE - 50,
                "{quarter} {half} {whole}"
            );
        }
    }

    #[test]
    fn the_places_of_a_key_are_slots() {
        for (slots, expected) in [(1, 0..4), (4, 0..4)] {
            assert_eq!(places(&key(1, 1), slots), expected);
        }
        for sport in 0..1000 {
            assert!(places(&key(1, sport), 64).end <= 64);
        }
    }

    proptest! {
        #[test]
        fn a_slot_is_within_its_ring(hash: u32, slots in 1u32..) {
            prop_assert!(slot(hash, slots) < slots);
        }

        #[test]
        fn a_source_port_is_within_its_range(hash: u32, attempt in 0u32..64, min in 1u16.., len: u16) {
            let max = min.saturating_add(len);
            let port = snat_port(hash, attempt, min, max);
            prop_assert!((min..=max).contains(&port));
        }
    }
}
