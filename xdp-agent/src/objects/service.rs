//! Services (Kubernetes: pkg/proxy/serviceport.go, pkg/proxy/util/utils.go, pkg/api/v1/service/util.go).

use std::{collections::BTreeSet, net::IpAddr};

use k8s_openapi::api::core::v1::{self, ServiceSpec};

use super::{Flaw, Flaws, quoted};
use crate::cluster::{
    address::{parse_cidr_sloppy, parse_ip_sloppy, unreachable},
    wanted::{Policy, Protocol},
};

/// Services with it, whatever its value, are another proxy's.
const LABEL_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// How long a client keeps its endpoint when the Service does not say (Kubernetes' API).
const AFFINITY_SECONDS_DEFAULT: u32 = 10_800;
/// The longest that it may say.
const AFFINITY_SECONDS_MAX: u32 = 86_400;

/// What matters of a Service; one that is not proxied (headless, ExternalName, another proxy's) reads as the default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Service {
    /// When it was created, in seconds since 1970.
    pub created_seconds: Option<i64>,
    /// Its ClusterIPs, at most one of a family; none when it is not proxied.
    pub cluster_ips: Box<[IpAddr]>,
    /// `spec.externalIPs`.
    pub external_ips: Box<[IpAddr]>,
    /// Addresses of load balancers that deliver to nodes without changing the destination (ipMode VIP).
    pub load_balancer_ips: Box<[IpAddr]>,
    /// `spec.loadBalancerSourceRanges`.
    pub source_ranges: Box<[(IpAddr, u8)]>,
    /// Whether one of the source ranges could not be read: the others still restrict, and where none is left, none may
    /// come in.
    pub has_bad_source_range: bool,
    /// `spec.internalTrafficPolicy`.
    pub internal: Policy,
    /// `spec.externalTrafficPolicy`, where it means anything.
    pub external: Policy,
    /// Client-IP affinity in seconds, 0 for none.
    pub affinity_seconds: u32,
    /// Where load balancers ask whether this node has endpoints; 0 when they do not.
    pub health_check_node_port: u16,
    /// Its ports, each name and protocol once.
    pub ports: Box<[ServicePort]>,
    /// What cannot be used of it.
    pub flaws: Box<[Flaw]>,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name, empty when it has none.
    pub name: Box<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
    /// The port on every node, 0 when there is none.
    pub node_port: u16,
}

impl Service {
    /// Reads an object.
    pub fn read(object: &v1::Service) -> Self {
        let Some(spec) = object.spec.as_ref().filter(|spec| is_proxied(object, spec)) else {
            return Self::default();
        };
        let mut flaws = Flaws::default();
        let cluster_ips = cluster_ips(spec, &mut flaws);
        let external = spec.external_ips.iter().flatten().map(String::as_str);
        let external_ips = addresses(external, "external IP", &mut flaws);
        let vips = vips(object, &mut flaws);
        let load_balancer_ips = addresses(vips.into_iter(), "load-balancer IP", &mut flaws);
        let (source_ranges, has_bad_source_range) = source_ranges(spec, &mut flaws);
        let external = external_policy(spec, &mut flaws);
        check_type(spec, &mut flaws);
        Self {
            created_seconds: object.metadata.creation_timestamp.as_ref().map(|time| time.0.as_second()),
            cluster_ips,
            external_ips,
            load_balancer_ips,
            source_ranges,
            has_bad_source_range,
            internal: policy("internalTrafficPolicy", spec.internal_traffic_policy.as_deref(), &mut flaws),
            external,
            affinity_seconds: affinity_seconds(spec, &mut flaws),
            health_check_node_port: health_check_node_port(spec, external, &mut flaws),
            ports: ports(spec, &mut flaws),
            flaws: flaws.finish(),
        }
    }
}

/// `ShouldSkipService` in Kubernetes' pkg/proxy/util/utils.go, and the label by which kube-proxy selects.
fn is_proxied(object: &v1::Service, spec: &ServiceSpec) -> bool {
    let labels = object.metadata.labels.as_ref();
    !labels.is_some_and(|labels| labels.contains_key(LABEL_PROXY_NAME))
        && spec.type_.as_deref() != Some("ExternalName")
        && !matches!(spec.cluster_ip.as_deref(), None | Some("" | "None"))
}

