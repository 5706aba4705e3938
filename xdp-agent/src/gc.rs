//! Ends flows that are over, and says what the others still need.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::{Notify, mpsc, watch};
use tracing::{debug, warn};
use xdp_common::{
    conntrack::{Timeouts, expired, opposite},
    gate,
    net::{FlowKey, SCTP, TCP},
    tables::{Flow, exit, kind},
};

use crate::{
    cluster::wanted::{Ip6, IpAddress},
    host::Host,
    maps::{EmbryonicTable, EstablishedTable, Generations},
    metrics::Metrics,
    neighbours::UsedMacs,
    plan::InUse,
    reconcile::Needs,
    status::{FlowCounts, Shared},
};

mod lost;
mod removed;

/// Endpoints come and go in bursts; flows are looked at this long after the first of them.
const BURST: Duration = Duration::from_millis(200);
/// Time between two looks at the flow tables.
pub const PERIOD: Duration = Duration::from_secs(10);
/// Entries removed after one look; the others wait for the next, which then follows at once: in a [`PERIOD`] 10,000
/// short connections a second leave 200,000 entries.
pub const REMOVALS_MAX: usize = 1 << 16;
/// How long a new flow that nobody has answered keeps its source port (netfilter's UDP without an answer): a later
/// opener loses nothing by beginning anew, and what a flood has left is soon gone.
const UNANSWERED_SECONDS: u32 = 30;
/// How long a flow that was answered waits for its initiator to go on (netfilter's SYN_RECV).
const ANSWERED_SECONDS: u32 = 60;
/// The same for a TCP connection through a tunnel.
const TUNNEL_SECONDS: u32 = 3_600;
/// Neighbours of flows that were idle for longer are not kept fresh.
const NEIGHBOUR_SECONDS: u32 = 60;

/// Which table an entry is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Established,
    Embryonic,
}

/// What one look at the tables has found.
#[derive(Debug)]
pub struct Look<A> {
    /// What live flows need.
    pub in_use: InUse,
    /// Destination MAC addresses that they send to.
    pub macs: HashSet<[u8; 6]>,
    /// How many there are.
    pub counts: FlowCounts,
    /// Established entries that may be over.
    suspects: Vec<(FlowKey<A>, Flow<A>)>,
}

impl<A> Default for Look<A> {
    fn default() -> Self {
        Self {
            in_use: InUse::default(),
            macs: HashSet::new(),
            counts: FlowCounts::default(),
            suspects: Vec::new(),
        }
    }
}

/// The flow tables of an address family.
#[derive(Debug)]
pub struct FlowTables<A: IpAddress> {
    /// Flows that have been answered.
    pub established: EstablishedTable<A>,
    /// New flows.
    pub embryonic: EmbryonicTable<A>,
    /// The generations of their backends.
    pub backends: Generations<A>,
}

/// The task that collects.
#[derive(Debug)]
pub struct Collector {
    v4: FlowTables<[u8; 4]>,
    v6: FlowTables<Ip6>,
    timeouts: Timeouts,
    clock: Arc<AtomicU32>,
    origin: Instant,
    /// Says that backends may have gone, where connections to them are to be reset.
    gone: Option<Arc<Notify>>,
    /// Links and addresses.
    host: watch::Receiver<Arc<Host>>,
}

/// Where the results go.
#[derive(Clone, Debug)]
pub struct Outlets {
    /// To the writer of the image.
    pub in_use: mpsc::Sender<Needs>,
    /// To the follower of neighbours.
    pub macs: watch::Sender<UsedMacs>,
    /// To people.
    pub shared: Arc<Shared>,
    /// To Prometheus.
    pub metrics: Arc<Metrics>,
}

impl Collector {
    /// A collector of flows older than `timeouts` by `clock`; `origin` is the zero of the plan's clock. Connections whose backend
    /// is gone are reset where `gone` tells of that. Translated flows need an address of the `host`.
    pub fn new(
        v4: FlowTables<[u8; 4]>,
        v6: FlowTables<Ip6>,
        timeouts: Timeouts,
        clock: Arc<AtomicU32>,
        origin: Instant,
        gone: Option<Arc<Notify>>,
        host: watch::Receiver<Arc<Host>>,
    ) -> Self {
        Self { v4, v6, timeouts, clock, origin, gone, host }
    }

