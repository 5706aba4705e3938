//! What has been told and is not in the maps yet.

use std::time::{Duration, Instant, SystemTime};

use crate::{
    cluster::wanted::{Ip6, IpAddress},
    metrics::KubeProxy,
    objects::{Change, Slice},
};

/// Changes that wait for the maps.
#[derive(Debug)]
pub(super) struct Backlog {
    metrics: KubeProxy,
    /// When this process began: it could not be fast with what happened earlier.
    began: SystemTime,
    since: Option<Instant>,
    last_synced: Option<SystemTime>,
    /// What EndpointSlices tell of, by family, and when it happened.
    causes: Vec<(&'static str, SystemTime)>,
}

impl Backlog {
    pub(super) fn new(metrics: KubeProxy) -> Self {
        Self { metrics, began: SystemTime::now(), since: None, last_synced: None, causes: Vec::new() }
    }

    /// Notes what has been told.
    pub(super) fn note(&mut self, changes: &[Change]) {
        let (mut services, mut slices) = (0, 0);
        for change in changes {
            match change {
                Change::Service(..) => services += 1,
                Change::Slice(_, slice) => {
                    slices += 1;
                    self.causes.extend(slice.as_ref().and_then(|slice| cause(slice, self.began)));
                }
                Change::Node(..) | Change::ServiceCidr(..) => {}
            }
        }
        if services + slices > 0 {
            self.metrics.queued(services, slices, SystemTime::now());
        }
    }

    /// Something waits from now on, if nothing did.
    pub(super) fn wait(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }

    /// Everything is in the maps, the last of it after so long.
    pub(super) fn written(&mut self, took: Option<Duration>) {
        let now = SystemTime::now();
        for (family, cause) in self.causes.drain(..) {
            self.metrics.programmed(family, cause, now);
        }
        if self.since.take().is_some() || self.last_synced.is_none() {
            self.last_synced = Some(now);
        }
        self.metrics.synced(took, None, now);
    }

    /// Since when the oldest change waits.
    pub(super) fn since(&self) -> Option<Instant> {
        self.since
    }

    /// When everything that was known was in the maps for the last time.
    pub(super) fn last_synced(&self) -> Option<SystemTime> {
        self.last_synced
    }
}

/// What has led to an EndpointSlice as it is, if that was after `began`, and its family.
fn cause(slice: &Slice, began: SystemTime) -> Option<(&'static str, SystemTime)> {
    let ms = u64::try_from(slice.trigger_ms?).ok()?;
    let at = SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
    let family = if slice.v6.is_empty() { <[u8; 4]>::FAMILY } else { Ip6::FAMILY };
    (at > began).then_some((family, at))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{metrics::Registries, objects::ObjectName};

    #[test]
    fn what_waits_longest_counts_until_everything_is_written() {
        let mut backlog = Backlog::new(Registries::new().2);
        assert_eq!((backlog.since(), backlog.last_synced()), (None, None));
        backlog.wait();
        let first = backlog.since();
        backlog.wait();
        assert!(first.is_some() && backlog.since() == first);
        backlog.written(None);
        assert_eq!(backlog.since(), None);
        let synced = backlog.last_synced();
        backlog.written(None);
        assert!(synced.is_some() && backlog.last_synced() == synced, "nothing has come since");
    }

    #[test]
    fn the_time_from_a_cause_to_the_maps_is_measured_once_and_only_for_what_happened_since_the_start() {
        let (registries, _, metrics) = Registries::new();
        let mut backlog = Backlog::new(metrics);
        let slice = |trigger: SystemTime| {
            let ms = trigger.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis();
            let mut slice = Slice::default();
            slice.trigger_ms.replace(ms as i64);
            Change::Slice(ObjectName::new("shop", "web-1"), Some(Arc::new(slice)))
        };
        let hour = Duration::from_secs(3600);
        backlog.note(&[slice(backlog.began - hour), slice(backlog.began + hour)]);
        backlog.written(Some(Duration::from_millis(3)));
        backlog.written(None);
        let text = registries.encode().unwrap();
        for line in [
            "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"} 1",
            "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} 1",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 2",
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
