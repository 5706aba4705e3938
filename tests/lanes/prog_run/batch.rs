//! Whole arrays in one call: a long sequence of frames looks at every counter after each.

use std::{
    ffi::c_long,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Commands of bpf(2).
const BPF_MAP_LOOKUP_BATCH: c_long = 24;
const BPF_MAP_UPDATE_BATCH: c_long = 26;

/// `union bpf_attr` for batches, as in include/uapi/linux/bpf.h.
#[repr(C)]
struct Attr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: i32,
    elem_flags: u64,
    flags: u64,
}

/// Reads an array of `entries`, with as many values to an entry as `values` has room for; false where the kernel has no
/// batches for such a map.
pub(crate) fn read(map: BorrowedFd<'_>, values: &mut [u64], entries: u32) -> bool {
    let mut keys = vec![0u32; entries as usize];
    call(BPF_MAP_LOOKUP_BATCH, map, keys.as_mut_ptr(), values.as_mut_ptr(), entries)
}

/// Fills an array with zeros, `words` of 64 bits to an entry; false where the kernel has no batches for such a map.
pub(crate) fn clear(map: BorrowedFd<'_>, entries: u32, words: usize) -> bool {
    let mut keys: Vec<u32> = (0..entries).collect();
    let mut values = vec![0u64; entries as usize * words];
    call(BPF_MAP_UPDATE_BATCH, map, keys.as_mut_ptr(), values.as_mut_ptr(), entries)
}

fn call(command: c_long, map: BorrowedFd<'_>, keys: *mut u32, values: *mut u64, entries: u32) -> bool {
    let mut next = 0u32;
    let mut attr = Attr {
        in_batch: 0,
        out_batch: (&raw mut next) as u64,
        keys: keys as u64,
        values: values as u64,
        count: entries,
        map_fd: map.as_raw_fd(),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: the attribute is initialised and outlives the call; the callers' vectors hold `entries` keys of 4 bytes and
    // as many values of the map's size, and every bit pattern is a value of theirs.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attr, size_of::<Attr>()) };
    // The end of the array comes with its last entry.
    let is_end = std::io::Error::last_os_error().raw_os_error() == Some(libc::ENOENT);
    (result == 0 || is_end) && attr.count == entries
}
