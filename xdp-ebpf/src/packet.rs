//! Frames in the kernel: all pointer arithmetic of the programs is here.

use core::{arch::asm, mem::offset_of};

use aya_ebpf::{
    EbpfContext,
    bindings::{__sk_buff, BPF_F_INGRESS, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, xdp_action, xdp_md},
    helpers,
    programs::{TcContext, XdpContext},
};
use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};
use xdp_common::{
    answer::{self, Answer, AnswerFrame, Finisher},
    checksum,
    frame::{self, Frame, Headers, Packet, TCP_CHECK, UDP_CHECK, View},
    net::{Ip6, TCP, V4, V6},
    verdict::{Hop, Rewrite},
};

const IP: usize = EthHdr::LEN;

/// Families whose frames can be rewritten.
pub(crate) trait Wire: Answer {
    /// Offset of the time to live, or hop limit.
    const TTL: usize;
    /// Offset of the checksum of the IP header, where there is one.
    const IP_CHECK: Option<usize>;
    /// Offset of the source address, which the destination follows.
    const ADDRS: usize;
    /// How much of a frame holds the headers that the parser reads: Ethernet, IP with options or extension headers, TCP.
    const HEADERS_LEN: usize;
    /// Flags of a checksum that covers the addresses, for the kernel's helper.
    const PSEUDO_HEADER: u64;
    /// Writes an address.
    fn set_addr<const N: usize>(headers: Bytes<N>, at: usize, addr: Self::Addr);
    /// [`XdpFrame::address`], [`XdpFrame::rewrite`] and the answers, with the lengths of this family's headers proven.
    fn address(frame: &XdpFrame, packet: &Packet<Self::Addr>, hop: &Hop);
    fn rewrite(frame: &XdpFrame, packet: &Packet<Self::Addr>, rewrite: &Rewrite<Self::Addr>);
    fn answer<R: Replace>(
        frame: &R,
        packet: &Packet<Self::Addr>,
        finisher: Finisher,
        out: &mut AnswerFrame,
    ) -> bool;
}

macro_rules! wire {
    ($family:ident { $($item:item)* }) => {
        impl Wire for $family {
            $($item)*

            #[inline(always)] // bounds proofs do not survive a call
            fn address(frame: &XdpFrame, packet: &Packet<Self::Addr>, hop: &Hop) {
                frame.address::<Self, { IP + <Self as Headers>::LEN }>(packet, hop);
            }

            #[inline(always)] // as above
            fn rewrite(frame: &XdpFrame, packet: &Packet<Self::Addr>, rewrite: &Rewrite<Self::Addr>) {
                frame.rewrite::<Self, { IP + <Self as Headers>::LEN }>(packet, rewrite);
            }

            #[inline(always)] // as above
            fn answer<R: Replace>(
                frame: &R,
                packet: &Packet<Self::Addr>,
                finisher: Finisher,
                out: &mut AnswerFrame,
            ) -> bool {
                answer::<
                    Self,
                    R,
                    { answer::reset_len::<Self>() },
                    { IP + <Self as Headers>::LEN + UdpHdr::LEN },
                    { answer::unreachable_len::<Self>() },
                >(frame, packet, finisher, out)
            }
        }
    };
}

wire! { V4 {
    const TTL: usize = IP + offset_of!(Ipv4Hdr, ttl);
    const IP_CHECK: Option<usize> = Some(IP + offset_of!(Ipv4Hdr, check));
    const ADDRS: usize = IP + offset_of!(Ipv4Hdr, src_addr);
    const HEADERS_LEN: usize = IP + 60 + TcpHdr::LEN;
    const PSEUDO_HEADER: u64 = BPF_F_PSEUDO_HDR as u64;

    #[inline(always)] // one store
    fn set_addr<const N: usize>(headers: Bytes<N>, at: usize, addr: [u8; 4]) {
        headers.set_quad(at, addr);
    }
} }

wire! { V6 {
    const TTL: usize = IP + offset_of!(Ipv6Hdr, hop_limit);
    const IP_CHECK: Option<usize> = None;
    const ADDRS: usize = IP + offset_of!(Ipv6Hdr, src_addr);
    const HEADERS_LEN: usize = IP + Ipv6Hdr::LEN + frame::EXTENSIONS_LEN_MAX + TcpHdr::LEN;
    const PSEUDO_HEADER: u64 = (BPF_F_PSEUDO_HDR | BPF_F_IPV6) as u64;

    #[inline(always)] // four stores
    fn set_addr<const N: usize>(headers: Bytes<N>, at: usize, addr: Ip6) {
        let [a, b, c, d] = addr.words().map(u32::to_ne_bytes);
        headers.set_quad(at, a);
        headers.set_quad(at + 4, b);
        headers.set_quad(at + 8, c);
        headers.set_quad(at + 12, d);
    }
} }

