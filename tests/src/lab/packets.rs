//! Frames built by name and taken apart again, with every checksum verified.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};
use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacket, EtherType, Icmpv4Type, IpNumber, Ipv4Header, NetSlice,
    PacketBuilder, SlicedPacket, TransportSlice, icmpv4::DestUnreachableHeader,
};

/// A hardware address.
pub type Mac = [u8; 6];

/// The Ethernet broadcast address.
pub const BROADCAST: Mac = [0xff; 6];
/// An EtherType reserved for experiments (IEEE 802), which no protocol of the kernel claims.
pub const EXPERIMENTAL: u16 = 0x88b5;

const TTL: u8 = 64;
const WINDOW: u16 = 64_240;

/// Sender and receiver of a frame on the link and in IPv4.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// Hardware addresses, sender first.
    pub mac: (Mac, Mac),
    /// IPv4 addresses, sender first.
    pub ip: (Ipv4Addr, Ipv4Addr),
}

impl Ends {
    /// Builds a TCP segment with the ACK flag, or a SYN if there is no payload and the sequence number is 0.
    pub fn tcp(&self, ports: (u16, u16), sequence: u32, payload: &[u8]) -> Vec<u8> {
        let builder = self.ipv4().tcp(ports.0, ports.1, sequence, WINDOW);
        let builder = if sequence == 0 && payload.is_empty() { builder.syn() } else { builder.ack(1).psh() };
        write(|frame| builder.write(frame, payload))
    }

    /// Builds a UDP datagram.
    pub fn udp(&self, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
        write(|frame| self.ipv4().udp(ports.0, ports.1).write(frame, payload))
    }

    /// Says that nobody listens to a port, quoting a packet.
    pub fn port_unreachable(&self, packet: &[u8]) -> Vec<u8> {
        let kind = Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port);
        write(|frame| self.ipv4().icmpv4(kind).write(frame, packet))
    }

    /// Builds an ICMP echo request.
    pub fn ping(&self, identifier: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
        write(|frame| self.ipv4().icmpv4_echo_request(identifier, sequence).write(frame, payload))
    }

    /// Builds an IPv4 packet of a protocol that has no ports.
    pub fn other_protocol(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        write(|frame| self.ipv4().write(frame, IpNumber(protocol), payload))
    }

    /// Builds the second fragment of a UDP datagram, which carries no ports.
    pub fn later_fragment(&self, payload: &[u8]) -> Vec<u8> {
        let mut header = self.ipv4_header(payload.len(), IpNumber::UDP);
        header.fragment_offset = etherparse::IpFragOffset::try_new(64).expect("64 fits into 13 bits");
        header.dont_fragment = false;
        header.header_checksum = header.calc_header_checksum();
        let mut frame = self.ethernet(EtherType::IPV4);
        frame.extend_from_slice(&header.to_bytes());
        frame.extend_from_slice(payload);
        frame
    }

    /// Builds an ARP request for the receiver's address, sent to everybody.
    pub fn arp_request(&self) -> Vec<u8> {
        let packet = ArpPacket::new(
            ArpHardwareId::ETHERNET,
            EtherType::IPV4,
            ArpOperation::REQUEST,
            &self.mac.0,
            &self.ip.0.octets(),
            &[0; 6],
            &self.ip.1.octets(),
        )
        .expect("Ethernet and IPv4 addresses have the lengths that ARP allows");
        write(|frame| PacketBuilder::ethernet2(self.mac.0, BROADCAST).arp(packet).write(frame))
    }

    /// Builds a UDP datagram over IPv6 between two documentation addresses.
    pub fn ipv6_udp(&self, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
        let address = |last| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last).octets();
        let builder = PacketBuilder::ethernet2(self.mac.0, self.mac.1).ipv6(address(1), address(2), TTL);
        write(|frame| builder.udp(ports.0, ports.1).write(frame, payload))
    }

    /// Builds a frame of any EtherType.
    pub fn ethertype(&self, ethertype: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = self.ethernet(EtherType(ethertype));
        frame.extend_from_slice(payload);
        frame
    }

    fn ipv4(&self) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
        let header = self.ipv4_header(0, IpNumber::UDP);
        PacketBuilder::ethernet2(self.mac.0, self.mac.1)
            .ip(etherparse::IpHeaders::Ipv4(header, etherparse::Ipv4Extensions::default()))
    }

    fn ipv4_header(&self, payload: usize, protocol: IpNumber) -> Ipv4Header {
        let mut header =
            Ipv4Header::new(payload as u16, TTL, protocol, self.ip.0.octets(), self.ip.1.octets())
                .expect("frames are short");
        header.dont_fragment = true;
        header
    }

    fn ethernet(&self, ethertype: EtherType) -> Vec<u8> {
        [&self.mac.1[..], &self.mac.0[..], &ethertype.0.to_be_bytes()[..]].concat()
    }
}

/// Verifies the IPv4 header checksum and the TCP, UDP or ICMP checksum of a frame; other frames pass.
pub fn verify_checksums(frame: &[u8]) -> Result<()> {
    let packet = SlicedPacket::from_ethernet(frame).context("not a frame")?;
    let Some(NetSlice::Ipv4(ip)) = &packet.net else { return Ok(()) };
    let header = ip.header().to_header();
    ensure!(header.calc_header_checksum() == header.header_checksum, "IPv4 header checksum");
    if header.is_fragmenting_payload() {
        return Ok(());
    }
    match &packet.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let expected = tcp.calc_checksum_ipv4(header.source, header.destination)?;
            ensure!(
                tcp.checksum() == expected,
                "TCP checksum is {:#06x}, not {expected:#06x}",
                tcp.checksum()
            );
        }
        Some(TransportSlice::Udp(udp)) if udp.checksum() != 0 => {
            let expected = udp.to_header().calc_checksum_ipv4(&header, udp.payload())?;
            ensure!(
                udp.checksum() == expected,
                "UDP checksum is {:#06x}, not {expected:#06x}",
                udp.checksum()
            );
        }
        Some(TransportSlice::Icmpv4(icmp)) => {
            ensure!(icmp.checksum() == icmp.icmp_type().calc_checksum(icmp.payload()), "ICMP checksum");
        }
        Some(TransportSlice::Udp(_) | TransportSlice::Icmpv6(_) | TransportSlice::Igmp(_)) | None => {}
    }
    Ok(())
}

/// Returns a copy of an IPv4 frame with the identification field, which the kernel chooses, and its checksum cleared.
pub fn without_ip_id(frame: &[u8]) -> Vec<u8> {
    let mut copy = frame.to_vec();
    if frame.len() >= 34 && frame[12..14] == EtherType::IPV4.0.to_be_bytes() {
        copy[18..20].fill(0);
        copy[24..26].fill(0);
    }
    copy
}

fn write<E: std::fmt::Debug>(build: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Vec<u8> {
    let mut frame = Vec::new();
    build(&mut frame).expect("frames are short and go into memory");
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENDS: Ends = Ends {
        mac: ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]),
        ip: (Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)),
    };

    #[test]
    fn built_frames_have_right_checksums_and_a_flipped_bit_is_noticed() {
        let frames = [
            ENDS.tcp((1000, 22), 0, b""),
            ENDS.tcp((1000, 22), 7, b"hello"),
            ENDS.udp((1000, 53), b"question"),
            ENDS.ping(1, 2, b"data"),
            ENDS.later_fragment(b"rest of it"),
        ];
        for frame in frames {
            verify_checksums(&frame).unwrap();
            let mut damaged = frame.clone();
            damaged[30] ^= 1;
            verify_checksums(&damaged).unwrap_err();
        }
    }
}
