//! From a Service to the addresses and ports that it claims (Kubernetes: serviceport.go, nodeport_addresses.go).

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

use k8s_openapi::api::core::v1::{self, Node, Service, ServiceSpec};

use super::{
    DesiredFrontend, FrontendKind, NodeFacts, Policy, Protocol,
    address::{parse_cidr_sloppy, parse_ip_sloppy},
    port_number,
};
use crate::problem::{Problem, ProblemKind};

const LABEL_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";

/// The addresses of this node.
pub(super) struct NodeAddresses {
    /// Where NodePorts are served.
    pub(super) node_ports: Vec<Ipv4Addr>,
    /// Every address that is its own.
    pub(super) own: BTreeSet<Ipv4Addr>,
}

impl NodeAddresses {
    /// The primary address as kube-proxy's nftables mode takes it: the first InternalIP, else the first ExternalIP.
    pub(super) fn of(node: Option<&Node>, facts: &NodeFacts) -> Self {
        let listed =
            node.and_then(|node| node.status.as_ref()).and_then(|status| status.addresses.as_deref());
        let of_type = |wanted: &str| {
            let addresses = listed.unwrap_or_default().iter().filter(|address| address.type_ == wanted);
            addresses.filter_map(|address| ipv4(&address.address)).collect::<Vec<_>>()
        };
        let (internal, external) = (of_type("InternalIP"), of_type("ExternalIP"));
        let primary = internal.first().or(external.first()).copied();
        let node_ports = primary.map_or_else(|| facts.addresses.clone(), |primary| vec![primary]);
        let mut own = facts.own.clone();
        own.extend(internal.iter().chain(&external).chain(&facts.addresses));
        Self { node_ports, own }
    }
}

/// A Service that is proxied here, with what all its ports share.
pub(super) struct Claimant<'a> {
    pub(super) ports: &'a [v1::ServicePort],
    cluster_ip: Ipv4Addr,
    external_ips: Vec<Ipv4Addr>,
    load_balancer_ips: Vec<Ipv4Addr>,
    internal: Policy,
    external: Policy,
}

impl<'a> Claimant<'a> {
    /// Reads a Service; none when it is not proxied (headless, ExternalName, another proxy's, another family's).
    pub(super) fn read(service: &'a Service, object: &str, problems: &mut Vec<Problem>) -> Option<Self> {
        let spec = service.spec.as_ref()?;
        let labels = service.metadata.labels.as_ref();
        if labels.is_some_and(|labels| labels.contains_key(LABEL_PROXY_NAME)) {
            return None;
        }
        if spec.type_.as_deref() == Some("ExternalName")
            || matches!(spec.cluster_ip.as_deref(), None | Some("" | "None"))
        {
            return None;
        }
        let cluster_ip = cluster_ip(spec)?;
        let Some(cluster_ip) = parse_ip_sloppy(cluster_ip) else {
            let message = format!("clusterIP {cluster_ip:?} is not an IP address; the Service is left out");
            problems.push(Problem::of(ProblemKind::Invalid, object, message));
            return None;
        };
        let IpAddr::V4(cluster_ip) = cluster_ip else { return None };
        if spec.session_affinity.as_deref() == Some("ClientIP") {
            let message =
                "sessionAffinity ClientIP is not kept by this version: its clients may meet any endpoint";
            problems.push(Problem::of(ProblemKind::Unsupported, object, message));
        }
        let mut external_ips = Vec::new();
        for text in spec.external_ips.iter().flatten() {
            external_ips.extend(address(text, "external IP", object, problems));
        }
        let mut load_balancer_ips = load_balancer_ips(service, object, problems);
        if is_restricted(spec) && !load_balancer_ips.is_empty() {
            let message = "loadBalancerSourceRanges is not enforced by this version, so its load-balancer addresses \
                           are not served; remove the ranges or list 0.0.0.0/0 to open them to everyone";
            problems.push(Problem::of(ProblemKind::Unsupported, object, message));
            // The ranges guard an address, whichever field it stands in.
            external_ips.retain(|ip| !load_balancer_ips.contains(ip));
            load_balancer_ips.clear();
        }
        Some(Self {
            ports: spec.ports.as_deref().unwrap_or_default(),
            cluster_ip,
            external_ips,
            load_balancer_ips,
            internal: policy(spec.internal_traffic_policy.as_deref()),
            external: external_policy(spec),
        })
    }

