//! What the command line, the environment and a configuration file ask for, and what they resolve to.
//!
//! [`flags`] holds the flags, [`mod@file`] hands the fields of a kube-proxy configuration to them, and [`ignored`] explains
//! what of kube-proxy's has no effect here.

use std::{
    ffi::OsString,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use clap::{
    CommandFactory, FromArgMatches, Parser, Subcommand,
    error::{ContextKind, ContextValue, ErrorKind},
};
use tracing::warn;
use xdp_common::conntrack::Timeouts;

use crate::{
    cluster::{DetectLocal, Forwarding, NodePortAddresses, Options},
    doctor::DoctorArgs,
    explain::ExplainArgs,
    plan::Limits,
};

pub use flags::{Args, ClusterArgs, DetectLocalMode, ForwardingChoice, LogFormat, ModeChoice};
pub use ports::PortRange;
pub use sockets::{SocketLb, SocketOptions};

use file::Setting;
use flags::{ListenArgs, ObjectArgs, SizeArgs, TimeoutArgs};
pub use values::Pattern;

use values::{Bind, Ip, NodePortAddress, all};

#[cfg(test)]
mod document;
pub mod file;
pub mod flags;
pub mod ignored;
pub mod ports;
mod show;
mod sockets;
#[cfg(test)]
mod tests;
mod uplinks;
pub mod values;

/// All of both families.
const EVERYTHING: [(IpAddr, u8); 2] =
    [(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0), (IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0)];

/// kube-proxy's ports of health and metrics.
const HEALTHZ_PORT: u16 = 10256;
pub(crate) const METRICS_PORT: u16 = 10249;

/// Balances Kubernetes Services at XDP, in place of kube-proxy.
#[derive(Debug, Parser)]
#[command(name = "xdp-agent", version = crate::VERSION, about, disable_help_subcommand = true)]
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
    /// Answer what a new connection would meet, and why, from files or from the maps of a running agent.
    Explain(Box<ExplainArgs>),
    /// Tell whether `run` would work here, how XDP would run on each interface, and what would make it better.
    Doctor(Box<DoctorArgs>),
}

/// Something the command line or the configuration file asks for that has no effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// The flag with its dashes, or the path of the field.
    pub what: String,
    /// Why it has none.
    pub why: &'static str,
}

impl Cli {
    /// Reads the words of a command line, the environment, and the configuration file they name. The second value is
    /// what has no effect, for the log.
    ///
    /// # Errors
    /// For everything the user has to change, and for `--help` and `--version`.
    pub fn read(words: impl IntoIterator<Item = OsString>) -> Result<(Self, Vec<Note>), clap::Error> {
        let words: Vec<OsString> = words.into_iter().map(values::with_dashes).collect();
        let cli = Self::try_parse_from(&words)?;
        let Command::Run(args) = &cli.command else { return Ok((cli, Vec::new())) };
        if let Some(refused) = args.ignored.0.iter().find(|ignored| ignored.is_refused) {
            let message = format!("--{}: {}", refused.flag, refused.why);
            return Err(Self::command().error(ErrorKind::UnknownArgument, message));
        }
        let given = args.ignored.0.iter();
        let mut notes: Vec<Note> =
            given.map(|ignored| Note { what: format!("--{}", ignored.flag), why: ignored.why }).collect();
        let Some(path) = args.objects.config.clone() else { return Ok((cli, notes)) };
        let text = fs::read_to_string(&path);
        let file = text.map_err(|error| error.to_string()).and_then(|text| file::read(&text));
        let file = file.map_err(|error| refuse(&path, &error))?;
        notes.extend(file.ignored.iter().map(|(field, why)| Note { what: (*field).to_owned(), why }));
        let matches = with_defaults(&file.settings)
            .try_get_matches_from(words)
            .map_err(|error| blame(&path, &file.settings, error))?;
        Ok((Self::from_arg_matches(&matches)?, notes))
    }
}

/// The command line, with a file's values in place of the defaults.
fn with_defaults(settings: &[Setting]) -> clap::Command {
    Cli::command().mut_subcommand("run", |run| {
        run.mut_args(|arg| {
            let mut of_arg = settings.iter().filter(|setting| setting.flag == arg.get_id().as_str());
            let Some(setting) = of_arg.next() else { return arg };
            arg.default_values(setting.values.iter().cloned().map(OsString::from))
        })
    })
}

fn refuse(path: &Path, message: &str) -> clap::Error {
    Cli::command().error(ErrorKind::ValueValidation, format!("--config {}: {message}", path.display()))
}

/// Names the field whose value a flag has refused; the command line alone was accepted before.
fn blame(path: &Path, settings: &[Setting], error: clap::Error) -> clap::Error {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        _ => String::new(),
    };
    let (arg, value) = (text(ContextKind::InvalidArg), text(ContextKind::InvalidValue));
    let names = |setting: &&Setting| {
        arg.trim_start_matches('-').split([' ', '=']).next() == Some(&setting.flag.replace('_', "-"))
    };
    let Some(setting) = settings.iter().find(names) else { return error };
    let reason = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
    refuse(path, &format!("{}: invalid value {value:?}{reason}", setting.field))
}

