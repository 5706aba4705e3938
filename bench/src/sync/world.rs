//! A cluster by numbers: which Service has which addresses, and which pods are behind it.

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};

/// The node whose proxy is measured.
pub(crate) const NODE: &str = "node-0";
/// The address of that node on which NodePorts are served.
pub(crate) const NODE_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 10);
/// ServiceCIDR, large enough for every size.
pub(crate) const SERVICE_CIDR: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 96, 0, 0), 12);
/// Pods of all nodes; each node has a /24 of it.
pub(crate) const POD_CIDR: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 128, 0, 0), 9);
/// Port of every Service.
pub(crate) const PORT: u16 = 80;
/// Port of every pod.
pub(crate) const TARGET_PORT: u16 = 8080;

/// Pods on a node, near the kubelet's limit of 110: so a larger cluster has more nodes, not fuller ones.
const PODS_PER_NODE: u32 = 100;
/// Beyond the usual range of NodePorts, which ends at 32,767 and is too small for half of 10,000 Services.
const NODE_PORT_MIN: u32 = 30_000;
const SERVICES_MAX: u32 = (u16::MAX as u32 - NODE_PORT_MIN) * 2;
const NAMESPACES: u32 = 40;

/// Services of one size, and the pods behind each, by number.
pub(crate) struct World {
    endpoints: usize,
    nodes: u32,
    /// Endpoints of the first Service, then of the second, and so on.
    pods: Vec<u32>,
    /// Pods there have ever been.
    born: u32,
    random: u64,
}

/// One endpoint has been replaced by a new pod.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Replacement {
    pub(crate) service: u32,
    /// The pod that went.
    pub(crate) gone: u32,
    /// The pod that came.
    pub(crate) pod: u32,
}

impl World {
    pub(crate) fn new(services: u32, endpoints: u32) -> Result<Self> {
        ensure!(
            (1..=SERVICES_MAX).contains(&services),
            "--services takes 1 to {SERVICES_MAX}, not {services}"
        );
        // One slice holds at most 100 endpoints, as the controller makes them.
        ensure!((1..=100).contains(&endpoints), "--endpoints takes 1 to 100, not {endpoints}");
        let born = services * endpoints;
        Ok(Self {
            endpoints: endpoints as usize,
            nodes: born.div_ceil(PODS_PER_NODE),
            pods: (0..born).collect(),
            born,
            random: 0x9e37_79b9_7f4a_7c15,
        })
    }

    pub(crate) fn services(&self) -> std::ops::Range<u32> {
        0..(self.pods.len() / self.endpoints) as u32
    }

    pub(crate) fn pods(&self, service: u32) -> &[u32] {
        let first = service as usize * self.endpoints;
        &self.pods[first..first + self.endpoints]
    }

    /// Replaces one endpoint of a Service chosen at random, as a rolling update does.
    pub(crate) fn replace(&mut self) -> Replacement {
        let index = (self.next_random() % self.pods.len() as u64) as usize;
        let pod = self.born;
        self.born += 1;
        let gone = std::mem::replace(&mut self.pods[index], pod);
        Replacement { service: (index / self.endpoints) as u32, gone, pod }
    }

    pub(crate) fn node_number(&self, pod: u32) -> u32 {
        pod % self.nodes
    }

    /// Whether the pod runs on the measured node.
    pub(crate) fn is_local(&self, pod: u32) -> bool {
        self.node_number(pod) == 0
    }

    pub(crate) fn pod_address(&self, pod: u32) -> Ipv4Addr {
        let host = 2 + pod / self.nodes;
        debug_assert!(host < 255, "more pods were replaced than a node has addresses");
        Ipv4Addr::from(u32::from(POD_CIDR.0) + self.node_number(pod) * 256 + host)
    }

    /// Splitmix64: the same Services change in every run.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.random)
    }
}

pub(crate) fn cluster_ip(service: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(SERVICE_CIDR.0) + 1 + service)
}

/// Every other Service has one.
pub(crate) fn node_port(service: u32) -> Option<u16> {
    service.is_multiple_of(2).then_some((NODE_PORT_MIN + service / 2) as u16)
}

pub(crate) fn namespace(service: u32) -> String {
    format!("team-{:02}", service % NAMESPACES)
}

pub(crate) fn name(service: u32) -> String {
    format!("service-{service:05}")
}

/// What kube-proxy calls the service port in comments and chain names.
pub(crate) fn port_name(service: u32) -> String {
    format!("{}/{}:http", namespace(service), name(service))
}

/// Letters and digits as in the hashes of kube-proxy's chain names, `length` of them and at most 24.
pub(crate) fn hash(kind: &str, service: u32, pod: u32) -> String {
    const BASE32: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let seed = kind
        .bytes()
        .fold(u64::from(service) << 32 | u64::from(pod), |seed, byte| mix(seed ^ u64::from(byte)));
    let bits = u128::from(mix(seed)) << 64 | u128::from(mix(seed ^ u64::MAX));
    (0..16).map(|at| char::from(BASE32[(bits >> (5 * at)) as usize % 32])).collect()
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
