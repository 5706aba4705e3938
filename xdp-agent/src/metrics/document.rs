//! docs/metrics.md, from what is exported.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    time::{Duration, SystemTime},
};

use prometheus_client::{collector::Collector, encoding::DescriptorEncoder};
use tokio::sync::watch;
use xdp_common::verdict;

use super::{kube_proxy::Sync, *};
use crate::{
    cluster::wanted::{Ip6, Protocol, ServicePortName},
    devices::Transmit,
    documents,
    status::SyncState,
};

const HEAD: &str = "\
# Metrics

`http://127.0.0.1:10249/metrics` (`--metrics-bind-address`) has them in the text format of OpenMetrics. Written by
`XDP_AGENT_BLESS=1 cargo test -p xdp-agent --lib document`; do not edit it.
";

const SECTIONS: [(&str, &str); 3] = [
    ("xdp_agent_", "The agent and its programs"),
    ("kubeproxy_", "What means the same as in kube-proxy, under its names"),
    ("process_", "The process"),
];

/// Labels whose values come from the cluster or the host.
const OPEN_LABELS: [&str; 7] = ["backend", "interface", "namespace", "service", "port", "version", "le"];

/// Counters of programs that have counted nothing.
#[derive(Debug)]
struct Zeros;

impl Collector for Zeros {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        datapath::encode_counters(&mut encoder, &vec![0; verdict::COUNTERS as usize])?;
        exhausted::encode(&mut encoder, &Protocol::ALL.map(|protocol| (([0; 4], 0).into(), protocol, 0)))?;
        sockets::encode(&mut encoder, &sockets::zeros())
    }
}

/// Everything that is exported, with a sample of each.
fn exported() -> String {
    let (mut registries, metrics, kube_proxy) = Registries::new();
    registries.agent.register_collector(Box::new(Zeros));
    let _ = crate::watch::Metrics::register(&mut registries.agent);
    let _ = sockets::unread(&mut registries.agent);
    Accounts::register(&mut registries.agent, || {
        let text = String::new;
        let port =
            ServicePortName { namespace: text(), service: text(), port: text(), protocol: Protocol::Tcp };
        Protocol::ALL.map(|protocol| (ServicePortName { protocol, ..port.clone() }, 0, 0)).into()
    });
    Sync::register(&mut registries.kube_proxy, watch::channel(SyncState::default()).1);
    metrics.flows(&FlowCounts::default());
    metrics.fill::<[u8; 4]>(Fill::default());
    metrics.fill::<Ip6>(Fill::default());
    let sizes = Sizes { established: 0, embryonic: 0, frontends: 0, backends: 0, ring_slots: 0, networks: 0 };
    metrics.capacities::<[u8; 4]>(&sizes);
    metrics.capacities::<Ip6>(&sizes);
    metrics.problems([].iter());
    metrics.interfaces(&[InterfaceStatus {
        name: "eth0".to_owned(),
        ifindex: 2,
        mode: Mode::Generic,
        reason: String::new(),
        xmit: Transmit { transmit: false, redirect: false },
        addresses: Vec::new(),
    }]);
    for kind in ["service", "endpointslice", "node"] {
        metrics.objects.get_or_create(&[("kind", kind)]).set(0);
    }
    let now = SystemTime::UNIX_EPOCH;
    kube_proxy.queued(0, 0, now);
    kube_proxy.synced(Some(Duration::ZERO), Some(Duration::ZERO), now);
    for family in ["IPv4", "IPv6"] {
        kube_proxy.programmed(family, now, now);
    }
    registries.encode().expect("text")
}

/// A metric, as its lines tell.
#[derive(Debug, Default)]
struct Shown {
    help: String,
    kind: String,
    labels: BTreeSet<String>,
}

impl Shown {
    /// The name as queries have it.
    fn name(&self, name: &str) -> String {
        let suffix = match self.kind.as_str() {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        format!("{name}{suffix}")
    }
}

fn shown(text: &str) -> (BTreeMap<String, Shown>, BTreeMap<String, BTreeSet<String>>) {
    let mut metrics: BTreeMap<String, Shown> = BTreeMap::new();
    let mut values: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut current = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("a help text");
            current = name.to_owned();
            metrics.entry(current.clone()).or_default().help = help.trim_end_matches('.').to_owned() + ".";
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type");
            assert_eq!(name, current);
            metrics.entry(current.clone()).or_default().kind = kind.to_owned();
        } else if let Some((_, rest)) = line.split_once('{') {
            let (labels, _) = rest.rsplit_once('}').expect("labels");
            for label in labels.split(',') {
                let (name, value) = label.split_once('=').expect("a label");
                if name != "le" {
                    metrics.entry(current.clone()).or_default().labels.insert(name.to_owned());
                }
                if !OPEN_LABELS.contains(&name) {
                    let value = value.trim_matches('"').to_owned();
                    values.entry(format!("{current}.{name}")).or_default().insert(value);
                }
            }
        }
    }
    (metrics, values)
}

#[test]
fn the_document_of_metrics_is_what_is_exported() {
    let (metrics, values) = shown(&exported());
    for (prefix, names) in [
        ("xdp_agent_", Metrics::NAMES),
        ("xdp_agent_", SocketMetrics::NAMES),
        ("kubeproxy_", KubeProxy::NAMES),
    ] {
        for name in names {
            assert!(metrics.contains_key(&format!("{prefix}{name}")), "{name} has no sample here");
        }
    }
    let mut text = HEAD.to_owned();
    for (prefix, title) in SECTIONS {
        write!(text, "\n## {title}\n\n| metric | type | labels | tells |\n|---|---|---|---|\n")
            .expect("memory");
        for (name, metric) in metrics.iter().filter(|(name, _)| name.starts_with(prefix)) {
            let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
            let (name, kind, help) = (metric.name(name), &metric.kind, documents::cell(&metric.help));
            writeln!(text, "| `{name}` | {kind} | {} | {help} |", labels.join(" ")).expect("memory");
        }
    }
    text += "\n## Values of labels\n\n| metric | label | values |\n|---|---|---|\n";
    for (of, values) in values {
        let (metric, label) = of.split_once('.').expect("as above");
        let values: Vec<String> = values.iter().map(|value| format!("`{value}`")).collect();
        let metric = metrics[metric].name(metric);
        writeln!(text, "| `{metric}` | `{label}` | {} |", values.join(" ")).expect("memory");
    }
    documents::check("metrics.md", None, &text);
}
