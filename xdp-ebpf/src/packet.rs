//! Frames in the kernel: all pointer arithmetic of the programs is here and in `bytes`. Those at tc are in `skb`.

use core::mem::offset_of;

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_PSEUDO_HDR, xdp_md},
    helpers,
    programs::XdpContext,
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
    net::{Address, Ip6, TCP, V4, V6},
    tables::Flow,
    tunnel::Tunnel,
    verdict::{Hop, Rewrite},
};

mod bytes;
pub(crate) mod sctp;
mod tunnel;

pub(crate) use bytes::Bytes;

const IP: usize = EthHdr::LEN;

/// Families whose frames can be rewritten.
pub(crate) trait Wire: Tunnel {
    /// Offset of the time to live, or hop limit.
    const TTL_AT: usize;
    /// Offset of the checksum of the IP header, where there is one.
    const IP_CHECK: Option<usize>;
    /// Offset of the source address, which the destination follows.
    const ADDRS_AT: usize;
    /// How much of a frame holds the headers that the parser reads: Ethernet, IP with options or extension headers, TCP.
    const HEADERS_LEN: usize;
    /// Flag of the family of a packet around another, for the kernel's helper.
    const AROUND: u32;
    /// Flags of a checksum that covers the addresses, for the kernel's helper.
    const PSEUDO_HEADER: u64;
    /// Writes an address.
    fn copy_addr<const N: usize>(headers: Bytes<N>, at: usize, addr: &Self::Addr);
    /// [`XdpFrame::address`], [`XdpFrame::rewrite`] and [`answer()`], with the lengths of this family's headers proven.
    fn address(frame: &XdpFrame, packet: &Packet<Self::Addr>, hop: &Hop);
    fn rewrite(frame: &XdpFrame, packet: &Packet<Self::Addr>, rewrite: &Rewrite<Self::Addr>);
    fn answer<R: Replace>(
        frame: &R,
        packet: &Packet<Self::Addr>,
        finisher: Finisher,
        out: &mut AnswerFrame,
    ) -> bool;
    /// [`too_big`], likewise.
    fn too_big<R: Replace>(frame: &R, packet: &Packet<Self::Addr>, mtu: u16, out: &mut AnswerFrame) -> bool;
    /// [`XdpFrame::tunnel`], likewise.
    fn tunnel(
        frame: &XdpFrame,
        packet: &Packet<Self::Addr>,
        hop: &Hop,
        from: Self::Addr,
        to: Self::Addr,
    ) -> bool;
    /// [`XdpFrame::relay`] and [`XdpFrame::relayed`], likewise.
    fn relay(frame: &XdpFrame, mtu: u16, out: &mut AnswerFrame) -> bool;
    fn relayed(frame: &XdpFrame, hop: Option<&Hop>, out: &mut AnswerFrame) -> bool;
    /// [`sctp::abort`], likewise.
    fn abort<R: Replace>(
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
                    { IP + <Self as Headers>::LEN + 16 },
                    { answer::too_big_len::<Self>() },
                >(frame, packet, finisher, out)
            }

            #[inline(always)] // as above
            fn too_big<R: Replace>(
                frame: &R,
                packet: &Packet<Self::Addr>,
                mtu: u16,
                out: &mut AnswerFrame,
            ) -> bool {
                too_big::<
                    Self,
                    R,
                    { IP + <Self as Headers>::LEN + 16 },
                    { answer::too_big_len::<Self>() },
                >(frame, packet, mtu, out)
            }

            #[inline(always)] // as above
            fn tunnel(
                frame: &XdpFrame,
                packet: &Packet<Self::Addr>,
                hop: &Hop,
                from: Self::Addr,
                to: Self::Addr,
            ) -> bool {
                frame.tunnel::<Self, { IP + 2 * <Self as Headers>::LEN }>(packet, hop, from, to)
            }

            #[inline(always)] // as above
            fn relay(frame: &XdpFrame, mtu: u16, out: &mut AnswerFrame) -> bool {
                const HEAD: usize = IP + <$family as Headers>::LEN + 16;
                frame.relay::<Self, HEAD, { answer::too_big_len::<Self>() }>(mtu, out)
            }

            #[inline(always)] // as above
            fn relayed(frame: &XdpFrame, hop: Option<&Hop>, out: &mut AnswerFrame) -> bool {
                frame.relayed::<Self, { answer::too_big_len::<Self>() }>(hop, out)
            }

