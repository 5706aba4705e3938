//! Endpoints that are the ClusterIP of a Service. Kubernetes forbids them, because nothing balances what is sent there a
//! second time; the API server cannot check it, and kube-proxy tries them like any other.

use std::{collections::HashMap, sync::Arc};

use super::{claims::Claims, endpoints::Family};
use crate::{
    objects::{ObjectName, Slice},
    problem::{Problem, ProblemKind},
};

/// How many endpoints have an address, over all slices: says without a search whether one has become a ClusterIP.
#[derive(Debug)]
pub(super) struct Addresses<A>(HashMap<A, u32>);

impl<A> Default for Addresses<A> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<A: Family> Addresses<A> {
    /// Counts the endpoints of a slice.
    pub(super) fn add(&mut self, slice: &Slice) {
        for endpoint in A::endpoints(slice) {
            *self.0.entry(endpoint.addr).or_default() += 1;
        }
    }

    /// Takes them back.
    pub(super) fn remove(&mut self, slice: &Slice) {
        for endpoint in A::endpoints(slice) {
            if let Some(count) = self.0.get_mut(&endpoint.addr) {
                *count -= 1;
                if *count == 0 {
                    self.0.remove(&endpoint.addr);
                }
            }
        }
    }

    /// Whether any endpoint has an address.
    pub(super) fn contains(&self, addr: &A) -> bool {
        self.0.contains_key(addr)
    }
}

/// A problem for each slice that has such endpoints.
pub(super) fn problems<'a, A: Family>(
    namespace: &str,
    slices: impl Iterator<Item = (&'a Box<str>, &'a Arc<Slice>)>,
    claims: &Claims<A>,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (name, slice) in slices {
        let mut found = A::endpoints(slice).iter().filter(|endpoint| claims.is_cluster_ip(endpoint.addr));
        let Some(first) = found.next() else { continue };
        let more = match found.count() {
            0 => String::new(),
            more => format!(", and {more} more are too"),
        };
        let ip = first.addr.to_ip();
        let message = format!(
            "endpoint address {ip} is the ClusterIP of a Service{more}; give the addresses behind it"
        );
        let slice = ObjectName::new(namespace, &**name);
        problems.push(Problem::of(ProblemKind::Invalid, format!("EndpointSlice {slice}"), message));
    }
    problems
}
