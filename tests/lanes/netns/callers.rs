//! A world whose agent serves sockets: callers in a pod and on the node, each in a cgroup of its own.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use xdp_agent_tests::lab::agent::{Agent, AgentOptions, Mode};
use xdp_agent_tests::lab::caller::Caller;
use xdp_agent_tests::lab::cgroup::Cgroup;
use xdp_agent_tests::lab::wait_for;
use xdp_agent_tests::lab::world::{World, WorldOptions};

const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Fields drop in order: processes before their cgroups, those before the one they are in.
pub(crate) struct Place {
    pub(crate) agent: Agent,
    /// In the pod `local-1`.
    pub(crate) pod: Caller,
    /// On the node itself.
    pub(crate) node: Caller,
    pub(crate) options: AgentOptions,
    pub(crate) _cgroups: [Cgroup; 2],
    pub(crate) cgroup: Cgroup,
    pub(crate) world: World,
}

impl Place {
    /// Builds a world, publishes the standard Service and starts an agent with further arguments.
    pub(crate) fn start(options: WorldOptions, extra: &[&str]) -> Result<Self> {
        Self::serve(World::build(options)?, &[], extra)
    }

    /// The same in a world that is there, with other objects in place of the standard Service if there are any.
    pub(crate) fn serve(world: World, services: &[String], extra: &[&str]) -> Result<Self> {
        let cgroup = Cgroup::new("node")?;
        let cgroups = [cgroup.child("pod")?, cgroup.child("host")?];
        let pod = Caller::start(binary(), &world.pod("local-1")?.namespace, &cgroups[0])?;
        let node = Caller::start(binary(), &world.node, &cgroups[1])?;
        world.publish()?;
        if !services.is_empty() {
            world.manifests.write("web.yaml", services)?;
        }
        let mut options = world.agent_options(Mode::Generic);
        options.cgroup = Some(cgroup.path().to_path_buf());
        options.extra.extend(extra.iter().map(|&word| word.to_owned()));
        let agent = Agent::start(&world.node, &world.bpffs, &options)?;
        Ok(Self { agent, pod, node, options, _cgroups: cgroups, cgroup, world })
    }

    /// Waits until something holds.
    pub(crate) fn wait_until(
        &mut self,
        what: &str,
        mut look: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        wait_for(what, CHANGE_TIMEOUT, || look(self))
    }

    /// Stops the agent, which takes its hooks off.
    pub(crate) fn stop(self) -> Result<()> {
        self.agent.stop()
    }
}

/// The program of callers.
pub(crate) fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_caller"))
}

/// Fails unless calls have ended so.
pub(crate) fn counted_call(agent: &Agent, call: &str, result: &str) -> Result<()> {
    let labels = format!("call=\"{call}\",result=\"{result}\"");
    let count = agent.metric("socket_calls", &labels)?;
    ensure!(count > 0.0, "no {call} was counted as {result}");
    Ok(())
}