            #[inline(always)] // as above
            fn abort<R: Replace>(
                frame: &R,
                packet: &Packet<Self::Addr>,
                finisher: Finisher,
                out: &mut AnswerFrame,
            ) -> bool {
                packet.l4_offset as usize == IP + <Self as Headers>::LEN
                    && sctp::abort::<Self, R, { xdp_common::sctp::abort_len::<Self>() }>(frame, finisher, out)
            }
        }
    };
}

wire! { V4 {
    const TTL_AT: usize = IP + offset_of!(Ipv4Hdr, ttl);
    const IP_CHECK: Option<usize> = Some(IP + offset_of!(Ipv4Hdr, check));
    const ADDRS_AT: usize = IP + offset_of!(Ipv4Hdr, src_addr);
    const HEADERS_LEN: usize = IP + 60 + TcpHdr::LEN;
    const AROUND: u32 = BPF_F_ADJ_ROOM_ENCAP_L3_IPV4;
    const PSEUDO_HEADER: u64 = BPF_F_PSEUDO_HDR as u64;

    #[inline(always)] // one store
    fn copy_addr<const N: usize>(headers: Bytes<N>, at: usize, addr: &[u8; 4]) {
        headers.set_quad(at, *addr);
    }
} }

wire! { V6 {
    const TTL_AT: usize = IP + offset_of!(Ipv6Hdr, hop_limit);
    const IP_CHECK: Option<usize> = None;
    const ADDRS_AT: usize = IP + offset_of!(Ipv6Hdr, src_addr);
    const HEADERS_LEN: usize = IP + Ipv6Hdr::LEN + frame::EXTENSIONS_LEN_MAX + TcpHdr::LEN;
    const AROUND: u32 = BPF_F_ADJ_ROOM_ENCAP_L3_IPV6;
    const PSEUDO_HEADER: u64 = (BPF_F_PSEUDO_HDR | BPF_F_IPV6) as u64;

    #[inline(always)] // four stores
    fn copy_addr<const N: usize>(headers: Bytes<N>, at: usize, addr: &Ip6) {
        headers.put_address(at, addr);
    }
} }

/// Says to the checksum helper that no checksum of an IP header makes up for a change of addresses, so that the sum of the
/// whole frame stays as it is (6.16, and stable kernels of that time; include/uapi/linux/bpf.h).
const BPF_F_IPV6: u32 = 1 << 7;

/// The translation and the next hop of a flow, where they lie: the fields of both are its first ones.
#[inline(always)] // two addresses
pub(crate) fn parts<A: Address>(flow: &Flow<A>) -> (&Rewrite<A>, &Hop) {
    const {
        assert!(offset_of!(Flow<A>, dst) == offset_of!(Rewrite<A>, dst));
        assert!(offset_of!(Flow<A>, sport) == offset_of!(Rewrite<A>, sport));
        assert!(offset_of!(Flow<A>, dport) == offset_of!(Rewrite<A>, dport));
        assert!(offset_of!(Flow<A>, addr_delta) == offset_of!(Rewrite<A>, addr_delta));
        assert!(offset_of!(Flow<A>, l4_delta) == offset_of!(Rewrite<A>, l4_delta));
        assert!(offset_of!(Flow<A>, dmac) == size_of::<Rewrite<A>>() + offset_of!(Hop, dmac));
        assert!(offset_of!(Flow<A>, smac) == size_of::<Rewrite<A>>() + offset_of!(Hop, smac));
        assert!(offset_of!(Flow<A>, ifindex) == size_of::<Rewrite<A>>() + offset_of!(Hop, ifindex));
    }
    let start = &raw const *flow;
    // SAFETY: as asserted, and none of the three is aligned to more than the others; all of them are plain bytes. An entry that
    // another CPU removes meanwhile may be given to another flow (`Live`), whose frame the rest of this one then resembles.
    unsafe { (&*start.cast(), &*start.byte_add(size_of::<Rewrite<A>>()).cast()) }
}

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
fn answer<
    F: Answer,
    R: Replace,
    const RESET: usize,
    const DATAGRAM: usize,
    const UNREACHABLE: usize,
    const HEAD: usize,
    const ERROR: usize,
