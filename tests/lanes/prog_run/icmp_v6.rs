//! ICMPv6 about flows: the errors of `icmp.rs` over IPv6, of flows that the programs themselves have made.

use std::net::Ipv6Addr;

use aya::maps::{Array, HashMap, MapData};
use xdp_agent_tests::lab::{link, netns::Namespace};
use xdp_common::{
    gate,
    net::{Ip6, TCP, UDP, V4},
    tables::{self, Backend, Config, Device, Frontend, FrontendKey, backend, frontend},
    verdict::{
        Counter::{self, Event},
        Event as E,
    },
};

use crate::{
    frames::{Mac, folded},
    maps::{self, Maps as _, Raw, Typed},
    node::{Action, CAPABLE, GATEWAY_MAC, HTTP, Hook, Sizes, TARGET, settings},
    programs::Programs,
};

const ICMP: u8 = 58;
const CLIENT: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2);
const VIP: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
const NODE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 5, 0, 0, 0, 0, 0x10);
const GATEWAY: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 5, 0, 0, 0, 0, 1);
const REMOTE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2);
const LOCAL: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 3, 0, 0, 0, 0, 2);
const ROUTER: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 9);
const ETHERNET: usize = 14;
const HEADERS: usize = ETHERNET + 40;
/// Unreachable, packet too big, time exceeded, parameter problem.
const KINDS: [[u8; 2]; 4] = [[1, 4], [2, 0], [3, 0], [4, 0]];
const TRANSLATED: [Counter; 1] = [Event(E::Related)];

/// A packet of a family that the rest of the lane does not build.
#[derive(Clone)]
struct Packet {
    mac: (Mac, Mac),
    src: Ipv6Addr,
    dst: Ipv6Addr,
    proto: u8,
    hops: u8,
    /// Whether options of the destination stand before what it carries.
    has_options: bool,
    /// Header and payload, its checksum zero.
    body: Vec<u8>,
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let at = match self.proto {
            TCP => 16,
            UDP => 6,
            _ => 2,
        };
        let mut body = self.body.clone();
        let pseudo = [&self.src.octets()[..], &self.dst.octets(), &[0, self.proto]].concat();
        let words = |bytes: &[u8]| -> u32 {
            bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0))).sum()
        };
        let check = !folded(words(&pseudo) + body.len() as u32 + words(&body));
        body[at..at + 2].copy_from_slice(&check.to_be_bytes());
        let (next, options) = if self.has_options {
            (60, vec![self.proto, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        } else {
            (self.proto, Vec::new())
        };
        let len = ((options.len() + body.len()) as u16).to_be_bytes();
        let header = [0x60, 0, 0, 0, len[0], len[1], next, self.hops];
        let ethernet = [&self.mac.1[..], &self.mac.0, &[0x86, 0xdd]].concat();
        [&ethernet, &header[..], &self.src.octets(), &self.dst.octets(), &options, &body].concat()
    }

    fn with(&self, edit: impl FnOnce(&mut Self)) -> Self {
        let mut copy = self.clone();
        edit(&mut copy);
        copy
    }

    fn ports(&self) -> (u16, u16) {
        let port = |at: usize| u16::from_be_bytes([self.body[at], self.body[at + 1]]);
        (port(0), port(2))
    }

    /// The same between other ends.
    fn between(&self, src: (Ipv6Addr, u16), dst: (Ipv6Addr, u16)) -> Self {
        self.with(|packet| {
            (packet.src, packet.dst) = (src.0, dst.0);
            packet.body[..2].copy_from_slice(&src.1.to_be_bytes());
            packet.body[2..4].copy_from_slice(&dst.1.to_be_bytes());
        })
    }

    fn reversed(&self) -> Self {
        let (sport, dport) = self.ports();
        self.between((self.dst, dport), (self.src, sport))
    }
}

/// Backends, gates, rings.
type Rest = (Array<MapData, Raw<Backend<Ip6>>>, [Array<MapData, u64>; 2], Array<MapData, u32>);

