//! The rules of kube-proxy in iptables mode, loaded by `iptables-restore` as it does: a full restore first, then, as since
//! 1.26, only the chains of changed Services beside the shared ones, which name every Service.

use std::fmt::Write;

use super::world::{self, POD_CIDR, PORT, Replacement, TARGET_PORT, World};

/// Options of every restore.
pub(super) const OPTIONS: [&str; 4] = ["-w", "5", "--noflush", "--counters"];

/// What kube-proxy makes once, one command each, before the first restore.
pub(super) const JUMPS: &str = "\
*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
COMMIT
*nat
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
COMMIT
";

/// Chains and rules that every restore writes anew.
const FILTER: &str = "\
*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";
const NAT_CHAINS: &str = "\
*nat
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
";
const NAT_RULES: &str = "\
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
";
const NAT_END: &str = "\
-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
";

/// The input of a full sync.
pub(super) fn load(world: &World) -> Result<String, std::fmt::Error> {
    restore(world, world.services())
}

/// The input after one endpoint of a Service was replaced. The chain of the endpoint that went stays behind, as it does
/// in clusters of more than 1,000 endpoints until the periodic sync.
pub(super) fn change(world: &World, replaced: &Replacement) -> Result<String, std::fmt::Error> {
    restore(world, replaced.service..replaced.service + 1)
}

fn restore(world: &World, changed: std::ops::Range<u32>) -> Result<String, std::fmt::Error> {
    let mut text = [FILTER, NAT_CHAINS].concat();
    for service in changed.clone() {
        chains(&mut text, world, service)?;
    }
    text.push_str(NAT_RULES);
    for service in world.services() {
        let (hash, name, ip) = (svc(service), world::port_name(service), world::cluster_ip(service));
        writeln!(
            text,
            "-A KUBE-SERVICES -m comment --comment \"{name} cluster IP\" -m tcp -p tcp -d {ip} --dport {PORT} -j KUBE-SVC-{hash}"
        )?;
        if let Some(port) = world::node_port(service) {
            writeln!(
                text,
                "-A KUBE-NODEPORTS -m comment --comment {name} -m tcp -p tcp --dport {port} -j KUBE-EXT-{hash}"
            )?;
        }
        if changed.contains(&service) {
            rules(&mut text, world, service)?;
        }
    }
    text.push_str(NAT_END);
    Ok(text)
}

fn chains(text: &mut String, world: &World, service: u32) -> std::fmt::Result {
    let hash = svc(service);
    writeln!(text, ":KUBE-SVC-{hash} - [0:0]")?;
    if world::node_port(service).is_some() {
        writeln!(text, ":KUBE-EXT-{hash} - [0:0]")?;
    }
    for &pod in world.pods(service) {
        writeln!(text, ":KUBE-SEP-{} - [0:0]", sep(service, pod))?;
    }
    Ok(())
}

/// The rules of one Service, without the comments that kube-proxy leaves out beyond 1,000 endpoints.
fn rules(text: &mut String, world: &World, service: u32) -> std::fmt::Result {
    let (hash, name, ip) = (svc(service), world::port_name(service), world::cluster_ip(service));
    let (pods, bits) = POD_CIDR;
    writeln!(
        text,
        "-A KUBE-SVC-{hash} -m comment --comment \"{name} cluster IP\" -m tcp -p tcp -d {ip} --dport {PORT} ! -s {pods}/{bits} -j KUBE-MARK-MASQ"
    )?;
    if world::node_port(service).is_some() {
        writeln!(
            text,
            "-A KUBE-EXT-{hash} -m comment --comment \"masquerade traffic for {name} external destinations\" -j KUBE-MARK-MASQ"
        )?;
        writeln!(text, "-A KUBE-EXT-{hash} -j KUBE-SVC-{hash}")?;
    }
    let pods = world.pods(service);
    for (at, &pod) in pods.iter().enumerate() {
        let sep = sep(service, pod);
        match pods.len() - at {
            1 => writeln!(text, "-A KUBE-SVC-{hash} -j KUBE-SEP-{sep}")?,
            left => writeln!(
                text,
                "-A KUBE-SVC-{hash} -m statistic --mode random --probability {:.10} -j KUBE-SEP-{sep}",
                1.0 / left as f64
            )?,
        }
    }
    for &pod in pods {
        let (sep, address) = (sep(service, pod), world.pod_address(pod));
        writeln!(text, "-A KUBE-SEP-{sep} -s {address} -j KUBE-MARK-MASQ")?;
        writeln!(text, "-A KUBE-SEP-{sep} -m tcp -p tcp -j DNAT --to-destination {address}:{TARGET_PORT}")?;
    }
    Ok(())
}

fn svc(service: u32) -> String {
    world::hash("svc", service, 0)
}

fn sep(service: u32, pod: u32) -> String {
    world::hash("sep", service, pod)
}
