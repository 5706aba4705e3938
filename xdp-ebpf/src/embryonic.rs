//! The embryonic table: a set-associative array with a lock per bucket.
//!
//! Readers take no lock. A writer locks the bucket, fills a free or the least worthy slot, and publishes it by its tag.
//! A reader that is overtaken by an eviction between looking at a tag and copying the slot can copy another flow's
//! entry, as with every preallocated hash of the kernel; the window is a few nanoseconds of a bucket's turnover.
//!
//! Ways are compared without branches: seven of them, each taken or not, are more paths than the verifier follows.

use core::{arch::asm, marker::PhantomData, ptr::null_mut};

use xdp_common::{
    net::{Address, FlowKey},
    select,
    tables::{Flow, Insertion, Slot, WAYS},
    verdict::{Counter, Event},
};

use crate::{
    CONFIG,
    atomic::{after, exchange, exchange_if, fence},
    established::differs,
    family::Maps,
    maps::count,
};

/// The tags of a bucket, a cache line; the first word is the lock. A tag is a part of the key's hash (high half, never 0)
/// over the entry's worth: the bit of an answered flow, and the time it was last touched. A free slot's is 0.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(crate) struct Tags([u64; WORDS]);

const WORDS: usize = WAYS as usize + 1;
const _: () = assert!(WORDS.is_power_of_two(), "an index is kept in bounds by a mask");

/// A bucket, with the tag that its slots would bear for one key.
struct Bucket<F> {
    tags: *mut Tags,
    index: u32,
    tag: u32,
    family: PhantomData<F>,
}

/// The place of a tag, and what it was when it was looked at.
#[derive(Clone, Copy)]
struct Tag {
    place: *mut u64,
    value: u64,
}

/// Bit of an answered flow in a tag.
const ANSWERED_BIT: u32 = 31;
const ANSWERED: u64 = 1 << ANSWERED_BIT;
/// A bit of the hash that every tag has set.
const USED_BIT: u32 = 32;
/// Unanswered entries of a bucket that answered ones make room for: all that one new flow may have, which are both its halves and
/// what is left to egress where the kernel forwards its packets.
const UNANSWERED_KEPT: u64 = 3;
/// Bits of the time in a tag.
const TIME: u64 = ANSWERED - 1;
/// How often a bucket is tried; a holder needs some fifty nanoseconds, a try about ten.
const LOCK_TRIES_MAX: u32 = 32;
const BUCKET_SEED: u32 = 0x0062_7563;

impl<F: Maps> Bucket<F> {
    /// The bucket of a key.
    #[inline(always)]
    fn of(key: &FlowKey<F::Addr>) -> Option<Self> {
        let located = locate(key);
        let (index, tag) = ((located >> 32) as u32, located as u32);
        Some(Self { tags: F::tags().get_ptr_mut(index)?, index, tag, family: PhantomData })
    }

    /// The way (from 1) whose tag is the key's, 0 when there is none. A tag is in a bucket once: who inserts another key
    /// of the same tag takes the place of the first.
    #[inline(always)]
    fn tagged(&self) -> u64 {
        let (mut found, mut way) = (0, 1);
        while way < WORDS as u64 {
            let differs = (self.at(way).value >> 32) ^ self.tag as u64;
            found |= is_negative(differs.wrapping_sub(1)) * way;
            way += 1;
        }
        found
    }

    #[inline(always)]
    fn at(&self, way: u64) -> Tag {
        tag_at(self.tags, way)
    }

    #[inline(always)]
    fn slot(&self, way: u64) -> Option<*mut Slot<F::Addr>> {
        F::embryonic().get_ptr_mut(self.index * WAYS + way as u32 - 1)
    }
}

#[inline(always)]
fn tag_at(tags: *mut Tags, way: u64) -> Tag {
    // SAFETY: the mask keeps the index within the bucket, a slot of an array.
    let place = unsafe { tags.cast::<u64>().add(way as usize % WORDS) };
    // SAFETY: as above; an aligned word that others may write at any time.
    Tag { place, value: unsafe { place.read_volatile() } }
}

/// The free or least worthy way (from 1). Unanswered entries go before answered ones, so that a flood does not end what
/// its peers have taken up; but a few stay, or a new flow's entries would oust each other before any answer.
#[inline(never)] // a frame of its own on a stack of 512 bytes
fn victim(tags: *mut Tags) -> u64 {
    let (mut unanswered, mut way) = (0, 1);
    while way < WORDS as u64 {
        let value = tag_at(tags, way).value;
        unanswered += (value >> USED_BIT) & !(value >> ANSWERED_BIT) & 1;
        way = after(way);
    }
    let is_turned = is_negative(unanswered.wrapping_sub(UNANSWERED_KEPT));
    let (mut least, mut way) = (u64::MAX >> 2, 1);
    while way < WORDS as u64 {
        let value = tag_at(tags, way).value;
        let turn = ((value >> USED_BIT) & is_turned) << ANSWERED_BIT;
        let worth = ((value & (ANSWERED | TIME)) ^ turn) << 3 | way;
        let less = worth.wrapping_sub(least);
        least = least.wrapping_add(is_negative(less).wrapping_mul(less));
        way = after(way);
    }
    least % WORDS as u64
}

