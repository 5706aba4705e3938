//! ICMP errors about flows, byte for byte, at XDP and at tc egress; echo requests to the addresses of services.

use etherparse::{IpNumber, Ipv4Header};
use xdp_common::{
    net::{SCTP, TCP, UDP},
    tables::{ANSWERS_PER_PERIOD_MAX, Device, device, frontend, network},
    tunnel::MARK,
    verdict::{
        Counter::{Drop, Event},
        Event as E, Reason,
    },
};

use crate::{family::Family, flows::Remote, forwarding::one_remote, frames::*, node::*};

/// Routers behind the gateway, before and behind the node.
const ROUTER: Addr = [198, 51, 100, 1];
const ROUTER_INSIDE: Addr = [10, 244, 0, 1];
const TRANSLATED: [xdp_common::verdict::Counter; 1] = [Event(E::Related)];

/// An ICMP message from the gateway to the node.
#[derive(Clone)]
struct Icmp {
    mac: (Mac, Mac),
    from: Addr,
    to: Addr,
    ttl: u8,
    options: usize,
    /// Type and code.
    kind: [u8; 2],
    body: Vec<u8>,
}

impl Icmp {
    fn bytes(&self) -> Vec<u8> {
        // The second half of an error's header: an MTU, where it is one that has it.
        let mut icmp = [&self.kind[..], &[0, 0, 0, 0, 5, 0x14], &self.body].concat();
        let words =
            icmp.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
        let check = !folded(words.sum());
        icmp[2..4].copy_from_slice(&check.to_be_bytes());
        let mut ip = Ipv4Header::new(icmp.len() as u16, self.ttl, IpNumber::ICMP, self.from, self.to)
            .expect("messages are short");
        ip.options = vec![1; self.options][..].try_into().expect("whole words");
        ip.set_payload_len(icmp.len()).expect("messages are short");
        ip.header_checksum = ip.calc_header_checksum();
        [&self.mac.1[..], &self.mac.0[..], &[8, 0], &ip.to_bytes()[..], &icmp].concat()
    }

    fn with(&self, edit: impl FnOnce(&mut Self)) -> Self {
        let mut copy = self.clone();
        edit(&mut copy);
        copy
    }
}

/// An error about a packet, which is quoted up to some bytes behind its IP header.
fn error(node: &Node, from: Addr, about: &Frame, kind: [u8; 2], quoted: usize) -> Icmp {
    // Nobody updates, or could check, a CRC that is quoted.
    let is_crc = about.proto == SCTP;
    let bytes = about.with(|frame| frame.check = if is_crc { Check::Offloaded } else { frame.check }).bytes();
    let end = (ETHERNET + 20 + about.options.len() + quoted).min(bytes.len());
    let (mac, to, body) = ((GATEWAY_MAC, node.mac), about.src.0, bytes[ETHERNET..end].to_vec());
    Icmp { mac, from, to, ttl: 61, options: 0, kind, body }
}

/// Types and codes of errors: every unreachable that routers send, hops used up, a parameter that makes no sense.
const KINDS: [[u8; 2]; 6] = [[3, 1], [3, 3], [3, 4], [3, 13], [11, 0], [12, 0]];
/// What routers quote: 8 bytes, a TCP header, as much as there is.
const QUOTED: [usize; 3] = [8, 20, 1_500];

fn established(node: &mut Node, proto: u8) -> Remote {
    one_remote(node);
    node.connect("a flow", &node.opener(proto, 40_000, VIP).payload(b"what is quoted"), REMOTE)
}

