//! Flags: one structure, whose doc comments are the help, and what they resolve to.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use xdp_common::{conntrack::Timeouts, tables};

use crate::plan::Limits;

pub use ports::PortRange;

pub mod ports;

/// Balances Kubernetes Services at XDP, in place of kube-proxy.
#[derive(Debug, Parser)]
#[command(name = "xdp-agent", version, about, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Attach the programs and keep the maps as the Services say, until stopped.
    Run(Box<Args>),
}

/// The flags of `run`; each has an environment variable of its name.
#[derive(Clone, Debug, Parser)]
pub struct Args {
    /// Interface that clients and other nodes are reached through; repeat it or separate names by commas.
    #[arg(long, env = "XDP_AGENT_IFACE", value_name = "IFACE", required = true, value_delimiter = ',')]
    pub iface: Vec<String>,

    /// Service, EndpointSlice and Node objects as `kubectl get -o yaml` or `-o json` prints them: a file or a directory
    /// of files, followed for changes; repeat it or separate paths by commas.
    #[arg(long, env = "XDP_AGENT_SERVICES", value_name = "FILE|DIR", required = true, value_delimiter = ',')]
    pub services: Vec<PathBuf>,

    /// How XDP runs: in the driver (native), in the kernel's stack (generic), or as well as each interface can (auto).
    #[arg(long, env = "XDP_AGENT_MODE", value_enum, default_value_t = ModeChoice::Auto)]
    pub mode: ModeChoice,

    /// Name of this node in Kubernetes [default: the hostname in lower case].
    #[arg(long, env = "XDP_AGENT_NODE", value_name = "NAME")]
    pub node: Option<String>,

    /// Address of metrics, health and status over HTTP.
    #[arg(
        long,
        env = "XDP_AGENT_METRICS_ADDRESS",
        value_name = "IP:PORT",
        default_value = "127.0.0.1:10249"
    )]
    pub metrics_address: SocketAddr,

    /// Directory on a BPF file system for pinned maps and links.
    #[arg(long, env = "XDP_AGENT_PIN_DIR", value_name = "DIR", default_value = "/sys/fs/bpf/xdp-agent")]
    pub pin_dir: PathBuf,

    /// Leave programs attached and maps pinned when stopped, so that traffic goes on until the next start.
    #[arg(long, env = "XDP_AGENT_KEEP")]
    pub keep: bool,

    /// Remove the programs and maps of an earlier agent before starting; its flows end.
    #[arg(long, env = "XDP_AGENT_FRESH")]
    pub fresh: bool,

    /// Source ports for translated flows; adopted maps keep theirs without --fresh [default: the widest gap that meets
    /// neither ip_local_port_range nor NodePorts].
    #[arg(long, env = "XDP_AGENT_SNAT_PORTS", value_name = "MIN-MAX")]
    pub snat_ports: Option<PortRange>,

    /// Entries for established flows, two a flow; when full, further flows stay embryonic.
    #[arg(long, env = "XDP_AGENT_MAX_ESTABLISHED", value_name = "ENTRIES",
        default_value_t = tables::ESTABLISHED_V4.entries, value_parser = entries())]
    pub max_established: u32,

    /// Entries for new flows, one a flow until it is answered, then two; when full, unanswered ones go before answered ones and older before newer.
    #[arg(long, env = "XDP_AGENT_MAX_EMBRYONIC", value_name = "ENTRIES",
        default_value_t = tables::EMBRYONIC_V4.entries, value_parser = entries())]
    pub max_embryonic: u32,

    /// Addresses and ports of Services; when full, further ones are not served and are reported.
    #[arg(long, env = "XDP_AGENT_MAX_FRONTENDS", value_name = "ENTRIES",
        default_value_t = tables::FRONTENDS_V4.entries, value_parser = entries())]
    pub max_frontends: u32,

    /// Endpoints; when full, further ones get no traffic and are reported.
    #[arg(long, env = "XDP_AGENT_MAX_BACKENDS", value_name = "ENTRIES",
        default_value_t = tables::BACKENDS_V4.entries, value_parser = entries())]
    pub max_backends: u32,

    /// Slots of all Maglev rings together, 4 bytes each.
    #[arg(long, env = "XDP_AGENT_MAX_RING_SLOTS", value_name = "SLOTS",
        default_value_t = tables::RINGS.entries, value_parser = entries())]
    pub max_ring_slots: u32,

    /// Networks: pods, ServiceCIDRs, and source ranges of load balancers; when full, further Services with such ranges are
    /// not served and are reported.
    #[arg(long, env = "XDP_AGENT_MAX_NETWORKS", value_name = "ENTRIES",
        default_value_t = tables::NETWORKS_V4.entries, value_parser = entries())]
    pub max_networks: u32,

    /// Idle time after which an open TCP connection is forgotten.
    #[arg(long, env = "XDP_AGENT_TCP_ESTABLISHED_TIMEOUT", value_name = "TIME", default_value = "24h",
        value_parser = timeout)]
    pub tcp_established_timeout: Duration,

    /// Idle time after which a TCP connection that one side has closed is forgotten.
    #[arg(long, env = "XDP_AGENT_TCP_HALF_CLOSED_TIMEOUT", value_name = "TIME", default_value = "1h",
        value_parser = timeout)]
    pub tcp_half_closed_timeout: Duration,

    /// Idle time after which a TCP connection that is closed or reset is forgotten.
    #[arg(long, env = "XDP_AGENT_TCP_CLOSED_TIMEOUT", value_name = "TIME", default_value = "10s",
        value_parser = timeout)]
    pub tcp_closed_timeout: Duration,

    /// Idle time after which a UDP flow is forgotten.
    #[arg(long, env = "XDP_AGENT_UDP_TIMEOUT", value_name = "TIME", default_value = "2m", value_parser = timeout)]
    pub udp_timeout: Duration,

    /// How log lines look.
    #[arg(long, env = "XDP_AGENT_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// What is logged: a level, or levels by module as in `info,xdp_agent::attach=debug`.
    #[arg(long, env = "XDP_AGENT_LOG", value_name = "FILTER", default_value = "info")]
    pub log: String,
}

