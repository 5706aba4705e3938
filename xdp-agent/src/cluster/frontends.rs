//! From a Service to the addresses and ports that it claims in one family (Kubernetes: pkg/proxy/serviceport.go).

use std::sync::Arc;

use super::{
    site::{Site, networks, of_family},
    wanted::{DesiredFrontend, FrontendKind, IpAddress, Masquerade, Network, Policy, ServicePortName},
};
use crate::objects::{ObjectName, Service};

/// What a Service claims in one family, before claims are settled.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Draft<A> {
    /// When it was created, in seconds; a Service that does not say is younger than all.
    pub(super) created_seconds: i64,
    /// Its ports, by name.
    pub(super) ports: Box<[PortDraft<A>]>,
    /// Who may open flows to restricted frontends.
    pub(super) sources: Box<[Network<A>]>,
}

/// What a service port claims in one family.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PortDraft<A> {
    pub(super) name: Arc<ServicePortName>,
    /// Sorted, no address and port twice.
    pub(super) frontends: Box<[DesiredFrontend<A>]>,
}

/// What all the ports of a Service share.
struct Claimant<'a, A> {
    service: &'a Service,
    site: &'a Site<A>,
    cluster_ip: A,
    load_balancer_ips: Vec<A>,
    is_restricted: bool,
}

impl<A: IpAddress> Draft<A> {
    /// Reads what a Service claims; `is_cluster_ip` tells an address that some Service has as its ClusterIP.
    pub(super) fn of(
        name: &ObjectName,
        service: &Service,
        site: &Site<A>,
        is_cluster_ip: impl Fn(A) -> bool,
    ) -> Self {
        let created_seconds = service.created_seconds.unwrap_or(i64::MAX);
        // Without a ClusterIP of the family there is nothing of it in the family.
        let Some(cluster_ip) = of_family(&service.cluster_ips).next() else {
            return Self { created_seconds, ports: Box::default(), sources: Box::default() };
        };
        let load_balancer_ips: Vec<A> = of_family(&service.load_balancer_ips).collect();
        let sources = sources(service, site, &load_balancer_ips);
        let is_restricted = sources.is_some();
        let claimant = Claimant { service, site, cluster_ip, load_balancer_ips, is_restricted };
        let mut ports: Vec<_> = (service.ports.iter())
            .map(|port| PortDraft {
                name: Arc::new(ServicePortName {
                    namespace: name.namespace.clone(),
                    service: name.name.clone(),
                    port: port.name.to_string(),
                    protocol: port.protocol,
                }),
                frontends: claimant.frontends(port.port, port.node_port, &is_cluster_ip),
            })
            .collect();
        ports.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Self { created_seconds, ports: ports.into(), sources: sources.unwrap_or_default().into() }
    }
}

impl<A: IpAddress> Claimant<'_, A> {
    /// What a port claims: the first kind of an address counts.
    fn frontends(
        &self,
        port: u16,
        node_port: u16,
        is_cluster_ip: impl Fn(A) -> bool,
    ) -> Box<[DesiredFrontend<A>]> {
        let mut frontends = vec![self.frontend(self.cluster_ip, port, FrontendKind::ClusterIp)];
        let mut add = |frontend: DesiredFrontend<A>| {
            let is_there =
                |other: &DesiredFrontend<A>| (other.addr, other.port) == (frontend.addr, frontend.port);
            if !frontends.iter().any(is_there) {
                frontends.push(frontend);
            }
        };
        for ip in of_family(&self.service.external_ips) {
            add(self.frontend(ip, port, FrontendKind::ExternalIp));
        }
        for &ip in &self.load_balancer_ips {
            add(self.frontend(ip, port, FrontendKind::LoadBalancer));
        }
        if node_port != 0 {
            // A ClusterIP on an interface of this node is a Service's all the same.
            for &ip in self.site.rules.node_ports.iter().filter(|ip| !is_cluster_ip(**ip)) {
                add(self.frontend(ip, node_port, FrontendKind::NodePort));
            }
            if self.site.rules.is_direct && self.service.external == Policy::Cluster {
                add(self.frontend(A::UNSPECIFIED, node_port, FrontendKind::NodePort));
            }
        }
        frontends.sort_unstable();
        frontends.into()
    }

    fn frontend(&self, addr: A, port: u16, kind: FrontendKind) -> DesiredFrontend<A> {
        let (external, internal, masquerade) = match kind {
            FrontendKind::ClusterIp => self.inside(),
            FrontendKind::ExternalIp | FrontendKind::LoadBalancer | FrontendKind::NodePort => self.outside(),
        };
        // The ranges guard an address, whichever field it stands in beside the load balancer's.
        let is_guarded = kind != FrontendKind::NodePort && self.load_balancer_ips.contains(&addr);
        DesiredFrontend {
            addr,
            port,
            kind,
            external,
            internal,
            masquerade,
            is_restricted: self.is_restricted && is_guarded,
            is_node_address: self.site.own.contains(&addr),
        }
    }

    /// Policies and masquerading of the ClusterIP: the internal policy is everybody's.
    fn inside(&self) -> (Policy, Policy, Masquerade) {
        let rules = &self.site.rules;
        let others = rules.masquerade_all || rules.has_detector;
        let masquerade = Masquerade { external: others, pod: rules.masquerade_all, host: others };
        (self.service.internal, self.service.internal, masquerade)
    }

    /// Policies and masquerading of addresses for clients outside: with policy Local their addresses are kept, and pods
    /// and processes of this node reach every endpoint, as if they had used the ClusterIP.
    fn outside(&self) -> (Policy, Policy, Masquerade) {
        let is_cluster = self.service.external == Policy::Cluster;
        let masquerade = Masquerade { external: is_cluster, pod: is_cluster, host: true };
        (self.service.external, Policy::Cluster, masquerade)
    }
}

/// Who may reach the load-balancer addresses; none when everybody may.
fn sources<A: IpAddress>(
    service: &Service,
    site: &Site<A>,
    load_balancer_ips: &[A],
) -> Option<Vec<Network<A>>> {
    let mut sources: Vec<Network<A>> = networks(&service.source_ranges);
    let is_open = sources.is_empty() && !service.has_bad_source_range;
    if load_balancer_ips.is_empty() || is_open || sources.iter().any(|range| range.len == 0) {
        return None;
    }
    // Where the balancer's address is also on this node, the node's own packets to it come from that address.
    if sources.iter().any(|range| site.rules.node_ips.iter().any(|&ip| range.contains(ip))) {
        let longest = (A::LEN * 8) as u8;
        sources.extend(load_balancer_ips.iter().map(|&ip| Network::of(ip, longest)));
        sources.sort_unstable();
        sources.dedup();
    }
    Some(sources)
}
