//! The lab in which the agent is tested and shown: namespaces, links, servers, clients, frames and the agent itself.
//!
//! Everything lives in anonymous network namespaces that exist only as file descriptors of this process, so nothing is
//! left behind, however the process ends.

pub mod lab;
