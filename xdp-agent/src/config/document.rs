//! docs/flags.md and the tables of docs/migrate.md, from the flags themselves.

use std::fmt::Write;

use super::{
    file::{FIELDS, Fate},
    ignored::IGNORED,
    *,
};
use crate::documents::{self, cell};

/// kube-proxy's flags on Linux (cmd/kube-proxy/app/options.go, and component-base/logs), v1.36.
const KUBE_PROXY_FLAGS: [&str; 58] = [
    "bind-address",
    "bind-address-hard-fail",
    "cleanup",
    "cluster-cidr",
    "config",
    "config-sync-period",
    "conntrack-max-per-core",
    "conntrack-min",
    "conntrack-tcp-be-liberal",
    "conntrack-tcp-timeout-close-wait",
    "conntrack-tcp-timeout-established",
    "conntrack-udp-timeout",
    "conntrack-udp-timeout-stream",
    "detect-local-mode",
    "feature-gates",
    "healthz-bind-address",
    "healthz-port",
    "hostname-override",
    "init-only",
    "iptables-localhost-nodeports",
    "iptables-masquerade-bit",
    "iptables-min-sync-period",
    "iptables-sync-period",
    "ipvs-exclude-cidrs",
    "ipvs-min-sync-period",
    "ipvs-scheduler",
    "ipvs-strict-arp",
    "ipvs-sync-period",
    "ipvs-tcp-timeout",
    "ipvs-tcpfin-timeout",
    "ipvs-udp-timeout",
    "kube-api-burst",
    "kube-api-content-type",
    "kube-api-qps",
    "kubeconfig",
    "log-flush-frequency",
    "log-json-info-buffer-size",
    "log-json-split-stream",
    "log-text-info-buffer-size",
    "log-text-split-stream",
    "logging-format",
    "masquerade-all",
    "master",
    "metrics-bind-address",
    "metrics-port",
    "nodeport-addresses",
    "oom-score-adj",
    "pod-bridge-interface",
    "pod-interface-name-prefix",
    "profiling",
    "proxy-mode",
    "proxy-port-range",
    "show-hidden-metrics-for-version",
    "v",
    "vmodule",
    "write-config-to",
    "help",
    "version",
];

const FLAGS_HEAD: &str = "\
# Flags of `xdp-agent run`

Each flag has an environment variable; the command line wins over it, and both win over a file of `--config`. Lists are
separated by commas, or the flag is repeated. Written by `XDP_AGENT_BLESS=1 cargo test -p xdp-agent --lib document`; do not
edit it. What becomes of kube-proxy's flags: [migrate.md](migrate.md).
";

fn run() -> clap::Command {
    Cli::command().find_subcommand("run").expect("run exists").clone()
}

/// The flag of ours that a long name stands for.
fn ours(command: &clap::Command, long: &str) -> Option<String> {
    let stands = |arg: &&clap::Arg| {
        arg.get_long() == Some(long) || arg.get_all_aliases().unwrap_or_default().contains(&long)
    };
    let arg = command.get_arguments().filter(|arg| !arg.is_hide_set()).find(stands)?;
    arg.get_long().map(ToOwned::to_owned)
}

#[test]
fn the_document_of_flags_is_what_the_command_line_takes() {
    let mut text = FLAGS_HEAD.to_owned();
    let mut heading = "";
    let command = run();
    for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
        let (Some(long), Some(of_arg)) = (arg.get_long(), arg.get_help_heading()) else { continue };
        if heading != of_arg {
            heading = of_arg;
            write!(text, "\n## {heading}\n\n| flag | meaning | default | environment |\n|---|---|---|---|\n")
                .expect("memory");
        }
        let aliases = arg.get_visible_aliases().unwrap_or_default();
        let names: Vec<String> =
            [long].into_iter().chain(aliases).map(|name| format!("`--{name}`")).collect();
        let mut help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        // Switches have the values of Go's.
        let is_switch = arg.get_num_args().is_some_and(|range| range.min_values() == 0);
        let values: Vec<String> =
            arg.get_possible_values().iter().map(|value| format!("`{}`", value.get_name())).collect();
        if !values.is_empty() && !is_switch {
            write!(help, "; one of {}", values.join(", ")).expect("memory");
        }
        let defaults: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        let default = if defaults.is_empty() { String::new() } else { format!("`{}`", defaults.join(",")) };
        let env = arg.get_env().map(|env| env.to_string_lossy()).unwrap_or_default();
        writeln!(text, "| {} | {} | {default} | `{env}` |", names.join(" "), cell(&help)).expect("memory");
    }
    documents::check("flags.md", None, &text);
}

#[test]
fn the_table_of_kube_proxys_flags_is_what_the_command_line_takes() {
    let command = run();
    let mut text = "| kube-proxy | here |\n|---|---|\n".to_owned();
    let mut flags = KUBE_PROXY_FLAGS;
    flags.sort_unstable();
    for flag in flags {
        let ignored = IGNORED.iter().find(|ignored| ignored.flag == flag);
        let here = match (ours(&command, flag), ignored, flag) {
            (Some(ours), None, _) if ours == flag => "the same".to_owned(),
            (Some(ours), None, _) => format!("the same, as `--{ours}` too"),
            (None, Some(ignored), _) if ignored.is_refused => format!("refused: {}", ignored.why),
            (None, Some(ignored), _) => format!("no effect: {}", ignored.why),
            (None, None, "help") => "the same".to_owned(),
            (None, None, "version") => "`xdp-agent --version`".to_owned(),
            (ours, ignored, _) => panic!("--{flag} is {ours:?} and {ignored:?}"),
        };
        writeln!(text, "| `--{flag}` | {} |", cell(&here)).expect("memory");
    }
    for ignored in IGNORED {
        assert!(flags.contains(&ignored.flag), "--{} is no flag of kube-proxy", ignored.flag);
    }
    documents::check("migrate.md", Some("flags"), &text);
}

#[test]
fn the_table_of_kube_proxys_fields_is_what_files_may_hold() {
    let mut text = "| field | here |\n|---|---|\n".to_owned();
    for (field, fate) in FIELDS {
        let here = match fate {
            Fate::Flag(flag) => format!("`--{}`", flag.replace('_', "-")),
            Fate::Ignored(why) => format!("no effect: {why}"),
            Fate::Header => "what the file is".to_owned(),
        };
        writeln!(text, "| `{field}` | {} |", cell(&here)).expect("memory");
    }
    documents::check("migrate.md", Some("fields"), &text);
}
