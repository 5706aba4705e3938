//! Pods and the node reach Services over IPv6: by socket hooks, by the devices of pods, and on the way out of the node.

use std::collections::BTreeSet;
use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::agent::{Agent, AgentOptions, Mode};
use xdp_agent_tests::lab::caller::Caller;
use xdp_agent_tests::lab::cgroup::Cgroup;
use xdp_agent_tests::lab::link::veth;
use xdp_agent_tests::lab::manifests::Manifests;
use xdp_agent_tests::lab::netns::{Namespace, PrivateBpffs};
use xdp_agent_tests::lab::pass::PassProgram;
use xdp_agent_tests::lab::wait_for;

use crate::callers::{binary, refused, told_of_its_end};
use crate::sockets_v6::Server;

const NODE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
const FAR: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2);
const PODS: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2), Ipv6Addr::new(0x2001, 0xdb8, 3, 0, 0, 0, 0, 2)];
const GATEWAYS: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1), Ipv6Addr::new(0x2001, 0xdb8, 3, 0, 0, 0, 0, 1)];
const CLUSTER_IP: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x10);
const EXTERNAL_IP: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xee, 0, 0, 0, 0, 0x10);
const BALANCER_IP: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xbb, 0, 0, 0, 0, 0x10);
const EMPTY: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x20);
const CONNECTIONS: usize = 40;
/// Reserved ports are what clients of NFS take.
const FIXED_PORT: u16 = 907;
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// How clients are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Hooks,
    Devices,
}

#[test]
fn pods_and_the_node_reach_services_of_ipv6_by_hooks() -> Result<()> {
    reached(Way::Hooks, true)
}

#[test]
fn pods_and_the_node_reach_services_of_ipv6_by_devices_and_on_the_way_out() -> Result<()> {
    reached(Way::Devices, true)?;
    reached(Way::Devices, false)
}

fn reached(way: Way, tx_offload: bool) -> Result<()> {
    let [node, far, first, second] = ["node6", "far6", "first6", "second6"].map(Namespace::new);
    let (node, far, pods) = (node?, far?, [first?, second?]);
    for namespace in [&node, &far, &pods[0], &pods[1]] {
        for device in ["all", "default", "lo"] {
            namespace.enable_v6(device)?;
        }
    }
    link(&node, "eth0", NODE, &far, FAR, tx_offload)?;
    far.default_route_v6(NODE)?;
    // What is nobody's neighbour leaves by the uplink, as Services do.
    node.default_route_v6(FAR)?;
    for (number, pod) in pods.iter().enumerate() {
        link(&node, &format!("pod{number}"), GATEWAYS[number], pod, PODS[number], tx_offload)?;
        pod.default_route_v6(GATEWAYS[number])?;
    }
    node.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    let _peer = PassProgram::attach(&far, "eth0")?;
    let _servers = [
        Server::start(&pods[0], PODS[0], "itself")?,
        Server::start(&pods[1], PODS[1], "local")?,
        Server::start(&far, FAR, "remote")?,
    ];
    let manifests = Manifests::new()?;
    manifests.write("six.yaml", &objects(""))?;
    let cgroup = Cgroup::new("node6")?;
    let cgroups = [cgroup.child("pod")?, cgroup.child("host")?];
    let mut pod = Caller::start(binary(), &pods[0], &cgroups[0])?;
    let mut host = Caller::start(binary(), &node, &cgroups[1])?;
    let mut options = AgentOptions::new(manifests.directory(), Mode::Generic);
    match way {
        Way::Hooks => options.cgroup = Some(cgroup.path().to_path_buf()),
        Way::Devices => options.extra.extend(["--pod-iface".to_owned(), "pod*".to_owned()]),
    }
    let bpffs = PrivateBpffs::new()?;
    let agent = Agent::start(&node, &bpffs, &options)?;
    for (who, caller) in [("pod", &mut pod), ("node", &mut host)] {
        every_frontend(way, who, caller).with_context(|| format!("{who}, {way:?}"))?;
    }
    if way == Way::Hooks {
        node_ports_are_kept(&mut pod, &mut host)?;
        a_connected_socket_is_ended(&manifests, &mut pod)?;
    }
    let to_cluster_ip = (CLUSTER_IP, 80).into();
    manifests.write("six.yaml", &objects("  internalTrafficPolicy: Local\n"))?;
    wait_for("the policy to hold", CHANGE_TIMEOUT, || {
        let met = met(&mut pod, to_cluster_ip)?;
        ensure!(met == BTreeSet::from(["itself", "local"].map(str::to_owned)), "{met:?}");
        Ok(())
    })?;
    manifests.write("six.yaml", &objects("  sessionAffinity: ClientIP\n"))?;
    wait_for("clients to keep their backends", CHANGE_TIMEOUT, || {
        for target in [CLUSTER_IP, EXTERNAL_IP, BALANCER_IP].map(|address| (address, 80).into()) {
            let met = met(&mut pod, target)?;
            ensure!(met.len() == 1 && met == self::met(&mut pod, to_cluster_ip)?, "{target}: {met:?}");
        }
        Ok(())
    })?;
    agent.stop()?;
    drop((pod, host));
    Ok(())
}