struct Node {
    maps: Typed<V4>,
    devices: HashMap<MapData, u32, Raw<Device<Ip6>>>,
    frontends: HashMap<MapData, Raw<FrontendKey<Ip6>>, Raw<Frontend>>,
    config: Config,
    programs: Programs,
    namespace: Namespace,
    ifindex: u32,
    mac: Mac,
    entry: Hook,
    /// Maps that only the programs read from here on; they are loaded when they are first run.
    _rest: Rest,
    _peer: Namespace,
}

fn ip6(addr: Ipv6Addr) -> Ip6 {
    addr.octets().into()
}

impl Node {
    /// Runs a test on a node whose service has one backend, for each of the two XDP programs.
    fn each(backend: Ipv6Addr, test: impl Fn(&mut Self, u8)) {
        for entry in [Hook::Xdp, Hook::XdpFrags] {
            for proto in [TCP, UDP] {
                test(&mut Self::new(entry, backend, proto), proto);
            }
        }
    }

    fn new(entry: Hook, backend: Ipv6Addr, proto: u8) -> Self {
        let (namespace, peer) = network().expect("a namespace with an interface");
        let ifindex = namespace.index("eth0").expect("a device that was just made");
        let mac = namespace.mac("eth0").expect("an Ethernet device has an address");
        let sizes = Sizes::default();
        let mut programs = Programs::open(sizes);
        let object = programs.object();
        let mut devices: HashMap<_, u32, Raw<Device<Ip6>>> = maps::map(object, &tables::DEVICES_V6);
        let mut frontends: HashMap<_, _, _> = maps::map(object, &tables::FRONTENDS_V6);
        let mut backends: Array<_, Raw<Backend<Ip6>>> = maps::map(object, &tables::BACKENDS_V6);
        let mut rings: Array<_, u32> = maps::map(object, &tables::RINGS_V6);
        let mut ingress: Array<_, u64> = maps::map(object, &tables::GATE_INGRESS_V6);
        let mut egress: Array<_, u64> = maps::map(object, &tables::GATE_EGRESS_V6);
        let mut maps = Typed::<V4>::of(object);
        maps.config.set(0, Raw(settings(sizes)), 0).expect("the one slot of the settings");
        let device = Device { snat: ip6(NODE), flags: CAPABLE, mtu: 1500, mac, zero: [0; 2] };
        devices.insert(ifindex, Raw(device), 0).expect("room for a device");
        let (http, target) = (HTTP.to_be_bytes(), TARGET.to_be_bytes());
        let flags = backend::IN_CLUSTER_LIST | if backend == LOCAL { backend::LOCAL } else { 0 };
        let node = Ip6::default();
        let value =
            Backend { addr: ip6(backend), port: target, proto, flags, generation: 1, service: 1, node };
        backends.set(1, Raw(value), 0).expect("room for a backend");
        rings.set(0, 1, 0).expect("room for a slot of a ring");
        let value = Frontend {
            service: 1,
            ring: 0,
            slots: 1,
            inner_ring: 0,
            inner_slots: 1,
            flags: frontend::MASQUERADE_EXTERNAL,
            affinity_seconds: 0,
        };
        let key = FrontendKey { addr: ip6(VIP), port: http, proto, zero: 0 };
        frontends.insert(Raw(key), Raw(value), 0).expect("room for a frontend");
        maps::open(&mut ingress, gate::frontend_bit(ip6(VIP), http, proto));
        maps::open(&mut ingress, gate::frontend_bit(ip6(VIP), [0; 2], 0));
        maps::open(&mut ingress, gate::snat_bit(ip6(NODE)));
        maps::open(&mut egress, gate::backend_source_bit(ip6(backend), target, proto));
        maps::open(&mut egress, gate::backend_destination_bit(ip6(backend), target, proto));
        let _rest = (backends, [ingress, egress], rings);
        Self {
            maps,
            devices,
            frontends,
            config: settings(sizes),
            programs,
            namespace,
            ifindex,
            mac,
            entry,
            _rest,
            _peer: peer,
        }
    }

