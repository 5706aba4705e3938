//! What goes on around both twins: services that change, neighbours that come and go, clients that speak, backends that
//! answer.

use futures_util::TryStreamExt;
use rtnetlink::packet_route::{
    AddressFamily,
    neighbour::{NeighbourAddress, NeighbourAttribute},
};
use xdp_agent_tests::lab::block_on;
use xdp_common::{
    frame::Parsed,
    net::{Address as _, SCTP, TCP, UDP, V6},
    tables::{Backend, Config, Device, Frontend, Route, backend, direct, frontend, network},
    tunnel::Tunnel,
};

use crate::{
    applied::surrounding,
    family::{Family, Hosts},
    frames::*,
    node::*,
    twins::Twins,
};

/// How many packets that have reached backends are remembered, to be answered.
const ARRIVED_MAX: usize = 64;
const PORTS: [u16; 6] = [2_000, 2_001, 29_999, 40_000, 40_001, 40_002];
const FLAGS: [u8; 6] = [SYN, ACK, ACK, ACK, FIN | ACK, RST];
/// A pod elsewhere, and an address of the service network that no service has.
const POD: Addr = [10, 244, 9, 9];
const FREE: Addr = [203, 0, 113, 99];
/// No node, or none to which packets go as they are.
const NOWHERE: Addr = [0; 4];
/// Where clients connect to.
const VIPS: [Addr; 4] = [VIP, VIP_TOO, NODE, ANY_NODE];
pub(crate) const BACKENDS: [Addr; 5] = [LOCAL, REMOTE, REMOTE_TOO, BESIDE, UNRESOLVED];
/// What the services are served by.
pub(crate) const TRANSPORTS: [u8; 3] = [TCP, UDP, SCTP];
/// The service of all frontends.
pub(crate) const SERVICE: u32 = 1;

/// Every host that frames come from or go to.
pub(crate) const HOSTS: [Addr; 16] = [
    CLIENT,
    [198, 51, 100, 3],
    [198, 51, 100, 4],
    POD,
    VIP,
    VIP_TOO,
    FREE,
    NODE,
    NODE_TOO,
    LOCAL,
    REMOTE,
    REMOTE_TOO,
    BESIDE,
    UNRESOLVED,
    [0, 0, 0, 0],
    [224, 0, 0, 5],
];

/// The id of the first backend of a transport.
fn first_id(proto: u8) -> usize {
    let before = TRANSPORTS.iter().take_while(|of| **of != proto).count();
    1 + before * BACKENDS.len()
}

/// A packet that has reached a backend.
#[derive(Clone, Copy)]
pub(crate) struct Arrived {
    proto: u8,
    src: Socket,
    dst: Socket,
}

impl<F: Hosts + Tunnel> Twins<F> {
    /// What holds for good: networks, and the ways that never change.
    pub(crate) fn networks(&mut self) {
        for (owner, addr) in [
            (network::PODS, POD),
            (network::SERVICES, FREE),
            (network::sources_of(SERVICE), CLIENT),
            (network::NODES, OTHER_NODE),
            (network::SELF, NODE),
            (network::SELF, NODE_TOO),
        ] {
            self.node.maps.network(owner, addr, 32, 1);
            self.model.networks.borrow_mut().insert((owner, F::addr(addr)));
        }
        self.node.maps.service_address(VIP, frontend::ADDRESS);
        let address = Frontend { flags: frontend::ADDRESS, service: 0, ..no_rings() };
        self.model.set_frontend((F::addr(VIP), [0; 2], 0), address);
        self.node.maps.service_network(VIP);
        self.model.service_network(F::addr(VIP));
        let beside = Route::Hop {
            ifindex: self.node.ifindex_too,
            dmac: BESIDE_MAC,
            smac: self.node.mac_too,
            mtu: MTU_TOO,
        };
        self.model.routes.borrow_mut().extend([
            (F::addr(BESIDE), beside),
            (F::addr(UNRESOLVED), Route::NoNeighbour { ifindex: self.node.ifindex }),
            (F::addr(NODE), Route::Local),
            (F::addr(NODE_TOO), Route::Local),
        ]);
    }

