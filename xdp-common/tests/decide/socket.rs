//! What becomes of calls at the socket.

use std::collections::HashSet;

use proptest::prelude::*;
use xdp_common::{
    decide::socket::{
        Answer, Call, ECONNREFUSED, EPERM, Outcome, Sockets, connect, errno, may_bind, send, told,
    },
    net::{Address, Ip6, TCP, UDP, V4},
    tables::{Backend, Connected, Peer, PeerKey, SocketSettings, backend, frontend, network, socket},
    verdict::Reason,
};

use crate::model::*;

const POD: u64 = 7;
const HOST: u64 = HOST_NAMESPACE;
const LOOPBACK: Addr = [127, 0, 0, 1];

impl Sockets<V4> for &Model {
    fn settings(self) -> SocketSettings<Addr> {
        self.sockets.settings.get()
    }
    fn peer(self, key: &PeerKey) -> Option<Peer> {
        self.sockets.peers.borrow().get(key).copied()
    }
    fn set_peer(self, key: &PeerKey, peer: &Peer) -> bool {
        if self.sockets.is_full.get() {
            return false;
        }
        self.sockets.peers.borrow_mut().insert(*key, *peer);
        true
    }
    fn connected(self, proto: u8, cookie: u64) -> Option<Connected> {
        self.sockets.connected.borrow().get(&(proto, cookie)).copied()
    }
    fn set_connected(self, proto: u8, cookie: u64, connected: &Connected) -> bool {
        if self.sockets.is_full.get() {
            return false;
        }
        self.sockets.connected.borrow_mut().insert((proto, cookie), *connected);
        true
    }
    fn forget_connected(self, proto: u8, cookie: u64) {
        self.sockets.connected.borrow_mut().remove(&(proto, cookie));
    }
    fn forget_peer(self, key: &PeerKey) {
        self.sockets.peers.borrow_mut().remove(key);
    }
    fn pod_address(self, namespace: u64) -> Addr {
        self.sockets.pods.borrow().get(&namespace).copied().unwrap_or_default()
    }
}

fn call(namespace: u64, cookie: u64, proto: u8, addr: Addr, random: u32) -> Call<Addr> {
    let is_host = namespace == HOST;
    Call { addr, port: HTTP, proto, source: [0; 4], namespace, is_host, cookie, random }
}

fn connects(model: &Model, call: &Call<Addr>) -> Outcome<Addr> {
    connect::<V4, _>(model, call)
}

fn sends(model: &Model, call: &Call<Addr>) -> Outcome<Addr> {
    send::<V4, _>(model, call)
}

/// A node with a frontend of both protocols, on backends here and elsewhere.
fn node(flags: u32) -> Model {
    let model = Model::new();
    for proto in [TCP, UDP] {
        let ids = [(LOCAL, true), (REMOTE, false), (REMOTE_TOO, false)];
        let ids = ids.map(|(addr, is_local)| model.backend(addr, proto, is_local));
        model.frontend(VIP, proto, &ids, flags | frontend::HAS_ENDPOINTS);
    }
    model
}

/// Endpoint, after the backend under an id has gone.
fn end(model: &Model, addr: Addr) {
    for backend in model.backends.borrow_mut().iter_mut().filter(|backend| backend.addr == addr) {
        *backend = Backend { proto: 0, generation: backend.generation + 1, ..*backend };
    }
}

#[test]
fn a_connection_is_led_to_each_backend_by_chance_and_its_socket_told_which_service_it_was() {
    let model = node(0);
    let mut met = HashSet::new();
    for number in 0..60u32 {
        let call = call(POD, number.into(), TCP, VIP, number.wrapping_mul(0x9e37_79b9));
        let outcome = connects(&model, &call);
        assert_eq!((outcome.answer, outcome.port), (Answer::Translated, TARGET));
        let shown = told::<V4, _>(&model, TCP, call.cookie, outcome.addr, outcome.port);
        assert_eq!(shown, Some((VIP, HTTP)));
        assert_eq!(told::<V4, _>(&model, UDP, call.cookie, outcome.addr, outcome.port), None);
        met.insert(outcome.addr);
    }
    assert_eq!(met, HashSet::from([LOCAL, REMOTE, REMOTE_TOO]));
}

#[test]
fn what_is_no_service_is_left_alone() {
    let model = node(0);
    for addr in [CLIENT, NODE, LOCAL, [0; 4], LOOPBACK] {
        let outcome = connects(&model, &call(HOST, 1, TCP, addr, 0));
        assert_eq!(outcome, Outcome { answer: Answer::Left, addr, port: HTTP }, "{addr:?}");
    }
    assert!(model.sockets.connected.borrow().is_empty());
}