/// The ClusterIP of each family (`GetClusterIPByFamily` in pkg/proxy/util/utils.go).
fn cluster_ips(spec: &ServiceSpec, flaws: &mut Flaws) -> Box<[IpAddr]> {
    let families = spec.ip_families.as_deref().unwrap_or_default();
    let primary = spec.cluster_ip.as_slice();
    let all = spec.cluster_ips.as_deref().unwrap_or_default();
    // Objects written by hand often have the first form only.
    let texts = if families.is_empty() || all.is_empty() { primary } else { all };
    let mut ips: Vec<IpAddr> = Vec::new();
    for (at, text) in texts.iter().enumerate() {
        let family = families.get(at);
        if family.is_none() && !families.is_empty() {
            break;
        }
        let Some(ip) = address(text, "clusterIP", flaws) else { continue };
        let is_named = family.is_none_or(|family| family == if ip.is_ipv4() { "IPv4" } else { "IPv6" });
        if !is_named {
            let family = quoted(family.map_or("", String::as_str));
            flaws.push(|| {
                format!("clusterIP {ip} is not of family {family} as ipFamilies says; it is not served")
            });
        }
        if is_named && !ips.iter().any(|other| other.is_ipv4() == ip.is_ipv4()) {
            ips.push(ip);
        }
    }
    ips.into()
}

/// With ipMode Proxy the balancer wants its traffic back; an entry with a host name has no address.
fn vips<'a>(object: &'a v1::Service, flaws: &mut Flaws) -> Vec<&'a str> {
    let status = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|status| status.ingress.as_deref()).unwrap_or_default();
    let mut vips = Vec::new();
    for ingress in ingress {
        let Some(ip) = ingress.ip.as_deref().filter(|ip| !ip.is_empty()) else { continue };
        match ingress.ip_mode.as_deref() {
            None | Some("VIP") => vips.push(ip),
            Some("Proxy") => {}
            Some(other) => flaws.push(|| {
                let (ip, other) = (quoted(ip), quoted(other));
                format!("ipMode {other} of load-balancer IP {ip} is neither VIP nor Proxy; it is not served")
            }),
        }
    }
    vips
}

fn source_ranges(spec: &ServiceSpec, flaws: &mut Flaws) -> (Box<[(IpAddr, u8)]>, bool) {
    let (mut ranges, mut has_bad) = (Vec::new(), false);
    for text in spec.load_balancer_source_ranges.iter().flatten() {
        match parse_cidr_sloppy(text.trim()) {
            Some(range) => ranges.push(range),
            None => {
                has_bad = true;
                flaws.push(|| {
                    let text = quoted(text);
                    format!("source range {text} is not an IP network; nobody is let in for it")
                });
            }
        }
    }
    (ranges.into(), has_bad)
}

/// Ignored unless the Service can be reached from outside at all (`ExternallyAccessible` in
/// pkg/api/v1/service/util.go).
fn external_policy(spec: &ServiceSpec, flaws: &mut Flaws) -> Policy {
    let is_reachable = match spec.type_.as_deref() {
        Some("NodePort" | "LoadBalancer") => true,
        _ => spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty()),
    };
    let policy = policy("externalTrafficPolicy", spec.external_traffic_policy.as_deref(), flaws);
    if is_reachable { policy } else { Policy::Cluster }
}

fn policy(field: &str, text: Option<&str>, flaws: &mut Flaws) -> Policy {
    match text {
        Some("Local") => Policy::Local,
        None | Some("" | "Cluster") => Policy::Cluster,
        Some(other) => {
            flaws.push(|| {
                format!("{field} {} is neither Cluster nor Local; it counts as Cluster", quoted(other))
            });
            Policy::Cluster
        }
    }
}

