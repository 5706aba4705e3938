//! Health-check node ports: load balancers ask there whether this node has endpoints of a Service.
