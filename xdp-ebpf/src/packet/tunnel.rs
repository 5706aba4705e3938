//! Packets in packets: room in front of a frame, and the headers there.

use network_types::eth::EthHdr;
use xdp_common::{
    answer::{self, AnswerFrame},
    checksum,
    frame::{Frame as _, Packet, View as _},
    tunnel::{self, relay},
    verdict::Hop,
};

use super::{Replace as _, Wire, XdpFrame};

impl XdpFrame {
    /// Puts the packet into another one, addressed to its next hop; false, and the frame as it was, where the driver has left
    /// no room in front of it.
    #[inline(always)]
    pub(super) fn tunnel<F: Wire, const HEAD: usize>(
        &self,
        packet: &Packet<F::Addr>,
        hop: &Hop,
        from: F::Addr,
        to: F::Addr,
    ) -> bool {
        if !self.move_head(-(F::LEN as i32)) {
            return false;
        }
        let Some(headers) = self.view::<HEAD>(0) else { return false };
        headers.put_macs(hop);
        headers.set_pair(12, F::ETHERTYPE.to_be_bytes());
        tunnel::surround::<F, _>(&headers, packet, from, to);
        headers.set_u8(F::LEN + F::TTL_AT, packet.ttl - 1);
        if let Some(at) = F::IP_CHECK {
            let check = u16::from_ne_bytes(headers.pair(F::LEN + at));
            headers.set_pair(F::LEN + at, checksum::update(check, checksum::TTL_DECREMENT).to_ne_bytes());
        }
        true
    }

    /// Writes what a client is told of the error at hand, which is about a packet around its own; its Ethernet header is nobody's yet.
    #[inline(always)]
    pub(super) fn relay<F: Wire, const HEAD: usize, const ERROR: usize>(
        &self,
        mtu: u16,
        area: &mut AnswerFrame,
    ) -> bool {
        let quoted = self.view::<HEAD>(relay::inner::<F>() - EthHdr::LEN);
        let (Some(quoted), Some(out)) = (quoted, area.first_chunk_mut::<ERROR>()) else { return false };
        answer::relayed::<F, _>(&quoted, mtu, out);
        true
    }

    /// Makes the frame that, on its way to the next hop or up the stack; false, and the frame as it was, where that fails.
    #[inline(always)]
    pub(super) fn relayed<F: Wire, const ERROR: usize>(
        &self,
        hop: Option<&Hop>,
        area: &mut AnswerFrame,
    ) -> bool {
        let (Some(eth), Some(out)) = (self.view::<{ EthHdr::LEN }>(0), area.first_chunk_mut::<ERROR>())
        else {
            return false;
        };
        match hop {
            Some(hop) => {
                answer::copy(hop.dmac, out, 0);
                answer::copy(hop.smac, out, 6);
            }
            None => {
                answer::copy(eth.quad(0), out, 0);
                answer::copy(eth.quad(4), out, 4);
                answer::copy(eth.quad(8), out, 8);
            }
        }
        self.replace(out)
    }

    /// Takes the packet out of the one around it, and marks its frame; false, and the frame as it was, where that fails.
    #[inline(always)]
    pub(crate) fn untunnel<F: Wire>(&self) -> bool {
        let Some(eth) = self.view::<{ EthHdr::LEN }>(0) else { return false };
        let (dmac, dmac_end) = (eth.quad(0), eth.pair(4));
        if !self.move_head(F::LEN as i32) {
            return false;
        }
        let Some(eth) = self.view::<{ EthHdr::LEN }>(0) else { return false };
        let [a, b, c, d, e, f] = tunnel::MARK;
        eth.set_quad(0, dmac);
        eth.set_pair(4, dmac_end);
        eth.set_pair(6, [a, b]);
        eth.set_quad(8, [c, d, e, f]);
        eth.set_pair(12, F::ETHERTYPE.to_be_bytes());
        true
    }
}
