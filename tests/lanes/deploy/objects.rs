//! Objects for the cluster: of the form Kubernetes defines, and with no more rights than the agent needs.

use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Container, PodSpec, ServiceAccount},
    rbac::v1::ClusterRoleBinding,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::files::{self, Document};

/// Everything that needs privileges of the kernel, without their common beginning.
const CAPABILITIES: [&str; 3] = ["BPF", "NET_ADMIN", "PERFMON"];
/// The same of an agent that runs, which enters the network namespaces of pods too.
const RUNNING: [&str; 4] = ["BPF", "NET_ADMIN", "PERFMON", "SYS_ADMIN"];
/// What a pod sees of the node: an agent that runs all of it, a clean-up the first.
const PATHS: [&str; 3] = ["/sys/fs/bpf/xdp-agent", "/sys/fs/cgroup", "/run/netns"];

/// The object in its own type; a field that the type does not have is an error.
#[track_caller]
fn typed<T: DeserializeOwned + Serialize>(document: &Document) -> T {
    let file = document.file.display();
    let object: T =
        serde_json::from_value(document.content.clone()).unwrap_or_else(|error| panic!("{file}: {error}"));
    let kept = serde_json::to_value(&object).expect("plain data");
    let mut lost = Vec::new();
    difference("", &document.content, &kept, &mut lost);
    assert_eq!(lost, [""; 0], "{file}: fields that Kubernetes does not have");
    object
}

/// Paths of what the first value has and the second has not.
fn difference(path: &str, written: &Value, kept: &Value, lost: &mut Vec<String>) {
    match (written, kept) {
        (Value::Object(written), Value::Object(kept)) => {
            for (name, value) in written {
                match kept.get(name) {
                    Some(kept) => difference(&format!("{path}.{name}"), value, kept, lost),
                    None => lost.push(format!("{path}.{name}")),
                }
            }
        }
        (Value::Array(written), Value::Array(kept)) => {
            for (index, (written, kept)) in written.iter().zip(kept).enumerate() {
                difference(&format!("{path}[{index}]"), written, kept, lost);
            }
        }
        (written, kept) if written == kept => {}
        (written, kept) => lost.push(format!("{path}: {written} became {kept}")),
    }
}

fn daemon_sets() -> Vec<DaemonSet> {
    let objects = files::objects();
    let sets: Vec<DaemonSet> =
        objects.iter().filter(|object| object.kind() == "DaemonSet").map(typed).collect();
    assert_eq!(sets.len(), 2, "the agent and the clean-up");
    sets
}

fn pod(set: &DaemonSet) -> &PodSpec {
    set.spec.template.spec.as_ref().expect("a pod")
}

/// The containers that run the agent's image.
fn agents(pod: &PodSpec) -> Vec<&Container> {
    let containers = pod.containers.iter().chain(pod.init_containers.iter().flatten());
    containers
        .filter(|container| container.image.as_deref().is_some_and(|image| image.contains("xdp-agent")))
        .collect()
}

#[test]
fn every_object_is_of_its_kind_without_unknown_fields() {
    for object in files::objects() {
        match object.kind() {
            "DaemonSet" => drop(typed::<DaemonSet>(&object)),
            "ServiceAccount" => drop(typed::<ServiceAccount>(&object)),
            "ClusterRoleBinding" => drop(typed::<ClusterRoleBinding>(&object)),
            // Custom resources: what the tests of monitoring look at.
            "PodMonitor" | "PrometheusRule" => {
                assert_eq!(object.content["apiVersion"], "monitoring.coreos.com/v1");
                assert_eq!(object.content["metadata"]["namespace"], "kube-system");
            }
            kind => panic!("{}: these tests know nothing of {kind}", object.file.display()),
        }
    }
}

#[test]
fn a_field_that_kubernetes_does_not_have_is_noticed() {
    let mut set =
        files::objects().into_iter().find(|object| object.kind() == "DaemonSet").expect("there is one");
    let before = set.content.clone();
    set.content["spec"]["template"]["spec"]["hostNetworking"] = true.into();
    let kept =
        serde_json::to_value(serde_json::from_value::<DaemonSet>(set.content.clone()).expect("it parses"));
    let mut lost = Vec::new();
    difference("", &set.content, &kept.expect("plain data"), &mut lost);
    assert_eq!(lost, [".spec.template.spec.hostNetworking"]);
    lost.clear();
    difference("", &before, &before, &mut lost);
    assert_eq!(lost, [""; 0]);
}

#[test]
fn the_account_may_do_what_kubernetes_grants_kube_proxy_and_nothing_else() {
    let mut bindings = Vec::new();
    for object in files::objects() {
        assert!(
            !["Role", "ClusterRole", "RoleBinding"].contains(&object.kind()),
            "{}",
            object.file.display()
        );
        if object.kind() == "ClusterRoleBinding" {
            bindings.push(typed::<ClusterRoleBinding>(&object));
        }
    }
    let [binding] = bindings.as_slice() else { panic!("one binding, not {}", bindings.len()) };
    assert_eq!(
        (binding.role_ref.kind.as_str(), binding.role_ref.name.as_str()),
        ("ClusterRole", "system:node-proxier")
    );
    let subjects = binding.subjects.as_deref().expect("subjects");
    let [subject] = subjects else { panic!("one subject, not {}", subjects.len()) };
    assert_eq!((subject.kind.as_str(), subject.name.as_str()), ("ServiceAccount", "xdp-agent"));
    let accounts: Vec<Option<String>> =
        daemon_sets().iter().map(|set| pod(set).service_account_name.clone()).collect();
    assert_eq!(accounts, [Some("xdp-agent".to_owned()), None], "the clean-up speaks to nobody");
}

