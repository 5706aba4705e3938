//! An array map in this process's memory, shared with the programs.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::AtomicU64,
};

/// The words of an array map that was made to be mapped (`BPF_F_MMAPABLE`, kernel 5.5).
#[derive(Debug)]
pub(super) struct Mapping {
    words: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: what is mapped belongs to the kernel and is touched through atomics only, from whichever thread.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `entries` values of `value_size` bytes, a multiple of 8.
    pub(super) fn new(map: &OwnedFd, entries: u32, value_size: usize) -> io::Result<Self> {
        let bytes = entries as usize * value_size.next_multiple_of(8);
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is there; the kernel checks the
        // length against the map.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let words =
            NonNull::new(address.cast()).ok_or_else(|| io::Error::other("a map was mapped at address 0"))?;
        Ok(Self { words, len: bytes / 8 })
    }

    /// The words; programs may change them at any time.
    pub(super) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has `len` aligned words and lives as long as `self`; others change them as atomics do.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.len) }
    }
}

impl AsRef<[AtomicU64]> for Mapping {
    fn as_ref(&self) -> &[AtomicU64] {
        self.words()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing borrows the words any more, and the range is the one that was mapped.
        unsafe { libc::munmap(self.words.as_ptr().cast(), self.len * 8) };
    }
}
