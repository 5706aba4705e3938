//! Metrics: every one of the agent's own in one list, those that kube-proxy has too under its names, and what is read at
//! each scrape: the programs' counters, the accounts of services, the process.

use std::fmt;

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::Registry,
};

use crate::{
    cluster::wanted::IpAddress,
    config::Sizes,
    devices::Mode,
    plan::Fill,
    problem::{Problem, ProblemKind},
    status::{FlowCounts, InterfaceStatus},
};

pub use accounts::Accounts;
pub use datapath::Datapath;
pub use exhausted::Exhausted;
pub use kube_proxy::KubeProxy;
pub use slis::Slis;
pub use sockets::SocketMetrics;

pub mod accounts;
pub mod datapath;
#[cfg(test)]
mod document;
pub mod exhausted;
pub mod kube_proxy;
pub mod process;
pub mod slis;
pub mod sockets;

/// One fact of a closed set.
type Label = [(&'static str, &'static str); 1];

/// Declares the metrics once: field, name, and the doc comment as the help text.
macro_rules! metrics {
    ($(#[$meta:meta])* pub struct $name:ident {
        $($(#[doc = $doc:literal])* $field:ident: $ty:ty = ($metric:literal, $new:expr),)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug)]
        pub struct $name { $($(#[doc = $doc])* pub $field: $ty,)* }

        impl $name {
            /// The names, without what stands before and behind.
            #[cfg(test)]
            pub(in crate::metrics) const NAMES: &[&str] = &[$($metric),*];

            fn register(registry: &mut Registry) -> Self {
                let metrics = Self { $($field: $new,)* };
                $(registry.register($metric, help(concat!($($doc),*)), metrics.$field.clone());)*
                metrics
            }
        }
    };
}

use metrics;

metrics! {
    /// What the agent measures of itself.
    pub struct Metrics {
        /// Entries in a table.
        table_entries: Family<TableLabels, Gauge> = ("table_entries", Family::default()),
        /// Entries a table has room for.
        table_capacity: Family<TableLabels, Gauge> = ("table_capacity", Family::default()),
        /// Flows by state.
        flow_states: Family<Label, Gauge> = ("flows", Family::default()),
        /// Entries of flow tables removed because their flow was over.
        gc_removed: Counter = ("gc_removed", Counter::default()),
        /// Looks at the flow tables that failed.
        gc_failures: Counter = ("gc_failures", Counter::default()),
        /// How XDP runs on an interface: 1 for its mode.
        attach_mode: Family<InterfaceMode, Gauge> = ("attach_mode", Family::default()),
        /// Attachments that failed while running.
        attach_failures: Counter = ("attach_failures", Counter::default()),
        /// Time from a change of the objects or the node to its last map write, in seconds.
        sync_duration: Histogram = ("sync_duration_seconds", Histogram::new(exponential_buckets(0.0001, 2.0, 18))),
        /// Writes to maps.
        map_writes: Counter = ("map_writes", Counter::default()),
        /// Writes to maps that the kernel refused; they are repeated.
        map_write_failures: Counter = ("map_write_failures", Counter::default()),
        /// Differences between maps and plan that the periodic comparison has mended.
        repairs: Counter = ("repairs", Counter::default()),
        /// What cannot be done as the objects ask, by kind.
        problems: Family<Label, Gauge> = ("problems", Family::default()),
        /// Routing epoch: how often next hops had to be asked for again.
        epoch: Gauge = ("routing_epoch", Gauge::default()),
        /// Objects that are followed, by kind.
        objects: Family<Label, Gauge> = ("objects", Family::default()),
        /// Service ports that are served, of the address family that has more of them.
        services: Gauge = ("services", Gauge::default()),
    }
}

/// An interface, of those that the flags name, and one of the modes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct InterfaceMode {
    interface: String,
    mode: &'static str,
}

/// A table, by address family.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TableLabels {
    table: &'static str,
    ip_family: &'static str,
}

impl TableLabels {
    fn of<A: IpAddress>(table: &'static str) -> Self {
        Self { table, ip_family: A::FAMILY }
    }
}

impl Metrics {
    /// Writes how many flows there are.
    pub fn flows(&self, counts: &FlowCounts) {
        for (state, flows) in [
            ("tcp", counts.tcp),
            ("tcp_closing", counts.tcp_closing),
            ("udp", counts.udp),
            ("sctp", counts.sctp),
            ("embryonic", counts.embryonic),
        ] {
            self.flow_states.get_or_create(&[("state", state)]).set(flows.into());
        }
        self.gc_removed.inc_by(counts.removed.into());
    }

    /// Writes how full the flow tables of a family are.
    pub fn flow_tables<A: IpAddress>(&self, counts: &FlowCounts) {
        self.entries::<A>("established", counts.established_entries);
        self.entries::<A>("embryonic", counts.embryonic_entries);
    }

    fn entries<A: IpAddress>(&self, table: &'static str, entries: u32) {
        self.table_entries.get_or_create(&TableLabels::of::<A>(table)).set(entries.into());
    }

    /// Writes how full the maps of the image of a family are.
    pub fn fill<A: IpAddress>(&self, fill: Fill) {
        for (table, entries) in [
            ("frontends", fill.frontends),
            ("backends", fill.backends),
            ("ring_slots", fill.ring_slots),
            ("networks", fill.networks),
        ] {
            self.entries::<A>(table, entries);
        }
    }

    /// Writes how much the maps of a family have room for.
    pub fn capacities<A: IpAddress>(&self, sizes: &Sizes) {
        for (table, entries) in [
            ("established", sizes.established),
            ("embryonic", sizes.embryonic),
            ("frontends", sizes.frontends),
            ("backends", sizes.backends),
            ("ring_slots", sizes.ring_slots),
            ("networks", sizes.networks),
        ] {
            self.table_capacity.get_or_create(&TableLabels::of::<A>(table)).set(entries.into());
        }
    }

    /// Writes how XDP runs on the interfaces.
    pub fn interfaces(&self, interfaces: &[InterfaceStatus]) {
        // Overlays go for good.
        self.attach_mode.clear();
        for interface in interfaces {
            for mode in Mode::ALL {
                let labels = InterfaceMode { interface: interface.name.clone(), mode: mode.label() };
                self.attach_mode.get_or_create(&labels).set((mode == interface.mode).into());
            }
        }
    }

    /// Writes how many problems there are of each kind.
    pub fn problems<'a>(&self, problems: impl Iterator<Item = &'a Problem> + Clone) {
        for kind in ProblemKind::ALL {
            let count = problems.clone().filter(|problem| problem.kind == kind).count();
            self.problems.get_or_create(&[("kind", kind.label())]).set(count as i64);
        }
    }
}

/// Everything that is exported, by what its names begin with.
#[derive(Debug)]
pub struct Registries {
    /// `xdp_agent_`: the agent's own.
    pub agent: Registry,
    /// `kubeproxy_`: what means the same there.
    pub kube_proxy: Registry,
    /// `process_`: as Prometheus' client libraries have it.
    pub process: Registry,
}

impl Registries {
    /// Registries with everything in them that the agent measures of itself.
    pub fn new() -> (Self, Metrics, KubeProxy) {
        let mut agent = Registry::with_prefix("xdp_agent");
        let build = [("version", env!("CARGO_PKG_VERSION")), ("revision", crate::REVISION)];
        agent.register(
            "build",
            "Version of the agent, and the commit a release is built from",
            Info::new(build),
        );
        let metrics = Metrics::register(&mut agent);
        let mut kube_proxy = Registry::with_prefix("kubeproxy");
        let of_kube_proxy = KubeProxy::new(&mut kube_proxy);
        let mut process = Registry::with_prefix("process");
        process.register_collector(Box::new(process::Process));
        (Self { agent, kube_proxy, process }, metrics, of_kube_proxy)
    }

    /// Everything in the text format of OpenMetrics.
    ///
    /// # Errors
    /// Never in practice: the text goes into a string.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut encoded = String::new();
        for registry in [&self.agent, &self.kube_proxy, &self.process] {
            text::encode_registry(&mut encoded, registry)?;
        }
        text::encode_eof(&mut encoded)?;
        Ok(encoded)
    }
}

/// A doc comment as a help text: one line; the format adds the full stop.
fn help(doc: &str) -> String {
    doc.trim().trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_has_exactly_one_mode() {
        let (registries, metrics, _) = Registries::new();
        let interface = InterfaceStatus {
            name: "eth0".to_owned(),
            ifindex: 2,
            mode: Mode::Generic,
            reason: String::new(),
            xmit: crate::devices::Transmit { transmit: true, redirect: false },
            addresses: Vec::new(),
        };
        metrics.interfaces(&[interface]);
        let text = registries.encode().expect("text");
        let ones: Vec<&str> =
            text.lines().filter(|line| line.contains("attach_mode{") && line.ends_with(" 1")).collect();
        assert_eq!(ones, ["xdp_agent_attach_mode{interface=\"eth0\",mode=\"generic\"} 1"]);
    }
}
