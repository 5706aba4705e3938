//! Frames of either family by their fields; every checksum is computed over the finished bytes, never updated.

use etherparse::{IpNumber, Ipv4Header, Ipv4Options, Ipv6FlowLabel, Ipv6Header, TcpHeader, UdpHeader};
use xdp_common::net::{SCTP, TCP, UDP};

use crate::{
    family::{Addr, Family},
    sctp,
};

/// A hardware address.
pub(crate) type Mac = [u8; 6];
/// An address and a port.
pub(crate) type Socket = (Addr, u16);

/// Length of an Ethernet header, and of the shortest frame that the kernel takes for a test run of XDP.
pub(crate) const ETHERNET: usize = 14;
/// The shortest frame of either family that the kernel makes an skb of: it wants an IP header.
pub(crate) const SKB_MIN: usize = ETHERNET + 40;
/// TCP flags (RFC 9293).
pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;

/// A form of packet: its name, and what gives it to a plain one.
pub(crate) type Form<'a> = (&'a str, &'a dyn Fn(&mut Frame));

/// What the TCP or UDP checksum field holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Check {
    /// The finished checksum.
    Full,
    /// Nothing: UDP may go without (RFC 768).
    Absent,
    /// The sum of the pseudo-header, as senders leave it that have their device finish it.
    Offloaded,
}

/// The fields of a TCP, UDP or SCTP packet in an Ethernet frame.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) family: Family,
    /// Source and destination on the link.
    pub(crate) mac: (Mac, Mac),
    pub(crate) src: Socket,
    pub(crate) dst: Socket,
    pub(crate) proto: u8,
    /// TCP flags.
    pub(crate) flags: u8,
    /// TCP sequence number.
    pub(crate) seq: u32,
    pub(crate) ttl: u8,
    pub(crate) tos: u8,
    /// IP options, a multiple of four bytes; of IPv6 they stand in a header of destination options.
    pub(crate) options: Vec<u8>,
    /// Extension headers of IPv6: the number of each, and what follows its first byte.
    pub(crate) extensions: Vec<(u8, Vec<u8>)>,
    pub(crate) payload: Vec<u8>,
    /// What follows the IP packet, as Ethernet pads short frames.
    pub(crate) padding: Vec<u8>,
    pub(crate) check: Check,
}

impl Frame {
    /// A frame of a family, without payload.
    pub(crate) fn new(family: Family, proto: u8, mac: (Mac, Mac), src: Socket, dst: Socket) -> Self {
        Self {
            family,
            mac,
            src,
            dst,
            proto,
            flags: if proto == UDP { 0 } else { SYN },
            seq: 0x0102_0304,
            ttl: 64,
            tos: 0,
            options: Vec::new(),
            extensions: Vec::new(),
            payload: Vec::new(),
            padding: Vec::new(),
            check: Check::Full,
        }
    }

    /// A copy with other fields.
    pub(crate) fn with(&self, edit: impl FnOnce(&mut Self)) -> Self {
        let mut copy = self.clone();
        edit(&mut copy);
        copy
    }

    /// The same with other TCP flags, where it is TCP, or the chunk of SCTP that says the same.
    pub(crate) fn flags(&self, flags: u8) -> Self {
        self.with(|frame| frame.flags = if frame.proto == UDP { 0 } else { flags })
    }

    /// The same with a payload.
    pub(crate) fn payload(&self, payload: &[u8]) -> Self {
        self.with(|frame| frame.payload = payload.to_vec())
    }

    /// The same with the last two bytes of its payload chosen so that the condition holds for the finished frame.
    pub(crate) fn tuned(&self, condition: impl Fn(&Self) -> bool) -> Self {
        (0..=u16::MAX)
            .map(|word| self.with(|frame| frame.payload.extend(word.to_be_bytes())))
            .find(condition)
            .expect("a word of the payload can give the checksum every value")
    }

    /// The same with two more bytes of payload that make the finished checksum look like the sum of the pseudo-header.
    ///
    /// XDP cannot tell it from an unfinished one. The frames of test runs bear no mark of offload, so that tc treats it as
    /// the finished checksum that it is.
    pub(crate) fn looking_offloaded(&self) -> Self {
        assert!(self.payload.len().is_multiple_of(2), "a word must not straddle two");
        let zeros = self.with(|frame| frame.payload.extend([0, 0]));
        let word = folded(u32::from(zeros.full_check()) + u32::from(!zeros.pseudo_sum()));
        let frame = self.with(|frame| frame.payload.extend(word.to_be_bytes()));
        assert_eq!(frame.full_check(), frame.pseudo_sum());
        frame
    }

    /// The finished checksum.
    pub(crate) fn full_check(&self) -> u16 {
        let checksum = if self.proto == TCP {
            match (self.family, self.octets()) {
                (Family::V4, _) => self.tcp().calc_checksum_ipv4_raw(self.src.0, self.dst.0, &self.payload),
                (Family::V6, (src, dst)) => self.tcp().calc_checksum_ipv6_raw(src, dst, &self.payload),
            }
        } else {
            match (self.family, self.octets()) {
                (Family::V4, _) => self.udp().calc_checksum_ipv4_raw(self.src.0, self.dst.0, &self.payload),
                (Family::V6, (src, dst)) => self.udp().calc_checksum_ipv6_raw(src, dst, &self.payload),
            }
        };
        checksum.expect("frames are short")
    }

    /// Both addresses in 16 bytes, of which IPv4 uses the first four.
    fn octets(&self) -> ([u8; 16], [u8; 16]) {
        let octets = |name| {
            let mut octets = [0; 16];
            let addr = self.family.octets(name);
            octets[..addr.len()].copy_from_slice(&addr);
            octets
        };
        (octets(self.src.0), octets(self.dst.0))
    }