/// Where objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectSource {
    /// Files and directories, by whole paths.
    Files(Vec<PathBuf>),
    /// The Kubernetes API.
    Kubernetes {
        /// Kubeconfig file; the pod's service account without one.
        kubeconfig: Option<PathBuf>,
        /// Address in place of the one that those name.
        master: Option<String>,
    },
}

/// The flags, with everything filled in that was left to the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Managed interfaces, without repetitions.
    pub interfaces: Vec<String>,
    /// Whether devices of overlays are managed beside them, as they come and go.
    pub overlays: bool,
    /// Where objects come from.
    pub source: ObjectSource,
    /// What decides, beside the objects, what is served.
    pub cluster: Options,
    /// XDP modes allowed.
    pub mode: ModeChoice,
    /// Where the HTTP servers listen.
    pub listen: Listen,
    /// Whether packets and bytes of every service port are exported.
    pub service_metrics: bool,
    /// Directory of pins.
    pub pin_dir: PathBuf,
    /// Whether a stop leaves the programs attached.
    pub keep: bool,
    /// Whether a start removes what is pinned.
    pub fresh: bool,
    /// Source ports for translated flows.
    pub snat_ports: PortRange,
    /// Whether echo requests to the addresses of Services are answered.
    pub echo: bool,
    /// Whether TCP connections are reset once their endpoint is gone.
    pub reset_on_endpoint_removal: bool,
    /// Whether the kernel is told to choose no port of ours.
    pub reserve_ports: bool,
    /// Map sizes.
    pub sizes: Sizes,
    /// When idle flows are forgotten.
    pub timeouts: Timeouts,
    /// Whose sockets are served.
    pub sockets: SocketOptions,
}

/// Where the HTTP servers listen; nothing for those that are off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Health for load balancers and probes.
    pub healthz: Option<SocketAddr>,
    /// Metrics and status.
    pub metrics: Option<SocketAddr>,
    /// Whether an address that cannot be had ends the start.
    pub is_hard_fail: bool,
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

impl From<SizeArgs> for Sizes {
    fn from(args: SizeArgs) -> Self {
        Self {
            established: args.max_established,
            embryonic: args.max_embryonic,
            frontends: args.max_frontends,
            backends: args.max_backends,
            ring_slots: args.max_ring_slots,
            networks: args.max_networks,
        }
    }
}

impl Config {
    /// Files and directories with objects; none when they come from the API.
    pub fn files(&self) -> &[PathBuf] {
        match &self.source {
            ObjectSource::Files(paths) => paths,
            ObjectSource::Kubernetes { .. } => &[],
        }
    }

    /// Fills in what the flags left open, from the host.
    ///
    /// # Errors
    /// When a flag contradicts the host or another flag, with what to change.
    pub fn resolve(args: Args) -> anyhow::Result<Self> {
        let ephemeral = ports::ephemeral()?;
        let snat_ports = match args.programs.snat_ports {
            Some(range) => range.checked_against(ephemeral)?,
            None => ports::choose(ephemeral)?,
        };
        Ok(Self {
            source: source(args.objects)?,
            listen: listen(&args.listen, args.cluster.bind_address),
            cluster: args.cluster.options()?,
            interfaces: interfaces(&args.programs.iface)?,
            overlays: args.programs.overlays,
            mode: args.programs.mode,
            service_metrics: args.listen.service_metrics,
            pin_dir: args.programs.pin_dir,
            keep: args.programs.keep,
            fresh: args.programs.fresh,
            snat_ports,
            echo: args.programs.echo,
            reset_on_endpoint_removal: args.programs.reset_on_endpoint_removal,
            reserve_ports: args.programs.reserve_ports,
            sizes: args.sizes.into(),
            timeouts: timeouts(&args.timeouts),
            sockets: args.sockets.into(),
        })
    }
}

impl ClusterArgs {
    /// What decides, beside the objects, what is served; the node's name comes from the host without `--node`.
    ///
    /// # Errors
    /// When flags contradict each other or one is missing, with what to change.
    pub fn options(&self) -> anyhow::Result<Options> {
        let node = match self.node.as_deref().map(str::trim).filter(|node| !node.is_empty()) {
            Some(node) => node.to_owned(),
            None => hostname().context("cannot read the hostname; give the node's name by --node")?,
        };
        let node = node.trim().to_lowercase();
        ensure!(!node.is_empty(), "the node's name is empty; give it by --node");
        Ok(Options {
            node,
            detect_local: self.detect_local()?,
            masquerade_all: self.masquerade_all,
            nodeport_addresses: self.nodeport_addresses()?,
            service_cidrs: all(&self.service_cidr).into_iter().map(Into::into).collect(),
            node_ips: self.node_ips(),
            zone: self.zone.clone().filter(|zone| !zone.is_empty()),
            forwarding: match self.forwarding {
                ForwardingChoice::Snat => Forwarding::Snat,
                ForwardingChoice::Dsr => Forwarding::Dsr,
                ForwardingChoice::Hybrid => Forwarding::Hybrid,
            },
        })
    }

