//! Walks over maps in batches, or entry by entry on kernels that cannot.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use aya::Pod;

use crate::bpf::{BatchCall, map_batch};

/// Entries fetched at a time; a bucket of a hash has to fit.
const BATCH: usize = 1024;
/// Beyond this a bucket of a hash is no bucket any more.
const BATCH_MAX: usize = 1 << 17;

/// Calls `visit` with every entry of a map; one that changes bucket meanwhile may be missed or seen twice.
///
/// # Errors
/// `EINVAL` on kernels without batches (before 5.6), before anything was visited.
pub(super) fn walk<K: Pod, V: Pod>(
    map: &OwnedFd,
    zero: (K, V),
    mut visit: impl FnMut(K, V),
) -> io::Result<()> {
    let mut keys = vec![zero.0; BATCH];
    let mut values = vec![zero.1; BATCH];
    let mut from: Option<[u8; 8]> = None;
    loop {
        let mut next = [0; 8];
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
        // sizes were checked then, and `Pod` takes any bytes. Tokens of hashes are 4 bytes, those of arrays a key of 4.
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

/// Reads consecutive entries of an array into `values`.
///
/// # Errors
/// `EINVAL` on kernels without batches (before 5.6).
pub(super) fn read_array<V: Pod>(map: &OwnedFd, first: u32, values: &mut [V]) -> io::Result<()> {
    let mut keys = vec![0u32; values.len()];
    // The kernel goes on behind the key it is given.
    let mut from = [0; 8];
    from[..4].copy_from_slice(&first.wrapping_sub(1).to_ne_bytes());
    let mut next = [0; 8];
    let call = BatchCall {
        map: map.as_fd(),
        writes: false,
        from: (first > 0).then_some(&from),
        next: &raw mut next,
        keys: keys.as_mut_ptr().cast(),
        values: values.as_mut_ptr().cast(),
        count: values.len() as u32,
    };
    // SAFETY: both slices have room for `count` entries of the map's sizes, and `Pod` takes any bytes.
    match unsafe { map_batch(call) }.1 {
        // The end of the map was reached with the last entry.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result,
    }
}

/// Writes consecutive entries of an array.
///
/// # Errors
/// `EINVAL` on kernels without batches (before 5.6).
pub(super) fn write_array<V: Pod>(map: &OwnedFd, first: u32, values: &mut [V]) -> io::Result<()> {
    let mut keys: Vec<u32> = (first..).take(values.len()).collect();
    let call = BatchCall {
        map: map.as_fd(),
        writes: true,
        from: None,
        next: std::ptr::null_mut(),
        keys: keys.as_mut_ptr().cast(),
        values: values.as_mut_ptr().cast(),
        count: values.len() as u32,
    };
    // SAFETY: both slices hold `count` entries of the map's sizes, and a write changes neither.
    unsafe { map_batch(call) }.1
}
