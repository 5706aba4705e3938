//! What becomes of a process's call: the same choice as for a packet, made once, where the address is still an argument.
//!
//! A pod or a process of this node that connects to a Service is given the backend's address by the socket hooks; from
//! then on its packets are ordinary ones, and the kernel picks their source and their way. So nothing is masqueraded
//! here and nothing is tracked but what the socket has been told, for those who ask the socket for its peer.

use super::opening::{Origin, choose};
use crate::{
    gate,
    net::{Address, Family, FlowKey, Port, UDP},
    tables::{
        AffinityKey, Backend, Connected, Frontend, FrontendKey, Peer, PeerKey, SocketSettings, Tables,
        frontend, network, side, socket,
    },
    verdict::Reason,
};

/// The tables, as the socket hooks see them.
pub trait Sockets<F: Family>: Tables<F> {
    /// The agent's settings.
    fn settings(self) -> SocketSettings<F::Addr>;
    /// What a UDP socket has been told that names an address with each datagram.
    fn peer(self, key: &PeerKey) -> Option<Peer>;
    /// Notes what such a socket is told; false when the table refused.
    fn set_peer(self, key: &PeerKey, peer: &Peer) -> bool;
    /// What a socket has been told when it was connected, by protocol; entries of one protocol do not evict the other's.
    fn connected(self, proto: u8, cookie: u64) -> Option<Connected>;
    /// Notes what such a socket is told; false when the table refused.
    fn set_connected(self, proto: u8, cookie: u64, connected: &Connected) -> bool;
    /// Forgets what a socket has been told when it was connected.
    fn forget_connected(self, proto: u8, cookie: u64);
    /// Forgets what a UDP socket has been told that names an address with each datagram.
    fn forget_peer(self, key: &PeerKey);
    /// The address of the pod whose network namespace has this cookie; unspecified while it is not known.
    fn pod_address(self, namespace: u64) -> F::Addr;
}

/// A call of a process, with its socket.
#[derive(Clone, Copy, Debug)]
pub struct Call<A> {
    /// Address it names.
    pub addr: A,
    /// Port it names.
    pub port: Port,
    /// IP protocol of the socket.
    pub proto: u8,
    /// Address that the socket is bound to, or unspecified.
    pub source: A,
    /// Cookie of the socket's network namespace.
    pub namespace: u64,
    /// Whether that is the namespace of the node itself.
    pub is_host: bool,
    /// Cookie of the socket.
    pub cookie: u64,
    /// A random number: what chooses the backend.
    pub random: u32,
}

/// What becomes of a call; without a translation, address and port are those of the call.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome<A> {
    /// What becomes of it.
    pub answer: Answer,
    /// Address to go on with.
    pub addr: A,
    /// Port to go on with.
    pub port: Port,
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It goes on as it is.
    Left,
    /// It goes on to a backend.
    Translated,
    /// It fails at once, with the error of [`errno`].
    Refused(Reason),
}

/// `ECONNREFUSED` (include/uapi/asm-generic/errno.h).
pub const ECONNREFUSED: i32 = 111;
/// `EPERM`, as a firewall's drop on the way out: what a hook's refusal means where the kernel lets it name no other.
pub const EPERM: i32 = 1;
/// `EADDRINUSE`.
pub const EADDRINUSE: i32 = 98;

/// The error that a refused call ends with. What kube-proxy rejects is refused; what it drops on the wire, where the
/// caller would wait for nothing, fails as if a local firewall had dropped it.
pub const fn errno(reason: Reason) -> i32 {
    match reason {
        Reason::NoEndpoint | Reason::UnknownPort => ECONNREFUSED,
        Reason::NoLocalEndpoint
        | Reason::SourceRange
        | Reason::UnknownServiceAddress
        | Reason::SnatExhausted
        | Reason::FlowInsert
        | Reason::NoBackend
        | Reason::EndpointRemoved
        | Reason::TunnelMtu
        | Reason::TunnelHops
        | Reason::TunnelWay
        | Reason::EchoLimit => EPERM,
    }
}