    fn node_ips(&self) -> Vec<IpAddr> {
        let mut ips: Vec<IpAddr> = all(&self.node_ip).into_iter().map(|Ip(ip)| ip).collect();
        if let Some(primary) = self.bind_address.filter(|ip| !ip.is_unspecified())
            && !ips.iter().any(|ip| ip.is_ipv4() == primary.is_ipv4())
        {
            ips.push(primary);
        }
        ips
    }

    fn detect_local(&self) -> anyhow::Result<DetectLocal> {
        let named = |name: &Option<String>| name.clone().filter(|name| !name.is_empty());
        Ok(match self.detect_local_mode {
            DetectLocalMode::ClusterCidr => {
                let networks = all(&self.cluster_cidr);
                if networks.is_empty() {
                    warn!(
                        "no --cluster-cidr: pods are not told from clients outside the cluster; give it, or another \
                         --detect-local-mode, so that ClusterIPs are masqueraded for outsiders and pods reach Services \
                         of externalTrafficPolicy Local everywhere"
                    );
                    return Ok(DetectLocal::None);
                }
                DetectLocal::ClusterCidr(networks.into_iter().map(Into::into).collect())
            }
            DetectLocalMode::NodeCidr => DetectLocal::NodeCidr,
            DetectLocalMode::BridgeInterface => {
                DetectLocal::BridgeInterface(named(&self.pod_bridge_interface).context(
                    "--detect-local-mode BridgeInterface needs the bridge by --pod-bridge-interface",
                )?)
            }
            DetectLocalMode::InterfaceNamePrefix => DetectLocal::InterfaceNamePrefix(
                named(&self.pod_interface_name_prefix)
                    .context("--detect-local-mode InterfaceNamePrefix needs --pod-interface-name-prefix")?,
            ),
        })
    }

    fn nodeport_addresses(&self) -> anyhow::Result<NodePortAddresses> {
        let mut networks = Vec::new();
        let mut is_primary = false;
        for address in all(&self.nodeport_addresses) {
            match address {
                NodePortAddress::Primary => is_primary = true,
                NodePortAddress::All => networks.extend(EVERYTHING),
                NodePortAddress::In(cidr) => networks.push(cidr.into()),
            }
        }
        match (is_primary, networks.is_empty()) {
            (_, true) => Ok(NodePortAddresses::Primary),
            (false, false) => Ok(NodePortAddresses::Cidrs(networks)),
            (true, false) => {
                bail!("--nodeport-addresses primary stands alone; leave out either it or the networks")
            }
        }
    }
}

fn source(args: ObjectArgs) -> anyhow::Result<ObjectSource> {
    if args.services.is_empty() {
        let master = args.master.filter(|master| !master.is_empty());
        return Ok(ObjectSource::Kubernetes { kubeconfig: args.kubeconfig, master });
    }
    // Changes are reported by whole paths.
    let paths = args.services.iter().map(std::path::absolute).collect::<Result<_, _>>();
    Ok(ObjectSource::Files(paths.context("cannot find the working directory; give --services whole paths")?))
}

fn listen(args: &ListenArgs, bind_address: Option<IpAddr>) -> Listen {
    let is_v6 = bind_address.is_some_and(|ip| ip.is_ipv6());
    let (everywhere, loopback): (IpAddr, IpAddr) = if is_v6 {
        (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::LOCALHOST.into())
    } else {
        (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into())
    };
    Listen {
        healthz: args.healthz_bind_address.unwrap_or(Bind::Ip(everywhere)).with_port(HEALTHZ_PORT),
        metrics: args.metrics_bind_address.unwrap_or(Bind::Ip(loopback)).with_port(METRICS_PORT),
        is_hard_fail: args.bind_address_hard_fail,
    }
}

/// The interfaces of `--iface`, without repetitions; without any those of the default routes.
///
/// # Errors
/// When a name is empty, or there is no default route.
pub(crate) fn interfaces(given: &[String]) -> anyhow::Result<Vec<String>> {
    if given.is_empty() {
        return uplinks::names();
    }
    let mut interfaces: Vec<String> = Vec::new();
    for name in given.iter().map(|name| name.trim().to_owned()) {
        ensure!(!name.is_empty(), "an interface name is empty; give --iface the name of an interface");
        if !interfaces.contains(&name) {
            interfaces.push(name);
        }
    }
    Ok(interfaces)
}

fn timeouts(args: &TimeoutArgs) -> Timeouts {
    Timeouts {
        tcp_established: args.tcp_established_timeout.as_secs() as u32,
        tcp_half_closed: args.tcp_half_closed_timeout.as_secs() as u32,
        tcp_closed: args.tcp_closed_timeout.as_secs() as u32,
        udp: args.udp_timeout.as_secs() as u32,
        sctp_established: args.sctp_timeout.as_secs() as u32,
        ..Timeouts::default()
    }
}

fn hostname() -> std::io::Result<String> {
    fs::read_to_string("/proc/sys/kernel/hostname")
}
