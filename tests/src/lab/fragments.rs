//! UDP datagrams in fragments, built rather than left to the kernel, so that they can be sent in any order.

use std::net::SocketAddr;

use anyhow::{Result, bail};
use etherparse::{
    EtherType, IpFragOffset, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6FragmentHeader, Ipv6Header, UdpHeader,
};

use super::packets::Mac;

const TTL: u8 = 64;

/// Builds the fragments of a datagram, first to last, with at most `part` bytes of it in each; a multiple of eight.
pub fn datagram(
    mac: (Mac, Mac),
    (from, to): (SocketAddr, SocketAddr),
    id: u32,
    payload: &[u8],
    part: usize,
) -> Result<Vec<Vec<u8>>> {
    let (ports, length) = ((from.port(), to.port()), payload.len());
    let udp = match (from, to) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => {
            let ip = Ipv4Header::new(0, TTL, IpNumber::UDP, from.ip().octets(), to.ip().octets())?;
            UdpHeader::with_ipv4_checksum(ports.0, ports.1, &ip, payload)?
        }
        (SocketAddr::V6(from), SocketAddr::V6(to)) => {
            let ip = Ipv6Header {
                source: from.ip().octets(),
                destination: to.ip().octets(),
                ..Ipv6Header::default()
            };
            UdpHeader::with_ipv6_checksum(ports.0, ports.1, &ip, payload)?
        }
        (SocketAddr::V4(_), SocketAddr::V6(_)) | (SocketAddr::V6(_), SocketAddr::V4(_)) => {
            bail!("{from} and {to} are of two families")
        }
    };
    let whole = [&udp.to_bytes()[..], payload].concat();
    let count = whole.len().div_ceil(part);
    let fragment = |(number, bytes): (usize, &[u8])| {
        let offset = IpFragOffset::try_new((number * part / 8) as u16)?;
        let has_more = number + 1 < count;
        let headers = match (from, to) {
            (SocketAddr::V4(from), SocketAddr::V4(to)) => {
                let (from, to) = (from.ip().octets(), to.ip().octets());
                let mut ip = Ipv4Header::new(bytes.len() as u16, TTL, IpNumber::UDP, from, to)?;
                ip.identification = id as u16;
                ip.dont_fragment = false;
                ip.more_fragments = has_more;
                ip.fragment_offset = offset;
                ip.header_checksum = ip.calc_header_checksum();
                [&EtherType::IPV4.0.to_be_bytes()[..], &ip.to_bytes()].concat()
            }
            (SocketAddr::V6(from), SocketAddr::V6(to)) => {
                let header = Ipv6FragmentHeader::new(IpNumber::UDP, offset, has_more, id);
                let ip = Ipv6Header {
                    traffic_class: 0,
                    flow_label: Ipv6FlowLabel::ZERO,
                    payload_length: (Ipv6FragmentHeader::LEN + bytes.len()) as u16,
                    next_header: IpNumber::IPV6_FRAGMENTATION_HEADER,
                    hop_limit: TTL,
                    source: from.ip().octets(),
                    destination: to.ip().octets(),
                };
                [&EtherType::IPV6.0.to_be_bytes()[..], &ip.to_bytes(), &header.to_bytes()].concat()
            }
            (SocketAddr::V4(_), SocketAddr::V6(_)) | (SocketAddr::V6(_), SocketAddr::V4(_)) => {
                bail!("{length} bytes between two families")
            }
        };
        Ok([&mac.1[..], &mac.0[..], &headers, bytes].concat())
    };
    whole.chunks(part).enumerate().map(fragment).collect()
}
