//! The flags of `run`: their doc comments are the help, and each has an environment variable of its name.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use clap::{Args as ClapArgs, Parser, ValueEnum};
use xdp_common::tables;

use super::{
    PortRange,
    ignored::Given,
    sockets::SocketArgs,
    values::{Bind, Cidr, Ip, List, NodePortAddress, entries, ip, switch, timeout},
};

/// Seconds of the default timeouts: kube-proxy's where it has them, else netfilter's (see [`Timeouts::default`]).
///
/// [`Timeouts::default`]: xdp_common::conntrack::Timeouts::default
pub(super) const TCP_ESTABLISHED: u32 = 86_400;
pub(super) const TCP_HALF_CLOSED: u32 = 3_600;
pub(super) const TCP_CLOSED: u32 = 10;
pub(super) const UDP: u32 = 120;
pub(super) const SCTP: u32 = 210;

/// The flags of `run`.
#[derive(Clone, Debug, Parser)]
pub struct Args {
    /// Where objects come from.
    #[command(flatten, next_help_heading = "Objects")]
    pub objects: ObjectArgs,
    /// What they are read with.
    #[command(flatten, next_help_heading = "Node and cluster")]
    pub cluster: ClusterArgs,
    /// Interfaces and programs.
    #[command(flatten, next_help_heading = "Interfaces and programs")]
    pub programs: ProgramArgs,
    /// Pods and this node.
    #[command(flatten, next_help_heading = "Pods and processes of this node")]
    pub sockets: SocketArgs,
    /// Metrics and health.
    #[command(flatten, next_help_heading = "Metrics and health")]
    pub listen: ListenArgs,
    /// Sizes.
    #[command(flatten, next_help_heading = "Table sizes")]
    pub sizes: SizeArgs,
    /// Timeouts.
    #[command(flatten, next_help_heading = "Timeouts of idle flows")]
    pub timeouts: TimeoutArgs,
    /// Logs.
    #[command(flatten, next_help_heading = "Logs")]
    pub logs: LogArgs,
    /// What is done instead.
    #[command(flatten, next_help_heading = "Instead of running")]
    pub instead: InsteadArgs,
    /// Flags of kube-proxy that have no effect.
    #[command(flatten)]
    pub ignored: Given,
}

/// Where objects come from.
#[derive(Clone, Debug, ClapArgs)]
pub struct ObjectArgs {
    /// Kubeconfig file to reach the Kubernetes API by [default: the service account of the pod].
    #[arg(long, env = "XDP_AGENT_KUBECONFIG", value_name = "FILE", conflicts_with = "services")]
    pub kubeconfig: Option<PathBuf>,

    /// Address of the Kubernetes API, in place of the one that the kubeconfig or the pod names.
    #[arg(long, env = "XDP_AGENT_MASTER", value_name = "URL", conflicts_with = "services")]
    pub master: Option<String>,

    /// Files or directories with Service, EndpointSlice, Node and ServiceCIDR objects, followed for changes, in place
    /// of the API: as `kubectl get -o yaml` or `-o json` prints them; repeat it or separate paths by commas.
    #[arg(long, env = "XDP_AGENT_SERVICES", value_name = "FILE|DIR", value_delimiter = ',')]
    pub services: Vec<PathBuf>,

    /// Configuration of kube-proxy (kind KubeProxyConfiguration); flags and environment variables win over it.
    #[arg(long, env = "XDP_AGENT_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// What decides, beside the objects, what is served and how.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct ClusterArgs {
    /// Name of this node in Kubernetes [default: the hostname]; in lower case.
    #[arg(long, env = "XDP_AGENT_NODE", value_name = "NAME", visible_alias = "hostname-override")]
    pub node: Option<String>,

    /// Addresses of this node, in place of those that its Node object or its interfaces have; a family without one
    /// keeps them.
    #[arg(long, env = "XDP_AGENT_NODE_IP", value_name = "IP,…")]
    pub node_ip: Vec<List<Ip>>,

    /// Primary address of this node, if --node-ip has none of its family; 0.0.0.0 and :: say nothing.
    #[arg(long, env = "XDP_AGENT_BIND_ADDRESS", value_name = "IP", value_parser = ip)]
    pub bind_address: Option<IpAddr>,

