//! What TCP sockets have been told, by cookie: a set-associative array.
//!
//! Every connection to a Service adds an entry and removes it again. What that costs is memory that the rest of the connection
//! has driven out of the caches, and a hash of the kernel touches a lot of it. Here the cookies of a bucket are one cache line, and
//! cookies count up, so that their remainders fill buckets evenly and one after the other.
//!
//! Two sockets that take the same way of a full bucket at once can leave the one with what the other has been told. Who asks
//! compares the backend, so that this shows only where both are at the same one by different Services, as the wrong Service.

use aya_ebpf::{macros::map, maps::Array};
use xdp_common::tables::{self, Connected, SOCKET_WAYS};

use crate::atomic::{exchange, exchange_if, fence};

/// The cookies of a bucket, a cache line; that of a free way is 0, which is no socket's.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(crate) struct Cookies([u64; WAYS]);

const WAYS: usize = SOCKET_WAYS as usize;
const _: () = assert!(WAYS.is_power_of_two(), "a way is kept in bounds by a mask");
const BUCKETS: u32 = tables::TCP_COOKIES.entries;
const _: () = assert!(tables::TCP_TOLD.entries == BUCKETS * SOCKET_WAYS, "an entry for every way");

#[map]
static TCP_COOKIES: Array<Cookies> = Array::with_max_entries(tables::TCP_COOKIES.entries, 0);
#[map]
static TCP_TOLD: Array<Connected> = Array::with_max_entries(tables::TCP_TOLD.entries, 0);

/// What a socket has been told.
#[inline(always)] // one caller per hook
pub(crate) fn get(cookie: u64) -> Option<Connected> {
    let bucket = Bucket::of(cookie)?;
    let way = bucket.find(cookie)?;
    let place = bucket.place(way);
    fence(place);
    let told = *TCP_TOLD.get(bucket.entry(way))?;
    fence(place);
    // Another socket may have taken the way meanwhile.
    // SAFETY: an aligned word of a map value.
    if unsafe { place.read_volatile() } == cookie { Some(told) } else { None }
}

/// Notes what a socket has been told. Where a bucket is full, another socket's entry goes, which then sees its backend.
#[inline(always)] // one caller per hook
pub(crate) fn set(cookie: u64, told: &Connected) -> bool {
    let Some(bucket) = Bucket::of(cookie) else { return false };
    let (way, is_own) = match bucket.find(cookie).or_else(|| bucket.claim(cookie)) {
        Some(way) => (way, true),
        None => ((cookie / BUCKETS as u64) as u32, false),
    };
    let place = bucket.place(way);
    if !is_own {
        exchange(place, 0);
    }
    let Some(entry) = TCP_TOLD.get_ptr_mut(bucket.entry(way)) else { return false };
    // SAFETY: a value of the map; whose it is the cookie says, but for what is said above.
    unsafe { entry.write(*told) };
    if !is_own {
        exchange(place, cookie);
    }
    true
}

/// Forgets a socket that is being closed.
#[inline(always)] // one caller
pub(crate) fn remove(cookie: u64) {
    let Some(bucket) = Bucket::of(cookie) else { return };
    if let Some(way) = bucket.find(cookie) {
        exchange_if(bucket.place(way), cookie, 0);
    }
}

/// The bucket of a cookie.
#[derive(Clone, Copy)]
struct Bucket {
    cookies: *mut u64,
    index: u32,
}

impl Bucket {
    #[inline(always)]
    fn of(cookie: u64) -> Option<Self> {
        let index = (cookie % BUCKETS as u64) as u32;
        Some(Self { cookies: TCP_COOKIES.get_ptr_mut(index)?.cast(), index })
    }

    /// The way of a cookie.
    #[inline(always)]
    fn find(self, cookie: u64) -> Option<u32> {
        let mut way = 0;
        while way < SOCKET_WAYS {
            // SAFETY: an aligned word of the bucket.
            if unsafe { self.place(way).read_volatile() } == cookie {
                return Some(way);
            }
            way += 1;
        }
        None
    }

    /// Takes a free way for a cookie.
    #[inline(always)]
    fn claim(self, cookie: u64) -> Option<u32> {
        let mut way = 0;
        while way < SOCKET_WAYS {
            let place = self.place(way);
            // SAFETY: as above.
            if unsafe { place.read_volatile() } == 0 && exchange_if(place, 0, cookie) == 0 {
                return Some(way);
            }
            way += 1;
        }
        None
    }

    #[inline(always)]
    fn place(self, way: u32) -> *mut u64 {
        // SAFETY: the mask keeps the index within the bucket, a value of the map.
        unsafe { self.cookies.add(way as usize % WAYS) }
    }

    #[inline(always)]
    fn entry(self, way: u32) -> u32 {
        self.index * SOCKET_WAYS + way % SOCKET_WAYS
    }
}
