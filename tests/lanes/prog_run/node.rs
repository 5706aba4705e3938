//! A node: the loaded programs with maps of their own, and a namespace that answers for routes and neighbours.

use std::net::IpAddr;

use xdp_agent_tests::lab::{link, netns::Namespace};
use xdp_common::{
    net::{Address as _, V4, V6},
    select,
    tables::{Backend, Config, Device, Frontend, backend, device, frontend},
    verdict::{Counter, Event},
};

use crate::{
    family::Family,
    frames::{ETHERNET, Frame, Mac, Socket},
    maps::{self, Maps, Typed},
    programs::Programs,
};

pub(crate) use crate::programs::{Action, Hook, Sizes};

pub(crate) use crate::family::Addr;

pub(crate) const CLIENT: Addr = [198, 51, 100, 2];
pub(crate) const VIP: Addr = [203, 0, 113, 10];
pub(crate) const VIP_TOO: Addr = [203, 0, 113, 20];
/// Address of the node on its uplink.
pub(crate) const NODE: Addr = [192, 168, 50, 10];
/// Address of the node on its second interface.
pub(crate) const NODE_TOO: Addr = [192, 168, 60, 10];
/// A backend on this node.
pub(crate) const LOCAL: Addr = [10, 244, 1, 2];
/// Backends behind the gateway of the uplink.
pub(crate) const REMOTE: Addr = [10, 244, 2, 2];
pub(crate) const REMOTE_TOO: Addr = [10, 244, 2, 3];
/// A neighbour on the uplink's link that is not resolved.
pub(crate) const UNRESOLVED: Addr = [192, 168, 50, 77];
/// A neighbour on the second interface.
pub(crate) const BESIDE: Addr = [192, 168, 60, 2];
/// Another node, behind the gateway of the uplink.
pub(crate) const OTHER_NODE: Addr = [192, 168, 70, 20];
/// The address of frontends that are NodePorts of all other nodes.
pub(crate) const ANY_NODE: Addr = [0; 4];
pub(crate) const GATEWAY: Addr = [192, 168, 50, 1];
pub(crate) const GATEWAY_MAC: Mac = [2, 0, 0, 0, 0, 1];
pub(crate) const BESIDE_MAC: Mac = [2, 0, 0, 0, 0, 6];
/// MTU of the second interface.
pub(crate) const MTU_TOO: u16 = 1280;
/// Port of every frontend.
pub(crate) const HTTP: u16 = 80;
/// Port of every backend.
pub(crate) const TARGET: u16 = 8080;
/// The ports that are reserved for translated sources.
pub(crate) const SNAT_PORTS: (u16, u16) = (1024, 29_999);
/// Flags of a device that can do everything.
pub(crate) const CAPABLE: u32 = device::TRANSMIT | device::REDIRECT | device::ETHERNET;

/// What came out of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) action: Action,
    pub(crate) frame: Vec<u8>,
    /// Names of the counters that were raised, once for each time, sorted.
    pub(crate) counts: Vec<String>,
    /// Whether an established flow has a next hop that was asked for by this frame.
    pub(crate) refreshed: bool,
}

/// A node with two managed interfaces and no service, as it is in one address family.
pub(crate) struct Node {
    pub(crate) family: Family,
    pub(crate) maps: Box<dyn Maps>,
    pub(crate) namespace: Namespace,
    pub(crate) ifindex: u32,
    pub(crate) mac: Mac,
    pub(crate) ifindex_too: u32,
    pub(crate) mac_too: Mac,
    /// The XDP program under test.
    pub(crate) entry: Hook,
    /// Index of the interface that frames come in by, or leave by at egress.
    pub(crate) from: u32,
    config: Config,
    backends: u32,
    slots: u32,
    programs: Programs,
    _peer: Namespace,
}

/// The agent's settings.
pub(crate) fn settings(sizes: Sizes) -> Config {
    Config {
        epoch: 1,
        clock: 100,
        snat_port_min: SNAT_PORTS.0,
        snat_port_max: SNAT_PORTS.1,
        embryonic_buckets: sizes.buckets,
        established_homes: select::homes(sizes.established),
        masquerade_wire: 0,
        policy_routing: 0,
        echo: 1,
        direct: 0,
    }
}

