//! ICMP for the long sequences: errors about packets that have gone by, whole, cut short and wrong, and echo requests.

use etherparse::{IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header};
use xdp_common::tunnel::Tunnel;

use crate::{
    dice::Dice,
    family::{Family, Hosts},
    frames::*,
    mutation,
    node::*,
    twins::{Seen, Twins},
    world::HOSTS,
};

/// Routers, which are in no table.
const ROUTERS: [Addr; 2] = [[198, 51, 100, 1], [10, 244, 0, 1]];
/// Types and codes of errors that quote a packet, and of messages that are none of ours (RFC 792, RFC 4443).
const KINDS_V4: [[u8; 2]; 6] = [[3, 1], [3, 3], [3, 4], [3, 13], [11, 0], [12, 0]];
const KINDS_V6: [[u8; 2]; 5] = [[1, 0], [1, 4], [2, 0], [3, 0], [4, 0]];
const OTHERS_V4: [[u8; 2]; 4] = [[0, 0], [4, 0], [5, 1], [13, 0]];
const OTHERS_V6: [[u8; 2]; 4] = [[0, 0], [5, 0], [129, 0], [137, 0]];
/// How much of a transport header is quoted: ports only, TCP's without its checksum and with it, all; too little.
const QUOTED: [usize; 9] = [8, 8, 16, 18, 20, 48, 1_500, 7, 0];

/// An ICMP message.
#[derive(Clone)]
pub(crate) struct Icmp {
    pub(crate) mac: (Mac, Mac),
    pub(crate) from: Vec<u8>,
    pub(crate) to: Vec<u8>,
    pub(crate) ttl: u8,
    /// Bytes of IP options, or of an extension header.
    pub(crate) options: usize,
    /// Type and code.
    pub(crate) kind: [u8; 2],
    /// What follows the checksum.
    pub(crate) body: Vec<u8>,
}

impl Icmp {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        match <[u8; 4]>::try_from(&self.from[..]) {
            Ok(from) => self.v4(from),
            Err(_) => self.v6(),
        }
    }

    fn v4(&self, from: [u8; 4]) -> Vec<u8> {
        let icmp = self.message(&[]);
        let to = self.to[..].try_into().expect("both addresses are of one family");
        let mut ip = Ipv4Header::new(0, self.ttl, IpNumber::ICMP, from, to).expect("messages are short");
        ip.options = vec![1; self.options][..].try_into().expect("whole words");
        ip.set_payload_len(icmp.len()).expect("messages are short");
        ip.header_checksum = ip.calc_header_checksum();
        [&self.mac.1[..], &self.mac.0, &[0x08, 0x00], &ip.to_bytes(), &icmp].concat()
    }

    fn v6(&self) -> Vec<u8> {
        let number = IpNumber::IPV6_ICMP;
        let mut pseudo = [&self.from[..], &self.to].concat();
        pseudo.extend([0, number.0]);
        let icmp = self.message(&pseudo);
        let mut options = vec![0; self.options.next_multiple_of(8)];
        if let [next, units, ..] = &mut options[..] {
            (*next, *units) = (number.0, (self.options.div_ceil(8) - 1) as u8);
        }
        let ip = Ipv6Header {
            traffic_class: 0,
            flow_label: Ipv6FlowLabel::ZERO,
            payload_length: (options.len() + icmp.len()) as u16,
            next_header: if options.is_empty() { number } else { IpNumber::IPV6_DESTINATION_OPTIONS },
            hop_limit: self.ttl,
            source: self.from[..].try_into().expect("an address of IPv6"),
            destination: self.to[..].try_into().expect("an address of IPv6"),
        };
        [&self.mac.1[..], &self.mac.0, &[0x86, 0xdd], &ip.to_bytes(), &options, &icmp].concat()
    }

    /// The message with its checksum, which covers its length too where it covers a pseudo-header.
    fn message(&self, pseudo: &[u8]) -> Vec<u8> {
        let mut icmp = [&self.kind[..], &[0, 0], &self.body].concat();
        let len = if pseudo.is_empty() { 0 } else { icmp.len() as u16 };
        let sums = [words_sum(pseudo), len, words_sum(&icmp)].map(u16::to_be_bytes);
        icmp[2..4].copy_from_slice(&(!words_sum(&sums.concat())).to_be_bytes());
        icmp
    }
}