#[test]
fn an_error_from_behind_the_node_reaches_the_client_about_its_own_packet() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        for proto in [TCP, UDP, SCTP] {
            let flow = established(node, proto);
            for (kind, quoted) in KINDS.into_iter().flat_map(|kind| QUOTED.map(|quoted| (kind, quoted))) {
                for from in [ROUTER_INSIDE, REMOTE] {
                    let sent = error(node, from, &flow.seen, kind, quoted);
                    let about = flow.opener.with(|frame| frame.ttl = flow.seen.ttl);
                    // The name of a hop that traceroute asks for stays.
                    let source = if kind[0] == 11 && from == ROUTER_INSIDE { from } else { VIP };
                    let seen = error(node, source, &about, kind, quoted).with(|error| {
                        error.mac = (node.mac, GATEWAY_MAC);
                        error.ttl -= 1;
                    });
                    let name = format!("protocol {proto}, {kind:?} from {from:?}, {quoted} bytes");
                    let (sent, seen) = (sent.bytes(), seen.bytes());
                    node.check(&name, node.entry, &sent, Action::Transmit, &seen, &TRANSLATED);
                }
            }
        }
    });
}

#[test]
fn an_error_by_a_device_without_xdp_goes_on_from_tc() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        for proto in [TCP, UDP, SCTP] {
            let flow = established(node, proto);
            let about = flow.opener.with(|frame| frame.ttl = flow.seen.ttl);
            let sent = error(node, ROUTER_INSIDE, &flow.seen, [3, 4], 1_500);
            node.check("behind XDP", Hook::TcIngress, &sent.bytes(), Action::Pass, &sent.bytes(), &[]);
            let with = |flags| Device { snat: NODE, flags, mtu: 1500, mac: node.mac, zero: [0; 2] };
            let (before, without) = (with(CAPABLE), with(device::WITHOUT_XDP));
            node.maps.device(node.ifindex, without);
            let seen = error(node, VIP, &about, [3, 4], 1_500).with(|error| error.ttl -= 1);
            let name = format!("protocol {proto}");
            node.check(&name, Hook::TcIngress, &sent.bytes(), Action::Redirect, &seen.bytes(), &TRANSLATED);
            // The kernel says so to its sender.
            let last = sent.with(|error| error.ttl = 1);
            let seen = error(node, ROUTER_INSIDE, &about, [3, 4], 1_500).with(|error| error.ttl = 1);
            node.check(&name, Hook::TcIngress, &last.bytes(), Action::Pass, &seen.bytes(), &TRANSLATED);
            node.maps.device(node.ifindex, before);
        }
    });
}

#[test]
fn an_error_from_the_clients_side_reaches_the_backend_from_this_node() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        for proto in [TCP, UDP, SCTP] {
            let flow = established(node, proto);
            let answer = flow.answer(node).payload(b"what is quoted of an answer");
            let seen = answer.with(|frame| (frame.src, frame.dst) = (flow.opener.dst, flow.opener.src));
            for (kind, quoted) in KINDS.into_iter().flat_map(|kind| QUOTED.map(|quoted| (kind, quoted))) {
                for from in [ROUTER, CLIENT] {
                    let sent = error(node, from, &seen, kind, quoted);
                    let expected = error(node, NODE, &answer, kind, quoted).with(|error| {
                        error.mac = (node.mac, GATEWAY_MAC);
                        error.ttl -= 1;
                    });
                    let name = format!("protocol {proto}, {kind:?} from {from:?}, {quoted} bytes");
                    let (sent, expected) = (sent.bytes(), expected.bytes());
                    node.check(&name, node.entry, &sent, Action::Transmit, &expected, &TRANSLATED);
                }
            }
        }
    });
}

#[test]
fn options_of_the_error_and_of_what_it_quotes_stay_where_they_are() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        let flow = established(node, UDP);
        for (outer, inner) in [(0, 4), (4, 0), (40, 40)] {
            let quoted = flow.seen.with(|frame| frame.options = vec![1; inner]);
            let original =
                flow.opener.with(|frame| (frame.options, frame.ttl) = (vec![1; inner], quoted.ttl));
            let of = |about: &Frame| {
                error(node, ROUTER_INSIDE, about, [3, 4], 8).with(|error| error.options = outer)
            };
            let expected = of(&original).with(|error| {
                (error.mac, error.from) = ((node.mac, GATEWAY_MAC), VIP);
                error.ttl -= 1;
            });
            let name = format!("{outer} bytes of options outside, {inner} inside");
            let sent = of(&quoted).bytes();
            node.check(&name, node.entry, &sent, Action::Transmit, &expected.bytes(), &TRANSLATED);
        }
    });
}

