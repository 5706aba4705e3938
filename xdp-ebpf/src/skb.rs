//! Frames at tc, where the kernel has made an `skb` of them and its helpers keep their checksums right.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        __sk_buff, BPF_F_INGRESS, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
        TC_ACT_UNSPEC, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers,
    programs::TcContext,
};
use xdp_common::{
    answer::{AnswerFrame, Finisher},
    checksum,
    frame::{Frame, Packet, TCP_CHECK, UDP_CHECK},
    net::{SCTP, TCP},
    tunnel,
    verdict::{Rewrite, Verdict},
};

use crate::packet::{Bytes, Replace, Wire};

/// `VLAN_VID_MASK` (include/linux/if_vlan.h).
const VLAN_ID: u32 = 0x0fff;
/// What every frame has at least.
const ETHERNET_LEN: u32 = 14;

/// By which side of its interface a frame goes back.
#[derive(Clone, Copy)]
pub(crate) enum Turn {
    /// The interface sends it.
    Out,
    /// The interface receives it.
    In,
}

/// A frame at tc.
pub(crate) struct TcFrame {
    ctx: TcContext,
}

impl TcFrame {
    #[cfg(feature = "trace")]
    pub(crate) fn ctx(&self) -> &TcContext {
        &self.ctx
    }

    /// Takes a frame as it is.
    #[inline(always)]
    pub(crate) fn of(ctx: *mut __sk_buff) -> Self {
        Self { ctx: TcContext::new(ctx) }
    }

    /// The EtherType of the packet, as the kernel has found it.
    #[inline(always)]
    pub(crate) fn ethertype(&self) -> u16 {
        // SAFETY: the context is the verifier's, valid for the whole program.
        u16::from_be(unsafe { (*self.skb()).protocol } as u16)
    }

    /// Whether it is of a VLAN, whose tag the kernel has taken out of the headers by then. A tag of VLAN 0 gives a priority, and
    /// the frame is of no VLAN (IEEE 802.1Q, table 9-2).
    #[inline(always)]
    pub(crate) fn is_tagged(&self) -> bool {
        // SAFETY: the context is the verifier's, valid for the whole program.
        self.has_tag() && unsafe { (*self.skb()).vlan_tci } & VLAN_ID != 0
    }

