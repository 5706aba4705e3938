//! The other nodes of the cluster, as far as packets are sent to them.

use std::collections::BTreeMap;

use super::wanted::{Ip6, IpAddress};
use crate::objects::Node;

/// The addresses that each node is known by, per family, the primary one first.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    pub(super) v4: BTreeMap<Box<str>, Vec<[u8; 4]>>,
    pub(super) v6: BTreeMap<Box<str>, Vec<Ip6>>,
}

impl Nodes {
    /// Takes a node's object, or that there is none any more; says whether an address has changed.
    pub(super) fn set(&mut self, name: &str, node: Option<&Node>) -> bool {
        let v4 = set(&mut self.v4, name, addresses(node));
        let v6 = set(&mut self.v6, name, addresses(node));
        v4 || v6
    }
}

fn set<A: IpAddress>(nodes: &mut BTreeMap<Box<str>, Vec<A>>, name: &str, addresses: Vec<A>) -> bool {
    if addresses.is_empty() {
        return nodes.remove(name).is_some();
    }
    if nodes.get(name) == Some(&addresses) {
        return false;
    }
    nodes.insert(name.into(), addresses);
    true
}

/// The addresses that Kubernetes knows a node by, in the order in which it prefers them (`GetNodeHostIPs` in Kubernetes'
/// pkg/util/node).
pub(super) fn addresses<A: IpAddress>(node: Option<&Node>) -> Vec<A> {
    let listed = node.into_iter().flat_map(|node| node.internal_ips.iter().chain(&node.external_ips));
    listed.copied().filter_map(A::from_ip).collect()
}
