//! The agent under test: started in a node's namespace, asked for its state, stopped or killed.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::clients::http_get;
use super::netns::{Namespace, PrivateBpffs};
use super::{block_on, wait_for};

/// Every node has a loopback device of its own, so one port serves all.
pub const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9_400);
/// Where the agent of a test pins its objects, in a file system of the test's own.
pub const PIN_DIR: &str = "/sys/fs/bpf/xdp-agent-test";

const READY_TIMEOUT: Duration = Duration::from_secs(30);
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// How XDP programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The agent chooses.
    Auto,
    /// In the driver.
    Native,
    /// In the kernel's receive path.
    Generic,
    /// On the card.
    Offload,
}

impl Mode {
    /// Returns the word used on the command line and in the status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Offload => "offload",
        }
    }
}

/// Where an agent's objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file or a directory with manifests.
    Manifests(PathBuf),
    /// The API server of a kubeconfig file.
    Kubeconfig(PathBuf),
}

/// What an agent may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privileges {
    /// Whatever root may.
    All,
    /// What the documentation asks for and the manifests grant: [`DOCUMENTED`].
    Documented,
    /// Nothing.
    None,
}

/// CAP_NET_ADMIN, CAP_PERFMON and CAP_BPF (include/uapi/linux/capability.h).
pub const DOCUMENTED: [libc::c_ulong; 3] = [12, 38, 39];

/// The command line of an agent.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// Managed interfaces.
    pub interfaces: Vec<String>,
    /// Where its objects come from.
    pub source: Source,
    /// Attach mode.
    pub mode: Mode,
    /// Name of the node in the manifests.
    pub node: String,
    /// Directory of pinned objects.
    pub pin_dir: String,
    /// The cgroup whose sockets are served; none are without one, or the tests of a machine would serve each other.
    pub cgroup: Option<PathBuf>,
    /// Further arguments.
    pub extra: Vec<String>,
    /// What the process may do.
    pub privileges: Privileges,
    /// How many files it may have open, if not as many as others.
    pub files_max: Option<u64>,
}

impl AgentOptions {
    /// Returns the usual command line for a directory of manifests.
    pub fn new(services: impl Into<PathBuf>, mode: Mode) -> Self {
        Self {
            interfaces: vec!["eth0".into()],
            source: Source::Manifests(services.into()),
            mode,
            node: "node".into(),
            pin_dir: PIN_DIR.into(),
            cgroup: None,
            extra: Vec::new(),
            privileges: Privileges::All,
            files_max: None,
        }
    }

    fn command(&self, node: &Namespace, bpffs: &PrivateBpffs) -> Result<Command> {
        let mut command = bpffs.command(node, agent_binary()?);
        command.arg("run");
        for interface in &self.interfaces {
            command.args(["--iface", interface]);
        }
        match &self.source {
            Source::Manifests(path) => command.arg("--services").arg(path),
            Source::Kubeconfig(path) => command.arg("--kubeconfig").arg(path),
        };
        command.args(["--mode", self.mode.name(), "--node", &self.node, "--pin-dir", &self.pin_dir]);
        command.args(["--metrics-address", &METRICS.to_string()]).args(&self.extra);
        match &self.cgroup {
            Some(cgroup) => command.arg("--cgroup").arg(cgroup),
            None => command.args(["--socket-lb", "off"]),
        };
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        match self.privileges {
            Privileges::All => {}
            Privileges::Documented => keep_capabilities(&mut command, &DOCUMENTED),
            Privileges::None => keep_capabilities(&mut command, &[]),
        }
        if let Some(files) = self.files_max {
            let limit = libc::rlimit { rlim_cur: files, rlim_max: files };
            // SAFETY: between fork and exec there is one system call.
            unsafe {
                command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                });
            }
        }
        Ok(command)
    }
}

/// A running agent; dropping it kills the process.
pub struct Agent {
    child: Child,
    node: Namespace,
    log: Log,
    quiet: bool,
}

/// How an agent ended that was expected to refuse.
#[derive(Debug)]
pub struct Refusal {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it wrote to both outputs.
    pub log: String,
}

impl Agent {
    /// Starts the agent without waiting for anything.
    pub fn spawn(node: &Namespace, bpffs: &PrivateBpffs, options: &AgentOptions) -> Result<Self> {
        let mut command = options.command(node, bpffs)?;
        let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let log = Log::follow(&mut child);
        Ok(Self { child, node: node.clone(), log, quiet: false })
    }