    /// Zone of this node [default: the label topology.kubernetes.io/zone of its Node].
    #[arg(long, env = "XDP_AGENT_ZONE", value_name = "ZONE")]
    pub zone: Option<String>,

    /// Addresses of this node that NodePorts are served on: `primary`, `all`, or networks; networks of one family
    /// restrict only that family [default: primary].
    #[arg(long, env = "XDP_AGENT_NODEPORT_ADDRESSES", value_name = "primary|all|CIDR,…")]
    pub nodeport_addresses: Vec<List<NodePortAddress>>,

    /// Ranges of ClusterIPs, beside those that ServiceCIDR objects name; what is addressed to a free one is dropped.
    #[arg(long, env = "XDP_AGENT_SERVICE_CIDR", value_name = "CIDR,…")]
    pub service_cidr: Vec<List<Cidr>>,

    /// Networks of the cluster's pods, for --detect-local-mode ClusterCIDR.
    #[arg(long, env = "XDP_AGENT_CLUSTER_CIDR", value_name = "CIDR,…")]
    pub cluster_cidr: Vec<List<Cidr>>,

    /// How pods of this node are told from other clients.
    #[arg(long, env = "XDP_AGENT_DETECT_LOCAL_MODE", value_enum, default_value_t = DetectLocalMode::ClusterCidr)]
    pub detect_local_mode: DetectLocalMode,

    /// Bridge that pods of this node come in by, for --detect-local-mode BridgeInterface.
    #[arg(long, env = "XDP_AGENT_POD_BRIDGE_INTERFACE", value_name = "IFACE")]
    pub pod_bridge_interface: Option<String>,

    /// Beginning of the names of interfaces that pods of this node come in by, for --detect-local-mode
    /// InterfaceNamePrefix.
    #[arg(long, env = "XDP_AGENT_POD_INTERFACE_NAME_PREFIX", value_name = "PREFIX")]
    pub pod_interface_name_prefix: Option<String>,

    /// Translate the source of everything sent to ClusterIPs to this node.
    #[arg(long, env = "XDP_AGENT_MASQUERADE_ALL", value_name = "BOOL", value_parser = switch, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true)]
    pub masquerade_all: bool,

    /// How packets of clients outside the cluster get to endpoints on other nodes: translated to come from this node (snat),
    /// as they are in IP-in-IP, to be answered by the endpoint's node directly (dsr), or so for TCP only (hybrid). The same on
    /// every node. Packets to NodePorts only with --cluster-cidr.
    #[arg(long, env = "XDP_AGENT_FORWARDING", value_enum, default_value_t = ForwardingChoice::Snat)]
    pub forwarding: ForwardingChoice,
}

/// How packets of clients outside the cluster get to endpoints on other nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ForwardingChoice {
    /// Translated; answers come back by this node.
    #[default]
    Snat,
    /// As they are, in packets to the endpoint's node, which answers.
    Dsr,
    /// TCP as with dsr, all else as with snat.
    Hybrid,
}

/// How pods of this node are told from other clients, by kube-proxy's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DetectLocalMode {
    /// By the networks of --cluster-cidr; without one not at all.
    #[default]
    #[value(name = "ClusterCIDR", alias = "")]
    ClusterCidr,
    /// By spec.podCIDRs of the own Node.
    #[value(name = "NodeCIDR")]
    NodeCidr,
    /// By the bridge that --pod-bridge-interface names.
    #[value(name = "BridgeInterface")]
    BridgeInterface,
    /// By the interface names that --pod-interface-name-prefix begins.
    #[value(name = "InterfaceNamePrefix")]
    InterfaceNamePrefix,
}

/// Interfaces and programs.
#[derive(Clone, Debug, ClapArgs)]
pub struct ProgramArgs {
    /// Interface that clients and other nodes are reached through; repeat it or separate names by commas [default: the
    /// interfaces of the default routes].
    #[arg(long, env = "XDP_AGENT_IFACE", value_name = "IFACE", value_delimiter = ',')]
    pub iface: Vec<String>,

    /// Manage the VXLAN and Geneve devices that have an address too, as they come and go: backends on other nodes are reached
    /// through them, and their answers come back there. They carry tc programs; one that --iface names carries XDP as well.
    /// flannel's are left alone, because it masquerades into them.
    #[arg(long, env = "XDP_AGENT_OVERLAYS", value_name = "BOOL", value_parser = switch, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "true")]
    pub overlays: bool,

