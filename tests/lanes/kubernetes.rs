//! The agent's binary against an API server: the tests' own for every run, and kube-apiserver with etcd where
//! `KUBEBUILDER_ASSETS` names their directory, as envtest has it.
//!
//! Needs root, the agent's binary and its BPF object, and fails with what to do when one is missing: `cargo test -p
//! xdp-agent-tests --features kubernetes --test kubernetes`.

#[path = "kubernetes/churn.rs"]
mod churn;
#[path = "kubernetes/hostile.rs"]
mod hostile;
#[path = "kubernetes/image.rs"]
mod image;
#[path = "kubernetes/objects.rs"]
mod objects;
#[path = "kubernetes/outage.rs"]
mod outage;
#[path = "kubernetes/real.rs"]
mod real;
#[path = "kubernetes/setup.rs"]
mod setup;
