//! A world whose node has an API server on its loopback device.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use xdp_agent_tests::lab::agent::{Agent, AgentOptions, Mode, Source};
use xdp_agent_tests::lab::api_server::{ApiServer, Resource};
use xdp_agent_tests::lab::wait_for;
use xdp_agent_tests::lab::world::{World, WorldOptions};

use crate::image::Image;
use crate::objects::{NAMESPACE, Step, node, node2};

/// Port of the API server; each world has a loopback device of its own.
const API_PORT: u16 = 6_443;
/// Longest time from a change to the maps, with whatever the server does in between.
pub(crate) const APPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// A world, an API server in it, and room for the agent's kubeconfig; fields drop in order.
pub(crate) struct Site {
    pub(crate) server: ApiServer,
    pub(crate) world: World,
    directory: tempfile::TempDir,
}

impl Site {
    /// Builds a world whose API server has the two Nodes.
    pub(crate) fn build(options: WorldOptions) -> Result<Self> {
        let world = World::build(options)?;
        let server = ApiServer::start_in(&world.node, API_PORT)?;
        server.put(node(""));
        server.put(node2());
        Ok(Self { server, world, directory: tempfile::tempdir()? })
    }

    /// A world for its maps only.
    pub(crate) fn without_pods() -> Result<Self> {
        Self::build(WorldOptions { local: 0, remote: 0, ..WorldOptions::default() })
    }

    /// The command line of this world's agent.
    pub(crate) fn options(&self) -> Result<AgentOptions> {
        let kubeconfig = self.server.kubeconfig(self.directory.path())?;
        Ok(options(kubeconfig))
    }

    /// Starts an agent and waits until it serves what the API server has.
    pub(crate) fn start_agent(&self) -> Result<Agent> {
        Agent::start(&self.world.node, &self.world.bpffs, &self.options()?)
    }

    /// Starts an agent and waits for nothing.
    pub(crate) fn spawn_agent(&self) -> Result<Agent> {
        Agent::spawn(&self.world.node, &self.world.bpffs, &self.options()?)
    }

    /// What the maps say.
    pub(crate) fn image(&self) -> Result<Image> {
        Image::read(&self.world.bpffs)
    }

    /// Waits until the maps say this.
    pub(crate) fn wait_image(&self, what: &str, wanted: &Image) -> Result<()> {
        wait_for(what, APPLY_TIMEOUT, || {
            let image = self.image()?;
            if image != *wanted {
                bail!("the maps are not as they should be:\n{}", image.difference(wanted));
            }
            Ok(())
        })
    }

    /// Makes a change.
    pub(crate) fn apply(&self, step: Step) {
        match step {
            Step::Put(object) => {
                self.server.put(object);
            }
            Step::Delete(resource, name) => {
                let namespace = if resource == Resource::ServiceCidrs { "" } else { NAMESPACE };
                self.server.delete(resource, namespace, &name);
            }
        }
    }
}

/// The command line of an agent that watches an API server.
pub(crate) fn options(kubeconfig: PathBuf) -> AgentOptions {
    let mut options = AgentOptions::new("", Mode::Generic);
    options.source = Source::Kubeconfig(kubeconfig);
    options
}
