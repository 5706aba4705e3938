//! What the agent does for the socket hooks: tells them about the node, and ends UDP sockets whose peer serves no more, or
//! never has.
//!
//! A UDP socket that a process has connected names no address with its datagrams, so no hook sees them: it would go on
//! sending to a vanished backend for ever. The kernel lets a socket be aborted through sock_diag, from within its network
//! namespace; the process then gets an error at once and connects anew. BPF has a call for it too (`bpf_sock_destroy`, from
//! kernel 6.5), but its iterators are as bound to one namespace, so nothing would be gained but a minimal version.

use std::{
    collections::HashSet,
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::Notify;
use tracing::{debug, info, warn};
use xdp_common::{
    net::{Address, Ip6},
    tables::{SocketSettings, socket},
};

use crate::{
    cluster::wanted::{Delta, ServicePort, ServicePortName},
    config::SocketLb,
    maps::{PeerMaps, PodMaps, SocketMaps},
    metrics::SocketMetrics,
};

mod diag;
mod namespaces;
mod stranded;

pub use namespaces::own_cookie;

use diag::Found;
use stranded::Served;

/// Endpoints come and go in bursts; sockets are looked at at most this often.
const PAUSE: Duration = Duration::from_millis(100);
/// Time between two looks for the addresses of pods, while source ranges ask for them.
const PODS_PERIOD: Duration = Duration::from_secs(1);
/// Looks in a row that may fail before sockets that were not ended are given up.
const LOOKS_MAX: u32 = 3;
/// How long sockets that are connected to a frontend itself have, once nobody else can connect to it: beside kube-proxy a question
/// may be on its way.
const GRACE: Duration = Duration::from_secs(2);
/// Time before a look that failed is repeated.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// What the hooks know of the node, kept as it is.
#[derive(Debug)]
pub struct Hooks {
    maps: SocketMaps,
    v4: SocketSettings<[u8; 4]>,
    v6: SocketSettings<Ip6>,
    /// Told when backends may have gone, or frontends come.
    pub gone: Arc<Notify>,
    /// Whether there may be frontends of UDP that no socket has been looked at for.
    has_new_frontends: Arc<AtomicBool>,
    /// Whether a cgroup carries the hooks: elsewhere nobody is to be sent to a frontend.
    are_attached: Arc<AtomicBool>,
    /// Service ports that ask for their clients' addresses, by the length of those.
    restricted: HashSet<(ServicePortName, usize)>,
    /// Whether there are any.
    pub asks_for_pods: Arc<AtomicBool>,
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
        // Before kernel 5.14 a process cannot ask; 0 stands for the first namespace, in which nodes usually are.
        let host_namespace = own_cookie().unwrap_or(0);
        // Of IPv6 none is on the loopback, as in kube-proxy.
        let v4_flags = flags | if is_on_loopback { socket::ON_LOOPBACK } else { 0 };
        let mut hooks = Self {
            maps,
            v4: settings(host_namespace, v4_flags),
            v6: settings(host_namespace, flags),
            gone: Arc::default(),
            // Those of an earlier agent; sockets may have been connected to them while there were no hooks.
            has_new_frontends: Arc::new(AtomicBool::new(true)),
            are_attached: Arc::new(AtomicBool::new(true)),
            restricted: HashSet::new(),
            asks_for_pods: Arc::default(),
        };
        hooks.maps.set_v4(hooks.v4)?;
        hooks.maps.set_v6(hooks.v6)?;
        Ok(hooks)
    }

    /// Notes which service ports have source ranges.
    pub fn note(&mut self, v4: &Delta<[u8; 4]>, v6: &Delta<Ip6>) {
        note(&mut self.restricted, v4);
        note(&mut self.restricted, v6);
        self.asks_for_pods.store(!self.restricted.is_empty(), Ordering::Relaxed);
    }

    /// Notes whether a cgroup carries the hooks. Where they have come back, sockets may have been connected meanwhile.
    pub fn note_attached(&self, are_attached: bool) {
        self.are_attached.store(are_attached, Ordering::Relaxed);
        self.look_again();
    }

    /// Has all sockets looked at again that may be connected to a frontend: hooks have come back, or frontends of UDP are new.
    pub fn look_again(&self) {
        self.has_new_frontends.store(true, Ordering::Relaxed);
        self.gone.notify_one();
    }

    /// Takes the node's primary address of each family and one that serves NodePorts.
    ///
    /// # Errors
    /// When the kernel refuses the write; it is made again with the next change.
    pub fn set_node(&mut self, v4: [Option<[u8; 4]>; 2], v6: [Option<Ip6>; 2]) -> io::Result<()> {
        let v4 = with_node(self.v4, v4);
        if v4 != self.v4 {
            self.maps.set_v4(v4)?;
            self.v4 = v4;
        }
        let v6 = with_node(self.v6, v6);
        if v6 != self.v6 {
            self.maps.set_v6(v6)?;
            self.v6 = v6;
        }
        Ok(())
    }
}