/// Index of a key's bucket, over the tag that its slot would bear.
#[inline(never)] // the hash of a key takes all registers
fn locate<A: Address>(key: &FlowKey<A>) -> u64 {
    let buckets = CONFIG.get(0).map_or(1, |config| config.embryonic_buckets);
    let hash = select::flow_hash(key, BUCKET_SEED);
    // The low bits of the hash hardly decide on the bucket.
    let tag = hash.wrapping_mul(0x9e37_79b1) | 1;
    (select::slot(hash, buckets) as u64) << 32 | tag as u64
}

/// The flow of a key, null when there is none.
#[inline(never)] // looked at from many places; the verifier follows each inlined copy with all that surrounds it
pub(crate) fn find<F: Maps>(key: &FlowKey<F::Addr>) -> *mut Flow<F::Addr> {
    let Some(bucket) = Bucket::<F>::of(key) else { return null_mut() };
    let way = bucket.tagged();
    if way == 0 {
        return null_mut();
    }
    fence(bucket.at(way).place);
    let Some(embryo) = bucket.slot(way) else { return null_mut() };
    // SAFETY: a slot of an array, which lives as long as the map; any bytes are a valid key.
    if unsafe { differs(&(*embryo).key, key) } != 0 {
        return null_mut();
    }
    // SAFETY: as above.
    unsafe { &raw mut (*embryo).flow }
}

/// Marks an entry as touched now, and as answered when told; unless it has changed hands meanwhile.
#[inline(never)] // once per flow and second
pub(crate) fn renew<F: Maps>(key: &FlowKey<F::Addr>, answered: bool) -> bool {
    let Some(bucket) = Bucket::<F>::of(key) else { return false };
    let way = bucket.tagged();
    let Tag { place, value } = bucket.at(way);
    let answered = if answered { ANSWERED } else { value & ANSWERED };
    way != 0 && exchange_if(place, value, value & !(ANSWERED | TIME) | answered | now()) == value
}

/// Frees an entry, unless it has changed hands meanwhile.
#[inline(never)] // once per flow
pub(crate) fn remove<F: Maps>(key: &FlowKey<F::Addr>) -> bool {
    let Some(bucket) = Bucket::<F>::of(key) else { return false };
    let way = bucket.tagged();
    let Tag { place, value } = bucket.at(way);
    way != 0 && exchange_if(place, value, 0) == value
}

/// Inserts an entry; one that is there is overwritten or left, as told.
#[inline(never)] // a frame of its own on a stack of 512 bytes
pub(crate) fn put<F: Maps>(key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>, replace: bool) -> Insertion {
    let Some(bucket) = Bucket::<F>::of(key) else { return Insertion::Refused };
    let lock = bucket.at(0).place;
    if exchange_if(lock, 0, 1) != 0 {
        count(Counter::Event(Event::InsertRetried));
        let mut tries = 1;
        while exchange_if(lock, 0, 1) != 0 {
            tries += 1;
            if tries == LOCK_TRIES_MAX {
                return Insertion::Refused;
            }
        }
    }
    let tagged = bucket.tagged();
    let way = if tagged == 0 { victim(bucket.tags) } else { tagged };
    let mut insertion = Insertion::Refused;
    if let Some(embryo) = bucket.slot(way) {
        // SAFETY: a slot of an array; the bucket is locked.
        let same = tagged != 0 && unsafe { differs(&(*embryo).key, key) } == 0;
        insertion = Insertion::Exists;
        if !same || replace {
            let place = bucket.at(way).place;
            if !same {
                exchange(place, 0);
            }
            // SAFETY: as above. No tag leads to a slot of another key; one of the same key is overwritten in place.
            unsafe {
                (*embryo).key = *key;
                (*embryo).flow = *flow;
            }
            let answered = if flow.replied != 0 { ANSWERED } else { 0 };
            exchange(place, (bucket.tag as u64) << 32 | answered | now());
            insertion = Insertion::Done;
        }
    }
    exchange(lock, 0);
    insertion
}

/// Kernel clock ticks, as many bits as a tag holds, never 0.
#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper takes nothing; the JIT inlines it.
    unsafe { aya_ebpf::helpers::bpf_jiffies64() & TIME | 1 }
}

/// 1 for a negative number, else 0; in assembly, because the compiler would make a branch of it. (And shifted without
/// its sign, because the verifier of 6.18 makes a branch of the mask that a signed shift gives.)
#[inline(always)]
fn is_negative(mut value: u64) -> u64 {
    // SAFETY: arithmetic on a register.
    unsafe { asm!("{value} >>= 63", value = inout(reg) value, options(pure, nomem, nostack)) }
    value
}
