//! The agent's container, by runc.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;
use xdp_agent_tests::lab::wait_for;
use xdp_agent_tests::lab::world::World;

use crate::bundle;
use crate::layout::Image;
use crate::node::Node;

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
    pub(crate) fn start(world: &World, node: &Node, image: &Image) -> Result<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let directory = tempfile::tempdir()?;
        let name =
            format!("xdp-agent-image-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let config = bundle::config(node, image, &world.manifests.directory())?;
        std::fs::write(directory.path().join("config.json"), serde_json::to_vec_pretty(&config)?)?;
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
