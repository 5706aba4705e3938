//! ICMP errors: whom they concern, and what they say there.

use xdp_common::{
    checksum,
    decide::{Hook, related},
    frame::{Packet, tcp},
    icmp::{Message, Translation},
    net::{TCP, UDP, V4},
    tables::{Backend, Config, Device, Frontend, Route, direct, frontend, network},
    verdict::{Action, Event, Hop, Reason},
};

use crate::model::*;

const ROUTER: Addr = [100, 64, 0, 1];
const OTHER_NODE: Addr = [192, 168, 70, 20];

/// An error about a packet, as a router or one of its ends sends it.
fn about(packet: &Packet<Addr>, from: Addr) -> Message<Addr> {
    let key = packet.key.reversed();
    Message {
        packet: Packet { key, ttl: 60, total_len: 56, ..*packet },
        from,
        ports_at: 62,
        check_at: 0,
        is_time_exceeded: false,
    }
}

/// What becomes of an error: the packet that it is about then, and who sends it.
fn sent(
    decide: impl FnOnce(&Message<Addr>, &mut Translation<Addr>) -> Action,
    message: &Message<Addr>,
) -> (Action, Key, Addr) {
    let quoted = message.packet.key.reversed();
    let mut out = Translation {
        source: [0; 4],
        quote: xdp_common::conntrack::rewrite_between(&quoted, &quoted),
        hop: Hop { dmac: [0; 6], smac: [0; 6], ifindex: 0 },
    };
    let action = decide(message, &mut out);
    if action == Action::Pass || action == Action::Tunnel {
        return (action, quoted, message.from);
    }
    let quote = out.quote;
    let after = Key { src: quote.src, dst: quote.dst, sport: quote.sport, dport: quote.dport, ..quoted };
    assert_eq!(quote.addr_delta, checksum::delta(quoted.addresses_sum(), after.addresses_sum()));
    assert_eq!(quote.port_delta() % 0xffff, checksum::delta(quoted.ports_sum(), after.ports_sum()) % 0xffff);
    (action, after, out.source)
}

fn comes(model: &Model, message: &Message<Addr>) -> (Action, Key, Addr) {
    sent(|message, out| related::ingress::<V4, _>(model, message, Hook::Xdp, out), message)
}

fn leaves(model: &Model, message: &Message<Addr>) -> (Action, Key, Addr) {
    sent(|message, out| related::egress::<V4, _>(model, message, out), message)
}

/// Through XDP and, where it goes up, through tc egress; as the packets of the flow do.
fn passes(model: &Model, message: &Message<Addr>) -> (Key, Addr) {
    let (action, quoted, source) = comes(model, message);
    match action {
        Action::Transmit | Action::Redirect => (quoted, source),
        Action::Stack | Action::Pass => {
            let packet = Packet { key: quoted, ..message.packet };
            let up = Message { is_time_exceeded: message.is_time_exceeded, ..about(&packet, source) };
            let (_, quoted, source) = leaves(model, &up);
            (quoted, source)
        }
        Action::Tunnel | Action::Drop(_) | Action::Reject(_) => panic!("not of this flow: {action:?}"),
    }
}

/// A flow to a backend, as both ends see a packet of theirs.
struct Ends {
    model: Model,
    asked: Packet<Addr>,
    seen: Packet<Addr>,
    answered: Packet<Addr>,
    restored: Packet<Addr>,
}

fn flow(backend: Addr, is_local: bool, route: Route, proto: u8, packets: usize) -> Ends {
    let model = Model::new();
    model.route.set(route);
    let id = model.backend(backend, proto, is_local);
    model.frontend(VIP, proto, &[id], 0);
    let asked = if proto == TCP { ack(40_000, VIP) } else { datagram(CLIENT, 40_000, VIP, HTTP) };
    let seen = model.through(&asked);
    let answered = answer(&seen, tcp::ACK);
    let restored = model.through(&answered);
    for _ in 0..packets {
        model.through(&asked);
        model.through(&answered);
    }
    Ends { model, asked, seen, answered, restored }
}