/// Says to the checksum helper that no checksum of an IP header makes up for a change of addresses, so that the sum of the
/// whole frame stays as it is (6.16, and stable kernels of that time; include/uapi/linux/bpf.h).
const BPF_F_IPV6: u32 = 1 << 7;

/// A frame at XDP.
pub(crate) struct XdpFrame {
    ctx: XdpContext,
    /// Whether a frame may lie in several buffers; a constant of each program.
    has_frags: bool,
}

/// A frame that can be made another.
pub(crate) trait Replace: Frame {
    /// Makes the frame these bytes; what it is then is unknown when that fails.
    fn replace<const N: usize>(&self, bytes: &[u8; N]) -> bool;
}

/// Turns a packet into the answer to it, to be sent out where it came in.
#[inline(always)] // bounds proofs do not survive a call
fn answer<F: Answer, R: Replace, const RESET: usize, const DATAGRAM: usize, const UNREACHABLE: usize>(
    frame: &R,
    packet: &Packet<F::Addr>,
    finisher: Finisher,
    area: &mut AnswerFrame,
) -> bool {
    // Behind headers without options or extension headers.
    if packet.l4_offset as usize != IP + F::LEN {
        return false;
    }
    if packet.key.proto == TCP {
        let (Some(headers), Some(out)) = (frame.view::<RESET>(0), area.first_chunk_mut::<RESET>()) else {
            return false;
        };
        answer::reset::<F, _>(&headers, packet.l4_len, finisher, out) && frame.replace(out)
    } else {
        let (Some(headers), Some(out)) = (frame.view::<DATAGRAM>(0), area.first_chunk_mut::<UNREACHABLE>())
        else {
            return false;
        };
        answer::unreachable::<F, _>(&headers, finisher, out);
        frame.replace(out)
    }
}

impl XdpFrame {
    #[cfg(feature = "trace")]
    pub(crate) fn ctx(&self) -> &XdpContext {
        &self.ctx
    }

    /// A frame that may lie in several buffers, with the headers in the first, if `has_frags`.
    #[inline(always)]
    pub(crate) fn new(ctx: *mut xdp_md, has_frags: bool) -> Self {
        Self { ctx: XdpContext::new(ctx), has_frags }
    }

    #[inline(always)]
    pub(crate) fn ifindex(&self) -> u32 {
        self.ctx.ingress_ifindex() as u32
    }

    #[inline(always)]
    pub(crate) fn context(&self) -> *mut core::ffi::c_void {
        self.ctx.as_ptr()
    }

    /// Addresses the frame to its next hop and takes one from its time to live.
    #[inline(always)]
    fn address<F: Wire, const HEAD: usize>(&self, packet: &Packet<F::Addr>, hop: &Hop) {
        let Some(headers) = self.view::<HEAD>(0) else { return };
        let ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]) = (hop.dmac, hop.smac);
        headers.set_quad(0, [d0, d1, d2, d3]);
        headers.set_quad(4, [d4, d5, s0, s1]);
        headers.set_quad(8, [s2, s3, s4, s5]);
        headers.set_u8(F::TTL, packet.ttl - 1);
        if let Some(at) = F::IP_CHECK {
            let check = u16::from_ne_bytes(headers.pair(at));
            headers.set_pair(at, checksum::update(check, checksum::TTL_DECREMENT).to_ne_bytes());
        }
    }

    /// Rewrites addresses and ports. The parser has seen every byte that this touches, so no check here can fail; they
    /// are for the verifier.
    #[inline(always)]
    fn rewrite<F: Wire, const HEAD: usize>(&self, packet: &Packet<F::Addr>, rewrite: &Rewrite<F::Addr>) {
        let Some(headers) = self.view::<HEAD>(0) else { return };
        if let Some(at) = F::IP_CHECK {
            let check = u16::from_ne_bytes(headers.pair(at));
            headers.set_pair(at, checksum::update(check, rewrite.addr_delta).to_ne_bytes());
        }
        F::set_addr(headers, F::ADDRS, rewrite.src);
        F::set_addr(headers, F::ADDRS + size_of::<F::Addr>(), rewrite.dst);
        if packet.key.proto == TCP {
            let Some(tcp) = self.view::<{ TcpHdr::LEN }>(packet.l4_offset as usize) else { return };
            tcp.set_pair(0, rewrite.sport);
            tcp.set_pair(2, rewrite.dport);
            tcp.set_pair(TCP_CHECK, checksum::update(packet.check, rewrite.l4_delta).to_ne_bytes());
        } else {
            let Some(udp) = self.view::<{ UdpHdr::LEN }>(packet.l4_offset as usize) else { return };
            udp.set_pair(0, rewrite.sport);
            udp.set_pair(2, rewrite.dport);
            // UDP may go without a checksum, and then stays without (RFC 768, RFC 6935).
            if packet.check != 0 {
                udp.set_pair(UDP_CHECK, checksum::update_udp(packet.check, rewrite.l4_delta).to_ne_bytes());
            }
        }
    }

    #[inline(always)]
    pub(crate) fn redirect(&self, ifindex: u32) -> u32 {
        // SAFETY: the helper takes numbers only.
        unsafe { helpers::bpf_redirect(ifindex, 0) as u32 }
    }

    /// Answers a refused packet.
    #[inline(always)]
    pub(crate) fn answer<F: Wire>(&self, packet: &Packet<F::Addr>, area: &mut AnswerFrame) -> Option<u32> {
        if F::answer(self, packet, Finisher::Nobody, area) { Some(xdp_action::XDP_TX) } else { None }
    }
}