    /// Looks and removes, period after period; at once again after a look that removed as much as it may.
    pub async fn run(self, outlets: Outlets) {
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut collector = self;
        let mut is_soon = false;
        loop {
            tokio::select! {
                _ = ticks.tick() => is_soon = false,
                () = removed::gone(collector.gone.as_deref()), if !is_soon => {
                    ticks.reset_after(BURST);
                    is_soon = true;
                    continue;
                }
            }
            let task = tokio::task::spawn_blocking(move || {
                let result = collector.collect();
                (collector, result)
            });
            let Ok((back, result)) = task.await else {
                warn!("the look at the flow tables ended early; flows are not collected any more");
                return;
            };
            collector = back;
            match result {
                Ok((v4, v6)) => {
                    if v4.is_full() || v6.is_full() {
                        ticks.reset_immediately();
                    }
                    tell(v4, v6, &outlets).await;
                }
                Err(error) => {
                    outlets.metrics.gc_failures.inc();
                    warn!(%error, "cannot read the flow tables; trying again");
                }
            }
        }
    }

    /// One look, and the removal of what is over.
    ///
    /// # Errors
    /// When the kernel refuses a read or a removal.
    pub fn collect(&mut self) -> io::Result<(Look<[u8; 4]>, Look<Ip6>)> {
        let clock = self.clock.load(Ordering::Relaxed);
        let resets = self.gone.is_some();
        let reachable = lost::reachable(&self.host.borrow());
        let v4 = self.v4.collect(clock, &self.timeouts, self.origin, resets, &reachable)?;
        Ok((v4, self.v6.collect(clock, &self.timeouts, self.origin, resets, &reachable)?))
    }
}

impl<A: IpAddress> FlowTables<A> {
    fn collect(
        &mut self,
        clock: u32,
        timeouts: &Timeouts,
        origin: Instant,
        resets: bool,
        reachable: &BTreeSet<IpAddr>,
    ) -> io::Result<Look<A>> {
        let mut look = Look::default();
        let (mut open, mut lost) = (Vec::new(), Vec::new());
        look.in_use.started_ms = origin.elapsed().as_millis() as u64;
        self.established.walk(|key, flow| {
            look.visit(Place::Established, key, flow, clock, timeouts);
            if resets {
                open.extend(removed::Open::of(key, flow));
            }
            if lost::is_lost(key, flow, reachable) {
                lost.push(*key);
            }
        })?;
        self.mark(&open)?;
        self.begin_anew(&lost, reachable)?;
        self.collect_embryonic(&mut look, clock, timeouts, reachable);
        for (key, seen) in std::mem::take(&mut look.suspects) {
            if look.is_full() {
                debug!("more flows are over than are removed at a time");
                break;
            }
            let removed = judge(&mut self.established, &key, &seen, clock, timeouts)?;
            if removed > 0 {
                look.counts.forget(&key, &seen, removed);
            }
        }
        Ok(look)
    }

    /// Frees new flows that nobody has answered in time, or could; the others are looked at like established ones.
    fn collect_embryonic(
        &mut self,
        look: &mut Look<A>,
        clock: u32,
        timeouts: &Timeouts,
        reachable: &BTreeSet<IpAddr>,
    ) {
        let found = self.embryonic.read();
        let flows: HashMap<FlowKey<A>, Flow<A>> = found.iter().map(|entry| (entry.key, entry.flow)).collect();
        for entry in &found {
            let has_other = entry.flow.kind != kind::TUNNEL;
            let other = flows.get(&opposite(&entry.key, &entry.flow)).filter(|_| has_other);
            let is_answered = entry.flow.replied != 0 || other.is_some_and(|other| other.replied != 0);
            let limits = embryonic(timeouts, is_answered);
            let is_over = expired(&entry.flow, other, entry.key.proto, clock, &limits)
                || lost::is_lost(&entry.key, &entry.flow, reachable);
            if is_over && self.embryonic.remove(entry) {
                look.counts.removed += 1;
            } else {
                look.visit(Place::Embryonic, &entry.key, &entry.flow, clock, timeouts);
            }
        }
    }
}

/// The entries of established flows, as far as their end is concerned.
trait Entries<A> {
    /// The entry of a key.
    fn get(&self, key: &FlowKey<A>) -> io::Result<Option<Flow<A>>>;
    /// Removes an entry, and says what it was.
    fn take(&mut self, key: &FlowKey<A>) -> io::Result<Option<Flow<A>>>;
    /// Puts one back, unless there is another by now.
    fn put_back(&mut self, key: &FlowKey<A>, flow: &Flow<A>) -> io::Result<()>;
}

