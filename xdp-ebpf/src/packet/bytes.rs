//! The bytes of a frame: what is read and written by assembly.

use core::{arch::asm, mem::offset_of};

use xdp_common::{
    frame::View,
    icmp::Patch,
    net::{FlowKey, Ip6},
    verdict::Hop,
};

/// `N` bytes of a frame, proven to lie within it.
///
/// Frames are accessed by assembly: an IPv4 address lies at an odd multiple of two, where the compiler would go byte by
/// byte, though the kernel and both architectures take whole words there (`CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS`).
#[derive(Clone, Copy)]
pub(crate) struct Bytes<const N: usize>(*mut u8);

impl<const N: usize> Bytes<N> {
    /// The comparison that the verifier looks for.
    #[inline(always)]
    pub(crate) fn within(data: usize, end: usize, offset: usize) -> Option<Self> {
        let start = data + offset;
        if start + N > end { None } else { Some(Self(start as *mut u8)) }
    }

    #[inline(always)]
    pub(super) fn set_u8(self, at: usize, value: u8) {
        // SAFETY: `within` has proven N bytes, and callers give constants that end within them.
        unsafe { self.0.add(at).write_volatile(value) }
    }

    #[inline(always)]
    pub(crate) fn set_pair(self, at: usize, value: [u8; 2]) {
        // SAFETY: as in `set_u8`.
        unsafe {
            asm!("*(u16 *)({at} + 0) = {value}", at = in(reg) self.0.add(at), value = in(reg) u16::from_ne_bytes(value) as u64)
        }
    }

    #[inline(always)]
    pub(crate) fn set_quad(self, at: usize, value: [u8; 4]) {
        // SAFETY: as in `set_u8`.
        unsafe {
            asm!("*(u32 *)({at} + 0) = {value}", at = in(reg) self.0.add(at), value = in(reg) u32::from_ne_bytes(value) as u64)
        }
    }

    /// Copies an address, word by word: words that are all read before the first is written do not fit into ten registers.
    #[inline(always)]
    pub(super) fn put_address(self, at: usize, addr: &Ip6) {
        // SAFETY: as in `set_u8`; the words of the address are its only field.
        unsafe {
            asm!(
                "{word} = *(u64 *)({from} + 0)", "*(u64 *)({at} + 0) = {word}",
                "{word} = *(u64 *)({from} + 8)", "*(u64 *)({at} + 8) = {word}",
                at = in(reg) self.0.add(at), from = in(reg) addr, word = out(reg) _,
            )
        }
    }

    /// Copies the addresses of a next hop to the beginning of the frame, in the same way.
    #[inline(always)]
    pub(super) fn put_macs(self, hop: &Hop) {
        const { assert!(offset_of!(Hop, dmac) == 0 && offset_of!(Hop, smac) == 6) }
        // SAFETY: as in `set_u8`; the first twelve bytes of a hop are both addresses.
        unsafe {
            asm!(
                "{word} = *(u32 *)({from} + 0)", "*(u32 *)({at} + 0) = {word}",
                "{word} = *(u32 *)({from} + 4)", "*(u32 *)({at} + 4) = {word}",
                "{word} = *(u32 *)({from} + 8)", "*(u32 *)({at} + 8) = {word}",
                at = in(reg) self.0, from = in(reg) hop, word = out(reg) _,
            )
        }
    }
}

impl<const N: usize> Bytes<N> {
    /// Writes all of them.
    #[inline(always)]
    pub(super) fn fill(self, bytes: &[u8; N]) {
        let mut at = 0;
        while at < N {
            self.set_u8(at, bytes[at]);
            at += 1;
        }
    }
}

impl<const N: usize> View for Bytes<N> {
    #[inline(always)]
    fn u8(&self, at: usize) -> u8 {
        // SAFETY: as in `set_u8`.
        unsafe { self.0.add(at).read_volatile() }
    }

    #[inline(always)]
    fn pair(&self, at: usize) -> [u8; 2] {
        let value: u64;
        // SAFETY: as in `set_u8`; the instruction fills the register with zeros above 16 bits.
        unsafe { asm!("{value} = *(u16 *)({at} + 0)", at = in(reg) self.0.add(at), value = out(reg) value) }
        (value as u16).to_ne_bytes()
    }

    #[inline(always)]
    fn quad(&self, at: usize) -> [u8; 4] {
        let value: u64;
        // SAFETY: as in `set_u8`; the instruction fills the register with zeros above 32 bits.
        unsafe { asm!("{value} = *(u32 *)({at} + 0)", at = in(reg) self.0.add(at), value = out(reg) value) }
        (value as u32).to_ne_bytes()
    }

    #[inline(always)]
    fn copy_ports<A>(&self, proto: u8, to: &mut FlowKey<A>) {
        const {
            assert!(offset_of!(FlowKey<A>, dport) == offset_of!(FlowKey<A>, sport) + 2);
            assert!(offset_of!(FlowKey<A>, proto) == offset_of!(FlowKey<A>, sport) + 4);
            assert!(offset_of!(FlowKey<A>, zero) == offset_of!(FlowKey<A>, sport) + 5);
        }
        let ports = (&raw mut *to).cast::<u8>().wrapping_add(offset_of!(FlowKey<A>, sport));
        // SAFETY: as in `quad`; the last two words of a key are both ports, and the protocol with zeros behind it. By words, because
        // the kernel hashes words, and one that spans several stores waits until all of them have left the CPU.
        unsafe {
            asm!(
                "{word} = *(u32 *)({at} + 0)", "*(u32 *)({to} + 0) = {word}", "*(u32 *)({to} + 4) = {proto}",
                at = in(reg) self.0, to = in(reg) ports, proto = in(reg) proto as u64, word = out(reg) _,
            )
        }
    }

    #[inline(always)]
    fn copy_dmac(&self, to: &mut [u8; 6]) {
        // SAFETY: as in `quad`; so many bytes has the address.
        unsafe {
            asm!(
                "{low} = *(u32 *)({at} + 0)", "{high} = *(u16 *)({at} + 4)",
                "*(u32 *)({to} + 0) = {low}", "*(u16 *)({to} + 4) = {high}",
                at = in(reg) self.0, to = in(reg) to, low = out(reg) _, high = out(reg) _,
            )
        }
    }

    #[inline(always)]
    fn copy_address(&self, at: usize, to: &mut Ip6) {
        // SAFETY: as in `quad`; an address is sixteen bytes of words. The verifier takes them unaligned in maps and frames, not on the
        // stack; a packet and its key are aligned to eight.
        unsafe {
            asm!(
                "{low} = *(u64 *)({at} + 0)", "{high} = *(u64 *)({at} + 8)",
                "*(u64 *)({to} + 0) = {low}", "*(u64 *)({to} + 8) = {high}",
                at = in(reg) self.0.add(at), to = in(reg) to, low = out(reg) _, high = out(reg) _,
            )
        }
    }
}

impl<const N: usize> Patch for Bytes<N> {
    #[inline(always)] // one store
    fn put_pair(&self, at: usize, bytes: [u8; 2]) {
        self.set_pair(at, bytes);
    }

    #[inline(always)] // one store
    fn put_quad(&self, at: usize, bytes: [u8; 4]) {
        self.set_quad(at, bytes);
    }
}
