//! Pods and processes of the node reach Services through the socket hooks.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::manifests::Service;
use xdp_agent_tests::lab::servers::UDP_PORT;
use xdp_agent_tests::lab::world::{
    CLUSTER_IP, NODE, NODE_PORT_HTTP, NODE_PORT_UDP, Pod, SERVICE_HTTP, SERVICE_UDP, World, WorldOptions,
    http_frontends, standard_service, udp_frontends,
};

use crate::callers::{CONNECTIONS, Place, all_places, both, counted_call, mapped, places, refused, repeated};

#[test]
fn pods_and_the_node_reach_every_frontend_and_see_its_address() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &[])?;
    let pod = SocketAddr::from((place.world.pod("local-1")?.server.address(), 0)).ip();
    for (kind, target) in http_frontends().into_iter().flat_map(|(kind, target)| both(kind, target)) {
        let answers = repeated(|| place.pod.http(target)).with_context(|| format!("pod, TCP, {kind}"))?;
        all_places(&answers, target)?;
        ensure!(answers.iter().all(|answer| answer.client.ip() == pod), "{kind}: {answers:?}");
        let answers = repeated(|| place.node.http(target)).with_context(|| format!("node, TCP, {kind}"))?;
        all_places(&answers, target)?;
    }
    for (kind, target) in udp_frontends().into_iter().flat_map(|(kind, target)| both(kind, target)) {
        let answers = repeated(|| place.pod.udp(target)).with_context(|| format!("pod, UDP, {kind}"))?;
        all_places(&answers, target)?;
        let answers = repeated(|| place.node.udp(target)).with_context(|| format!("node, UDP, {kind}"))?;
        all_places(&answers, target)?;
    }
    counted_call(&place.agent, "tcp_connect", "translated")?;
    counted_call(&place.agent, "udp_connect", "translated")?;
    place.stop()
}

#[test]
fn a_udp_socket_that_names_its_target_keeps_its_backend_and_sees_the_service_answer() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &[])?;
    let mut met = BTreeSet::new();
    for number in 0..CONNECTIONS {
        let socket = format!("socket-{number}");
        let is_v6 = number % 2 == 1;
        place.pod.open(&socket, is_v6)?;
        let mut own = BTreeSet::new();
        for (_, target) in udp_frontends() {
            let target = if is_v6 { mapped(target) } else { target };
            let first = place.pod.ask_at(&socket, target)??;
            ensure!(first.from == target, "{target} answered as {}", first.from);
            for _ in 0..3 {
                let next = place.pod.ask_at(&socket, target)??;
                ensure!(next == first, "{first:?}, then {next:?}");
            }
            own.insert(first.backend);
        }
        // Another frontend may have led it to the same backend since.
        for (_, target) in udp_frontends() {
            let target = if is_v6 { mapped(target) } else { target };
            let again = place.pod.ask_at(&socket, target)??;
            ensure!(again.from == target, "{target} answered as {}", again.from);
        }
        met.extend(own);
    }
    ensure!(met.len() == place.world.pods.len(), "only {met:?} were met");
    counted_call(&place.agent, "udp_send", "translated")?;
    place.stop()
}

/// The kernel gives a connected socket what comes from its peer only.
#[test]
fn a_udp_socket_that_is_connected_and_names_its_peer_has_one_backend() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &[])?;
    let target = udp_frontends()[0].1;
    let mut met = BTreeSet::new();
    for caller in [&mut place.pod, &mut place.node] {
        for number in 0..CONNECTIONS {
            let is_v6 = number % 2 == 1;
            let target = if is_v6 { mapped(target) } else { target };
            let (first, second) = (format!("first-{number}"), format!("second-{number}"));
            caller.open(&first, is_v6)?;
            caller.connect(&first, target)?;
            let named = caller.ask_at(&first, target)??;
            ensure!(named.from == target && caller.ask(&first)?? == named, "connected first: {named:?}");
            caller.open(&second, is_v6)?;
            let named = caller.ask_at(&second, target)??;
            caller.connect(&second, target)?;
            ensure!(caller.ask(&second)?? == named, "connected afterwards, not to {named:?}");
            met.insert(named.backend);
        }
    }
    ensure!(met.len() == place.world.pods.len(), "only {met:?} were met");
    place.stop()
}

#[test]
fn a_udp_socket_that_is_connected_to_a_pod_after_its_service_hears_the_pods_name() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &[])?;
    place.pod.open("socket", false)?;
    place.pod.connect("socket", udp_frontends()[0].1)?;
    let met = place.pod.ask("socket")??.backend;
    let pod = place.world.pods.iter().find(|pod| pod.server.name() == met).context("the pod")?;
    let direct = (pod.server.address(), UDP_PORT).into();
    place.pod.connect("socket", direct)?;
    let answer = place.pod.ask("socket")??;
    ensure!(answer.from == direct, "{answer:?} instead of {direct}");
    // It is not the agent's to end any more.
    place.world.change_endpoints(&place.agent, &[])?;
    ensure!(place.pod.ask("socket")?? == answer);
    place.stop()
}