/// Whether a look is to be repeated, after so many in a row that have failed.
fn is_repeated(failed_looks: &mut u32, has_failed: bool) -> bool {
    *failed_looks = if has_failed { *failed_looks + 1 } else { 0 };
    (1..LOOKS_MAX).contains(failed_looks)
}

fn settings<A: Address>(host_namespace: u64, flags: u32) -> SocketSettings<A> {
    SocketSettings { host_namespace, node: A::UNSPECIFIED, node_ports: A::UNSPECIFIED, flags, zero: [0; 4] }
}

fn with_node<A: Address>(
    settings: SocketSettings<A>,
    [node, node_ports]: [Option<A>; 2],
) -> SocketSettings<A> {
    let [node, node_ports] = [node, node_ports].map(Option::unwrap_or_default);
    SocketSettings { node, node_ports, ..settings }
}

fn note<A>(restricted: &mut HashSet<(ServicePortName, usize)>, delta: &Delta<A>) {
    for (name, port) in &delta.ports {
        let is_restricted = |port: &ServicePort<A>| port.frontends.iter().any(|at| at.is_restricted);
        let of_family = (name.clone(), size_of::<A>());
        if port.as_deref().is_some_and(is_restricted) {
            restricted.insert(of_family);
        } else {
            restricted.remove(&of_family);
        }
    }
}

/// Whose sockets the hooks serve alone: what is connected to a frontend there, nobody else translates.
#[derive(Clone, Debug)]
pub struct Scope {
    /// The cgroup that carries the hooks.
    pub cgroup: PathBuf,
    /// Whether the sockets of pods are left to programs on their devices (`--socket-lb=host-only`, `--pod-iface`).
    pub is_node_alone: bool,
}

/// Ends connected UDP sockets whose backend is gone, and those that are connected to a frontend itself.
#[derive(Debug)]
pub struct Sweeper {
    peers: PeerMaps,
    scope: Scope,
    has_new_frontends: Arc<AtomicBool>,
    are_attached: Arc<AtomicBool>,
    /// When sockets are looked for that are connected to a frontend itself.
    stranded_until: Option<Instant>,
    pods: PodMaps,
    metrics: SocketMetrics,
    /// Whether there are source ranges that ask for the addresses of pods.
    asks_for_pods: Arc<AtomicBool>,
    /// Whether backends may have gone since the last look.
    is_due: bool,
    /// Whether no sockets have been looked for yet.
    is_first: bool,
    /// Looks in a row at which sockets could not be ended.
    failed_looks: u32,
    /// Whether it has been said that pods' namespaces cannot be entered.
    is_refusal_told: bool,
    /// Whether it has been said that sockets cannot be ended.
    is_failure_told: bool,
    /// Whether it has been said that sockets are out of sight.
    is_blindness_told: bool,
}