    /// Begins anew, without flows and with other services.
    pub(crate) fn begin(&mut self) {
        self.node.forget_all();
        self.arrived.clear();
        self.seen.clear();
        self.pieces.clear();
        self.model.established.borrow_mut().clear();
        self.model.embryonic.borrow_mut().clear();
        self.model.affinities.borrow_mut().clear();
        self.model.fragments.borrow_mut().clear();
        self.model.rings.borrow_mut().clear();
        let flags = self.dice.of(&[CAPABLE, CAPABLE, CAPABLE, 0]);
        let device = |snat, flags, mtu, mac| Device { snat, flags, mtu, mac, zero: [0; 2] };
        for (ifindex, device) in [
            (self.node.ifindex, device(NODE, CAPABLE, 1500, self.node.mac)),
            (self.node.ifindex_too, device(NODE_TOO, flags, MTU_TOO.into(), self.node.mac_too)),
        ] {
            self.node.device(ifindex, device);
            let Device { snat, flags, mtu, mac, zero } = device;
            self.model.device(ifindex, Device { snat: F::addr(snat), flags, mtu, mac, zero });
        }
        let masquerade_wire = self.dice.below(2) as u32;
        let direct = self.dice.of(&[0, direct::TCP, direct::TCP | direct::OTHERS | direct::NODE_PORTS]);
        self.configure(|config| {
            (config.clock, config.masquerade_wire) = (config.clock + 1_000, masquerade_wire);
            config.direct = direct;
        });
        self.generation += 1;
        for proto in TRANSPORTS {
            for at in 0..BACKENDS.len() {
                self.backend(proto, at);
            }
            for vip in VIPS {
                self.frontend(vip, proto);
            }
        }
        self.model.route.set(self.route());
        self.raise_epoch();
    }

    /// What the model's routing table says, as the kernel's does.
    fn route(&self) -> Route {
        let (ifindex, smac) = (self.node.ifindex, self.node.mac);
        if self.has_neighbour {
            Route::Hop { ifindex, dmac: GATEWAY_MAC, smac, mtu: 1500 }
        } else {
            Route::NoNeighbour { ifindex }
        }
    }

    /// Writes a backend, of the generation at hand.
    fn backend(&mut self, proto: u8, at: usize) {
        let addr = BACKENDS[at];
        let id = (first_id(proto) + at) as u32;
        let is_local = addr == LOCAL;
        let lists = backend::IN_CLUSTER_LIST | backend::IN_LOCAL_LIST;
        let flags = if is_local { backend::LOCAL | lists } else { backend::IN_CLUSTER_LIST };
        let on = if is_local { NOWHERE } else { self.dice.of(&[NOWHERE, OTHER_NODE, BESIDE, UNRESOLVED]) };
        self.node.write_backend(id, addr, proto, flags, self.generation, on);
        let node = if on == NOWHERE { F::Addr::UNSPECIFIED } else { F::addr(on) };
        let port = TARGET.to_be_bytes();
        let (addr, generation) = (F::addr(addr), self.generation);
        self.model.set_backend(id, Backend { addr, port, proto, flags, generation, service: SERVICE, node });
    }

    /// Gives a frontend new rings and rules.
    fn frontend(&mut self, vip: Addr, proto: u8) {
        let (ring, slots) = self.ring(proto);
        let (inner_ring, inner_slots) = if self.dice.once_in(3) { self.ring(proto) } else { (ring, slots) };
        let mut flags = frontend::MASQUERADE_EXTERNAL;
        for (flag, times) in [
            (frontend::HAS_ENDPOINTS, 2),
            (frontend::RESTRICTED, 8),
            (frontend::DISTINGUISHES_PODS, 2),
            (frontend::MASQUERADE_POD, 2),
            (frontend::LOCAL, 8),
            (frontend::MASQUERADE_EXTERNAL, 4),
        ] {
            if self.dice.once_in(times) {
                flags ^= flag;
            }
        }
        if vip == NODE {
            flags |= frontend::NODE_ADDRESS;
        }
        if vip == ANY_NODE || (vip == NODE && self.dice.once_in(2)) {
            flags |= frontend::NODE_PORT;
        }
        let affinity_seconds = self.dice.of(&[0, 0, 3]);
        let frontend =
            Frontend { service: SERVICE, ring, slots, inner_ring, inner_slots, flags, affinity_seconds };
        self.node.set_frontend(vip, proto, frontend);
        self.model.set_frontend((F::addr(vip), HTTP.to_be_bytes(), proto), frontend);
    }

