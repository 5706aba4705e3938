//! Direct server return, byte for byte: what goes to the node of its backend in a packet of ours, and what comes from
//! another node in a packet of its own.

use xdp_common::{
    net::{SCTP, TCP, UDP},
    tables::{direct, frontend, network},
    tunnel::MARK,
    verdict::{
        Counter::{self, Drop, Event, SnatAttempt},
        Event as E, Reason,
    },
};

use crate::{
    answers::{too_big, too_far},
    applied::surrounding,
    family::Family,
    fragments::fragments,
    frames::*,
    here::{answer, one_local, restored},
    node::*,
};

const TUNNELLED: [Counter; 1] = [Event(E::Tunnelled)];
const NEW: [Counter; 2] = [Event(E::FlowNew), Event(E::Tunnelled)];
const ESTABLISHED: [Counter; 2] = [Event(E::FlowEstablished), Event(E::Tunnelled)];
const TRANSPORTS: [u8; 3] = [TCP, UDP, SCTP];

/// Both nodes answer clients of services of theirs directly.
fn answers_directly(node: &mut Node) {
    node.configure(|config| config.direct = direct::TCP | direct::OTHERS | direct::NODE_PORTS);
    node.maps.network(network::NODES, OTHER_NODE, 32, 1);
    node.maps.network(network::SELF, NODE, 32, 1);
    for vip in [VIP, VIP_TOO] {
        node.maps.service_address(vip, frontend::ECHO);
    }
}

/// A frontend of each protocol with a backend on another node.
pub(crate) fn one_on(node: &mut Node, other: Addr) {
    answers_directly(node);
    for proto in TRANSPORTS {
        let id = node.backend_on(other, REMOTE, proto);
        node.frontend(VIP, proto, &[id], 0);
    }
}

/// A NodePort of each protocol, on this node and all others, with these backends.
pub(crate) fn node_ports(node: &mut Node, backend: impl Fn(&mut Node, u8) -> u32) {
    answers_directly(node);
    for proto in TRANSPORTS {
        let id = backend(node, proto);
        node.frontend(NODE, proto, &[id], frontend::NODE_ADDRESS | frontend::NODE_PORT);
        node.frontend(ANY_NODE, proto, &[id], frontend::NODE_PORT);
    }
}

/// A frame in a packet from one node to another.
fn around(node: &Node, frame: &[u8], len: usize, tos: u8, from: Addr, to: Addr) -> Vec<u8> {
    let [from, to] = [from, to].map(|name| node.family.octets(name));
    let outer = surrounding(node.family, tos, len, &from, &to);
    [&frame[..ETHERNET], &outer[..], &frame[ETHERNET..]].concat()
}

/// The client's packet as it leaves for the other node, by a way and from an address of ours.
pub(crate) fn sent_on(node: &Node, sent: &Frame, mac: (Mac, Mac), from: Addr, to: Addr) -> Vec<u8> {
    let inner = sent.with(|frame| (frame.mac, frame.ttl) = (mac, frame.ttl - 1));
    around(node, &inner.bytes(), sent.total_len(), sent.tos, from, to)
}

/// Checks how packets of a new connection go to another node: from an address of ours, by a way.
fn goes_by_tunnel(node: &Node, opener: &Frame, action: Action, mac: (Mac, Mac), from: Addr, to: Addr) {
    for (flags, counts) in [(SYN, &NEW[..]), (ACK, &ESTABLISHED), (ACK, &TUNNELLED)] {
        let sent = opener.flags(flags);
        let expected = sent_on(node, &sent, mac, from, to);
        node.check("by tunnel", node.entry, &sent.bytes(), action, &expected, counts);
    }
}

/// The client's packet as it comes from another node.
fn from_node(node: &Node, sent: &Frame) -> Vec<u8> {
    around(node, &sent.bytes(), sent.total_len(), sent.tos, OTHER_NODE, NODE)
}

/// A frame that has been taken out of another node's packet.
fn marked(sent: &Frame) -> Frame {
    sent.with(|frame| frame.mac.0 = MARK)
}

