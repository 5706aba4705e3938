//! The resolved configuration as JSON, for `/configz`.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::{Config, Listen, ObjectSource, Sizes, Timeouts};
use crate::cluster::{DetectLocal, NodePortAddresses, Options};

impl Config {
    /// Everything, under the names of the flags.
    pub fn to_json(&self) -> Value {
        // Taken apart whole, so that nothing new is forgotten here.
        let Self {
            interfaces,
            overlays,
            source,
            cluster,
            mode,
            listen,
            service_metrics,
            pin_dir,
            keep,
            fresh,
            snat_ports,
            echo,
            reset_on_endpoint_removal,
            reserve_ports,
            sizes,
            timeouts,
            sockets,
        } = self;
        let Options {
            node,
            detect_local,
            masquerade_all,
            nodeport_addresses,
            service_cidrs,
            node_ips,
            zone,
            forwarding,
        } = cluster;
        let Listen { healthz, metrics, is_hard_fail } = listen;
        let Sizes { established, embryonic, frontends, backends, ring_slots, networks } = sizes;
        let Timeouts { tcp_established, tcp_half_closed, tcp_closed, udp, sctp_established, sctp_closed: _ } =
            timeouts;
        let (services, kubeconfig, master) = match source {
            ObjectSource::Files(paths) => (Some(paths), None, None),
            ObjectSource::Kubernetes { kubeconfig, master } => (None, kubeconfig.as_ref(), master.as_ref()),
        };
        let seconds = |time: &u32| format!("{time}s");
        let mut all = json!({
            "services": services,
            "kubeconfig": kubeconfig,
            "master": master,
            "node": node,
            "node-ip": node_ips,
            "zone": zone,
            "nodeport-addresses": match nodeport_addresses {
                NodePortAddresses::Primary => json!("primary"),
                NodePortAddresses::Cidrs(networks) => texts(networks),
            },
            "service-cidr": texts(service_cidrs),
            "detect-local-mode": match detect_local {
                DetectLocal::None => Value::Null,
                DetectLocal::ClusterCidr(networks) => json!({ "ClusterCIDR": texts(networks) }),
                DetectLocal::NodeCidr => json!({ "NodeCIDR": null }),
                DetectLocal::BridgeInterface(name) => json!({ "BridgeInterface": name }),
                DetectLocal::InterfaceNamePrefix(prefix) => json!({ "InterfaceNamePrefix": prefix }),
            },
            "masquerade-all": masquerade_all,
            "forwarding": format!("{forwarding:?}").to_lowercase(),
            "echo": echo,
            "reset-on-endpoint-removal": reset_on_endpoint_removal,
            "iface": interfaces,
            "overlays": overlays,
            "mode": format!("{mode:?}").to_lowercase(),
            "snat-ports": snat_ports.to_string(),
            "reserve-ports": reserve_ports,
            "pin-dir": pin_dir,
            "keep": keep,
            "fresh": fresh,
            "healthz-bind-address": healthz,
            "metrics-bind-address": metrics,
            "bind-address-hard-fail": is_hard_fail,
            "service-metrics": service_metrics,
            "max-established": established,
            "max-embryonic": embryonic,
            "max-frontends": frontends,
            "max-backends": backends,
            "max-ring-slots": ring_slots,
            "max-networks": networks,
            "tcp-established-timeout": seconds(tcp_established),
            "tcp-half-closed-timeout": seconds(tcp_half_closed),
            "tcp-closed-timeout": seconds(tcp_closed),
            "udp-timeout": seconds(udp),
            "sctp-timeout": seconds(sctp_established),
        });
        for (name, value) in sockets.to_json() {
            all[name] = value;
        }
        all
    }
}

fn texts(networks: &[(IpAddr, u8)]) -> Value {
    networks.iter().map(|(addr, len)| format!("{addr}/{len}")).collect()
}