impl Node {
    /// Runs a test on fresh nodes: of IPv4 for each of the two XDP programs, which have to behave alike, and of IPv6.
    /// Each is loaded by the verifier anew, which takes most of the time; long sequences drive IPv6 through both.
    pub(crate) fn each(test: impl Fn(&mut Self)) {
        Self::each_sized(Sizes::default(), test);
    }

    /// The same with flow tables of these sizes.
    pub(crate) fn each_sized(sizes: Sizes, test: impl Fn(&mut Self)) {
        Self::each_of(Family::V4, sizes, &test);
        test(&mut Self::new(Family::V6, Hook::Xdp, sizes));
    }

    /// The same for one family.
    pub(crate) fn each_of(family: Family, sizes: Sizes, test: impl Fn(&mut Self)) {
        for entry in [Hook::Xdp, Hook::XdpFrags] {
            test(&mut Self::new(family, entry, sizes));
        }
    }

    /// A node with one of the XDP programs and both tc programs.
    pub(crate) fn new(family: Family, entry: Hook, sizes: Sizes) -> Self {
        let mut programs = Programs::open(sizes);
        let (namespace, peer) = network(family).expect("a namespace with two interfaces");
        let device = |name: &str| {
            let index = namespace.index(name).expect("a device that was just made");
            (index, namespace.mac(name).expect("an Ethernet device has an address"))
        };
        let ((ifindex, mac), (ifindex_too, mac_too)) = (device("eth0"), device("eth1"));
        let maps: Box<dyn Maps> = match family {
            Family::V4 => Box::new(Typed::<V4>::of(programs.object())),
            Family::V6 => Box::new(Typed::<V6>::of(programs.object())),
        };
        let mut node = Self {
            family,
            maps,
            namespace,
            ifindex,
            mac,
            ifindex_too,
            mac_too,
            entry,
            from: ifindex,
            config: settings(sizes),
            backends: 0,
            slots: 0,
            programs,
            _peer: peer,
        };
        node.configure(|_| {});
        node.device(ifindex, Device { snat: NODE, flags: CAPABLE, mtu: 1500, mac, zero: [0; 2] });
        let too = Device { snat: NODE_TOO, flags: CAPABLE, mtu: MTU_TOO.into(), mac: mac_too, zero: [0; 2] };
        node.device(ifindex_too, too);
        node
    }

    /// Changes the agent's settings.
    pub(crate) fn configure(&mut self, edit: impl FnOnce(&mut Config)) {
        edit(&mut self.config);
        self.maps.configure(self.config);
    }

    /// Raises the routing epoch, as the agent does when routes or neighbours change.
    pub(crate) fn raise_epoch(&mut self) {
        self.configure(|config| config.epoch += 1);
    }

    /// Makes an interface a managed one.
    pub(crate) fn device(&mut self, ifindex: u32, device: Device<Addr>) {
        self.maps.device(ifindex, device);
    }

    /// Adds a backend and returns its id.
    pub(crate) fn backend(&mut self, addr: Addr, proto: u8, is_local: bool) -> u32 {
        self.backends += 1;
        self.set_backend(self.backends, addr, proto, is_local, 1);
        self.backends
    }

    /// Adds a backend on another node, to which packets may go as they are, and returns its id.
    pub(crate) fn backend_on(&mut self, node: Addr, addr: Addr, proto: u8) -> u32 {
        self.backends += 1;
        self.write_backend(self.backends, addr, proto, backend::IN_CLUSTER_LIST, 1, node);
        self.backends
    }

    /// Writes a backend under an id.
    pub(crate) fn set_backend(&mut self, id: u32, addr: Addr, proto: u8, is_local: bool, generation: u32) {
        let lists = backend::IN_CLUSTER_LIST | backend::IN_LOCAL_LIST;
        let flags = if is_local { backend::LOCAL | lists } else { backend::IN_CLUSTER_LIST };
        self.write_backend(id, addr, proto, flags, generation, Addr::UNSPECIFIED);
    }