#[test]
fn packets_of_every_form_go_to_the_node_of_their_backend_as_they_are() {
    Node::each(|node| {
        one_on(node, OTHER_NODE);
        let room = 1500 - 2 * node.family.header_len();
        for proto in TRANSPORTS {
            let opener = node.opener(proto, 40_000, VIP);
            let check = |name: &str, sent: &Frame, counts: &[Counter]| {
                let expected = sent_on(node, sent, (node.mac, GATEWAY_MAC), NODE, OTHER_NODE);
                let name = format!("protocol {proto}, {name}");
                node.check(&name, node.entry, &sent.bytes(), Action::Transmit, &expected, counts);
            };
            let before = node.maps.established_entries();
            check("the opener", &opener, &NEW);
            if proto != UDP {
                check("the opener once more", &opener, &TUNNELLED);
            }
            assert_eq!(node.maps.established_entries(), before);
            check("the next", &opener.flags(ACK), &ESTABLISHED);
            assert_eq!(node.maps.established_entries(), before + 1, "one entry");
            let forms: [Form; 8] = [
                ("an odd payload", &|frame| frame.payload = b"odd".to_vec()),
                ("as long as may be", &|frame| frame.payload = vec![0xa5; room - l4_header_len(proto)]),
                ("padding", &|frame| frame.padding = vec![0xee; 6]),
                ("options", &|frame| frame.options = vec![1; 40]),
                ("a code point", &|frame| frame.tos = 0xb8),
                ("a low time to live", &|frame| frame.ttl = 2),
                ("a high time to live", &|frame| frame.ttl = 255),
                ("another flag", &|frame| frame.flags = FIN | ACK),
            ];
            for (name, form) in forms {
                check(name, &opener.flags(ACK).with(form), &TUNNELLED);
            }
        }
    });
}

#[test]
fn they_leave_by_another_interface_where_the_node_is_there() {
    Node::each(|node| {
        one_on(node, BESIDE);
        node.maps.network(network::SELF, NODE_TOO, 32, 1);
        let opener = node.opener(TCP, 40_000, VIP);
        goes_by_tunnel(node, &opener, Action::Redirect, (node.mac_too, BESIDE_MAC), NODE_TOO, BESIDE);
    });
}

#[test]
fn without_a_neighbour_tc_ingress_sends_them_and_the_kernel_finds_it() {
    Node::each(|node| {
        one_on(node, UNRESOLVED);
        for proto in TRANSPORTS {
            let opener = node.opener(proto, 40_000, VIP);
            let sent = opener.bytes();
            let made = [Event(E::FlowNew)];
            node.check("at XDP", node.entry, &sent, Action::Pass, &sent, &made);
            // Addressed to the neighbour by the kernel, behind the program.
            let expected = sent_on(node, &opener, opener.mac, NODE, UNRESOLVED);
            node.check("at tc", Hook::TcIngress, &sent, Action::Redirect, &expected, &TUNNELLED);
            let last = opener.flags(ACK).with(|frame| frame.ttl = 1).bytes();
            for hook in [node.entry, Hook::TcIngress] {
                let outcome = node.run(hook, &last);
                assert_eq!((outcome.action, &outcome.frame), (Action::Pass, &last), "on its last hop");
            }
        }
    });
}

/// The kernel's answer about the way depends on the frame there.
#[test]
fn a_frame_longer_than_its_packet_finds_its_way_at_tc_too() {
    Node::each(|node| {
        one_on(node, OTHER_NODE);
        for proto in TRANSPORTS {
            let opener = node.opener(proto, 40_000, VIP);
            assert_eq!(node.run(node.entry, &opener.bytes()).action, Action::Transmit);
            node.configure(|config| config.epoch += 1);
            let padding = vec![0xa5; 2_000];
            let sent = [opener.bytes(), padding.clone()].concat();
            let expected = [sent_on(node, &opener, opener.mac, NODE, OTHER_NODE), padding].concat();
            node.check("padded", Hook::TcIngress, &sent, Action::Redirect, &expected, &TUNNELLED);
        }
    });
}

