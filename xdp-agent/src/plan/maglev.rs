//! Maglev rings (Eisenbud and others: "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
//! section 3.4): nearly equal shares, few moves when a backend comes or goes, and the same ring on every node.

use xdp_common::net::Address;

/// Slots per backend: shares differ by one slot at most, which is one per cent of a share then.
pub const SLOTS_PER_BACKEND: u32 = 100;
/// Slots per backend where room is scarce, down to shares that differ by up to a tenth.
pub const SCARCE_SLOTS_PER_BACKEND: [u32; 3] = [50, 25, 10];
/// Largest ring, the larger of the paper's two table sizes; beyond 6,553 backends each has fewer slots.
pub const RING_SLOTS_MAX: u32 = 655_373;

const SEED_OFFSET: u64 = 0x6d61_676c_6576_2031;
const SEED_SKIP: u64 = 0x6d61_676c_6576_2032;
const EMPTY: u32 = u32::MAX;

/// A backend on its way into a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member<A> {
    /// Address.
    pub addr: A,
    /// Port.
    pub port: u16,
    /// What the slots hold.
    pub id: u32,
}

/// The number of backends that a ring of so many has room for, at a number of slots each.
///
/// A ring of another size is another permutation of everything, so sizes go in steps of a third to a half (2, 3, 4, 6,
/// 8, 12, 16, … backends): mostly a ring keeps its size, and few slots move, when one backend comes or goes.
pub fn room(backends: usize) -> u32 {
    let step = u32::try_from(backends).unwrap_or(u32::MAX).min(RING_SLOTS_MAX).next_power_of_two();
    let three_quarters = step / 4 * 3;
    if three_quarters as usize >= backends { three_quarters } else { step }
}

/// The number of slots for a number of backends: one for a single backend, none without, else a prime with [`room`] for
/// them at so many slots each.
pub fn slots(backends: usize, per_backend: u32) -> u32 {
    match backends {
        0 => 0,
        1 => 1,
        _ => {
            let wanted = room(backends).saturating_mul(per_backend).min(RING_SLOTS_MAX);
            (wanted..=RING_SLOTS_MAX).find(|&number| is_prime(number)).unwrap_or(RING_SLOTS_MAX)
        }
    }
}

/// Fills a ring of `size` slots, a number that [`slots`] gives; it depends on addresses, ports and protocol only, neither
/// on the ids nor on the order of the members.
pub fn ring<A: Address>(members: &[Member<A>], protocol: u8, size: u32) -> Vec<u32> {
    if size <= 1 {
        return members.iter().map(|member| member.id).collect();
    }
    let mut members = members.to_vec();
    members.sort_unstable_by_key(|member| (member.addr, member.port));
    let mut walks: Vec<Walk> = members.iter().map(|member| Walk::new(member, protocol, size)).collect();
    let mut ring = vec![EMPTY; size as usize];
    let mut left = ring.len();
    loop {
        for (walk, member) in walks.iter_mut().zip(&members) {
            let mut at = walk.at;
            while ring[at as usize] != EMPTY {
                at += walk.skip;
                if at >= size {
                    at -= size;
                }
            }
            ring[at as usize] = member.id;
            walk.at = at;
            left -= 1;
            if left == 0 {
                return ring;
            }
        }
    }
}

/// A backend's permutation of the slots: a start and a step, which meet every slot because their number is prime.
struct Walk {
    at: u32,
    skip: u32,
}

impl Walk {
    fn new<A: Address>(member: &Member<A>, protocol: u8, size: u32) -> Self {
        let offset = hash(SEED_OFFSET, member, protocol) % u64::from(size);
        let skip = hash(SEED_SKIP, member, protocol) % u64::from(size - 1) + 1;
        Self { at: offset as u32, skip: skip as u32 }
    }
}

/// Part of what nodes agree on: a change here moves flows that change nodes while two versions run side by side.
fn hash<A: Address>(seed: u64, member: &Member<A>, protocol: u8) -> u64 {
    mix(mix(member.addr.word() ^ seed) ^ u64::from(member.port) << 8 ^ u64::from(protocol))
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014) after its increment.
fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