    /// The same with all that it has; the node is unspecified where packets do not go as they are.
    pub(crate) fn write_backend(
        &mut self,
        id: u32,
        addr: Addr,
        proto: u8,
        flags: u8,
        generation: u32,
        node: Addr,
    ) {
        let port = TARGET.to_be_bytes();
        self.maps.backend(id, Backend { addr, port, proto, flags, generation, service: 1, node });
    }

    /// Makes an address a frontend whose ring holds these backends in turn.
    pub(crate) fn frontend(&mut self, addr: Addr, proto: u8, backends: &[u32], flags: u32) {
        let (ring, slots) = self.ring(backends);
        let frontend = Frontend {
            service: 1,
            ring,
            slots,
            inner_ring: ring,
            inner_slots: slots,
            flags: flags | frontend::MASQUERADE_EXTERNAL,
            affinity_seconds: 0,
        };
        self.set_frontend(addr, proto, frontend);
    }

    /// Writes a ring that holds these backends in turn: its first slot, and how many it has.
    pub(crate) fn ring(&mut self, backends: &[u32]) -> (u32, u32) {
        let first = self.slots;
        for &id in backends {
            self.maps.slot(self.slots, id);
            self.slots += 1;
        }
        (first, backends.len() as u32)
    }

    /// Makes an address a frontend.
    pub(crate) fn set_frontend(&mut self, addr: Addr, proto: u8, frontend: Frontend) {
        self.maps.frontend(addr, HTTP, proto, frontend);
    }

    /// The first frame of a flow from the client to a frontend, as the gateway hands it over.
    pub(crate) fn opener(&self, proto: u8, sport: u16, vip: Addr) -> Frame {
        self.frame(proto, (GATEWAY_MAC, self.mac), (CLIENT, sport), (vip, HTTP))
    }

    /// A frame of the node's family, without payload.
    pub(crate) fn frame(&self, proto: u8, mac: (Mac, Mac), src: Socket, dst: Socket) -> Frame {
        Frame::new(self.family, proto, mac, src, dst)
    }

    /// The shortest IP frame that the kernel makes an skb of for a test run: both headers.
    pub(crate) fn skb_min(&self) -> usize {
        ETHERNET + self.family.header_len()
    }

    /// Runs a frame through a program.
    pub(crate) fn run(&self, hook: Hook, frame: &[u8]) -> Outcome {
        self.try_run(hook, frame)
            .unwrap_or_else(|error| panic!("{hook:?} with {} bytes: {error}", frame.len()))
    }

    /// Runs a frame through a program, if the kernel accepts it.
    pub(crate) fn try_run(&self, hook: Hook, frame: &[u8]) -> Result<Outcome, aya::programs::ProgramError> {
        let (before, routing) = (self.maps.counts(), self.maps.routing(frame));
        let context = self.context(hook, frame.len());
        // The interface in the context is looked up in the namespace of the thread.
        let (action, out) = self.programs.run(hook, &self.namespace, frame, &context)?;
        let (counts, refreshed) = raised(&before, &self.maps.counts());
        match (routing, self.maps.routing(frame)) {
            // Brought along from the table of new flows, or asked for at once.
            (None, Some(_)) => {}
            // Of no flow, or of one that a frame does not tell by itself: a later fragment, an error, a packet in a packet.
            // Theirs is refreshed by the kernel's clock, whenever that is.
            (None, None) => {}
            (before, after) => {
                assert_eq!(refreshed, after.is_some() && after != before, "refreshed next hops")
            }
        }
        Ok(Outcome { action, frame: out, counts, refreshed })
    }

    /// What a program does with a frame, run on a thread that is in the node's namespace.
    pub(crate) fn run_here(&self, hook: Hook, frame: &[u8]) -> (Action, Vec<u8>) {
        self.programs
            .run_here(hook, frame, &self.context(hook, frame.len()))
            .unwrap_or_else(|error| panic!("{hook:?} with {} bytes: {error}", frame.len()))
    }

    /// Forgets every flow, affinity and ring.
    pub(crate) fn forget_all(&mut self) {
        self.maps.forget_all();
        self.slots = 0;
    }