    /// What a port of it claims: exact addresses before NodePorts, each once.
    pub(super) fn frontends(
        &self,
        port: &v1::ServicePort,
        node: &NodeAddresses,
        object: &str,
        problems: &mut Vec<Problem>,
    ) -> Vec<DesiredFrontend> {
        let mut frontends: Vec<DesiredFrontend> = Vec::new();
        let mut add = |ip: Ipv4Addr, port: u16, kind: FrontendKind, policy: Policy| {
            let addr = ip.octets();
            if !frontends.iter().any(|other| other.addr == addr && other.port == port) {
                frontends.push(DesiredFrontend {
                    addr,
                    port,
                    kind,
                    policy,
                    node_address: node.own.contains(&ip),
                });
            }
        };
        match port_number(port.port) {
            Some(number) => {
                add(self.cluster_ip, number, FrontendKind::ClusterIp, self.internal);
                for &ip in &self.external_ips {
                    add(ip, number, FrontendKind::ExternalIp, self.external);
                }
                for &ip in &self.load_balancer_ips {
                    add(ip, number, FrontendKind::LoadBalancer, self.external);
                }
            }
            None => {
                let message = format!("port {} is not 1 to 65535; the port is left out", port.port);
                problems.push(Problem::of(ProblemKind::Invalid, object, message));
                return frontends;
            }
        }
        match port.node_port {
            None | Some(0) => {}
            Some(number) => match port_number(number) {
                Some(number) => {
                    for &ip in &node.node_ports {
                        add(ip, number, FrontendKind::NodePort, self.external);
                    }
                }
                None => {
                    let message = format!("nodePort {number} is not 1 to 65535; it is not served");
                    problems.push(Problem::of(ProblemKind::Invalid, object, message));
                }
            },
        }
        frontends
    }
}

/// The protocol of a service port; none, with a problem, when it is not served.
pub(super) fn protocol(
    port: &v1::ServicePort,
    object: &str,
    problems: &mut Vec<Problem>,
) -> Option<Protocol> {
    let protocol = Protocol::parse(port.protocol.as_deref());
    if protocol.is_none() {
        let given = port.protocol.as_deref().unwrap_or_default();
        let kind = if given == "SCTP" { ProblemKind::Unsupported } else { ProblemKind::Invalid };
        let message = format!("protocol {given} of port {} is not served; only TCP and UDP are", port.port);
        problems.push(Problem::of(kind, object, message));
    }
    protocol
}

/// The cluster IP of this family (`GetClusterIPByFamily` in Kubernetes' pkg/proxy/util/utils.go).
fn cluster_ip(spec: &ServiceSpec) -> Option<&str> {
    let families = spec.ip_families.as_deref().unwrap_or_default();
    let primary = spec.cluster_ip.as_deref();
    if families.is_empty() {
        return primary;
    }
    let at = families.iter().position(|family| family == "IPv4")?;
    let ips = spec.cluster_ips.as_deref().unwrap_or_default();
    match ips.get(at) {
        Some(ip) => Some(ip.as_str()),
        // Objects written by hand often have the first form only.
        None if ips.is_empty() && at == 0 => primary,
        None => None,
    }
}

fn load_balancer_ips(service: &Service, object: &str, problems: &mut Vec<Problem>) -> Vec<Ipv4Addr> {
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let mut ips = Vec::new();
    for ingress in status.and_then(|status| status.ingress.as_deref()).unwrap_or_default() {
        // With ipMode Proxy the balancer wants its traffic back; an entry with a host name has no address.
        let is_vip = matches!(ingress.ip_mode.as_deref(), None | Some("VIP"));
        let Some(text) = ingress.ip.as_deref().filter(|ip| is_vip && !ip.is_empty()) else { continue };
        ips.extend(address(text, "load-balancer IP", object, problems));
    }
    ips
}

/// Whether only some IPv4 sources may reach the load-balancer addresses. Ranges of the other family do not count, and
/// one that cannot be read counts as a restriction.
fn is_restricted(spec: &ServiceSpec) -> bool {
    let mut restricted = false;
    for text in spec.load_balancer_source_ranges.iter().flatten() {
        match parse_cidr_sloppy(text.trim()) {
            Some((IpAddr::V4(_), 0)) => return false,
            Some((IpAddr::V6(_), _)) => {}
            Some((IpAddr::V4(_), _)) | None => restricted = true,
        }
    }
    restricted
}

/// Ignored unless the Service can be reached from outside at all (pkg/api/v1/service/util.go).
fn external_policy(spec: &ServiceSpec) -> Policy {
    let reachable = match spec.type_.as_deref() {
        Some("NodePort" | "LoadBalancer") => true,
        _ => spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty()),
    };
    if reachable { policy(spec.external_traffic_policy.as_deref()) } else { Policy::Cluster }
}

fn policy(text: Option<&str>) -> Policy {
    if text == Some("Local") { Policy::Local } else { Policy::Cluster }
}

fn address(text: &str, what: &str, object: &str, problems: &mut Vec<Problem>) -> Option<Ipv4Addr> {
    let parsed = parse_ip_sloppy(text);
    if parsed.is_none() {
        let message = format!("{what} {text:?} is not an IP address; it is not served");
        problems.push(Problem::of(ProblemKind::Invalid, object, message));
    }
    match parsed? {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    }
}

fn ipv4(text: &str) -> Option<Ipv4Addr> {
    match parse_ip_sloppy(text)? {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    }
}
