//! The agent of a node: from Kubernetes objects to BPF maps.
//!
//! [`app`] wires everything. [`manifests`] reads objects, [`cluster`] says what should be, [`plan`] how to get there, and
//! [`reconcile`] writes it into [`maps`]. [`attach`] puts the programs on the interfaces, [`neighbours`] follows the
//! kernel's network, [`gc`] ends flows that are over. [`serve`] tells people and Prometheus about all of it,
//! [`health`] tells load balancers where Services have endpoints. [`cleanup`] removes what an agent has left, [`doctor`]
//! tells whether one could run.

pub mod app;
pub mod attach;
pub mod bpf;
pub mod cgroup;
pub mod cleanup;
pub mod cluster;
pub mod config;
pub mod devices;
pub mod doctor;
#[cfg(test)]
mod documents;
pub mod explain;
pub mod fragments;
pub mod gc;
pub mod health;
pub mod host;
pub mod interfaces;
pub mod manifests;
pub mod maps;
pub mod metrics;
pub mod names;
pub mod neighbours;
pub mod netdev;
pub mod netlink;
pub mod objects;
pub mod pins;
pub mod plan;
pub mod preflight;
pub mod problem;
pub mod reconcile;
pub mod reserved;
pub mod serve;
pub mod sockets;
pub mod source;
pub mod status;
pub mod watch;

/// The commit that a released agent is built from; `unknown` in one that `cargo xtask dist` has not built.
pub const REVISION: &str = env!("XDP_AGENT_REVISION");

/// Version and revision, as people read them.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (revision ", env!("XDP_AGENT_REVISION"), ")");
