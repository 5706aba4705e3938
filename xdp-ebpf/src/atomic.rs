//! Words of map values that several CPUs change at once.

use core::arch::asm;

/// Atomically writes `new` where `expected` is; returns what was there. Fully ordered, as every fetching operation of
/// BPF is (Documentation/bpf/standardization/instruction-set.rst; kernel 5.12).
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub(crate) fn exchange_if(place: *mut u64, expected: u64, new: u64) -> u64 {
    let found: u64;
    // SAFETY: callers give an aligned word of a map value.
    unsafe {
        asm!("r0 = cmpxchg_64({place} + 0, r0, {new})", place = in(reg) place, new = in(reg) new,
            inlateout("r0") expected => found)
    }
    found
}

/// Stands in where the crate is only checked: the host has no register of that name.
#[cfg(not(target_arch = "bpf"))]
pub(crate) fn exchange_if(_place: *mut u64, expected: u64, _new: u64) -> u64 {
    expected
}

/// Atomically writes; fully ordered.
#[inline(always)]
pub(crate) fn exchange(place: *mut u64, new: u64) {
    // SAFETY: callers give an aligned word of a map value.
    unsafe { asm!("{new} = xchg_64({place} + 0, {new})", place = in(reg) place, new = inout(reg) new => _) }
}

/// Atomically sets bits; fully ordered, so that what is inserted afterwards is not seen before them.
///
/// # Safety
/// `place` is an aligned word of a map value.
#[inline(always)]
pub(crate) unsafe fn set_bits(place: *mut u64, bits: u64) {
    // SAFETY: as the caller says.
    if unsafe { place.read_volatile() } & bits == bits {
        return;
    }
    // SAFETY: as the caller says.
    unsafe {
        asm!("{bits} = atomic_fetch_or((u64 *)({place} + 0), {bits})", place = in(reg) place,
            bits = inout(reg) bits => _)
    }
}

/// Atomically adds; fully ordered.
#[inline(always)]
pub(crate) fn add(place: *mut u64, number: u64) {
    // SAFETY: callers give an aligned word of a map value.
    unsafe {
        asm!("{number} = atomic_fetch_add((u64 *)({place} + 0), {number})", place = in(reg) place,
            number = inout(reg) number => _)
    }
}

/// Orders what is read after a word behind it.
#[inline(always)]
pub(crate) fn fence(place: *mut u64) {
    add(place, 0);
}

/// One more; in assembly, because the compiler would unroll the loop and keep more on the stack than there is room for.
#[inline(always)]
pub(crate) fn after(mut way: u64) -> u64 {
    // SAFETY: arithmetic on a register.
    unsafe { asm!("{way} += 1", way = inout(reg) way, options(pure, nomem, nostack)) }
    way
}

/// The same reference, of which the compiler does not know that: it would read all that is behind it beforehand, and has no room for that.
#[inline(always)]
pub(crate) fn again<T>(it: &T) -> &T {
    let mut same = &raw const *it;
    // SAFETY: a move of a register to itself; without an instruction the line it comes from would stand twice in the debug information.
    unsafe { asm!("{same} = {same}", same = inout(reg) same, options(pure, readonly, nostack)) }
    // SAFETY: as it was.
    unsafe { &*same }
}

/// The same number, of which the compiler does not know how it came about: it would make a branch of each part.
#[inline(always)]
pub(crate) fn opaque(mut number: usize) -> usize {
    // SAFETY: a move of a register to itself; without an instruction the line it comes from would stand twice in the debug information.
    unsafe { asm!("{number} = {number}", number = inout(reg) number, options(pure, nomem, nostack)) }
    number
}