    /// Writes a ring: its first slot, and how many it has.
    fn ring(&mut self, proto: u8) -> (u32, u32) {
        let first = first_id(proto);
        let slots = if self.dice.once_in(4) { 0 } else { 1 + self.dice.below(3) };
        let ids: Vec<u32> = (0..slots).map(|_| (first + self.dice.below(BACKENDS.len())) as u32).collect();
        self.model.rings.borrow_mut().extend(&ids);
        self.node.ring(&ids)
    }

    /// One random thing happens.
    pub(crate) fn happen(&mut self) {
        let proto = self.dice.of(&TRANSPORTS);
        match self.dice.below(1_000) {
            0..510 => self.send(proto),
            510..970 => self.answer(),
            970..980 => {
                let vip = self.dice.of(&VIPS);
                self.frontend(vip, proto);
            }
            980..983 => self.move_neighbour(),
            983..988 => {
                self.generation += 1;
                let at = self.dice.below(BACKENDS.len());
                self.backend(proto, at);
            }
            _ => self.tick(),
        }
    }

    /// A packet of a client, in some form.
    pub(crate) fn client_frame(&mut self, proto: u8) -> Frame {
        let (port, vip) = (self.dice.of(&PORTS), self.dice.of(&[VIP, VIP, VIP_TOO, NODE, OTHER_NODE]));
        let opener = self.node.opener(proto, port, vip);
        let src = HOSTS[self.dice.below(4)];
        let mut frame = self.form(opener).with(|frame| frame.src.0 = src);
        match self.dice.below(60) {
            0 => frame.dst.1 = 81,
            1 => frame.dst.0 = FREE,
            // A backend that reaches itself.
            2 => frame.src.0 = self.dice.of(&BACKENDS),
            3 => frame.src.0 = self.dice.of(&HOSTS),
            4 => frame.dst.0 = ANY_NODE,
            _ => {}
        }
        frame
    }

    /// An answer to something a backend has seen, in some form.
    pub(crate) fn backend_frame(&mut self) -> Option<Frame> {
        let last = self.arrived.len().checked_sub(1)?;
        let seen = self.arrived[self.dice.below(last + 1)];
        let plain = self.node.frame(seen.proto, (GATEWAY_MAC, self.node.mac), seen.dst, seen.src);
        Some(self.form(plain))
    }

    fn send(&mut self, proto: u8) {
        let sent = self.client_frame(proto);
        if self.dice.once_in(6) {
            return self.sends_on(&sent);
        }
        self.comes_in(&sent.bytes());
    }

    /// A client's packet comes by another node.
    fn sends_on(&mut self, sent: &Frame) {
        let bytes = self.tunnelled(&sent.bytes(), sent.total_len(), sent.tos);
        self.comes_in(&bytes);
    }

    /// A frame with its IP packet in another one, as nodes send it on.
    pub(crate) fn tunnelled(&mut self, frame: &[u8], len: usize, tos: u8) -> Vec<u8> {
        let from = self.dice.of(&[OTHER_NODE, OTHER_NODE, OTHER_NODE, CLIENT]);
        let to = self.dice.of(&[NODE, NODE, NODE, NODE_TOO]);
        let [from, to] = [from, to].map(|name| self.node.family.octets(name));
        let outer = surrounding(self.node.family, tos, len, &from, &to);
        [&frame[..ETHERNET], &outer[..], &frame[ETHERNET..]].concat()
    }

    fn answer(&mut self) {
        let Some(answer) = self.backend_frame() else { return };
        match answer.src.0 {
            LOCAL => self.goes_out(&answer.bytes()),
            BESIDE => {
                let answer = answer.with(|frame| frame.mac = (BESIDE_MAC, self.node.mac_too));
                self.comes_in_beside(&answer.bytes());
            }
            _ => self.comes_in(&answer.bytes()),
        }
    }

    /// Some form of a packet.
    fn form(&mut self, plain: Frame) -> Frame {
        let mut frame = plain.flags(self.dice.of(&FLAGS));
        frame.payload = vec![0x5a; 2 * self.dice.below(40)];
        match self.dice.below(24) {
            0 => frame.ttl = 1,
            1 => frame.payload = vec![0xa5; 1_600],
            2 => frame.options = vec![1; 4 * (1 + self.dice.below(10))],
            3 => frame.payload.push(7),
            4 => frame.check = Check::Offloaded,
            // All ones is no finished checksum but another form of none.
            5 if frame.proto != SCTP && frame.payload(&[0; 2]).pseudo_sum() != u16::MAX => {
                frame.payload.clear();
                return frame.looking_offloaded();
            }
            6 if frame.proto == UDP => frame.check = Check::Absent,
            7 => frame.padding = vec![0xee; 6],
            8 => frame.mac.1 = [2, 9, 9, 9, 9, 9],
            9 => frame.tos = 0xb8,
            _ => {}
        }
        frame
    }