/// Every sort of flow: new and established, beside a neighbour and without one, here and elsewhere.
fn each(check: impl Fn(&Ends, bool)) {
    for packets in [0, 2] {
        for proto in [TCP, UDP] {
            for route in [gateway(), Route::NoNeighbour { ifindex: UPLINK }] {
                check(&flow(REMOTE, false, route, proto, packets), false);
                check(&flow(LOCAL, true, route, proto, packets), true);
            }
        }
    }
}

#[test]
fn an_error_about_what_one_end_sees_is_told_to_the_other_in_its_own_words() {
    each(|Ends { model, asked, seen, answered, restored }, is_local| {
        let backend = seen.key.dst;
        let behind = if is_local { ROUTER } else { VIP };
        assert_eq!(passes(model, &about(seen, ROUTER)), (asked.key, behind), "of a router behind the node");
        let hop = Message { is_time_exceeded: true, ..about(seen, ROUTER) };
        assert_eq!(passes(model, &hop), (asked.key, ROUTER), "that traceroute asks for");
        assert_eq!(passes(model, &about(seen, backend)), (asked.key, VIP), "of the backend");
        let [router, client] = if is_local { [ROUTER, CLIENT] } else { [NODE; 2] };
        assert_eq!(passes(model, &about(restored, ROUTER)), (answered.key, router), "of a router before it");
        assert_eq!(passes(model, &about(restored, CLIENT)), (answered.key, client), "of the client");
    });
}

#[test]
fn an_error_goes_by_the_hop_of_its_flow_and_changes_nothing_of_it() {
    let ends = flow(REMOTE, false, gateway(), TCP, 2);
    let flows = || {
        let mut flows: Vec<_> =
            ends.model.established.borrow().iter().map(|(key, flow)| (*key, flow.get())).collect();
        flows.sort();
        flows
    };
    let before = flows();
    let config = ends.model.config.get();
    ends.model.config.set(Config { clock: config.clock + 50, ..config });
    for message in [about(&ends.seen, ROUTER), about(&ends.restored, ROUTER)] {
        assert_eq!(comes(&ends.model, &message).0, Action::Transmit);
    }
    assert_eq!(flows(), before, "neither alive nor ended by it");
    assert_eq!(ends.model.events(Event::Related), 2);
    let moved = Config { epoch: config.epoch + 1, ..ends.model.config.get() };
    ends.model.config.set(moved);
    ends.model.route.set(Route::NoNeighbour { ifindex: UPLINK });
    assert_eq!(comes(&ends.model, &about(&ends.seen, ROUTER)).0, Action::Stack, "the cached hop is stale");
}

#[test]
fn what_the_kernel_was_handed_in_half_it_quotes_in_half() {
    for packets in [0, 2] {
        let Ends { model, asked, seen, answered, .. } = flow(REMOTE, false, gateway(), TCP, packets);
        for (whole, end) in [(asked, CLIENT), (answered, REMOTE)] {
            let last = Packet { ttl: 1, ..whole };
            let verdict = model.xdp(&last);
            assert_eq!(verdict.action, Action::Stack);
            let half = rewritten(&last, &verdict);
            assert_eq!(half.key.src, end);
            assert_eq!(leaves(&model, &about(&half, NODE)), (Action::Stack, whole.key, NODE));
        }
        assert_eq!(leaves(&model, &about(&seen, ROUTER)).0, Action::Pass, "from behind, it comes by ingress");
    }
}