#[test]
fn errors_to_and_from_a_backend_on_this_node_go_through_the_stack() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        for proto in [TCP, UDP, SCTP] {
            let id = node.backend(LOCAL, proto, true);
            node.frontend(VIP, proto, &[id], 0);
            let opener = node.opener(proto, 40_000, VIP).payload(b"what is quoted");
            assert_eq!(node.run(node.entry, &opener.bytes()).action, Action::Pass);
            let inside = opener.with(|frame| frame.dst = (LOCAL, TARGET));
            let answer = inside.with(|frame| (frame.src, frame.dst) = (frame.dst, frame.src));
            let outside = answer.with(|frame| frame.src = opener.dst);
            // An error from the client's side is about an answer.
            assert_eq!(node.run(Hook::TcEgress, &answer.bytes()).frame, outside.bytes());
            for (from, quoted) in [(ROUTER, 8), (CLIENT, 20), (ROUTER, 1_500)] {
                let sent = error(node, from, &outside, [3, 4], quoted).bytes();
                let expected = error(node, from, &answer, [3, 4], quoted).bytes();
                node.check("to the backend", node.entry, &sent, Action::Pass, &expected, &TRANSLATED);
            }
            for (from, source) in [(LOCAL, VIP), (NODE, NODE), (ROUTER_INSIDE, ROUTER_INSIDE)] {
                for (kind, quoted) in [([3, 3], 8), ([3, 4], 20), ([11, 0], 1_500)] {
                    let sent = error(node, from, &inside, kind, quoted).bytes();
                    let expected = error(node, source, &opener, kind, quoted).bytes();
                    let name = format!("{kind:?} from {from:?}");
                    node.check(&name, Hook::TcEgress, &sent, Action::Pass, &expected, &TRANSLATED);
                }
            }
        }
    });
}

#[test]
fn what_the_kernel_says_about_half_translated_packets_is_put_right_on_its_way_out() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        for proto in [TCP, UDP, SCTP] {
            let flow = established(node, proto);
            let last = |frame: &Frame| frame.flags(ACK).with(|frame| frame.ttl = 1);
            // Both directions: a client's packet, and a backend's answer, each on its last hop here.
            let sent = last(&flow.opener);
            let half = sent.with(|frame| (frame.src.1, frame.dst) = (flow.seen.src.1, (REMOTE, TARGET)));
            let answer = last(&flow.answer(node));
            let half_answer = answer.with(|frame| frame.dst.0 = CLIENT);
            for (whole, half) in [(sent, half), (answer, half_answer)] {
                let slow = [Event(E::SlowPath)];
                let up = half.bytes();
                node.check("on its last hop", node.entry, &whole.bytes(), Action::Pass, &up, &slow);
                for (kind, quoted) in [([11, 0], 8), ([3, 4], 20), ([3, 4], 1_500)] {
                    let said = error(node, NODE, &half, kind, quoted).bytes();
                    let expected = error(node, NODE, &whole, kind, quoted).bytes();
                    let name = format!("protocol {proto}, {kind:?}, {quoted} bytes");
                    node.check(&name, Hook::TcEgress, &said, Action::Pass, &expected, &TRANSLATED);
                }
            }
        }
    });
}

