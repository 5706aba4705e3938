//! What goes into a plan and what comes out of it.

use std::collections::HashSet;

use xdp_common::tables::{Backend, Frontend, FrontendKey};

use crate::cluster::wanted::{IpAddress, Network};

/// Entries of the maps, as the flags set them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Frontends.
    pub frontends: u32,
    /// Backend ids, of which 0 is never used.
    pub backends: u32,
    /// Ring slots.
    pub ring_slots: u32,
    /// Networks.
    pub networks: u32,
}

/// One write to a map; changes are applied in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change<A> {
    /// Writes a backend slot; protocol 0 empties it.
    Backend {
        /// Backend id.
        id: u32,
        /// New value.
        value: Backend<A>,
    },
    /// Writes a ring.
    Ring {
        /// First slot.
        offset: u32,
        /// Backend ids.
        slots: Vec<u32>,
    },
    /// Writes a word of the ingress gate.
    IngressGate {
        /// Index of the word.
        word: u32,
        /// New value.
        bits: u64,
    },
    /// Writes a word of the egress gate.
    EgressGate {
        /// Index of the word.
        word: u32,
        /// New value.
        bits: u64,
    },
    /// Inserts or replaces a frontend.
    Frontend {
        /// Key.
        key: FrontendKey<A>,
        /// New value.
        value: Frontend,
    },
    /// Removes a frontend.
    RemoveFrontend {
        /// Key.
        key: FrontendKey<A>,
    },
    /// Inserts, replaces or removes a network.
    Network {
        /// Whose it is, one of [`network`](xdp_common::tables::network).
        owner: u32,
        /// The network.
        network: Network<A>,
        /// 1 for what is in, 0 for an exception, nothing to remove it.
        value: Option<u32>,
    },
}

impl<A: IpAddress> Change<A> {
    /// The change for the log: which entry it concerns.
    pub fn summary(&self) -> String {
        match self {
            Self::Backend { id, value } => format!("backend {id} at {}", value.addr.to_ip()),
            Self::Ring { offset, slots } => format!("ring of {} slots at {offset}", slots.len()),
            Self::IngressGate { word, .. } => format!("word {word} of the ingress gate"),
            Self::EgressGate { word, .. } => format!("word {word} of the egress gate"),
            Self::Frontend { key, .. } => format!("frontend {}", place(key)),
            Self::RemoveFrontend { key } => format!("removal of frontend {}", place(key)),
            Self::Network { owner, network, value: Some(_) } => format!("network {network} of {owner:#x}"),
            Self::Network { owner, network, value: None } => {
                format!("removal of network {network} of {owner:#x}")
            }
        }
    }
}

fn place<A: IpAddress>(key: &FrontendKey<A>) -> String {
    format!("{} port {} protocol {}", key.addr.to_ip(), u16::from_be_bytes(key.port), key.proto)
}

/// What is to be written now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update<A> {
    /// Writes, in the order in which they must be applied.
    pub changes: Vec<Change<A>>,
    /// Set when a service that did not fit may fit soon: call [`Plan::update`](super::Plan::update) again after this time.
    pub retry_in_ms: Option<u64>,
}

impl<A> Default for Update<A> {
    fn default() -> Self {
        Self { changes: Vec::new(), retry_in_ms: None }
    }
}

/// What the maps of a previous agent hold.
#[derive(Clone, Debug)]
pub struct Adopted<A> {
    /// Frontends, with the addresses of ClusterIPs.
    pub frontends: Vec<(FrontendKey<A>, Frontend)>,
    /// Backend slots, also the empty ones with a generation above zero (so that generations never repeat).
    pub backends: Vec<(u32, Backend<A>)>,
    /// Every word of the ingress gate; bits of flows that outlive their frontend are known from nowhere else.
    pub ingress_gate: Vec<u64>,
    /// Every word of the egress gate.
    pub egress_gate: Vec<u64>,
    /// Every ring slot: rings that are as they should be stay where they are.
    pub rings: Vec<u32>,
    /// Networks with their owners and values.
    pub networks: Vec<(u32, Network<A>, u32)>,
}

impl<A> Default for Adopted<A> {
    fn default() -> Self {
        Self {
            frontends: Vec::new(),
            backends: Vec::new(),
            ingress_gate: Vec::new(),
            egress_gate: Vec::new(),
            rings: Vec::new(),
            networks: Vec::new(),
        }
    }
}

/// What the flow tables still need, as a walk over them found it.
#[derive(Clone, Debug, Default)]
pub struct InUse {
    /// When the walk began, on the clock of `now_ms`: what was given up later than that is not judged by it.
    pub started_ms: u64,
    /// Bits of the ingress gate: `frontend_bit` of every client-side destination, `snat_bit` of every SNAT address.
    pub ingress_bits: HashSet<u32>,
    /// Bits of the egress gate: `backend_source_bit` and `backend_destination_bit` of every flow's backend.
    pub egress_bits: HashSet<u32>,
    /// Backend ids.
    pub backends: HashSet<u32>,
}

/// How full the maps are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fill {
    /// Frontends.
    pub frontends: u32,
    /// Backend ids given out, also those whose endpoint is gone while flows still use it.
    pub backends: u32,
    /// Ring slots in use or waiting to be used again.
    pub ring_slots: u32,
    /// Networks.
    pub networks: u32,
}
