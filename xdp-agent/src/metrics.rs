//! Metrics: every one of the agent's own in one list, and the programs' counters read at each scrape.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, NoLabelSet, text},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::Registry,
};
use tracing::debug;
use xdp_common::verdict::{self, Event, Reason, SNAT_ATTEMPTS_MAX};

use crate::{
    config::Sizes,
    devices::Mode,
    maps::Counters,
    plan::Fill,
    problem::{Problem, ProblemKind},
    status::{FlowCounts, InterfaceStatus},
};

/// Before every name.
const PREFIX: &str = "xdp_agent";

/// One fact of a closed set.
type Label = [(&'static str, &'static str); 1];

/// Declares the metrics once: field, name, and the doc comment as the help text.
macro_rules! metrics {
    ($(#[$meta:meta])* pub struct $name:ident {
        $($(#[doc = $doc:literal])* $field:ident: $ty:ty = ($metric:literal, $new:expr),)*
    }) => {
        $(#[$meta])*
        #[derive(Debug)]
        pub struct $name { $($(#[doc = $doc])* pub $field: $ty,)* }

        impl $name {
            fn register(registry: &mut Registry) -> Self {
                let metrics = Self { $($field: $new,)* };
                $(registry.register($metric, help(concat!($($doc),*)), metrics.$field.clone());)*
                metrics
            }
        }
    };
}

metrics! {
    /// What the agent measures of itself.
    pub struct Metrics {
        /// Entries in a table.
        table_entries: Family<Label, Gauge> = ("table_entries", Family::default()),
        /// Entries a table has room for.
        table_capacity: Family<Label, Gauge> = ("table_capacity", Family::default()),
        /// Flows by state.
        flow_states: Family<Label, Gauge> = ("flows", Family::default()),
        /// Entries of flow tables removed because their flow was over.
        gc_removed: Counter = ("gc_removed", Counter::default()),
        /// Looks at the flow tables that failed.
        gc_failures: Counter = ("gc_failures", Counter::default()),
        /// How XDP runs on an interface: 1 for its mode.
        attach_mode: Family<InterfaceMode, Gauge> = ("attach_mode", Family::default()),
        /// Attachments that failed while running.
        attach_failures: Counter = ("attach_failures", Counter::default()),
        /// Time from a change of the objects or the node to its last map write, in seconds.
        sync_duration: Histogram = ("sync_duration_seconds", Histogram::new(exponential_buckets(0.0001, 2.0, 18))),
        /// Writes to maps.
        map_writes: Counter = ("map_writes", Counter::default()),
        /// Writes to maps that the kernel refused; they are repeated.
        map_write_failures: Counter = ("map_write_failures", Counter::default()),
        /// Differences between maps and plan that the periodic comparison has mended.
        repairs: Counter = ("repairs", Counter::default()),
        /// What cannot be done as the objects ask, by kind.
        problems: Family<Label, Gauge> = ("problems", Family::default()),
        /// Routing epoch: how often next hops had to be asked for again.
        epoch: Gauge = ("routing_epoch", Gauge::default()),
        /// Objects that are followed, by kind.
        objects: Family<Label, Gauge> = ("objects", Family::default()),
        /// Service ports that are served.
        services: Gauge = ("services", Gauge::default()),
    }
}

/// An interface, of those that the flags name, and one of the modes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct InterfaceMode {
    interface: String,
    mode: &'static str,
}

impl Metrics {
    /// Writes how full the flow tables are.
    pub fn flows(&self, counts: &FlowCounts) {
        for (state, flows) in [
            ("tcp", counts.tcp),
            ("tcp_closing", counts.tcp_closing),
            ("udp", counts.udp),
            ("embryonic", counts.embryonic),
        ] {
            self.flow_states.get_or_create(&[("state", state)]).set(flows.into());
        }
        self.table_entries.get_or_create(&[("table", "established")]).set(counts.established_entries.into());
        self.table_entries.get_or_create(&[("table", "embryonic")]).set(counts.embryonic_entries.into());
        self.gc_removed.inc_by(counts.removed.into());
    }

    /// Writes how full the maps of the image are.
    pub fn fill(&self, fill: Fill) {
        for (table, entries) in [
            ("frontends", fill.frontends),
            ("backends", fill.backends),
            ("ring_slots", fill.ring_slots),
            ("networks", fill.networks),
        ] {
            self.table_entries.get_or_create(&[("table", table)]).set(entries.into());
        }
    }

    /// Writes how much the maps have room for.
    pub fn capacities(&self, sizes: &Sizes) {
        for (table, entries) in [
            ("established", sizes.established),
            ("embryonic", sizes.embryonic),
            ("frontends", sizes.frontends),
            ("backends", sizes.backends),
            ("ring_slots", sizes.ring_slots),
            ("networks", sizes.networks),
        ] {
            self.table_capacity.get_or_create(&[("table", table)]).set(entries.into());
        }
    }

    /// Writes how XDP runs on the interfaces.
    pub fn interfaces(&self, interfaces: &[InterfaceStatus]) {
        for interface in interfaces {
            for mode in Mode::ALL {
                let labels = InterfaceMode { interface: interface.name.clone(), mode: mode.label() };
                self.attach_mode.get_or_create(&labels).set((mode == interface.mode).into());
            }
        }
    }

    /// Writes how many problems there are of each kind.
    pub fn problems<'a>(&self, problems: impl Iterator<Item = &'a Problem> + Clone) {
        for kind in ProblemKind::ALL {
            let count = problems.clone().filter(|problem| problem.kind == kind).count();
            self.problems.get_or_create(&[("kind", kind.label())]).set(count as i64);
        }
    }
}

/// A registry with everything in it that the agent measures of itself.
pub fn registry() -> (Registry, Metrics) {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register("build", "Version of the agent", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
    let metrics = Metrics::register(&mut registry);
    (registry, metrics)
}

/// Everything in the text format of OpenMetrics.
///
/// # Errors
/// Never in practice: the text goes into a string.
pub fn encode(registry: &Registry) -> Result<String, fmt::Error> {
    let mut encoded = String::new();
    text::encode(&mut encoded, registry)?;
    Ok(encoded)
}

/// The counters of the programs, read at each scrape.
#[derive(Debug)]
pub struct Datapath(Counters);

impl Datapath {
    /// Adds the counters to a registry.
    pub fn register(registry: &mut Registry, counters: Counters) {
        registry.register_collector(Box::new(Self(counters)));
    }
}

impl Collector for Datapath {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let values = match self.0.read() {
            Ok(values) => values,
            Err(error) => {
                debug!(%error, "cannot read the programs' counters");
                return Ok(());
            }
        };
        encode_counters(&mut encoder, &values)
    }
}

fn encode_counters(encoder: &mut DescriptorEncoder<'_>, values: &[u64]) -> Result<(), fmt::Error> {
    let value = |counter: verdict::Counter| values.get(counter.index() as usize).copied().unwrap_or(0);
    let drops = Reason::ALL.iter().map(|&reason| (reason.label(), value(verdict::Counter::Drop(reason))));
    encode_family(encoder, "drops", "Frames dropped, by reason.", "reason", drops)?;
    let events = Event::ALL.iter().map(|&event| (event.label(), value(verdict::Counter::Event(event))));
    encode_family(encoder, "events", "What happened to frames and flows.", "event", events)?;
    let attempts: Vec<u64> =
        (0..SNAT_ATTEMPTS_MAX).map(|attempt| value(verdict::Counter::SnatAttempt(attempt))).collect();
    let sum = attempts.iter().zip(1u32..).map(|(&flows, attempts)| flows as f64 * f64::from(attempts)).sum();
    let mut buckets: Vec<(f64, u64)> =
        attempts.iter().zip(1u32..).map(|(&flows, attempts)| (f64::from(attempts), flows)).collect();
    buckets.push((f64::INFINITY, 0));
    let help = "Source ports tried before one was free, by new flow.";
    let mut histogram = encoder.encode_descriptor("snat_attempts", help, None, MetricType::Histogram)?;
    histogram.encode_histogram::<NoLabelSet>(sum, attempts.iter().sum(), &buckets, None)
}

fn encode_family(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &'static str,
    values: impl Iterator<Item = (&'static str, u64)>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (of, value) in values {
        ConstCounter::new(value).encode(family.encode_family(&[(label, of)])?)?;
    }
    Ok(())
}

/// A doc comment as a help text: one line; the format adds the full stop.
fn help(doc: &str) -> String {
    doc.trim().trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Fixed(Vec<u64>);

    impl Collector for Fixed {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
            encode_counters(&mut encoder, &self.0)
        }
    }

    #[test]
    fn counters_appear_under_their_labels() {
        let mut values = vec![0; verdict::COUNTERS as usize];
        values[verdict::Counter::Drop(Reason::SnatExhausted).index() as usize] = 3;
        values[verdict::Counter::Event(Event::Redirected).index() as usize] = 7;
        values[verdict::Counter::SnatAttempt(0).index() as usize] = 5;
        values[verdict::Counter::SnatAttempt(2).index() as usize] = 1;
        let (mut registry, metrics) = registry();
        metrics.flows(&FlowCounts { tcp: 4, ..FlowCounts::default() });
        registry.register_collector(Box::new(Fixed(values)));
        let text = encode(&registry).expect("text");
        for line in [
            "xdp_agent_drops_total{reason=\"snat_exhausted\"} 3",
            "xdp_agent_drops_total{reason=\"no_endpoint\"} 0",
            "xdp_agent_events_total{event=\"redirected\"} 7",
            "xdp_agent_snat_attempts_sum 8.0",
            "xdp_agent_snat_attempts_count 6",
            "xdp_agent_snat_attempts_bucket{le=\"1.0\"} 5",
            "xdp_agent_snat_attempts_bucket{le=\"3.0\"} 6",
            "xdp_agent_snat_attempts_bucket{le=\"+Inf\"} 6",
            "# HELP xdp_agent_flows Flows by state.",
            "xdp_agent_flows{state=\"tcp\"} 4",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn an_interface_has_exactly_one_mode() {
        let (registry, metrics) = registry();
        let interface = InterfaceStatus {
            name: "eth0".to_owned(),
            ifindex: 2,
            mode: Mode::Generic,
            reason: String::new(),
            xmit: crate::devices::Transmit { transmit: true, redirect: false },
            address: None,
        };
        metrics.interfaces(&[interface]);
        let text = encode(&registry).expect("text");
        let ones: Vec<&str> =
            text.lines().filter(|line| line.contains("attach_mode{") && line.ends_with(" 1")).collect();
        assert_eq!(ones, ["xdp_agent_attach_mode{interface=\"eth0\",mode=\"generic\"} 1"]);
    }
}