fn is_prime(number: u32) -> bool {
    if number.is_multiple_of(2) {
        return number == 2;
    }
    number > 1
        && (3..)
            .step_by(2)
            .take_while(|divisor| divisor * divisor <= number)
            .all(|divisor| !number.is_multiple_of(divisor))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn members(count: u32) -> Vec<Member<[u8; 4]>> {
        (1..=count).map(|n| Member { addr: (0x0a00_0000 + n).to_be_bytes(), port: 8080, id: n }).collect()
    }

    fn full(members: &[Member<[u8; 4]>]) -> Vec<u32> {
        ring(members, 6, slots(members.len(), SLOTS_PER_BACKEND))
    }

    fn shares(ring: &[u32]) -> HashMap<u32, usize> {
        let mut shares = HashMap::new();
        ring.iter().for_each(|id| *shares.entry(*id).or_default() += 1);
        shares
    }

    #[test]
    fn ring_sizes_are_primes_with_room_for_every_backend() {
        let cases = [
            (0, 0),
            (1, 1),
            (2, 211),
            (3, 307),
            (4, 401),
            (5, 601),
            (6, 601),
            (7, 809),
            (10, 1201),
            (100, 12_809),
            (1000, 102_407),
            (4000, 409_609),
        ];
        for (backends, expected) in cases {
            assert_eq!(slots(backends, SLOTS_PER_BACKEND), expected, "{backends} backends");
        }
        for backends in 2..=6_000 {
            assert!(
                slots(backends, SLOTS_PER_BACKEND) >= backends as u32 * SLOTS_PER_BACKEND
                    && is_prime(slots(backends, SLOTS_PER_BACKEND))
            );
        }
        assert_eq!(
            [6_554, 1_000_000, usize::MAX].map(|backends| slots(backends, SLOTS_PER_BACKEND)),
            [RING_SLOTS_MAX; 3]
        );
        assert!(is_prime(RING_SLOTS_MAX));
    }

    #[test]
    fn every_backend_gets_a_nearly_equal_share() {
        for count in [2, 3, 5, 10, 50, 100, 500, 1000] {
            let ring = full(&members(count));
            let shares = shares(&ring);
            let mean = ring.len() as f64 / f64::from(count);
            assert_eq!(shares.len(), count as usize);
            let most = *shares.values().max().unwrap() as f64;
            let least = *shares.values().min().unwrap() as f64;
            assert!(most <= mean * 1.03 && least >= mean * 0.97, "{count}: {least} to {most}, mean {mean}");
        }
    }

    #[test]
    fn where_slots_are_scarce_shares_differ_by_one_slot_at_most() {
        for per_backend in SCARCE_SLOTS_PER_BACKEND {
            for count in [2, 3, 5, 10, 50, 500] {
                let size = slots(count as usize, per_backend);
                assert!(is_prime(size) && size >= count * per_backend);
                let shares = shares(&ring(&members(count), 6, size));
                let (most, least) = (shares.values().max().unwrap(), shares.values().min().unwrap());
                assert!(shares.len() == count as usize && most - least <= 1, "{count}: {least} to {most}");
            }
        }
    }

    #[test]
    fn few_slots_move_when_a_backend_comes_or_goes() {
        for count in [4, 6, 8, 12, 48, 100, 384, 1000, 5000] {
            let most = members(count);
            let before = full(&most);
            for at in [0, count as usize / 2, count as usize - 1] {
                let mut fewer = most.clone();
                let gone = fewer.remove(at).id;
                let after = full(&fewer);
                if before.len() != after.len() {
                    continue;
                }
                let moved = before.iter().zip(&after).filter(|(a, b)| **a != gone && a != b).count();
                let share = moved as f64 / before.len() as f64;
                assert!(share < 0.05, "{count} backends without {gone}: {share}");
            }
        }
    }

    #[test]
    fn the_ring_of_three_backends_never_changes() {
        let ring = full(&members(3));
        assert_eq!(&ring[..24], &GOLDEN, "nodes of different versions would disagree");
    }

    const GOLDEN: [u32; 24] = [1, 1, 3, 2, 1, 1, 3, 2, 2, 1, 2, 2, 1, 1, 3, 3, 1, 1, 3, 3, 3, 1, 2, 3];

    proptest! {
        #[test]
        fn the_order_of_the_backends_does_not_matter(
            mut members in proptest::collection::hash_set((any::<[u8; 4]>(), any::<u16>()), 0..20)
                .prop_map(|set| set.into_iter().collect::<Vec<_>>())
                .prop_map(|list| list.iter().enumerate().map(|(n, &(addr, port))| Member { addr, port, id: n as u32 }).collect::<Vec<_>>()),
            seed: u64,
        ) {
            let before = full(&members);
            members.sort_by_key(|member| mix(u64::from(member.id) ^ seed));
            prop_assert_eq!(&full(&members), &before);
            prop_assert_eq!(before.len(), slots(members.len(), SLOTS_PER_BACKEND) as usize);
            prop_assert_eq!(shares(&before).len(), members.len());
        }

        #[test]
        fn the_ids_do_not_decide_where_a_backend_stands(count in 1u32..20, shift in 1u32..1000) {
            let before = full(&members(count));
            let moved: Vec<_> = members(count).iter().map(|m| Member { id: m.id + shift, ..*m }).collect();
            let after = full(&moved);
            prop_assert!(before.iter().zip(&after).all(|(a, b)| a + shift == *b));
        }
    }
}
