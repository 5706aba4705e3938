//! Flows to backends elsewhere: both addresses change, and the answer finds its way back.

use xdp_common::{
    net::{SCTP, TCP, UDP},
    tables::{Device, device},
    verdict::{Counter::Event, Event as E},
};

use crate::{family::Family, frames::*, node::*};

/// A frontend with one backend elsewhere, for TCP and for UDP.
pub(crate) fn one_remote(node: &mut Node) {
    for proto in [TCP, UDP, SCTP] {
        let id = node.backend(REMOTE, proto, false);
        node.frontend(VIP, proto, &[id], 0);
        node.frontend(VIP_TOO, proto, &[id], 0);
    }
}

#[test]
fn a_flow_is_opened_answered_and_established_by_its_third_packet() {
    Node::each(|node| {
        one_remote(node);
        for proto in [TCP, UDP, SCTP] {
            let name = format!("protocol {proto}");
            let before = node.maps.established_entries();
            let flow = node.open(&name, &node.opener(proto, 40_000, VIP), REMOTE);
            flow.sends(node, "the opener once more", SYN, &[]);
            flow.answers(node, "the answer", SYN | ACK, &[]);
            flow.answers(node, "the answer once more", SYN | ACK, &[]);
            assert_eq!(node.maps.established_entries(), before, "{name}: answers alone establish nothing");
            flow.sends(node, "the handshake's end", ACK, &[Event(E::FlowEstablished)]);
            assert_eq!(node.maps.established_entries(), before + 2, "{name}");
            for _ in 0..3 {
                flow.sends(node, "data", ACK, &[]);
                flow.answers(node, "data of the backend", ACK, &[]);
            }
        }
    });
}

#[test]
fn a_client_port_within_the_range_is_kept() {
    Node::each(|node| {
        one_remote(node);
        for port in [SNAT_PORTS.0, 2_000, SNAT_PORTS.1] {
            let flow = node.connect("its own port", &node.opener(TCP, port, VIP), REMOTE);
            assert_eq!(flow.seen.src, (NODE, port));
        }
    });
}

#[test]
fn cluster_ips_node_ports_and_external_ips_are_frontends_alike() {
    Node::each(|node| {
        let id = node.backend(REMOTE, TCP, false);
        for (name, vip) in [
            ("ClusterIP", [10, 96, 0, 10]),
            ("NodePort", NODE),
            ("NodePort on another address", NODE_TOO),
            ("external IP", VIP),
        ] {
            node.frontend(vip, TCP, &[id], 0);
            let flow = node.connect(name, &node.opener(TCP, 40_000, vip), REMOTE);
            flow.answers(node, name, ACK, &[]);
        }
    });
}

#[test]
fn packets_of_every_form_are_translated_and_otherwise_kept() {
    Node::each(|node| {
        one_remote(node);
        for proto in [TCP, UDP, SCTP] {
            let flow = node.connect("a flow", &node.opener(proto, 40_000, VIP), REMOTE);
            let room = 1500 - node.family.header_len() - l4_header_len(proto);
            let forms: [Form; 9] = [
                ("an odd payload", &|frame| frame.payload = b"odd".to_vec()),
                ("a payload of the MTU", &|frame| frame.payload = vec![0xa5; room]),
                ("padding behind the packet", &|frame| frame.padding = vec![0xee; 6]),
                ("much behind the packet", &|frame| frame.padding = vec![0xee; 333]),
                ("one word of IP options", &|frame| frame.options = vec![1, 1, 1, 0]),
                ("ten words of IP options", &|frame| frame.options = vec![1; 40]),
                ("a type of service", &|frame| frame.tos = 0xb8),
                ("two hops to live", &|frame| frame.ttl = 2),
                ("255 hops to live", &|frame| frame.ttl = 255),
            ];
            for (name, form) in forms {
                let name = format!("protocol {proto}, {name}");
                flow.forwards(node, &name, &flow.opener.flags(ACK).with(form), &[]);
                flow.returns(node, &name, &flow.answer(node).flags(ACK).with(form), &[]);
            }
        }
    });
}

#[test]
fn a_new_flow_may_begin_with_any_form() {
    Node::each(|node| {
        one_remote(node);
        let plain = node.opener(TCP, 40_000, VIP);
        node.open("with options", &plain.with(|frame| frame.options = vec![1; 12]), REMOTE);
        let mid_stream = node.opener(TCP, 40_001, VIP).flags(ACK).payload(b"data of a flow of another node");
        node.open("in its midst", &mid_stream, REMOTE);
        let padded = node.opener(UDP, 40_002, VIP).with(|frame| frame.padding = vec![0; 18]);
        node.open("with padding", &padded, REMOTE);
    });
}

#[test]
fn a_backend_behind_another_interface_is_reached_by_redirect() {
    Node::each(|node| {
        let id = node.backend(BESIDE, TCP, false);
        node.frontend(VIP, TCP, &[id], 0);
        let flow = node.open_by("redirect", &node.opener(TCP, 40_000, VIP), BESIDE, node.beside(), 0);
        let (uplink, beside) = (node.ifindex, node.ifindex_too);
        node.from = beside;
        flow.answers(node, "the answer", SYN | ACK, &[]);
        node.from = uplink;
        flow.sends(node, "the handshake's end", ACK, &[Event(E::FlowEstablished)]);
        flow.sends(node, "data", ACK, &[]);
        node.from = beside;
        flow.answers(node, "data of the backend", ACK, &[]);
    });
}