    /// A packet comes in: XDP first, tc behind it, and out again where it goes up and is not for here.
    pub(crate) fn comes_in(&mut self, frame: &[u8]) {
        let inner = self.taken_out(self.node.entry, frame);
        let (mut action, mut after) = self.agree(self.node.entry, frame);
        let frame = inner.as_deref().unwrap_or(frame);
        if action == Action::Pass && after == frame {
            (action, after) = self.agree(Hook::TcIngress, frame);
        }
        if action == Action::Pass && after != frame && !self.arrives(&after) {
            self.goes_out(&after);
        } else if action != Action::Pass {
            self.arrives(&after);
        }
    }

    /// The same by the second interface.
    pub(crate) fn comes_in_beside(&mut self, frame: &[u8]) {
        self.node.from = self.node.ifindex_too;
        self.comes_in(frame);
        self.node.from = self.node.ifindex;
    }

    /// A packet leaves.
    pub(crate) fn goes_out(&mut self, frame: &[u8]) {
        let (_, after) = self.agree(Hook::TcEgress, frame);
        if after != frame {
            self.arrives(&after);
        }
    }

    /// Remembers a packet that is addressed to a backend; whether it needs no more translation.
    fn arrives(&mut self, frame: &[u8]) -> bool {
        let Parsed::Packet(packet) = F::read_frame(frame, 0) else { return false };
        let named = |addr, port| Some((*self.names.get(&addr)?, u16::from_be_bytes(port)));
        let key = packet.key;
        let (Some(src), Some(dst)) = (named(key.src, key.sport), named(key.dst, key.dport)) else {
            return false;
        };
        if dst.1 != TARGET {
            return false;
        }
        self.arrived.truncate(ARRIVED_MAX - 1);
        self.arrived.insert(0, Arrived { proto: key.proto, src, dst });
        dst.0 == LOCAL
    }

    /// The gateway's neighbour entry goes, or comes back.
    fn move_neighbour(&mut self) {
        self.has_neighbour = !self.has_neighbour;
        if self.has_neighbour {
            let gateway = self.node.family.ip(GATEWAY);
            let added = self.node.namespace.static_neighbour("eth0", gateway, GATEWAY_MAC);
            added.expect("a neighbour can be added");
        } else {
            forget_gateway(&self.node);
        }
        self.model.route.set(self.route());
        self.raise_epoch();
    }

    pub(crate) fn configure(&mut self, edit: impl Fn(&mut Config)) {
        self.node.configure(&edit);
        let mut config = self.model.config.get();
        edit(&mut config);
        self.model.config.set(config);
    }

    fn raise_epoch(&mut self) {
        self.configure(|config| config.epoch += 1);
    }

    /// Time passes, and routes are looked at again.
    fn tick(&mut self) {
        self.configure(|config| (config.epoch, config.clock) = (config.epoch + 1, config.clock + 1));
    }
}

fn no_rings() -> Frontend {
    Frontend { service: 0, ring: 0, slots: 0, inner_ring: 0, inner_slots: 0, flags: 0, affinity_seconds: 0 }
}

fn forget_gateway(node: &Node) {
    let (family, gateway) = match node.family {
        Family::V4 => (AddressFamily::Inet, NeighbourAddress::Inet(GATEWAY.into())),
        Family::V6 => (AddressFamily::Inet6, NeighbourAddress::Inet6(V6::addr(GATEWAY).octets().into())),
    };
    let neighbours = node.namespace.netlink().neighbours();
    let entries = neighbours.get().set_address_family(family).execute();
    let entries = block_on(entries.try_collect::<Vec<_>>()).expect("neighbours can be listed");
    let gateway = NeighbourAttribute::Destination(gateway);
    let entry = entries.into_iter().find(|entry| entry.attributes.contains(&gateway));
    let entry = entry.expect("the gateway is a neighbour");
    block_on(node.namespace.netlink().neighbours().del(entry).execute()).expect("a neighbour can be removed");
}
