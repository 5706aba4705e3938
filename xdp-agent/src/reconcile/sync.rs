//! From what a source says to the maps.

use std::time::{Duration, Instant};

use anyhow::ensure;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::{Needs, Reconciler};
use crate::{
    cluster::{
        self, Eligibility, NodeFacts,
        wanted::{Delta, Ip6, IpAddress},
    },
    host::Host,
    preflight,
    sockets::Hooks,
    source::Event,
    status::SyncState,
};

/// Events that are taken together: many at a time cost less than each of them alone, but the first should not wait for all
/// of a long row.
pub(super) const EVENTS_MAX: usize = 64;
/// Shortest time between two lines of the log that tell of writes.
const LOG_PAUSE: Duration = Duration::from_secs(1);

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

    /// Takes what the source tells until it has told of all objects, and fills the maps.
    ///
    /// # Errors
    /// When the source ends before.
    pub async fn fill(&mut self, events: &mut mpsc::Receiver<Event>) -> anyhow::Result<()> {
        let mut taken = Vec::with_capacity(EVENTS_MAX);
        while !self.is_complete {
            ensure!(events.recv_many(&mut taken, EVENTS_MAX).await > 0, "nobody tells of objects any more");
            self.take_events(&mut taken);
        }
        Ok(())
    }

    /// Takes what is known of this node.
    pub(super) fn set_facts(&mut self, host: &Host) {
        let own = host.own_addresses();
        let v4 = preflight::node_addresses::<[u8; 4]>(&self.names, host).into_iter().map(IpAddress::to_ip);
        let v6 = preflight::node_addresses::<Ip6>(&self.names, host).into_iter().map(IpAddress::to_ip);
        let addresses = v4.chain(v6).collect();
        self.facts = NodeFacts { addresses, own };
        self.cluster.set_node(self.facts.clone());
    }

    /// Plans and writes the way to what should be.
    pub(super) fn sync(&mut self) {
        if self.is_complete {
            let began = Instant::now();
            let cluster::Update { v4, v6 } = self.cluster.update();
            let (now_ms, metrics) = (self.now_ms(), &self.told.metrics);
            let changes = self.v4.update(&v4, &self.picture.v4.snat, now_ms, metrics)
                + self.v6.update(&v6, &self.picture.v6.snat, now_ms, metrics);
            if changes > 0 {
                self.backlog.wait();
            }
            if changes > 0 {
                self.told.gone.notify_one();
                self.may_have_other_ports = true;
            }
            self.tell_hooks(&v4, &v6, changes > 0);
            let took = began.elapsed();
            self.told.metrics.sync_duration.observe(took.as_secs_f64());
            self.note_written((!v4.is_empty() || !v6.is_empty()).then_some(took));
            self.untold.changes += changes;
            self.untold.took += took;
            self.tell_writes();
        }
        self.report();
        self.publish();
    }

    /// Tells the socket hooks what they have to know of the node and of Services, and that backends may have gone.
    fn tell_hooks(&mut self, v4: &Delta<[u8; 4]>, v6: &Delta<Ip6>, may_be_gone: bool) {
        let Some(hooks) = &mut self.hooks else { return };
        hooks.note(v4, v6);
        if let Err(error) = hooks.set_node(self.cluster.own_v4(), self.cluster.own_v6()) {
            self.told.metrics.map_write_failures.inc();
            warn!(%error, "cannot tell the socket hooks of the node; trying again with the next change");
        }
        if may_be_gone {
            hooks.gone.notify_one();
        }
    }

    pub(super) fn collect(&mut self, needs: &Needs) {
        let now_ms = self.now_ms();
        self.v4.collect(&needs.v4, now_ms, &self.told.metrics);
        self.v6.collect(&needs.v6, now_ms, &self.told.metrics);
        self.tell_fill();
    }

    /// Goes on with writes that were refused.
    pub(super) fn retry(&mut self) {
        self.v4.retry(&self.told.metrics);
        self.v6.retry(&self.told.metrics);
        self.note_written(None);
        self.publish();
    }

    /// Notes that nothing waits any more, unless something does.
    fn note_written(&mut self, took: Option<Duration>) {
        // Both are asked, whatever the first says.
        if self.v4.take_new_udp_frontends() | self.v6.take_new_udp_frontends() {
            self.hooks.iter().for_each(Hooks::look_again);
        }
        if self.is_complete && self.v4.is_written() && self.v6.is_written() {
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
        info!(services = self.services(), changes, ?took, "synced");
        self.untold = Untold { told_at: Some(Instant::now()), ..Untold::default() };
    }

    /// Tells how far the maps have come, for health.
    pub(super) fn publish(&self) {
        let node_eligible = match self.cluster.eligibility() {
            Eligibility::Eligible => true,
            Eligibility::Leaving => false,
            // Files need not hold the Node; an API server does, and what is known before it has spoken says nothing.
            Eligibility::Absent => !(self.expects_node && self.is_complete),
        };
        let state = SyncState {
            queued_since: self.backlog.since(),
            last_synced: self.backlog.last_synced(),
            node_eligible,
            health_checks: self.cluster.health_checks(),
            own_addresses: self.facts.own.clone(),
            no_local_endpoints: self.cluster.no_local_endpoints(),
        };
        self.told.sync.send_if_modified(|before| {
            let is_new = *before != state;
            *before = state;
            is_new
        });
    }
}
