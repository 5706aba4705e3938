//! Flags of kube-proxy that have no effect here: they are taken, so that its command lines work, and explained.

use clap::{
    Arg, ArgAction, ArgMatches, Command,
    builder::{PossibleValue, PossibleValuesParser},
    parser::ValueSource,
};

use super::values;

/// A flag of kube-proxy that has no effect.
#[derive(Debug, PartialEq, Eq)]
pub struct Ignored {
    /// Its name, without dashes.
    pub flag: &'static str,
    /// Whether it may stand without a value.
    is_switch: bool,
    /// The values that kube-proxy takes, if it is one of a few: a slip of the pen is one here too.
    one_of: &'static [&'static str],
    /// Whether it asks for something else than to run, so that running would be wrong.
    pub(super) is_refused: bool,
    /// Why it has no effect, and what to use instead.
    pub why: &'static str,
}

const fn value(flag: &'static str, why: &'static str) -> Ignored {
    Ignored { flag, is_switch: false, one_of: &[], is_refused: false, why }
}

const fn one_of(flag: &'static str, one_of: &'static [&'static str], why: &'static str) -> Ignored {
    Ignored { flag, is_switch: false, one_of, is_refused: false, why }
}

const fn switch(flag: &'static str, why: &'static str) -> Ignored {
    Ignored { flag, is_switch: true, one_of: &[], is_refused: false, why }
}

const fn refused(flag: &'static str, why: &'static str) -> Ignored {
    Ignored { flag, is_switch: false, one_of: &[], is_refused: true, why }
}

/// kube-proxy's modes on Linux.
pub(super) const PROXY_MODES: &[&str] = &["iptables", "ipvs", "nftables"];
pub(super) const ONE_DATAPATH: &str = "there is one datapath, which behaves as kube-proxy's nftables mode";
pub(super) const NO_NETFILTER: &str = "no packet is marked and no netfilter rule written";
pub(super) const NO_SYNC: &str = "changes are written as they come; nothing is synchronised by the clock";
pub(super) const NO_IPVS: &str = "there is no IPVS here";
pub(super) const MAGLEV: &str = "backends are chosen by consistent hashing (Maglev)";
pub(super) const NO_LOCALHOST: &str = "NodePorts are served on the loopback with --localhost-nodeports only: the default is that of the nftables mode";
pub(super) const OWN_TABLE: &str =
    "flows are not in the kernel's conntrack table; --max-established sets the size of ours";
pub(super) const LIBERAL: &str =
    "sequence numbers are not checked, so that packets out of window are always translated";
pub(super) const UNANSWERED: &str =
    "unanswered flows give way to newer ones; --udp-timeout is for the answered";
pub(super) const NO_RESYNC: &str = "objects are watched; they are listed anew only when a watch breaks";
pub(super) const OWN_CLIENT: &str = "one list and one watch per kind need no limit; objects come as JSON";
pub(super) const NO_GATES: &str = "there are no feature gates";
pub(super) const NO_PPROF: &str = "there are no Go profiles; use perf";
pub(super) const NO_HIDDEN: &str = "no metric is hidden";
pub(super) const OOM: &str =
    "the service manager sets it: OOMScoreAdjust= of systemd, the QoS class or priority of a pod";
const LOGGING: &str = "use --log and --log-format";

/// Every one of them.
pub const IGNORED: &[Ignored] = &[
    refused("write-config-to", "no file is written; a running agent shows its configuration at /configz"),
    one_of("proxy-mode", PROXY_MODES, ONE_DATAPATH),
    value("iptables-masquerade-bit", NO_NETFILTER),
    switch("iptables-localhost-nodeports", NO_LOCALHOST),
    value("iptables-sync-period", NO_SYNC),
    value("iptables-min-sync-period", NO_SYNC),
    value("ipvs-scheduler", MAGLEV),
    value("ipvs-exclude-cidrs", NO_IPVS),
    switch("ipvs-strict-arp", NO_IPVS),
    value("ipvs-tcp-timeout", "use --tcp-established-timeout"),
    value("ipvs-tcpfin-timeout", "use --tcp-half-closed-timeout"),
    value("ipvs-udp-timeout", "use --udp-timeout"),
    value("ipvs-sync-period", NO_SYNC),
    value("ipvs-min-sync-period", NO_SYNC),
    value("oom-score-adj", OOM),
    value("conntrack-max-per-core", OWN_TABLE),
    value("conntrack-min", OWN_TABLE),
    switch("conntrack-tcp-be-liberal", LIBERAL),
    value("conntrack-udp-timeout", UNANSWERED),
    value("config-sync-period", NO_RESYNC),
    value("kube-api-qps", OWN_CLIENT),
    value("kube-api-burst", OWN_CLIENT),
    value("kube-api-content-type", OWN_CLIENT),
    value("feature-gates", NO_GATES),
    switch("profiling", NO_PPROF),
    value("show-hidden-metrics-for-version", NO_HIDDEN),
    value("healthz-port", "use --healthz-bind-address"),
    value("metrics-port", "use --metrics-bind-address"),
    value("proxy-port-range", "no port of the node is listened on for Services"),
    value("v", LOGGING),
    value("vmodule", LOGGING),
    one_of("logging-format", &["text", "json"], LOGGING),
    value("log-flush-frequency", LOGGING),
    value("log-json-info-buffer-size", LOGGING),
    switch("log-json-split-stream", LOGGING),
    value("log-text-info-buffer-size", LOGGING),
    switch("log-text-split-stream", LOGGING),
];

/// Those that were given.
#[derive(Clone, Debug, Default)]
pub struct Given(pub Vec<&'static Ignored>);

impl clap::FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let is_given =
            |ignored: &&Ignored| matches.value_source(ignored.flag) == Some(ValueSource::CommandLine);
        Ok(Self(IGNORED.iter().filter(is_given).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl clap::Args for Given {
    fn augment_args(command: Command) -> Command {
        IGNORED.iter().fold(command, |command, ignored| {
            let arg = Arg::new(ignored.flag).long(ignored.flag).hide(true).action(ArgAction::Append);
            // klog's verbosity is the one that has a short form.
            let arg = if ignored.flag.len() == 1 { arg.short(ignored.flag.chars().next()) } else { arg };
            command.arg(if ignored.is_switch {
                let arg = arg.value_parser(values::switch);
                arg.num_args(0..=1).require_equals(true).default_missing_value("true")
            } else if !ignored.one_of.is_empty() {
                // An empty value says nothing, as templates write it.
                let values = ignored.one_of.iter().map(PossibleValue::new);
                arg.value_parser(PossibleValuesParser::new(values.chain([PossibleValue::new("").hide(true)])))
            } else {
                // --oom-score-adj -999
                arg.allow_hyphen_values(true)
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}