#[test]
fn an_error_about_an_answer_of_another_node_goes_there_as_it_is() {
    let model = Model::new();
    let id = model.backend(REMOTE, TCP, false);
    let backend = Backend { node: OTHER_NODE, ..model.backends.borrow()[id as usize] };
    model.set_backend(id, backend);
    model.frontend(VIP, TCP, &[id], 0);
    model.config.set(Config { direct: direct::TCP, ..model.config.get() });
    model.networks.borrow_mut().insert((network::SELF, NODE));
    for flags in [tcp::SYN, tcp::ACK, tcp::ACK] {
        assert_eq!(model.xdp(&segment(CLIENT, 40_000, VIP, HTTP, flags)).action, Action::Tunnel);
        let answer = answer(&ack(40_000, VIP), tcp::ACK);
        let mut out = Translation {
            source: [0; 4],
            quote: xdp_common::conntrack::rewrite_between(&answer.key, &answer.key),
            hop: Hop { dmac: [0; 6], smac: [0; 6], ifindex: 0 },
        };
        let action = related::ingress::<V4, _>(&model, &about(&answer, ROUTER), Hook::Xdp, &mut out);
        assert_eq!((action, out.quote.src, out.quote.dst), (Action::Tunnel, NODE, OTHER_NODE));
        // Through no second tunnel.
        let mut again = about(&answer, ROUTER);
        again.packet.is_tunnelled = true;
        assert_eq!(comes(&model, &again).0, Action::Pass);
    }
    // Without a neighbour it is left alone.
    model.route.set(Route::NoNeighbour { ifindex: UPLINK });
    model.config.set(Config { epoch: 9, ..model.config.get() });
    let answer = answer(&ack(40_000, VIP), tcp::ACK);
    assert_eq!(comes(&model, &about(&answer, ROUTER)).0, Action::Pass);
    assert_eq!(model.events(Event::Related), 3);
}

#[test]
fn an_error_that_another_node_has_sent_on_and_is_nobodys_is_dropped() {
    let Ends { model, seen, .. } = flow(REMOTE, false, gateway(), TCP, 2);
    model.networks.borrow_mut().insert((network::NODES, OTHER_NODE));
    let mut of_other = seen;
    (of_other.key.src, of_other.key.sport) = (OTHER_NODE, HTTP);
    let mut error = about(&of_other, ROUTER);
    assert_eq!(comes(&model, &error).0, Action::Pass, "on its way there");
    error.packet.is_tunnelled = true;
    assert_eq!(comes(&model, &error).0, Action::Drop(Reason::UnknownPort), "no NodePort");
    model.frontend([0; 4], TCP, &[], frontend::NODE_PORT);
    assert_eq!(comes(&model, &error).0, Action::Drop(Reason::UnknownPort), "no flow");
    assert_eq!((model.drops(Reason::UnknownPort), model.all_drops()), (2, 2));
}

#[test]
fn errors_about_nothing_known_or_for_another_station_pass() {
    let Ends { model, seen, .. } = flow(REMOTE, false, gateway(), TCP, 2);
    let mut stranger = seen;
    stranger.key.sport = [0x60, 0x60];
    assert_eq!(comes(&model, &about(&stranger, ROUTER)).0, Action::Pass);
    assert_eq!(leaves(&model, &about(&stranger, ROUTER)).0, Action::Pass);
    let elsewhere = Packet { dmac: [2, 0, 0, 0, 0, 9], ..seen };
    assert_eq!(comes(&model, &about(&elsewhere, ROUTER)).0, Action::Pass);
    let outside = Packet { ifindex: 77, ..seen };
    assert_eq!(comes(&model, &about(&outside, ROUTER)).0, Action::Pass);
    assert_eq!(model.events(Event::Related), 0);
}

#[test]
fn echo_is_for_addresses_of_services_on_devices_that_can_send_it_back() {
    let model = Model::new();
    model.frontend(VIP, TCP, &[], 0);
    let request = datagram(CLIENT, 0, VIP, [0; 2]);
    let echoes = || related::echoes::<V4, _>(&model, &request);
    assert!(!echoes(), "a frontend alone says nothing of its address");
    let address = |flags| Frontend { flags, ..model.frontends.borrow()[&(VIP, HTTP, TCP)] };
    for (flags, expected) in [(frontend::ECHO, true), (frontend::ADDRESS, true), (0, false)] {
        model.address(VIP, address(flags));
        assert_eq!(echoes(), expected, "flags {flags}");
    }
    model.address(VIP, address(frontend::ECHO));
    let uplink = model.devices.borrow()[&UPLINK];
    model.devices.borrow_mut().insert(UPLINK, Device { flags: 0, ..uplink });
    assert!(!echoes(), "no way back");
    model.devices.borrow_mut().insert(UPLINK, uplink);
    model.config.set(Config { echo: 0, ..model.config.get() });
    assert!(!echoes(), "told not to");
}
