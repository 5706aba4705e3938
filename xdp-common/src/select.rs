//! Which backend a new flow gets: a hash into the ring of its frontend.

use crate::{
    net::{Address, FlowKey},
    tables::KNOWN_WORDS,
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
