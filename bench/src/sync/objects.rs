//! The objects of a [`World`] as an API server holds them, with the metadata that controllers leave on them.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        core::v1::{
            Node, NodeAddress, NodeSpec, NodeStatus, ObjectReference, Service, ServicePort, ServiceSpec,
            ServiceStatus,
        },
        discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
        networking::v1::{ServiceCIDR, ServiceCIDRSpec},
    },
    apimachinery::pkg::{
        apis::meta::v1::{FieldsV1, ManagedFieldsEntry, ObjectMeta, OwnerReference},
        util::intstr::IntOrString,
    },
};
use serde_json::json;

use super::world::{self, NODE_ADDRESS, PORT, SERVICE_CIDR, TARGET_PORT, World};

const ZONES: [&str; 3] = ["zone-a", "zone-b", "zone-c"];

/// A Service as Helm installs it: ClusterIP, every other with a NodePort.
pub(super) fn service(number: u32) -> Service {
    let (name, namespace) = (world::name(number), world::namespace(number));
    let labels = labels(&name);
    let node_port = world::node_port(number);
    let applied = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"annotations": {}, "labels": labels, "name": name, "namespace": namespace},
        "spec": {"ports": [{"name": "http", "port": PORT, "targetPort": "http"}], "selector": labels},
    });
    let annotations = [("kubectl.kubernetes.io/last-applied-configuration".to_owned(), applied.to_string())];
    Service {
        metadata: ObjectMeta {
            annotations: Some(annotations.into()),
            labels: Some(labels.clone()),
            managed_fields: Some(vec![managed("kubectl-client-side-apply", "v1", &labels, 1)]),
            ..metadata(&name, Some(&namespace), number)
        },
        spec: Some(ServiceSpec {
            cluster_ip: Some(world::cluster_ip(number).to_string()),
            cluster_ips: Some(vec![world::cluster_ip(number).to_string()]),
            external_traffic_policy: node_port.map(|_| "Cluster".to_owned()),
            internal_traffic_policy: Some("Cluster".into()),
            ip_families: Some(vec!["IPv4".into()]),
            ip_family_policy: Some("SingleStack".into()),
            ports: Some(vec![ServicePort {
                name: Some("http".into()),
                node_port: node_port.map(i32::from),
                port: PORT.into(),
                protocol: Some("TCP".into()),
                target_port: Some(IntOrString::String("http".into())),
                ..ServicePort::default()
            }]),
            selector: Some(labels),
            session_affinity: Some("None".into()),
            type_: Some(if node_port.is_some() { "NodePort" } else { "ClusterIP" }.into()),
            ..ServiceSpec::default()
        }),
        status: Some(ServiceStatus::default()),
    }
}

/// The one slice of a Service, as the controller writes it.
pub(super) fn slice(world: &World, number: u32) -> EndpointSlice {
    let (service, namespace) = (world::name(number), world::namespace(number));
    let mut labels = labels(&service);
    labels.insert("endpointslice.kubernetes.io/managed-by".into(), "endpointslice-controller.k8s.io".into());
    labels.insert("kubernetes.io/service-name".into(), service.clone());
    let pods = world.pods(number);
    let triggered = "endpoints.kubernetes.io/last-change-trigger-time".to_owned();
    EndpointSlice {
        address_type: "IPv4".into(),
        endpoints: Some(pods.iter().map(|&pod| endpoint(world, &service, &namespace, pod)).collect()),
        metadata: ObjectMeta {
            annotations: Some([(triggered, "2026-11-20T08:15:00Z".to_owned())].into()),
            generate_name: Some(format!("{service}-")),
            labels: Some(labels.clone()),
            managed_fields: Some(vec![managed(
                "kube-controller-manager",
                "discovery.k8s.io/v1",
                &labels,
                pods.len(),
            )]),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".into(),
                block_owner_deletion: Some(true),
                controller: Some(true),
                kind: "Service".into(),
                name: service.clone(),
                uid: uid(number),
            }]),
            ..metadata(&slice_name(number), Some(&namespace), number)
        },
        ports: Some(vec![EndpointPort {
            name: Some("http".into()),
            port: Some(TARGET_PORT.into()),
            protocol: Some("TCP".into()),
            ..EndpointPort::default()
        }]),
    }
}

