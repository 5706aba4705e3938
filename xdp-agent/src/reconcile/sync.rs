//! From what a source says to the maps.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Duration, Instant},
};

use tokio::time::Instant as TokioInstant;
use tracing::{debug, info, warn};

use super::{RETRY_PAUSE, Reconciler};
use crate::{
    cluster::{
        self, Eligibility, NodeFacts,
        wanted::{Delta, Protocol},
    },
    host::Host,
    plan::{InUse, Update},
    preflight,
    source::Event,
    status::SyncState,
};

/// Events that are taken together: many at a time cost less than each of them alone, but the first should not wait for all
/// of a long row.
pub(super) const EVENTS_MAX: usize = 64;
/// A write that is refused more often is left to the next comparison, so that those behind it go on.
const ATTEMPTS_MAX: u32 = 5;
/// Shortest time between two lines of the log that tell of writes.
const LOG_PAUSE: Duration = Duration::from_secs(1);
/// A buffer for so many writes is kept; those of a start take more, and give it back.
const PENDING_KEPT: usize = 4096;

/// What the log has not told yet.
#[derive(Debug, Default)]
pub(super) struct Untold {
    changes: usize,
    took: Duration,
    told_at: Option<Instant>,
}

impl Reconciler {
    /// Takes what a source says and brings it into the maps. Before everything that exists has been told, nothing is
    /// planned: what is not known yet would look as if it were gone.
    pub(super) fn take_events(&mut self, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            match event {
                Event::Changes(changes) => {
                    self.backlog.note(&changes);
                    changes.into_iter().for_each(|change| self.cluster.apply(change));
                }
                Event::Problems(problems) => {
                    self.source_problems = problems;
                    self.source_problems_version += 1;
                }
                Event::Synced => self.is_complete = true,
            }
        }
        self.sync();
    }

    /// Takes what is known of this node.
    pub(super) fn set_facts(&mut self, host: &Host) {
        let own: BTreeSet<_> = host.own_addresses().into_iter().map(Into::into).collect();
        let found = preflight::node_addresses(&self.parts.names, host);
        let addresses = found.into_iter().map(IpAddr::from).collect();
        self.facts = NodeFacts { addresses, own };
        self.cluster.set_node(self.facts.clone());
    }

    /// Plans and writes the way to what should be.
    pub(super) fn sync(&mut self) {
        if self.is_complete {
            let began = Instant::now();
            let cluster::Update { v4: delta, v6 } = self.cluster.update();
            self.tell_unserved(&delta, &v6);
            self.parts.names_of_services.forget(&delta, &self.plan);
            let update = self.plan.update(&delta, true, &self.picture.snat, self.now_ms());
            self.parts.names_of_services.learn(&delta, &self.plan);
            let changes = update.changes.len();
            if changes > 0 {
                self.backlog.wait();
            }
            self.take(update);
            if let Some(hooks) = &mut self.parts.hooks {
                hooks.note(&delta);
            }
            self.tell_hooks(changes > 0);
            let took = began.elapsed();
            self.parts.metrics.sync_duration.observe(took.as_secs_f64());
            self.note_written((!delta.is_empty()).then_some(took));
            self.untold.changes += changes;
            self.untold.took += took;
            self.tell_writes();
        }
        self.report();
        self.publish();
    }

    /// Tells the socket hooks what they have to know of the node, and that backends may have gone.
    fn tell_hooks(&mut self, may_be_gone: bool) {
        let [node, node_port] = self.cluster.own_v4();
        let Some(hooks) = &mut self.parts.hooks else { return };
        if let Err(error) = hooks.set_node(node, node_port) {
            self.parts.metrics.map_write_failures.inc();
            warn!(%error, "cannot tell the socket hooks of the node; trying again with the next change");
        }
        if may_be_gone {
            hooks.gone.notify_one();
        }
    }

    /// Says once of each what the datapath does not forward yet: it has no maps of IPv6, and reads no SCTP.
    fn tell_unserved(&mut self, v4: &Delta<[u8; 4]>, v6: &Delta<[u8; 16]>) {
        let has_sctp = v4.ports.iter().any(|(name, port)| port.is_some() && name.protocol == Protocol::Sctp);
        let has_ipv6 = v6.ports.values().any(Option::is_some);
        for (is_there, is_told, what) in [
            (has_ipv6, &mut self.is_ipv6_told, "IPv6 addresses"),
            (has_sctp, &mut self.is_sctp_told, "SCTP ports"),
        ] {
            if is_there && !std::mem::replace(is_told, true) {
                warn!("Services have {what}, which this version leaves to the kernel");
            }
        }
    }

    pub(super) fn collect(&mut self, in_use: &InUse) {
        let update = self.plan.collect(in_use, self.now_ms());
        self.take(update);
        self.parts.metrics.fill(self.plan.fill());
    }

    fn take(&mut self, update: Update<[u8; 4]>) {
        self.pending.extend(update.changes);
        self.update_at = update.retry_in_ms.map(|ms| TokioInstant::now() + Duration::from_millis(ms.max(1)));
        if self.retry_at.is_none() {
            self.drain();
        }
    }

    /// Writes what is pending, in order; stops at a refusal, because later writes may count on the refused one.
    fn drain(&mut self) {
        self.retry_at = None;
        while !self.pending.is_empty() {
            let (made, result) = self.parts.maps.apply(self.pending.make_contiguous());
            self.pending.drain(..made);
            self.parts.metrics.map_writes.inc_by(made as u64);
            if made > 0 {
                self.attempts = 0;
            }
            let Err(error) = result else { continue };
            self.parts.metrics.map_write_failures.inc();
            self.attempts += 1;
            let change = self.pending.front().map(|change| change.summary());
            if self.attempts < ATTEMPTS_MAX {
                debug!(%error, change, "a write to a map was refused");
                self.retry_at = Some(TokioInstant::now() + RETRY_PAUSE);
                return;
            }
            warn!(%error, change, "a write to a map is refused again and again; leaving it to the next comparison");
            self.pending.pop_front();
            self.attempts = 0;
        }
        self.pending.shrink_to(PENDING_KEPT);
    }

    /// Goes on with writes that were refused.
    pub(super) fn retry(&mut self) {
        self.drain();
        self.note_written(None);
        self.publish();
    }

    /// Notes that nothing waits any more, unless something does.
    fn note_written(&mut self, took: Option<Duration>) {
        if self.is_complete && self.pending.is_empty() {
            self.first_image = None;
            self.backlog.written(took);
        }
    }

    /// Says in the log what was written, not too often.
    pub(super) fn tell_writes(&mut self) {
        let is_soon = self.untold.told_at.is_some_and(|at| at.elapsed() < LOG_PAUSE);
        if self.untold.changes == 0 || is_soon {
            return;
        }
        let Untold { changes, took, .. } = self.untold;
        info!(services = self.plan.services(), changes, ?took, "synced");
        self.untold = Untold { told_at: Some(Instant::now()), ..Untold::default() };
    }

    /// Tells how far the maps have come, for health.
    pub(super) fn publish(&self) {
        let node_eligible = match self.cluster.eligibility() {
            Eligibility::Eligible => true,
            Eligibility::Leaving => false,
            // Files need not hold the Node; an API server does, and what is known before it has spoken says nothing.
            Eligibility::Absent => !(self.parts.expects_node && self.is_complete),
        };
        let state = SyncState {
            queued_since: self.backlog.since(),
            last_synced: self.backlog.last_synced(),
            node_eligible,
            health_checks: self.cluster.health_checks(),
            own_addresses: self.facts.own.clone(),
            no_local_endpoints: self.cluster.no_local_endpoints(),
        };
        self.parts.sync.send_if_modified(|before| {
            let is_new = *before != state;
            *before = state;
            is_new
        });
    }
}
