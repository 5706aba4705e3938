//! What `cluster` tells for health and metrics.

use crate::objects::ObjectName;

/// A port on which load balancers ask whether this node has endpoints of a Service. It claims nothing: it is the agent's
/// own, and two Services may ask for the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The Service.
    pub service: ObjectName,
    /// The port.
    pub port: u16,
    /// Addresses with a ready endpoint on this node, IPv4.
    pub local_endpoints_v4: u32,
    /// The same, IPv6.
    pub local_endpoints_v6: u32,
}

/// Service ports whose policy asks for local endpoints while there are only others, by that policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyCounts {
    /// `internalTrafficPolicy`.
    pub internal: u32,
    /// `externalTrafficPolicy`.
    pub external: u32,
}

/// Service ports that drop for want of local endpoints, by family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoLocalEndpoints {
    /// In IPv4.
    pub v4: PolicyCounts,
    /// In IPv6.
    pub v6: PolicyCounts,
}
