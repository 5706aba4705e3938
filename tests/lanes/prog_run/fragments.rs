//! Fragments: every one goes where the first goes, whole packets come out of the translated ones, and none is lost for
//! being early.

use xdp_common::{
    fragment::{FragmentKey, FragmentPorts, HELD_LEN_MAX, SECONDS_MAX, first},
    net::{TCP, UDP},
    tables,
    verdict::{
        Counter::{self, Drop, Event, SnatAttempt},
        Event as E, Reason,
    },
};

use crate::{family::Family, frames::*, node::*};

/// Bytes of the IP payload in each fragment but the last.
const PART: usize = 64;
/// A port that is kept, being one that sources are translated to.
const PORT: u16 = 2_000;
const ID: [u8; 2] = [0x12, 0x34];
const MORE: u16 = 0x2000;
const DONE: &[Counter] = &[Event(E::Fragment)];
const HELD: &[Counter] = &[Event(E::FragmentHeld)];
const LOST: &[Counter] = &[Event(E::FragmentLost)];

/// The fragments of a packet without IP options, first to last.
pub(crate) fn fragments(frame: &Frame) -> Vec<Vec<u8>> {
    let whole = frame.bytes();
    let (headers, body) = whole.split_at(ETHERNET + frame.family.header_len());
    let parts: Vec<&[u8]> = body.chunks(PART).collect();
    let last = parts.len() - 1;
    let fragment = |(number, part): (usize, &&[u8])| {
        let headers = match frame.family {
            Family::V4 => headers_v4(headers, number, number == last, part.len()),
            Family::V6 => headers_v6(headers, number, number == last, part.len()),
        };
        [&headers[..], part].concat()
    };
    parts.iter().enumerate().map(fragment).collect()
}

fn headers_v4(of_whole: &[u8], number: usize, is_last: bool, len: usize) -> Vec<u8> {
    let mut headers = of_whole.to_vec();
    let field = (number * PART / 8) as u16 | if is_last { 0 } else { MORE };
    headers[ETHERNET + 2..][..2].copy_from_slice(&(20 + len as u16).to_be_bytes());
    headers[ETHERNET + 6..][..2].copy_from_slice(&field.to_be_bytes());
    headers[ETHERNET + 10..][..2].fill(0);
    let check = !words_sum(&headers[ETHERNET..]);
    headers[ETHERNET + 10..][..2].copy_from_slice(&check.to_be_bytes());
    headers
}

/// RFC 8200, section 4.5.
fn headers_v6(of_whole: &[u8], number: usize, is_last: bool, len: usize) -> Vec<u8> {
    let mut headers = of_whole.to_vec();
    let next = std::mem::replace(&mut headers[ETHERNET + 6], 44);
    headers[ETHERNET + 4..][..2].copy_from_slice(&(8 + len as u16).to_be_bytes());
    let [high, low] = ((number * PART) as u16 | u16::from(!is_last)).to_be_bytes();
    headers.extend([next, 0, high, low, ID[0], ID[1], 0, 0]);
    headers
}

/// A packet of four fragments.
fn long(node: &Node, proto: u8, vip: Addr) -> Frame {
    node.opener(proto, PORT, vip).flags(ACK).payload(&[0xa5; 3 * PART])
}

/// What the kernel makes of a frame that it routes.
fn routed(node: &Node, frame: &Frame) -> Frame {
    frame.with(|frame| (frame.mac, frame.ttl) = ((node.mac, GATEWAY_MAC), 63))
}

/// Every fragment of a packet comes out as the same fragment of another, in this order; the last counts come with the first
/// that is run.
fn become_those_of(
    node: &Node,
    hook: Hook,
    (sent, expected): (&Frame, &Frame),
    order: &[usize],
    (each, opening): (Counter, &[Counter]),
) {
    let (sent, expected) = (fragments(sent), fragments(expected));
    for (step, &number) in order.iter().enumerate() {
        let counts = [DONE, &[each][..], if step == 0 { opening } else { &[] }].concat();
        let name = format!("fragment {number}");
        node.check(&name, hook, &sent[number], Action::Pass, &expected[number], &counts);
    }
}

/// Runs a case in each family.
fn each_family(case: impl Fn(&mut Node)) {
    for family in [Family::V4, Family::V6] {
        case(&mut Node::new(family, Hook::Xdp, Sizes::default()));
    }
}

