//! What sockets know and have been told.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
};

use xdp_common::tables::{Connected, Peer, PeerKey, SocketSettings};

use super::{Addr, HOST_NAMESPACE, NODE};

/// What the socket hooks have beside the other tables.
pub(crate) struct Told {
    pub(crate) settings: Cell<SocketSettings<Addr>>,
    pub(crate) peers: RefCell<HashMap<PeerKey, Peer>>,
    /// By protocol and cookie.
    pub(crate) connected: RefCell<HashMap<(u8, u64), Connected>>,
    pub(crate) pods: RefCell<HashMap<u64, Addr>>,
    pub(crate) is_full: Cell<bool>,
}

impl Default for Told {
    fn default() -> Self {
        let settings = SocketSettings {
            host_namespace: HOST_NAMESPACE,
            node: NODE,
            node_ports: NODE,
            flags: 0,
            zero: [0; 4],
        };
        Self {
            settings: Cell::new(settings),
            peers: RefCell::default(),
            connected: RefCell::default(),
            pods: RefCell::default(),
            is_full: Cell::default(),
        }
    }
}
