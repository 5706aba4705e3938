//! A container as the kubelet and a runtime would make it from the DaemonSet: what the manifest says is read from it.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use xdp_agent_tests::lab::wait_for;
use xdp_agent_tests::lab::world::World;

use crate::layout::Image;

/// The directory of the node that holds the pins, by the manifest.
pub(crate) const PINS: &str = "/sys/fs/bpf/xdp-agent";

/// Where this test's objects are, in place of the API server's.
const OBJECTS: &str = "/etc/xdp-agent/objects";

const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// A container that runs; dropping it ends it.
pub(crate) struct Container {
    runc: Child,
    name: String,
    /// The bundle, and runc's own state.
    directory: TempDir,
}

impl Container {
    /// Starts the agent's container in a world's node.
    pub(crate) fn start(world: &World, image: &Image) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let name = format!("xdp-agent-image-{}", std::process::id());
        let manifest = daemonset()?;
        let config = config(&manifest, image, &world.manifests.directory())?;
        std::fs::write(directory.path().join("config.json"), serde_json::to_vec_pretty(&config)?)?;
        let pins = world.bpffs.run(|| std::fs::create_dir_all(PINS))?;
        pins.with_context(|| format!("cannot make {PINS}"))?;
        let log = std::fs::File::create(directory.path().join("log"))?;
        let runc = world
            .bpffs
            .command(&world.node, "runc")
            .arg("--root")
            .arg(directory.path().join("state"))
            .args(["run", "--bundle"])
            .arg(directory.path())
            .args(on_first_root()?.then_some("--no-pivot"))
            .arg(&name)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start runc: install it, `apt-get install runc` on Debian")?;
        Ok(Self { runc, name, directory })
    }

    /// Fails when the container has ended by itself.
    pub(crate) fn check_running(&mut self) -> Result<()> {
        match self.runc.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the container ended with {status}"),
        }
    }

    /// Ends the container as the kubelet does; fails unless the agent ends well and in time.
    pub(crate) fn stop(mut self) -> Result<()> {
        let status = self.control().args(["kill", &self.name, "TERM"]).status()?;
        ensure!(status.success(), "runc cannot send a signal to the agent");
        let ended = wait_for("the container to end", STOP_TIMEOUT, || {
            self.runc.try_wait()?.context("it still runs")
        })?;
        ensure!(ended.success(), "the agent ended with {ended}");
        Ok(())
    }

    fn control(&self) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.directory.path().join("state"));
        command
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Of a container that has ended nothing is left, and runc says so.
        let _ = self.control().args(["delete", "--force", &self.name]).stderr(Stdio::null()).status();
        let _ = self.runc.kill();
        let _ = self.runc.wait();
        let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        println!("--- log of the container\n{log}---");
    }
}

/// Whether the root is the one that the kernel has begun with, as in an emulated machine: it cannot be exchanged for another.
fn on_first_root() -> Result<bool> {
    let mounts = std::fs::read_to_string("/proc/mounts").context("cannot read /proc/mounts")?;
    Ok(mounts.lines().any(|line| line.starts_with("rootfs / ")))
}

/// The pod of `deploy/base/daemonset.yaml`.
fn daemonset() -> Result<Value> {
    let manifest: Value = serde_saphyr::from_str(include_str!("../../../deploy/base/daemonset.yaml"))?;
    Ok(manifest["spec"]["template"]["spec"].clone())
}

/// A bundle's configuration (OCI Runtime Specification 1.0), from the pod and the image.
fn config(pod: &Value, image: &Image, objects: &Path) -> Result<Value> {
    let container = &pod["containers"][0];
    let security = &container["securityContext"];
    ensure!(pod["hostNetwork"] == true, "the pod has a network of its own");
    ensure!(pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", "another seccomp profile");
    ensure!(security["capabilities"]["drop"] == json!(["ALL"]), "not all capabilities are dropped");
    let capabilities: Vec<String> =
        words(&security["capabilities"]["add"])?.iter().map(|name| format!("CAP_{name}")).collect();
    let mount = &container["volumeMounts"][0];
    let volume =
        pod["volumes"].as_array().into_iter().flatten().find(|volume| volume["name"] == mount["name"]);
    ensure!(volume.is_some_and(|volume| volume["hostPath"]["path"] == PINS), "the pins are not at {PINS}");
    let mut args = words(&image.config["config"]["Entrypoint"])?;
    for arg in words(&container["args"])? {
        args.push(arg.replace("$(NODE_NAME)", "node"));
    }
    // In place of the API server, and of the default route that this world's node has none of.
    args.extend([format!("--services={OBJECTS}"), "--iface=eth0".to_owned()]);
    let seccomp: Value = serde_json::from_str(include_str!("../../cases/seccomp.json"))?;
    Ok(json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": security["runAsUser"], "gid": security["runAsGroup"] },
            "args": args,
            "env": image.config["config"]["Env"],
            "cwd": image.config["config"]["WorkingDir"],
            // Kubernetes adds to these sets, and not to the ambient one.
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            "noNewPrivileges": security["allowPrivilegeEscalation"] == false,
            // As the kubelet lets it be; kernels before 5.11 account maps by it.
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1_048_576, "soft": 1_048_576 }],
        },
        "root": { "path": image.root(), "readonly": security["readOnlyRootFilesystem"] },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/sys", "type": "none", "source": "/sys",
              "options": ["bind", "nosuid", "noexec", "nodev", "ro"] },
            { "destination": mount["mountPath"], "type": "bind", "source": PINS, "options": ["bind", "rw"] },
            { "destination": OBJECTS, "type": "bind", "source": objects, "options": ["bind", "ro"] },
        ],
        "linux": {
            // The network is the node's.
            "namespaces": [{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            "seccomp": seccomp,
        },
    }))
}

fn words(list: &Value) -> Result<Vec<String>> {
    let list = list.as_array().with_context(|| format!("{list} is no list"))?;
    let word =
        |value: &Value| value.as_str().map(str::to_owned).with_context(|| format!("{value} is no text"));
    list.iter().map(word).collect()
}
