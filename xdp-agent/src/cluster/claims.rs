//! Who serves an address, port and protocol that more than one service port claims.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
};

use super::{
    frontends::Draft,
    wanted::{FrontendKind, IpAddress, Protocol, ServicePortName},
};
use crate::problem::{Problem, ProblemKind};

/// What can be claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place<A> {
    addr: A,
    port: u16,
    protocol: Protocol,
}

/// A claim; the least one of a place wins: one that names the address before a NodePort (as kube-proxy's nftables mode
/// does), then the oldest, then the first by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    is_node_port: bool,
    created_seconds: i64,
    name: Arc<ServicePortName>,
}

/// All claims of one family.
#[derive(Debug)]
pub(super) struct Claims<A> {
    /// The claims of each place, the winner first; never empty.
    places: BTreeMap<Place<A>, Vec<Claim>>,
    /// Places with more than one.
    contested: BTreeSet<Place<A>>,
    /// How many service ports have an address as their ClusterIP.
    cluster_ips: HashMap<A, usize>,
    /// What happened since it was last asked.
    news: News<A>,
}

/// What changes of claims mean to others.
#[derive(Debug)]
pub(super) struct News<A> {
    /// Service ports that have won a place, or lost it, because of another.
    pub(super) moved: Vec<Arc<ServicePortName>>,
    /// Addresses that have become a ClusterIP or are none any more.
    pub(super) cluster_ips: BTreeSet<A>,
    /// Whether the problems are others than before.
    pub(super) has_problems: bool,
}

impl<A> Default for News<A> {
    fn default() -> Self {
        Self { moved: Vec::new(), cluster_ips: BTreeSet::new(), has_problems: false }
    }
}

impl<A> Default for Claims<A> {
    fn default() -> Self {
        Self {
            places: BTreeMap::new(),
            contested: BTreeSet::new(),
            cluster_ips: HashMap::new(),
            news: News::default(),
        }
    }
}

impl<A: IpAddress> Claims<A> {
    /// Enters the claims of a Service.
    pub(super) fn insert(&mut self, draft: &Draft<A>) {
        for (kind, place, claim) in claims(draft) {
            if kind == FrontendKind::ClusterIp {
                let count = self.cluster_ips.entry(place.addr).or_default();
                *count += 1;
                if *count == 1 {
                    self.news.cluster_ips.insert(place.addr);
                }
            }
            // Nearly every place has one claimant, and a list made otherwise has room for four.
            let list = self.places.entry(place).or_insert_with(|| Vec::with_capacity(1));
            let at = list.partition_point(|other| *other < claim);
            if at == 0 {
                self.news.moved.extend(list.first().map(|loser| Arc::clone(&loser.name)));
            }
            list.insert(at, claim);
            if list.len() > 1 {
                self.contested.insert(place);
                self.news.has_problems = true;
            }
        }
    }

    /// Takes the claims of a Service back.
    pub(super) fn remove(&mut self, draft: &Draft<A>) {
        for (kind, place, claim) in claims(draft) {
            if kind == FrontendKind::ClusterIp
                && let Some(count) = self.cluster_ips.get_mut(&place.addr)
            {
                *count -= 1;
                if *count == 0 {
                    self.cluster_ips.remove(&place.addr);
                    self.news.cluster_ips.insert(place.addr);
                }
            }
            let Some(list) = self.places.get_mut(&place) else { continue };
            let Ok(at) = list.binary_search(&claim) else { continue };
            list.remove(at);
            if at == 0 {
                self.news.moved.extend(list.first().map(|winner| Arc::clone(&winner.name)));
            }
            if self.contested.contains(&place) {
                self.news.has_problems = true;
            }
            if list.len() <= 1 {
                self.contested.remove(&place);
            }
            if list.is_empty() {
                self.places.remove(&place);
            }
        }
    }

    /// Whether a service port is the one to serve an address and port.
    pub(super) fn is_won(&self, name: &ServicePortName, addr: A, port: u16) -> bool {
        let list = self.places.get(&Place { addr, port, protocol: name.protocol });
        list.and_then(|list| list.first()).is_some_and(|winner| *winner.name == *name)
    }

    /// Whether an address is the ClusterIP of any Service.
    pub(super) fn is_cluster_ip(&self, addr: A) -> bool {
        self.cluster_ips.contains_key(&addr)
    }

    /// Everybody who claims anything of an address.
    pub(super) fn claimants(&self, addr: A) -> impl Iterator<Item = &ServicePortName> {
        let first = Place { addr, port: 0, protocol: Protocol::Tcp };
        let at_address = self.places.range(first..).take_while(move |(place, _)| place.addr == addr);
        at_address.flat_map(|(_, list)| list.iter().map(|claim| &*claim.name))
    }

    /// Whether nobody claims anything.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty() && self.contested.is_empty() && self.cluster_ips.is_empty()
    }

    /// What happened since it was last asked.
    pub(super) fn news(&mut self) -> News<A> {
        std::mem::take(&mut self.news)
    }

    /// A problem for each claim that is lost.
    pub(super) fn problems(&self) -> impl Iterator<Item = Problem> {
        // Who loses a NodePort on other nodes loses it there for the same reason as here, and is told of it here, where this node
        // serves NodePorts at all.
        let here = self.contested.iter().filter(|place| place.addr != A::UNSPECIFIED);
        let contested = here.filter_map(|place| Some((place, self.places.get(place)?)));
        contested.flat_map(|(place, list)| {
            let (at, winner) = (SocketAddr::new(place.addr.to_ip(), place.port), &list[0].name);
            list.iter().skip(1).map(move |loser| {
                let message = format!(
                    "{at} is already served for Service {winner}; give one of the two another address or port"
                );
                Problem::of(ProblemKind::DuplicateFrontend, format!("Service {}", loser.name), message)
            })
        })
    }
}

fn claims<A: IpAddress>(draft: &Draft<A>) -> impl Iterator<Item = (FrontendKind, Place<A>, Claim)> {
    draft.ports.iter().flat_map(|port| {
        port.frontends.iter().map(|frontend| {
            let place = Place { addr: frontend.addr, port: frontend.port, protocol: port.name.protocol };
            let claim = Claim {
                is_node_port: frontend.kind == FrontendKind::NodePort,
                created_seconds: draft.created_seconds,
                name: Arc::clone(&port.name),
            };
            (frontend.kind, place, claim)
        })
    })
}
