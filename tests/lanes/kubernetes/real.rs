//! The same against etcd and kube-apiserver, from the directory that `KUBEBUILDER_ASSETS` names.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use xdp_agent_tests::lab::agent::Agent;
use xdp_agent_tests::lab::netns::Namespace;
use xdp_agent_tests::lab::wait_for;
use xdp_agent_tests::lab::world::{NODE, World, WorldOptions};

use crate::image::Image;
use crate::objects::{NAMESPACE, Random, Step, node, step};
use crate::setup::{APPLY_TIMEOUT, options};

const START_TIMEOUT: Duration = Duration::from_secs(90);
const URL: &str = "https://127.0.0.1:6443";
/// Changes in all, and in one call of kubectl.
const CHANGES: usize = 1_000;
const CHUNK: usize = 50;

/// etcd and kube-apiserver on the loopback device of a namespace.
struct Control {
    assets: PathBuf,
    namespace: Namespace,
    directory: TempDir,
    etcd: Child,
    api_server: Child,
}

impl Control {
    fn start(namespace: &Namespace) -> Result<Self> {
        let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
        let assets = assets.context(
            "set KUBEBUILDER_ASSETS to a directory with etcd, kube-apiserver and kubectl, or skip `real::`",
        )?;
        for name in ["etcd", "kube-apiserver", "kubectl"] {
            let path = assets.join(name);
            ensure!(path.is_file(), "KUBEBUILDER_ASSETS has no {}", path.display());
        }
        let directory = tempfile::tempdir()?;
        let at = |name: &str| directory.path().join(name).display().to_string();
        let openssl = Command::new("openssl").args(["genrsa", "-out", &at("accounts.key"), "2048"]).output();
        ensure!(
            openssl.context("openssl makes the key of service accounts")?.status.success(),
            "openssl fails"
        );
        std::fs::write(at("tokens.csv"), "secret,agent,agent\n")?;
        std::fs::write(at("kubeconfig"), kubeconfig())?;
        let mut etcd = namespace.command(assets.join("etcd"));
        etcd.args(["--data-dir", &at("etcd"), "--listen-client-urls", "http://127.0.0.1:2379"]);
        etcd.args(["--advertise-client-urls", "http://127.0.0.1:2379"]);
        etcd.args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
        let log = std::fs::File::create(at("etcd.log"))?;
        let etcd = etcd.stdout(log.try_clone()?).stderr(log).spawn().context("cannot start etcd")?;
        let api_server = api_server(&assets, namespace, &directory)?;
        let control = Self { assets, namespace: namespace.clone(), directory, etcd, api_server };
        control.wait_ready()?;
        Ok(control)
    }

    fn wait_ready(&self) -> Result<()> {
        wait_for("kube-apiserver to be ready", START_TIMEOUT, || {
            self.kubectl(&["get", "--raw", "/readyz"], None).map(drop)
        })
        .with_context(|| {
            std::fs::read_to_string(self.directory.path().join("api-server.log")).unwrap_or_default()
        })
    }

    /// Kills the API server and starts it again: every watch breaks off.
    fn restart(&mut self) -> Result<()> {
        self.api_server.kill()?;
        self.api_server.wait()?;
        self.api_server = api_server(&self.assets, &self.namespace, &self.directory)?;
        self.wait_ready()
    }

    fn kubectl(&self, arguments: &[&str], input: Option<&Value>) -> Result<String> {
        let mut command = self.namespace.command(self.assets.join("kubectl"));
        command
            .env("KUBECONFIG", self.directory.path().join("kubeconfig"))
            .env("HOME", self.directory.path());
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start kubectl")?;
        let mut stdin = child.stdin.take().context("kubectl has no input")?;
        stdin.write_all(input.map(Value::to_string).unwrap_or_default().as_bytes())?;
        drop(stdin);
        let output = child.wait_with_output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl {arguments:?}: {errors}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn apply(&self, objects: &[Value]) -> Result<()> {
        if objects.is_empty() {
            return Ok(());
        }
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.kubectl(&["apply", "--server-side", "--force-conflicts", "-f", "-"], Some(&list)).map(drop)
    }

    fn delete(&self, kind: &str, names: &[String]) -> Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let mut arguments =
            vec!["delete", kind, "--namespace", NAMESPACE, "--ignore-not-found", "--wait=false"];
        arguments.extend(names.iter().map(String::as_str));
        self.kubectl(&arguments, None).map(drop)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        for child in [&mut self.api_server, &mut self.etcd] {
            let _ = child.kill(); // it may have ended
            let _ = child.wait();
        }
    }
}

