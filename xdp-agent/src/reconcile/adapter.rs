//! From the whole wish to what has changed in it.

use std::{collections::BTreeMap, sync::Arc};

use crate::cluster::{
    self, Desired,
    wanted::{
        Delta, DesiredFrontend, Endpoint, FrontendKind, Masquerade, Policy, Protocol, ServicePort, ServicePortName,
    },
};

/// The wish as it was given last.
#[derive(Debug, Default)]
pub(super) struct Adapter(BTreeMap<ServicePortName, Arc<ServicePort<[u8; 4]>>>);

impl Adapter {
    pub(super) fn delta(&mut self, desired: &Desired) -> Delta<[u8; 4]> {
        let new: BTreeMap<_, _> =
            desired.services.iter().map(|port| port_of(port)).map(|port| (port.name.clone(), Arc::new(port))).collect();
        let mut ports: BTreeMap<_, _> =
            self.0.keys().filter(|name| !new.contains_key(*name)).map(|name| (name.clone(), None)).collect();
        let changed = new.iter().filter(|(name, port)| self.0.get(*name) != Some(*port));
        ports.extend(changed.map(|(name, port)| (name.clone(), Some(Arc::clone(port)))));
        self.0 = new;
        Delta { ports, networks: None }
    }
}

fn port_of(port: &cluster::ServicePort) -> ServicePort<[u8; 4]> {
    let list = |list: &[cluster::Endpoint]| {
        list.iter().map(|e| Endpoint { addr: e.addr, port: e.port, local: e.local }).collect::<Vec<_>>()
    };
    let mut serving = list(&port.serving);
    serving.sort_unstable();
    ServicePort {
        name: ServicePortName {
            namespace: port.name.namespace.clone(),
            service: port.name.service.clone(),
            port: port.name.port.clone(),
            protocol: match port.name.protocol {
                cluster::Protocol::Tcp => Protocol::Tcp,
                cluster::Protocol::Udp => Protocol::Udp,
            },
        },
        frontends: port.frontends.iter().map(frontend_of).collect(),
        cluster: list(&port.cluster),
        local: list(&port.local),
        serving,
        any_endpoint: port.any_endpoint,
        affinity_seconds: 0,
        sources: Vec::new(),
    }
}

fn frontend_of(frontend: &cluster::DesiredFrontend) -> DesiredFrontend<[u8; 4]> {
    let policy = match frontend.policy {
        cluster::Policy::Cluster => Policy::Cluster,
        cluster::Policy::Local => Policy::Local,
    };
    DesiredFrontend {
        addr: frontend.addr,
        port: frontend.port,
        kind: match frontend.kind {
            cluster::FrontendKind::ClusterIp => FrontendKind::ClusterIp,
            cluster::FrontendKind::ExternalIp => FrontendKind::ExternalIp,
            cluster::FrontendKind::LoadBalancer => FrontendKind::LoadBalancer,
            cluster::FrontendKind::NodePort => FrontendKind::NodePort,
        },
        external: policy,
        internal: policy,
        masquerade: Masquerade { external: true, pod: true, host: true },
        is_restricted: false,
        is_node_address: frontend.node_address,
    }
}