/// What becomes of a connect call, of a TCP socket or of a UDP socket that is to have one peer.
#[inline(always)] // one caller per hook
pub fn connect<F: Family, T: Sockets<F>>(tables: T, call: &Call<F::Addr>) -> Outcome<F::Addr> {
    let (found, settings) = match find(tables, call) {
        Found::Frontend(found, settings) => (found, settings),
        Found::Other(answer) => {
            // Connected again, now to what is no Service: it may be a backend, whose own name it has to hear.
            if answer == Answer::Left {
                tables.forget_connected(call.proto, call.cookie);
                forget_name(tables, call);
            }
            return Outcome { answer, addr: call.addr, port: call.port };
        }
    };
    // A UDP socket may have met a backend with a datagram before, and wait for its answer.
    let forward = key(call.cookie, call.addr, call.port, side::SERVICE);
    let met = if call.proto == UDP { tables.peer(&forward) } else { None };
    let (mut answer, mut id) = (Answer::Left, met.map_or(0, |met| still(tables, &met, &found)));
    if id == 0 {
        (answer, id) = choose_for(tables, call, &found, &settings);
    }
    let backend = if id == 0 { None } else { tables.backend(id) };
    let Some(backend) = backend else { return unserved(call, answer) };
    let told = peer(call.addr, call.port, id, &backend);
    let connected = Connected { addr: backend.addr.wide(), port: backend.port, zero: [0; 2], told };
    // Refused, the backend shows itself, and a UDP socket does not hear when it goes.
    tables.set_connected(call.proto, call.cookie, &connected);
    if call.proto == UDP {
        // It may have come to this backend with a datagram before, by another name: answers come by the last one.
        let back = key(call.cookie, backend.addr, backend.port, side::BACKEND);
        if tables.peer(&back).is_some() {
            tables.set_peer(&back, &told);
        }
    }
    Outcome { answer: Answer::Translated, addr: backend.addr, port: backend.port }
}

/// Lets a UDP socket hear a backend by its own name again, by which it calls it now.
#[inline(always)] // a lookup, which finds nothing for most
fn forget_name<F: Family, T: Sockets<F>>(tables: T, call: &Call<F::Addr>) {
    let back = key(call.cookie, call.addr, call.port, side::BACKEND);
    if call.proto == UDP && tables.peer(&back).is_some() {
        tables.forget_peer(&back);
    }
}

/// The backend that a socket has met, if it is still one of the frontend's; else 0.
#[inline(always)] // a lookup
fn still<F: Family, T: Sockets<F>>(tables: T, met: &Peer, found: &Frontend) -> u32 {
    match tables.backend(met.backend) {
        Some(now) if now.generation == met.generation && now.service == found.service => met.backend,
        Some(_) | None => 0,
    }
}

