//! Real traffic through the agent, in network namespaces: native and generic mode, checksum offload on and off.
//!
//! Needs root, the agent's binary and its BPF object, and fails with what to do when one is missing. It is built and run
//! only when asked for: `cargo test -p xdp-agent-tests --features netns --test netns`.

#[macro_use]
#[path = "netns/setup.rs"]
mod setup;

#[path = "netns/affinity.rs"]
mod affinity;
#[path = "netns/bad_input.rs"]
mod bad_input;
#[path = "netns/callers.rs"]
mod callers;
#[path = "netns/clean_host.rs"]
mod clean_host;
#[path = "netns/dead_backends.rs"]
mod dead_backends;
#[path = "netns/direct.rs"]
mod direct;
#[path = "netns/dual.rs"]
mod dual;
#[path = "netns/explain.rs"]
mod explain;
#[path = "netns/fragments.rs"]
mod fragments;
#[path = "netns/full_maps.rs"]
mod full_maps;
#[path = "netns/hairpin.rs"]
mod hairpin;
#[path = "netns/icmp.rs"]
mod icmp;
#[path = "netns/idle_flows.rs"]
mod idle_flows;
#[path = "netns/ipv6.rs"]
mod ipv6;
#[path = "netns/layered.rs"]
mod layered;
#[path = "netns/lost_addresses.rs"]
mod lost_addresses;
#[path = "netns/many_connections.rs"]
mod many_connections;
#[path = "netns/neighbours.rs"]
mod neighbours;
#[path = "netns/no_agent.rs"]
mod no_agent;
#[path = "netns/no_hooks.rs"]
mod no_hooks;
#[path = "netns/not_ours.rs"]
mod not_ours;
#[path = "netns/odd_devices.rs"]
mod odd_devices;
#[path = "netns/on_and_off.rs"]
mod on_and_off;
#[path = "netns/overlays.rs"]
mod overlays;
#[path = "netns/pod_devices.rs"]
mod pod_devices;
#[path = "netns/pods_v6.rs"]
mod pods_v6;
#[path = "netns/policies.rs"]
mod policies;
#[path = "netns/real_clients.rs"]
mod real_clients;
#[path = "netns/reserved_ports.rs"]
mod reserved_ports;
#[path = "netns/restart.rs"]
mod restart;
#[path = "netns/rings.rs"]
mod rings;
#[path = "netns/same_port.rs"]
mod same_port;
#[path = "netns/sctp.rs"]
mod sctp;
#[path = "netns/seen.rs"]
mod seen;
#[path = "netns/shares.rs"]
mod shares;
#[path = "netns/slow_path.rs"]
mod slow_path;
#[path = "netns/sockets.rs"]
mod sockets;
#[path = "netns/sockets_over_time.rs"]
mod sockets_over_time;
#[path = "netns/sockets_stranded.rs"]
mod sockets_stranded;
#[path = "netns/sockets_v6.rs"]
mod sockets_v6;
#[path = "netns/the_lab.rs"]
mod the_lab;
#[path = "netns/traffic.rs"]
mod traffic;
#[path = "netns/two_backends.rs"]
mod two_backends;
#[path = "netns/two_networks.rs"]
mod two_networks;
#[path = "netns/unnumbered.rs"]
mod unnumbered;
#[path = "netns/ways.rs"]
mod ways;