/// A NodePort is for no process of the node, by whichever address; a pod has ports of its own.
fn node_ports_are_kept(pod: &mut Caller, host: &mut Caller) -> Result<()> {
    for address in [NODE, Ipv6Addr::UNSPECIFIED] {
        let node_port = (address, 30_080).into();
        refused("a NodePort", libc::EADDRINUSE, || host.bind("tcp", node_port))?;
        refused("a NodePort", libc::EADDRINUSE, || host.bind("udp", (address, 30_500).into()))?;
        host.bind("tcp", (address, 30_079).into())??;
    }
    pod.bind("tcp", (Ipv6Addr::UNSPECIFIED, 30_080).into())??;
    Ok(())
}

/// A connected UDP socket hears that its backend is gone, and meets another.
fn a_connected_socket_is_ended(manifests: &Manifests, pod: &mut Caller) -> Result<()> {
    let target = (CLUSTER_IP, 5000).into();
    pod.open("socket", true)?;
    pod.connect("socket", target)?;
    let met = pod.ask("socket")??.backend;
    let endpoints = [("itself", PODS[0]), ("local", PODS[1]), ("remote", FAR)];
    let gone = endpoints.into_iter().find(|(name, _)| *name == met);
    let (_, gone) = gone.with_context(|| format!("nobody has this name: {met}"))?;
    let without = |object: &String| {
        let lines = object.lines().filter(|line| !line.contains(&format!("addresses: [\"{gone}\"]")));
        lines.flat_map(|line| [line, "\n"]).collect::<String>()
    };
    manifests.write("six.yaml", &objects("").each_ref().map(without))?;
    wait_for("the socket to be told", CHANGE_TIMEOUT, || told_of_its_end(pod.ask("socket")?))?;
    pod.open("next", true)?;
    pod.connect("next", target)?;
    ensure!(pod.ask("next")??.backend != met);
    manifests.write("six.yaml", &objects(""))
}

/// Who answers a caller, of enough connections to meet everybody.
fn met(caller: &mut Caller, target: SocketAddr) -> Result<BTreeSet<String>> {
    (0..CONNECTIONS).map(|_| Ok(caller.http(target)??.backend)).collect()
}