#[test]
fn a_service_without_endpoints_refuses_callers_at_once() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &[])?;
    place.world.change_endpoints(&place.agent, &[])?;
    place.pod.open("socket", false)?;
    for (kind, target) in http_frontends() {
        for caller in [&mut place.pod, &mut place.node] {
            refused(kind, libc::ECONNREFUSED, || caller.http(target))?;
        }
    }
    for (kind, target) in udp_frontends() {
        for caller in [&mut place.pod, &mut place.node] {
            refused(kind, libc::ECONNREFUSED, || caller.udp(target))?;
        }
        refused(kind, libc::ECONNREFUSED, || place.pod.ask_at("socket", target))?;
    }
    for call in ["tcp_connect", "udp_connect", "udp_send"] {
        counted_call(&place.agent, call, "no_endpoint")?;
    }
    place.stop()
}

#[test]
fn a_local_internal_policy_keeps_callers_here_and_fails_without_a_local_endpoint() -> Result<()> {
    let service = Service { internal_traffic_policy: "Local", ..standard_service() };
    let mut place = Place::serve(World::build(WorldOptions::default())?, &[service.yaml()], &[])?;
    let [(_, cluster_ip), (_, node_port), ..] = http_frontends();
    for caller in [&mut place.pod, &mut place.node] {
        ensure!(places(&repeated(|| caller.http(cluster_ip))?) == ["local"]);
        ensure!(places(&repeated(|| caller.http(node_port))?) == ["local", "remote"]);
    }
    let remote: Vec<_> = place.world.pods.iter().filter(|pod| !pod.is_local()).map(Pod::endpoint).collect();
    place.world.publish_endpoints(&remote)?;
    place.world.manifests.write("web.yaml", &[service.yaml()])?;
    place.wait_until("no local endpoint", |place| {
        let failed = place.pod.http(cluster_ip)?.err().context("still answered")?;
        ensure!(failed.errno == libc::EPERM, "{failed}");
        Ok(())
    })?;
    refused("ClusterIP", libc::EPERM, || place.node.http(cluster_ip))?;
    ensure!(places(&repeated(|| place.pod.http(node_port))?) == ["remote"]);
    counted_call(&place.agent, "tcp_connect", "no_local_endpoint")?;
    place.stop()
}

#[test]
fn a_local_external_policy_does_not_bind_callers_of_this_node() -> Result<()> {
    let service = Service { external_traffic_policy: "Local", ..standard_service() };
    let mut place = Place::serve(World::build(WorldOptions::default())?, &[service.yaml()], &[])?;
    for (kind, target) in http_frontends() {
        for caller in [&mut place.pod, &mut place.node] {
            let answers = repeated(|| caller.http(target))?;
            ensure!(places(&answers) == ["local", "remote"], "{kind}: {answers:?}");
        }
    }
    place.stop()
}

#[test]
fn with_affinity_each_namespace_keeps_its_backend_over_all_frontends() -> Result<()> {
    let service = standard_service().yaml().replace("sessionAffinity: None", "sessionAffinity: ClientIP");
    let mut place = Place::serve(World::build(WorldOptions::default())?, &[service], &[])?;
    let mut met = BTreeSet::new();
    for caller in [&mut place.pod, &mut place.node] {
        let mut own = BTreeSet::new();
        for (_, target) in http_frontends() {
            own.extend(repeated(|| caller.http(target))?.into_iter().map(|answer| answer.backend));
        }
        ensure!(own.len() == 1, "one namespace met {own:?}");
        met.extend(own);
    }
    // What the namespace has met is gone: the next connection meets another, and that one stays.
    let first = place.pod.http(http_frontends()[0].1)??.backend;
    let others: Vec<_> =
        place.world.pods.iter().filter(|pod| pod.server.name() != first).map(Pod::endpoint).collect();
    place.world.publish_endpoints(&others)?;
    let service = standard_service().yaml().replace("sessionAffinity: None", "sessionAffinity: ClientIP");
    place.world.manifests.write("web.yaml", &[service])?;
    place.wait_until("another backend", |place| {
        let answer = place.pod.http(http_frontends()[0].1)??;
        ensure!(answer.backend != first, "still {first}");
        Ok(())
    })?;
    let now: BTreeSet<_> = repeated(|| place.pod.http(http_frontends()[0].1))?
        .into_iter()
        .map(|answer| answer.backend)
        .collect();
    ensure!(now.len() == 1, "{now:?}");
    place.stop()
}