impl Sweeper {
    /// A sweeper over what the hooks have told sockets.
    pub fn new(peers: PeerMaps, pods: PodMaps, hooks: &Hooks, scope: Scope, metrics: SocketMetrics) -> Self {
        let asks_for_pods = Arc::clone(&hooks.asks_for_pods);
        Self {
            peers,
            scope,
            has_new_frontends: Arc::clone(&hooks.has_new_frontends),
            are_attached: Arc::clone(&hooks.are_attached),
            stranded_until: None,
            pods,
            metrics,
            asks_for_pods,
            is_due: true,
            is_first: true,
            failed_looks: 0,
            is_refusal_told: false,
            is_failure_told: false,
            is_blindness_told: false,
        }
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
                warn!(
                    "the look at UDP sockets ended early; those of vanished backends are not ended any more"
                );
                return;
            };
            sweeper = back;
            match result {
                Ok(()) => {
                    tokio::time::sleep(PAUSE).await;
                    // Pods come and go without a word to this node's agent.
                    sweeper.is_due = tokio::time::timeout(PODS_PERIOD, gone.notified()).await.is_ok();
                }
                Err(error) => {
                    debug!(%error, "cannot look at UDP sockets; trying again");
                    sweeper.is_due = true;
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            }
        }
    }

    fn sweep(&mut self) -> io::Result<()> {
        // An agent that was killed may have ended what it could not forget any more.
        let is_first = std::mem::take(&mut self.is_first);
        if self.asks_for_pods.load(Ordering::Relaxed) {
            self.learn_pods()?;
        }
        // Where the cgroup is gone, so are its processes; the hooks come back with it, and are looked for again.
        let are_attached = self.are_attached.load(Ordering::Relaxed);
        if are_attached && self.has_new_frontends.swap(false, Ordering::Relaxed) {
            self.stranded_until.get_or_insert_with(|| Instant::now() + GRACE);
        }
        let is_over = are_attached && self.stranded_until.is_some_and(|until| until <= Instant::now());
        if !std::mem::take(&mut self.is_due) && !is_over {
            return Ok(());
        }
        let stale = self.peers.stale()?;
        self.stranded_until.take_if(|_| is_over);
        let served = if is_over { Served::below(&self.scope.cgroup).ok() } else { None };
        if stale.is_empty() && served.is_none() {
            return Ok(());
        }
        let began = SystemTime::now();
        let mut ended = HashSet::new();
        let (mut refused, mut failed) = (None, None);
        let mut is_node = true;
        namespaces::each(|result| {
            let served = served.as_ref().filter(|_| is_node || !self.scope.is_node_alone);
            is_node = false;
            let is_wanted = |socket: &Found| {
                let is_stale = stale.get(&socket.cookie).is_some_and(|to| socket.is_connected_to(to));
                is_stale || served.is_some_and(|served| self.is_stranded(served, socket))
            };
            match result {
                Ok(()) => failed = diag::destroy(is_wanted, &mut ended).err().or(failed.take()),
                Err(error) => refused = Some(error),
            }
        });
        // Afterwards: what is forgotten is never ended, should the agent be killed or a look fail.
        let is_repeated = is_repeated(&mut self.failed_looks, failed.is_some());
        let mut unseen = 0;
        for (cookie, connected) in &stale {
            if is_repeated && !ended.contains(cookie) {
                continue;
            }
            let was_there = self.peers.forget(*cookie, connected)?;
            unseen += usize::from(was_there && !ended.contains(cookie));
        }
        let destroyed = ended.len();
        let stranded = ended.iter().filter(|cookie| !stale.contains_key(cookie)).count();
        self.tell_unseen(unseen, is_first || refused.is_some() || failed.is_some());
        self.tell_refusal(refused);
        if let Some(error) = &failed
            && !is_repeated
            && !std::mem::replace(&mut self.is_failure_told, true)
        {
            warn!(
                %error,
                "cannot end connected UDP sockets whose backend is gone: they notice nothing; it needs a kernel with \
                 CONFIG_INET_UDP_DIAG (module udp_diag) and CONFIG_INET_DIAG_DESTROY"
            );
        }
        self.metrics.destroyed.inc_by(destroyed as u64);
        let took = began.elapsed().unwrap_or_default();
        if destroyed > stranded {
            info!(sockets = destroyed - stranded, ?took, "ended UDP sockets of backends that are gone");
        }
        if stranded > 0 {
            info!(
                sockets = stranded,
                ?took,
                "ended UDP sockets that were connected to Services before the hooks led them to backends"
            );
        }
        match failed {
            Some(error) if is_repeated => {
                self.has_new_frontends.fetch_or(is_over, Ordering::Relaxed);
                Err(error)
            }
            Some(_) | None => Ok(()),
        }
    }
}

impl Sweeper {
    /// Whether a socket is connected to a frontend itself, and nobody but the hooks would lead it elsewhere.
    fn is_stranded(&self, served: &Served, socket: &Found) -> bool {
        // What the kernel does not tell is not ended.
        let is_stranded = || self.peers.is_stranded(socket.cookie, socket.addr, socket.port).unwrap_or(false);
        served.contains(socket.cgroup) && is_stranded()
    }

    /// Learns which address each pod has, for source ranges.
    fn learn_pods(&mut self) -> io::Result<()> {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        let mut refused = None;
        namespaces::each(|result| match result {
            Ok(()) => {
                if let (Ok(cookie), Some((own_v4, own_v6))) = (own_cookie(), namespaces::own_addresses()) {
                    v4.extend(own_v4.map(|addr| (cookie, addr)));
                    v6.extend(own_v6.map(|addr| (cookie, addr)));
                }
            }
            Err(error) => refused = Some(error),
        });
        self.tell_refusal(refused);
        self.pods.set_v4(&v4)?;
        self.pods.set_v6(&v6)
    }

    /// Says once that there are sockets that no namespace in sight has, unless it is said why.
    fn tell_unseen(&mut self, unseen: usize, is_explained: bool) {
        if unseen > 0 && !is_explained && !std::mem::replace(&mut self.is_blindness_told, true) {
            warn!(
                sockets = unseen,
                "connected UDP sockets of backends that are gone were not found: unless their processes have disconnected them, they \
                 are in network namespaces out of sight, and notice nothing; show those to the agent (/run/netns of the node, or its \
                 processes: hostPID)"
            );
        }
    }

    /// Says once that pods cannot be looked into.
    fn tell_refusal(&mut self, refused: Option<io::Error>) {
        if let Some(error) = refused
            && !std::mem::replace(&mut self.is_refusal_told, true)
        {
            warn!(
                %error,
                "cannot enter the network namespaces of pods: their connected UDP sockets do not notice when a backend goes, \
                 and source ranges take them for strangers; grant CAP_SYS_ADMIN, and show them to the agent (/run/netns of \
                 the node, or its processes)"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_that_fail_are_repeated_for_a_while() {
        let mut failed_looks = 0;
        let looks =
            [true, true, true, true, false, true].map(|failed| is_repeated(&mut failed_looks, failed));
        assert_eq!(looks, [true, true, false, false, false, true]);
    }
}
