//! An answer: what a new connection meets, for programs and for people.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use serde::Serialize;

use super::{decision::Decision, world::Claimant};
use crate::cluster::wanted::{FrontendKind, IpAddress};

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It reaches one of the endpoints.
    Forward,
    /// It is refused, and the client told.
    Reject,
    /// It is dropped in silence.
    Drop,
    /// It is left to the kernel, as if there were no Services.
    Pass,
}

/// Where a connection comes from, as policies see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// From outside the cluster.
    External,
    /// From a pod, as the detect-local mode says.
    Pod,
    /// From a process of the node itself.
    Host,
}

/// What sort of address it is addressed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Frontend {
    /// `spec.clusterIP`.
    #[serde(rename = "ClusterIP")]
    ClusterIp,
    /// `spec.ports[].nodePort` on an address of the node.
    NodePort,
    /// `status.loadBalancer.ingress`.
    LoadBalancer,
    /// `spec.externalIPs`.
    #[serde(rename = "ExternalIP")]
    ExternalIp,
    /// `spec.healthCheckNodePort` on an address of the node.
    HealthCheckNodePort,
}

/// An endpoint that the connection may get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Endpoint {
    /// Address and port; IPv6 addresses in brackets.
    pub address: String,
    /// Whether it is on this node.
    pub local: bool,
    /// Whether it sees an address of this node as its client.
    pub snat: bool,
}

/// What a new connection meets; the fields, their names and their order are the output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// What becomes of it.
    pub verdict: Verdict,
    /// What sort of address it is addressed to, none where it is nobody's.
    pub frontend: Option<Frontend>,
    /// Whose: `namespace/name:port`, without the last part where the port has no name.
    pub service: Option<String>,
    /// Where it comes from.
    pub source: Source,
    /// Every endpoint that it may get, sorted by address and port.
    pub endpoints: Vec<Endpoint>,
    /// Why it is not forwarded.
    pub reason: Option<String>,
}

impl Answer {
    /// A decision in words, with the frontend it is about and whose that is.
    pub(super) fn of<A: IpAddress>(decision: &Decision<A>, claimant: Option<Claimant<'_, A>>) -> Self {
        let endpoints = decision.targets.iter().map(|target| Endpoint {
            address: endpoint(target.addr.to_ip(), target.port),
            local: target.is_local,
            snat: target.is_masqueraded,
        });
        let nobodys = || (decision.verdict == Verdict::Pass).then_some(NOBODYS);
        Self {
            verdict: decision.verdict,
            frontend: claimant.map(|(_, frontend)| frontend.kind.into()),
            service: claimant.map(|(port, _)| port.name.without_protocol()),
            source: decision.source,
            endpoints: endpoints.collect(),
            reason: decision.reason.or_else(nobodys).map(str::to_owned),
        }
    }
}

/// Why what is nobody's is left alone.
const NOBODYS: &str = "No Service has this address and port; the kernel goes on with it.";

impl From<FrontendKind> for Frontend {
    fn from(kind: FrontendKind) -> Self {
        match kind {
            FrontendKind::ClusterIp => Self::ClusterIp,
            FrontendKind::ExternalIp => Self::ExternalIp,
            FrontendKind::LoadBalancer => Self::LoadBalancer,
            FrontendKind::NodePort => Self::NodePort,
        }
    }
}

impl Frontend {
    /// Its name, as Kubernetes writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
            Self::ExternalIp => "ExternalIP",
            Self::HealthCheckNodePort => "HealthCheckNodePort",
        }
    }
}

impl Verdict {
    const fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Reject => "reject",
            Self::Drop => "drop",
            Self::Pass => "pass",
        }
    }
}

impl Source {
    const fn text(self) -> &'static str {
        match self {
            Self::External => "a client outside the cluster",
            Self::Pod => "a pod",
            Self::Host => "a process of the node",
        }
    }
}

/// For people.
impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: from {}", self.verdict.name(), self.source.text())?;
        match (self.frontend, &self.service) {
            (Some(frontend), Some(service)) => write!(f, " to the {} of {service}", frontend.name())?,
            (Some(frontend), None) => write!(f, " to a {}", frontend.name())?,
            (None, Some(service)) => write!(f, " to {service}")?,
            (None, None) => {}
        }
        writeln!(f)?;
        if let Some(reason) = &self.reason {
            writeln!(f, "  {reason}")?;
        }
        let width = self.endpoints.iter().map(|endpoint| endpoint.address.len()).max().unwrap_or(0);
        for endpoint in &self.endpoints {
            let place = if endpoint.local { "on this node" } else { "elsewhere   " };
            let seen =
                if endpoint.snat { "sees an address of this node" } else { "sees the client's address" };
            writeln!(f, "  {:width$}  {place}  {seen}", endpoint.address)?;
        }
        Ok(())
    }
}

/// An address and port for people and programs.
pub(super) fn endpoint(addr: IpAddr, port: u16) -> String {
    SocketAddr::new(addr, port).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_are_the_documented_ones() {
        let answer = Answer {
            verdict: Verdict::Forward,
            frontend: Some(Frontend::ClusterIp),
            service: Some("default/web:http".to_owned()),
            source: Source::External,
            endpoints: vec![Endpoint { address: "10.0.0.1:80".to_owned(), local: true, snat: false }],
            reason: None,
        };
        let expected = r#"{"verdict":"forward","frontend":"ClusterIP","service":"default/web:http","source":"external","endpoints":[{"address":"10.0.0.1:80","local":true,"snat":false}],"reason":null}"#;
        assert_eq!(serde_json::to_string(&answer).expect("JSON"), expected);
        let refused = Answer {
            verdict: Verdict::Reject,
            frontend: None,
            service: None,
            source: Source::Pod,
            endpoints: Vec::new(),
            reason: Some("why".to_owned()),
        };
        let expected = r#"{"verdict":"reject","frontend":null,"service":null,"source":"pod","endpoints":[],"reason":"why"}"#;
        assert_eq!(serde_json::to_string(&refused).expect("JSON"), expected);
    }

    #[test]
    fn names_in_json_and_in_text_are_the_same() {
        for frontend in [
            Frontend::ClusterIp,
            Frontend::NodePort,
            Frontend::LoadBalancer,
            Frontend::ExternalIp,
            Frontend::HealthCheckNodePort,
        ] {
            assert_eq!(serde_json::to_value(frontend).expect("JSON"), frontend.name());
        }
        for verdict in [Verdict::Forward, Verdict::Reject, Verdict::Drop, Verdict::Pass] {
            assert_eq!(serde_json::to_value(verdict).expect("JSON"), verdict.name());
        }
    }

    #[test]
    fn text_lines_up_its_endpoints() {
        let at = |address: &str, local, snat| Endpoint { address: address.to_owned(), local, snat };
        let answer = Answer {
            verdict: Verdict::Forward,
            frontend: Some(Frontend::NodePort),
            service: Some("default/web:http".to_owned()),
            source: Source::External,
            endpoints: vec![at("10.0.0.1:80", true, false), at("10.0.10.10:8080", false, true)],
            reason: None,
        };
        let expected = "\
forward: from a client outside the cluster to the NodePort of default/web:http
  10.0.0.1:80      on this node  sees the client's address
  10.0.10.10:8080  elsewhere     sees an address of this node
";
        assert_eq!(answer.to_string(), expected);
    }
}
