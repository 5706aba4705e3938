//! Toward which backends source ports have run out, read at each scrape.

use std::{fmt, io, net::SocketAddr};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter},
    registry::Registry,
};
use tracing::debug;

use crate::{
    cluster::wanted::{Ip6, Protocol},
    maps::ExhaustedMap,
};

/// A backend, its protocol, and how often a new flow has found no source port toward it.
type Exhaustion = (SocketAddr, Protocol, u64);

/// The backends toward which source ports have run out, read at each scrape.
#[derive(Debug)]
pub struct Exhausted {
    v4: ExhaustedMap<[u8; 4]>,
    v6: ExhaustedMap<Ip6>,
}

impl Exhausted {
    /// Adds them to a registry.
    pub fn register(registry: &mut Registry, v4: ExhaustedMap<[u8; 4]>, v6: ExhaustedMap<Ip6>) {
        registry.register_collector(Box::new(Self { v4, v6 }));
    }

    fn read(&self) -> io::Result<Vec<Exhaustion>> {
        Ok([self.v4.read()?, self.v6.read()?].concat())
    }
}

impl Collector for Exhausted {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        match self.read() {
            Ok(backends) => encode(&mut encoder, &backends),
            Err(error) => {
                debug!(%error, "cannot read toward which backends source ports have run out");
                Ok(())
            }
        }
    }
}

pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>, backends: &[Exhaustion]) -> Result<(), fmt::Error> {
    let help = "Packets of new flows for which no source port was free, by backend.";
    let mut family = encoder.encode_descriptor("snat_exhausted", help, None, MetricType::Counter)?;
    for (backend, protocol, times) in backends {
        let labels = [("backend", backend.to_string()), ("protocol", protocol.name().to_owned())];
        ConstCounter::new(*times).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Registries;

    #[derive(Debug)]
    struct Fixed;

    impl Collector for Fixed {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
            let backends = [
                (SocketAddr::from(([10, 244, 2, 2], 8080)), Protocol::Tcp, 3),
                (SocketAddr::from(([0xfd00, 0, 0, 0, 0, 0, 0, 2], 53)), Protocol::Udp, 1),
            ];
            encode(&mut encoder, &backends)
        }
    }

    #[test]
    fn each_backend_is_named() {
        let (mut registries, _, _) = Registries::new();
        registries.agent.register_collector(Box::new(Fixed));
        let text = registries.encode().expect("text");
        for line in [
            "xdp_agent_snat_exhausted_total{backend=\"10.244.2.2:8080\",protocol=\"TCP\"} 3",
            "xdp_agent_snat_exhausted_total{backend=\"[fd00::2]:53\",protocol=\"UDP\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