/// An unknown type opens nothing that a type opens, and the ClusterIP is served all the same.
fn check_type(spec: &ServiceSpec, flaws: &mut Flaws) {
    match spec.type_.as_deref() {
        None | Some("" | "ClusterIP" | "NodePort" | "LoadBalancer") => {}
        Some(other) => flaws.push(|| {
            let other = quoted(other);
            format!("type {other} is none of ClusterIP, NodePort, LoadBalancer and ExternalName; it counts as ClusterIP")
        }),
    }
}

fn affinity_seconds(spec: &ServiceSpec, flaws: &mut Flaws) -> u32 {
    match spec.session_affinity.as_deref() {
        Some("ClientIP") => {}
        None | Some("" | "None") => return 0,
        Some(other) => {
            flaws.push(|| {
                format!("sessionAffinity {} is neither None nor ClientIP; it counts as None", quoted(other))
            });
            return 0;
        }
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let Some(given) = config.and_then(|config| config.timeout_seconds) else {
        return AFFINITY_SECONDS_DEFAULT;
    };
    let used = u32::try_from(given).unwrap_or(0).clamp(1, AFFINITY_SECONDS_MAX);
    if i64::from(used) != i64::from(given) {
        flaws.push(|| {
            let field = "sessionAffinityConfig.clientIP.timeoutSeconds";
            format!("{field} {given} is not 1 to {AFFINITY_SECONDS_MAX}; {used} is used")
        });
    }
    used
}

/// `NeedsHealthCheck` in pkg/api/v1/service/util.go.
fn health_check_node_port(spec: &ServiceSpec, external: Policy, flaws: &mut Flaws) -> u16 {
    if spec.type_.as_deref() != Some("LoadBalancer") || external != Policy::Local {
        return 0;
    }
    let number = spec.health_check_node_port.unwrap_or(0);
    u16::try_from(number).unwrap_or_else(|_| {
        flaws.push(|| format!("healthCheckNodePort {number} is not 1 to 65535; it is not opened"));
        0
    })
}

fn ports(spec: &ServiceSpec, flaws: &mut Flaws) -> Box<[ServicePort]> {
    let mut ports = Vec::new();
    let mut seen = BTreeSet::new();
    for given in spec.ports.iter().flatten() {
        let number = given.port;
        let Some(protocol) = Protocol::parse(given.protocol.as_deref()) else {
            flaws.push(|| unknown_protocol(given.protocol.as_deref(), number));
            continue;
        };
        let Some(port) = port_number(number) else {
            flaws.push(|| format!("port {number} is not 1 to 65535; the port is left out"));
            continue;
        };
        let name = given.name.as_deref().unwrap_or_default();
        if !seen.insert((name, protocol)) {
            flaws.push(|| format!("port {number} has the same name and protocol as another; it is left out"));
            continue;
        }
        let node_port = u16::try_from(given.node_port.unwrap_or(0)).unwrap_or_else(|_| {
            let number = given.node_port.unwrap_or(0);
            flaws.push(|| format!("nodePort {number} is not 1 to 65535; it is not served"));
            0
        });
        ports.push(ServicePort { name: name.into(), protocol, port, node_port });
    }
    ports.into()
}

fn addresses<'a>(texts: impl Iterator<Item = &'a str>, what: &str, flaws: &mut Flaws) -> Box<[IpAddr]> {
    texts.filter_map(|text| address(text, what, flaws)).collect()
}

fn address(text: &str, what: &str, flaws: &mut Flaws) -> Option<IpAddr> {
    let Some(ip) = parse_ip_sloppy(text) else {
        flaws.push(|| format!("{what} {} is not an IP address; it is not served", quoted(text)));
        return None;
    };
    if let Some(is) = unreachable(ip) {
        flaws.push(|| format!("{what} {ip} is {is} and no client can connect to it; it is not served"));
        return None;
    }
    Some(ip)
}

/// The flaw of a port whose protocol nobody knows.
pub(super) fn unknown_protocol(protocol: Option<&str>, port: i32) -> String {
    let protocol = quoted(protocol.unwrap_or_default());
    format!("protocol {protocol} of port {port} is not served; only TCP, UDP and SCTP are")
}

/// A port number; none for one that no packet bears.
pub(super) fn port_number(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|&number| number != 0)
}