#[test]
fn an_error_that_goes_up_keeps_its_sender_until_it_leaves() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        let flow = established(node, UDP);
        let down = Device { snat: NODE, flags: 0, mtu: 1500, mac: node.mac, zero: [0; 2] };
        node.device(node.ifindex, down);
        node.raise_epoch();
        let answer = flow.answer(node);
        let seen = answer.with(|frame| (frame.src, frame.dst) = (flow.opener.dst, flow.opener.src));
        let about = flow.opener.with(|frame| frame.ttl = flow.seen.ttl);
        let cases = [
            ("to the backend, of a router", ROUTER, &seen, &answer, NODE),
            ("to the backend, of the client", CLIENT, &seen, &answer, NODE),
            ("to the client, of the backend", REMOTE, &flow.seen, &about, VIP),
            ("to the client, of a router", ROUTER_INSIDE, &flow.seen, &about, VIP),
        ];
        for (name, from, quoted, translated, source) in cases {
            let sent = error(node, from, quoted, [3, 3], 8).bytes();
            let up = error(node, from, translated, [3, 3], 8);
            node.check(name, node.entry, &sent, Action::Pass, &up.bytes(), &TRANSLATED);
            let out = up.with(|error| error.from = source);
            let finished = [Event(E::Finished)];
            node.check(name, Hook::TcEgress, &up.bytes(), Action::Pass, &out.bytes(), &finished);
            node.check("once is enough", Hook::TcEgress, &out.bytes(), Action::Pass, &out.bytes(), &[]);
        }
    });
}

#[test]
fn errors_about_anything_else_are_left_alone() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        let flow = established(node, TCP);
        let stranger = flow.seen.with(|frame| frame.src.1 += 1);
        let plain = error(node, ROUTER_INSIDE, &flow.seen, [3, 4], 20);
        let cases = [
            ("another flow", error(node, ROUTER_INSIDE, &stranger, [3, 4], 20)),
            ("a redirect", plain.with(|error| error.kind = [5, 1])),
            ("an echo reply", plain.with(|error| error.kind = [0, 0])),
            ("source quench", plain.with(|error| error.kind = [4, 0])),
            ("not to the sender of what it quotes", plain.with(|error| error.to = NODE_TOO)),
            ("a quote without ports", error(node, ROUTER_INSIDE, &flow.seen, [3, 4], 7)),
            ("no quote", plain.with(|error| error.body.clear())),
            ("another station's frame", plain.with(|error| error.mac.1 = [2, 0, 0, 0, 0, 0x99])),
            ("a later fragment", plain.with(|error| error.body[7] = 1)),
            ("a quote of another version", plain.with(|error| error.body[0] = 0x65)),
        ];
        for (name, sent) in cases {
            let sent = sent.bytes();
            node.check(name, node.entry, &sent, Action::Pass, &sent, &[]);
        }
        let sent = error(node, NODE, &stranger, [3, 4], 20).bytes();
        node.check("at egress", Hook::TcEgress, &sent, Action::Pass, &sent, &[]);
    });
}

/// The kernel would send it back to the node that has sent it on, which would send it on again.
#[test]
fn an_error_that_another_node_has_sent_on_and_is_nobodys_is_dropped() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        let flow = established(node, TCP);
        node.maps.network(network::NODES, OTHER_NODE, 32, 1);
        node.maps.service_address(VIP, frontend::ECHO);
        let of_other = flow.seen.with(|frame| frame.src.0 = OTHER_NODE);
        let sent = error(node, ROUTER_INSIDE, &of_other, [3, 4], 20);
        let plain = sent.bytes();
        node.check("on its way there", node.entry, &plain, Action::Pass, &plain, &[]);
        let marked = sent.with(|error| error.mac.0 = MARK).bytes();
        let dropped = [Drop(Reason::UnknownPort)];
        node.check("out of a tunnel", node.entry, &marked, Action::Drop, &marked, &dropped);
    });
}

/// Makes an address one of a service as such.
fn address(node: &mut Node, addr: Addr, flags: u32) {
    node.maps.service_address(addr, flags);
    if flags == frontend::ADDRESS {
        node.maps.service_network(addr);
    }
}

fn echo_request(node: &Node, to: Addr, data: &[u8]) -> Icmp {
    let (mac, body) = ((GATEWAY_MAC, node.mac), data.to_vec());
    Icmp { mac, from: CLIENT, to, ttl: 9, options: 0, kind: [8, 0], body }
}

fn echo_reply(request: &Icmp) -> Icmp {
    request.with(|reply| {
        reply.mac = (request.mac.1, request.mac.0);
        (reply.from, reply.to) = (request.to, request.from);
        (reply.ttl, reply.kind) = (64, [0, 0]);
    })
}