    /// A `struct xdp_md` or `struct __sk_buff` for a frame on the uplink.
    fn context(&self, hook: Hook, len: usize) -> Vec<u8> {
        let mut context;
        let ifindex_at = match hook {
            Hook::Xdp | Hook::XdpFrags => {
                context = vec![0u8; XDP_MD_LEN];
                context[XDP_MD_DATA_END..][..4].copy_from_slice(&(len as u32).to_ne_bytes());
                XDP_MD_INGRESS_IFINDEX
            }
            Hook::TcIngress | Hook::TcEgress => {
                context = vec![0u8; SK_BUFF_LEN];
                SK_BUFF_IFINDEX
            }
        };
        context[ifindex_at..][..4].copy_from_slice(&self.from.to_ne_bytes());
        context
    }

    /// Runs a frame and compares everything that comes out with what is expected.
    pub(crate) fn check(
        &self,
        name: &str,
        hook: Hook,
        frame: &[u8],
        action: Action,
        expected: &[u8],
        counts: &[Counter],
    ) -> Outcome {
        let outcome = self.run(hook, frame);
        outcome.check(&format!("{name}, at {hook:?}"), action, expected, counts);
        outcome
    }
}

impl Outcome {
    /// Compares everything with what is expected.
    pub(crate) fn check(&self, name: &str, action: Action, expected: &[u8], counts: &[Counter]) {
        let mut names: Vec<String> = counts.iter().map(|counter| maps::name(counter.index())).collect();
        names.sort();
        assert_eq!((self.action, &self.counts), (action, &names), "{name}");
        assert!(
            self.frame == expected,
            "{name}: the frame came out as\n{}, not as\n{}",
            hex(&self.frame),
            hex(expected)
        );
    }
}

/// Layout of `struct xdp_md` and `struct __sk_buff` in `linux/bpf.h`.
const XDP_MD_LEN: usize = 24;
const XDP_MD_DATA_END: usize = 4;
const XDP_MD_INGRESS_IFINDEX: usize = 12;
const SK_BUFF_LEN: usize = 192;
const SK_BUFF_IFINDEX: usize = 40;

/// The counters that were raised, and whether a next hop was refreshed. That one depends on the kernel's clock too, so it
/// is compared with what has happened to the flow, not with what a case expects.
fn raised(before: &[u64], after: &[u64]) -> (Vec<String>, bool) {
    let mut names = Vec::new();
    let mut refreshed = 0;
    for (index, (before, after)) in before.iter().zip(after).enumerate() {
        let times = after - before;
        if index as u32 == Counter::Event(Event::HopRefreshed).index() {
            refreshed = times;
            continue;
        }
        names.extend((0..times).map(|_| maps::name(index as u32)));
    }
    names.sort();
    assert!(refreshed <= 1, "one packet refreshes one next hop, not {refreshed}");
    (names, refreshed == 1)
}

fn hex(frame: &[u8]) -> String {
    let shown = &frame[..frame.len().min(96)];
    let pairs: Vec<String> =
        shown.chunks(2).map(|pair| pair.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
    format!("{} ({} bytes)", pairs.join(" "), frame.len())
}

/// The uplink with its gateway, and a second interface with a neighbour.
fn network(family: Family) -> anyhow::Result<(Namespace, Namespace)> {
    let node = Namespace::new("prog-node")?;
    let peer = Namespace::new("prog-peer")?;
    for (name, address) in [("eth0", NODE), ("eth1", NODE_TOO)] {
        link::veth(&node, name, &peer, name)?;
        node.enable_v6(name)?;
        node.address(name, family.ip(address), family.prefix(24))?;
    }
    node.mtu("eth1", MTU_TOO.into())?;
    let forwarding = match family.ip(GATEWAY) {
        IpAddr::V4(gateway) => {
            node.route_via([0, 0, 0, 0].into(), 0, gateway)?;
            "net/ipv4/ip_forward"
        }
        IpAddr::V6(gateway) => {
            node.default_route_v6(gateway)?;
            "net/ipv6/conf/all/forwarding"
        }
    };
    node.static_neighbour("eth0", family.ip(GATEWAY), GATEWAY_MAC)?;
    node.static_neighbour("eth1", family.ip(BESIDE), BESIDE_MAC)?;
    node.sysctl(forwarding, "1")?;
    Ok((node, peer))
}