    /// How XDP runs: in the driver (native), in the kernel's stack (generic), on the network card itself (offload), or as
    /// well as each interface can (auto), which never tries the card.
    #[arg(long, env = "XDP_AGENT_MODE", value_enum, default_value_t = ModeChoice::Auto)]
    pub mode: ModeChoice,

    /// Source ports for translated flows; adopted maps keep theirs without --fresh [default: the widest gap that meets
    /// neither ip_local_port_range nor NodePorts].
    #[arg(long, env = "XDP_AGENT_SNAT_PORTS", value_name = "MIN-MAX")]
    pub snat_ports: Option<PortRange>,

    /// Answer pings of ClusterIPs, external IPs and load-balancer IPs that come in by --iface.
    #[arg(long, env = "XDP_AGENT_ECHO", value_name = "BOOL", value_parser = switch, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "true")]
    pub echo: bool,

    /// Answer the next packet of a TCP connection whose endpoint serves no more with a reset, instead of leaving the connection to
    /// its two ends.
    #[arg(long, env = "XDP_AGENT_RESET_ON_ENDPOINT_REMOVAL", value_name = "BOOL", value_parser = switch, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true)]
    pub reset_on_endpoint_removal: bool,

    /// Keep the ports of translated flows and NodePorts out of the kernel's choice for connections of this node, by
    /// net.ipv4.ip_local_reserved_ports, until the programs go; false leaves that setting alone.
    #[arg(long, env = "XDP_AGENT_RESERVE_PORTS", value_name = "BOOL", value_parser = switch, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "true")]
    pub reserve_ports: bool,

    /// Directory on a BPF file system for pinned maps and links.
    #[arg(long, env = "XDP_AGENT_PIN_DIR", value_name = "DIR", default_value = "/sys/fs/bpf/xdp-agent")]
    pub pin_dir: PathBuf,

    /// Leave programs attached and maps pinned when stopped, so that traffic goes on until the next start.
    #[arg(long, env = "XDP_AGENT_KEEP", value_name = "BOOL", value_parser = switch, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true)]
    pub keep: bool,

    /// Begin with maps and modes of its own in place of an earlier agent's, which serve until then; its flows end.
    #[arg(long, env = "XDP_AGENT_FRESH", value_name = "BOOL", value_parser = switch, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true)]
    pub fresh: bool,
}

/// Metrics and health.
#[derive(Clone, Debug, ClapArgs)]
pub struct ListenArgs {
    /// Address of /healthz and /livez, for load balancers and probes; empty for none [default: 0.0.0.0:10256, which
    /// takes IPv6 too].
    #[arg(long, env = "XDP_AGENT_HEALTHZ_BIND_ADDRESS", value_name = "IP:PORT")]
    pub healthz_bind_address: Option<Bind>,

    /// Address of /metrics, /status, /services, /readyz and /configz; empty for none [default: 127.0.0.1:10249, or the
    /// loopback of IPv6 with an IPv6 --bind-address].
    #[arg(
        long,
        env = "XDP_AGENT_METRICS_BIND_ADDRESS",
        value_name = "IP:PORT",
        visible_alias = "metrics-address"
    )]
    pub metrics_bind_address: Option<Bind>,

    /// Do not start when one of these addresses cannot be had, instead of trying again every 5 seconds.
    #[arg(long, env = "XDP_AGENT_BIND_ADDRESS_HARD_FAIL", value_name = "BOOL", value_parser = switch,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
        hide_default_value = true)]
    pub bind_address_hard_fail: bool,

    /// Export packets and bytes of every service port; false saves two time series for each.
    #[arg(long, env = "XDP_AGENT_SERVICE_METRICS", value_name = "BOOL", value_parser = switch, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "true")]
    pub service_metrics: bool,
}