/// What `--mode` allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModeChoice {
    /// Native, native with frags, generic: the first that the interface takes.
    Auto,
    /// In the driver or not at all.
    Native,
    /// In the stack: slower, and works on every interface.
    Generic,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The flags, with everything filled in that was left to the agent.
#[derive(Clone, Debug)]
pub struct Config {
    /// Managed interfaces, without repetitions.
    pub interfaces: Vec<String>,
    /// Manifest files and directories.
    pub services: Vec<PathBuf>,
    /// XDP modes allowed.
    pub mode: ModeChoice,
    /// Name of this node.
    pub node: String,
    /// Address of the HTTP server.
    pub metrics_address: SocketAddr,
    /// Directory of pins.
    pub pin_dir: PathBuf,
    /// Whether a stop leaves the programs attached.
    pub keep: bool,
    /// Whether a start removes what is pinned.
    pub fresh: bool,
    /// Source ports for translated flows.
    pub snat_ports: PortRange,
    /// Map sizes.
    pub sizes: Sizes,
    /// When idle flows are forgotten.
    pub timeouts: Timeouts,
}

/// Map sizes in entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Established flows.
    pub established: u32,
    /// Embryonic flows.
    pub embryonic: u32,
    /// Frontends.
    pub frontends: u32,
    /// Backends.
    pub backends: u32,
    /// Ring slots.
    pub ring_slots: u32,
    /// Networks.
    pub networks: u32,
}

impl Sizes {
    /// What the plan has to keep within.
    pub fn limits(&self) -> Limits {
        Limits {
            frontends: self.frontends,
            backends: self.backends,
            ring_slots: self.ring_slots,
            networks: self.networks,
        }
    }
}

