//! IPv4 frames by their fields; every checksum is computed over the finished bytes, never updated.

use etherparse::{IpNumber, Ipv4Header, Ipv4Options, TcpHeader, UdpHeader};
use xdp_common::net::{TCP, UDP};

use crate::node::Addr;

/// A hardware address.
pub(crate) type Mac = [u8; 6];
/// An address and a port.
pub(crate) type Socket = (Addr, u16);

/// Length of an Ethernet header, and of the shortest frame that the kernel takes for a test run of XDP.
pub(crate) const ETHERNET: usize = 14;
/// The shortest IPv4 frame that the kernel makes an skb of for a test run: both headers.
pub(crate) const SKB_MIN: usize = ETHERNET + 20;
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

/// The fields of a TCP or UDP packet in an Ethernet frame.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    /// Source and destination on the link.
    pub(crate) mac: (Mac, Mac),
    pub(crate) src: Socket,
    pub(crate) dst: Socket,
    pub(crate) proto: u8,
    /// TCP flags.
    pub(crate) flags: u8,
    pub(crate) ttl: u8,
    pub(crate) tos: u8,
    /// IP options, a multiple of four bytes.
    pub(crate) options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
    /// What follows the IP packet, as Ethernet pads short frames.
    pub(crate) padding: Vec<u8>,
    pub(crate) check: Check,
}

impl Frame {
    /// A frame without payload.
    pub(crate) fn new(proto: u8, mac: (Mac, Mac), src: Socket, dst: Socket) -> Self {
        Self {
            mac,
            src,
            dst,
            proto,
            flags: if proto == TCP { SYN } else { 0 },
            ttl: 64,
            tos: 0,
            options: Vec::new(),
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

    /// The same with other TCP flags, where it is TCP.
    pub(crate) fn flags(&self, flags: u8) -> Self {
        self.with(|frame| frame.flags = if frame.proto == TCP { flags } else { 0 })
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
        let (src, dst) = (self.src.0, self.dst.0);
        if self.proto == TCP {
            self.tcp().calc_checksum_ipv4_raw(src, dst, &self.payload).expect("frames are short")
        } else {
            self.udp().calc_checksum_ipv4_raw(src, dst, &self.payload).expect("frames are short")
        }
    }

    /// The sum of the pseudo-header (RFC 9293, section 3.1), not complemented.
    pub(crate) fn pseudo_sum(&self) -> u16 {
        let len = self.l4_len() as u16;
        let bytes = [&self.src.0[..], &self.dst.0[..], &[0, self.proto], &len.to_be_bytes()[..]].concat();
        folded(bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum())
    }

    /// The frame.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut ip =
            Ipv4Header::new(self.l4_len() as u16, self.ttl, IpNumber(self.proto), self.src.0, self.dst.0)
                .expect("frames are short");
        ip.options = Ipv4Options::try_from(&self.options[..]).expect("options are whole words");
        ip.set_payload_len(self.l4_len()).expect("frames are short");
        ip.identification = 0x1234;
        ip.dont_fragment = true;
        ip.dscp = etherparse::IpDscp::try_new(self.tos >> 2).expect("six bits");
        ip.header_checksum = ip.calc_header_checksum();
        let ethertype = [0x08, 0x00];
        [
            &self.mac.1[..],
            &self.mac.0[..],
            &ethertype[..],
            &ip.to_bytes()[..],
            &self.l4_header()[..],
            &self.payload[..],
            &self.padding[..],
        ]
        .concat()
    }

    fn l4_header(&self) -> Vec<u8> {
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
        let header = if self.proto == TCP { TcpHeader::MIN_LEN } else { UdpHeader::LEN };
        header + self.payload.len()
    }

    fn tcp(&self) -> TcpHeader {
        let mut header = TcpHeader::new(self.src.1, self.dst.1, 0x0102_0304, 64_240);
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

/// The sum of 16-bit words in 16 bits (RFC 1071).
pub(crate) fn folded(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The source port of an IPv4 frame.
pub(crate) fn source_port(frame: &[u8]) -> u16 {
    let at = ETHERNET + usize::from(frame[ETHERNET] & 0x0f) * 4;
    u16::from_be_bytes([frame[at], frame[at + 1]])
}