#[test]
fn refusals_are_those_of_kube_proxy_and_drops_fail_as_a_firewalls() {
    let model = Model::new();
    let id = model.backend(LOCAL, TCP, true);
    // Address, flags and backends of a frontend; what a call to it ends with.
    let cases: [(Addr, u32, &[u32], Answer); 5] = [
        ([203, 0, 113, 1], 0, &[], Answer::Refused(Reason::NoEndpoint)),
        ([203, 0, 113, 2], frontend::HAS_ENDPOINTS, &[], Answer::Refused(Reason::NoLocalEndpoint)),
        ([203, 0, 113, 3], frontend::NODE_ADDRESS, &[], Answer::Left),
        (NODE, frontend::NODE_ADDRESS | frontend::NODE_PORT, &[], Answer::Refused(Reason::NoEndpoint)),
        ([203, 0, 113, 4], frontend::HAS_ENDPOINTS, &[id + 1], Answer::Refused(Reason::NoBackend)),
    ];
    for (addr, flags, backends, expected) in cases {
        model.frontend(addr, TCP, backends, flags);
        for namespace in [POD, HOST] {
            assert_eq!(connects(&model, &call(namespace, 1, TCP, addr, 0)).answer, expected, "{addr:?}");
        }
    }
    assert_eq!((errno(Reason::NoEndpoint), errno(Reason::UnknownPort)), (ECONNREFUSED, ECONNREFUSED));
    assert_eq!((errno(Reason::NoLocalEndpoint), errno(Reason::SourceRange)), (EPERM, EPERM));
}

#[test]
fn clients_inside_use_the_inner_ring_wherever_they_are() {
    let model = node(0);
    // Policy Local for clients outside: only the local backend is in their ring.
    for frontend in model.frontends.borrow_mut().values_mut() {
        frontend.slots = 1;
        frontend.flags |= frontend::LOCAL;
    }
    for namespace in [POD, HOST] {
        let met: HashSet<Addr> = (0..60u32)
            .map(|at| connects(&model, &call(namespace, 1, TCP, VIP, at.wrapping_mul(0x9e37_79b9))).addr)
            .collect();
        assert_eq!(met.len(), 3, "namespace {namespace}");
    }
}

#[test]
fn affinity_goes_by_namespace_and_never_meets_that_of_an_address() {
    let model = Model::new();
    model.affinity_seconds.set(100);
    let ids = [LOCAL, REMOTE, REMOTE_TOO].map(|addr| model.backend(addr, TCP, addr == LOCAL));
    model.frontend(VIP, TCP, &ids, frontend::HAS_ENDPOINTS);
    let first = connects(&model, &call(POD, 1, TCP, VIP, 0)).addr;
    for random in [1 << 30, 1 << 31, u32::MAX] {
        assert_eq!(connects(&model, &call(POD, 2, TCP, VIP, random)).addr, first);
    }
    let other = connects(&model, &call(POD + 1, 1, TCP, VIP, u32::MAX)).addr;
    assert_ne!(other, first);
    for key in model.affinities.borrow().keys() {
        assert!(!key.client.is_unicast(), "{:?} could be a client's address", key.client);
    }
    end(&model, first);
    assert_ne!(connects(&model, &call(POD, 3, TCP, VIP, u32::MAX)).addr, first);
}

#[test]
fn source_ranges_hold_for_the_node_for_bound_sockets_and_for_pods_that_are_known() {
    let model = node(frontend::RESTRICTED);
    let refused = Answer::Refused(Reason::SourceRange);
    let pod: Addr = [10, 244, 1, 9];
    for namespace in [POD, HOST] {
        assert_eq!(connects(&model, &call(namespace, 1, TCP, VIP, 0)).answer, refused);
    }
    let allow = |addr| model.networks.borrow_mut().insert((network::sources_of(1), addr));
    allow(NODE);
    assert_eq!(connects(&model, &call(HOST, 1, TCP, VIP, 0)).answer, Answer::Translated);
    allow(pod);
    assert_eq!(connects(&model, &call(POD, 1, TCP, VIP, 0)).answer, refused, "nobody knows its address");
    let bound = Call { source: pod, ..call(POD, 1, TCP, VIP, 0) };
    assert_eq!(connects(&model, &bound).answer, Answer::Translated);
    model.sockets.pods.borrow_mut().insert(POD, pod);
    assert_eq!(connects(&model, &call(POD, 1, TCP, VIP, 0)).answer, Answer::Translated);
}

