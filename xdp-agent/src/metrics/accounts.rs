//! Packets and bytes of every service port, read from the programs' accounts at each scrape.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter},
    registry::Registry,
};

use crate::cluster::wanted::ServicePortName;

/// Packets and bytes of a service port.
pub type Account = (ServicePortName, u64, u64);

/// The accounts of all service ports.
pub struct Accounts(Box<dyn Fn() -> Vec<Account> + Send + Sync>);

impl Accounts {
    /// Adds the accounts to a registry.
    pub fn register(registry: &mut Registry, read: impl Fn() -> Vec<Account> + Send + Sync + 'static) {
        registry.register_collector(Box::new(Self(Box::new(read))));
    }
}

impl fmt::Debug for Accounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Accounts")
    }
}

impl Collector for Accounts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let accounts = (self.0)();
        let packets = "Packets to and from clients of a service port, as far as they pass the programs.";
        encode(
            &mut encoder,
            "service_packets",
            packets,
            accounts.iter().map(|(port, packets, _)| (port, *packets)),
        )?;
        let bytes = "Bytes of these packets, of IP and above.";
        encode(&mut encoder, "service_bytes", bytes, accounts.iter().map(|(port, _, bytes)| (port, *bytes)))
    }
}

fn encode<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (&'a ServicePortName, u64)>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (port, value) in values {
        let labels = [
            ("namespace", port.namespace.as_str()),
            ("service", port.service.as_str()),
            ("port", port.port.as_str()),
            ("protocol", port.protocol.name()),
        ];
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cluster::wanted::Protocol, metrics::Registries};

    #[test]
    fn every_service_port_has_its_packets_and_bytes() {
        let (mut registries, _, _) = Registries::new();
        Accounts::register(&mut registries.agent, || {
            let port = ServicePortName {
                namespace: "shop".to_owned(),
                service: "web".to_owned(),
                port: "http".to_owned(),
                protocol: Protocol::Tcp,
            };
            vec![(port, 3, 4_500)]
        });
        let text = registries.encode().expect("text");
        let labels = "{namespace=\"shop\",service=\"web\",port=\"http\",protocol=\"TCP\"}";
        for line in [
            format!("xdp_agent_service_packets_total{labels} 3"),
            format!("xdp_agent_service_bytes_total{labels} 4500"),
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
