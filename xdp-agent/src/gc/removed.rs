//! Ends TCP connections whose endpoint is gone, where `--reset-on-endpoint-removal` asks for it: their entries are marked, so
//! that the programs refuse the next packet. Packets of other flows meet nothing new.

use std::{collections::HashMap, io};

use tokio::sync::Notify;
use tracing::debug;
use xdp_common::{
    net::{FlowKey, TCP},
    tables::{Flow, closing, exit, kind},
};

use super::FlowTables;
use crate::cluster::wanted::IpAddress;

/// Ends when backends may have gone, or never, where nobody asks.
pub(super) async fn gone(notify: Option<&Notify>) {
    match notify {
        Some(notify) => notify.notified().await,
        None => std::future::pending().await,
    }
}

/// An open connection, and its backend as it was when the connection was made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Open<A> {
    key: FlowKey<A>,
    backend: u32,
    generation: u32,
}

impl<A: IpAddress> Open<A> {
    /// What an entry says, if it is one to mark.
    pub(super) fn of(key: &FlowKey<A>, flow: &Flow<A>) -> Option<Self> {
        let is_open = key.proto == TCP
            && (flow.kind == kind::FORWARD || flow.kind == kind::TUNNEL)
            && flow.exit & exit::RESET == 0
            && flow.closing & closing::RST == 0;
        is_open.then_some(Self { key: *key, backend: flow.backend, generation: flow.generation })
    }
}

impl<A: IpAddress> FlowTables<A> {
    /// Marks connections whose backend is gone.
    pub(super) fn mark(&mut self, open: &[Open<A>]) -> io::Result<()> {
        let mut generations = HashMap::new();
        let mut marked = 0;
        for Open { key, backend, generation } in open {
            let now = match generations.get(backend) {
                Some(now) => *now,
                None => *generations.entry(*backend).or_insert(self.backends.generation(*backend)?),
            };
            if now == Some(*generation) {
                continue;
            }
            // Read again: a packet may have come since the walk, or the tuple may be another connection's.
            let Some(flow) = self.established.get(key)? else { continue };
            if flow.generation == *generation && Open::of(key, &flow).is_some() {
                self.established.change(key, |flow| flow.exit |= exit::RESET)?;
                marked += 1;
            }
        }
        if marked > 0 {
            debug!(flows = marked, "connections to endpoints that are gone are reset with their next packet");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xdp_common::net::UDP;

    #[test]
    fn only_forward_halves_of_open_tcp_connections_are_marked_and_once() {
        let key = FlowKey::<[u8; 4]> { proto: TCP, ..FlowKey::ZERO };
        let open = Flow { kind: kind::FORWARD, backend: 5, generation: 3, ..Flow::ZERO };
        let found = Open::of(&key, &open).unwrap();
        assert_eq!((found.backend, found.generation), (5, 3));
        for exit in [exit::LOCAL, exit::TRANSMIT, exit::REDIRECT, exit::KERNEL, exit::BACK, exit::OUT] {
            assert!(Open::of(&key, &Flow { exit, ..open }).is_some());
            assert!(Open::of(&key, &Flow { exit: exit | exit::RESET, ..open }).is_none());
        }
        assert!(Open::of(&FlowKey { proto: UDP, ..key }, &open).is_none(), "UDP goes elsewhere by itself");
        assert!(Open::of(&key, &Flow { kind: kind::REPLY_REMOTE, ..open }).is_none());
        assert!(Open::of(&key, &Flow { closing: closing::RST, ..open }).is_none());
        assert!(
            Open::of(&key, &Flow { closing: closing::FIN, ..open }).is_some(),
            "the other side waits still"
        );
    }
}
