//! From EndpointSlices to the endpoint lists of a service port (Kubernetes: endpointslicecache.go, topology.go).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    nodes::Nodes,
    wanted::{Endpoint, Ip6, IpAddress, Protocol},
};
use crate::objects::{HintsId, NameId, Slice, SliceEndpoint};

/// This node in the words of slices.
#[derive(Clone, Copy, Debug)]
pub(super) struct Here<'a> {
    /// Its name.
    pub(super) node: &'a str,
    /// Its zone, empty when it is in none.
    pub(super) zone: &'a str,
    /// The other nodes to which packets may go as they are.
    pub(super) nodes: &'a Nodes,
}

/// An address family, as slices have it.
pub(super) trait Family: IpAddress {
    /// The endpoints of a slice that are of this family.
    fn endpoints(slice: &Slice) -> &[SliceEndpoint<Self>];
    /// The nodes that have an address of this family.
    fn nodes(nodes: &Nodes) -> &BTreeMap<Box<str>, Vec<Self>>;
}

impl Family for [u8; 4] {
    fn endpoints(slice: &Slice) -> &[SliceEndpoint<Self>] {
        &slice.v4
    }

    fn nodes(nodes: &Nodes) -> &BTreeMap<Box<str>, Vec<Self>> {
        &nodes.v4
    }
}

impl Family for Ip6 {
    fn endpoints(slice: &Slice) -> &[SliceEndpoint<Self>] {
        &slice.v6
    }

    fn nodes(nodes: &Nodes) -> &BTreeMap<Box<str>, Vec<Self>> {
        &nodes.v6
    }
}

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
pub(super) struct Candidate<A> {
    pub(super) endpoint: Endpoint<A>,
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: bool,
    pub(super) node_hint: Hint,
    pub(super) zone_hint: Hint,
}

/// The endpoint lists of a service port, each in the order of its input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lists<A> {
    pub(super) cluster: Vec<Endpoint<A>>,
    pub(super) local: Vec<Endpoint<A>>,
    pub(super) serving: Vec<Endpoint<A>>,
    pub(super) any: bool,
}

/// Every endpoint of a service port over all the slices of its Service, sorted, each address and port once.
pub(super) fn candidates<'a, A: Family>(
    slices: impl Iterator<Item = &'a Arc<Slice>>,
    here: Here<'_>,
    port: &str,
    protocol: Protocol,
) -> Vec<Candidate<A>> {
    let mut all = Vec::new();
    for slice in slices {
        let names = (slice.name(here.node), slice.name(here.zone));
        for own in slice.ports.iter().filter(|own| *own.name == *port && own.protocol == protocol) {
            let endpoints = A::endpoints(slice).iter();
            let nodes = A::nodes(here.nodes);
            all.extend(endpoints.map(|endpoint| candidate(slice, endpoint, own.port, names, nodes)));
        }
    }
    // While an address moves to another Pod both may be listed: the one that is not terminating counts.
    all.sort_unstable_by_key(|c: &Candidate<A>| {
        let place = (c.endpoint.addr, c.endpoint.port);
        (place, c.terminating, !c.ready, !c.serving, !c.endpoint.local, c.node_hint, c.zone_hint)
    });
    all.dedup_by_key(|c| (c.endpoint.addr, c.endpoint.port));
    all
}

/// How many addresses have a ready endpoint on this node, on any port (kube-proxy's `LocalReadyEndpoints`).
pub(super) fn local_ready<'a, A: Family>(
    slices: impl Iterator<Item = &'a Arc<Slice>> + Clone,
    here: Here<'_>,
) -> u32 {
    let ports: BTreeSet<_> =
        slices.clone().flat_map(|slice| &slice.ports).map(|p| (&*p.name, p.protocol)).collect();
    let mut ready = BTreeSet::new();
    for (port, protocol) in ports {
        let candidates = candidates::<A>(slices.clone(), here, port, protocol);
        ready.extend(candidates.iter().filter(|c| c.ready && c.endpoint.local).map(|c| c.endpoint.addr));
    }
    ready.len() as u32
}

fn candidate<A: IpAddress>(
    slice: &Slice,
    endpoint: &SliceEndpoint<A>,
    port: u16,
    (node, zone): (Option<NameId>, Option<NameId>),
    nodes: &BTreeMap<Box<str>, Vec<A>>,
) -> Candidate<A> {
    let hint = |list: HintsId, own: Option<NameId>| match slice.hints(list) {
        [] => Hint::Missing,
        names if own.is_some_and(|own| names.contains(&own)) => Hint::Here,
        [..] => Hint::Elsewhere,
    };
    let local = Some(endpoint.node) == node;
    let elsewhere = if local || nodes.is_empty() { None } else { nodes.get(slice.text(endpoint.node)) };
    let node_addr = elsewhere.and_then(|addresses| addresses.first()).copied().unwrap_or(A::UNSPECIFIED);
    Candidate {
        endpoint: Endpoint { addr: endpoint.addr, port, local, node: node_addr },
        ready: endpoint.ready,
        serving: endpoint.serving,
        terminating: endpoint.terminating,
        node_hint: hint(endpoint.node_hints, node),
        zone_hint: hint(endpoint.zone_hints, zone),
    }
}

/// Chooses the endpoints for either policy (`CategorizeEndpoints` in Kubernetes' pkg/proxy/topology.go).
pub(super) fn categorize<A: IpAddress>(candidates: &[Candidate<A>]) -> Lists<A> {
    let ready = |c: &&Candidate<A>| c.ready;
    // Endpoints on their way out are better than none.
    let fallback = |c: &&Candidate<A>| c.serving && c.terminating;
    let local = |c: &&Candidate<A>| c.endpoint.local;
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

fn list<'a, A: IpAddress>(candidates: impl Iterator<Item = &'a Candidate<A>>) -> Vec<Endpoint<A>> {
    let mut list: Vec<_> = candidates.map(|candidate| candidate.endpoint).collect();
    list.shrink_to_fit();
    list
}

/// Hints count only when every ready endpoint has them and one names this node or, failing that, this zone.
fn topology<A: IpAddress>(candidates: &[Candidate<A>]) -> fn(&Candidate<A>) -> bool {
    let usable = |hint: fn(&Candidate<A>) -> Hint| {
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
