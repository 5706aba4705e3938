//! SCTP: packets from scratch, and what it does otherwise than TCP. The cases that all protocols share drive it too.

use xdp_common::{
    net::SCTP,
    sctp::chunk,
    verdict::{
        Counter::{Drop, Event, SnatAttempt},
        Event as E, Reason,
    },
};

use crate::{
    answers::back,
    family::Family,
    flows::Remote,
    frames::*,
    here::{answer, delivered, one_local, restored},
    node::*,
};

/// Length of the common header, of the header of a chunk and of the sixteen bytes that every chunk here begins with.
pub(crate) const HEADER_LEN: usize = 12 + 4 + 16;
const CHECK: usize = 8;
/// Verification tag of every packet, and what its chunk begins with: in an INIT that is the tag of its answers.
const TAG: [u8; 4] = [0xaa, 0xbb, 0xcc, 0xdd];
const INITIATE_TAG: [u8; 4] = [0x0a, 0x0b, 0x0c, 0x0d];
const COOKIE_ECHO: u8 = 10;

/// CRC32c bit by bit (RFC 9260, appendix A), over a packet whose checksum counts as zero.
pub(crate) fn crc32c(packet: &[u8]) -> [u8; 4] {
    let mut crc = u32::MAX;
    for (at, byte) in packet.iter().enumerate() {
        crc ^= u32::from(if (CHECK..CHECK + 4).contains(&at) { 0 } else { *byte });
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    (!crc).to_le_bytes()
}

/// Gives a packet other ports, and the checksum that is as right or wrong as before; none where it had none.
pub(crate) fn repaired(packet: &mut [u8], ports: &[u8]) {
    let before = crc32c(packet);
    packet[..4].copy_from_slice(ports);
    let after = crc32c(packet);
    if packet[CHECK..CHECK + 4] != [0; 4] {
        for at in 0..4 {
            packet[CHECK + at] ^= before[at] ^ after[at];
        }
    }
}

/// The header of a frame's packet, and its chunk up to the payload.
pub(crate) fn header(frame: &Frame) -> Vec<u8> {
    let kind = match frame.flags {
        SYN => chunk::INIT,
        flags if flags & RST != 0 => chunk::ABORT,
        flags if flags & SYN != 0 => chunk::INIT_ACK,
        flags if flags & FIN != 0 => chunk::SHUTDOWN,
        _ if frame.payload.is_empty() => COOKIE_ECHO,
        _ => chunk::DATA,
    };
    let mut header = [&frame.src.1.to_be_bytes()[..], &frame.dst.1.to_be_bytes(), &TAG, &[0; 4]].concat();
    header.extend([kind, 0]);
    header.extend((20 + frame.payload.len() as u16).to_be_bytes());
    header.extend([INITIATE_TAG, [0; 4], [1; 4], [2; 4]].concat());
    if frame.check == Check::Full {
        let check = crc32c(&[&header[..], &frame.payload].concat());
        header[CHECK..CHECK + 4].copy_from_slice(&check);
    }
    header
}

/// The answer to a packet of no association (RFC 9260, section 8.4).
pub(crate) fn abort(sent: &Frame) -> Vec<u8> {
    let (tag, flags) = if sent.flags == SYN { (INITIATE_TAG, 0) } else { (TAG, 1) };
    let ports = [sent.dst.1, sent.src.1].map(u16::to_be_bytes).concat();
    let mut packet = [&ports[..], &tag, &[0; 4], &[chunk::ABORT, flags, 0, 4]].concat();
    let check = crc32c(&packet);
    packet[CHECK..CHECK + 4].copy_from_slice(&check);
    packet
}

/// A frontend with a backend elsewhere.
fn one_remote(node: &mut Node) {
    let id = node.backend(REMOTE, SCTP, false);
    node.frontend(VIP, SCTP, &[id], 0);
}

/// Where the checksum of a plain frame is.
fn check_at(node: &Node) -> usize {
    ETHERNET + node.family.header_len() + CHECK
}

#[test]
fn packets_of_every_length_and_form_have_the_right_checksum_behind_new_ports() {
    Node::each(|node| {
        one_remote(node);
        let flow = node.connect("an association", &node.opener(SCTP, 40_000, VIP), REMOTE);
        for len in [1, 2, 3, 4, 223, 224, 225, 480, 1_000, 1_400] {
            let payload: Vec<u8> = (0..len).map(|at| (at * 7) as u8).collect();
            let sent = flow.opener.flags(ACK).payload(&payload);
            flow.forwards(node, "data", &sent, &[]);
            let sent = flow.answer(node).flags(ACK).payload(&payload);
            flow.returns(node, "data of the backend", &sent, &[]);
        }
        let forms: [Form; 3] = [
            ("options", &|frame| frame.options = vec![1; 8]),
            ("padding", &|frame| frame.padding = vec![0xee; 6]),
            ("a class of service", &|frame| frame.tos = 0xb8),
        ];
        for (name, form) in forms {
            flow.forwards(node, name, &flow.opener.flags(ACK).payload(b"odd").with(form), &[]);
        }
    });
}

#[test]
fn a_wrong_checksum_stays_as_wrong_and_without_new_ports_none_is_looked_at() {
    Node::each(|node| {
        one_remote(node);
        let flow = node.connect("an association", &node.opener(SCTP, 40_000, VIP), REMOTE);
        let sent = flow.opener.flags(ACK).payload(b"data");
        let at = check_at(node);
        let expected = flow.seen.flags(ACK).payload(b"data");
        let (mut broken, mut after) = (sent.bytes(), expected.bytes());
        for (at, error) in (at..).zip([0x12, 0, 0xff, 0x80]) {
            broken[at] ^= error;
            after[at] ^= error;
        }
        node.check("broken", node.entry, &broken, Action::Transmit, &after, &[Event(E::Transmitted)]);
        // From a port of the range to the same port.
        let id = node.backend(REMOTE_TOO, SCTP, false);
        let (ring, slots) = node.ring(&[id]);
        let same = xdp_common::tables::Frontend {
            service: 1,
            ring,
            slots,
            inner_ring: ring,
            inner_slots: slots,
            flags: xdp_common::tables::frontend::MASQUERADE_EXTERNAL,
            affinity_seconds: 0,
        };
        node.maps.frontend(VIP, TARGET, SCTP, same);
        let sent = node.opener(SCTP, 2_000, VIP).with(|frame| frame.dst.1 = TARGET);
        let whole = sent.with(|frame| {
            frame.mac = (node.mac, GATEWAY_MAC);
            frame.ttl -= 1;
            (frame.src, frame.dst.0) = ((NODE, 2_000), REMOTE_TOO);
        });
        let (mut broken, mut after) = (sent.bytes(), whole.bytes());
        assert_eq!(broken[at..at + 4], after[at..at + 4], "the checksum does not cover addresses");
        broken[at] ^= 0xff;
        after[at] ^= 0xff;
        let counts = [Event(E::FlowNew), SnatAttempt(0), Event(E::Transmitted)];
        node.check("same ports", node.entry, &broken, Action::Transmit, &after, &counts);
    });
}

#[test]
fn a_checksum_that_is_left_to_the_device_is_left_to_tc_and_stays_so() {
    Node::each(|node| {
        one_local(node);
        let unfinished = |frame: &mut Frame| frame.check = Check::Offloaded;
        let opener = node.opener(SCTP, 40_000, VIP).with(unfinished);
        let sent = opener.bytes();
        node.check("at XDP", node.entry, &sent, Action::Pass, &sent, &[Event(E::Deferred)]);
        let expected = opener.with(|frame| frame.dst = (LOCAL, TARGET));
        let counts = [Event(E::FlowNew), SnatAttempt(0), Event(E::Delivered)];
        node.check("at tc", Hook::TcIngress, &sent, Action::Pass, &expected.bytes(), &counts);
        let finished = node.opener(SCTP, 40_001, VIP).bytes();
        node.check("a finished one", Hook::TcIngress, &finished, Action::Pass, &finished, &[]);
        restored(node, "an answer", &opener, &answer(node, &opener, 40_000).flags(SYN | ACK));
        // A pod's own stack may have finished it, or not.
        delivered(
            node,
            "data",
            &node.opener(SCTP, 40_000, VIP).flags(ACK),
            40_000,
            &[Event(E::FlowEstablished)],
        );
        let reply = answer(node, &node.opener(SCTP, 40_000, VIP), 40_000).flags(ACK).payload(b"response");
        restored(node, "a finished answer", &opener, &reply);
    });
}

#[test]
fn an_association_is_over_when_both_sides_have_said_so_or_one_aborts() {
    Node::each(|node| {
        let ends: [&[(bool, u8)]; 4] =
            [&[(true, FIN | ACK), (false, FIN | ACK)], &[(true, FIN | ACK)], &[(true, RST)], &[(false, RST)]];
        for (sport, end) in (40_000..).zip(ends) {
            one_remote(node);
            let flow = node.connect("an association", &node.opener(SCTP, sport, VIP), REMOTE);
            let other = node.backend(REMOTE_TOO, SCTP, false);
            node.frontend(VIP, SCTP, &[other], 0);
            flow.sends(node, "an INIT of a restart is the same association's", SYN, &[]);
            for (by_client, flags) in end {
                match by_client {
                    true => flow.sends(node, "the client ends", *flags, &[]),
                    false => flow.answers(node, "the backend ends", *flags, &[]),
                }
            }
            let expected = flow.seen.with(|frame| frame.dst.0 = REMOTE_TOO);
            let counts = [Event(E::FlowRenewed), Event(E::FlowNew), SnatAttempt(0), Event(E::Transmitted)];
            let sent = flow.opener.bytes();
            node.check("the next INIT", node.entry, &sent, Action::Transmit, &expected.bytes(), &counts);
            let again = Remote { seen: expected, ..flow };
            node.establish("it is established", &again);
        }
    });
}

#[test]
fn tc_answers_what_it_refuses_with_the_checksum_left_to_the_device() {
    Node::each(|node| {
        node.frontend(VIP, SCTP, &[], 0);
        let sent = node.opener(SCTP, 40_000, VIP).with(|frame| frame.check = Check::Offloaded);
        let mut packet = abort(&sent);
        packet[CHECK..CHECK + 4].fill(0);
        let expected = back(node, VIP, etherparse::IpNumber::SCTP, &packet);
        let counts = [Drop(Reason::NoEndpoint), Event(E::Answered)];
        node.check("at tc", Hook::TcIngress, &sent.bytes(), Action::Redirect, &expected, &counts);
    });
}

#[test]
fn fragments_and_packets_cut_short_are_the_kernels() {
    Node::each(|node| {
        one_remote(node);
        let sent = node.opener(SCTP, 40_000, VIP);
        let short = sent.bytes();
        let len = ETHERNET + node.family.header_len() + 15;
        node.check("no chunk", node.entry, &short[..len], Action::Pass, &short[..len], &[]);
        let fragment = match node.family {
            Family::V4 => {
                let mut bytes = sent.bytes();
                bytes[ETHERNET + 6] |= 0x20;
                bytes
            }
            Family::V6 => sent.with(|frame| frame.extensions = vec![(44, vec![0, 0, 1, 0, 0, 0, 7])]).bytes(),
        };
        for hook in [node.entry, Hook::TcIngress] {
            node.check("a fragment", hook, &fragment, Action::Pass, &fragment, &[]);
        }
    });
}