fn one_backend(node: &mut Node, addr: Addr, is_here: bool) {
    for proto in [TCP, UDP] {
        let id = node.backend(addr, proto, is_here);
        node.frontend(VIP, proto, &[id], 0);
    }
}

const NEW: &[Counter] = &[Event(E::FlowNew), SnatAttempt(0)];

#[test]
fn fragments_of_a_request_go_half_translated_up_the_stack_and_leave_whole() {
    each_family(|node| {
        one_backend(node, REMOTE, false);
        for proto in [TCP, UDP] {
            let sent = long(node, proto, VIP);
            let half = sent.with(|frame| frame.dst = (REMOTE, TARGET));
            let slow = (Event(E::SlowPath), NEW);
            become_those_of(node, Hook::TcIngress, (&sent, &half), &[0, 1, 2, 3], slow);
            // Behind the first the order is free, and repetitions do no harm.
            let slow = (Event(E::SlowPath), &[][..]);
            become_those_of(node, Hook::TcIngress, (&sent, &half), &[0, 3, 1, 2, 1, 0], slow);
            let half = routed(node, &half);
            let whole = half.with(|frame| frame.src.0 = NODE);
            let finished = (Event(E::Finished), &[][..]);
            become_those_of(node, Hook::TcEgress, (&half, &whole), &[0, 2, 3, 1], finished);
        }
    });
}

#[test]
fn fragments_of_an_answer_from_elsewhere_find_the_client() {
    each_family(|node| {
        one_backend(node, REMOTE, false);
        for proto in [TCP, UDP] {
            node.run(Hook::TcIngress, &fragments(&long(node, proto, VIP))[0]);
            let answer = node.frame(proto, (GATEWAY_MAC, node.mac), (REMOTE, TARGET), (NODE, PORT));
            let answer = answer.flags(ACK).payload(&[0x5a; 3 * PART]);
            let half = answer.with(|frame| frame.dst = (CLIENT, PORT));
            let slow = (Event(E::SlowPath), &[][..]);
            become_those_of(node, Hook::TcIngress, (&answer, &half), &[0, 3, 2, 1], slow);
            let half = routed(node, &half);
            let whole = half.with(|frame| frame.src = (VIP, HTTP));
            let finished = (Event(E::Finished), &[][..]);
            become_those_of(node, Hook::TcEgress, (&half, &whole), &[0, 1, 2, 3], finished);
        }
    });
}

#[test]
fn fragments_to_a_backend_here_are_delivered_and_those_of_its_answer_restored() {
    each_family(|node| {
        one_backend(node, LOCAL, true);
        for proto in [TCP, UDP] {
            let sent = long(node, proto, VIP);
            let delivered = sent.with(|frame| frame.dst = (LOCAL, TARGET));
            let counts = (Event(E::Delivered), NEW);
            become_those_of(node, Hook::TcIngress, (&sent, &delivered), &[0, 1, 2, 3], counts);
            let answer = node.frame(proto, (node.mac, GATEWAY_MAC), (LOCAL, TARGET), (CLIENT, PORT));
            let answer = answer.flags(ACK).payload(&[0x5a; 3 * PART]);
            let restored = answer.with(|frame| frame.src = (VIP, HTTP));
            let counts = (Event(E::Restored), &[][..]);
            become_those_of(node, Hook::TcEgress, (&answer, &restored), &[0, 2, 1, 3], counts);
        }
    });
}

#[test]
fn a_fragment_that_comes_before_its_first_is_held_and_goes_on_when_it_comes_again() {
    each_family(|node| {
        one_backend(node, REMOTE, false);
        let sent = long(node, UDP, VIP);
        let half = sent.with(|frame| frame.dst = (REMOTE, TARGET));
        let early = fragments(&sent);
        for number in [3, 1] {
            node.check("early", Hook::TcIngress, &early[number], Action::Drop, &early[number], HELD);
            assert_eq!(node.maps.held(), Some((node.ifindex, early[number].clone())));
        }
        become_those_of(node, Hook::TcIngress, (&sent, &half), &[0, 3, 1, 2], (Event(E::SlowPath), NEW));
        assert_eq!(node.maps.held(), Some((0, early[0].clone())), "the first says that it has come");
        assert_eq!(node.maps.held(), None);
        // Another packet with the same identification, long after.
        node.configure(|config| config.clock += SECONDS_MAX + 1);
        node.check("late", Hook::TcIngress, &early[1], Action::Drop, &early[1], HELD);
    });
}

