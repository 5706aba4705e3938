//! What the agent does for the socket hooks: tells them about the node, and ends what UDP sockets still have with backends
//! that serve no more.
//!
//! A UDP socket that a process has connected names no address with its datagrams, so no hook sees them: it would go on
//! sending to a vanished backend for ever. The kernel lets a socket be aborted through sock_diag, from within its network
//! namespace; the process then gets an error at once and connects anew. BPF has a call for it too (`bpf_sock_destroy`, from
//! kernel 6.5), but its iterators are as bound to one namespace, so nothing would be gained but a minimal version.

use std::{
    collections::HashMap,
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::sync::Notify;
use tracing::{debug, info, warn};
use xdp_common::{
    net::Address,
    tables::{PeerKey, SocketSettings, socket},
};

use crate::{
    config::SocketLb,
    maps::{PeerMaps, SocketMaps},
    metrics::SocketMetrics,
};

mod diag;
mod namespaces;

pub use namespaces::own_cookie;

/// Endpoints come and go in bursts; sockets are looked at at most this often.
const PAUSE: Duration = Duration::from_millis(100);
/// Time before a look that failed is repeated.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// What the hooks know of the node, kept as it is.
#[derive(Debug)]
pub struct Hooks {
    maps: SocketMaps,
    settings: SocketSettings<[u8; 4]>,
    is_on_loopback: bool,
    /// Told when backends may have gone.
    pub gone: Arc<Notify>,
}

impl Hooks {
    /// Tells the hooks what is known before anything else is.
    ///
    /// # Errors
    /// When the kernel refuses the write.
    pub fn new(maps: SocketMaps, scope: SocketLb, is_on_loopback: bool) -> io::Result<Self> {
        let flags = match scope {
            SocketLb::HostOnly => socket::HOST_ONLY,
            SocketLb::All | SocketLb::Off => 0,
        };
        let settings = SocketSettings {
            // Before kernel 5.14 a process cannot ask; 0 stands for the first namespace, in which nodes usually are.
            host_namespace: own_cookie().unwrap_or(0),
            node: [0; 4],
            loopback: [0; 4],
            flags,
            zero: [0; 4],
        };
        let mut hooks = Self { maps, settings, is_on_loopback, gone: Arc::default() };
        hooks.maps.set(hooks.settings)?;
        Ok(hooks)
    }

    /// Takes the node's primary address and one that serves NodePorts.
    ///
    /// # Errors
    /// When the kernel refuses the write; it is made again with the next change.
    pub fn set_node(&mut self, node: Option<[u8; 4]>, node_port: Option<[u8; 4]>) -> io::Result<()> {
        let settings = SocketSettings {
            node: node.unwrap_or_default(),
            loopback: node_port.filter(|_| self.is_on_loopback).unwrap_or_default(),
            ..self.settings
        };
        if settings != self.settings {
            self.maps.set(settings)?;
            self.settings = settings;
        }
        Ok(())
    }
}

/// Ends connected UDP sockets whose backend is gone.
#[derive(Debug)]
pub struct Sweeper {
    peers: PeerMaps,
    metrics: SocketMetrics,
    /// Whether it has been said that pods' namespaces cannot be entered.
    is_refusal_told: bool,
}

impl Sweeper {
    /// A sweeper over what the hooks have told sockets.
    pub fn new(peers: PeerMaps, metrics: SocketMetrics) -> Self {
        Self { peers, metrics, is_refusal_told: false }
    }

    /// Looks once for what went while no agent ran, then whenever backends may have gone.
    pub async fn run(self, gone: Arc<Notify>) {
        let mut sweeper = self;
        loop {
            let task = tokio::task::spawn_blocking(move || {
                let result = sweeper.sweep();
                (sweeper, result)
            });
            let Ok((back, result)) = task.await else {
                warn!("the look at UDP sockets ended early; those of vanished backends are not ended any more");
                return;
            };
            sweeper = back;
            match result {
                Ok(()) => {
                    tokio::time::sleep(PAUSE).await;
                    gone.notified().await;
                }
                Err(error) => {
                    debug!(%error, "cannot look at UDP sockets; trying again");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            }
        }
    }

    fn sweep(&mut self) -> io::Result<()> {
        let stale = self.peers.stale()?;
        if stale.is_empty() {
            return Ok(());
        }
        let began = SystemTime::now();
        let mut wanted: HashMap<u64, Vec<PeerKey>> = HashMap::new();
        for key in &stale {
            wanted.entry(key.cookie).or_default().push(*key);
        }
        let mut destroyed = 0;
        let mut refused = None;
        namespaces::each(|result| match result {
            Ok(()) => match diag::destroy(&wanted) {
                Ok(count) => destroyed += count,
                Err(error) => debug!(%error, "cannot end UDP sockets of a network namespace"),
            },
            Err(error) => refused = Some(error),
        });
        if let Some(error) = refused
            && !std::mem::replace(&mut self.is_refusal_told, true)
        {
            warn!(
                %error,
                "cannot enter the network namespaces of pods, so their connected UDP sockets do not notice when a backend \
                 goes; grant CAP_SYS_ADMIN and CAP_SYS_PTRACE, and hostPID in a pod"
            );
        }
        for key in &stale {
            self.peers.forget(key)?;
        }
        self.metrics.destroyed.inc_by(destroyed);
        if destroyed > 0 {
            let took = began.elapsed().unwrap_or_default();
            info!(sockets = destroyed, ?took, "ended UDP sockets of backends that are gone");
        }
        Ok(())
    }
}

/// Whether an address and port are those of a key.
fn is_of(key: &PeerKey, addr: [u8; 16], port: [u8; 2]) -> bool {
    <[u8; 16]>::from_wide(key.addr) == addr && key.port == port
}
