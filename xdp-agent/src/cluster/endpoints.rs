//! From EndpointSlices to the endpoint lists of a service port (Kubernetes: endpointslicecache.go, topology.go).

use std::{collections::HashMap, net::IpAddr};

use k8s_openapi::api::discovery::v1::{self, EndpointSlice};

use super::{
    Endpoint, NodeFacts, Protocol,
    address::{parse_ip_sloppy, special},
    port_number,
};
use crate::{
    manifests::Objects,
    problem::{Problem, ProblemKind},
};

const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";
const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";

/// Whether the hints of an endpoint name this node, or this node's zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Hint {
    /// They name it.
    Here,
    /// They name others.
    Elsewhere,
    /// There are none.
    Missing,
}

/// An endpoint before policies choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) endpoint: Endpoint,
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: bool,
    pub(super) node_hint: Hint,
    pub(super) zone_hint: Hint,
}

/// The endpoint lists of a service port, each in the order of its input.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lists {
    pub(super) cluster: Vec<Endpoint>,
    pub(super) local: Vec<Endpoint>,
    pub(super) serving: Vec<Endpoint>,
    pub(super) any: bool,
}

/// A slice with its texts read once, for all the service ports that use it.
struct Parsed<'a> {
    ports: Vec<(&'a str, Protocol, u16)>,
    /// Ports are filled in when a service port asks.
    endpoints: Vec<Candidate>,
}

/// The slices of every Service.
pub(super) struct Slices<'a> {
    by_service: HashMap<(&'a str, &'a str), Vec<Parsed<'a>>>,
}

impl<'a> Slices<'a> {
    /// Sorts the slices by Service and reads them.
    pub(super) fn index(
        objects: &'a Objects,
        node: &NodeFacts,
        zone: Option<&str>,
        problems: &mut Vec<Problem>,
    ) -> Self {
        let mut by_service: HashMap<_, Vec<_>> = HashMap::new();
        for (name, slice) in &objects.slices {
            let labels = slice.metadata.labels.as_ref();
            let Some(service) = labels.and_then(|labels| labels.get(LABEL_SERVICE_NAME)) else { continue };
            let headless = labels.is_some_and(|labels| labels.contains_key(LABEL_HEADLESS));
            if headless || slice.address_type != "IPv4" || service.is_empty() {
                continue;
            }
            let parsed = parse(slice, &format!("EndpointSlice {name}"), node, zone, problems);
            by_service.entry((name.namespace.as_str(), service.as_str())).or_default().push(parsed);
        }
        Self { by_service }
    }

    /// Every endpoint of a service port over all its slices, sorted, each address and port once.
    pub(super) fn of(&self, service: (&str, &str), port: &str, protocol: Protocol) -> Vec<Candidate> {
        let mut all = Vec::new();
        let slices = self.by_service.get(&service).map_or(&[][..], Vec::as_slice);
        for slice in slices {
            for &(_, _, number) in slice.ports.iter().filter(|(n, p, _)| *n == port && *p == protocol) {
                all.extend(slice.endpoints.iter().map(|candidate| Candidate {
                    endpoint: Endpoint { port: number, ..candidate.endpoint },
                    ..*candidate
                }));
            }
        }
        // While an address moves to another Pod both may be listed: the one that is not terminating counts.
        all.sort_by_key(|c| {
            let place = (c.endpoint.addr, c.endpoint.port);
            (place, c.terminating, !c.ready, !c.serving, !c.endpoint.local, c.node_hint, c.zone_hint)
        });
        all.dedup_by_key(|c| (c.endpoint.addr, c.endpoint.port));
        all
    }
}

