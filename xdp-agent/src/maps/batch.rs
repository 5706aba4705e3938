//! Entries of maps in batches: walks, and writes that go on where the kernel stopped.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use aya::Pod;

use crate::bpf::{BatchCall, TOKEN_BYTES, map_batch};

/// Entries fetched or written at a time; a bucket of a hash has to fit.
pub(super) const BATCH: usize = 1024;
/// Beyond this a bucket of a hash is no bucket any more.
const BATCH_MAX: usize = 1 << 17;
/// What kernels say to a batch of a map that knows none (include/linux/errno.h); it is not meant for user space.
const ENOTSUPP: i32 = 524;

/// Whether the kernel cannot do batches: before 5.6 it does not know them, later not for every sort of map.
pub(super) fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | ENOTSUPP))
}

/// Calls `visit` with every entry of a map; one that changes bucket meanwhile may be missed or seen twice.
///
/// # Errors
/// When [`is_missing`] says that the kernel cannot, nothing was visited.
pub(super) fn walk<K: Pod, V: Pod>(
    map: &OwnedFd,
    zero: (K, V),
    mut visit: impl FnMut(K, V),
) -> io::Result<()> {
    const { assert!(size_of::<K>() <= TOKEN_BYTES) };
    let mut keys = vec![zero.0; BATCH];
    let mut values = vec![zero.1; BATCH];
    let mut from: Option<[u8; TOKEN_BYTES]> = None;
    loop {
        let mut next = [0; TOKEN_BYTES];
        let call = BatchCall {
            map: map.as_fd(),
            writes: false,
            from: from.as_ref(),
            next: &raw mut next,
            keys: keys.as_mut_ptr().cast(),
            values: values.as_mut_ptr().cast(),
            count: keys.len() as u32,
        };
        // SAFETY: the vectors have room for `count` entries; a map is walked with the types it was opened with, whose
        // sizes were checked then, and `Pod` takes any bytes. Tokens of hashes are 4 bytes, all others a key.
        let (count, result) = unsafe { map_batch(call) };
        let is_last = match result {
            Ok(()) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && keys.len() < BATCH_MAX => {
                keys.resize(keys.len() * 4, zero.0);
                values.resize(values.len() * 4, zero.1);
                continue;
            }
            Err(error) => return Err(error),
        };
        for at in 0..count as usize {
            visit(keys[at], values[at]);
        }
        if is_last {
            return Ok(());
        }
        from = Some(next);
    }
}

/// Reads consecutive entries of an array into `values`, which has room for `per_entry` of them to an entry: one for each
/// possible CPU where the array is per CPU.
///
/// # Errors
/// See [`is_missing`].
pub(super) fn read_array<V: Pod>(
    map: &OwnedFd,
    first: u32,
    values: &mut [V],
    per_entry: usize,
) -> io::Result<()> {
    let count = values.len() / per_entry.max(1);
    let mut keys = vec![0u32; count];
    // The kernel goes on behind the key it is given.
    let mut from = [0; TOKEN_BYTES];
    from[..4].copy_from_slice(&first.wrapping_sub(1).to_ne_bytes());
    let mut next = [0; TOKEN_BYTES];
    let call = BatchCall {
        map: map.as_fd(),
        writes: false,
        from: (first > 0).then_some(&from),
        next: &raw mut next,
        keys: keys.as_mut_ptr().cast(),
        values: values.as_mut_ptr().cast(),
        count: count as u32,
    };
    // SAFETY: both slices have room for `count` entries of the map's sizes, and `Pod` takes any bytes.
    match unsafe { map_batch(call) }.1 {
        // The end of the map was reached with the last entry.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result,
    }
}

/// Inserts or replaces entries in their order; how many of them are in, also when one was refused.
///
/// # Errors
/// See [`is_missing`]; else what the kernel has against the first entry that is not in.
pub(super) fn write<K: Pod, V: Pod>(map: &OwnedFd, keys: &[K], values: &[V]) -> (usize, io::Result<()>) {
    let asked = keys.len().min(values.len());
    let call = BatchCall {
        map: map.as_fd(),
        writes: true,
        from: None,
        next: std::ptr::null_mut(),
        keys: keys.as_ptr().cast_mut().cast(),
        values: values.as_ptr().cast_mut().cast(),
        count: asked as u32,
    };
    // SAFETY: both slices hold `count` entries of the map's sizes, and a write changes neither.
    match unsafe { map_batch(call) } {
        (_, Ok(())) => (asked, Ok(())),
        // A kernel that has refused the call as such leaves the count as it was.
        (count, Err(error)) if count as usize >= asked => (0, Err(error)),
        (count, Err(error)) => (count as usize, Err(error)),
    }
}

/// Does one after the other; how many are done, also when one was refused.
pub(super) fn each<T>(
    items: impl IntoIterator<Item = T>,
    mut write: impl FnMut(T) -> io::Result<()>,
) -> (usize, io::Result<()>) {
    let mut done = 0;
    for item in items {
        if let Err(error) = write(item) {
            return (done, Err(error));
        }
        done += 1;
    }
    (done, Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_before_a_refusal_is_counted() {
        let refused = |n: u32| if n == 3 { Err(io::Error::from_raw_os_error(libc::E2BIG)) } else { Ok(()) };
        let (done, result) = each(1..6, refused);
        assert_eq!((done, result.unwrap_err().raw_os_error()), (2, Some(libc::E2BIG)));
        assert!(matches!(each(4..6, refused), (2, Ok(()))));
    }
}
