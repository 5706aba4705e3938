//! Errors about packets to another node, told to the clients whose packets are in those.

use xdp_common::{
    net::{SCTP, TCP, UDP},
    tables::{Device, frontend},
    verdict::{Counter, Event},
};

use crate::{
    answers::{no_host, too_big},
    errors::Icmp,
    family::Family,
    frames::*,
    node::*,
    tunnel::{node_ports, one_on, sent_on},
};

/// A router between the nodes.
const ROUTER: Addr = [10, 244, 0, 1];
const RELATED: [Counter; 1] = [Counter::Event(Event::Related)];

/// "Fragmentation needed", or "packet too big"; and what says that a packet has not arrived (RFC 792, RFC 4443).
fn kinds(family: Family) -> ([u8; 2], [[u8; 2]; 3]) {
    match family {
        Family::V4 => ([3, 4], [[3, 1], [3, 13], [11, 0]]),
        Family::V6 => ([2, 0], [[1, 0], [1, 3], [3, 0]]),
    }
}

/// What a router says of the packet around a client's, which it quotes up to some bytes behind that one's IP header.
fn error(node: &Node, around: &[u8], kind: [u8; 2], mtu: u16, quoted: usize) -> Icmp {
    let [high, low] = mtu.to_be_bytes();
    let quote = &around[ETHERNET..][..2 * node.family.header_len() + quoted];
    Icmp {
        mac: (GATEWAY_MAC, node.mac),
        from: node.family.octets(ROUTER),
        to: node.family.octets(NODE),
        ttl: 61,
        options: 0,
        kind,
        body: [&[0, 0, high, low], quote].concat(),
    }
}

/// A client's packet that goes to another node: as it is inside, and the frame of the packet around it.
fn sent(node: &Node, opener: &Frame) -> (Frame, Vec<u8>) {
    let around = sent_on(node, opener, (node.mac, GATEWAY_MAC), NODE, OTHER_NODE);
    (opener.with(|frame| frame.ttl -= 1), around)
}

/// A flow through a tunnel, with a packet of it that has gone.
fn flow(node: &Node, proto: u8, to: Addr) -> (Frame, Vec<u8>) {
    let opener = node.opener(proto, 40_000, to).payload(&[0x5a; 200]);
    let (inside, around) = sent(node, &opener);
    let outcome = node.run(node.entry, &opener.bytes());
    assert_eq!((outcome.action, &outcome.frame), (Action::Transmit, &around), "protocol {proto} by tunnel");
    (inside, around)
}

#[test]
fn clients_are_told_how_long_their_packets_may_be_on_the_way_to_another_node() {
    Node::each(|node| {
        one_on(node, OTHER_NODE);
        let (big, _) = kinds(node.family);
        let around = node.family.header_len() as u16;
        let least = if node.family == Family::V4 { 552 } else { 1280 };
        for proto in [TCP, UDP, SCTP] {
            let (inside, sent) = flow(node, proto, VIP);
            for (mtu, told) in [(1400, 1400 - around), (0, least), (least, least), (9000, 9000 - around)] {
                let said = error(node, &sent, big, mtu, 28).bytes();
                let expected = too_big(node, &inside, told);
                node.check(&format!("{mtu} bytes"), node.entry, &said, Action::Transmit, &expected, &RELATED);
            }
        }
    });
}

#[test]
fn clients_are_told_that_their_packets_do_not_get_to_another_node() {
    Node::each(|node| {
        one_on(node, OTHER_NODE);
        for proto in [TCP, UDP, SCTP] {
            let (inside, sent) = flow(node, proto, VIP);
            for kind in kinds(node.family).1 {
                let said = error(node, &sent, kind, 0, 16).bytes();
                let expected = no_host(node, &inside);
                node.check(&format!("{kind:?}"), node.entry, &said, Action::Transmit, &expected, &RELATED);
            }
        }
    });
}

#[test]
fn what_xdp_cannot_send_goes_by_the_kernel_unless_it_is_of_the_nodes_own_address() {
    Node::each(|node| {
        one_on(node, OTHER_NODE);
        let (big, _) = kinds(node.family);
        let (inside, service) = flow(node, TCP, VIP);
        node_ports(node, |node, proto| node.backend_on(OTHER_NODE, REMOTE, proto));
        let (_, node_port) = flow(node, TCP, NODE);
        let device = Device { snat: NODE, flags: 0, mtu: 1500, mac: node.mac, zero: [0; 2] };
        node.maps.device(node.ifindex, device);
        let said = error(node, &service, big, 1400, 28).bytes();
        let mut expected = too_big(node, &inside, 1400 - node.family.header_len() as u16);
        expected[..12].copy_from_slice(&said[..12]);
        node.check("of a service's", node.entry, &said, Action::Pass, &expected, &RELATED);
        let said = error(node, &node_port, big, 1400, 28).bytes();
        node.check("of the node's", node.entry, &said, Action::Pass, &said, &[]);
    });
}

#[test]
fn errors_about_packets_of_anybody_else_are_not_touched() {
    Node::each(|node| {
        one_on(node, OTHER_NODE);
        let ours = node.backend(LOCAL, TCP, true);
        node.frontend(VIP_TOO, TCP, &[ours], frontend::MASQUERADE_EXTERNAL);
        let (big, _) = kinds(node.family);
        let (_, around) = flow(node, TCP, VIP);
        let good = error(node, &around, big, 1400, 28);
        let quoting = |frame: &Frame, from: Addr, to: Addr| {
            let around = sent_on(node, frame, (node.mac, GATEWAY_MAC), from, to);
            Icmp { to: node.family.octets(from), ..error(node, &around, big, 1400, 28) }
        };
        let opener = node.opener(TCP, 40_000, VIP).payload(&[0x5a; 200]);
        let local = node.opener(TCP, 40_000, VIP_TOO).payload(&[0x5a; 200]);
        let _ = node.run(node.entry, &local.bytes());
        let options = if node.family == Family::V4 { 4 } else { 8 };
        let forms = [
            ("a short quote", error(node, &around, big, 1400, 15)),
            ("another flow", quoting(&opener.with(|frame| frame.src.1 += 1), NODE, OTHER_NODE)),
            ("a flow of this node", quoting(&local, NODE, OTHER_NODE)),
            ("another node", quoting(&opener, NODE, REMOTE)),
            ("another address of this node", quoting(&opener, NODE_TOO, OTHER_NODE)),
            ("addressed to somebody else", Icmp { to: node.family.octets(NODE_TOO), ..good.clone() }),
            ("for another station", Icmp { mac: (GATEWAY_MAC, [2, 9, 9, 9, 9, 9]), ..good.clone() }),
            ("with options", Icmp { options, ..good.clone() }),
            ("no error", Icmp { kind: [0, 0], ..good.clone() }),
        ];
        for (name, said) in forms {
            let said = said.bytes();
            node.check(name, node.entry, &said, Action::Pass, &said, &[]);
        }
        assert_eq!(node.run(node.entry, &good.bytes()).action, Action::Transmit, "the one that is");
    });
}