#[test]
fn what_is_too_long_for_the_tunnel_is_answered_with_the_length_that_gets_through() {
    Node::each(|node| {
        one_on(node, OTHER_NODE);
        let mtu = 1500 - node.family.header_len();
        for proto in [TCP, UDP] {
            let opener = node.opener(proto, 40_000, VIP);
            for flags in [SYN, ACK] {
                assert_eq!(node.run(node.entry, &opener.flags(flags).bytes()).action, Action::Transmit);
            }
            let headers = node.family.header_len() + l4_header_len(proto);
            let long = opener.flags(ACK).payload(&vec![0x5a; mtu + 1 - headers]);
            let counts = [Drop(Reason::TunnelMtu), Event(E::Answered)];
            let expected = too_big(node, &long, mtu as u16);
            node.check("too long", node.entry, &long.bytes(), Action::Transmit, &expected, &counts);
            let words = if node.family == Family::V4 { 2 } else { 1 };
            let short = long.with(|frame| frame.options = vec![1; 4 * words]);
            let expected = too_big(node, &short, mtu as u16);
            node.check("with options", node.entry, &short.bytes(), Action::Transmit, &expected, &counts);
            let options = long.with(|frame| frame.options = vec![1; 12]);
            let counts = [Drop(Reason::TunnelMtu), Event(E::Unanswered)];
            let outcome = node.run(node.entry, &options.bytes());
            outcome.check("with more options", Action::Drop, &outcome.frame, &counts);
        }
    });
}

#[test]
fn fragments_go_to_the_same_node_by_tc_ingress() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        one_on(node, OTHER_NODE);
        let sent = node.opener(UDP, 40_000, VIP).payload(&[0xa5; 200]);
        let expected = sent.with(|frame| frame.ttl -= 1);
        for (number, (part, inner)) in fragments(&sent).iter().zip(fragments(&expected)).enumerate() {
            node.check("at XDP", node.entry, part, Action::Pass, part, &[]);
            let expected = around(node, &inner, inner.len() - ETHERNET, 0, NODE, OTHER_NODE);
            let opening = if number == 0 { &[Event(E::FlowNew)][..] } else { &[] };
            let mut counts = [&[Event(E::Fragment), Event(E::Tunnelled)], opening].concat();
            if number == 1 {
                counts.push(Event(E::FlowEstablished));
            }
            let name = format!("fragment {number}");
            node.check(&name, Hook::TcIngress, part, Action::Redirect, &expected, &counts);
        }
    });
}

#[test]
fn what_comes_from_another_node_is_taken_out_delivered_and_answered() {
    Node::each(|node| {
        answers_directly(node);
        one_local(node);
        for proto in TRANSPORTS {
            let opener = node.opener(proto, 40_000, VIP);
            let mut opening = vec![Event(E::FlowNew), SnatAttempt(0)];
            for form in [Vec::new(), vec![1; 8]] {
                let sent = opener.with(|frame| frame.options = form.clone());
                let delivered = marked(&sent).with(|frame| frame.dst = (LOCAL, TARGET));
                let counts = [&opening[..], &[Event(E::Untunnelled), Event(E::Delivered)]].concat();
                let name = format!("protocol {proto}");
                let frame = from_node(node, &sent);
                node.check(&name, node.entry, &frame, Action::Pass, &delivered.bytes(), &counts);
                opening.clear();
            }
            restored(node, "the answer", &opener, &answer(node, &opener, 40_000).flags(SYN | ACK));
        }
    });
}

#[test]
fn packets_to_a_node_port_go_to_the_node_of_their_backend_as_they_are() {
    Node::each(|node| {
        node_ports(node, |node, proto| node.backend_on(OTHER_NODE, REMOTE, proto));
        for proto in TRANSPORTS {
            let opener = node.opener(proto, 40_000, NODE);
            goes_by_tunnel(node, &opener, Action::Transmit, (node.mac, GATEWAY_MAC), NODE, OTHER_NODE);
        }
    });
}

#[test]
fn packets_to_a_node_port_that_can_go_no_further_are_not_left_to_the_kernel() {
    Node::each(|node| {
        node_ports(node, |node, proto| node.backend_on(OTHER_NODE, REMOTE, proto));
        for proto in TRANSPORTS {
            let opener = node.opener(proto, 40_000, NODE);
            goes_by_tunnel(node, &opener, Action::Transmit, (node.mac, GATEWAY_MAC), NODE, OTHER_NODE);
            let last = opener.flags(ACK).payload(b"and more").with(|frame| frame.ttl = 1);
            if proto == SCTP {
                let (sent, counts) = (last.bytes(), [Drop(Reason::TunnelWay)]);
                node.check("its last hop", node.entry, &sent, Action::Drop, &sent, &counts);
                continue;
            }
            let (expected, counts) = (too_far(node, &last), [Drop(Reason::TunnelHops), Event(E::Answered)]);
            node.check("its last hop", node.entry, &last.bytes(), Action::Transmit, &expected, &counts);
        }
    });
}