impl<A: IpAddress> Entries<A> for EstablishedTable<A> {
    fn get(&self, key: &FlowKey<A>) -> io::Result<Option<Flow<A>>> {
        EstablishedTable::get(self, key)
    }

    fn take(&mut self, key: &FlowKey<A>) -> io::Result<Option<Flow<A>>> {
        EstablishedTable::take(self, key)
    }

    fn put_back(&mut self, key: &FlowKey<A>, flow: &Flow<A>) -> io::Result<()> {
        EstablishedTable::put_back(self, key, flow)
    }
}

/// Removes an established pair if it is over, and says how many entries went.
fn judge<A: IpAddress>(
    entries: &mut impl Entries<A>,
    key: &FlowKey<A>,
    seen: &Flow<A>,
    clock: u32,
    timeouts: &Timeouts,
) -> io::Result<u32> {
    let other_key = opposite(key, seen);
    // A flow through a tunnel has no other half.
    let other = if seen.kind == kind::TUNNEL { None } else { entries.get(&other_key)? };
    // A pair is judged once, with its forward half.
    if seen.kind != kind::FORWARD && other.is_some_and(|other| other.kind == kind::FORWARD) {
        return Ok(0);
    }
    let is_over = |flow: &Flow<A>, other: Option<&Flow<A>>| {
        expired(flow, other, key.proto, clock, &limits_of(flow, timeouts))
    };
    // Read again: a packet may have come since the walk.
    if !entries.get(key)?.is_some_and(|flow| is_over(&flow, other.as_ref())) {
        return Ok(0);
    }
    // Nor is one removed that has come since that. The forward half first: the reply's key is the reservation of the source port.
    let Some(taken) = entries.take(key)? else { return Ok(0) };
    if !is_over(&taken, other.as_ref()) {
        entries.put_back(key, &taken)?;
        return Ok(0);
    }
    if other.is_none_or(|other| opposite(&other_key, &other) != *key) {
        return Ok(1);
    }
    let Some(other) = entries.take(&other_key)? else { return Ok(1) };
    if !is_over(&taken, Some(&other)) {
        let put_back = entries.put_back(&other_key, &other);
        entries.put_back(key, &taken)?;
        return put_back.map(|()| 0);
    }
    Ok(2)
}

/// What counts as idle for an established flow. One through a tunnel is established without an answer, so that whoever sends
/// two packets has one; and to lose it only means to be placed by the ring again.
fn limits_of<A>(flow: &Flow<A>, timeouts: &Timeouts) -> Timeouts {
    let longest = if flow.kind == kind::TUNNEL { TUNNEL_SECONDS } else { u32::MAX };
    Timeouts { tcp_established: timeouts.tcp_established.min(longest), ..*timeouts }
}

/// What counts as idle for a new flow, whether or not it has been answered.
fn embryonic(timeouts: &Timeouts, is_answered: bool) -> Timeouts {
    let seconds = if is_answered { ANSWERED_SECONDS } else { UNANSWERED_SECONDS };
    Timeouts {
        tcp_established: seconds,
        tcp_half_closed: seconds,
        tcp_closed: timeouts.tcp_closed.min(seconds),
        udp: timeouts.udp.min(seconds),
        sctp_established: seconds,
        sctp_closed: timeouts.sctp_closed.min(seconds),
    }
}

impl<A: IpAddress> Look<A> {
    /// Whether as much was removed as may be at a time: more may be over.
    fn is_full(&self) -> bool {
        self.counts.removed as usize >= REMOVALS_MAX
    }

    fn visit(&mut self, place: Place, key: &FlowKey<A>, flow: &Flow<A>, clock: u32, timeouts: &Timeouts) {
        let idle = clock.saturating_sub(flow.seen);
        self.count(place, key, flow);
        // Anything idle for longer than the shortest limit is looked at together with its other half; the limits of a
        // closed connection apply when only the other half knows of it.
        let shortest = match key.proto {
            TCP => timeouts.tcp_closed,
            SCTP => timeouts.sctp_closed,
            _ => timeouts.udp,
        };
        if place == Place::Established && idle > shortest {
            self.suspects.push((*key, *flow));
        }
        self.need(key, flow);
        let sends = matches!(flow.exit, exit::TRANSMIT | exit::REDIRECT | exit::TUNNEL);
        if sends && flow.dmac != [0; 6] && idle <= NEIGHBOUR_SECONDS {
            self.macs.insert(flow.dmac);
        }
    }