#[test]
fn one_client_port_reaches_one_backend_by_two_frontends() {
    Node::each(|node| {
        one_remote(node);
        for proto in [TCP, UDP, SCTP] {
            let first = node.connect("the first", &node.opener(proto, 2_000, VIP), REMOTE);
            let opener = node.opener(proto, 2_000, VIP_TOO);
            let second = node.open_by("the second", &opener, REMOTE, node.uplink(), 1);
            node.establish("the second", &second);
            assert_ne!(first.seen.src, second.seen.src);
            for flow in [&first, &second] {
                flow.answers(node, "each answer goes to its own frontend", ACK, &[]);
                flow.sends(node, "each flow goes on", ACK, &[]);
            }
        }
    });
}

#[test]
fn a_next_hop_that_moves_is_followed_with_the_routing_epoch() {
    Node::each(|node| {
        one_remote(node);
        let flow = node.connect("a flow", &node.opener(TCP, 40_000, VIP), REMOTE);
        flow.answers(node, "an answer", ACK, &[]);
        let moved = [2, 0, 0, 0, 0, 0x77];
        node.namespace
            .static_neighbour("eth0", node.family.ip(GATEWAY), moved)
            .expect("a neighbour can be replaced");
        node.raise_epoch();
        let sent = flow.opener.flags(ACK).bytes();
        let expected = flow.seen.flags(ACK).with(|frame| frame.mac.1 = moved).bytes();
        for refreshed in [true, false] {
            let outcome =
                node.check("data", node.entry, &sent, Action::Transmit, &expected, &[Event(E::Transmitted)]);
            // The second may be refreshed by the kernel's clock as well.
            assert!(outcome.refreshed || !refreshed, "the next hop is asked for again");
        }
        let sent = flow.answer(node).flags(ACK);
        let expected = sent.with(|frame| {
            frame.mac = (node.mac, moved);
            frame.ttl -= 1;
            (frame.src, frame.dst) = (flow.opener.dst, flow.opener.src);
        });
        let outcome = node.check(
            "an answer",
            node.entry,
            &sent.bytes(),
            Action::Transmit,
            &expected.bytes(),
            &[Event(E::Transmitted)],
        );
        assert!(outcome.refreshed);
    });
}

/// The clock of the last packet of each direction of the one flow there is, client's first.
fn clocks(node: &Node) -> [u32; 2] {
    let mut clocks = node.maps.clocks();
    clocks.sort();
    [clocks[0].1, clocks[1].1]
}

#[test]
fn an_entry_keeps_the_clock_of_its_last_packet() {
    Node::each(|node| {
        one_remote(node);
        let flow = node.connect("a flow", &node.opener(TCP, 40_000, VIP), REMOTE);
        flow.answers(node, "an answer", ACK, &[]);
        assert_eq!(clocks(node), [100, 100]);
        node.configure(|config| config.clock = 250);
        flow.sends(node, "later", ACK, &[]);
        assert_eq!(clocks(node), [250, 100]);
        flow.answers(node, "later", ACK, &[]);
        assert_eq!(clocks(node), [250, 250]);
    });
}

#[test]
fn a_packet_that_meets_a_stale_next_hop_keeps_its_flow_alive() {
    Node::each(|node| {
        one_remote(node);
        let flow = node.connect("a flow", &node.opener(UDP, 40_000, VIP), REMOTE);
        flow.answers(node, "an answer", ACK, &[]);
        node.configure(|config| (config.clock, config.epoch) = (250, config.epoch + 1));
        flow.sends(node, "later", ACK, &[]);
        assert_eq!(clocks(node), [250, 100], "the client's");
        flow.answers(node, "later", ACK, &[]);
        assert_eq!(clocks(node), [250, 250], "the backend's");
    });
}

#[test]
fn long_frames_in_several_buffers_are_forwarded_like_others() {
    for family in Family::ALL {
        let mut node = Node::new(family, Hook::XdpFrags, Sizes::default());
        one_remote(&mut node);
        node.namespace.mtu("eth0", 9_000).expect("veth takes long frames");
        let uplink = Device { snat: NODE, flags: CAPABLE, mtu: 9_000, mac: node.mac, zero: [0; 2] };
        node.device(node.ifindex, uplink);
        for proto in [TCP, UDP, SCTP] {
            let flow = node.connect("a flow", &node.opener(proto, 40_000, VIP), REMOTE);
            // What fits into one page besides headroom and tailroom, and what does not.
            for len in [3_000, 4_000, 8_000] {
                let long = |frame: &Frame| frame.flags(ACK).payload(&vec![0x5a; len]);
                let name = format!("{family:?}, protocol {proto}, {len} bytes");
                flow.forwards(&node, &name, &long(&flow.opener), &[]);
                flow.returns(&node, &name, &long(&flow.answer(&node)), &[]);
            }
        }
    }
}

#[test]
fn an_interface_in_generic_mode_redirects_to_every_ethernet_device() {
    Node::each(|node| {
        let id = node.backend(BESIDE, UDP, false);
        node.frontend(VIP, UDP, &[id], 0);
        let uplink =
            Device { snat: NODE, flags: CAPABLE | device::GENERIC, mtu: 1500, mac: node.mac, zero: [0; 2] };
        let other = Device {
            snat: NODE_TOO,
            flags: device::ETHERNET,
            mtu: MTU_TOO.into(),
            mac: node.mac_too,
            zero: [0; 2],
        };
        node.device(node.ifindex, uplink);
        node.device(node.ifindex_too, other);
        node.open_by("generic", &node.opener(UDP, 40_000, VIP), BESIDE, node.beside(), 0);
    });
}