#[test]
fn ports_and_addresses_of_no_service_end_as_on_the_wire() {
    let model = node(0);
    model.frontend([10, 96, 0, 1], TCP, &[], 0);
    let found = model.frontends.borrow_mut().remove(&([10, 96, 0, 1], HTTP, TCP)).expect("just added");
    let address = xdp_common::tables::Frontend { flags: frontend::ADDRESS, ..found };
    model.frontends.borrow_mut().insert(([10, 96, 0, 1], [0; 2], 0), address);
    let answer = connects(&model, &call(POD, 1, TCP, [10, 96, 0, 1], 0)).answer;
    assert_eq!(answer, Answer::Refused(Reason::UnknownPort));
    model.frontend([10, 96, 7, 7], TCP, &[], 0);
    model.frontends.borrow_mut().remove(&([10, 96, 7, 7], HTTP, TCP));
    model.networks.borrow_mut().insert((network::SERVICES, [10, 96, 7, 7]));
    let answer = connects(&model, &call(POD, 1, TCP, [10, 96, 7, 7], 0)).answer;
    assert_eq!(answer, Answer::Refused(Reason::UnknownServiceAddress));
}

#[test]
fn with_host_only_pods_are_not_served() {
    let model = node(0);
    let settings = SocketSettings { flags: socket::HOST_ONLY, ..model.sockets.settings.get() };
    model.sockets.settings.set(settings);
    assert_eq!(connects(&model, &call(POD, 1, TCP, VIP, 0)).answer, Answer::Left);
    assert_eq!(connects(&model, &call(HOST, 1, TCP, VIP, 0)).answer, Answer::Translated);
}

#[test]
fn the_loopback_stands_for_node_ports_of_the_node_and_for_nothing_else() {
    let model = node(0);
    let ids = [model.backend(LOCAL, TCP, true)];
    model.frontend(NODE, TCP, &ids, frontend::NODE_ADDRESS | frontend::HAS_ENDPOINTS | frontend::NODE_PORT);
    let on_loopback = |namespace| connects(&model, &call(namespace, 1, TCP, LOOPBACK, 0));
    assert_eq!(on_loopback(HOST).answer, Answer::Left, "not asked for");
    let flags = socket::ON_LOOPBACK;
    model.sockets.settings.set(SocketSettings { flags, ..model.sockets.settings.get() });
    assert_eq!((on_loopback(HOST).answer, on_loopback(HOST).addr), (Answer::Translated, LOCAL));
    assert_eq!(told::<V4, _>(&model, TCP, 1, LOCAL, TARGET), Some((LOOPBACK, HTTP)));
    assert_eq!(on_loopback(POD).answer, Answer::Left, "a pod's loopback is its own");
    // An external address that is the node's too is no NodePort.
    let key = (NODE, HTTP, TCP);
    let found = model.frontends.borrow()[&key];
    let flags = found.flags & !frontend::NODE_PORT;
    model.frontends.borrow_mut().insert(key, xdp_common::tables::Frontend { flags, ..found });
    assert_eq!(on_loopback(HOST).answer, Answer::Left);
}

#[test]
fn only_node_ports_are_kept_from_being_bound() {
    let model = node(0);
    let serving: Addr = [192, 168, 60, 10];
    let settings = model.sockets.settings.get();
    model.sockets.settings.set(SocketSettings { node_ports: serving, ..settings });
    for addr in [NODE, serving] {
        model.frontend(addr, TCP, &[], frontend::NODE_ADDRESS | frontend::NODE_PORT);
    }
    let bind = |addr, port, proto| may_bind::<V4, _>(&model, addr, port, proto);
    assert!(!bind(serving, HTTP, TCP) && !bind([0; 4], HTTP, TCP));
    // The primary address serves none.
    model.frontends.borrow_mut().remove(&(NODE, HTTP, TCP));
    assert!(bind(NODE, HTTP, TCP) && !bind([0; 4], HTTP, TCP), "without an address, of all");
    assert!(bind(LOOPBACK, HTTP, TCP), "not asked for");
    let flags = socket::ON_LOOPBACK;
    model.sockets.settings.set(SocketSettings { node_ports: serving, flags, ..settings });
    assert!(!bind(LOOPBACK, HTTP, TCP), "who connects there meets the NodePort");
    model.sockets.settings.set(settings);
    model.frontend(NODE, TCP, &[], frontend::NODE_ADDRESS | frontend::NODE_PORT);
    assert!(bind(NODE, TARGET, TCP) && bind(NODE, HTTP, UDP) && bind(LOOPBACK, HTTP, TCP));
    model.frontend([0; 4], TCP, &[], frontend::NODE_PORT);
    model.sockets.settings.set(SocketSettings { node_ports: [0; 4], ..settings });
    assert!(bind([0; 4], HTTP, TCP), "a NodePort of other nodes");
    assert!(bind(VIP, HTTP, TCP), "a load-balancer address is no NodePort");
}

