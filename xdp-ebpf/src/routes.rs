//! Questions to the kernel's routing table.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED,
        BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as FibParams,
    },
    helpers,
};
use xdp_common::tables::Route;

use crate::{
    family::{AF_INET, Maps},
    maps::Kernel,
};

impl<F: Maps> Kernel<F> {
    /// Asks the kernel's routing table.
    #[inline(always)]
    pub(crate) fn ask(self, ifindex: u32, src: F::Addr, dst: F::Addr, tos: u8, proto: u8) -> Route {
        let mut question = MaybeUninit::uninit();
        let params = zeroed(&mut question);
        match self.look_up(params, ifindex, src, dst, tos, proto) as u32 {
            // At tc the kernel compares the frame at hand with the device, after all else (bpf_skb_fib_lookup in net/core/filter.c);
            // the way is the same for shorter ones.
            BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_FRAG_NEEDED => Route::Hop {
                ifindex: params.ifindex,
                dmac: params.dmac,
                smac: params.smac,
                // SAFETY: in both cases the kernel has written the MTU into this union.
                mtu: unsafe { params.__bindgen_anon_1.mtu_result },
            },
            BPF_FIB_LKUP_RET_NO_NEIGH => Route::NoNeighbour { ifindex: params.ifindex },
            BPF_FIB_LKUP_RET_NOT_FWDED => Route::Local,
            _ => Route::Kernel,
        }
    }

    /// Fills a zeroed question in and asks it.
    #[inline(always)] // a few stores
    pub(crate) fn look_up(
        self,
        params: &mut FibParams,
        ifindex: u32,
        src: F::Addr,
        dst: F::Addr,
        tos: u8,
        proto: u8,
    ) -> i64 {
        F::ask(params, src, dst, tos);
        params.l4_protocol = proto;
        params.ifindex = ifindex;
        // A length of 0 asks for no MTU check; the answer carries the MTU in its place (5.13).
        params.__bindgen_anon_1.tot_len = 0;
        // SAFETY: context and parameters are valid; the size is that of the structure.
        unsafe { helpers::bpf_fib_lookup(self.ctx, &raw mut *params, size_of::<FibParams>() as i32, 0) }
    }
}

/// The next hop of IPv4 that a question is answered with, which is the destination where that is a neighbour.
#[inline(always)] // one caller
pub(crate) fn next_hop(asked: impl FnOnce(&mut FibParams)) -> Option<[u8; 4]> {
    let mut question = MaybeUninit::uninit();
    let params = zeroed(&mut question);
    asked(params);
    // A gateway of IPv6 is written over it.
    if params.family != AF_INET {
        return None;
    }
    // SAFETY: the question has had a destination there, and the kernel has left it or written a gateway.
    Some(unsafe { params.__bindgen_anon_4.ipv4_dst }.to_ne_bytes())
}

/// Parameters of the routing table's helper, aligned so that words can be written.
#[repr(C, align(8))]
struct Question(FibParams);

const _: () =
    assert!(size_of::<Question>() == size_of::<FibParams>(), "whole words, and nothing behind them");

/// Zeroes a question word by word. As a whole it becomes a call, and before kernel 6.8 the frame of even an empty function
/// takes 32 bytes of the stack that all calls share.
#[inline(always)] // see above
fn zeroed(question: &mut MaybeUninit<Question>) -> &mut FibParams {
    let words = question.as_mut_ptr().cast::<u64>();
    let mut at = 0;
    while at < size_of::<Question>() / 8 {
        // SAFETY: within the structure, which is aligned to words.
        unsafe { words.add(at).write_volatile(0) };
        at += 1;
    }
    // SAFETY: every byte has been written, and the structure is plain numbers.
    unsafe { &mut question.assume_init_mut().0 }
}