impl Replace for XdpFrame {
    #[inline(always)]
    fn replace<const N: usize>(&self, bytes: &[u8; N]) -> bool {
        let len = match self.has_frags {
            // SAFETY: the context is the verifier's; the helper (5.18) takes nothing else.
            true => unsafe { helpers::generated::bpf_xdp_get_buff_len(self.ctx.ctx) as usize },
            false => self.ctx.data_end() - self.ctx.data(),
        };
        // SAFETY: the context is the verifier's; the helper takes a number beside it.
        if unsafe { helpers::bpf_xdp_adjust_tail(self.ctx.ctx, N as i32 - len as i32) } != 0 {
            return false;
        }
        let Some(frame) = self.view::<N>(0) else { return false };
        frame.fill(bytes);
        true
    }
}

impl Frame for XdpFrame {
    type View<const N: usize> = Bytes<N>;

    #[inline(always)]
    fn view<const N: usize>(&self, offset: usize) -> Option<Bytes<N>> {
        Bytes::within(self.ctx.data(), self.ctx.data_end(), offset)
    }

    #[inline(always)]
    fn reaches(&self, length: usize) -> bool {
        let seen = self.ctx.data_end() - self.ctx.data();
        if seen >= length || !self.has_frags {
            return seen >= length;
        }
        // SAFETY: the context is the verifier's; the helper (5.18) takes nothing else.
        unsafe { helpers::generated::bpf_xdp_get_buff_len(self.ctx.ctx) as usize >= length }
    }
}

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

    /// Takes a frame of a family, with its headers pulled into the linear part where a driver has left them elsewhere.
    #[inline(always)]
    pub(crate) fn new<F: Wire>(ctx: *mut __sk_buff) -> Self {
        let ctx = TcContext::new(ctx);
        if ctx.data_end() - ctx.data() < F::HEADERS_LEN && ctx.len() as usize > ctx.data_end() - ctx.data() {
            // Failure leaves the frame as it was; the parser then finds its headers out of sight.
            let _ = ctx.pull_data((F::HEADERS_LEN as u32).min(ctx.len()));
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
        let _ = self.ctx.store(F::ADDRS, &addrs, 0);
        let _ = self.ctx.store(packet.l4_offset as usize, &ports, 0);
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
        if F::answer(self, packet, finisher, area) { Some(self.redirect(way)) } else { None }
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

const _: () = assert!(TcpHdr::LEN >= UdpHdr::LEN);

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

/// `N` bytes of a frame, proven to lie within it.
///
/// Frames are accessed by assembly: an IPv4 address lies at an odd multiple of two, where the compiler would go byte by
/// byte, though the kernel and both architectures take whole words there (`CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS`).
#[derive(Clone, Copy)]
pub(crate) struct Bytes<const N: usize>(*mut u8);

impl<const N: usize> Bytes<N> {
    /// The comparison that the verifier looks for.
    #[inline(always)]
    fn within(data: usize, end: usize, offset: usize) -> Option<Self> {
        let start = data + offset;
        if start + N > end { None } else { Some(Self(start as *mut u8)) }
    }

    #[inline(always)]
    fn set_u8(self, at: usize, value: u8) {
        // SAFETY: `within` has proven N bytes, and callers give constants that end within them.
        unsafe { self.0.add(at).write_volatile(value) }
    }

    #[inline(always)]
    fn set_pair(self, at: usize, value: [u8; 2]) {
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
}

impl<const N: usize> Bytes<N> {
    /// Writes all of them.
    #[inline(always)]
    fn fill(self, bytes: &[u8; N]) {
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
}
