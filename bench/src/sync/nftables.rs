//! The rules of kube-proxy 1.36 in nftables mode, loaded by `nft -f -` as it does: one transaction of commands.
//!
//! Since 1.36 endpoints without session affinity have no chains of their own; earlier releases load many times as long.

use std::fmt::Write;

use super::world::{self, NODE_ADDRESS, POD_CIDR, PORT, Replacement, SERVICE_CIDR, TARGET_PORT, World};

const BASE_CHAINS: [(&str, &str); 8] = [
    ("filter-prerouting-pre-dnat", "type filter hook prerouting priority -110"),
    ("filter-output-pre-dnat", "type filter hook output priority -110"),
    ("nat-prerouting", "type nat hook prerouting priority -100"),
    ("nat-output", "type nat hook output priority -100"),
    ("filter-input", "type filter hook input priority 0"),
    ("filter-forward", "type filter hook forward priority 0"),
    ("filter-output", "type filter hook output priority 0"),
    ("nat-postrouting", "type nat hook postrouting priority 100"),
];

const CHAINS: [&str; 7] = [
    "services",
    "masquerading",
    "service-endpoints-check",
    "nodeport-endpoints-check",
    "firewall-check",
    "cluster-ips-check",
    "reject-chain",
];

const JUMPS: [&str; 11] = [
    "filter-input ct state new jump nodeport-endpoints-check",
    "filter-input ct state new jump service-endpoints-check",
    "filter-forward ct state new jump service-endpoints-check",
    "filter-forward ct state new jump cluster-ips-check",
    "filter-output ct state new jump service-endpoints-check",
    "filter-output ct state new jump cluster-ips-check",
    "filter-prerouting-pre-dnat ct state new jump firewall-check",
    "filter-output-pre-dnat ct state new jump firewall-check",
    "nat-prerouting jump services",
    "nat-output jump services",
    "nat-postrouting jump masquerading",
];

const SETS: [&str; 8] = [
    "set ip kube-proxy cluster-ips { type ipv4_addr ; comment \"Active ClusterIPs\" ; }",
    "set ip kube-proxy nodeport-ips { type ipv4_addr ; comment \"IPs that accept NodePort traffic\" ; }",
    "set ip kube-proxy hairpin-connections { type ipv4_addr . ipv4_addr . inet_proto . inet_service ; comment \"service hairpin connections\" ; }",
    "map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict ; }",
    "map ip kube-proxy no-endpoint-nodeports { type inet_proto . inet_service : verdict ; }",
    "map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }",
    "map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; comment \"ClusterIP, ExternalIP and LoadBalancer IP traffic\" ; }",
    "map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; comment \"NodePort traffic\" ; }",
];

/// The transaction of a full sync.
pub(super) fn load(world: &World) -> Result<String, std::fmt::Error> {
    let mut script = String::new();
    top(&mut script)?;
    for service in world.services() {
        chains(&mut script, service)?;
        elements(&mut script, service)?;
        rules(&mut script, world, service)?;
        for pod in world.pods(service).iter().filter(|&&pod| world.is_local(pod)) {
            hairpin(&mut script, world, "add", *pod)?;
        }
    }
    Ok(script)
}

/// The transaction after one endpoint of a Service was replaced: elements by what changed, chains of that Service anew.
pub(super) fn change(world: &World, replaced: &Replacement) -> Result<String, std::fmt::Error> {
    let mut script = String::new();
    chains(&mut script, replaced.service)?;
    rules(&mut script, world, replaced.service)?;
    for (verb, pod) in [("delete", replaced.gone), ("add", replaced.pod)] {
        if world.is_local(pod) {
            hairpin(&mut script, world, verb, pod)?;
        }
    }
    Ok(script)
}