/// Somebody says something about a packet that has gone by, or asks whether a service's address is there.
pub(crate) fn happen<F: Hosts + Tunnel>(twins: &mut Twins<F>) {
    if twins.dice.once_in(400) {
        twins.configure(|config| config.echo ^= 1);
    }
    let is_echo = twins.dice.once_in(8);
    let said = if is_echo { Some(echo(twins)) } else { error(twins) };
    let Some(mut said) = said else { return twins.happen() };
    let is_beside = twins.dice.once_in(6);
    if is_beside {
        said.mac = (BESIDE_MAC, twins.node.mac_too);
    }
    if twins.dice.once_in(30) {
        said.mac.1 = [2, 9, 9, 9, 9, 9];
    }
    let len = said.bytes().len() - ETHERNET;
    let bytes = spoilt(&mut twins.dice, F::FAMILY, &said);
    if bytes.len() < SKB_MIN {
        twins.agree(twins.node.entry, &bytes);
        return;
    }
    match twins.dice.below(9) {
        0..3 => twins.goes_out(&bytes),
        3 | 4 => {
            let sent_on = twins.tunnelled(&bytes, len, 0xc0);
            twins.comes_in(&sent_on);
        }
        _ if is_beside => twins.comes_in_beside(&bytes),
        _ => twins.comes_in(&bytes),
    }
}

/// An error about a packet that was seen, or about one that has answered it another way.
fn error<F: Hosts + Tunnel>(twins: &mut Twins<F>) -> Option<Icmp> {
    let last = twins.seen.len().checked_sub(1)?;
    let mut seen = twins.seen[twins.dice.below(last + 1)].clone();
    let (family, mac, dice) = (F::FAMILY, twins.node.mac, &mut twins.dice);
    if dice.once_in(2) {
        turn_round(family, &mut seen);
    }
    if dice.once_in(12) {
        // A packet of that node's, of which this one may know nothing.
        mutation::put(&mut seen.packet, places(family).0, &family.octets(OTHER_NODE));
    }
    let (src, dst) = addresses(family, &seen.packet);
    let from = match dice.below(8) {
        0..3 => dst,
        3..6 => family.octets(dice.of(&ROUTERS)),
        6 => family.octets(NODE),
        _ => family.octets(dice.of(&HOSTS)),
    };
    let to = if dice.once_in(40) { family.octets(dice.of(&HOSTS)) } else { src };
    let kinds: (&[_], &[_]) = match family {
        Family::V4 => (&KINDS_V4, &OTHERS_V4),
        Family::V6 => (&KINDS_V6, &OTHERS_V6),
    };
    let kind = if dice.once_in(30) { dice.of(kinds.1) } else { dice.of(kinds.0) };
    let mut body = dice.of(&[[0, 0, 5, 0x14], [0, 0, 5, 0x14], [0; 4], [0, 1, 0, 40], [0xff; 4]]).to_vec();
    body.extend(quote(dice, family, seen));
    let (ttl, options) = (dice.of(&[64, 64, 64, 64, 61, 2, 1]), dice.of(&[0, 0, 0, 0, 0, 4, 40]));
    Some(Icmp { mac: (GATEWAY_MAC, mac), from, to, ttl, options, kind, body })
}

/// As much of a packet as somebody quotes, not always truly.
fn quote(dice: &mut Dice, family: Family, mut seen: Seen) -> Vec<u8> {
    if dice.once_in(8) {
        extend(dice, family, &mut seen);
    }
    let Seen { packet: mut quote, l4 } = seen;
    if dice.once_in(4) {
        misquote(dice, family, l4, &mut quote);
    }
    quote.truncate(l4 + dice.of(&QUOTED));
    if dice.once_in(12) {
        quote.truncate(dice.below(quote.len() + 1));
    }
    if dice.once_in(12) {
        quote.extend(vec![0xa7; dice.below(40)]);
    }
    quote
}

