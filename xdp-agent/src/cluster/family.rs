//! What one address family has of the Services: their claims, what is served of them, and what has been told.

use std::{collections::BTreeSet, mem, sync::Arc};

use super::{
    PolicyCounts,
    claims::Claims,
    endpoints::{Family, Here, candidates, categorize},
    frontends::{Draft, PortDraft},
    misdirected::Addresses,
    site::Site,
    wanted::{Delta, DesiredFrontend, FrontendKind, Networks, Policy, ServicePort},
};
use crate::objects::{ObjectName, Service, Slice};

/// One address family over all Services.
#[derive(Debug, Default)]
pub(super) struct Side<A> {
    pub(super) site: Site<A>,
    pub(super) claims: Claims<A>,
    pub(super) addresses: Addresses<A>,
    networks: Networks<A>,
    pub(super) no_local: PolicyCounts,
}

/// What one address family has of one Service.
#[derive(Debug, Default)]
pub(super) struct Served<A> {
    draft: Draft<A>,
    /// What has been told, by name.
    ports: Box<[Arc<ServicePort<A>>]>,
    no_local: PolicyCounts,
}

/// Which Services something concerns.
#[derive(Debug, PartialEq)]
pub(super) enum Concerned {
    All,
    These(BTreeSet<ObjectName>),
}

impl<A: Family> Side<A> {
    /// Takes a new view of the node; says which Services it concerns.
    pub(super) fn set_site(&mut self, site: Site<A>) -> Concerned {
        let before = mem::replace(&mut self.site, site);
        if before.rules != self.site.rules {
            return Concerned::All;
        }
        // Addresses come and go with the pods of the node; hardly ever are they frontends.
        let changed = before.own.symmetric_difference(&self.site.own);
        let claimants = changed.flat_map(|addr| self.claims.claimants(*addr));
        Concerned::These(claimants.map(|name| ObjectName::new(&*name.namespace, &*name.service)).collect())
    }

    /// Takes new networks; gives them back when they are others than before.
    pub(super) fn set_networks(&mut self, networks: Networks<A>) -> Option<Networks<A>> {
        if networks == self.networks {
            return None;
        }
        self.networks = networks;
        Some(self.networks.clone())
    }

    /// Enters what a Service claims now in place of what it claimed before.
    pub(super) fn claim(&mut self, name: &ObjectName, service: Option<&Service>, served: &mut Served<A>) {
        let claims = &self.claims;
        let draft = service.map_or_else(Draft::default, |service| {
            Draft::of(name, service, &self.site, |addr| claims.is_cluster_ip(addr))
        });
        if draft != served.draft {
            self.claims.remove(&served.draft);
            self.claims.insert(&draft);
            served.draft = draft;
        }
    }

    /// Computes what is served of a Service, after all claims are entered, and tells what differs from before.
    pub(super) fn serve<'a>(
        &mut self,
        service: Option<&Service>,
        slices: impl Iterator<Item = &'a Arc<Slice>> + Clone,
        here: Here<'_>,
        served: &mut Served<A>,
        delta: &mut Delta<A>,
    ) {
        let before = mem::take(&mut served.ports);
        let mut ports = Vec::with_capacity(served.draft.ports.len());
        let mut no_local = PolicyCounts::default();
        for draft in &served.draft.ports {
            let affinity_seconds = service.map_or(0, |service| service.affinity_seconds);
            let Some(mut port) = self.port(draft, slices.clone(), here) else { continue };
            port.affinity_seconds = affinity_seconds;
            if port.frontends.iter().any(|frontend| frontend.is_restricted) {
                port.sources = served.draft.sources.to_vec();
            }
            no_local.add(&port);
            let known = before.binary_search_by(|known| known.name.cmp(&port.name)).map(|at| &before[at]);
            match known {
                Ok(known) if **known == port => ports.push(Arc::clone(known)),
                Ok(_) | Err(_) => {
                    let port = Arc::new(port);
                    delta.ports.insert(port.name.clone(), Some(Arc::clone(&port)));
                    ports.push(port);
                }
            }
        }
        for gone in before.iter().filter(|old| ports.binary_search_by(|p| p.name.cmp(&old.name)).is_err()) {
            delta.ports.insert(gone.name.clone(), None);
        }
        self.no_local.replace(&served.no_local, &no_local);
        served.ports = ports.into();
        served.no_local = no_local;
    }

    /// A service port with the frontends that it has won; none when it has won none.
    fn port<'a>(
        &self,
        draft: &PortDraft<A>,
        slices: impl Iterator<Item = &'a Arc<Slice>>,
        here: Here<'_>,
    ) -> Option<ServicePort<A>> {
        let is_won =
            |frontend: &&DesiredFrontend<A>| self.claims.is_won(&draft.name, frontend.addr, frontend.port);
        let mut frontends = Vec::with_capacity(draft.frontends.len());
        frontends.extend(draft.frontends.iter().filter(is_won).copied());
        if frontends.is_empty() {
            return None;
        }
        let name = &*draft.name;
        let candidates = candidates(slices, here, &name.port, name.protocol);
        let mut lists = categorize(&candidates);
        let uses = |policy| frontends.iter().any(|f| f.external == policy || f.internal == policy);
        if !uses(Policy::Cluster) {
            lists.cluster = Vec::new();
        }
        if !uses(Policy::Local) {
            lists.local = Vec::new();
        }
        Some(ServicePort {
            name: name.clone(),
            frontends,
            cluster: lists.cluster,
            local: lists.local,
            serving: lists.serving,
            any_endpoint: lists.any,
            affinity_seconds: 0,
            sources: Vec::new(),
        })
    }
}

impl<A> Served<A> {
    /// Whether the Service has anything in this family, be it that others serve it.
    pub(super) fn is_claimant(&self) -> bool {
        !self.draft.ports.is_empty()
    }
}

impl PolicyCounts {
    /// Counts a service port whose policy asks for local endpoints, when there are only others.
    fn add<A>(&mut self, port: &ServicePort<A>) {
        if !port.any_endpoint || !port.local.is_empty() {
            return;
        }
        let asks = |is_inside| {
            let mut frontends = port.frontends.iter();
            frontends.any(|f| (f.kind == FrontendKind::ClusterIp) == is_inside && f.external == Policy::Local)
        };
        self.internal += u32::from(asks(true));
        self.external += u32::from(asks(false));
    }

    fn replace(&mut self, old: &Self, new: &Self) {
        self.internal = self.internal - old.internal + new.internal;
        self.external = self.external - old.external + new.external;
    }
}
