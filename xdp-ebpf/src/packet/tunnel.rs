//! Packets in packets: room in front of a frame, and the headers there.

use network_types::eth::EthHdr;
use xdp_common::{
    checksum,
    frame::{Frame as _, Packet, View as _},
    tunnel,
    verdict::Hop,
};

use super::{Wire, XdpFrame};

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
        let ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]) = (hop.dmac, hop.smac);
        headers.set_quad(0, [d0, d1, d2, d3]);
        headers.set_quad(4, [d4, d5, s0, s1]);
        headers.set_quad(8, [s2, s3, s4, s5]);
        headers.set_pair(12, F::ETHERTYPE.to_be_bytes());
        tunnel::surround::<F, _>(&headers, packet, from, to);
        headers.set_u8(F::LEN + F::TTL_AT, packet.ttl - 1);
        if let Some(at) = F::IP_CHECK {
            let check = u16::from_ne_bytes(headers.pair(F::LEN + at));
            headers.set_pair(F::LEN + at, checksum::update(check, checksum::TTL_DECREMENT).to_ne_bytes());
        }
        true
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