/// Puts IP options, or an extension header, into a packet.
fn extend(dice: &mut Dice, family: Family, seen: &mut Seen) {
    match family {
        // The longest header has ten words of them.
        Family::V4 if seen.l4 == family.header_len() => {
            let words = 1 + dice.below(10);
            seen.packet[0] += words as u8;
            seen.packet.splice(20..20, vec![1; 4 * words]);
            seen.l4 += 4 * words;
        }
        Family::V4 => {}
        Family::V6 => {
            // Options for routers, of a whole packet a fragment header, options for the destination.
            let number = dice.of(&[0, 44, 60]);
            let header = [seen.packet[6], 0, 0, dice.of(&[0, 0, 1]), 0, 0, 0, 7];
            seen.packet[6] = number;
            seen.packet.splice(40..40, header);
            seen.l4 += header.len();
        }
    }
}

/// Changes what a quote says, where it matters or anywhere.
fn misquote(dice: &mut Dice, family: Family, l4: usize, quote: &mut [u8]) {
    let (at, bytes) = match dice.below(8) {
        0 => (0, vec![dice.byte()]),
        1 => (0, vec![0x40 | dice.below(16) as u8]),
        2 => (6, dice.of(&[[0x20, 0], [0x20, 1], [0, 9], [0x40, 0]]).to_vec()),
        3 if family == Family::V4 => (9, vec![dice.of(&[1, 6, 17, 50, 132])]),
        3 => (6, vec![dice.of(&[0, 6, 17, 44, 50, 58, 60, 132])]),
        4 => (l4 + 6, dice.of(&[[0, 0], [0xff, 0xff]]).to_vec()),
        5 => (l4 + 16, dice.of(&[[0, 0], [0xff, 0xff]]).to_vec()),
        6 => (l4 + dice.below(4), vec![dice.byte()]),
        _ => (dice.below(quote.len()), vec![dice.byte()]),
    };
    mutation::put(quote, at, &bytes);
}

/// The bytes of a message, now and then with something wrong around what it says.
fn spoilt(dice: &mut Dice, family: Family, said: &Icmp) -> Vec<u8> {
    let mut bytes = said.bytes();
    let icmp = bytes.len() - 4 - said.body.len();
    match dice.below(40) {
        0 | 1 => bytes[icmp + 2] ^= 0x40,
        2 => bytes[icmp + 2..icmp + 4].fill(dice.of(&[0, 0xff])),
        3 if family == Family::V4 => bytes[ETHERNET + 10] ^= 1,
        4..8 => bytes.extend(vec![0xdd; 1 + dice.below(20)]),
        8..11 => mutation::mutate(dice, family, icmp, &mut bytes),
        _ => {}
    }
    bytes
}

/// An echo request of some host to some host, mostly to a service.
fn echo<F: Hosts + Tunnel>(twins: &mut Twins<F>) -> Icmp {
    let (family, mac, dice) = (F::FAMILY, twins.node.mac, &mut twins.dice);
    let from = if dice.once_in(8) { dice.of(&HOSTS) } else { CLIENT };
    let other = dice.of(&HOSTS);
    let to = dice.of(&[VIP, VIP, VIP, VIP_TOO, NODE, OTHER_NODE, other]);
    let kind = [if family == Family::V4 { 8 } else { 128 }, u8::from(dice.once_in(20))];
    let mut body = vec![0; 4 + dice.of(&[0, 1, 15, 56, 1_400])];
    body.iter_mut().for_each(|byte| *byte = dice.byte());
    Icmp {
        mac: (GATEWAY_MAC, mac),
        from: family.octets(from),
        to: family.octets(to),
        ttl: dice.of(&[64, 64, 1, 255]),
        options: dice.of(&[0, 0, 0, 8]),
        kind,
        body,
    }
}

/// Source and destination of an IP packet.
fn addresses(family: Family, packet: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (at, len) = places(family);
    (packet[at..at + len].to_vec(), packet[at + len..at + 2 * len].to_vec())
}

/// Makes a packet one that answers it: the sum of neither header changes.
fn turn_round(family: Family, seen: &mut Seen) {
    let (at, len) = places(family);
    seen.packet[at..at + 2 * len].rotate_left(len);
    seen.packet[seen.l4..seen.l4 + 4].rotate_left(2);
}

/// Where the addresses are in an IP header, and how long one is.
fn places(family: Family) -> (usize, usize) {
    match family {
        Family::V4 => (12, 4),
        Family::V6 => (8, 16),
    }
}