#[test]
fn a_fragment_whose_first_was_given_up_is_left_to_the_kernel() {
    each_family(|node| {
        one_backend(node, REMOTE, false);
        let sent = fragments(&long(node, UDP, VIP));
        let [high, low] = ID;
        let key = FragmentKey { src: CLIENT, dst: VIP, id: [high, low, 0, 0], proto: UDP, zero: [0; 3] };
        node.maps.note_fragment(key, FragmentPorts::without(first::GIVEN_UP, 100));
        node.check("given up", Hook::TcIngress, &sent[2], Action::Pass, &sent[2], LOST);
    });
}

#[test]
fn fragments_that_cannot_be_held_are_left_to_the_kernel() {
    each_family(|node| {
        one_backend(node, REMOTE, false);
        let mut frame = fragments(&long(node, UDP, VIP))[1].clone();
        let mut grow = |length: usize| {
            frame.resize(length, 0xee); // behind the packet, as padding
            frame.clone()
        };
        let longest = grow(HELD_LEN_MAX);
        let room = (tables::HELD.entries as usize).div_ceil(HELD_LEN_MAX);
        let held =
            (0..room).take_while(|_| node.run(Hook::TcIngress, &longest).action == Action::Drop).count();
        assert!(held > 200 && held < room, "{held} of {room}");
        node.check("a full ring", Hook::TcIngress, &longest, Action::Pass, &longest, LOST);
        while node.maps.held().is_some() {}
        node.check("room again", Hook::TcIngress, &longest, Action::Drop, &longest, HELD);
        let longer = grow(HELD_LEN_MAX + 1);
        node.check("too long", Hook::TcIngress, &longer, Action::Pass, &longer, LOST);
    });
}

#[test]
fn xdp_leaves_fragments_to_tc() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        one_backend(node, REMOTE, false);
        for fragment in fragments(&long(node, UDP, VIP)) {
            node.check("at XDP", node.entry, &fragment, Action::Pass, &fragment, &[]);
        }
    });
}

#[test]
fn fragments_to_another_port_of_an_address_of_ours_are_not_touched() {
    each_family(|node| {
        one_backend(node, REMOTE, false);
        for proto in [TCP, UDP] {
            let sent = long(node, proto, VIP).with(|frame| frame.dst.1 = 2049);
            for fragment in fragments(&sent) {
                node.check("NFS", Hook::TcIngress, &fragment, Action::Pass, &fragment, DONE);
            }
        }
    });
}

#[test]
fn every_fragment_of_a_refused_packet_is_dropped_and_the_first_of_udp_answered() {
    each_family(|node| {
        node.frontend(VIP, UDP, &[], 0);
        let sent = fragments(&long(node, UDP, VIP));
        let refused = [Event(E::Fragment), Drop(Reason::NoEndpoint)];
        let first = node.run(Hook::TcIngress, &sent[0]);
        assert_eq!(first.action, Action::Redirect, "an ICMP error goes back");
        let quoted = node.family.header_len() + if node.family == Family::V6 { 8 } else { 0 } + 8;
        assert!(first.frame.ends_with(&sent[0][ETHERNET..][..quoted]), "it quotes the ports");
        let mut counts: Vec<String> = [&refused[..], &[Event(E::Answered)]]
            .concat()
            .iter()
            .map(|c| crate::maps::name(c.index()))
            .collect();
        counts.sort();
        assert_eq!(first.counts, counts);
        let counts = [&refused[..], &[Event(E::Unanswered)]].concat();
        node.check("a later one", Hook::TcIngress, &sent[1], Action::Drop, &sent[1], &counts);
    });
}

#[test]
fn a_first_fragment_without_a_whole_header_is_not_touched() {
    each_family(|node| {
        one_backend(node, REMOTE, false);
        // Where the length of the packet is, what it is without the transport's part, and how many bytes of headers there are.
        let (at, without, headers) = match node.family {
            Family::V4 => (ETHERNET + 2, 20, 20),
            Family::V6 => (ETHERNET + 4, 8, 48),
        };
        for (proto, len) in [(TCP, 16), (UDP, 0)] {
            let mut first = fragments(&long(node, proto, VIP))[0].clone();
            first.truncate(ETHERNET + headers + len);
            first[at..][..2].copy_from_slice(&(without + len as u16).to_be_bytes());
            node.check("a tiny one", Hook::TcIngress, &first, Action::Pass, &first, &[]);
        }
    });
}