fn top(script: &mut String) -> std::fmt::Result {
    writeln!(script, "add table ip kube-proxy {{ comment \"rules for kube-proxy\" ; }}")?;
    for (name, hook) in BASE_CHAINS {
        writeln!(script, "add chain ip kube-proxy {name} {{ {hook} ; }}\nflush chain ip kube-proxy {name}")?;
    }
    for name in CHAINS {
        chain(script, name)?;
    }
    for jump in JUMPS {
        rule(script, jump)?;
    }
    for set in SETS {
        writeln!(script, "add {set}")?;
    }
    let (pods, pod_bits) = POD_CIDR;
    let (services, service_bits) = SERVICE_CIDR;
    writeln!(script, "add element ip kube-proxy nodeport-ips {{ {NODE_ADDRESS} }}")?;
    rule(script, "masquerading mark and 0x4000 != 0 mark set mark xor 0x4000 masquerade fully-random")?;
    rule(
        script,
        "masquerading ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random",
    )?;
    rule(
        script,
        &format!("services ip daddr @cluster-ips ip saddr != {pods}/{pod_bits} mark set mark or 0x4000"),
    )?;
    rule(script, "services ip daddr . meta l4proto . th dport vmap @service-ips")?;
    rule(script, "services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports")?;
    rule(script, "firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips")?;
    rule(script, "service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services")?;
    rule(
        script,
        "nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports",
    )?;
    rule(script, "reject-chain reject")?;
    rule(script, "cluster-ips-check ip daddr @cluster-ips reject")?;
    rule(script, &format!("cluster-ips-check ip daddr {{ {services}/{service_bits} }} drop"))
}

/// Makes the chains of a Service, or empties them.
fn chains(script: &mut String, service: u32) -> std::fmt::Result {
    let base = chain_base(service);
    chain(script, &format!("service-{base}"))?;
    if world::node_port(service).is_some() {
        chain(script, &format!("external-{base}"))?;
    }
    Ok(())
}

fn elements(script: &mut String, service: u32) -> std::fmt::Result {
    let (ip, base) = (world::cluster_ip(service), chain_base(service));
    writeln!(script, "add element ip kube-proxy cluster-ips {{ {ip} }}")?;
    writeln!(
        script,
        "add element ip kube-proxy service-ips {{ {ip} . tcp . {PORT} : goto service-{base} }}"
    )?;
    let Some(port) = world::node_port(service) else { return Ok(()) };
    writeln!(script, "add element ip kube-proxy service-nodeports {{ tcp . {port} : goto external-{base} }}")
}

fn rules(script: &mut String, world: &World, service: u32) -> std::fmt::Result {
    let base = chain_base(service);
    if world::node_port(service).is_some() {
        rule(script, &format!("external-{base} mark set mark or 0x4000"))?;
        rule(script, &format!("external-{base} goto service-{base}"))?;
    }
    let pods = world.pods(service);
    if let [pod] = pods {
        let address = world.pod_address(*pod);
        return rule(script, &format!("service-{base} meta l4proto tcp dnat to {address}:{TARGET_PORT}"));
    }
    let targets: Vec<String> = (0..)
        .zip(pods)
        .map(|(at, pod): (u32, _)| format!("{at} : {} . {TARGET_PORT}", world.pod_address(*pod)))
        .collect();
    let targets = targets.join(" , ");
    let count = pods.len();
    rule(
        script,
        &format!("service-{base} meta l4proto tcp dnat ip to numgen random mod {count} map {{ {targets} }}"),
    )
}

fn hairpin(script: &mut String, world: &World, verb: &str, pod: u32) -> std::fmt::Result {
    let address = world.pod_address(pod);
    writeln!(
        script,
        "{verb} element ip kube-proxy hairpin-connections {{ {address} . {address} . tcp . {TARGET_PORT} }}"
    )
}

fn chain(script: &mut String, name: &str) -> std::fmt::Result {
    writeln!(script, "add chain ip kube-proxy {name}\nflush chain ip kube-proxy {name}")
}

fn rule(script: &mut String, rule: &str) -> std::fmt::Result {
    writeln!(script, "add rule ip kube-proxy {rule}")
}

fn chain_base(service: u32) -> String {
    let hash = &world::hash("service", service, 0)[..8];
    format!("{hash}-{}/{}/tcp/http", world::namespace(service), world::name(service))
}
