//! What a world has in place of the node's directories that the DaemonSet mounts.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use tempfile::TempDir;
use xdp_agent_tests::lab::cgroup::Cgroup;
use xdp_agent_tests::lab::world::World;

/// The directory of the node that holds the pins, by the manifest.
pub(crate) const PINS: &str = "/sys/fs/bpf/xdp-agent";

/// The node's directories.
pub(crate) struct Node {
    /// The root of the node's cgroups: of this machine's a part that holds nobody but the test's callers.
    pub(crate) cgroup: Cgroup,
    /// Network namespaces of the pods on the node, by name.
    namespaces: TempDir,
}

impl Node {
    /// Makes them, as the node's runtime and boot have done before the agent comes.
    pub(crate) fn of(world: &World) -> Result<Self> {
        let namespaces = tempfile::tempdir()?;
        let local = world.pods.iter().filter(|pod| pod.is_local());
        let names = local.map(|pod| (namespaces.path().join(pod.namespace.name()), pod.namespace.path()));
        let names: Vec<_> = names.collect();
        world.bpffs.run(|| -> Result<()> {
            fs::create_dir_all(PINS).with_context(|| format!("cannot make {PINS}"))?;
            for (name, namespace) in &names {
                File::create(name)?;
                mount(Some(namespace.as_str()), name, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                    .with_context(|| format!("cannot name a namespace {}", name.display()))?;
            }
            Ok(())
        })??;
        Ok(Self { cgroup: Cgroup::new("node")?, namespaces })
    }

    /// Where a directory of the node is in this world.
    pub(crate) fn directory(&self, path: &str) -> Result<PathBuf> {
        Ok(match path {
            PINS => PINS.into(),
            "/sys/fs/cgroup" => self.cgroup.path().to_path_buf(),
            "/run/netns" => self.namespaces.path().to_path_buf(),
            other => {
                bail!("the DaemonSet mounts {other} of the node: say here what a world has in its place")
            }
        })
    }
}
