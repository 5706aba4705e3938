//! The other nodes of the cluster, as far as packets are sent to them.

use std::{collections::BTreeMap, net::IpAddr};

use super::wanted::{Ip6, IpAddress};
use crate::objects::Node;

/// The address that each node is known by, per family.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    pub(super) v4: BTreeMap<Box<str>, [u8; 4]>,
    pub(super) v6: BTreeMap<Box<str>, Ip6>,
}

impl Nodes {
    /// Takes a node's object, or that there is none any more; says whether an address has changed.
    pub(super) fn set(&mut self, name: &str, node: Option<&Node>) -> bool {
        let v4 = set(&mut self.v4, name, node.and_then(primary));
        let v6 = set(&mut self.v6, name, node.and_then(primary));
        v4 || v6
    }
}

fn set<A: IpAddress>(nodes: &mut BTreeMap<Box<str>, A>, name: &str, addr: Option<A>) -> bool {
    match addr {
        Some(addr) => nodes.insert(name.into(), addr) != Some(addr),
        None => nodes.remove(name).is_some(),
    }
}

/// The address that Kubernetes knows a node by (`GetNodeHostIPs` in Kubernetes' pkg/util/node).
fn primary<A: IpAddress>(node: &Node) -> Option<A> {
    let first = |ips: &[IpAddr]| ips.iter().copied().find_map(A::from_ip);
    first(&node.internal_ips).or_else(|| first(&node.external_ips))
}
