//! The counters of the programs, read at each scrape.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet},
    metrics::{MetricType, counter::ConstCounter},
    registry::Registry,
};
use tracing::debug;
use xdp_common::verdict::{self, Event, Reason, SNAT_ATTEMPTS_MAX};

use crate::maps::Counters;

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

pub(super) fn encode_counters(encoder: &mut DescriptorEncoder<'_>, values: &[u64]) -> Result<(), fmt::Error> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{metrics::Registries, status::FlowCounts};

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
        let (mut registries, metrics, _) = Registries::new();
        metrics.flows(&FlowCounts { tcp: 4, ..FlowCounts::default() });
        registries.agent.register_collector(Box::new(Fixed(values)));
        let text = registries.encode().expect("text");
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
}
