//! Flags of the socket hooks.

use std::path::PathBuf;

use clap::{Args as ClapArgs, ValueEnum};
use serde_json::{Value, json};

use super::values::{Pattern, switch};

/// How pods and processes of this node reach Services.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct SocketArgs {
    /// Whose connections to Services are translated at the socket: those of pods and of this node (all), of this node only,
    /// for pods that must not notice (host-only), or nobody's (off); this node's are then translated on their way out, but
    /// for NodePorts on its own addresses.
    #[arg(long, env = "XDP_AGENT_SOCKET_LB", value_enum, default_value_t = SocketLb::All)]
    pub socket_lb: SocketLb,

    /// Devices of this node that lead to pods whose connections are to be translated packet by packet, for what socket hooks
    /// do not serve: virtual machines, gVisor, pods left out by host-only. Names, in which * stands for anything and ? for
    /// one character; repeat it or separate them by commas.
    #[arg(long, env = "XDP_AGENT_POD_IFACE", value_name = "PATTERN", value_delimiter = ',')]
    pub pod_iface: Vec<Pattern>,

    /// Cgroup (v2) whose processes the socket hooks serve, with all below it [default: the root of the hierarchy].
    #[arg(long, env = "XDP_AGENT_CGROUP", value_name = "DIR")]
    pub cgroup: Option<PathBuf>,

    /// Let processes of this node reach NodePorts of IPv4 on 127.0.0.1 too, as kube-proxy's iptables mode does.
    #[arg(long, env = "XDP_AGENT_LOCALHOST_NODEPORTS", value_name = "BOOL", value_parser = switch, num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true)]
    pub localhost_nodeports: bool,
}

/// Whose sockets are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SocketLb {
    /// Those of pods and of this node.
    #[default]
    All,
    /// Those of this node.
    HostOnly,
    /// Nobody's.
    Off,
}

/// What the flags of the socket hooks resolve to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketOptions {
    /// Whose sockets are served.
    pub scope: SocketLb,
    /// The cgroup, when it is named.
    pub cgroup: Option<PathBuf>,
    /// Whether NodePorts are served on the loopback.
    pub is_on_loopback: bool,
    /// Devices of pods that are served packet by packet.
    pub pod_devices: Vec<Pattern>,
}

impl From<SocketArgs> for SocketOptions {
    fn from(args: SocketArgs) -> Self {
        Self {
            scope: args.socket_lb,
            cgroup: args.cgroup,
            is_on_loopback: args.localhost_nodeports,
            pod_devices: args.pod_iface,
        }
    }
}

impl SocketOptions {
    /// Under the names of the flags.
    pub(super) fn to_json(&self) -> [(&'static str, Value); 4] {
        let Self { scope, cgroup, is_on_loopback, pod_devices } = self;
        let patterns: Vec<&str> = pod_devices.iter().map(Pattern::as_str).collect();
        [
            ("socket-lb", json!(scope.label())),
            ("cgroup", json!(cgroup)),
            ("localhost-nodeports", json!(is_on_loopback)),
            ("pod-iface", json!(patterns)),
        ]
    }
}

impl SocketLb {
    /// Its name on the command line.
    pub const fn label(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::HostOnly => "host-only",
            Self::Off => "off",
        }
    }
}
