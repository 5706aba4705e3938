//! Service, EndpointSlice and Node objects as `kubectl get -o yaml` prints them, and a directory that holds them.

use std::fmt::Write;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

/// A port of a Service together with the port its endpoints listen on.
#[derive(Clone, Debug)]
pub struct Port {
    /// Name that joins Service and EndpointSlice.
    pub name: String,
    /// `TCP` or `UDP`.
    pub protocol: &'static str,
    /// Port of the ServiceIP, external and load-balancer addresses.
    pub port: u16,
    /// Port of the endpoints.
    pub target_port: u16,
    /// Port on the node's addresses; 0 for none.
    pub node_port: u16,
}

/// A Service with every kind of frontend the agent serves.
#[derive(Clone, Debug)]
pub struct Service {
    /// Name in namespace `default`.
    pub name: String,
    /// ServiceIP.
    pub cluster_ip: Ipv4Addr,
    /// Addresses routed to the node by others.
    pub external_ips: Vec<Ipv4Addr>,
    /// Addresses a load balancer has given.
    pub load_balancer_ips: Vec<Ipv4Addr>,
    /// Ports.
    pub ports: Vec<Port>,
    /// `Cluster` or `Local`.
    pub external_traffic_policy: &'static str,
    /// `Cluster` or `Local`.
    pub internal_traffic_policy: &'static str,
}

/// One endpoint of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Address of the pod.
    pub address: Ipv4Addr,
    /// Node that runs the pod.
    pub node: String,
    /// Whether it takes new connections.
    pub ready: bool,
}

impl Endpoint {
    /// Makes a ready endpoint.
    pub fn new(address: Ipv4Addr, node: &str) -> Self {
        Self { address, node: node.to_string(), ready: true }
    }
}

impl Service {
    /// Makes a Service without ports and further addresses.
    pub fn new(name: &str, cluster_ip: Ipv4Addr) -> Self {
        Self {
            name: name.to_string(),
            cluster_ip,
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            ports: Vec::new(),
            external_traffic_policy: "Cluster",
            internal_traffic_policy: "Cluster",
        }
    }

    /// Adds a port.
    pub fn port(
        mut self,
        name: &str,
        protocol: &'static str,
        port: u16,
        target_port: u16,
        node_port: u16,
    ) -> Self {
        self.ports.push(Port { name: name.to_string(), protocol, port, target_port, node_port });
        self
    }

    /// Renders the Service object.
    pub fn yaml(&self) -> String {
        let kind = if !self.load_balancer_ips.is_empty() {
            "LoadBalancer"
        } else if self.ports.iter().any(|port| port.node_port != 0) {
            "NodePort"
        } else {
            "ClusterIP"
        };
        let (name, ip) = (&self.name, self.cluster_ip);
        let mut text = format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  creationTimestamp: \"2026-01-01T00:00:00Z\"\n  labels:\n    app: \
             {name}\n  name: {name}\n  namespace: default\n  resourceVersion: \"1\"\n  uid: \
             00000000-0000-4000-8000-000000000001\nspec:\n"
        );
        if kind == "LoadBalancer" {
            text.push_str("  allocateLoadBalancerNodePorts: true\n");
        }
        line(&mut text, format_args!("  clusterIP: {ip}\n  clusterIPs:\n  - {ip}"));
        if !self.external_ips.is_empty() {
            line(&mut text, format_args!("  externalIPs:"));
            self.external_ips.iter().for_each(|ip| line(&mut text, format_args!("  - {ip}")));
        }
        if kind != "ClusterIP" || !self.external_ips.is_empty() {
            line(&mut text, format_args!("  externalTrafficPolicy: {}", self.external_traffic_policy));
        }
        line(&mut text, format_args!("  internalTrafficPolicy: {}", self.internal_traffic_policy));
        line(&mut text, format_args!("  ipFamilies:\n  - IPv4\n  ipFamilyPolicy: SingleStack\n  ports:"));
        for port in &self.ports {
            line(&mut text, format_args!("  - name: {}", port.name));
            if port.node_port != 0 {
                line(&mut text, format_args!("    nodePort: {}", port.node_port));
            }
            let Port { port, protocol, target_port, .. } = port;
            line(
                &mut text,
                format_args!("    port: {port}\n    protocol: {protocol}\n    targetPort: {target_port}"),
            );
        }
        line(
            &mut text,
            format_args!("  selector:\n    app: {name}\n  sessionAffinity: None\n  type: {kind}"),
        );
        line(&mut text, format_args!("status:\n  loadBalancer:"));
        match self.load_balancer_ips.is_empty() {
            true => text.insert_str(text.len() - 1, " {}"),
            false => line(&mut text, format_args!("    ingress:")),
        }
        self.load_balancer_ips
            .iter()
            .for_each(|ip| line(&mut text, format_args!("    - ip: {ip}\n      ipMode: VIP")));
        text
    }

    /// Renders the EndpointSlice that names these endpoints for the Service's ports.
    pub fn slice_yaml(&self, endpoints: &[Endpoint]) -> String {
        let name = &self.name;
        let mut text = String::from("addressType: IPv4\napiVersion: discovery.k8s.io/v1\n");
        text.push_str(if endpoints.is_empty() { "endpoints: []\n" } else { "endpoints:\n" });
        for Endpoint { address, node, ready } in endpoints {
            line(
                &mut text,
                format_args!(
                    "- addresses:\n  - {address}\n  conditions:\n    ready: {ready}\n    serving: {ready}\n    \
                     terminating: false\n  nodeName: {node}"
                ),
            );
        }
        line(
            &mut text,
            format_args!(
                "kind: EndpointSlice\nmetadata:\n  labels:\n    kubernetes.io/service-name: {name}\n  name: \
                 {name}-abcde\n  namespace: default\nports:"
            ),
        );
        for Port { name, protocol, target_port, .. } in &self.ports {
            line(&mut text, format_args!("- name: {name}\n  port: {target_port}\n  protocol: {protocol}"));
        }
        text
    }
}