    fn opener(&self, proto: u8) -> Packet {
        let mut body = vec![0; if proto == TCP { 20 } else { 8 }];
        if proto == TCP {
            (body[12], body[13]) = (5 << 4, 2);
        } else {
            body[5] = 8 + 14;
        }
        body.extend(b"what is quoted");
        let mac = (GATEWAY_MAC, self.mac);
        let packet = Packet { mac, src: CLIENT, dst: VIP, proto, hops: 64, has_options: false, body };
        packet.between((CLIENT, 20_000), (VIP, HTTP))
    }

    /// Runs a frame through a program and says what it counted.
    fn run(&self, hook: Hook, frame: &[u8]) -> (Action, Vec<u8>, Vec<u64>) {
        let before = self.maps.counts();
        let mut context = match hook {
            Hook::Xdp | Hook::XdpFrags => vec![0u8; 24],
            Hook::TcIngress | Hook::TcEgress => vec![0u8; 192],
        };
        // `ingress_ifindex` of `struct xdp_md`, after `data_end`; `ifindex` of `struct __sk_buff`.
        let at = if context.len() == 24 { 12 } else { 40 };
        if at == 12 {
            context[4..8].copy_from_slice(&(frame.len() as u32).to_ne_bytes());
        }
        context[at..at + 4].copy_from_slice(&self.ifindex.to_ne_bytes());
        let run = self.programs.run(hook, &self.namespace, frame, &context);
        let (action, out) = run.unwrap_or_else(|error| panic!("{hook:?}: {error}"));
        let counts = self.maps.counts().iter().zip(&before).map(|(after, before)| after - before).collect();
        (action, out, counts)
    }

    /// Compares everything that comes out with what is expected.
    fn check(
        &self,
        name: &str,
        hook: Hook,
        sent: &Packet,
        action: Action,
        expected: &Packet,
        counts: &[Counter],
    ) {
        let (found, frame, raised) = self.run(hook, &sent.bytes());
        let named = |index: u32| maps::name(index);
        // The kernel's clock refreshes next hops too.
        let by_clock = Event(E::HopRefreshed).index();
        let raised = (0..).zip(raised).filter(|(index, times)| *times != 0 && *index != by_clock);
        let raised: Vec<String> = raised.map(|(index, _)| named(index)).collect();
        let counts: Vec<String> = counts.iter().map(|counter| named(counter.index())).collect();
        assert_eq!((found, raised), (action, counts), "{name} at {hook:?}");
        assert!(frame == expected.bytes(), "{name} at {hook:?}: {frame:02x?}, not {:02x?}", expected.bytes());
    }

    /// An error from the gateway about a packet, which is quoted up to some bytes behind its IP header.
    fn error(&self, from: Ipv6Addr, about: &Packet, kind: [u8; 2], quoted: usize) -> Packet {
        let bytes = about.bytes();
        let options = if about.has_options { 16 } else { 0 };
        let quote = &bytes[ETHERNET..(HEADERS + options + quoted).min(bytes.len())];
        let body = [&kind[..], &[0, 0, 0, 0, 5, 0x14], quote].concat();
        let mac = (GATEWAY_MAC, self.mac);
        Packet { mac, src: from, dst: about.src, proto: ICMP, hops: 61, has_options: false, body }
    }

    /// The same as the node sends it on by the gateway.
    fn forwarded(&self, packet: &Packet) -> Packet {
        packet.with(|packet| {
            packet.mac = (self.mac, GATEWAY_MAC);
            packet.hops -= 1;
        })
    }
}

/// The uplink with its gateway.
fn network() -> anyhow::Result<(Namespace, Namespace)> {
    let (node, peer) = (Namespace::new("prog-node6")?, Namespace::new("prog-peer6")?);
    node.sysctl("net/ipv6/conf/all/disable_ipv6", "0")?;
    node.sysctl("net/ipv6/conf/default/disable_ipv6", "0")?;
    link::veth(&node, "eth0", &peer, "eth0")?;
    node.address("eth0", NODE, 64)?;
    node.static_neighbour_v6("eth0", GATEWAY, GATEWAY_MAC)?;
    node.default_route_v6(GATEWAY)?;
    node.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    Ok((node, peer))
}