/// The node that is measured.
pub(super) fn node() -> Node {
    let labels = [
        ("kubernetes.io/hostname", world::NODE),
        ("kubernetes.io/os", "linux"),
        ("topology.kubernetes.io/zone", ZONES[0]),
    ];
    let address = |type_: &str, address: String| NodeAddress { type_: type_.into(), address };
    Node {
        metadata: ObjectMeta {
            labels: Some(labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
            ..metadata(world::NODE, None, 0)
        },
        spec: Some(NodeSpec::default()),
        status: Some(NodeStatus {
            addresses: Some(vec![
                address("InternalIP", NODE_ADDRESS.to_string()),
                address("Hostname", world::NODE.into()),
            ]),
            ..NodeStatus::default()
        }),
    }
}

/// The range of ClusterIPs.
pub(super) fn service_cidr() -> ServiceCIDR {
    let (address, bits) = SERVICE_CIDR;
    ServiceCIDR {
        metadata: metadata("kubernetes", None, 0),
        spec: Some(ServiceCIDRSpec { cidrs: Some(vec![format!("{address}/{bits}")]) }),
        status: None,
    }
}

/// Name of the slice of a Service.
pub(super) fn slice_name(number: u32) -> String {
    format!("{}-{}", world::name(number), world::hash("slice", number, 0)[..5].to_lowercase())
}

fn endpoint(world: &World, service: &str, namespace: &str, pod: u32) -> Endpoint {
    let node = world.node_number(pod);
    Endpoint {
        addresses: vec![world.pod_address(pod).to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(true),
            serving: Some(true),
            terminating: Some(false),
        }),
        node_name: Some(format!("node-{node}")),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".into()),
            name: Some(format!("{service}-{}", world::hash("pod", 0, pod).to_lowercase())),
            namespace: Some(namespace.into()),
            uid: Some(uid(pod)),
            ..ObjectReference::default()
        }),
        zone: Some(ZONES[node as usize % ZONES.len()].into()),
        ..Endpoint::default()
    }
}

fn labels(name: &str) -> BTreeMap<String, String> {
    let labels = [
        ("app.kubernetes.io/name", name),
        ("app.kubernetes.io/instance", name),
        ("app.kubernetes.io/managed-by", "Helm"),
        ("helm.sh/chart", "service-1.2.3"),
    ];
    labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
}

fn metadata(name: &str, namespace: Option<&str>, number: u32) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.into()),
        namespace: namespace.map(str::to_owned),
        resource_version: Some((1_000 + number).to_string()),
        uid: Some(uid(number)),
        ..ObjectMeta::default()
    }
}

fn uid(number: u32) -> String {
    format!("{number:08x}-5eed-4a11-8bad-{:012x}", u64::from(number) * 7_919)
}

/// Who has set which fields; usually the largest part of an object.
fn managed(
    manager: &str,
    version: &str,
    labels: &BTreeMap<String, String>,
    items: usize,
) -> ManagedFieldsEntry {
    let labels: serde_json::Map<_, _> =
        labels.keys().map(|label| (format!("f:{label}"), json!({}))).collect();
    let items: serde_json::Map<_, _> = (0..items)
        .map(|item| (format!("k:{{\"port\":{item},\"protocol\":\"TCP\"}}"), json!({".": {}, "f:name": {}})))
        .collect();
    ManagedFieldsEntry {
        api_version: Some(version.into()),
        fields_type: Some("FieldsV1".into()),
        fields_v1: Some(FieldsV1(json!({
            "f:metadata": {"f:annotations": {".": {}}, "f:labels": labels, "f:ownerReferences": {".": {}}},
            "f:spec": {"f:ports": items, "f:selector": {}, "f:type": {}},
        }))),
        manager: Some(manager.into()),
        operation: Some("Update".into()),
        ..ManagedFieldsEntry::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_have_the_addresses_of_the_world() {
        let mut world = World::new(20, 10).unwrap();
        let replaced = world.replace();
        let slice = slice(&world, replaced.service);
        let addresses = slice.endpoints.unwrap().into_iter().flat_map(|endpoint| endpoint.addresses);
        let expected = world.pods(replaced.service).iter().map(|&pod| world.pod_address(pod).to_string());
        assert!(addresses.eq(expected));
        assert!(world.pods(replaced.service).contains(&replaced.pod));
        let ports: Vec<_> = world
            .services()
            .filter_map(|number| service(number).spec?.ports?.into_iter().find_map(|port| port.node_port))
            .collect();
        assert_eq!(ports, (30_000..30_010).collect::<Vec<_>>());
    }
}
