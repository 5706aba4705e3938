//! Flows of UDP whose source address toward their backend this node has no more, or has on an interface that is switched off: no
//! answer comes to them. Their entries are marked, so that the next packet begins anew, from an address that there is. Connections of
//! TCP could not go on from another. Through a tunnel all can: nothing depends on where it begins, and entries are forgotten.
//!
//! A carrier that is lost says nothing: it returns, and another interface may receive for the address meanwhile. Netfilter's
//! masquerading forgets by the same two events (net/netfilter/nf_nat_masquerade.c).

use std::{collections::BTreeSet, io, net::IpAddr};

use tracing::debug;
use xdp_common::{
    net::{FlowKey, UDP},
    tables::{Flow, closing, exit, kind},
};

use super::FlowTables;
use crate::{cluster::wanted::IpAddress, host::Host};

/// The addresses that answers come to.
pub(super) fn reachable(host: &Host) -> BTreeSet<IpAddr> {
    let is_up = |index: &u32| host.links.get(index).is_some_and(|link| link.is_up);
    let addresses = host.addresses.iter().filter(|(index, _)| is_up(index));
    addresses.flat_map(|(_, addresses)| addresses).map(|address| address.addr).collect()
}

/// Whether a flow is one to mark.
pub(super) fn is_lost<A: IpAddress>(key: &FlowKey<A>, flow: &Flow<A>, reachable: &BTreeSet<IpAddr>) -> bool {
    let may_move = match flow.kind {
        kind::FORWARD => key.proto == UDP && flow.closing == 0,
        kind => kind == kind::TUNNEL,
    };
    // To an endpoint here, what the node itself sends goes by the frontend's address, which is on no interface.
    let is_masqueraded = flow.exit != exit::BACK && flow.src.differs(key.src) != 0;
    may_move && is_masqueraded && !reachable.contains(&flow.src.to_ip())
}

impl<A: IpAddress> FlowTables<A> {
    /// Marks flows of these keys whose source address is lost.
    pub(super) fn begin_anew(&mut self, lost: &[FlowKey<A>], reachable: &BTreeSet<IpAddr>) -> io::Result<()> {
        for key in lost {
            // Read again: the tuple may be another flow's by now.
            let Some(flow) = self.established.get(key)?.filter(|flow| is_lost(key, flow, reachable)) else {
                continue;
            };
            if flow.kind == kind::TUNNEL {
                self.established.take(key)?;
            } else {
                self.established.change(key, |flow| flow.closing = closing::RST)?;
            }
        }
        if !lost.is_empty() {
            debug!(flows = lost.len(), "flows whose source address this node has no more begin anew");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Address, Link};
    use xdp_common::net::TCP;

    const SNAT: [u8; 4] = [192, 0, 2, 1];

    fn host(is_up: bool) -> Host {
        let link = Link { index: 7, is_up, ..Link::default() };
        let ip = SNAT.to_ip();
        let address =
            Address { addr: ip, peer: ip, len: 24, scope: 0, is_secondary: false, is_tentative: false };
        Host { links: [(7, link)].into(), addresses: [(7, vec![address])].into(), ..Host::default() }
    }

    #[test]
    fn flows_that_can_begin_anew_where_no_answer_comes_to_their_address() {
        let key = FlowKey { src: [198, 51, 100, 7], dst: [10, 96, 0, 1], proto: UDP, ..FlowKey::ZERO };
        let flow = Flow { kind: kind::FORWARD, src: SNAT, ..Flow::ZERO };
        let (up, down, gone) = (reachable(&host(true)), reachable(&host(false)), reachable(&Host::default()));
        assert!(!is_lost(&key, &flow, &up));
        assert!(is_lost(&key, &flow, &down));
        assert!(is_lost(&key, &flow, &gone));
        let tcp = FlowKey { proto: TCP, ..key };
        assert!(!is_lost(&tcp, &flow, &gone));
        let tunnelled = Flow { kind: kind::TUNNEL, ..flow };
        assert!(is_lost(&tcp, &tunnelled, &gone) && !is_lost(&tcp, &tunnelled, &up));
        assert!(!is_lost(&key, &Flow { src: key.src, ..flow }, &gone), "the client's own");
        assert!(!is_lost(&key, &Flow { exit: exit::BACK, src: key.dst, ..flow }, &gone), "the frontend's");
        assert!(!is_lost(&key, &Flow { kind: kind::REPLY_REMOTE, ..flow }, &gone));
        assert!(!is_lost(&key, &Flow { closing: closing::RST, ..flow }, &gone), "once");
    }
}
