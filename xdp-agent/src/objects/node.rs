//! Nodes and ServiceCIDRs.

use std::net::IpAddr;

use k8s_openapi::api::{core::v1, networking::v1 as networking};

use super::{Flaw, Flaws, quoted};
use crate::cluster::address::{parse_cidr_sloppy, parse_ip_sloppy};

const LABEL_ZONE: &str = "topology.kubernetes.io/zone";
/// The cluster autoscaler puts it on a Node that it is about to remove (kube-proxy's healthcheck/proxy_health.go).
const TAINT_LEAVING: &str = "ToBeDeletedByClusterAutoscaler";

/// What matters of a Node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Node {
    /// Its zone, empty when it names none.
    pub zone: Box<str>,
    /// Addresses of type InternalIP, in the order of the object.
    pub internal_ips: Box<[IpAddr]>,
    /// Addresses of type ExternalIP, in the order of the object.
    pub external_ips: Box<[IpAddr]>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Box<[(IpAddr, u8)]>,
    /// Whether it is being deleted, or the cluster autoscaler is about to remove it.
    pub is_leaving: bool,
    /// What cannot be used of it.
    pub flaws: Box<[Flaw]>,
}

/// What matters of a ServiceCIDR.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServiceCidr {
    /// `spec.cidrs`.
    pub cidrs: Box<[(IpAddr, u8)]>,
    /// What cannot be used of it.
    pub flaws: Box<[Flaw]>,
}

impl Node {
    /// Reads an object.
    pub fn read(object: &v1::Node) -> Self {
        let mut flaws = Flaws::default();
        let labels = object.metadata.labels.as_ref();
        let spec = object.spec.as_ref();
        let listed = object.status.as_ref().and_then(|status| status.addresses.as_deref());
        let mut of_type = |wanted: &str| -> Box<[IpAddr]> {
            let mut ips = Vec::new();
            for address in listed.unwrap_or_default().iter().filter(|address| address.type_ == wanted) {
                match parse_ip_sloppy(&address.address) {
                    Some(ip) => ips.push(ip),
                    None => flaws.push(|| {
                        format!("{wanted} {} is not an IP address; it is left out", quoted(&address.address))
                    }),
                }
            }
            ips.into()
        };
        let (internal_ips, external_ips) = (of_type("InternalIP"), of_type("ExternalIP"));
        let taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
        // Objects from before dual stack have the first form only.
        let pod_cidrs = spec.and_then(|spec| spec.pod_cidrs.as_deref()).unwrap_or_default();
        let pod_cidr = spec.and_then(|spec| spec.pod_cidr.as_ref()).filter(|_| pod_cidrs.is_empty());
        Self {
            zone: labels.and_then(|labels| labels.get(LABEL_ZONE)).map_or("", String::as_str).into(),
            internal_ips,
            external_ips,
            pod_cidrs: networks(pod_cidrs.iter().chain(pod_cidr), "podCIDR", &mut flaws),
            is_leaving: object.metadata.deletion_timestamp.is_some()
                || taints.iter().any(|taint| taint.key == TAINT_LEAVING),
            flaws: flaws.finish(),
        }
    }
}

impl ServiceCidr {
    /// Reads an object.
    pub fn read(object: &networking::ServiceCIDR) -> Self {
        let mut flaws = Flaws::default();
        let cidrs = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
        Self { cidrs: networks(cidrs.iter(), "CIDR", &mut flaws), flaws: flaws.finish() }
    }
}

fn networks<'a>(
    texts: impl Iterator<Item = &'a String>,
    what: &str,
    flaws: &mut Flaws,
) -> Box<[(IpAddr, u8)]> {
    let mut networks = Vec::new();
    for text in texts.filter(|text| !text.is_empty()) {
        match parse_cidr_sloppy(text) {
            Some(network) => networks.push(network),
            None => {
                flaws.push(|| format!("{what} {} is not an IP network; it is left out", quoted(text)));
            }
        }
    }
    networks.into()
}