    /// Starts the agent and waits until its programs are attached and the first image is in the maps.
    pub fn start(node: &Namespace, bpffs: &PrivateBpffs, options: &AgentOptions) -> Result<Self> {
        let mut agent = Self::spawn(node, bpffs, options)?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Runs an agent that is expected to refuse to start, and returns what it said.
    pub fn refuse(node: &Namespace, bpffs: &PrivateBpffs, options: &AgentOptions) -> Result<Refusal> {
        let mut agent = Self::spawn(node, bpffs, options)?;
        let status = agent.wait_exit(READY_TIMEOUT).context("an agent that should have refused to start")?;
        agent.log.finish();
        agent.quiet = true;
        Ok(Refusal { status, log: agent.log() })
    }

    /// Waits until the agent says that it is ready.
    pub fn wait_ready(&mut self) -> Result<()> {
        wait_for("the agent to be ready", READY_TIMEOUT, || {
            if let Some(status) = self.child.try_wait()? {
                // Another look would not help: a process that ended stays ended.
                return Ok(Err(anyhow::anyhow!("the agent ended with {status}")));
            }
            let (status, body) = block_on(http_get(&self.node, METRICS, "/readyz"))?;
            ensure!(status == 200, "/readyz says {status}: {body}");
            Ok(Ok(()))
        })?
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns what the agent wrote so far.
    pub fn log(&self) -> String {
        self.log.text()
    }

    /// Keeps the log to itself when dropped; by default it is printed, for the report of a failed test.
    pub fn quiet(&mut self) {
        self.quiet = true;
    }

    /// Fetches a path of the agent's HTTP server.
    pub fn get(&self, path: &str) -> Result<String> {
        let (status, body) = block_on(http_get(&self.node, METRICS, path))?;
        ensure!(status == 200, "{path} says {status}: {body}");
        Ok(body)
    }

    /// Reads the agent's status.
    pub fn status(&self) -> Result<serde_json::Value> {
        let body = self.get("/status")?;
        serde_json::from_str(&body).with_context(|| format!("/status is no JSON: {body}"))
    }

    /// Reads every metric; the key is the name with its labels.
    pub fn metrics(&self) -> Result<BTreeMap<String, f64>> {
        let text = self.get("/metrics")?;
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        samples
            .map(|line| {
                let (key, value) = line.rsplit_once(' ').with_context(|| format!("not a sample: {line}"))?;
                Ok((key.to_string(), value.parse()?))
            })
            .collect()
    }

    /// Sums every sample whose name with labels contains both texts.
    pub fn metric(&self, name: &str, labels: &str) -> Result<f64> {
        let metrics = self.metrics()?;
        Ok(metrics
            .iter()
            .filter(|(key, _)| key.contains(name) && key.contains(labels))
            .map(|(_, value)| value)
            .sum())
    }

    /// Returns the mode in which an interface's program is attached, and the reason.
    pub fn mode_of(&self, interface: &str) -> Result<(String, String)> {
        let status = self.status()?;
        let interfaces = status["interfaces"].as_array().context("no interfaces in /status")?;
        let found = interfaces.iter().find(|entry| entry["name"] == interface);
        let found = found.with_context(|| format!("no {interface} in {status}"))?;
        let text = |field: &str| found[field].as_str().unwrap_or_default().to_string();
        Ok((text("mode"), text("reason")))
    }

    /// Asks the agent to stop as Ctrl-C does, and fails unless it ends well.
    pub fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGINT)?;
        let status = self.wait_exit(STOP_TIMEOUT).context("stopping the agent")?;
        ensure!(status.success(), "the agent ended with {status}");
        Ok(())
    }

    /// Kills the agent without a chance to clean up.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        wait_for("the agent to end", limit, || self.child.try_wait()?.context("it still runs"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.log.finish();
        if !self.quiet {
            println!("--- log of the agent in {:?}\n{}---", self.node, self.log.text());
        }
    }
}

/// Returns the agent's binary: `XDP_AGENT_BIN`, else the newest of the release and debug builds.
pub fn agent_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("XDP_AGENT_BIN") {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "XDP_AGENT_BIN names {}, which is no file", path.display());
        return Ok(path);
    }
    let target = target_directory()?;
    let built = ["release", "debug"].map(|profile| target.join(profile).join("xdp-agent"));
    let newest = built
        .into_iter()
        .filter_map(|path| {
            path.metadata().and_then(|metadata| metadata.modified()).ok().map(|time| (time, path))
        })
        .max();
    let Some((_, path)) = newest else {
        bail!("no xdp-agent in {}: run `cargo xtask build`, or set XDP_AGENT_BIN", target.display())
    };
    Ok(path)
}

/// Returns cargo's target directory, from the place of this executable.
fn target_directory() -> Result<PathBuf> {
    let executable = std::env::current_exe()?;
    let mut parents = executable.ancestors().skip(1);
    let profile = parents.find(|path| !path.ends_with("deps") && !path.ends_with("examples"));
    Ok(profile.and_then(Path::parent).context("no target directory above this executable")?.to_path_buf())
}

/// Leaves a process of root these capabilities, as a container runtime does: exec grants root no more than its bounding set.
///
/// Another user would not do: the binary may lie in a directory that only its owner can enter.
fn keep_capabilities(command: &mut Command, kept: &'static [libc::c_ulong]) {
    // SAFETY: prctl is a plain system call, allowed between fork and exec.
    unsafe {
        command.pre_exec(move || {
            // A set has 64 bits; those that no capability has are refused.
            for capability in (0..64).filter(|capability| !kept.contains(capability)) {
                if libc::prctl(libc::PR_CAPBSET_DROP, capability) != 0 {
                    let error = std::io::Error::last_os_error();
                    if error.raw_os_error() != Some(libc::EINVAL) {
                        return Err(error);
                    }
                }
            }
            Ok(())
        });
    }
}

/// What a child writes, collected by one thread per output.
struct Log {
    text: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

impl Log {
    fn follow(child: &mut Child) -> Self {
        let text = Arc::new(Mutex::new(String::new()));
        let mut readers = Vec::new();
        let mut follow = |output: Box<dyn std::io::Read + Send>| {
            let text = Arc::clone(&text);
            readers.push(std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    let mut text = text.lock().expect("no holder panics");
                    text.push_str(&line);
                    text.push('\n');
                }
            }));
        };
        child.stdout.take().into_iter().for_each(|output| follow(Box::new(output)));
        child.stderr.take().into_iter().for_each(|output| follow(Box::new(output)));
        Self { text, readers }
    }

    fn text(&self) -> String {
        self.text.lock().expect("no holder panics").clone()
    }

    /// Waits for the last lines; to be called once the child has ended.
    fn finish(&mut self) {
        for reader in self.readers.drain(..) {
            // A reader only pushes text and cannot panic while the mutex is sound.
            let _ = reader.join();
        }
    }
}
