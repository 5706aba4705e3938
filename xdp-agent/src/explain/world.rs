//! A node in memory: from objects to maps by the code that the agent runs.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use xdp_common::{
    net::{Address, Family, FlowKey, Port, TCP, V4, V6},
    tables::{self, BACKENDS_V4, FRONTENDS_V4, NETWORKS_V4, RINGS_V4},
};

use super::{
    answer::{Answer, Frontend, Verdict},
    decision::decide,
    dump::Dump,
    question::Question,
    tables::Maps,
};
#[cfg(test)]
use crate::plan::InUse;
use crate::{
    cluster::{
        Cluster, Options,
        wanted::{Delta, DesiredFrontend, IpAddress, ServicePort, ServicePortName},
    },
    objects::{Change, Node},
    plan::{Limits, Plan, QUARANTINE_MS},
    problem::Problem,
};

/// Limits of an agent without flags.
const LIMITS: Limits = Limits {
    frontends: FRONTENDS_V4.entries,
    backends: BACKENDS_V4.entries,
    ring_slots: RINGS_V4.entries,
    networks: NETWORKS_V4.entries,
};

/// A service port and one of its frontends.
pub(super) type Claimant<'a, A> = (&'a ServicePort<A>, &'a DesiredFrontend<A>);

/// A node, with everything that its agent would know and hold.
pub(crate) struct World {
    cluster: Cluster,
    /// Name of the node.
    node: String,
    /// Its addresses as they are given, the primary one of each family first.
    given: Vec<IpAddr>,
    /// Those, and those of its object.
    addresses: Vec<IpAddr>,
    pub(super) v4: Side<V4>,
    pub(super) v6: Side<V6>,
}

/// What is kept for one family.
pub(super) struct Side<F: Family> {
    plan: Plan<F::Addr>,
    pub(super) maps: Maps<F::Addr>,
    ports: BTreeMap<ServicePortName, Arc<ServicePort<F::Addr>>>,
    /// Service ports that are in the maps, by service id.
    names: BTreeMap<u32, ServicePortName>,
    /// Every step is later than whatever rested at the one before.
    now_ms: u64,
}

impl World {
    /// A node without objects.
    pub(crate) fn new(options: Options) -> Self {
        let direct = options.direct();
        let mut world = Self {
            node: options.node.clone(),
            given: options.node_ips.clone(),
            addresses: Vec::new(),
            cluster: Cluster::new(options),
            v4: Side::new(direct),
            v6: Side::new(direct),
        };
        world.set_node(None);
        world.update();
        world
    }

    /// Applies changes of objects, all at once.
    pub(crate) fn apply(&mut self, changes: impl IntoIterator<Item = Change>) {
        for change in changes {
            match &change {
                Change::Node(name, node) if *name == self.node => self.set_node(node.as_deref()),
                Change::Node(..) | Change::Service(..) | Change::Slice(..) | Change::ServiceCidr(..) => {}
            }
            self.cluster.apply(change);
        }
        self.update();
    }

    /// What a new connection meets.
    pub(crate) fn ask(&self, question: &Question) -> Answer {
        match question {
            Question::V4(key) => self.answer(&self.v4, key),
            Question::V6(key) => self.answer(&self.v6, key),
        }
    }

    /// What is wrong with the objects, or does not fit.
    pub(crate) fn problems(&self) -> Vec<Problem> {
        self.cluster
            .problems()
            .into_iter()
            .chain(self.v4.plan.problems())
            .chain(self.v6.plan.problems())
            .collect()
    }

    /// Frees what only flows could still use, as if there were none.
    #[cfg(test)]
    pub(super) fn collect(&mut self) {
        self.v4.collect();
        self.v6.collect();
    }

    /// What the maps hold, as text.
    pub(crate) fn dump(&self) -> String {
        format!("{}{}", self.v4.dump(), self.v6.dump())
    }

    /// Whether the node has any address.
    pub(super) fn has_address(&self) -> bool {
        !self.addresses.is_empty()
    }

    /// An answer about what is nobody's frontend, with the health check that the address and port are of, if there is one.
    pub(super) fn with_health_check<A: IpAddress>(
        &self,
        answer: Answer,
        key: &FlowKey<A>,
        is_own: bool,
    ) -> Answer {
        if answer.verdict != Verdict::Pass || answer.service.is_some() || !is_own || key.proto != TCP {
            return answer;
        }
        let checks = self.cluster.health_checks();
        let Some(check) = checks.into_iter().find(|check| check.port.to_be_bytes() == key.dport) else {
            return answer;
        };
        let (service, reason) = (Some(check.service.to_string()), Some(HEALTH_CHECK.to_owned()));
        Answer { frontend: Some(Frontend::HealthCheckNodePort), service, reason, ..answer }
    }

