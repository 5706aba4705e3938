//! Frames in the kernel: all pointer arithmetic of the programs is here.

use core::{arch::asm, mem::offset_of};

use aya_ebpf::{
    EbpfContext,
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, xdp_action},
    helpers,
    programs::{TcContext, XdpContext},
};
use network_types::{eth::EthHdr, ip::Ipv4Hdr, tcp::TcpHdr, udp::UdpHdr};
use xdp_common::{
    answer::{self, AnswerFrame, Finisher},
    checksum,
    frame::{Frame, Packet, TCP_CHECK, UDP_CHECK, View},
    net::TCP,
    verdict::{Hop, Rewrite},
};

const TTL: usize = EthHdr::LEN + offset_of!(Ipv4Hdr, ttl);
const IP_CHECK: usize = EthHdr::LEN + offset_of!(Ipv4Hdr, check);
const IP_ADDRS: usize = EthHdr::LEN + offset_of!(Ipv4Hdr, src_addr);
/// A frame at XDP.
pub(crate) struct XdpFrame<'a> {
    ctx: &'a XdpContext,
    /// Whether a frame may lie in several buffers; a constant of each program.
    has_frags: bool,
}

impl<'a> XdpFrame<'a> {
    #[cfg(feature = "trace")]
    pub(crate) fn ctx(&self) -> &XdpContext {
        self.ctx
    }

    #[inline(always)]
    pub(crate) fn new(ctx: &'a XdpContext) -> Self {
        Self { ctx, has_frags: false }
    }

    /// A frame that may lie in several buffers; the headers are in the first.
    #[inline(always)]
    pub(crate) fn with_frags(ctx: &'a XdpContext) -> Self {
        Self { ctx, has_frags: true }
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
    pub(crate) fn address(&self, packet: &Packet<[u8; 4]>, hop: &Hop) {
        let Some(headers) = self.view::<{ EthHdr::LEN + Ipv4Hdr::LEN }>(0) else { return };
        let ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]) = (hop.dmac, hop.smac);
        headers.set_quad(0, [d0, d1, d2, d3]);
        headers.set_quad(4, [d4, d5, s0, s1]);
        headers.set_quad(8, [s2, s3, s4, s5]);
        headers.set_u8(TTL, packet.ttl - 1);
        let check = u16::from_ne_bytes(headers.pair(IP_CHECK));
        headers.set_pair(IP_CHECK, checksum::update(check, checksum::TTL_DECREMENT).to_ne_bytes());
    }

    /// Rewrites addresses and ports. The parser has seen every byte that this touches, so no check here can fail; they
    /// are for the verifier.
    #[inline(always)]
    pub(crate) fn rewrite(&self, packet: &Packet<[u8; 4]>, rewrite: &Rewrite<[u8; 4]>) {
        let Some(headers) = self.view::<{ EthHdr::LEN + Ipv4Hdr::LEN }>(0) else { return };
        let check = u16::from_ne_bytes(headers.pair(IP_CHECK));
        headers.set_pair(IP_CHECK, checksum::update(check, rewrite.addr_delta).to_ne_bytes());
        headers.set_quad(IP_ADDRS, rewrite.src);
        headers.set_quad(IP_ADDRS + 4, rewrite.dst);
        if packet.key.proto == TCP {
            let Some(tcp) = self.view::<{ TcpHdr::LEN }>(packet.l4_offset) else { return };
            tcp.set_pair(0, rewrite.sport);
            tcp.set_pair(2, rewrite.dport);
            tcp.set_pair(TCP_CHECK, checksum::update(packet.check, rewrite.l4_delta).to_ne_bytes());
        } else {
            let Some(udp) = self.view::<{ UdpHdr::LEN }>(packet.l4_offset) else { return };
            udp.set_pair(0, rewrite.sport);
            udp.set_pair(2, rewrite.dport);
            // UDP over IPv4 may go without a checksum, and then stays without (RFC 768).
            if packet.check != 0 {
                udp.set_pair(UDP_CHECK, checksum::update_udp(packet.check, rewrite.l4_delta).to_ne_bytes());
            }
        }
    }

    /// Turns a packet into the answer to it, to be sent out where it came in.
    #[inline(always)]
    pub(crate) fn answer(&self, packet: &Packet<[u8; 4]>, area: &mut AnswerFrame) -> Option<u32> {
        if packet.l4_offset != PLAIN_HEADERS_LEN {
            return None;
        }
        let is_sent = if packet.key.proto == TCP {
            let headers = self.view::<{ answer::RESET_LEN }>(0)?;
            let out = area.first_chunk_mut()?;
            answer::reset(&headers, packet.l4_len, Finisher::Nobody, out) && self.replace(out)
        } else {
            let headers = self.view::<{ PLAIN_HEADERS_LEN + UdpHdr::LEN }>(0)?;
            let out = area.first_chunk_mut()?;
            answer::unreachable(&headers, Finisher::Nobody, out);
            self.replace(out)
        };
        if is_sent { Some(xdp_action::XDP_TX) } else { None }
    }

    /// Makes the frame these bytes.
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

    #[inline(always)]
    pub(crate) fn redirect(&self, ifindex: u32) -> u32 {
        // SAFETY: the helper takes numbers only.
        unsafe { helpers::bpf_redirect(ifindex, 0) as u32 }
    }
}

