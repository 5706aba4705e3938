//! What `deploy/` holds, against Kubernetes' types, the agent's own flags and metrics, and the documents that it points to.
//!
//! Part of the host lane: nothing is applied, and neither root nor a network is needed.

#[path = "deploy/files.rs"]
mod files;

#[path = "deploy/agent.rs"]
mod agent;
#[path = "deploy/documents.rs"]
mod documents;
#[path = "deploy/kustomize.rs"]
mod kustomize;
#[path = "deploy/monitoring.rs"]
mod monitoring;
#[path = "deploy/objects.rs"]
mod objects;