fn every_frontend(way: Way, who: &str, caller: &mut Caller) -> Result<()> {
    let all = BTreeSet::from(["itself", "local", "remote"].map(str::to_owned));
    let mut targets = [CLUSTER_IP, EXTERNAL_IP, BALANCER_IP].map(|address| (address, 80, 5000)).to_vec();
    // The node's own address does not leave it.
    if who == "pod" || way == Way::Hooks {
        targets.push((NODE, 30_080, 30_500));
    }
    for &(address, tcp, udp) in &targets {
        let (tcp, udp): (SocketAddr, SocketAddr) = ((address, tcp).into(), (address, udp).into());
        let mut met = BTreeSet::new();
        for _ in 0..CONNECTIONS {
            let answer = caller.http(tcp)?.with_context(|| format!("TCP, {tcp}"))?;
            ensure!(answer.from == tcp, "{tcp}: {answer:?}");
            met.insert(answer.backend);
        }
        ensure!(met == all, "{tcp}: only {met:?} were met");
        let mut met = BTreeSet::new();
        for _ in 0..CONNECTIONS {
            let answer = caller.udp(udp)?.with_context(|| format!("UDP, {udp}"))?;
            ensure!(answer.from == udp, "{udp}: {answer:?}");
            met.insert(answer.backend);
        }
        ensure!(met == all, "{udp}: only {met:?} were met");
    }
    for &(address, tcp, udp) in &targets {
        insistent_and_impatient(caller, (address, tcp).into(), (address, udp).into())?;
    }
    refused("no endpoint", libc::ECONNREFUSED, || caller.http((EMPTY, 80).into()))?;
    refused("no endpoint", libc::ECONNREFUSED, || caller.udp((EMPTY, 5000).into()))?;
    refused("unknown port", libc::ECONNREFUSED, || caller.http((CLUSTER_IP, 81).into()))
}

/// A client that insists on its port, as those of NFS do, and one that asks twice before it hears, as resolvers do.
fn insistent_and_impatient(caller: &mut Caller, tcp: SocketAddr, udp: SocketAddr) -> Result<()> {
    for _ in 0..5 {
        let answer = caller.http_from(FIXED_PORT, tcp)?.with_context(|| format!("fixed port, {tcp}"))?;
        ensure!(answer.from == tcp, "{tcp}: {answer:?}");
    }
    let socket = format!("resolver-{udp}");
    caller.open(&socket, true)?;
    for _ in 0..8 {
        let answers = caller.ask_both(&socket, udp)?.with_context(|| format!("resolver, {udp}"))?;
        ensure!(answers.iter().all(|answer| answer.from == udp), "{udp}: {answers:?}");
    }
    Ok(())
}

fn link(
    node: &Namespace,
    device: &str,
    own: Ipv6Addr,
    other: &Namespace,
    address: Ipv6Addr,
    tx_offload: bool,
) -> Result<()> {
    veth(node, device, other, "eth0")?;
    for (namespace, device, address) in [(node, device, own), (other, "eth0", address)] {
        namespace.up(device)?;
        namespace.address(device, address, 64)?;
        namespace.tx_offload(device, tx_offload)?;
    }
    Ok(())
}

/// A Service with three endpoints and these further lines in its specification, and one with none.
fn objects(spec: &str) -> [String; 3] {
    let service = |name: &str, ip: Ipv6Addr, node_ports: [&str; 2], spec: &str, status: &str| {
        let [http, echo] = node_ports;
        format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: default\nspec:\n  clusterIP: \"{ip}\"\n  \
             clusterIPs: [\"{ip}\"]\n  ipFamilies: [IPv6]\n{spec}  ports:\n  - {{name: http, port: 80, protocol: \
             TCP, nodePort: {http}}}\n  - {{name: echo, port: 5000, protocol: UDP, nodePort: {echo}}}\n{status}"
        )
    };
    let endpoint = |address: Ipv6Addr, node: &str| {
        format!("- {{addresses: [\"{address}\"], conditions: {{ready: true}}, nodeName: {node}}}\n")
    };
    let endpoints = [endpoint(PODS[0], "node"), endpoint(PODS[1], "node"), endpoint(FAR, "far")].concat();
    let slice = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: six-abcde\n  namespace: default\n  \
         labels: {{kubernetes.io/service-name: six}}\naddressType: IPv6\nports:\n- {{name: http, port: 8080, protocol: \
         TCP}}\n- {{name: echo, port: 9000, protocol: UDP}}\nendpoints:\n{endpoints}"
    );
    let six = service(
        "six",
        CLUSTER_IP,
        ["30080", "30500"],
        &format!("  type: LoadBalancer\n  externalIPs: [\"{EXTERNAL_IP}\"]\n{spec}"),
        &format!("status: {{loadBalancer: {{ingress: [{{ip: \"{BALANCER_IP}\"}}]}}}}\n"),
    );
    [six, service("empty", EMPTY, ["30081", "30501"], "  type: NodePort\n", ""), slice]
}
