//! What means the same as in kube-proxy, under its names (pkg/proxy/metrics/metrics.go), so that its dashboards and
//! alerts go on.

use std::{
    fmt,
    iter::successors,
    sync::atomic::AtomicU64,
    time::{Duration, SystemTime},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{
        MetricType,
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};
use tokio::sync::watch;

use super::{Label, help, metrics};
use crate::{
    cluster::wanted::{Ip6, IpAddress},
    status::SyncState,
};

type Seconds = Gauge<f64, AtomicU64>;
type Histograms = Family<Label, Histogram, fn() -> Histogram>;

metrics! {
    /// What kube-proxy measures too.
    pub struct KubeProxy {
        /// Time from a change of the objects or the node to its last map write, in seconds.
        sync_duration: Histograms = ("sync_proxy_rules_duration_seconds", Family::new_with_constructor(sync_buckets)),
        /// When the maps were last as everything known asks.
        last_synced: Family<Label, Seconds> = ("sync_proxy_rules_last_timestamp_seconds", Family::default()),
        /// When a change last came.
        last_queued: Family<Label, Seconds> = ("sync_proxy_rules_last_queued_timestamp_seconds", Family::default()),
        /// Time from the change of a pod or a Service to its last map write, as EndpointSlices tell, in seconds.
        programming_duration: Histograms =
            ("network_programming_duration_seconds", Family::new_with_constructor(programming_buckets)),
        /// Changes of EndpointSlices that are not in the maps yet.
        endpoint_changes_pending: Gauge = ("sync_proxy_rules_endpoint_changes_pending", Gauge::default()),
        /// Changes of EndpointSlices.
        endpoint_changes: Counter = ("sync_proxy_rules_endpoint_changes", Counter::default()),
        /// Changes of Services that are not in the maps yet.
        service_changes_pending: Gauge = ("sync_proxy_rules_service_changes_pending", Gauge::default()),
        /// Changes of Services.
        service_changes: Counter = ("sync_proxy_rules_service_changes", Counter::default()),
        /// Answers of /healthz, by status.
        healthz: Family<Label, Counter> = ("proxy_healthz", Family::default()),
        /// Answers of /livez, by status.
        livez: Family<Label, Counter> = ("proxy_livez", Family::default()),
    }
}

impl KubeProxy {
    /// All of it in a registry, at zero where the labels are known.
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self::register(registry);
        for code in ["200", "503"] {
            metrics.healthz.get_or_create(&[("code", code)]).inc_by(0);
            metrics.livez.get_or_create(&[("code", code)]).inc_by(0);
        }
        metrics
    }

    /// Changes have come, which wait for [`synced`](Self::synced).
    pub fn queued(&self, services: u32, slices: u32, now: SystemTime) {
        self.service_changes.inc_by(services.into());
        self.service_changes_pending.inc_by(services.into());
        self.endpoint_changes.inc_by(slices.into());
        self.endpoint_changes_pending.inc_by(slices.into());
        for family in FAMILIES {
            self.last_queued.get_or_create(&[("ip_family", family)]).set(seconds(now));
        }
    }

    /// Every change that had come is in the maps; the last of a family took so long.
    pub fn synced(&self, v4: Option<Duration>, v6: Option<Duration>, now: SystemTime) {
        self.service_changes_pending.set(0);
        self.endpoint_changes_pending.set(0);
        for (family, took) in FAMILIES.into_iter().zip([v4, v6]) {
            let label = [("ip_family", family)];
            self.last_synced.get_or_create(&label).set(seconds(now));
            if let Some(took) = took {
                self.sync_duration.get_or_create(&label).observe(took.as_secs_f64());
            }
        }
    }

    /// What an EndpointSlice says has changed at `triggered` is in the maps of `family`.
    pub fn programmed(&self, family: &'static str, triggered: SystemTime, now: SystemTime) {
        // Clocks of two machines: a change never comes before its cause.
        let took = now.duration_since(triggered).unwrap_or_default();
        self.programming_duration.get_or_create(&[("ip_family", family)]).observe(took.as_secs_f64());
    }

    /// An answer of `/healthz`.
    pub(crate) fn healthz(&self, code: &str) {
        self.healthz.get_or_create(&[("code", known(code))]).inc();
    }

    /// An answer of `/livez`.
    pub(crate) fn livez(&self, code: &str) {
        self.livez.get_or_create(&[("code", known(code))]).inc();
    }
}

const FAMILIES: [&str; 2] = [<[u8; 4]>::FAMILY, Ip6::FAMILY];

fn known(code: &str) -> &'static str {
    if code == "200" { "200" } else { "503" }
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn sync_buckets() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

fn programming_buckets() -> Histogram {
    let steps =
        |first: f64, step: f64, count: usize| successors(Some(first), move |at| Some(at + step)).take(count);
    let buckets = [0.0, 0.25, 0.5].into_iter();
    Histogram::new(
        buckets.chain(steps(1.0, 1.0, 59)).chain(steps(60.0, 5.0, 12)).chain(steps(120.0, 30.0, 7)),
    )
}

/// What the writer of the maps says of its work, read at each scrape.
#[derive(Debug)]
pub struct Sync(watch::Receiver<SyncState>);

impl Sync {
    /// Adds it to the registry of kube-proxy's names.
    pub fn register(registry: &mut Registry, sync: watch::Receiver<SyncState>) {
        registry.register_collector(Box::new(Self(sync)));
    }
}

impl Collector for Sync {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let counts = self.0.borrow().no_local_endpoints;
        let help =
            "Service ports that drop because a policy asks for local endpoints and there are only others.";
        let mut family = encoder.encode_descriptor(
            "sync_proxy_rules_no_local_endpoints_total",
            help,
            None,
            MetricType::Gauge,
        )?;
        for (ip_family, counts) in FAMILIES.into_iter().zip([counts.v4, counts.v6]) {
            for (policy, ports) in [("internal", counts.internal), ("external", counts.external)] {
                let labels = [("traffic_policy", policy), ("ip_family", ip_family)];
                ConstGauge::new(i64::from(ports)).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cluster::PolicyCounts, metrics::Registries};

    #[test]
    fn dashboards_of_kube_proxy_find_its_names_labels_and_buckets() {
        let (mut registries, _, metrics) = Registries::new();
        let mut state = SyncState::default();
        state.no_local_endpoints.v6 = PolicyCounts { internal: 0, external: 2 };
        Sync::register(&mut registries.kube_proxy, watch::channel(state).1);
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        metrics.queued(2, 1, at(100));
        metrics.synced(Some(Duration::from_millis(3)), None, at(101));
        metrics.queued(0, 4, at(102));
        metrics.programmed("IPv4", at(40), at(101));
        metrics.programmed("IPv4", at(400), at(101));
        metrics.healthz("503");
        let text = registries.encode().expect("text");
        for line in [
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.004\",ip_family=\"IPv4\"} 1",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"16.384\",ip_family=\"IPv4\"} 1",
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv6\"} 101.0",
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family=\"IPv4\"} 102.0",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"0.0\",ip_family=\"IPv4\"} 1",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"60.0\",ip_family=\"IPv4\"} 1",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"65.0\",ip_family=\"IPv4\"} 2",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"300.0\",ip_family=\"IPv4\"} 2",
            "kubeproxy_sync_proxy_rules_service_changes_pending 0",
            "kubeproxy_sync_proxy_rules_service_changes_total 2",
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 4",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 5",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"external\",ip_family=\"IPv6\"} 2",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"internal\",ip_family=\"IPv4\"} 0",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
            "kubeproxy_proxy_livez_total{code=\"200\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