    fn answer<F: Family<Addr: IpAddress>>(&self, side: &Side<F>, key: &FlowKey<F::Addr>) -> Answer {
        let from = key.src.to_ip();
        let decision = decide::<F>(&side.maps, *key, from.is_loopback() || self.addresses.contains(&from));
        let answer = Answer::of(&decision, side.served_at(key, decision.frontend));
        self.with_health_check(answer, key, self.addresses.contains(&key.dst.to_ip()))
    }

    fn set_node(&mut self, node: Option<&Node>) {
        let listed = node.into_iter().flat_map(|node| node.internal_ips.iter().chain(&node.external_ips));
        self.addresses = self.given.iter().chain(listed).copied().collect();
        self.v4.set_snat(&self.addresses);
        self.v6.set_snat(&self.addresses);
    }

    fn update(&mut self) {
        let update = self.cluster.update();
        self.v4.update(&update.v4);
        self.v6.update(&update.v6);
    }
}

impl<F: Family<Addr: IpAddress>> Side<F> {
    fn new(direct: u32) -> Self {
        Self {
            plan: Plan::new(LIMITS),
            maps: Maps::new(F::Addr::UNSPECIFIED, direct),
            ports: BTreeMap::new(),
            names: BTreeMap::new(),
            now_ms: 0,
        }
    }

    /// The first address of the family is what clients are masqueraded with.
    fn set_snat(&mut self, addresses: &[IpAddr]) {
        let own = addresses.iter().find_map(|ip| F::Addr::from_ip(*ip));
        self.maps.snat = own.unwrap_or(F::Addr::UNSPECIFIED);
    }

    fn update(&mut self, delta: &Delta<F::Addr>) {
        for (name, port) in &delta.ports {
            match port {
                Some(port) => drop(self.ports.insert(name.clone(), Arc::clone(port))),
                None => drop(self.ports.remove(name)),
            }
        }
        self.now_ms += QUARANTINE_MS;
        let snat: Vec<F::Addr> = self.snat().into_iter().collect();
        let update = self.plan.update(delta, true, &snat, self.now_ms);
        update.changes.into_iter().for_each(|change| self.maps.apply(change));
        // All of them: what did not fit before may have been placed now.
        let ids = self.ports.keys().filter_map(|name| Some((self.plan.service_id(name)?, name.clone())));
        self.names = ids.collect();
    }

    #[cfg(test)]
    fn collect(&mut self) {
        // What is given up begins to rest at the first, and has rested at the second.
        for _ in 0..2 {
            self.now_ms += QUARANTINE_MS;
            let in_use = InUse { started_ms: self.now_ms, ..InUse::default() };
            let update = self.plan.collect(&in_use, self.now_ms);
            update.changes.into_iter().for_each(|change| self.maps.apply(change));
        }
    }

    fn snat(&self) -> Option<F::Addr> {
        Some(self.maps.snat).filter(|snat| *snat != F::Addr::UNSPECIFIED)
    }

    /// The service port whose frontend this is.
    fn served_at(
        &self,
        key: &FlowKey<F::Addr>,
        frontend: Option<tables::Frontend>,
    ) -> Option<Claimant<'_, F::Addr>> {
        let port = self.ports.get(self.names.get(&frontend?.service)?)?;
        Some((port, frontend_at(port, key.dst, key.dport)?))
    }

    /// The service port that claims a place, whatever the maps say.
    pub(super) fn claimant(&self, addr: F::Addr, port: Port, proto: u8) -> Option<Claimant<'_, F::Addr>> {
        let of_protocol = self.ports.values().filter(|claimant| claimant.name.protocol.number() == proto);
        of_protocol.into_iter().find_map(|claimant| Some((&**claimant, frontend_at(claimant, addr, port)?)))
    }

    fn dump(&self) -> String {
        let service = |id| self.names.get(&id).map_or_else(|| format!("service #{id}"), ToString::to_string);
        Dump { maps: &self.maps, service: &service }.to_string()
    }
}

/// Why what is addressed to a health check is left alone.
const HEALTH_CHECK: &str = "The node itself answers load balancers that ask for endpoints of this Service.";

fn frontend_at<A: IpAddress>(claimant: &ServicePort<A>, addr: A, port: Port) -> Option<&DesiredFrontend<A>> {
    let number = u16::from_be_bytes(port);
    claimant.frontends.iter().find(|frontend| (frontend.addr, frontend.port) == (addr, number))
}