impl Frame for XdpFrame<'_> {
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

/// A frame at tc.
pub(crate) struct TcFrame<'a> {
    ctx: &'a TcContext,
}

impl<'a> TcFrame<'a> {
    #[cfg(feature = "trace")]
    pub(crate) fn ctx(&self) -> &TcContext {
        self.ctx
    }

    /// Takes the frame, with its headers pulled into the linear part where a driver has left them elsewhere.
    #[inline(always)]
    pub(crate) fn new(ctx: &'a TcContext) -> Self {
        if ctx.data_end() - ctx.data() < HEADERS_LEN && ctx.len() as usize > ctx.data_end() - ctx.data() {
            // Failure leaves the frame as it was; the parser then finds its headers out of sight.
            let _ = ctx.pull_data((HEADERS_LEN as u32).min(ctx.len()));
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
    pub(crate) fn rewrite(&self, packet: &Packet<[u8; 4]>, rewrite: &Rewrite<[u8; 4]>) {
        let (check_at, udp) = if packet.key.proto == TCP {
            (packet.l4_offset + TCP_CHECK, 0)
        } else {
            (packet.l4_offset + UDP_CHECK, BPF_F_MARK_MANGLED_0 as u64)
        };
        let addrs: [[u8; 4]; 2] = [rewrite.src, rewrite.dst];
        let ports: [[u8; 2]; 2] = [rewrite.sport, rewrite.dport];
        // Size 0 says that the argument is a difference of sums (bpf_l4_csum_replace in net/core/filter.c). The helpers
        // fail only on offsets outside the frame, which the parser has excluded.
        let _ =
            self.ctx.l4_csum_replace(check_at, 0, rewrite.addr_delta as u64, BPF_F_PSEUDO_HDR as u64 | udp);
        let _ = self.ctx.l4_csum_replace(check_at, 0, rewrite.port_delta() as u64, udp);
        let _ = self.ctx.l3_csum_replace(IP_CHECK, 0, rewrite.addr_delta as u64, 0);
        let _ = self.ctx.store(IP_ADDRS, &addrs, 0);
        let _ = self.ctx.store(packet.l4_offset, &ports, 0);
    }
}

impl TcFrame<'_> {
    /// Turns a packet into the answer to it and sends it out where it came in. tc programs take packets whose checksum
    /// the device is to finish, and their answers inherit that.
    #[inline(always)]
    pub(crate) fn answer(&self, packet: &Packet<[u8; 4]>, area: &mut AnswerFrame) -> Option<i32> {
        if packet.l4_offset != PLAIN_HEADERS_LEN {
            return None;
        }
        let is_ready = if packet.key.proto == TCP {
            let headers = self.view::<{ answer::RESET_LEN }>(0)?;
            let out = area.first_chunk_mut()?;
            answer::reset(&headers, packet.l4_len, Finisher::Device, out) && self.replace(out)
        } else {
            let headers = self.view::<{ PLAIN_HEADERS_LEN + UdpHdr::LEN }>(0)?;
            let out = area.first_chunk_mut()?;
            answer::unreachable(&headers, Finisher::Device, out);
            self.replace(out)
        };
        if !is_ready {
            return None;
        }
        // SAFETY: the helper takes numbers only.
        Some(unsafe { helpers::bpf_redirect(self.ifindex(), 0) as i32 })
    }

    /// Makes the frame these bytes.
    #[inline(always)]
    fn replace<const N: usize>(&self, bytes: &[u8; N]) -> bool {
        // SAFETY: the context is the verifier's, valid for the whole program.
        let is_resized = unsafe { helpers::bpf_skb_change_tail(self.skb(), N as u32, 0) } == 0;
        is_resized && self.ctx.store(0, bytes, 0).is_ok()
    }
}

/// Where TCP or UDP begins behind headers without options.
const PLAIN_HEADERS_LEN: usize = EthHdr::LEN + Ipv4Hdr::LEN;

/// The longest headers the parser reads: Ethernet, IPv4 with options, TCP without.
const HEADERS_LEN: usize = EthHdr::LEN + 60 + TcpHdr::LEN;
const _: () = assert!(TcpHdr::LEN >= UdpHdr::LEN);

impl Frame for TcFrame<'_> {
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