#[test]
fn addresses_of_services_answer_echo_requests() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        address(node, VIP, frontend::ADDRESS);
        address(node, VIP_TOO, frontend::ECHO);
        for to in [VIP, VIP_TOO] {
            for data in [&b""[..], b"o", b"odd", &[0x5a; 56], &[1; 1_400]] {
                let request = echo_request(node, to, data);
                for request in [request.clone(), request.with(|request| request.options = 8)] {
                    let (sent, expected) = (request.bytes(), echo_reply(&request).bytes());
                    let name = format!("{} bytes to {to:?}", data.len());
                    let counts = [Event(E::EchoAnswered)];
                    node.check(&name, node.entry, &sent, Action::Transmit, &expected, &counts);
                }
            }
        }
        let plain = echo_request(node, VIP, b"data");
        let mut cases = vec![
            ("the node's own address", plain.with(|request| request.to = NODE)),
            ("another station's frame", plain.with(|request| request.mac.1 = [2, 0, 0, 0, 0, 0x99])),
            ("a timestamp request", plain.with(|request| request.kind = [13, 0])),
            ("an echo request of another code", plain.with(|request| request.kind = [8, 1])),
        ];
        let other = [VIP[0], VIP[1], VIP[2], 99];
        cases.push(("no service", plain.with(|request| request.to = other)));
        for (name, sent) in cases {
            let sent = sent.bytes();
            node.check(name, node.entry, &sent, Action::Pass, &sent, &[]);
        }
        // The routing table would send them back where they have come from.
        let nobodys = plain.with(|request| request.from = [127, 0, 0, 1]).bytes();
        let dropped = [Drop(Reason::UnknownPort)];
        node.check("from nobody", node.entry, &nobodys, Action::Drop, &nobodys, &dropped);
        node.maps.service_network(VIP);
        node.maps.network(network::SERVICES, VIP, 24, 1);
        let free = plain.with(|request| request.to = other).bytes();
        let counts = [Drop(Reason::UnknownServiceAddress)];
        node.check("to a free address", node.entry, &free, Action::Drop, &free, &counts);
        let sent = plain.bytes();
        node.configure(|config| config.echo = 0);
        node.check("told not to", node.entry, &sent, Action::Drop, &sent, &dropped);
        node.configure(|config| config.echo = 1);
        node.device(node.ifindex, Device { snat: NODE, flags: 0, mtu: 1500, mac: node.mac, zero: [0; 2] });
        node.check("no way back", node.entry, &sent, Action::Drop, &sent, &dropped);
    });
}

#[test]
fn echo_replies_are_limited_as_refusals_are_and_leave_those_their_allowance() {
    let mut node = Node::new(Family::V4, Hook::Xdp, Sizes::default());
    address(&mut node, VIP, frontend::ADDRESS);
    node.frontend(VIP, TCP, &[], 0);
    let refused = node.opener(TCP, 40_000, VIP).bytes();
    let request = echo_request(&node, VIP, b"").bytes();
    let (mut answered, mut dropped) = (0u32, 0u32);
    for _ in 0..4 * ANSWERS_PER_PERIOD_MAX {
        match node.run(node.entry, &request).action {
            Action::Transmit => answered += 1,
            Action::Drop => dropped += 1,
            other @ (Action::Pass | Action::Redirect) => panic!("{other:?}"),
        }
        if dropped == 1 {
            assert_eq!(node.run(node.entry, &refused).action, Action::Transmit, "refused at once");
        }
    }
    // Test runs may move between processors and periods, each of which has an allowance.
    assert!(answered >= ANSWERS_PER_PERIOD_MAX, "{answered} answered, {dropped} dropped");
    let counts = node.maps.counts();
    let count = |counter: xdp_common::verdict::Counter| counts[counter.index() as usize];
    assert_eq!(count(Event(E::EchoAnswered)), u64::from(answered));
    assert_eq!(count(Drop(Reason::EchoLimit)), u64::from(dropped));
}