/// A flow to a backend elsewhere that both ends have spoken on: the client's packet, and what the backend sees of it.
fn established(node: &Node, proto: u8) -> (Packet, Packet) {
    let opener = node.opener(proto);
    let (action, frame, _) = node.run(node.entry, &opener.bytes());
    assert_eq!(action, Action::Transmit);
    let port = u16::from_be_bytes([frame[HEADERS], frame[HEADERS + 1]]);
    let seen = node.forwarded(&opener).between((NODE, port), (REMOTE, TARGET));
    assert_eq!(frame, seen.bytes());
    let as_next = |packet: &Packet| {
        packet.with(|packet| {
            if proto == TCP {
                packet.body[13] = 0x10;
            }
        })
    };
    let (opener, seen) = (as_next(&opener), as_next(&seen));
    let answer = seen.reversed().with(|packet| packet.mac = (GATEWAY_MAC, node.mac));
    assert_eq!(node.run(node.entry, &answer.bytes()).0, Action::Transmit);
    assert_eq!(node.run(node.entry, &opener.bytes()).1, seen.bytes());
    (opener, seen)
}

#[test]
fn errors_about_a_flow_to_elsewhere_reach_both_ends() {
    Node::each(REMOTE, |node, proto| {
        let (opener, seen) = established(node, proto);
        let about = opener.with(|packet| packet.hops = seen.hops);
        let (answer, restored) = (seen.reversed(), opener.reversed().with(|packet| packet.hops = seen.hops));
        for (kind, quoted) in KINDS.into_iter().flat_map(|kind| [8, 20, 1_200].map(|quoted| (kind, quoted))) {
            for has_options in [false, true] {
                let with = |packet: &Packet| packet.with(|packet| packet.has_options = has_options);
                let cases = [
                    ("a router behind", ROUTER, &seen, &about, VIP),
                    ("the backend", REMOTE, &seen, &about, VIP),
                    ("a router before", ROUTER, &restored, &answer, NODE),
                    ("the client", CLIENT, &restored, &answer, NODE),
                ];
                for (name, from, quote, translated, source) in cases {
                    // The name of a hop that traceroute asks for stays.
                    let is_hop = kind[0] == 3 && name == "a router behind";
                    let source = if is_hop { from } else { source };
                    let sent = node.error(from, &with(quote), kind, quoted);
                    let expected = node.forwarded(&node.error(source, &with(translated), kind, quoted));
                    let name = format!("protocol {proto}, {kind:?} of {name}, {quoted} bytes");
                    node.check(&name, node.entry, &sent, Action::Transmit, &expected, &TRANSLATED);
                }
            }
        }
        let stranger = seen.between((NODE, seen.ports().0 ^ 1), (REMOTE, TARGET));
        let sent = node.error(ROUTER, &stranger, [2, 0], 8);
        node.check("another flow", node.entry, &sent, Action::Pass, &sent, &[]);
        for kind in [[0, 0], [5, 0], [129, 0], [135, 0], [137, 0]] {
            let sent = node.error(ROUTER, &seen, kind, 8);
            node.check(&format!("type {kind:?}"), node.entry, &sent, Action::Pass, &sent, &[]);
        }
    });
}

