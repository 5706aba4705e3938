//! The agent itself, which follows an API server of the lab: from its start to readiness, memory, and how long after the
//! server has taken an object the maps say so.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{HashMap, Map, MapData};
use xdp_agent_tests::lab::{
    agent::{METRICS, PIN_DIR, agent_binary},
    api_server::ApiServer,
};
use xdp_common::tables::{FRONTENDS_V4, Frontend, FrontendKey, LAYOUT_VERSION};

use super::{
    Size,
    figures::{Row, kernel_mib, milliseconds, status_mib},
    objects, ours,
    world::{self, POD_CIDR, World},
};

/// How exactly the end of the start is seen.
const READY_POLL: Duration = Duration::from_millis(2);
/// How exactly a change is seen; looking all the time would take one of two cores from those that are measured.
const CHANGE_POLL: Duration = Duration::from_micros(50);
/// A change that takes so long never comes.
const CHANGE_LIMIT: Duration = Duration::from_secs(10);
/// What is shown of the log of an agent that failed.
const LOG_LINES: usize = 20;

type RawKey = [u8; size_of::<FrontendKey<[u8; 4]>>()];
type RawFrontend = [u8; size_of::<Frontend>()];

/// The running agent; dropping it kills the process.
struct Agent {
    child: Child,
    log: tempfile::NamedTempFile,
}

impl Agent {
    /// Starts the agent on this process's node.
    fn spawn(kubeconfig: &Path, world: &World) -> Result<Self> {
        let sizes = ours::sizes(world);
        let log = tempfile::NamedTempFile::new()?;
        let mut command = Command::new(agent_binary()?);
        command.args([
            "run",
            "--iface",
            "eth0",
            "--node",
            world::NODE,
            "--pin-dir",
            PIN_DIR,
            "--socket-lb",
            "off",
        ]);
        command.arg("--kubeconfig").arg(kubeconfig);
        command.args(["--cluster-cidr", &format!("{}/{}", POD_CIDR.0, POD_CIDR.1)]);
        command.args(["--metrics-address", &METRICS.to_string()]);
        command.args(["--max-frontends", &sizes.frontends.to_string()]);
        command.args(["--max-backends", &sizes.backends.to_string()]);
        command.args(["--max-ring-slots", &sizes.ring_slots.to_string()]);
        command.stdin(Stdio::null()).stdout(log.reopen()?).stderr(log.reopen()?);
        let child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        Ok(Self { child, log })
    }

    /// Waits until the agent says that it is ready.
    fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        while !is_ready() {
            if let Some(status) = self.child.try_wait()? {
                bail!("the agent ended with {status}:\n{}", self.last_words()?);
            }
            ensure!(Instant::now() < end, "the agent is not ready after {limit:?}:\n{}", self.last_words()?);
            thread::sleep(READY_POLL);
        }
        Ok(())
    }

    fn memory(&self, field: &str) -> Result<f64> {
        status_mib(&self.child.id().to_string(), field)
    }

    /// Memory of maps that the process has in its own, in MiB: it is the kernel's.
    fn mapped_maps(&self) -> Result<f64> {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.child.id()))?;
        let (mut is_map, mut kib) = (false, 0.0);
        for line in smaps.lines() {
            match line.split_once(char::is_whitespace) {
                Some(("Rss:", size)) if is_map => {
                    kib += size.trim().trim_end_matches(" kB").parse::<f64>()?
                }
                Some((field, _)) if !field.ends_with(':') => is_map = line.ends_with("bpf-map"),
                _ => {}
            }
        }
        Ok(kib / 1024.0)
    }

    fn last_words(&self) -> Result<String> {
        let log = fs::read_to_string(self.log.path())?;
        let lines: Vec<_> = log.lines().collect();
        Ok(lines[lines.len().saturating_sub(LOG_LINES)..].join("\n"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Both fail only when the process is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether `/readyz` says so; an agent that does not listen yet is not.
fn is_ready() -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(METRICS)?;
        stream.write_all(b"GET /readyz HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.split(' ').nth(1) == Some("200"))
}

/// Measures the agent at one size, in the network namespace and BPF file system of this process.
pub(super) fn measure(size: Size, changes: usize, limit: Duration) -> Result<Row> {
    let mut world = World::new(size.services, size.endpoints)?;
    let server = serve(&world)?;
    let directory = tempfile::tempdir()?;
    let kubeconfig = server.kubeconfig(directory.path())?;
    let before = kernel_mib()?;

    let start = Instant::now();
    let mut agent = Agent::spawn(&kubeconfig, &world)?;
    agent.wait_ready(limit)?;
    let mut row = Row { name: "xdp-agent, by the API".to_owned(), ..Row::default() };
    row.load_ms = Some(milliseconds(start.elapsed()));
    row.kernel_mib = Some(kernel_mib()? - before);
    let loaded = agent.memory("VmRSS")?;

    let pins = Path::new(PIN_DIR).join(format!("v{LAYOUT_VERSION}/maps"));
    let frontends = Frontends::open(&pins)?;
    let mut times = Vec::new();
    for _ in 0..changes {
        let replaced = world.replace();
        let slice = serde_json::to_value(objects::slice(&world, replaced.service))?;
        let earlier = frontends.get(replaced.service)?;
        let began = Instant::now();
        server.put(slice);
        while frontends.get(replaced.service)? == earlier {
            ensure!(began.elapsed() < CHANGE_LIMIT, "a change does not arrive:\n{}", agent.last_words()?);
            thread::sleep(CHANGE_POLL);
        }
        times.push(began.elapsed());
    }
    row.set_changes(&times);
    let maps = agent.mapped_maps()?;
    row.process_mib = Some(agent.memory("VmHWM")? - maps);
    let [anonymous, file, shared] = ["RssAnon", "RssFile", "RssShmem"].map(|field| agent.memory(field));
    row.notes.push(format!(
        "resident when loaded {loaded:.0} MiB; after the changes {:.0} of its own, {:.0} of files, {:.0} shared; {maps:.0} of that \
         are maps of the kernel's, which its column has",
        anonymous?, file?, shared?
    ));
    ours::verify(&ours::open(&pins, &world)?, &world)?;
    Ok(row)
}

/// An API server that has the world.
fn serve(world: &World) -> Result<ApiServer> {
    let server = ApiServer::start()?;
    server.put(serde_json::to_value(objects::node())?);
    server.put(serde_json::to_value(objects::service_cidr())?);
    for number in world.services() {
        server.put(serde_json::to_value(objects::service(number))?);
        server.put(serde_json::to_value(objects::slice(world, number))?);
    }
    Ok(server)
}

/// The agent's frontends, as its pin shows them.
struct Frontends(HashMap<MapData, RawKey, RawFrontend>);

impl Frontends {
    fn open(pins: &Path) -> Result<Self> {
        let path = pins.join(FRONTENDS_V4.name);
        let data = MapData::from_pin(&path).with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self(HashMap::try_from(Map::HashMap(data))?))
    }

    /// What the map says of the ClusterIP of a Service. It changes with every ring, for a ring is never written over.
    fn get(&self, service: u32) -> Result<RawFrontend> {
        let FrontendKey { addr, port, proto, zero } = ours::key(service);
        let mut key = RawKey::default();
        key[..4].copy_from_slice(&addr);
        key[4..6].copy_from_slice(&port);
        key[6..].copy_from_slice(&[proto, zero]);
        Ok(self.0.get(&key, 0)?)
    }
}