fn api_server(assets: &std::path::Path, namespace: &Namespace, directory: &TempDir) -> Result<Child> {
    let at = |name: &str| directory.path().join(name).display().to_string();
    let mut command = namespace.command(assets.join("kube-apiserver"));
    command.args(["--etcd-servers", "http://127.0.0.1:2379", "--secure-port", "6443"]);
    command.args(["--bind-address", "127.0.0.1", "--advertise-address", &NODE.to_string()]);
    command.args(["--cert-dir", &at("certificates"), "--token-auth-file", &at("tokens.csv")]);
    command.args(["--authorization-mode", "AlwaysAllow", "--disable-admission-plugins", "ServiceAccount"]);
    command.args([
        "--service-account-issuer",
        "https://lab",
        "--service-account-key-file",
        &at("accounts.key"),
    ]);
    command.args(["--service-account-signing-key-file", &at("accounts.key")]);
    command.args(["--service-cluster-ip-range", "10.96.0.0/16"]);
    let log = std::fs::File::options().create(true).append(true).open(at("api-server.log"))?;
    command.stdout(log.try_clone()?).stderr(log).spawn().context("cannot start kube-apiserver")
}

fn kubeconfig() -> String {
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "lab",
        "clusters": [{"name": "lab", "cluster": {"server": URL, "insecure-skip-tls-verify": true}}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "agent"}}],
        "users": [{"name": "agent", "user": {"token": "secret"}}]
    });
    config.to_string()
}

/// The object as the API server takes it, or none: it has rules about what may become of what, and statuses apart.
fn allowed(mut object: Value) -> Option<Value> {
    let is_refused = object["kind"] == "ServiceCIDR"
        || object["spec"]["clusterIP"] == "None"
        || object["addressType"] == "FQDN";
    object.as_object_mut()?.remove("status");
    object["metadata"].as_object_mut()?.remove("creationTimestamp");
    (!is_refused).then_some(object)
}

/// Makes changes in batches, each object once in a batch.
fn churn(control: &mut Control, random: &mut Random) -> Result<()> {
    for round in 0..CHANGES / CHUNK {
        let (mut objects, mut services, mut slices) = (Vec::<Value>::new(), Vec::new(), Vec::new());
        for _ in 0..CHUNK {
            match step(random) {
                Step::Put(object) => {
                    let Some(object) = allowed(object) else { continue };
                    let is_same = |other: &Value| {
                        other["kind"] == object["kind"]
                            && other["metadata"]["name"] == object["metadata"]["name"]
                    };
                    objects.retain(|other| !is_same(other));
                    objects.push(object);
                }
                Step::Delete(resource, name) => match resource.kind() {
                    "Service" => services.push(name),
                    "EndpointSlice" => slices.push(name),
                    _ => {}
                },
            }
        }
        control.apply(&objects)?;
        control.delete("services", &services)?;
        control.delete("endpointslices", &slices)?;
        if round % 8 == 7 {
            control.restart()?;
        }
    }
    Ok(())
}

#[test]
fn a_thousand_changes_at_kube_apiserver_end_where_a_fresh_agent_begins() -> Result<()> {
    let world = World::build(WorldOptions { local: 0, remote: 0, ..WorldOptions::default() })?;
    let mut control = Control::start(&world.node)?;
    control.apply(&[allowed(node("")).context("a Node is allowed")?])?;
    let options = options(control.directory.path().join("kubeconfig"));
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    let empty = Image::read(&world.bpffs)?;
    churn(&mut control, &mut Random::new(4))?;
    // A second agent, of a world of its own, would need a second API server with the same objects; so one after the other.
    let churned = settled(&world)?;
    agent.stop()?;
    let agent = Agent::start(&world.node, &world.bpffs, &options)?;
    let fresh = Image::read(&world.bpffs)?;
    ensure!(churned == fresh, "the maps are not as a fresh agent has them:\n{}", churned.difference(&fresh));
    ensure!(fresh.frontends.len() > 30, "the changes leave too little to compare: {fresh:?}");
    control.kubectl(
        &["delete", "services,endpointslices", "--namespace", NAMESPACE, "--all", "--wait=false"],
        None,
    )?;
    wait_for("the maps to be empty again", APPLY_TIMEOUT, || {
        let image = Image::read(&world.bpffs)?;
        // kube-apiserver makes its own Service again, whenever it sees that it is gone.
        let differs = image.frontends.keys().any(|key| !empty.frontends.contains_key(key));
        ensure!(!differs, "the maps are not empty:\n{}", image.difference(&empty));
        Ok(())
    })?;
    agent.stop()
}

/// The maps once they have been the same for some looks in a row.
fn settled(world: &World) -> Result<Image> {
    const LOOKS: usize = 50;
    let mut last = (Image::read(&world.bpffs)?, 0);
    wait_for("the maps to stay as they are", APPLY_TIMEOUT, || {
        let image = Image::read(&world.bpffs)?;
        let same = if image == last.0 { last.1 + 1 } else { 0 };
        last = (image, same);
        ensure!(same >= LOOKS, "the maps still change");
        Ok(last.0.clone())
    })
}
