//! The flags of `explain`: those of `run` that decide what is served, and what is asked.

use std::path::PathBuf;

use clap::{ArgGroup, Parser, ValueEnum};

use super::question::{Destination, Source, parse_protocol};
use crate::{
    cluster::wanted::Protocol,
    config::{ClusterArgs, values::Bind},
};

/// What a new connection meets, and why; needs neither root nor a kernel, unless it asks a running agent's maps.
#[derive(Clone, Debug, Parser)]
#[command(group = ArgGroup::new("what").args(["to", "batch", "maps"]).required(true))]
#[command(group = ArgGroup::new("whose").args(["services", "live"]).required(true).multiple(true))]
pub struct ExplainArgs {
    /// Service, EndpointSlice, Node and ServiceCIDR objects as for `run`: files or directories; repeat it or separate
    /// paths by commas or spaces.
    #[arg(long, env = "XDP_AGENT_SERVICES", value_name = "FILE|DIR", num_args = 1.., value_delimiter = ',')]
    pub services: Vec<PathBuf>,

    /// Who connects; IPv6 addresses with a port in brackets.
    #[arg(long, value_name = "IP[:PORT]", requires = "to")]
    pub from: Option<Source>,

    /// Where to; IPv6 addresses in brackets.
    #[arg(long, value_name = "IP:PORT", requires = "from")]
    pub to: Option<Destination>,

    /// By which protocol: tcp, udp or sctp.
    #[arg(long, value_name = "PROTOCOL", default_value = "tcp", value_parser = parse_protocol, requires = "to")]
    pub proto: Protocol,

    /// Questions from a file, or from the standard input (-): one JSON object a line, as in
    /// {"from": "10.0.0.2", "to": "10.96.0.10:80", "proto": "udp"}, tcp without the last. Prints one JSON object for every line, in the same
    /// order; for a line that cannot be read it has the one field "error", and the exit status is 1.
    #[arg(long, value_name = "FILE")]
    pub batch: Option<PathBuf>,

    /// Print what the maps would hold, in place of an answer.
    #[arg(long)]
    pub maps: bool,

    /// How an answer looks; those of a batch are JSON.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub output: Output,

    /// Ask the maps of the agent that runs here (IPv4); needs root. The maps hold no names: those of Services are asked of the
    /// agent, or come from --services; without either they are numbers.
    #[arg(long)]
    pub live: bool,

    /// With --live: directory of the agent's pinned maps.
    #[arg(long, env = "XDP_AGENT_PIN_DIR", value_name = "DIR", default_value = "/sys/fs/bpf/xdp-agent")]
    pub pin_dir: PathBuf,

    /// With --live: where the agent has /services; empty for not to ask it.
    #[arg(
        long,
        env = "XDP_AGENT_METRICS_BIND_ADDRESS",
        value_name = "IP:PORT",
        visible_alias = "metrics-address",
        default_value = "127.0.0.1:10249"
    )]
    pub metrics_bind_address: Bind,

    /// What decides, beside the objects, what is served.
    #[command(flatten, next_help_heading = "Node and cluster")]
    pub cluster: ClusterArgs,
}

/// How an answer looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Lines for people.
    Text,
    /// One JSON object.
    Json,
}