/// What becomes of a datagram to an address that a UDP socket names with it. A socket keeps the backend that it has met
/// behind an address for as long as that serves, as a flow does.
#[inline(always)] // one caller per hook
pub fn send<F: Family, T: Sockets<F>>(tables: T, call: &Call<F::Addr>) -> Outcome<F::Addr> {
    let (found, settings) = match find(tables, call) {
        Found::Frontend(found, settings) => (found, settings),
        Found::Other(answer) => {
            if answer == Answer::Left {
                forget_name(tables, call);
            }
            return Outcome { answer, addr: call.addr, port: call.port };
        }
    };
    let forward = key(call.cookie, call.addr, call.port, side::SERVICE);
    let (mut answer, mut id) = (Answer::Left, 0);
    if let Some(known) = tables.peer(&forward) {
        id = still(tables, &known, &found);
    }
    let is_known = id != 0;
    // A connected socket may name its peer all the same, and hears no other.
    if !is_known
        && let Some(Connected { told, .. }) = tables.connected(UDP, call.cookie)
        && told.port == call.port
        && told.addr.differs(call.addr.wide()) == 0
    {
        id = still(tables, &told, &found);
    }
    if id == 0 {
        (answer, id) = choose_for(tables, call, &found, &settings);
    }
    let backend = if id == 0 { None } else { tables.backend(id) };
    let Some(backend) = backend else { return unserved(call, answer) };
    let back = key(call.cookie, backend.addr, backend.port, side::BACKEND);
    // Another Service may have led the socket to the same backend meanwhile: answers come by the last name.
    let is_noted = is_known
        && tables
            .peer(&back)
            .is_some_and(|told| told.port == call.port && told.addr.differs(call.addr.wide()) == 0);
    if !is_noted {
        // Refused, the backend shows itself: only names are lost.
        tables.set_peer(&back, &peer(call.addr, call.port, id, &backend));
    }
    if !is_known {
        // Refused, the next datagram is placed anew.
        tables.set_peer(&forward, &peer(backend.addr, backend.port, id, &backend));
    }
    Outcome { answer: Answer::Translated, addr: backend.addr, port: backend.port }
}

/// The address and port that a socket has been told for a peer of its, if that is a backend it was led to.
#[inline(always)] // a lookup
pub fn told<F: Family, T: Sockets<F>>(
    tables: T,
    proto: u8,
    cookie: u64,
    addr: F::Addr,
    port: Port,
) -> Option<(F::Addr, Port)> {
    let by_datagram = if proto == UDP { tables.peer(&key(cookie, addr, port, side::BACKEND)) } else { None };
    let told = match by_datagram {
        Some(told) => told,
        None => {
            let connected = tables.connected(proto, cookie)?;
            // Connected again, to what is no Service, a socket has another peer than it was told.
            if connected.port != port || connected.addr.differs(addr.wide()) != 0 {
                return None;
            }
            connected.told
        }
    };
    Some((F::Addr::from_wide(told.addr), told.port))
}

/// Whether a process of this node may bind a port: one that is a NodePort would be out of its clients' reach.
#[inline(always)] // one caller per hook
pub fn may_bind<F: Family, T: Sockets<F>>(tables: T, addr: F::Addr, port: Port, proto: u8) -> bool {
    let settings = tables.settings();
    let is_for_all = addr.differs(F::Addr::UNSPECIFIED) == 0 || stands_for_node(&settings, addr);
    let addr = if is_for_all { settings.node_ports } else { addr };
    let at = FrontendKey { addr, port, proto, zero: 0 };
    // NodePorts of other nodes are on no address of this one.
    let own = frontend::NODE_PORT | frontend::NODE_ADDRESS;
    tables.frontend(&at).is_none_or(|found| found.flags & own != own)
}

/// Whether what is addressed there is for NodePorts: the loopback, if that was asked for.
#[inline(always)]
fn stands_for_node<A: Address>(settings: &SocketSettings<A>, addr: A) -> bool {
    settings.flags & socket::ON_LOOPBACK != 0 && addr.is_loopback()
}

enum Found<A> {
    Frontend(Frontend, SocketSettings<A>),
    Other(Answer),
}

/// The frontend that a call names.
#[inline(always)]
fn find<F: Family, T: Sockets<F>>(tables: T, call: &Call<F::Addr>) -> Found<F::Addr> {
    let settings = tables.settings();
    if !call.is_host && settings.flags & socket::HOST_ONLY != 0 {
        return Found::Other(Answer::Left);
    }
    let mut addr = call.addr;
    let is_loopback = call.is_host && stands_for_node(&settings, addr);
    if is_loopback {
        addr = settings.node_ports;
    }
    let packet =
        FlowKey { src: addr, dst: addr, sport: [0; 2], dport: call.port, proto: call.proto, zero: [0; 3] };
    if addr.differs(F::Addr::UNSPECIFIED) == 0 || !gate::admits_ingress(tables, &tables.config(), &packet) {
        return Found::Other(Answer::Left);
    }
    let at = FrontendKey { addr, port: call.port, proto: call.proto, zero: 0 };
    match tables.frontend(&at) {
        Some(found) if !is_loopback || found.flags & frontend::NODE_PORT != 0 => {
            Found::Frontend(found, settings)
        }
        Some(_) => Found::Other(Answer::Left),
        None if is_loopback => Found::Other(Answer::Left),
        None => Found::Other(without_frontend(tables, addr)),
    }
}

