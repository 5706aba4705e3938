//! Whole maps, whatever they hold. Arrays are read and written in one call: a long sequence of frames looks at every counter
//! after each.

use std::{
    ffi::c_long,
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Commands of bpf(2).
const BPF_MAP_DELETE_ELEM: c_long = 3;
const BPF_MAP_GET_NEXT_KEY: c_long = 4;
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

/// The same for one entry.
#[repr(C)]
struct EntryAttr {
    map_fd: u64,
    key: u64,
    next_key: u64,
    flags: u64,
}

/// Removes every entry of a map whose keys have so many bytes.
pub(crate) fn remove_all(map: BorrowedFd<'_>, key_size: usize) -> io::Result<()> {
    let mut key = vec![0u8; key_size];
    loop {
        match entry_call(BPF_MAP_GET_NEXT_KEY, map, 0, key.as_mut_ptr()) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
            first => first?,
        }
        entry_call(BPF_MAP_DELETE_ELEM, map, key.as_mut_ptr() as u64, std::ptr::null_mut())?;
    }
}

fn entry_call(command: c_long, map: BorrowedFd<'_>, key: u64, next_key: *mut u8) -> io::Result<()> {
    // The number of the map has 32 bits, and as many zeros behind it.
    let map_fd = u64::from(map.as_raw_fd().cast_unsigned());
    let mut attr = EntryAttr { map_fd, key, next_key: next_key as u64, flags: 0 };
    // SAFETY: the attribute is initialised and outlives the call; keys are null or have the map's size.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attr, size_of::<EntryAttr>()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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
    let is_end = io::Error::last_os_error().raw_os_error() == Some(libc::ENOENT);
    (result == 0 || is_end) && attr.count == entries
}