#[test]
fn a_full_table_costs_names_and_no_connection() {
    let model = node(0);
    model.sockets.is_full.set(true);
    assert_eq!(connects(&model, &call(POD, 1, TCP, VIP, 0)).answer, Answer::Translated);
    assert_eq!(sends(&model, &call(POD, 1, UDP, VIP, 0)).answer, Answer::Translated);
}

#[test]
fn datagrams_of_a_socket_follow_the_first_until_its_backend_is_gone() {
    let model = node(0);
    let first = sends(&model, &call(POD, 1, UDP, VIP, 0));
    for random in [1 << 30, 1 << 31, u32::MAX] {
        assert_eq!(sends(&model, &call(POD, 1, UDP, VIP, random)), first);
    }
    // What replies are named by may have been evicted alone.
    model.sockets.peers.borrow_mut().retain(|key, _| key.addr == VIP.wide());
    assert_eq!(sends(&model, &call(POD, 1, UDP, VIP, u32::MAX)), first);
    assert_eq!(told::<V4, _>(&model, UDP, 1, first.addr, first.port), Some((VIP, HTTP)));
    // It is no longer in any list, but serves: flows stay.
    for backend in model.backends.borrow_mut().iter_mut() {
        backend.flags &= !(backend::IN_CLUSTER_LIST | backend::IN_LOCAL_LIST);
    }
    assert_eq!(sends(&model, &call(POD, 1, UDP, VIP, u32::MAX)), first);
    end(&model, first.addr);
    let next = sends(&model, &call(POD, 1, UDP, VIP, u32::MAX));
    assert_eq!(next.answer, Answer::Translated);
    assert_ne!(next.addr, first.addr);
}

#[test]
fn a_socket_that_returns_to_a_service_is_answered_by_its_name_again() {
    let model = node(0);
    let backend = sends(&model, &call(POD, 1, UDP, VIP, 0));
    let ids = [model.backends.borrow().iter().position(|at| at.addr == backend.addr).expect("it") as u32];
    model.frontend(VIP_TOO, UDP, &ids, frontend::HAS_ENDPOINTS);
    for vip in [VIP_TOO, VIP, VIP_TOO, VIP] {
        let sent = sends(&model, &call(POD, 1, UDP, vip, 0));
        assert_eq!((sent.addr, sent.port), (backend.addr, backend.port));
        assert_eq!(told::<V4, _>(&model, UDP, 1, sent.addr, sent.port), Some((vip, HTTP)));
    }
    // The last name of it is one that it is connected by.
    let sent = connects(&model, &call(POD, 1, UDP, VIP_TOO, 0));
    assert_eq!((sent.addr, sent.port), (backend.addr, backend.port));
    assert_eq!(told::<V4, _>(&model, UDP, 1, sent.addr, sent.port), Some((VIP_TOO, HTTP)));
}

#[test]
fn a_socket_that_is_connected_and_names_its_peer_too_has_one_backend_until_that_is_gone() {
    let chance = |number: u32| number.wrapping_mul(0x9e37_79b9);
    let mut met = HashSet::new();
    for number in 0..20 {
        let first = chance(number);
        let model = node(0);
        let connected = connects(&model, &call(POD, 1, UDP, VIP, first));
        for random in (0..20).map(chance) {
            assert_eq!(sends(&model, &call(POD, 1, UDP, VIP, random)), connected, "connected first");
        }
        let named = sends(&model, &call(POD, 2, UDP, VIP, first));
        for random in (0..20).map(chance) {
            assert_eq!(connects(&model, &call(POD, 2, UDP, VIP, random)), named, "connected afterwards");
        }
        // A TCP socket chooses anew with each connection.
        let tcp: HashSet<_> = (0..20)
            .map(chance)
            .map(|random| connects(&model, &call(POD, 3, TCP, VIP, random)).addr)
            .collect();
        assert!(tcp.len() > 1);
        end(&model, named.addr);
        let others = (0..20).map(chance).map(|random| connects(&model, &call(POD, 2, UDP, VIP, random)));
        assert!(others.into_iter().all(|other| other.addr != named.addr), "not the one that is gone");
        met.insert(named.addr);
    }
    assert_eq!(met.len(), 3);
}