impl Config {
    /// Fills in what the flags left open, from the host.
    ///
    /// # Errors
    /// When a flag contradicts the host, with what to change.
    pub fn resolve(args: Args) -> anyhow::Result<Self> {
        let mut interfaces: Vec<String> = Vec::new();
        for name in args.iface.into_iter().map(|name| name.trim().to_owned()) {
            ensure!(!name.is_empty(), "an interface name is empty; give --iface the name of an interface");
            if !interfaces.contains(&name) {
                interfaces.push(name);
            }
        }
        // Changes are reported by whole paths.
        let services = args.services.iter().map(std::path::absolute).collect::<Result<_, _>>();
        let services = services.context("cannot find the working directory; give --services whole paths")?;
        let node = match args.node {
            Some(node) => node,
            None => hostname().context("cannot read the hostname; give the node's name by --node")?,
        };
        ensure!(!node.is_empty(), "the node's name is empty; give it by --node");
        let ephemeral = ports::ephemeral()?;
        let snat_ports = match args.snat_ports {
            Some(range) => range.checked_against(ephemeral)?,
            None => ports::choose(ephemeral)?,
        };
        Ok(Self {
            interfaces,
            services,
            mode: args.mode,
            node,
            metrics_address: args.metrics_address,
            pin_dir: args.pin_dir,
            keep: args.keep,
            fresh: args.fresh,
            snat_ports,
            sizes: Sizes {
                established: args.max_established,
                embryonic: args.max_embryonic,
                frontends: args.max_frontends,
                backends: args.max_backends,
                ring_slots: args.max_ring_slots,
                networks: args.max_networks,
            },
            timeouts: Timeouts {
                tcp_established: args.tcp_established_timeout.as_secs() as u32,
                tcp_half_closed: args.tcp_half_closed_timeout.as_secs() as u32,
                tcp_closed: args.tcp_closed_timeout.as_secs() as u32,
                udp: args.udp_timeout.as_secs() as u32,
            },
        })
    }
}

/// Fewer than a page of entries helps nobody, and more than 2^26 (8 GiB of flows) is a slip of the pen.
fn entries() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(64..=1 << 26)
}

fn timeout(text: &str) -> Result<Duration, String> {
    let time =
        humantime::parse_duration(text).map_err(|error| format!("{error}; write it as 90s, 3m or 24h"))?;
    // Flow ages are counted in 32 bits of seconds, half of which are the past.
    if time.as_secs() == 0 || time.as_secs() > u64::from(u32::MAX / 4) {
        return Err("a timeout is at least 1s and at most 30 years".to_owned());
    }
    Ok(time)
}

fn hostname() -> std::io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(extra: &[&str]) -> Result<Args, clap::Error> {
        let given = ["xdp-agent", "run", "--iface", "eth0,eth1", "--services", "a.yaml"];
        Cli::try_parse_from(given.iter().chain(extra)).map(|cli| match cli.command {
            Command::Run(args) => *args,
        })
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_has_an_environment_variable_of_its_name() {
        use clap::CommandFactory;
        let cli = Cli::command();
        let run = cli.find_subcommand("run").expect("run exists");
        for arg in run.get_arguments().filter(|arg| arg.get_id() != "help") {
            let env = arg.get_env().map(|env| env.to_string_lossy().into_owned());
            let name = arg.get_id().as_str().to_uppercase();
            assert_eq!(env, Some(format!("XDP_AGENT_{name}")));
        }
    }

    #[test]
    fn interfaces_are_a_list_without_repetitions() {
        let args = args(&["--iface", "eth1", "--node", "n"]).expect("valid");
        let config = Config::resolve(args).expect("valid");
        assert_eq!(config.interfaces, ["eth0", "eth1"]);
    }

    #[test]
    fn times_are_written_for_people() {
        let args = args(&["--udp-timeout", "90s", "--tcp-established-timeout", "2days"]).expect("valid");
        assert_eq!(args.udp_timeout, Duration::from_secs(90));
        assert_eq!(args.tcp_established_timeout, Duration::from_secs(172_800));
    }

    #[test]
    fn bad_values_are_refused_with_a_hint() {
        for (flag, value, hint) in [
            ("--udp-timeout", "0s", "at least 1s"),
            ("--udp-timeout", "soon", "3m"),
            ("--max-backends", "3", "64.."),
            ("--snat-ports", "9-1", "MIN-MAX"),
            ("--mode", "fast", "generic"),
            ("--metrics-address", "here", "invalid"),
        ] {
            let message = args(&[flag, value]).expect_err("refused").to_string();
            assert!(message.contains(hint), "{flag} {value}: {message}");
        }
    }
}