#[test]
fn errors_that_the_kernel_makes_or_sends_on_are_finished_at_egress() {
    Node::each(REMOTE, |node, proto| {
        let (opener, seen) = established(node, proto);
        let answer = seen.reversed().with(|packet| packet.mac = (GATEWAY_MAC, node.mac));
        for (sent, half) in [
            (opener.clone(), opener.between((CLIENT, seen.ports().0), (REMOTE, TARGET))),
            (answer.clone(), answer.between((REMOTE, TARGET), (CLIENT, seen.ports().0))),
        ] {
            let [sent, half] = [sent, half].map(|packet| packet.with(|packet| packet.hops = 1));
            let slow = [Event(E::SlowPath)];
            node.check("on its last hop", node.entry, &sent, Action::Pass, &half, &slow);
            for (kind, quoted) in [([3, 0], 8), ([2, 0], 1_200)] {
                let (said, expected) =
                    (node.error(NODE, &half, kind, quoted), node.error(NODE, &sent, kind, quoted));
                node.check("about a half", Hook::TcEgress, &said, Action::Pass, &expected, &TRANSLATED);
            }
        }
        let down = Device { snat: ip6(NODE), flags: 0, mtu: 1500, mac: node.mac, zero: [0; 2] };
        node.devices.insert(node.ifindex, Raw(down), 0).expect("a device that is there");
        node.config.epoch += 1;
        node.maps.config.set(0, Raw(node.config), 0).expect("the one slot of the settings");
        let cases = [(REMOTE, &seen, &opener, VIP), (ROUTER, &opener.reversed(), &answer, NODE)];
        for (from, quote, translated, source) in cases {
            let translated = translated.with(|packet| packet.hops = quote.hops);
            let sent = node.error(from, quote, [1, 4], 8);
            let up = node.error(from, &translated, [1, 4], 8);
            node.check("up", node.entry, &sent, Action::Pass, &up, &TRANSLATED);
            let out = up.with(|packet| packet.src = source);
            node.check("out", Hook::TcEgress, &up, Action::Pass, &out, &[Event(E::Finished)]);
            node.check("once is enough", Hook::TcEgress, &out, Action::Pass, &out, &[]);
        }
    });
}

#[test]
fn errors_to_and_from_a_backend_on_this_node_go_through_the_stack() {
    Node::each(LOCAL, |node, proto| {
        let opener = node.opener(proto);
        let inside = opener.between((CLIENT, 20_000), (LOCAL, TARGET));
        assert_eq!(node.run(node.entry, &opener.bytes()).1, inside.bytes());
        let (answer, outside) = (inside.reversed(), opener.reversed());
        assert_eq!(node.run(Hook::TcEgress, &answer.bytes()).1, outside.bytes());
        for (kind, quoted) in [([2, 0], 8), ([1, 4], 20), ([3, 0], 1_200)] {
            for from in [ROUTER, CLIENT] {
                let sent = node.error(from, &outside, kind, quoted);
                let expected = node.error(from, &answer, kind, quoted);
                node.check("to the backend", node.entry, &sent, Action::Pass, &expected, &TRANSLATED);
            }
            for (from, source) in [(LOCAL, VIP), (NODE, NODE), (ROUTER, ROUTER)] {
                let sent = node.error(from, &inside, kind, quoted);
                let expected = node.error(source, &opener, kind, quoted);
                node.check("to the client", Hook::TcEgress, &sent, Action::Pass, &expected, &TRANSLATED);
            }
        }
    });
}

#[test]
fn an_address_of_a_service_answers_echo_requests() {
    Node::each(REMOTE, |node, _| {
        let key = FrontendKey { addr: ip6(VIP), port: [0; 2], proto: 0, zero: 0 };
        let value = Frontend {
            service: 0,
            ring: 0,
            slots: 0,
            inner_ring: 0,
            inner_slots: 0,
            flags: frontend::ECHO,
            affinity_seconds: 0,
        };
        node.frontends.insert(Raw(key), Raw(value), 0).expect("room for an address");
        for data in [&b""[..], b"odd", &[1; 1_400]] {
            let body = [&[128, 0, 0, 0, 0, 7, 0, 1][..], data].concat();
            let mac = (GATEWAY_MAC, node.mac);
            let sent = Packet { mac, src: CLIENT, dst: VIP, proto: ICMP, hops: 9, has_options: false, body };
            let expected = sent.with(|packet| {
                packet.mac = (node.mac, GATEWAY_MAC);
                (packet.src, packet.dst, packet.hops) = (VIP, CLIENT, 64);
                packet.body[0] = 129;
            });
            let counts = [Event(E::EchoAnswered)];
            node.check("an echo", node.entry, &sent, Action::Transmit, &expected, &counts);
            let own = sent.with(|packet| packet.dst = NODE);
            node.check("the node's own", node.entry, &own, Action::Pass, &own, &[]);
        }
    });
}
