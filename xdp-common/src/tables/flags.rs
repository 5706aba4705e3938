//! What the numbers in the tables mean.

/// What an entry of a flow table is for.
pub mod kind {
    /// From the client to a backend; met at ingress.
    pub const FORWARD: u8 = 1;
    /// From a backend elsewhere to our SNAT address; met at ingress.
    pub const REPLY_REMOTE: u8 = 2;
    /// From a backend on this node to the client; met at egress.
    pub const REPLY_LOCAL: u8 = 3;
    /// Half-translated by ingress, routed by the kernel, to be finished at egress; either direction.
    pub const TRANSIT: u8 = 4;
    /// From the client to a backend elsewhere, through a tunnel to its node, which answers; met at ingress. It has no other
    /// half: answers do not come by here. Its addresses are those of the packet around the client's, its ports the client's.
    pub const TUNNEL: u8 = 5;
}

/// How packets of a flow leave.
pub mod exit {
    /// Up the stack, to a backend on this node.
    pub const LOCAL: u8 = 0;
    /// Out of the interface they came in by.
    pub const TRANSMIT: u8 = 1;
    /// Out of another interface.
    pub const REDIRECT: u8 = 2;
    /// Up the stack for the kernel to route: the slow path.
    pub const KERNEL: u8 = 3;
    /// Back to the pod that they come from, by its device: it reaches itself.
    pub const HAIRPIN: u8 = 4;
    /// From a process of this node to a backend on it, and back: in again, by the interface they would leave by.
    pub const BACK: u8 = 5;
    /// From a process of this node to a backend elsewhere.
    pub const OUT: u8 = 6;
    /// In a packet to the backend's node, out of whichever interface.
    pub const TUNNEL: u8 = 7;
    /// A bit beside the way: its endpoint is gone, and whoever goes on is reset (`--reset-on-endpoint-removal`). The agent sets
    /// it in forward halves of TCP; no way that a cached next hop allows has it, so the fast path need not look.
    pub const RESET: u8 = 1 << 7;
}

/// For which protocols clients outside the cluster are answered by the backend's node itself (`--forwarding`).
pub mod direct {
    /// TCP.
    pub const TCP: u32 = 1;
    /// UDP and SCTP.
    pub const OTHERS: u32 = 2;
    /// NodePorts too: every pod of the cluster is known as one, which would not know the answer that another node sends it.
    pub const NODE_PORTS: u32 = 4;
}

/// How far a flow has closed.
pub mod closing {
    /// This direction has sent FIN.
    pub const FIN: u8 = 1;
    /// Either direction has sent RST. Of UDP, which has none: the agent has found that no answer comes any more.
    pub const RST: u8 = 2;
}

/// Flags of a frontend.
pub mod frontend {
    /// Its address is one of the node's own: what has no endpoint is left to the kernel, which refuses it.
    pub const NODE_ADDRESS: u32 = 1;
    /// The service has usable endpoints somewhere: where a ring is empty all the same, its policy is Local, and Kubernetes
    /// specifies a silent drop. Without endpoints anywhere, clients are refused.
    pub const HAS_ENDPOINTS: u32 = 1 << 1;
    /// Only sources in the networks of [`network::sources_of`](super::network::sources_of) may open flows.
    pub const RESTRICTED: u32 = 1 << 2;
    /// Pods of the cluster are treated otherwise than clients outside, so [`network::PODS`](super::network::PODS) has to be
    /// asked.
    pub const DISTINGUISHES_PODS: u32 = 1 << 3;
    /// Flows of clients outside the cluster get an address of this node as their source, if their backend is elsewhere.
    pub const MASQUERADE_EXTERNAL: u32 = 1 << 4;
    /// The same for pods.
    pub const MASQUERADE_POD: u32 = 1 << 5;
    /// The same for processes of this node.
    pub const MASQUERADE_HOST: u32 = 1 << 6;
    /// The ring for clients outside holds the endpoints of policy Local.
    pub const LOCAL: u32 = 1 << 7;
    /// The ring for clients inside holds the endpoints of policy Local.
    pub const INNER_LOCAL: u32 = 1 << 8;
    /// Not a frontend but a ClusterIP, under port 0 and protocol 0: other ports of it are refused, echo requests answered.
    pub const ADDRESS: u32 = 1 << 9;
    /// Not a frontend but another address of services, under port 0 and protocol 0: echo requests to it are answered.
    pub const ECHO: u32 = 1 << 11;
    /// A NodePort: processes of the node may reach it on the loopback, and must not bind it.
    pub const NODE_PORT: u32 = 1 << 10;
}

/// Owners of networks.
pub mod network {
    /// Pods of this cluster that this node takes for its own (`--detect-local-mode`).
    pub const PODS: u32 = 0;
    /// ServiceCIDRs: what is addressed there and is no ClusterIP is dropped.
    pub const SERVICES: u32 = 1;
    /// The other nodes of the cluster: whence this one takes packets that have come to them.
    pub const NODES: u32 = 2;
    /// This node, as the other nodes know it.
    pub const SELF: u32 = 3;

    /// Sources that may reach the load-balancer addresses of a service port.
    #[inline(always)] // one instruction
    pub const fn sources_of(service: u32) -> u32 {
        service | 1 << 31
    }
}

/// Flags of a backend.
pub mod backend {
    /// On this node: DNAT only, the client's address survives.
    pub const LOCAL: u8 = 1;
    /// Among the endpoints of policy Cluster.
    pub const IN_CLUSTER_LIST: u8 = 1 << 1;
    /// Among the endpoints of policy Local.
    pub const IN_LOCAL_LIST: u8 = 1 << 2;
}

/// Flags of a device.
pub mod device {
    /// The index under which one entry stands for the devices of all pods; no interface has it.
    pub const OF_PODS: u32 = 0;
    /// XDP here may send out of the same interface.
    pub const TRANSMIT: u32 = 1;
    /// Takes frames redirected by native XDP (`NETDEV_XDP_ACT_NDO_XMIT`).
    pub const REDIRECT: u32 = 2;
    /// Its own XDP program runs in generic mode, whose frames every Ethernet device takes.
    pub const GENERIC: u32 = 4;
    /// Has an Ethernet header, so that generic redirects make sense.
    pub const ETHERNET: u32 = 8;
    /// No XDP program runs on it, so that tc ingress takes what XDP would.
    pub const WITHOUT_XDP: u32 = 16;
    /// It has addresses in several networks: which one packets get that leave here, their way says
    /// ([`Tables::source`](super::super::Tables::source)).
    pub const SEVERAL: u32 = 32;
}