#[test]
fn node_ports_of_addresses_that_others_do_not_know_and_those_for_nodes_are_translated() {
    Node::each(|node| {
        node_ports(node, |node, proto| node.backend_on(OTHER_NODE, REMOTE, proto));
        let translated = |node: &mut Node, opener: &Frame| {
            let counts = [Event(E::FlowNew), SnatAttempt(0), Event(E::Transmitted)];
            let expected = opener.with(|frame| {
                frame.mac = (node.mac, GATEWAY_MAC);
                frame.ttl -= 1;
                (frame.src.0, frame.dst) = (NODE, (REMOTE, TARGET));
            });
            let (sent, expected) = (opener.bytes(), expected.bytes());
            node.check("translated", node.entry, &sent, Action::Transmit, &expected, &counts);
        };
        // Its packets would not be taken out of the tunnel.
        let of_node = node.opener(TCP, 2_000, NODE).with(|frame| frame.src.0 = OTHER_NODE);
        translated(node, &of_node);
        node.maps.network(network::SELF, NODE, 32, 0);
        let of_client = node.opener(TCP, 2_001, NODE);
        translated(node, &of_client);
    });
}

#[test]
fn what_comes_to_a_node_port_of_another_node_is_delivered_and_answered_in_its_name() {
    Node::each(|node| {
        node_ports(node, |node, proto| node.backend(LOCAL, proto, true));
        for proto in TRANSPORTS {
            let opener = node.opener(proto, 40_000, OTHER_NODE);
            let delivered = marked(&opener).with(|frame| frame.dst = (LOCAL, TARGET)).bytes();
            let frame = from_node(node, &opener);
            let counts = [Event(E::Untunnelled), Event(E::FlowNew), SnatAttempt(0), Event(E::Delivered)];
            node.check("an opener", node.entry, &frame, Action::Pass, &delivered, &counts);
            restored(node, "its answer", &opener, &answer(node, &opener, 40_000).flags(SYN | ACK));
            // Not through a tunnel, it is on its way to that node; and nothing is addressed to no address.
            for elsewhere in [OTHER_NODE, ANY_NODE] {
                let plain = node.opener(proto, 40_001, elsewhere).bytes();
                for hook in [node.entry, Hook::TcIngress] {
                    let outcome = node.run(hook, &plain);
                    assert_eq!((outcome.action, &outcome.frame), (Action::Pass, &plain), "{elsewhere:?}");
                }
            }
        }
        let closed = node.opener(TCP, 40_000, OTHER_NODE).with(|frame| frame.dst.1 = 81);
        let frame = from_node(node, &closed);
        node.check("no NodePort", node.entry, &frame, Action::Pass, &frame, &[]);
    });
}

/// The kernel would send them back to the node they have come from, which would send them on again.
#[test]
fn what_comes_to_a_node_port_of_another_node_and_is_nobodys_is_dropped() {
    Node::each(|node| {
        answers_directly(node);
        node.frontend(ANY_NODE, TCP, &[], frontend::NODE_PORT);
        let frame = from_node(node, &node.opener(TCP, 40_000, OTHER_NODE));
        let outcome = node.run(node.entry, &frame);
        let counts = [Event(E::Untunnelled), Drop(Reason::NoEndpoint)];
        outcome.check("no endpoint", Action::Drop, &outcome.frame, &counts);
        let closed = marked(&node.opener(UDP, 40_000, OTHER_NODE)).bytes();
        node.check("no NodePort", node.entry, &closed, Action::Drop, &closed, &[Drop(Reason::UnknownPort)]);
    });
}

#[test]
fn fragments_to_a_node_port_of_another_node_are_taken_out_and_delivered() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        node_ports(node, |node, proto| node.backend(LOCAL, proto, true));
        let sent = node.opener(UDP, 40_000, OTHER_NODE).payload(&[0xa5; 200]);
        let expected = sent.with(|frame| frame.dst = (LOCAL, TARGET));
        let parts =
            fragments(&sent).into_iter().zip(fragments(&marked(&sent))).zip(fragments(&marked(&expected)));
        for (number, ((part, taken_out), delivered)) in parts.enumerate() {
            let frame = around(node, &part, part.len() - ETHERNET, 0, OTHER_NODE, NODE);
            node.check("at XDP", node.entry, &frame, Action::Pass, &taken_out, &[Event(E::Untunnelled)]);
            let opening = if number == 0 { &[Event(E::FlowNew), SnatAttempt(0)][..] } else { &[] };
            let counts = [&[Event(E::Fragment), Event(E::Delivered)], opening].concat();
            node.check("at tc", Hook::TcIngress, &taken_out, Action::Pass, &delivered, &counts);
        }
    });
}

