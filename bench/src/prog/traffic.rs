//! What is replayed: addresses, frames and flows of either family.

use std::collections::HashMap;

use xdp_common::{
    conntrack::{mirror, opposite, translate},
    frame::Headers,
    net::{Address, FlowKey, Ip6, TCP, V4, V6},
    select::known_bit,
    tables::{self, Flow, Mapped, exit, kind},
};

/// A host by the last 32 bits of its address, the only ones in IPv4.
pub(super) type Host = u32;

pub(super) const CLIENT: Host = 0xc633_0000; // 198.51.0.0
pub(super) const FRONTEND: Host = 0xcb00_710a; // 203.0.113.10
pub(super) const NODE: Host = 0xc0a8_320a; // 192.168.50.10
pub(super) const GATEWAY: Host = 0xc0a8_3201; // 192.168.50.1
pub(super) const BACKEND: Host = 0x0a40_0000; // 10.64.0.0
pub(super) const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(super) const PORT: [u8; 2] = [0, 80];
const CLIENT_PORT: [u8; 2] = [0xc0, 0x01];
const SNAT_PORT: [u8; 2] = [0x20, 0x01];

/// Bytes that the wrapper restores before each run, as in the lab's object: Ethernet, IPv6 and TCP headers.
pub(super) const TEMPLATE_LEN: usize = 76;
const ETHERNET: usize = 14;

/// A family with traffic of its own.
pub(super) trait Traffic: Headers<Addr: Mapped> {
    /// Whether the wrapper is to vary the source address of IPv6.
    const IS_V6: u32;
    /// The address of a host.
    fn addr(host: Host) -> Self::Addr;
    /// An IP header over a TCP header without payload.
    fn header(key: &FlowKey<Self::Addr>) -> Vec<u8>;
}

impl Traffic for V4 {
    const IS_V6: u32 = 0;

    fn addr(host: Host) -> [u8; 4] {
        host.to_be_bytes()
    }

    fn header(key: &FlowKey<[u8; 4]>) -> Vec<u8> {
        let fields = [0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, TCP, 0, 0];
        [&fields[..], &key.src, &key.dst].concat()
    }
}

impl Traffic for V6 {
    const IS_V6: u32 = 1;

    fn addr(host: Host) -> Ip6 {
        Ip6::from_quads([[0xfd, 0, 0x0d, 0xb8], [0; 4], [0; 4], host.to_be_bytes()])
    }

    fn header(key: &FlowKey<Ip6>) -> Vec<u8> {
        let fields = [0x60, 0, 0, 0, 0, 20, TCP, 64];
        [&fields[..], &key.src.octets(), &key.dst.octets()].concat()
    }
}

/// Headers of a TCP segment without payload; its checksum is not what an offloading sender leaves.
pub(super) fn frame<F: Traffic>(key: &FlowKey<F::Addr>, mac: [u8; 6], tcp_flags: u8) -> [u8; TEMPLATE_LEN] {
    let mut tcp = [0u8; 20];
    tcp[0..2].copy_from_slice(&key.sport);
    tcp[2..4].copy_from_slice(&key.dport);
    tcp[12..14].copy_from_slice(&[0x50, tcp_flags]);
    tcp[16..18].copy_from_slice(&[0x12, 0x34]);
    let ethernet = [&mac[..], &GATEWAY_MAC, &F::ETHERTYPE.to_be_bytes()].concat();
    let bytes = [&ethernet[..], &F::header(key), &tcp].concat();
    let mut frame = [0; TEMPLATE_LEN];
    frame[..bytes.len()].copy_from_slice(&bytes);
    frame
}

/// Length of the shortest frame: headers of IPv6 and TCP.
pub(super) const FRAME_LEN: usize = (ETHERNET + 40 + 20).next_multiple_of(16);

/// The forward half of a flow toward a backend elsewhere; each has a client and a backend of its own.
pub(super) fn forward<F: Traffic>(
    index: u32,
    ifindex: u32,
    mac: [u8; 6],
) -> (FlowKey<F::Addr>, Flow<F::Addr>) {
    let key = FlowKey {
        src: F::addr(CLIENT + index),
        dst: F::addr(FRONTEND),
        sport: CLIENT_PORT,
        dport: PORT,
        proto: TCP,
        zero: [0; 3],
    };
    let (src, dst) = (F::addr(NODE), F::addr(BACKEND + index));
    let after = FlowKey { src, dst, sport: SNAT_PORT, ..key };
    let mut flow = Flow {
        dmac: GATEWAY_MAC,
        smac: mac,
        ifindex,
        backend: 1,
        generation: 1,
        service: 1,
        mtu: 1500,
        kind: kind::FORWARD,
        exit: exit::TRANSMIT,
        ..Flow::ZERO
    };
    translate(&mut flow, &key, &after);
    (key, flow)
}

/// Which way flows take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    /// Both addresses are translated, and answers come back.
    Translated,
    /// In a packet to the backend's node, which answers.
    Tunnelled,
}

/// The same flow through a tunnel, to the address that its backend has otherwise.
fn tunnelled<A: Address>(key: &FlowKey<A>, flow: Flow<A>) -> Flow<A> {
    Flow {
        sport: key.sport,
        dport: key.dport,
        addr_delta: 0,
        l4_delta: 0,
        kind: kind::TUNNEL,
        exit: exit::TUNNEL,
        ..flow
    }
}

/// Flows by their keys.
pub(super) type FlowTable<A> = HashMap<FlowKey<A>, Flow<A>>;

/// Both halves of so many flows, and the words of the bits that say which keys are known.
pub(super) fn flows<F: Traffic>(
    flows: u32,
    ifindex: u32,
    mac: [u8; 6],
    sort: Sort,
) -> (FlowTable<F::Addr>, Vec<u64>) {
    let mut entries = HashMap::new();
    let mut known = vec![0u64; tables::KNOWN_WORDS as usize];
    for index in 0..flows {
        let (key, flow) = forward::<F>(index, ifindex, mac);
        if sort == Sort::Tunnelled {
            let bit = known_bit(&key);
            known[(bit / 64) as usize] |= 1 << (bit % 64);
            entries.insert(key, tunnelled(&key, flow));
            continue;
        }
        let mut reply = Flow::ZERO;
        mirror(&key, &flow, kind::REPLY_REMOTE, exit::KERNEL, &mut reply);
        for (key, flow) in [(opposite(&key, &flow), reply), (key, flow)] {
            let bit = known_bit(&key);
            known[(bit / 64) as usize] |= 1 << (bit % 64);
            entries.insert(key, flow);
        }
    }
    (entries, known)
}