#[test]
fn a_socket_that_calls_a_pod_by_its_own_name_hears_that() {
    type Says = fn(&Model, &Call<Addr>) -> Outcome<Addr>;
    let (connects, sends): (Says, Says) = (connects, sends);
    for (proto, first, then, keeps_its_peer) in [
        (UDP, connects, connects, false),
        (UDP, sends, connects, false),
        (UDP, sends, sends, false),
        (UDP, connects, sends, true),
        // One that has been disconnected.
        (TCP, connects, connects, false),
    ] {
        let model = node(0);
        let met = first(&model, &call(POD, 1, proto, VIP, 0));
        let name = || told::<V4, _>(&model, proto, 1, met.addr, met.port);
        assert_eq!(name(), Some((VIP, HTTP)));
        let direct = Call { port: met.port, ..call(POD, 1, proto, met.addr, 0) };
        assert_eq!(then(&model, &direct).answer, Answer::Left);
        assert_eq!(name().is_some(), keeps_its_peer, "protocol {proto}");
    }
}

#[test]
fn a_socket_that_is_connected_again_has_the_name_of_its_last_peer_only() {
    let model = node(0);
    let first = connects(&model, &call(POD, 1, UDP, VIP, 0));
    let ids = [model.backend(REMOTE_TOO, UDP, false)];
    model.frontend(VIP_TOO, UDP, &ids, frontend::HAS_ENDPOINTS);
    let second = connects(&model, &call(POD, 1, UDP, VIP_TOO, 0));
    assert_ne!(first.addr, second.addr);
    assert_eq!(told::<V4, _>(&model, UDP, 1, second.addr, second.port), Some((VIP_TOO, HTTP)));
    assert_eq!(told::<V4, _>(&model, UDP, 1, first.addr, first.port), None);
    assert_eq!(model.sockets.connected.borrow().len(), 1, "an entry a socket");
}

proptest! {
    #[test]
    fn a_translated_call_goes_to_a_backend_of_the_ring_and_is_told_back(
        calls in proptest::collection::vec((0u64..4, 0u64..6, any::<bool>(), any::<bool>(), any::<u32>()), 1..60),
    ) {
        let model = node(0);
        for (namespace, cookie, is_udp, is_send, random) in calls {
            let proto = if is_udp { UDP } else { TCP };
            // Cookies are of one socket, and so of one namespace and protocol.
            let cookie = cookie << 8 | namespace << 1 | u64::from(is_udp);
            let call = call(namespace, cookie, proto, VIP, random);
            let outcome = if is_udp && is_send { sends(&model, &call) } else { connects(&model, &call) };
            prop_assert_eq!(outcome.answer, Answer::Translated);
            prop_assert!([LOCAL, REMOTE, REMOTE_TOO].contains(&outcome.addr));
            prop_assert_eq!(told::<V4, _>(&model, proto, cookie, outcome.addr, outcome.port), Some((VIP, HTTP)));
            prop_assert_eq!(told::<V4, _>(&model, proto, cookie, CLIENT, outcome.port), None);
        }
    }

    #[test]
    fn what_is_no_frontend_is_never_changed(addr: [u8; 4], port: [u8; 2], random: u32, is_host: bool) {
        prop_assume!(addr != VIP || port != HTTP);
        let model = node(0);
        let namespace = if is_host { HOST } else { POD };
        let call = Call { port, ..call(namespace, 1, TCP, addr, random) };
        prop_assert_eq!(connects(&model, &call), Outcome { answer: Answer::Left, addr, port });
    }

    #[test]
    fn a_namespace_stands_for_no_client(cookie: u64) {
        prop_assert!(!<[u8; 4]>::of_namespace(cookie).is_unicast());
        let [a, b, ..] = Ip6::of_namespace(cookie).words();
        prop_assert_eq!((a, b), (0, 0));
        prop_assert!(!Ip6::of_namespace(cookie).is_loopback());
    }

    #[test]
    fn a_wide_address_is_read_back(v4: [u8; 4], v6: [u8; 16]) {
        prop_assert_eq!(<[u8; 4]>::from_wide(v4.wide()), v4);
        prop_assert_eq!(Ip6::from_wide(Ip6::from(v6).wide()), Ip6::from(v6));
        prop_assert_eq!(std::net::Ipv6Addr::from(v4.wide().octets()).to_ipv4_mapped(), Some(v4.into()));
    }
}