#[test]
fn what_has_no_backend_here_any_more_is_translated_and_goes_through_no_second_tunnel() {
    Node::each(|node| {
        one_on(node, OTHER_NODE);
        let opener = node.opener(TCP, 2_000, VIP);
        let seen = opener.with(|frame| {
            frame.mac = (node.mac, GATEWAY_MAC);
            frame.ttl -= 1;
            (frame.src, frame.dst) = ((NODE, 2_000), (REMOTE, TARGET));
        });
        let counts = [Event(E::Untunnelled), Event(E::FlowNew), SnatAttempt(0), Event(E::Transmitted)];
        let frame = from_node(node, &opener);
        node.check("an opener", node.entry, &frame, Action::Transmit, &seen.bytes(), &counts);
    });
}

#[test]
fn fragments_and_icmp_for_a_service_are_taken_out_for_those_who_know_them() {
    Node::each_of(Family::V4, Sizes::default(), |node| {
        answers_directly(node);
        one_local(node);
        let opener = node.opener(UDP, 40_000, VIP).payload(&[0xa5; 200]);
        let untunnelled = [Event(E::Untunnelled)];
        let (plain, taken_out) = (fragments(&opener), fragments(&marked(&opener)));
        for (part, expected) in plain.iter().zip(&taken_out) {
            let frame = around(node, part, part.len() - ETHERNET, 0, OTHER_NODE, NODE);
            node.check("a fragment", node.entry, &frame, Action::Pass, expected, &untunnelled);
        }
        // An echo request has been answered where it came in; its sender's station is not known here.
        let mut echo = node.opener(UDP, 0, VIP).payload(&[0; 8]).bytes();
        echo[ETHERNET + 9] = 1;
        echo[ETHERNET + 10..][..2].fill(0);
        let check = !words_sum(&echo[ETHERNET..][..20]);
        echo[ETHERNET + 10..][..2].copy_from_slice(&check.to_be_bytes());
        echo[ETHERNET + 20..].fill(0);
        echo[ETHERNET + 20] = 8;
        let check = !words_sum(&echo[ETHERNET + 20..]);
        echo[ETHERNET + 22..][..2].copy_from_slice(&check.to_be_bytes());
        let frame = around(node, &echo, echo.len() - ETHERNET, 0, OTHER_NODE, NODE);
        let mut inner = echo;
        inner[6..12].copy_from_slice(&MARK);
        node.check("an echo request", node.entry, &frame, Action::Pass, &inner, &untunnelled);
    });
}

#[test]
fn packets_in_packets_of_anybody_else_are_not_touched() {
    Node::each(|node| {
        answers_directly(node);
        one_local(node);
        let opener = node.opener(TCP, 40_000, VIP);
        let (sent, len) = (opener.bytes(), opener.total_len());
        let elsewhere = node.opener(TCP, 40_000, [10, 244, 1, 9]);
        let stranger = opener.with(|frame| frame.mac.1 = [2, 9, 9, 9, 9, 9]);
        let own = from_node(node, &opener);
        let broken = |at: usize, byte: u8| {
            let mut frame = own.clone();
            frame[at] = byte;
            frame
        };
        let inner = ETHERNET + node.family.header_len();
        let inside = node.opener(TCP, 40_000, VIP).with(|frame| frame.src.0 = OTHER_NODE);
        let frames = [
            ("of a node, not of a client", from_node(node, &inside)),
            ("from no node of ours", around(node, &sent, len, 0, CLIENT, NODE)),
            ("to another address of this node", around(node, &sent, len, 0, OTHER_NODE, NODE_TOO)),
            ("to no service", from_node(node, &elsewhere)),
            ("for another station", from_node(node, &stranger)),
            ("of another version inside", broken(inner, 0x55)),
            ("cut short", own[..own.len() - 4].to_vec()),
        ];
        for (name, frame) in &frames {
            for hook in [node.entry, Hook::TcIngress] {
                node.check(name, hook, frame, Action::Pass, frame, &[]);
            }
        }
        node.configure(|config| config.direct = 0);
        node.check("where nothing is direct", node.entry, &own, Action::Pass, &own, &[]);
    });
}