#[test]
fn what_no_service_has_is_refused_or_fails_as_on_the_wire() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &["--service-cidr", "10.96.0.0/16"])?;
    refused("unknown port", libc::ECONNREFUSED, || place.pod.http((CLUSTER_IP, 81).into()))?;
    let free = (Ipv4Addr::new(10, 96, 77, 77), SERVICE_HTTP).into();
    refused("free address", libc::EPERM, || place.pod.http(free))?;
    refused("free address", libc::EPERM, || place.node.udp(free))?;
    counted_call(&place.agent, "tcp_connect", "unknown_port")?;
    counted_call(&place.agent, "tcp_connect", "unknown_service_address")?;
    // A pod's own address and port are nobody's Service.
    let pod = place.world.pod("remote-1")?.server.address();
    let direct = place.pod.http((pod, 8080).into())??;
    ensure!(direct.backend == "remote-1", "{direct:?}");
    place.stop()
}

#[test]
fn node_ports_are_kept_from_processes_of_the_node_and_not_from_pods() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &[])?;
    let any = Ipv4Addr::UNSPECIFIED;
    for (protocol, port) in [("tcp", NODE_PORT_HTTP), ("udp", NODE_PORT_UDP)] {
        for address in [any, NODE] {
            let address = SocketAddrV4::new(address, port).into();
            refused(protocol, libc::EADDRINUSE, || place.node.bind(protocol, address))?;
        }
        let everywhere: SocketAddr = (std::net::Ipv6Addr::UNSPECIFIED, port).into();
        refused(protocol, libc::EADDRINUSE, || place.node.bind(protocol, everywhere))?;
        place.node.bind(protocol, (any, port + 1).into())??;
        place.node.bind(protocol, (Ipv4Addr::LOCALHOST, port).into())??;
        place.pod.bind(protocol, (any, port).into())??;
    }
    place.node.bind("udp", (any, NODE_PORT_HTTP).into())??;
    counted_call(&place.agent, "bind", "node_port")?;
    place.stop()
}

#[test]
fn node_ports_are_on_the_loopback_of_the_node_when_asked_for() -> Result<()> {
    let loopback: SocketAddr = (Ipv4Addr::LOCALHOST, NODE_PORT_HTTP).into();
    let mut place = Place::start(WorldOptions::default(), &[])?;
    refused("loopback", libc::ECONNREFUSED, || place.node.http(loopback))?;
    place.stop()?;
    let mut place = Place::start(WorldOptions::default(), &["--localhost-nodeports"])?;
    all_places(&repeated(|| place.node.http(loopback))?, loopback)?;
    refused("a pod's own loopback", libc::ECONNREFUSED, || place.pod.http(loopback))?;
    refused("no NodePort", libc::ECONNREFUSED, || {
        place.node.http((Ipv4Addr::LOCALHOST, SERVICE_HTTP).into())
    })?;
    place.stop()
}

#[test]
fn source_ranges_hold_for_pods_and_the_node() -> Result<()> {
    let world = World::build(WorldOptions::default())?;
    let pod = world.pod("local-1")?.server.address();
    let only = |range: String| {
        let ranges = format!("spec:\n  loadBalancerSourceRanges:\n  - {range}\n");
        standard_service().yaml().replacen("spec:\n", &ranges, 1)
    };
    let mut place = Place::serve(world, &[only(format!("{pod}/32"))], &[])?;
    let target: SocketAddr = (xdp_agent_tests::lab::world::LOAD_BALANCER_IP, SERVICE_HTTP).into();
    place.wait_until("the pod's address to be known", |place| {
        place.pod.http(target)??;
        Ok(())
    })?;
    refused("node", libc::EPERM, || place.node.http(target))?;
    place.world.manifests.write("web.yaml", &[only(format!("{NODE}/32"))])?;
    place.wait_until("the other range", |place| {
        place.node.http(target)??;
        Ok(())
    })?;
    refused("pod", libc::EPERM, || place.pod.http(target))?;
    ensure!(
        place.pod.http((CLUSTER_IP, SERVICE_HTTP).into())?.is_ok(),
        "ranges guard the balancer's address only"
    );
    counted_call(&place.agent, "tcp_connect", "source_range")?;
    place.stop()
}

#[test]
fn with_host_only_pods_are_left_alone() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &["--socket-lb", "host-only"])?;
    let [(_, cluster_ip), ..] = http_frontends();
    all_places(&repeated(|| place.node.http(cluster_ip))?, cluster_ip)?;
    let failed = place.pod.http(cluster_ip)?.err().context("a pod was served")?;
    ensure!(failed.errno != libc::EPERM && failed.errno != libc::ECONNREFUSED, "{failed}");
    place.stop()
}

#[test]
fn a_datagram_that_has_to_be_fragmented_is_answered() -> Result<()> {
    let mut place = Place::start(WorldOptions::default(), &[])?;
    let target: SocketAddr = (CLUSTER_IP, SERVICE_UDP).into();
    place.pod.open("socket", false)?;
    place.pod.connect("socket", target)?;
    ensure!(place.pod.echo("socket", 2_000)? == 2_000);
    place.stop()
}
