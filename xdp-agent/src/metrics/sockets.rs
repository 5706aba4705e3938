//! What the socket hooks have done, and what was done for them.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
    },
    registry::Registry,
};
use tracing::debug;
use xdp_common::{tables::SocketCall, verdict::Reason};

use super::{help, metrics};
use crate::maps::SocketCounters;

metrics! {
    /// What is done for the socket hooks.
    pub struct SocketMetrics {
        /// UDP sockets ended because the backend that they were connected to is gone, or because they were connected to a Service before the hooks led them to one.
        destroyed: Counter = ("sockets_destroyed", Counter::default()),
    }
}

impl SocketMetrics {
    /// Adds them, and the counters of the hooks, to a registry.
    pub fn add(registry: &mut Registry, counters: SocketCounters) -> Self {
        registry.register_collector(Box::new(Hooks(counters)));
        Self::register(registry)
    }
}

/// The counters of the hooks, read at each scrape.
#[derive(Debug)]
struct Hooks(SocketCounters);

impl Collector for Hooks {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        match self.0.read() {
            Ok(values) => encode(&mut encoder, &values),
            Err(error) => {
                debug!(%error, "cannot read the counters of the socket hooks");
                Ok(())
            }
        }
    }
}

pub(super) fn encode(
    encoder: &mut DescriptorEncoder<'_>,
    values: &[(SocketCall, Option<Reason>, u64)],
) -> Result<(), fmt::Error> {
    let text =
        "Calls of processes to Services, by call and what became of it: translated, or refused for a reason.";
    let mut family = encoder.encode_descriptor("socket_calls", text, None, MetricType::Counter)?;
    for (call, refused, value) in values.iter().filter(|(call, refused, _)| can_be(*call, *refused)) {
        let labels = [("call", call.label()), ("result", label(*call, *refused))];
        ConstCounter::new(*value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

/// Whether a call can end so.
fn can_be(call: SocketCall, refused: Option<Reason>) -> bool {
    match refused {
        None => true,
        Some(
            Reason::NoEndpoint
            | Reason::NoLocalEndpoint
            | Reason::SourceRange
            | Reason::UnknownPort
            | Reason::UnknownServiceAddress
            | Reason::NoBackend,
        ) => call != SocketCall::Bind,
        // Of packets only.
        Some(
            Reason::SnatExhausted
            | Reason::FlowInsert
            | Reason::EndpointRemoved
            | Reason::TunnelMtu
            | Reason::TunnelHops
            | Reason::TunnelWay
            | Reason::EchoLimit,
        ) => false,
    }
}

fn label(call: SocketCall, refused: Option<Reason>) -> &'static str {
    match (call, refused) {
        (SocketCall::Bind, None) => "node_port",
        (SocketCall::TcpConnect | SocketCall::UdpConnect | SocketCall::UdpSend, None) => "translated",
        (_, Some(reason)) => reason.label(),
    }
}

/// The metrics without the counters of hooks.
#[cfg(test)]
pub(super) fn unread(registry: &mut Registry) -> SocketMetrics {
    SocketMetrics::register(registry)
}

/// Counters of hooks that have counted nothing.
#[cfg(test)]
pub(super) fn zeros() -> Vec<(SocketCall, Option<Reason>, u64)> {
    let results = || std::iter::once(None).chain(Reason::ALL.iter().copied().map(Some));
    SocketCall::ALL.into_iter().flat_map(|call| results().map(move |result| (call, result, 0))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Registries;

    #[derive(Debug)]
    struct Fixed(Vec<(SocketCall, Option<Reason>, u64)>);

    impl Collector for Fixed {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
            encode(&mut encoder, &self.0)
        }
    }

    #[test]
    fn calls_appear_under_their_labels() {
        let values = vec![
            (SocketCall::TcpConnect, None, 3),
            (SocketCall::UdpSend, Some(Reason::NoEndpoint), 2),
            (SocketCall::UdpSend, Some(Reason::SnatExhausted), 9),
            (SocketCall::Bind, None, 1),
        ];
        let (mut registries, _, _) = Registries::new();
        registries.agent.register_collector(Box::new(Fixed(values)));
        let text = registries.encode().expect("text");
        let found: Vec<&str> = text.lines().filter(|line| line.contains("socket_calls_total{")).collect();
        assert_eq!(
            found,
            [
                "xdp_agent_socket_calls_total{call=\"tcp_connect\",result=\"translated\"} 3",
                "xdp_agent_socket_calls_total{call=\"udp_send\",result=\"no_endpoint\"} 2",
                "xdp_agent_socket_calls_total{call=\"bind\",result=\"node_port\"} 1",
            ]
        );
    }
}