    /// Whether it bears a tag at all, so that XDP has not read it.
    #[inline(always)]
    pub(crate) fn has_tag(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.skb()).vlan_present != 0 }
    }

    /// Takes a frame of a family, with its headers pulled into the linear part where a driver has left them elsewhere.
    #[inline(always)]
    pub(crate) fn new<F: Wire>(ctx: *mut __sk_buff) -> Self {
        Self::pulled(ctx, F::HEADERS_LEN)
    }

    /// Takes a frame with so much of it in the linear part, as far as it has that.
    #[inline(always)]
    pub(crate) fn pulled(ctx: *mut __sk_buff, len: usize) -> Self {
        let ctx = TcContext::new(ctx);
        if ctx.data_end() - ctx.data() < len && ctx.len() as usize > ctx.data_end() - ctx.data() {
            // Failure leaves the frame as it was; the parser then finds its headers out of sight.
            let _ = ctx.pull_data((len as u32).min(ctx.len()));
        }
        Self { ctx }
    }

    #[inline(always)]
    pub(crate) fn ifindex(&self) -> u32 {
        // SAFETY: the context is the verifier's, valid for the whole program.
        unsafe { (*self.skb()).ifindex }
    }

    #[inline(always)]
    pub(crate) fn context(&self) -> *mut core::ffi::c_void {
        self.ctx.as_ptr()
    }

    #[inline(always)]
    fn skb(&self) -> *mut __sk_buff {
        self.ctx.as_ptr().cast()
    }

    /// Rewrites addresses and ports by the kernel's helpers, which know whether a checksum is still to be finished
    /// (`CHECKSUM_PARTIAL`) or already summed up (`CHECKSUM_COMPLETE`).
    #[inline(always)]
    pub(crate) fn rewrite<F: Wire>(&self, packet: &Packet<F::Addr>, rewrite: &Rewrite<F::Addr>) {
        if packet.is_later_fragment() {
            return self.rewrite_addresses::<F>(rewrite);
        }
        if packet.key.proto == SCTP {
            self.rewrite_sctp(packet, rewrite);
            return self.rewrite_addresses::<F>(rewrite);
        }
        let (check_at, udp) = if packet.key.proto == TCP {
            (packet.l4_offset as usize + TCP_CHECK, 0)
        } else {
            (packet.l4_offset as usize + UDP_CHECK, BPF_F_MARK_MANGLED_0 as u64)
        };
        let addrs: [F::Addr; 2] = [rewrite.src, rewrite.dst];
        let ports: [[u8; 2]; 2] = [rewrite.sport, rewrite.dport];
        // Size 0 says that the argument is a difference of sums (bpf_l4_csum_replace in net/core/filter.c). The helpers
        // fail only on offsets outside the frame, which the parser has excluded, and on flags they do not know.
        let addr_delta = rewrite.addr_delta as u64;
        let replaced = self.ctx.l4_csum_replace(check_at, 0, addr_delta, F::PSEUDO_HEADER | udp);
        if !F::HEADER_CHECKSUM && replaced.is_err() {
            let _ = self.ctx.l4_csum_replace(check_at, 0, addr_delta, BPF_F_PSEUDO_HDR as u64 | udp);
            // Without that flag the helper takes the change from the sum of the whole frame, as if the checksum of an IP
            // header made up for it. Where there is no such sum, this fails and is not needed.
            // SAFETY: the context is the verifier's; the helper takes a number beside it.
            let _ = unsafe { helpers::bpf_csum_update(self.skb(), addr_delta as u32) };
        }
        let _ = self.ctx.l4_csum_replace(check_at, 0, rewrite.port_delta() as u64, udp);
        if let Some(at) = F::IP_CHECK {
            let _ = self.ctx.l3_csum_replace(at, 0, addr_delta, 0);
        }
        let _ = self.ctx.store(F::ADDRS_AT, &addrs, 0);
        let _ = self.ctx.store(packet.l4_offset as usize, &ports, 0);
    }

    /// Writes by the kernel's helper: to write directly would have every skb copied that is shared with a socket, of all
    /// that the program sees.
    #[inline(always)]
    pub(crate) fn put<T>(&self, at: usize, value: &T) {
        // Fails only beyond the frame, where nothing has been read.
        let _ = self.ctx.store(at, value, BPF_F_RECOMPUTE_CSUM as u64);
    }

    /// Rewrites the addresses, where no TCP or UDP checksum depends on them.
    #[inline(always)] // two callers
    fn rewrite_addresses<F: Wire>(&self, rewrite: &Rewrite<F::Addr>) {
        let addr_delta = rewrite.addr_delta as u64;
        match F::IP_CHECK {
            Some(at) => _ = self.ctx.l3_csum_replace(at, 0, addr_delta, 0),
            // Nothing in the frame makes up for the change; where the kernel keeps a sum of all of it, that changes too.
            // SAFETY: the context is the verifier's; the helper takes a number beside it.
            None => _ = unsafe { helpers::bpf_csum_update(self.skb(), addr_delta as u32) },
        }
        let _ = self.ctx.store(F::ADDRS_AT, &[rewrite.src, rewrite.dst], 0);
    }

    /// Copies the frame; its length, or nothing when it does not fit.
    #[inline(always)] // the verifier must see the length it has proven
    pub(crate) fn copy_to<const N: usize>(&self, room: &mut [u8; N]) -> Option<usize> {
        let len = self.ctx.len();
        // Compared with zero, it would be proven not to be by newer kernels than 6.1 only.
        if len < ETHERNET_LEN || len > N as u32 {
            return None;
        }
        // SAFETY: the context is the verifier's, and the room has so many bytes.
        let failed =
            unsafe { helpers::bpf_skb_load_bytes(self.skb().cast(), 0, room.as_mut_ptr().cast(), len) };
        if failed == 0 { Some(len as usize) } else { None }
    }

    /// Answers a refused packet where it came in; what the device was to do for its checksum it does for the answer's.
    #[inline(always)]
    pub(crate) fn answer<F: Wire>(
        &self,
        packet: &Packet<F::Addr>,
        area: &mut AnswerFrame,
        way: Turn,
    ) -> Option<i32> {
        let finisher = if packet.looks_offloaded() { Finisher::Device } else { Finisher::Nobody };
        let is_answered = match packet.key.proto {
            SCTP => F::abort(self, packet, finisher, area),
            _ => F::answer(self, packet, finisher, area),
        };
        is_answered.then(|| self.redirect(way))
    }

    /// Sends a packet on in another one, by the neighbour that the kernel finds. Where there is no room for that, the frame is
    /// the kernel's.
    #[inline(always)]
    pub(crate) fn tunnel<F: Wire>(&self, packet: &Packet<F::Addr>, verdict: &Verdict<F::Addr>) -> i32 {
        // SAFETY: the context is the verifier's; the helper takes numbers beside it.
        let refused = unsafe {
            helpers::bpf_skb_adjust_room(self.skb(), F::LEN as i32, BPF_ADJ_ROOM_MAC, F::AROUND as u64)
        };
        if refused != 0 {
            return TC_ACT_UNSPEC;
        }
        self.age::<F>(packet.ttl, F::LEN);
        tunnel::surround::<F, _>(self, packet, verdict.rewrite.src, verdict.rewrite.dst);
        self.leave_by(verdict.hop.ifindex)
    }

    /// Takes one from the time to live, of so much, in an IP header that lies so far behind where a frame has it.
    #[inline(always)] // helper calls
    pub(crate) fn age<F: Wire>(&self, ttl: u8, behind: usize) {
        if let Some(at) = F::IP_CHECK {
            let _ = self.ctx.l3_csum_replace(behind + at, 0, checksum::TTL_DECREMENT as u64, 0);
        }
        self.put(behind + F::TTL_AT, &(ttl - 1));
    }

    /// Takes the tag off that gives a priority: it was for this link alone.
    #[inline(always)]
    pub(crate) fn untag(&self) {
        if self.has_tag() {
            // Failure, for want of memory, leaves the tag on, which says nothing on the next link either.
            // SAFETY: the context is the verifier's.
            let _ = unsafe { helpers::bpf_skb_vlan_pop(self.skb()) };
        }
    }

    /// Sends the frame to the one or the other side of the interface it is on.
    #[inline(always)]
    pub(crate) fn redirect(&self, way: Turn) -> i32 {
        let flags = match way {
            Turn::Out => 0,
            Turn::In => BPF_F_INGRESS as u64,
        };
        // SAFETY: the helper takes numbers only.
        unsafe { helpers::bpf_redirect(self.ifindex(), flags) as i32 }
    }

    /// Sends the frame out of an interface to whatever next hop the kernel finds there.
    #[inline(always)]
    pub(crate) fn leave_by(&self, ifindex: u32) -> i32 {
        // SAFETY: without parameters the helper takes numbers only (5.10).
        unsafe { helpers::bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
    }

    /// Whether a process of this node sends the frame, and nobody else whom the kernel forwards for.
    #[inline(always)]
    pub(crate) fn is_own(&self) -> bool {
        // SAFETY: the context is the verifier's, valid for the whole program.
        unsafe { (*self.skb()).ingress_ifindex == 0 }
    }
}

impl Replace for TcFrame {
    #[inline(always)]
    fn replace<const N: usize>(&self, bytes: &[u8; N]) -> bool {
        // SAFETY: the context is the verifier's, valid for the whole program.
        let is_resized = unsafe { helpers::bpf_skb_change_tail(self.skb(), N as u32, 0) } == 0;
        is_resized && self.ctx.store(0, bytes, 0).is_ok()
    }
}

impl Frame for TcFrame {
    type View<const N: usize> = Bytes<N>;

    #[inline(always)]
    fn view<const N: usize>(&self, offset: usize) -> Option<Bytes<N>> {
        Bytes::within(self.ctx.data(), self.ctx.data_end(), offset)
    }

    #[inline(always)]
    fn reaches(&self, length: usize) -> bool {
        self.ctx.len() as usize >= length
    }
}
