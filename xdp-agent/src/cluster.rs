//! From Kubernetes objects to what this node should serve: pure, and the same on every node but for what is local.
//!
//! [`Cluster`] holds the objects and what follows from them. [`Cluster::apply`] notes what a change touches,
//! [`Cluster::update`] computes that much anew and tells what differs from what it told before. However changes are
//! ordered and batched, what has been told adds up to the same, and to nothing once every object is gone.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    mem,
    net::IpAddr,
    sync::Arc,
};

use xdp_common::tables::direct;

use self::{
    endpoints::{Here, local_ready},
    family::{Concerned, Served, Side},
    nodes::Nodes,
    problems::Problems,
    site::Site,
    wanted::{Delta, Ip6},
};
use crate::{
    objects::{Change, Node, ObjectName, Service, ServiceCidr, Slice},
    problem::Problem,
};

pub mod address;
mod claims;
mod endpoints;
mod family;
mod frontends;
mod misdirected;
mod nodes;
mod problems;
mod site;
#[cfg(test)]
mod tests;
pub mod wanted;

/// What the operator chooses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Name of this node, as in `nodeName` of endpoints.
    pub node: String,
    /// How this node's pods are told from other clients.
    pub detect_local: DetectLocal,
    /// Whether every flow to a ClusterIP is masqueraded.
    pub masquerade_all: bool,
    /// Where NodePorts are served.
    pub nodeport_addresses: NodePortAddresses,
    /// Service networks beside those of ServiceCIDR objects.
    pub service_cidrs: Vec<(IpAddr, u8)>,
    /// Addresses of this node, the primary one first, in place of those of their family that its Node object or its
    /// interfaces have.
    pub node_ips: Vec<IpAddr>,
    /// Zone of this node, in place of what its Node object says.
    pub zone: Option<String>,
    /// How packets of clients outside the cluster get to endpoints on other nodes.
    pub forwarding: Forwarding,
}

impl Options {
    /// What the endpoint's node answers, in bits of [`direct`]. NodePorts only where networks tell every pod of the cluster
    /// from other clients: pods reach those of other nodes by the wire.
    pub fn direct(&self) -> u32 {
        let wanted = match self.forwarding {
            Forwarding::Snat => return 0,
            Forwarding::Dsr => direct::TCP | direct::OTHERS,
            Forwarding::Hybrid => direct::TCP,
        };
        let has_cidrs = matches!(&self.detect_local, DetectLocal::ClusterCidr(cidrs) if !cidrs.is_empty());
        if has_cidrs { wanted | direct::NODE_PORTS } else { wanted }
    }
}

/// How packets of clients outside the cluster get to endpoints on other nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Forwarding {
    /// Translated to come from this node, by which the answers go back.
    #[default]
    Snat,
    /// As they are, in packets to the endpoint's node, which answers.
    Dsr,
    /// TCP as with [`Forwarding::Dsr`], all else as with [`Forwarding::Snat`].
    Hybrid,
}

/// How this node's pods are told from other clients.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DetectLocal {
    /// Not at all: pods are clients as any other.
    #[default]
    None,
    /// By the networks that all pods of the cluster have their addresses from.
    ClusterCidr(Vec<(IpAddr, u8)>),
    /// By the networks that the Node object gives to its pods.
    NodeCidr,
    /// By the bridge that they are connected to.
    BridgeInterface(String),
    /// By what the names of their interfaces begin with.
    InterfaceNamePrefix(String),
}

/// Where NodePorts are served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// On the first InternalIP of the node in each family, else its first ExternalIP (kube-proxy's nftables default).
    #[default]
    Primary,
    /// On the node's addresses in these networks; on all of a family of which there is none.
    Cidrs(Vec<(IpAddr, u8)>),
}

/// What is known of this node beside its Node object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// Stands in for the addresses of the Node object in families of which it has none.
    pub addresses: Vec<IpAddr>,
    /// Every address of the node's interfaces: nothing addressed to them is ever dropped.
    pub own: BTreeSet<IpAddr>,
}

/// What has changed since the last update.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Update {
    /// In IPv4.
    pub v4: Delta<[u8; 4]>,
    /// In IPv6.
    pub v6: Delta<Ip6>,
}

/// A port on which load balancers ask whether this node has endpoints of a Service. It claims nothing: it is the agent's
/// own, and two Services may ask for the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The Service.
    pub service: ObjectName,
    /// The port.
    pub port: u16,
    /// Addresses with a ready endpoint on this node, IPv4.
    pub local_endpoints_v4: u32,
    /// The same, IPv6.
    pub local_endpoints_v6: u32,
}