/// Renders a Node object.
pub fn node_yaml(name: &str, address: Ipv4Addr, pod_cidr: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Node\nmetadata:\n  labels:\n    kubernetes.io/hostname: {name}\n    \
         topology.kubernetes.io/zone: zone-a\n  name: {name}\nspec:\n  podCIDR: {pod_cidr}\n  podCIDRs:\n  - \
         {pod_cidr}\nstatus:\n  addresses:\n  - address: {address}\n    type: InternalIP\n  - address: {name}\n    type: \
         Hostname\n"
    )
}

/// A directory of manifests whose files change atomically.
pub struct Manifests {
    root: TempDir,
}

impl Manifests {
    /// Makes an empty directory.
    pub fn new() -> Result<Self> {
        let root = tempfile::Builder::new().prefix("xdp-agent-lab-").tempdir()?;
        for part in ["services", "staging"] {
            fs::create_dir(root.path().join(part))?;
        }
        Ok(Self { root })
    }

    /// Returns the directory to give to the agent.
    pub fn directory(&self) -> PathBuf {
        self.root.path().join("services")
    }

    /// Writes or replaces a file in one step; documents are separated as in a multi-document YAML file.
    pub fn write(&self, file: &str, documents: &[String]) -> Result<()> {
        self.write_raw(file, &documents.join("---\n"))
    }

    /// Writes or replaces a file in one step with exactly this text.
    pub fn write_raw(&self, file: &str, text: &str) -> Result<()> {
        let staging = self.root.path().join("staging").join(file);
        fs::write(&staging, text).with_context(|| format!("writing {}", staging.display()))?;
        fs::rename(&staging, self.directory().join(file)).with_context(|| format!("replacing {file}"))
    }

    /// Removes a file.
    pub fn remove(&self, file: &str) -> Result<()> {
        fs::remove_file(self.directory().join(file)).with_context(|| format!("removing {file}"))
    }

    /// Returns a path beside the directory for other files of the same test.
    pub fn scratch(&self) -> &Path {
        self.root.path()
    }
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{content}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_reads_like_kubectl_output() {
        let mut service =
            Service::new("web", Ipv4Addr::new(10, 96, 0, 10)).port("http", "TCP", 80, 8080, 30080);
        assert!(
            service.yaml().ends_with("  type: NodePort\nstatus:\n  loadBalancer: {}\n"),
            "{}",
            service.yaml()
        );
        service.load_balancer_ips.push(Ipv4Addr::new(203, 0, 113, 10));
        assert!(service.yaml().ends_with("    ingress:\n    - ip: 203.0.113.10\n      ipMode: VIP\n"));
    }

    #[test]
    fn replacing_a_file_leaves_no_other_file_in_the_directory() {
        let manifests = Manifests::new().unwrap();
        manifests.write_raw("a.yaml", "one").unwrap();
        manifests.write_raw("a.yaml", "two").unwrap();
        let names: Vec<_> = fs::read_dir(manifests.directory()).unwrap().flatten().collect();
        assert_eq!(names.len(), 1);
        assert_eq!(fs::read_to_string(names[0].path()).unwrap(), "two");
    }
}