/// Sizes of the tables.
#[derive(Clone, Debug, ClapArgs)]
pub struct SizeArgs {
    /// Entries for established flows, two a flow, and room for a quarter as many more; when full, further flows stay embryonic.
    #[arg(long, env = "XDP_AGENT_MAX_ESTABLISHED", value_name = "ENTRIES",
        default_value_t = tables::ESTABLISHED_V4.entries, value_parser = entries())]
    pub max_established: u32,

    /// Entries for new flows, one a flow until it is answered, then two; when full, unanswered ones go before answered
    /// ones (but for three of seven neighbours) and older before newer.
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
        default_value_t = tables::RINGS_V4.entries, value_parser = entries())]
    pub max_ring_slots: u32,

    /// Networks: of pods, of ServiceCIDRs, and source ranges of load balancers; when full, further Services with such
    /// ranges are not served and are reported.
    #[arg(long, env = "XDP_AGENT_MAX_NETWORKS", value_name = "ENTRIES",
        default_value_t = tables::NETWORKS_V4.entries, value_parser = entries())]
    pub max_networks: u32,
}

/// When idle flows are forgotten.
#[derive(Clone, Debug, ClapArgs)]
pub struct TimeoutArgs {
    /// An open TCP connection; 0 here and below for the default.
    #[arg(long, env = "XDP_AGENT_TCP_ESTABLISHED_TIMEOUT", value_name = "TIME", default_value = "24h",
        visible_alias = "conntrack-tcp-timeout-established", value_parser = timeout(TCP_ESTABLISHED))]
    pub tcp_established_timeout: Duration,

    /// A TCP connection that one side has closed.
    #[arg(long, env = "XDP_AGENT_TCP_HALF_CLOSED_TIMEOUT", value_name = "TIME", default_value = "1h",
        visible_alias = "conntrack-tcp-timeout-close-wait", value_parser = timeout(TCP_HALF_CLOSED))]
    pub tcp_half_closed_timeout: Duration,

    /// A TCP connection that is closed or reset.
    #[arg(long, env = "XDP_AGENT_TCP_CLOSED_TIMEOUT", value_name = "TIME", default_value = "10s",
        value_parser = timeout(TCP_CLOSED))]
    pub tcp_closed_timeout: Duration,

    /// A UDP flow.
    #[arg(long, env = "XDP_AGENT_UDP_TIMEOUT", value_name = "TIME", default_value = "2m",
        visible_alias = "conntrack-udp-timeout-stream", value_parser = timeout(UDP))]
    pub udp_timeout: Duration,

    /// An open SCTP association, whose heartbeats keep it alive; one that is closing is forgotten after 10s.
    #[arg(long, env = "XDP_AGENT_SCTP_TIMEOUT", value_name = "TIME", default_value = "210s", value_parser = timeout(SCTP))]
    pub sctp_timeout: Duration,
}

/// Logs.
#[derive(Clone, Debug, ClapArgs)]
pub struct LogArgs {
    /// How log lines look.
    #[arg(long, env = "XDP_AGENT_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// What is logged: a level, or levels by module as in `info,xdp_agent::attach=debug`.
    #[arg(long, env = "XDP_AGENT_LOG", value_name = "FILTER", default_value = "info")]
    pub log: String,
}

/// What is done instead of running.
#[derive(Clone, Debug, ClapArgs)]
pub struct InsteadArgs {
    /// Take off the programs and remove the pins that an agent has left under --pin-dir, then exit; flows end.
    #[arg(long, env = "XDP_AGENT_CLEANUP", value_name = "BOOL", value_parser = switch, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true)]
    pub cleanup: bool,

    /// Exit at once, for init containers of kube-proxy: there is nothing to prepare with more privileges.
    #[arg(long, env = "XDP_AGENT_INIT_ONLY", value_name = "BOOL", value_parser = switch, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true)]
    pub init_only: bool,
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
    /// On the network card or not at all; no card is known that takes these programs.
    Offload,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line for people.
    Text,
    /// One JSON object a line.
    Json,
}

#[cfg(test)]
mod tests {
    use xdp_common::conntrack::Timeouts;

    use super::*;

    #[test]
    fn default_timeouts_are_those_of_the_datapath() {
        let timeouts = Timeouts {
            tcp_established: TCP_ESTABLISHED,
            tcp_half_closed: TCP_HALF_CLOSED,
            tcp_closed: TCP_CLOSED,
            udp: UDP,
            sctp_established: SCTP,
            ..Timeouts::default()
        };
        assert_eq!(timeouts, Timeouts::default());
    }
}
