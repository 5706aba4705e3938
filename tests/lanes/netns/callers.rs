//! A world whose agent serves sockets: callers in a pod and on the node, each in a cgroup of its own.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::agent::{Agent, AgentOptions, Mode};
use xdp_agent_tests::lab::caller::{Answer, Caller, Failed};
use xdp_agent_tests::lab::cgroup::Cgroup;
use xdp_agent_tests::lab::wait_for;
use xdp_agent_tests::lab::world::{World, WorldOptions};

const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// With two backends of each kind, 40 connections miss one kind by luck once in 2^40.
pub(crate) const CONNECTIONS: usize = 40;
/// Far below the second after which a client would ask again.
const AT_ONCE: Duration = Duration::from_millis(500);

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
        Self::with(world, services, extra, true)
    }

    /// The same without socket hooks.
    pub(crate) fn without_hooks(world: World, extra: &[&str]) -> Result<Self> {
        Self::with(world, &[], extra, false)
    }

    fn with(world: World, services: &[String], extra: &[&str], has_hooks: bool) -> Result<Self> {
        let cgroup = Cgroup::new("node")?;
        let cgroups = [cgroup.child("pod")?, cgroup.child("host")?];
        let pod = Caller::start(binary(), &world.pod("local-1")?.namespace, &cgroups[0])?;
        let node = Caller::start(binary(), &world.node, &cgroups[1])?;
        world.publish()?;
        if !services.is_empty() {
            world.manifests.write("web.yaml", services)?;
        }
        let mut options = world.agent_options(Mode::Generic);
        options.cgroup = has_hooks.then(|| cgroup.path().to_path_buf());
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

    /// What curl, in the pod or on the node, gets for a request over HTTP.
    pub(crate) fn curl(&self, is_pod: bool, target: SocketAddr) -> Result<String> {
        let namespace = if is_pod { &self.world.pod("local-1")?.namespace } else { &self.world.node };
        let mut curl = namespace.command("curl");
        self._cgroups[usize::from(!is_pod)].start_in(&mut curl)?;
        curl.args(["--silent", "--show-error", "--max-time", "5", &format!("http://{target}/whoami")]);
        let output =
            curl.output().context("cannot run curl; install it, it is one of the real clients here")?;
        ensure!(output.status.success(), "curl: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
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

/// A frontend by its address, and by the same as IPv6 maps it.
pub(crate) fn both(kind: &str, target: SocketAddr) -> [(String, SocketAddr); 2] {
    [(kind.to_string(), target), (format!("{kind}, mapped"), mapped(target))]
}

pub(crate) fn mapped(target: SocketAddr) -> SocketAddr {
    match target {
        SocketAddr::V4(target) => (target.ip().to_ipv6_mapped(), target.port()).into(),
        SocketAddr::V6(target) => target.into(),
    }
}

pub(crate) fn repeated(mut ask: impl FnMut() -> Result<Result<Answer, Failed>>) -> Result<Vec<Answer>> {
    (0..CONNECTIONS).map(|_| Ok(ask()??)).collect()
}

/// Whether the backends that answered are on this node, on the other, or on both.
pub(crate) fn places(answers: &[Answer]) -> Vec<&str> {
    let places: BTreeSet<&str> =
        answers.iter().filter_map(|answer| Some(answer.backend.split_once('-')?.0)).collect();
    places.into_iter().collect()
}

/// Fails unless both nodes have answered, each time under the name of the frontend.
pub(crate) fn all_places(answers: &[Answer], target: SocketAddr) -> Result<()> {
    ensure!(places(answers) == ["local", "remote"], "only {:?} have answered", places(answers));
    let strange = answers.iter().find(|answer| answer.from != target);
    ensure!(strange.is_none(), "{target} answered as {strange:?}");
    Ok(())
}

/// Fails unless a connected UDP socket has been told that its backend is gone.
pub(crate) fn told_of_its_end(asked: Result<Answer, Failed>) -> Result<()> {
    let failed = asked.err().context("the old backend still answers")?;
    ensure!(failed.errno != 0 && failed.errno != libc::EAGAIN, "silence: {failed}");
    Ok(())
}

/// Waits until so many more of a caller's connections are answered.
pub(crate) fn more_answers(caller: &mut Caller, more: u64, limit: Duration) -> Result<()> {
    let before = caller.tally()?.answered;
    wait_for("further connections to be answered", limit, || {
        let tally = caller.tally()?;
        ensure!(tally.answered >= before + more, "{tally:?}");
        Ok(())
    })
}

/// Connects a socket again that was ended, and asks; the answer has to bear the target's name.
pub(crate) fn answer_once_connected_again(
    caller: &mut Caller,
    socket: &str,
    target: SocketAddr,
) -> Result<Answer> {
    caller.connect(socket, target)?;
    // Where the first error was that the socket has no peer any more, the kernel's own one is still to come; and what an old
    // backend has answered meanwhile is still in the socket's queue, by that one's own address.
    let answer = match caller.ask(socket)? {
        Ok(answer) => answer,
        Err(failed) if [libc::ECONNABORTED, 0].contains(&failed.errno) => caller.ask(socket)??,
        Err(failed) => return Err(failed.into()),
    };
    ensure!(
        answer.from == target,
        "{answer:?} instead of {target}: what the socket was told last is forgotten"
    );
    Ok(answer)
}

pub(crate) fn refused<T: std::fmt::Debug>(
    what: &str,
    errno: i32,
    ask: impl FnOnce() -> Result<Result<T, Failed>>,
) -> Result<()> {
    let began = Instant::now();
    let failed = ask()?.err().with_context(|| format!("{what}: it went through"))?;
    ensure!(failed.errno == errno, "{what}: {failed}, not {errno}");
    ensure!(began.elapsed() < AT_ONCE, "{what}: failed after {:?}", began.elapsed());
    Ok(())
}