>(
    frame: &R,
    packet: &Packet<F::Addr>,
    finisher: Finisher,
    area: &mut AnswerFrame,
) -> bool {
    let l4 = packet.l4_offset as usize;
    let has_options = l4 != IP + F::LEN;
    // A device would begin its sum where the packet's transport header was.
    if packet.is_later_fragment() || (has_options && finisher == Finisher::Device) {
        return false;
    }
    if packet.key.proto == TCP {
        let (Some(headers), Some(tcp)) = (frame.view::<DATAGRAM>(0), frame.view::<{ TcpHdr::LEN }>(l4))
        else {
            return false;
        };
        let Some(out) = area.first_chunk_mut::<RESET>() else { return false };
        answer::reset::<F, _, _>(&headers, &tcp, packet.l4_len, finisher, out) && frame.replace(out)
    } else if has_options {
        let write = |headers: &R::View<HEAD>, out: &mut [u8]| {
            answer::unreachable_behind_options::<F, _>(headers, out)
        };
        quoted::<F, R, HEAD, ERROR>(frame, packet, area, write)
    } else {
        let (Some(headers), Some(out)) = (frame.view::<DATAGRAM>(0), area.first_chunk_mut::<UNREACHABLE>())
        else {
            return false;
        };
        answer::unreachable::<F, _>(&headers, finisher, out);
        frame.replace(out)
    }
}

/// Turns a packet into the error that says how long it may be, to be sent out where it came in.
#[inline(always)] // as above
fn too_big<F: Answer, R: Replace, const HEAD: usize, const ERROR: usize>(
    frame: &R,
    packet: &Packet<F::Addr>,
    mtu: u16,
    area: &mut AnswerFrame,
) -> bool {
    let write = |headers: &R::View<HEAD>, out: &mut [u8]| answer::too_big::<F, _>(headers, mtu, out);
    !packet.is_later_fragment() && quoted::<F, R, HEAD, ERROR>(frame, packet, area, write)
}

/// Turns a packet into an error with the longer quote, if that has its ports.
#[inline(always)] // as above
fn quoted<F: Answer, R: Replace, const HEAD: usize, const ERROR: usize>(
    frame: &R,
    packet: &Packet<F::Addr>,
    area: &mut AnswerFrame,
    write: impl FnOnce(&R::View<HEAD>, &mut [u8]),
) -> bool {
    if packet.l4_offset as usize > answer::too_big_reach::<F>() {
        return false;
    }
    let (Some(headers), Some(out)) = (frame.view::<HEAD>(0), area.first_chunk_mut::<ERROR>()) else {
        return false;
    };
    write(&headers, out);
    frame.replace(out)
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
        headers.put_macs(hop);
        headers.set_u8(F::TTL_AT, packet.ttl - 1);
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
        F::copy_addr(headers, F::ADDRS_AT, &rewrite.src);
        F::copy_addr(headers, F::ADDRS_AT + size_of::<F::Addr>(), &rewrite.dst);
        if packet.key.proto == TCP {
            let Some(tcp) = self.view::<{ TcpHdr::LEN }>(packet.l4_offset as usize) else { return };
            tcp.set_pair(0, rewrite.sport);
            tcp.set_pair(2, rewrite.dport);
            tcp.set_pair(TCP_CHECK, checksum::update(packet.check, rewrite.l4_delta).to_ne_bytes());
        } else {
            let Some(udp) = self.view::<{ UdpHdr::LEN }>(packet.l4_offset as usize) else { return };
            udp.set_pair(0, rewrite.sport);
            udp.set_pair(2, rewrite.dport);
            // UDP may go without a checksum, and then stays without (RFC 768, RFC 6935). SCTP has its ports there too, and looks
            // as if it went without.
            if packet.check != 0 {
                udp.set_pair(UDP_CHECK, checksum::update_udp(packet.check, rewrite.l4_delta).to_ne_bytes());
            }
        }
    }

    /// Moves the beginning of the frame, backward where the number is negative.
    #[inline(always)]
    pub(crate) fn move_head(&self, by: i32) -> bool {
        // SAFETY: the context is the verifier's; the helper takes a number beside it.
        unsafe { helpers::bpf_xdp_adjust_head(self.ctx.ctx, by) == 0 }
    }

    #[inline(always)]
    pub(crate) fn redirect(&self, ifindex: u32) -> u32 {
        // SAFETY: the helper takes numbers only.
        unsafe { helpers::bpf_redirect(ifindex, 0) as u32 }
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

const _: () = assert!(TcpHdr::LEN >= UdpHdr::LEN);