/// Whether load balancers should send anything to this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eligibility {
    /// Nothing speaks against it.
    Eligible,
    /// The Node is being deleted, or is about to be.
    Leaving,
    /// There is no Node object of this node's name; what that means depends on whether there should be.
    Absent,
}

/// Service ports whose policy asks for local endpoints while there are only others, by that policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyCounts {
    /// `internalTrafficPolicy`.
    pub internal: u32,
    /// `externalTrafficPolicy`.
    pub external: u32,
}

/// Service ports that drop for want of local endpoints, by family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoLocalEndpoints {
    /// In IPv4.
    pub v4: PolicyCounts,
    /// In IPv6.
    pub v6: PolicyCounts,
}

/// The objects, and what follows from them for this node.
#[derive(Debug)]
pub struct Cluster {
    options: Options,
    facts: NodeFacts,
    /// The object of this node.
    node: Option<Arc<Node>>,
    /// The others, where they matter.
    nodes: Nodes,
    service_cidrs: BTreeMap<String, Arc<ServiceCidr>>,
    services: BTreeMap<ObjectName, Entry>,
    /// Every slice that is used, to find the Service that it was of.
    slices: HashMap<ObjectName, Arc<Slice>>,
    v4: Side<[u8; 4]>,
    v6: Side<Ip6>,
    health_checks: BTreeMap<ObjectName, HealthCheck>,
    problems: Problems,
    touched: BTreeSet<ObjectName>,
    /// Other nodes whose addresses have changed.
    moved_nodes: BTreeSet<Box<str>>,
    /// Whether something of the node, or of networks, has changed.
    is_site_touched: bool,
    /// Where the view of the node stood at the last update.
    zone: String,
}

/// A Service, as soon as there is an object of it or a slice for it.
#[derive(Debug, Default)]
struct Entry {
    service: Option<Arc<Service>>,
    slices: BTreeMap<Box<str>, Arc<Slice>>,
    v4: Served<[u8; 4]>,
    v6: Served<Ip6>,
}