    /// The sum of the pseudo-header (RFC 9293, section 3.1; RFC 8200, section 8.1), not complemented.
    pub(crate) fn pseudo_sum(&self) -> u16 {
        let len = self.l4_len() as u16;
        let addrs = [self.src.0, self.dst.0].map(|name| self.family.octets(name)).concat();
        words_sum(&[&addrs[..], &[0, self.proto], &len.to_be_bytes()[..]].concat())
    }

    /// The frame.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let (ethertype, ip) = match self.family {
            Family::V4 => ([0x08, 0x00], self.ipv4()),
            Family::V6 => ([0x86, 0xdd], self.ipv6()),
        };
        [
            &self.mac.1[..],
            &self.mac.0[..],
            &ethertype[..],
            &ip[..],
            &self.l4_header()[..],
            &self.payload[..],
            &self.padding[..],
        ]
        .concat()
    }

    /// Length of the IP packet.
    pub(crate) fn total_len(&self) -> usize {
        self.bytes().len() - ETHERNET - self.padding.len()
    }

    fn ipv4(&self) -> Vec<u8> {
        let mut ip =
            Ipv4Header::new(self.l4_len() as u16, self.ttl, IpNumber(self.proto), self.src.0, self.dst.0)
                .expect("frames are short");
        ip.options = Ipv4Options::try_from(&self.options[..]).expect("options are whole words");
        ip.set_payload_len(self.l4_len()).expect("frames are short");
        ip.identification = 0x1234;
        ip.dont_fragment = true;
        ip.dscp = etherparse::IpDscp::try_new(self.tos >> 2).expect("six bits");
        ip.header_checksum = ip.calc_header_checksum();
        ip.to_bytes().to_vec()
    }

    fn ipv6(&self) -> Vec<u8> {
        let mut chain = self.extensions.clone();
        if !self.options.is_empty() {
            let mut body = self.options.clone();
            body.resize((body.len() + 2).next_multiple_of(8) - 2, 0);
            body.insert(0, (body.len() as u8 + 2) / 8 - 1);
            chain.push((DESTINATION_OPTIONS, body));
        }
        let len: usize = chain.iter().map(|(_, body)| 1 + body.len()).sum();
        let (source, destination) = self.octets();
        let mut ip = Ipv6Header {
            traffic_class: self.tos,
            flow_label: Ipv6FlowLabel::try_new(0x5_4321).expect("20 bits"),
            payload_length: (len + self.l4_len()) as u16,
            next_header: IpNumber(chain.first().map_or(self.proto, |(number, _)| *number)),
            hop_limit: self.ttl,
            source,
            destination,
        }
        .to_bytes()
        .to_vec();
        for (at, (_, body)) in chain.iter().enumerate() {
            ip.push(chain.get(at + 1).map_or(self.proto, |(number, _)| *number));
            ip.extend(body);
        }
        ip
    }

    fn l4_header(&self) -> Vec<u8> {
        if self.proto == SCTP {
            return sctp::header(self);
        }
        let check = match self.check {
            Check::Full => self.full_check(),
            Check::Absent => 0,
            Check::Offloaded => self.pseudo_sum(),
        };
        if self.proto == TCP {
            TcpHeader { checksum: check, ..self.tcp() }.to_bytes().to_vec()
        } else {
            UdpHeader { checksum: check, ..self.udp() }.to_bytes().to_vec()
        }
    }

    fn l4_len(&self) -> usize {
        l4_header_len(self.proto) + self.payload.len()
    }

    fn tcp(&self) -> TcpHeader {
        let mut header = TcpHeader::new(self.src.1, self.dst.1, self.seq, 64_240);
        header.fin = self.flags & FIN != 0;
        header.syn = self.flags & SYN != 0;
        header.rst = self.flags & RST != 0;
        header.ack = self.flags & ACK != 0;
        header
    }

    fn udp(&self) -> UdpHeader {
        assert_eq!(self.proto, UDP);
        UdpHeader {
            source_port: self.src.1,
            destination_port: self.dst.1,
            length: self.l4_len() as u16,
            checksum: 0,
        }
    }
}

/// Number of the extension header with options for the destination (RFC 8200).
const DESTINATION_OPTIONS: u8 = 60;

/// Length of a TCP or UDP header, or of that of SCTP and what its chunk begins with.
pub(crate) const fn l4_header_len(proto: u8) -> usize {
    match proto {
        TCP => TcpHeader::MIN_LEN,
        SCTP => sctp::HEADER_LEN,
        _ => UdpHeader::LEN,
    }
}

/// The sum of bytes as 16-bit words, in 16 bits; a last odd one is the first of a word (RFC 1071).
pub(crate) fn words_sum(bytes: &[u8]) -> u16 {
    let (words, rest) = bytes.as_chunks::<2>();
    let last = rest.first().map_or(0, |&byte| u32::from(byte) << 8);
    folded(words.iter().map(|&word| u32::from(u16::from_be_bytes(word))).sum::<u32>() + last)
}

/// The sum of 16-bit words in 16 bits (RFC 1071).
pub(crate) fn folded(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The source port of a frame.
pub(crate) fn source_port(frame: &[u8]) -> u16 {
    let at = l4_offset(frame);
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

/// Where the transport header of a frame is, behind options and extension headers.
fn l4_offset(frame: &[u8]) -> usize {
    let etherparse::SlicedPacket { net, .. } =
        etherparse::SlicedPacket::from_ethernet(frame).expect("a frame of a program is whole");
    let ip = net.and_then(|net| net.ip_payload_ref().cloned()).expect("an IP packet");
    ip.payload.as_ptr() as usize - frame.as_ptr() as usize
}