    fn count(&mut self, place: Place, key: &FlowKey<A>, flow: &Flow<A>) {
        match place {
            Place::Established => {
                self.counts.established_entries += 1;
                if let Some(flows) = self.counts.of_state(key, flow) {
                    *flows += 1;
                }
            }
            Place::Embryonic => {
                self.counts.embryonic_entries += 1;
                self.counts.embryonic += u32::from(is_counted(flow));
            }
        }
    }

    /// Notes the bits and the backend that the flow needs, from either half.
    fn need(&mut self, key: &FlowKey<A>, flow: &Flow<A>) {
        self.in_use.backends.insert(flow.backend);
        let (frontend, backend, snat) = match flow.kind {
            kind::TUNNEL => {
                self.in_use.ingress_bits.insert(gate::frontend_bit(key.dst, key.dport, key.proto));
                return;
            }
            kind::FORWARD => (
                (key.dst, key.dport),
                (flow.dst, flow.dport),
                (flow.exit & !exit::RESET != exit::LOCAL).then_some(flow.src),
            ),
            kind::REPLY_REMOTE => ((flow.src, flow.sport), (key.src, key.sport), Some(key.dst)),
            kind::REPLY_LOCAL => ((flow.src, flow.sport), (key.src, key.sport), None),
            // Half of a flow whose other entries say the same, whichever direction it is.
            _ => return,
        };
        // The second is that of a NodePort of another node, which has sent the flow on.
        for addr in [frontend.0, A::UNSPECIFIED] {
            self.in_use.ingress_bits.insert(gate::frontend_bit(addr, frontend.1, key.proto));
        }
        if let Some(snat) = snat {
            self.in_use.ingress_bits.insert(gate::snat_bit(snat));
        }
        self.in_use.egress_bits.insert(gate::backend_source_bit(backend.0, backend.1, key.proto));
        self.in_use.egress_bits.insert(gate::backend_destination_bit(backend.0, backend.1, key.proto));
    }
}

/// Whether a flow is counted with this entry: it has no other, or one that answers are recognised by.
fn is_counted<A>(flow: &Flow<A>) -> bool {
    flow.kind == kind::FORWARD || flow.kind == kind::TUNNEL
}

impl FlowCounts {
    /// Takes an established flow and its entries out of the count again.
    fn forget<A: IpAddress>(&mut self, key: &FlowKey<A>, flow: &Flow<A>, entries: u32) {
        self.removed += entries;
        self.established_entries = self.established_entries.saturating_sub(entries);
        if let Some(flows) = self.of_state(key, flow) {
            *flows = flows.saturating_sub(1);
        }
    }

    /// The count that an established entry belongs to; a flow is counted with its forward half.
    fn of_state<A: IpAddress>(&mut self, key: &FlowKey<A>, flow: &Flow<A>) -> Option<&mut u32> {
        if !is_counted(flow) {
            return None;
        }
        Some(match (key.proto, flow.closing) {
            (TCP, 0) => &mut self.tcp,
            (TCP, _) => &mut self.tcp_closing,
            (SCTP, _) => &mut self.sctp,
            _ => &mut self.udp,
        })
    }
}

impl std::ops::Add for FlowCounts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            tcp: self.tcp + other.tcp,
            tcp_closing: self.tcp_closing + other.tcp_closing,
            udp: self.udp + other.udp,
            sctp: self.sctp + other.sctp,
            embryonic: self.embryonic + other.embryonic,
            established_entries: self.established_entries + other.established_entries,
            embryonic_entries: self.embryonic_entries + other.embryonic_entries,
            removed: self.removed + other.removed,
        }
    }
}

async fn tell(v4: Look<[u8; 4]>, v6: Look<Ip6>, outlets: &Outlets) {
    let counts = v4.counts + v6.counts;
    outlets.metrics.flows(&counts);
    outlets.metrics.flow_tables::<[u8; 4]>(&v4.counts);
    outlets.metrics.flow_tables::<Ip6>(&v6.counts);
    outlets.shared.update(|status| status.flows = counts);
    outlets.macs.send_replace(Arc::new(v4.macs.union(&v6.macs).copied().collect()));
    // Full only while the writer is still busy with the last one, and gone only when the agent ends.
    let _ = outlets.in_use.send(Needs { v4: v4.in_use, v6: v6.in_use }).await;
}

#[cfg(test)]
mod tests;
