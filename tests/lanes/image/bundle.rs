//! A bundle as the kubelet and a runtime would make it from the DaemonSet: what the manifest says is read from it.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::layout::Image;
use crate::node::Node;

/// Where this test's objects are, in place of the API server's.
const OBJECTS: &str = "/etc/xdp-agent/objects";

/// The configuration of a bundle (OCI Runtime Specification 1.0) for the pod of `deploy/base` on a node.
pub(crate) fn config(node: &Node, image: &Image, objects: &Path) -> Result<Value> {
    let manifest: Value = serde_saphyr::from_str(include_str!("../../../deploy/base/daemonset.yaml"))?;
    let pod = &manifest["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let security = &container["securityContext"];
    ensure!(pod["hostNetwork"] == true, "the pod has a network of its own");
    ensure!(pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", "another seccomp profile");
    ensure!(security["capabilities"]["drop"] == json!(["ALL"]), "not all capabilities are dropped");
    ensure!(security["privileged"] == false, "the container is privileged");
    let capabilities: Vec<String> =
        words(&security["capabilities"]["add"])?.iter().map(|name| format!("CAP_{name}")).collect();
    let mut args = words(&image.config["config"]["Entrypoint"])?;
    for arg in words(&container["args"])? {
        args.push(arg.replace("$(NODE_NAME)", "node"));
    }
    // In place of the API server, and of the default route that this world's node has none of.
    args.extend([format!("--services={OBJECTS}"), "--iface=eth0".to_owned()]);
    let mut environment = words(&image.config["config"]["Env"])?;
    environment.extend(settings());
    environment.extend(variables(container)?);
    Ok(json!({
        "ociVersion": "1.0.2",
        // Limits are those of the test: who may not raise them runs it too.
        "process": {
            "user": { "uid": security["runAsUser"], "gid": security["runAsGroup"] },
            "args": args,
            "env": environment,
            "cwd": image.config["config"]["WorkingDir"],
            // Kubernetes adds to these sets, and not to the ambient one.
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            "noNewPrivileges": security["allowPrivilegeEscalation"] == false,
        },
        "root": { "path": image.root(), "readonly": security["readOnlyRootFilesystem"] },
        "mounts": mounts(pod, container, node, objects)?,
        "linux": {
            // The network is the node's.
            "namespaces": [{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }],
            // As runtimes do where a volume follows the node's mounts.
            "rootfsPropagation": "rslave",
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            "seccomp": seccomp(&capabilities)?,
        },
    }))
}

/// Variables with a value of the container's own; the others are the pod's, and stand in its arguments.
fn variables(container: &Value) -> Result<Vec<String>> {
    let variables = container["env"].as_array().context("the container has no variables")?;
    let with_value = variables.iter().filter_map(|variable| {
        Some(format!("{}={}", variable["name"].as_str()?, variable["value"].as_str()?))
    });
    Ok(with_value.collect())
}

/// The settings that the pod gets from the ConfigMap.
fn settings() -> impl Iterator<Item = String> {
    let lines = include_str!("../../../deploy/base/xdp-agent.env").lines();
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned)
}

/// What every container has, the pod's volumes, and the objects.
fn mounts(pod: &Value, container: &Value, node: &Node, objects: &Path) -> Result<Vec<Value>> {
    let mut mounts = vec![
        json!({ "destination": "/proc", "type": "proc", "source": "proc" }),
        json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] }),
        json!({ "destination": "/sys", "type": "none", "source": "/sys",
                "options": ["bind", "nosuid", "noexec", "nodev", "ro"] }),
        json!({ "destination": OBJECTS, "type": "bind", "source": objects, "options": ["bind", "ro"] }),
    ];
    let volumes = pod["volumes"].as_array().context("the pod has no volumes")?;
    for mount in container["volumeMounts"].as_array().context("the container mounts nothing")? {
        let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]);
        let path = volume.and_then(|volume| volume["hostPath"]["path"].as_str());
        let path = path.with_context(|| format!("{} is no directory of the node", mount["name"]))?;
        let propagation = match mount["mountPropagation"].as_str() {
            None | Some("None") => "rprivate",
            Some("HostToContainer") => "rslave",
            Some(other) => bail!("{path} is mounted with propagation {other}"),
        };
        let access = if mount["readOnly"] == true { "ro" } else { "rw" };
        let options = ["rbind", propagation, access];
        let source = node.directory(path)?;
        mounts.push(json!({ "destination": mount["mountPath"], "type": "bind", "source": source, "options": options }));
    }
    Ok(mounts)
}

/// The default profile of runtimes, whose groups of system calls go by capabilities.
fn seccomp(capabilities: &[String]) -> Result<Value> {
    let mut profile: Value = serde_json::from_str(include_str!("../../cases/seccomp.json"))?;
    let rules = profile["syscalls"].as_array_mut().context("the profile has no rules")?;
    let has = |condition: &Value| {
        let names = condition["caps"].as_array().into_iter().flatten();
        names.filter_map(Value::as_str).any(|name| capabilities.iter().any(|has| has == name))
    };
    rules.retain(|rule| (rule["includes"].is_null() || has(&rule["includes"])) && !has(&rule["excludes"]));
    for rule in rules.iter_mut().filter_map(Value::as_object_mut) {
        rule.remove("includes");
        rule.remove("excludes");
    }
    Ok(profile)
}

fn words(list: &Value) -> Result<Vec<String>> {
    let list = list.as_array().with_context(|| format!("{list} is no list"))?;
    let word =
        |value: &Value| value.as_str().map(str::to_owned).with_context(|| format!("{value} is no text"));
    list.iter().map(word).collect()
}