impl Cluster {
    /// A cluster without objects.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            facts: NodeFacts::default(),
            node: None,
            nodes: Nodes::default(),
            service_cidrs: BTreeMap::new(),
            services: BTreeMap::new(),
            slices: HashMap::new(),
            v4: Side::default(),
            v6: Side::default(),
            health_checks: BTreeMap::new(),
            problems: Problems::default(),
            touched: BTreeSet::new(),
            moved_nodes: BTreeSet::new(),
            is_site_touched: true,
            zone: String::new(),
        }
    }

    /// Takes what is known of this node beside its Node object.
    pub fn set_node(&mut self, facts: NodeFacts) {
        self.is_site_touched |= facts != self.facts;
        self.facts = facts;
    }

    /// Takes a change of an object, in time that grows with this object only.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Service(name, service) => self.apply_service(name, service),
            Change::Slice(name, slice) => self.apply_slice(name, slice),
            Change::Node(name, node) if name != self.options.node => self.apply_other(&name, node.as_deref()),
            Change::Node(name, node) => {
                if node == self.node {
                    return;
                }
                self.problems.set("Node", &name, node.as_ref().map(|node| &*node.flaws));
                self.node = node;
                self.is_site_touched = true;
            }
            Change::ServiceCidr(name, cidr) => {
                self.problems.set("ServiceCIDR", &name, cidr.as_ref().map(|cidr| &*cidr.flaws));
                match cidr {
                    Some(cidr) => self.service_cidrs.insert(name, cidr),
                    None => self.service_cidrs.remove(&name),
                };
                self.is_site_touched = true;
            }
        }
    }

    /// Takes the object of another node, if that matters.
    fn apply_other(&mut self, name: &str, node: Option<&Node>) {
        if self.options.forwarding == Forwarding::Snat {
            return;
        }
        self.problems.set("Node", name, node.map(|node| &*node.flaws));
        if self.nodes.set(name, node) {
            self.is_site_touched = true;
            self.moved_nodes.insert(name.into());
        }
    }

    fn apply_service(&mut self, name: ObjectName, service: Option<Arc<Service>>) {
        let known = self.services.get(&name).and_then(|entry| entry.service.as_ref());
        if known == service.as_ref() {
            return;
        }
        self.problems.set("Service", &name, service.as_ref().map(|service| &*service.flaws));
        self.services.entry(name.clone()).or_default().service = service;
        self.touched.insert(name);
    }

    fn apply_slice(&mut self, name: ObjectName, slice: Option<Arc<Slice>>) {
        // One that is not used may have flaws all the same.
        self.problems.set("EndpointSlice", &name, slice.as_ref().map(|slice| &*slice.flaws));
        let slice = slice.filter(|slice| !slice.service.is_empty());
        if self.slices.get(&name) == slice.as_ref() {
            return;
        }
        if let Some(old) = self.slices.remove(&name) {
            self.v4.addresses.remove(&old);
            self.v6.addresses.remove(&old);
            let service = ObjectName::new(&*name.namespace, &*old.service);
            if let Some(entry) = self.services.get_mut(&service) {
                entry.slices.remove(&*name.name);
            }
            self.touched.insert(service);
        }
        if let Some(slice) = slice {
            let service = ObjectName::new(&*name.namespace, &*slice.service);
            let entry = self.services.entry(service.clone()).or_default();
            entry.slices.insert(name.name.as_str().into(), Arc::clone(&slice));
            self.v4.addresses.add(&slice);
            self.v6.addresses.add(&slice);
            self.slices.insert(name, slice);
            self.touched.insert(service);
        }
    }

    /// The node's primary address of IPv4, and the first that NodePorts are served on, as of the last update.
    pub fn own_v4(&self) -> [Option<[u8; 4]>; 2] {
        self.v4.site.rules.first()
    }

    /// The same of IPv6.
    pub fn own_v6(&self) -> [Option<Ip6>; 2] {
        self.v6.site.rules.first()
    }

    /// Computes what the changes since the last update touch, and tells what differs from what was told before.
    ///
    /// Takes time in proportion to the Services touched; a change of the node's zone, name or main addresses touches all.
    pub fn update(&mut self) -> Update {
        let mut update = Update::default();
        let mut touched = mem::take(&mut self.touched);
        let moved = mem::take(&mut self.moved_nodes);
        if !moved.is_empty() {
            let there =
                self.slices.iter().filter(|(_, slice)| slice.names().any(|name| moved.contains(name)));
            touched.extend(there.map(|(at, slice)| ObjectName::new(&*at.namespace, &*slice.service)));
        }
        if mem::take(&mut self.is_site_touched) {
            self.update_site(&mut touched, &mut update);
        }
        self.claim(&touched);
        let (mut v4, mut v6) = (self.v4.claims.news(), self.v6.claims.news());
        let is_new = v4.cluster_ips.iter().any(|addr| self.v4.site.rules.node_ports.contains(addr))
            || v6.cluster_ips.iter().any(|addr| self.v6.site.rules.node_ports.contains(addr));
        if is_new {
            // An address that serves NodePorts has become a ClusterIP, or is none any more: NodePorts yield to it.
            touched.extend(self.services.keys().cloned());
            self.claim(&touched);
            let (more_v4, more_v6) = (self.v4.claims.news(), self.v6.claims.news());
            v4.moved.extend(more_v4.moved);
            v6.moved.extend(more_v6.moved);
            v4.has_problems |= more_v4.has_problems | more_v6.has_problems;
        }
        self.touch_misdirected(&v4.cluster_ips, &v6.cluster_ips, &mut touched);
        for name in v4.moved.iter().chain(&v6.moved) {
            touched.insert(ObjectName::new(&*name.namespace, &*name.service));
        }
        if v4.has_problems || v6.has_problems {
            self.problems.touch();
        }
        for name in &touched {
            self.serve(name, &mut update);
        }
        update
    }

    /// Touches the Services with endpoints at addresses that have become a ClusterIP or are none any more.
    fn touch_misdirected(
        &self,
        v4: &BTreeSet<[u8; 4]>,
        v6: &BTreeSet<Ip6>,
        touched: &mut BTreeSet<ObjectName>,
    ) {
        let is_endpoint_v4 = v4.iter().any(|addr| self.v4.addresses.contains(addr));
        let is_endpoint_v6 = v6.iter().any(|addr| self.v6.addresses.contains(addr));
        if !is_endpoint_v4 && !is_endpoint_v6 {
            return;
        }
        let is_at = |slice: &Arc<Slice>| {
            slice.v4.iter().any(|endpoint| v4.contains(&endpoint.addr))
                || slice.v6.iter().any(|endpoint| v6.contains(&endpoint.addr))
        };
        let concerned = self.services.iter().filter(|(_, entry)| entry.slices.values().any(is_at));
        touched.extend(concerned.map(|(name, _)| name.clone()));
    }

    fn update_site(&mut self, touched: &mut BTreeSet<ObjectName>, update: &mut Update) {
        let node = self.node.as_deref();
        let sites = (Site::of(&self.options, &self.facts, node), Site::of(&self.options, &self.facts, node));
        let cidrs = self.service_cidrs.values().map(|cidr| &**cidr);
        update.v4.networks =
            self.v4.set_networks(sites.0.networks(&self.options, node, &self.nodes.v4, cidrs.clone()));
        update.v6.networks =
            self.v6.set_networks(sites.1.networks(&self.options, node, &self.nodes.v6, cidrs));
        let zone = match (&self.options.zone, node) {
            (Some(zone), _) => zone,
            (None, Some(node)) => &*node.zone,
            (None, None) => "",
        };
        let mut concerned = vec![self.v4.set_site(sites.0), self.v6.set_site(sites.1)];
        if zone != self.zone {
            self.zone = zone.to_owned();
            concerned.push(Concerned::All);
        }
        for concerned in concerned {
            match concerned {
                Concerned::All => touched.extend(self.services.keys().cloned()),
                Concerned::These(names) => touched.extend(names),
            }
        }
    }

    fn claim(&mut self, touched: &BTreeSet<ObjectName>) {
        for name in touched {
            let Some(entry) = self.services.get_mut(name) else { continue };
            let service = entry.service.as_deref();
            self.v4.claim(name, service, &mut entry.v4);
            self.v6.claim(name, service, &mut entry.v6);
        }
    }

    fn serve(&mut self, name: &ObjectName, update: &mut Update) {
        let Some(entry) = self.services.get_mut(name) else { return };
        let here = Here { node: &self.options.node, zone: &self.zone, nodes: &self.nodes };
        let (service, slices) = (entry.service.as_deref(), entry.slices.values());
        self.v4.serve(service, slices.clone(), here, &mut entry.v4, &mut update.v4);
        self.v6.serve(service, slices.clone(), here, &mut entry.v6, &mut update.v6);
        let mut misdirected = misdirected::problems(&name.namespace, entry.slices.iter(), &self.v4.claims);
        misdirected.extend(misdirected::problems(&name.namespace, entry.slices.iter(), &self.v6.claims));
        self.problems.set_of_service(name, misdirected);
        let port = service.map_or(0, |service| service.health_check_node_port);
        if port != 0 && (entry.v4.is_claimant() || entry.v6.is_claimant()) {
            let check = HealthCheck {
                service: name.clone(),
                port,
                local_endpoints_v4: local_ready::<[u8; 4]>(slices.clone(), here),
                local_endpoints_v6: local_ready::<Ip6>(slices, here),
            };
            self.health_checks.insert(name.clone(), check);
        } else {
            self.health_checks.remove(name);
        }
        if entry.service.is_none() && entry.slices.is_empty() {
            self.services.remove(name);
        }
    }

    /// All current problems, by object. A list of its own: ask for it when [`Self::problems_version`] has changed.
    pub fn problems(&self) -> Vec<Problem> {
        let lost = self.v4.claims.problems().chain(self.v6.claims.problems());
        self.problems.iter().cloned().chain(lost).collect()
    }

    /// A number that changes whenever the problems do, as of the last update.
    pub fn problems_version(&self) -> u64 {
        self.problems.version()
    }

    /// The health-check ports to open, as of the last update.
    pub fn health_checks(&self) -> Vec<HealthCheck> {
        self.health_checks.values().cloned().collect()
    }

    /// Service ports that drop for want of local endpoints, as of the last update.
    pub fn no_local_endpoints(&self) -> NoLocalEndpoints {
        NoLocalEndpoints { v4: self.v4.no_local, v6: self.v6.no_local }
    }

    /// How many objects there are, by kind.
    pub fn objects(&self) -> [(&'static str, usize); 4] {
        let services = self.services.values().filter(|entry| entry.service.is_some()).count();
        [
            ("service", services),
            ("endpointslice", self.slices.len()),
            ("node", usize::from(self.node.is_some())),
            ("servicecidr", self.service_cidrs.len()),
        ]
    }

    /// Whether load balancers should send anything to this node.
    pub fn eligibility(&self) -> Eligibility {
        match &self.node {
            Some(node) if node.is_leaving => Eligibility::Leaving,
            Some(_) => Eligibility::Eligible,
            None => Eligibility::Absent,
        }
    }
}

impl Update {
    /// Whether nothing has changed.
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}