#[test]
fn the_agent_has_the_capabilities_it_names_and_no_other_privilege() {
    for set in daemon_sets() {
        let is_cleanup = set.metadata.name.as_deref() == Some("xdp-agent-cleanup");
        let pod = pod(&set);
        assert_eq!((pod.host_pid, pod.host_ipc, pod.host_users), (None, None, None));
        assert_eq!(pod.host_network, Some(true));
        let context = pod.security_context.as_ref().expect("a security context");
        let seccomp = context.seccomp_profile.as_ref().expect("a seccomp profile");
        assert_eq!(seccomp.type_, "RuntimeDefault");
        let agents = agents(pod);
        assert_eq!(agents.len(), 1);
        for container in &agents {
            let context = container.security_context.as_ref().expect("a security context");
            assert_eq!(context.privileged, Some(false));
            let capabilities = context.capabilities.as_ref().expect("capabilities");
            let expected = if is_cleanup { CAPABILITIES.as_slice() } else { RUNNING.as_slice() };
            assert_eq!(capabilities.add.as_deref().expect("some are added"), expected);
        }
        for container in pod.containers.iter().chain(pod.init_containers.iter().flatten()) {
            let context = container.security_context.as_ref().expect("a security context");
            assert_eq!(context.allow_privilege_escalation, Some(false), "{}", container.name);
            assert_eq!(context.read_only_root_filesystem, Some(true), "{}", container.name);
            let capabilities = context.capabilities.as_ref().expect("capabilities");
            assert_eq!(capabilities.drop.as_deref().expect("all are dropped"), ["ALL"], "{}", container.name);
        }
        let paths: Vec<&str> = pod
            .volumes
            .iter()
            .flatten()
            .filter_map(|volume| Some(volume.host_path.as_ref()?.path.as_str()))
            .collect();
        let expected = if is_cleanup { &PATHS[..1] } else { &PATHS[..] };
        assert_eq!(paths, expected, "the only places of the node that a pod sees");
    }
}

#[test]
fn the_agent_runs_on_every_node_and_before_everything_else() {
    for set in daemon_sets() {
        let spec = &set.spec;
        let labels =
            spec.template.metadata.as_ref().and_then(|metadata| metadata.labels.as_ref()).expect("labels");
        for (key, value) in spec.selector.match_labels.iter().flatten() {
            assert_eq!(labels.get(key), Some(value), "the selector does not find its own pods");
        }
        let pod = pod(&set);
        let selector = pod.node_selector.as_ref().expect("a node selector");
        assert_eq!(
            selector.iter().collect::<Vec<_>>(),
            [(&"kubernetes.io/os".to_owned(), &"linux".to_owned())]
        );
        let tolerations = pod.tolerations.as_deref().expect("tolerations");
        let [all] = tolerations else { panic!("one toleration, of everything") };
        assert_eq!((all.operator.as_deref(), &all.key, &all.effect), (Some("Exists"), &None, &None));
    }
    let sets = daemon_sets();
    let agent = pod(&sets[0]);
    assert_eq!(agent.priority_class_name.as_deref(), Some("system-node-critical"));
    let strategy = sets[0].spec.update_strategy.as_ref().expect("a strategy");
    assert_eq!(strategy.type_.as_deref(), Some("RollingUpdate"));
}

#[test]
fn what_containers_name_is_there() {
    for set in daemon_sets() {
        let pod = pod(&set);
        let volumes: Vec<&str> = pod.volumes.iter().flatten().map(|volume| volume.name.as_str()).collect();
        for container in pod.containers.iter().chain(pod.init_containers.iter().flatten()) {
            for mount in container.volume_mounts.iter().flatten() {
                assert!(
                    volumes.contains(&mount.name.as_str()),
                    "{}: no volume {}",
                    container.name,
                    mount.name
                );
            }
            let resources = container.resources.as_ref().expect("resources");
            let has = |what: &Option<std::collections::BTreeMap<_, _>>, name: &str| {
                what.as_ref().is_some_and(|quantities| quantities.contains_key(name))
            };
            assert!(
                has(&resources.requests, "cpu") && has(&resources.requests, "memory"),
                "{}",
                container.name
            );
            assert!(has(&resources.limits, "memory"), "{}", container.name);
        }
    }
    let sets = daemon_sets();
    let agent = agents(pod(&sets[0]))[0];
    let ports: Vec<&str> = agent.ports.iter().flatten().filter_map(|port| port.name.as_deref()).collect();
    for probe in [&agent.readiness_probe, &agent.liveness_probe] {
        let get = probe.as_ref().and_then(|probe| probe.http_get.as_ref()).expect("a probe by HTTP");
        let port = serde_json::to_value(&get.port).expect("plain data");
        assert!(ports.contains(&port.as_str().expect("a port by name")), "{port}");
    }
}
