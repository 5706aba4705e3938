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
# Flags of `xdp-agent`

`xdp-agent run` is the agent; `run --cleanup` takes off what an agent has left; `explain` answers what a connection would
meet. `--help` stands behind each, `--version` alone.

Each flag of `run` has an environment variable; the command line wins over it, and both win over a file of `--config`. Lists
are separated by commas, or the flag is repeated. Underscores in names stand for dashes. Written by `XDP_AGENT_BLESS=1 cargo test -p xdp-agent --lib document`; do not
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
    for command in Cli::command().get_subcommands() {
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        write!(text, "\n## xdp-agent {}\n\n{about}.\n", command.get_name()).expect("memory");
        write_flags(command, &mut text);
    }
    documents::check("flags.md", None, &text);
}

/// A table under each heading of a command's flags.
fn write_flags(command: &clap::Command, text: &mut String) {
    let mut heading = None;
    // Those without a heading have to come before the first that has one.
    let shown = |arg: &&clap::Arg| !arg.is_hide_set() && arg.get_id() != "help";
    let (mut args, of_headings): (Vec<_>, Vec<_>) =
        command.get_arguments().filter(shown).partition(|arg| arg.get_help_heading().is_none());
    args.extend(of_headings);
    for arg in args {
        let Some(long) = arg.get_long() else { panic!("{} has no long name", arg.get_id()) };
        if heading != Some(arg.get_help_heading()) {
            heading = Some(arg.get_help_heading());
            if let Some(heading) = arg.get_help_heading() {
                write!(text, "\n### {heading}\n").expect("memory");
            }
            text.push_str("\n| flag | meaning | default | environment |\n|---|---|---|---|\n");
        }
        let aliases = arg.get_visible_aliases().unwrap_or_default();
        let names: Vec<String> =
            [long].into_iter().chain(aliases).map(|name| format!("`--{name}`")).collect();
        let mut help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        // Switches have the values of Go's.
        let is_switch = arg.get_num_args().is_some_and(|range| range.min_values() == 0);
        let values: Vec<String> =
            arg.get_possible_values().iter().map(|value| format!("`{}`", value.get_name())).collect();
        if !values.is_empty() && !is_switch && arg.get_action().takes_values() {
            write!(help, "; one of {}", values.join(", ")).expect("memory");
        }
        let defaults: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        let default = if defaults.is_empty() { String::new() } else { format!("`{}`", defaults.join(",")) };
        let env = arg.get_env().map(|env| format!("`{}`", env.to_string_lossy())).unwrap_or_default();
        writeln!(text, "| {} | {} | {default} | {env} |", names.join(" "), cell(&help)).expect("memory");
    }
}

#[test]
fn every_size_of_a_table_is_in_the_table_of_limits() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operate.md");
    let operate = fs::read_to_string(path).expect("docs/operate.md");
    let command = run();
    let sizes =
        command.get_arguments().filter_map(clap::Arg::get_long).filter(|flag| flag.starts_with("max-"));
    let missing: Vec<_> = sizes.filter(|flag| !operate.contains(&format!("| `--{flag}` |"))).collect();
    assert_eq!(missing, [""; 0]);
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
            Fate::Ignored(why) | Fate::IgnoredOf(_, why) => format!("no effect: {why}"),
            Fate::Header => "what the file is".to_owned(),
        };
        writeln!(text, "| `{field}` | {} |", cell(&here)).expect("memory");
    }
    documents::check("migrate.md", Some("fields"), &text);
}