fn parse<'a>(
    slice: &'a EndpointSlice,
    object: &str,
    node: &NodeFacts,
    zone: Option<&str>,
    problems: &mut Vec<Problem>,
) -> Parsed<'a> {
    let mut ports = Vec::new();
    for port in slice.ports.iter().flatten() {
        let (Some(name), Some(number)) = (&port.name, port.port) else { continue };
        let Some(number) = port_number(number) else {
            if number != 0 {
                problems.push(Problem::of(
                    ProblemKind::Invalid,
                    object,
                    format!("port {number} is not 1 to 65535"),
                ));
            }
            continue;
        };
        let Some(protocol) = Protocol::parse(port.protocol.as_deref()) else { continue };
        ports.push((name.as_str(), protocol, number));
    }
    let mut endpoints = Vec::new();
    for endpoint in slice.endpoints.iter().flatten() {
        // Further addresses of an endpoint are not used by anyone (see the API's documentation of the field).
        let Some(address) = endpoint.addresses.first() else { continue };
        let Some(IpAddr::V4(addr)) = parse_ip_sloppy(address) else {
            let message =
                format!("endpoint address {address:?} is not an IPv4 address; the endpoint is left out");
            problems.push(Problem::of(ProblemKind::Invalid, object, message));
            continue;
        };
        if let Some(what) = special(addr) {
            let message = format!(
                "endpoint address {addr} is {what} and cannot be an endpoint's; the endpoint is left out"
            );
            problems.push(Problem::of(ProblemKind::Invalid, object, message));
            continue;
        }
        endpoints.push(candidate(endpoint, addr.octets(), node, zone));
    }
    Parsed { ports, endpoints }
}

fn candidate(endpoint: &v1::Endpoint, addr: [u8; 4], node: &NodeFacts, zone: Option<&str>) -> Candidate {
    let conditions = endpoint.conditions.as_ref();
    let hints = endpoint.hints.as_ref();
    let nodes = hints.and_then(|hints| hints.for_nodes.as_deref()).unwrap_or_default();
    let zones = hints.and_then(|hints| hints.for_zones.as_deref()).unwrap_or_default();
    Candidate {
        endpoint: Endpoint {
            addr,
            port: 0,
            local: endpoint.node_name.as_deref() == Some(node.name.as_str()),
        },
        ready: conditions.and_then(|c| c.ready).unwrap_or(true),
        serving: conditions.and_then(|c| c.serving).unwrap_or(true),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        node_hint: hint(nodes.is_empty(), nodes.iter().any(|hint| hint.name == node.name)),
        zone_hint: hint(
            zones.is_empty(),
            zone.is_some_and(|zone| zones.iter().any(|hint| hint.name == zone)),
        ),
    }
}

fn hint(missing: bool, here: bool) -> Hint {
    match (missing, here) {
        (true, _) => Hint::Missing,
        (false, true) => Hint::Here,
        (false, false) => Hint::Elsewhere,
    }
}

/// Chooses the endpoints for either policy (`CategorizeEndpoints` in Kubernetes' pkg/proxy/topology.go).
pub(super) fn categorize(candidates: &[Candidate]) -> Lists {
    let ready = |c: &&Candidate| c.ready;
    // Endpoints on their way out are better than none.
    let fallback = |c: &&Candidate| c.serving && c.terminating;
    let local = |c: &&Candidate| c.endpoint.local;
    let chosen = topology(candidates);
    let mut lists = Lists {
        cluster: list(candidates.iter().filter(ready).filter(|c| chosen(c))),
        local: list(candidates.iter().filter(ready).filter(local)),
        serving: list(candidates.iter().filter(|c| c.serving)),
        any: candidates.iter().any(|c| ready(&c) || fallback(&c)),
    };
    if lists.cluster.is_empty() {
        lists.cluster = list(candidates.iter().filter(fallback));
    }
    if lists.local.is_empty() {
        lists.local = list(candidates.iter().filter(fallback).filter(local));
    }
    lists
}

fn list<'a>(candidates: impl Iterator<Item = &'a Candidate>) -> Vec<Endpoint> {
    candidates.map(|candidate| candidate.endpoint).collect()
}

/// Hints count only when every ready endpoint has them and one names this node or, failing that, this zone.
fn topology(candidates: &[Candidate]) -> fn(&Candidate) -> bool {
    let usable = |hint: fn(&Candidate) -> Hint| {
        let mut hints = candidates.iter().filter(|c| c.ready).map(hint);
        let mut here = false;
        hints.all(|hint| {
            here |= hint == Hint::Here;
            hint != Hint::Missing
        }) && here
    };
    if usable(|c| c.node_hint) {
        return |c| c.node_hint == Hint::Here;
    }
    if usable(|c| c.zone_hint) {
        return |c| c.zone_hint == Hint::Here;
    }
    |_| true
}