/// What is addressed to a ClusterIP's other ports is refused, what is addressed to a ServiceCIDR where no Service is,
/// dropped.
#[inline(always)]
fn without_frontend<F: Family, T: Sockets<F>>(tables: T, addr: F::Addr) -> Answer {
    let at = FrontendKey { addr, port: [0; 2], proto: 0, zero: 0 };
    if tables.frontend(&at).is_some_and(|found| found.flags & frontend::ADDRESS != 0) {
        return Answer::Refused(Reason::UnknownPort);
    }
    if tables.network(network::SERVICES, addr) {
        return Answer::Refused(Reason::UnknownServiceAddress);
    }
    Answer::Left
}

/// The id of the backend for a call; 0 with the reason when there is none.
#[inline(always)]
fn choose_for<F: Family, T: Sockets<F>>(
    tables: T,
    call: &Call<F::Addr>,
    found: &Frontend,
    settings: &SocketSettings<F::Addr>,
) -> (Answer, u32) {
    if found.flags & frontend::RESTRICTED != 0
        && !tables.network(network::sources_of(found.service), source(tables, call, settings))
    {
        return (Answer::Refused(Reason::SourceRange), 0);
    }
    // Both are inside the cluster; a pod that the detect-local mode does not take for one of this node's is too.
    let origin = if call.is_host { Origin::Host } else { Origin::Pod };
    let client = AffinityKey { client: F::Addr::of_namespace(call.namespace), service: found.service };
    let id = choose(tables, &client, call.random, found, origin);
    if id != 0 {
        // Asked only if the backend turns out to be missing: ring and backends disagree then.
        return (Answer::Refused(Reason::NoBackend), id);
    }
    if found.flags & frontend::HAS_ENDPOINTS != 0 {
        return (Answer::Refused(Reason::NoLocalEndpoint), 0);
    }
    // On a node's own address the kernel refuses what nobody listens to.
    let answer = if found.flags & frontend::NODE_ADDRESS != 0 && found.flags & frontend::NODE_PORT == 0 {
        Answer::Left
    } else {
        Answer::Refused(Reason::NoEndpoint)
    };
    (answer, 0)
}

/// The address that the first packet will come from, as far as it can be known before the kernel has chosen it.
#[inline(always)]
fn source<F: Family, T: Sockets<F>>(
    tables: T,
    call: &Call<F::Addr>,
    settings: &SocketSettings<F::Addr>,
) -> F::Addr {
    if call.source.differs(F::Addr::UNSPECIFIED) != 0 {
        call.source
    } else if call.is_host {
        settings.node
    } else {
        tables.pod_address(call.namespace)
    }
}

#[inline(always)]
fn unserved<A: Address>(call: &Call<A>, answer: Answer) -> Outcome<A> {
    Outcome { answer, addr: call.addr, port: call.port }
}

#[inline(always)]
fn key<A: Address>(cookie: u64, addr: A, port: Port, side: u8) -> PeerKey {
    PeerKey { cookie, addr: addr.wide(), port, side, zero: [0; 5] }
}

#[inline(always)]
fn peer<A: Address>(addr: A, port: Port, id: u32, backend: &Backend<A>) -> Peer {
    Peer {
        addr: addr.wide(),
        port,
        zero: [0; 2],
        backend: id,
        generation: backend.generation,
        service: backend.service,
    }
}
