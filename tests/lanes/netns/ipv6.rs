//! IPv6 by the same paths: a client, a node with the agent, a backend behind it.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xdp_agent_tests::lab::agent::{Agent, AgentOptions, METRICS, Mode, PIN_DIR, agent_binary};
use xdp_agent_tests::lab::link::veth;
use xdp_agent_tests::lab::netns::{Namespace, PrivateBpffs};
use xdp_agent_tests::lab::pass::PassProgram;
use xdp_agent_tests::lab::patient;

use crate::setup::{Setup, says};

const CLIENT: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2);
const NODE_OUTSIDE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
const BACKEND: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2);
const NODE_INSIDE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1);
const WEB: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
const EMPTY: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x11);
const PATIENCE: Duration = Duration::from_secs(5);

const MANIFEST: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: NodePort
  clusterIP: "fd00:10:96::10"
  clusterIPs: ["fd00:10:96::10"]
  ipFamilies: [IPv6]
  ports:
  - {name: http, port: 80, targetPort: 8080, nodePort: 30080, protocol: TCP}
  - {name: dns, port: 53, targetPort: 5353, nodePort: 30053, protocol: UDP}
---
apiVersion: v1
kind: Service
metadata: {name: empty, namespace: shop}
spec:
  clusterIP: "fd00:10:96::11"
  clusterIPs: ["fd00:10:96::11"]
  ipFamilies: [IPv6]
  ports: [{name: http, port: 80, protocol: TCP}, {name: dns, port: 53, protocol: UDP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{name: http, port: 8080, protocol: TCP}, {name: dns, port: 5353, protocol: UDP}]
endpoints: [{addresses: ["2001:db8:2::2"], nodeName: other, conditions: {ready: true}}]
"#;

each_mode_and_offload!(services_answer_over_ipv6);

fn services_answer_over_ipv6(setup: Setup) -> Result<()> {
    let [client, node, backend] = ["client6", "node6", "backend6"].map(Namespace::new);
    let (client, node, backend) = (client?, node?, backend?);
    for namespace in [&client, &node, &backend] {
        namespace.sysctl("net/ipv6/conf/all/disable_ipv6", "0")?;
        namespace.sysctl("net/ipv6/conf/default/disable_ipv6", "0")?;
    }
    veth(&client, "eth0", &node, "out0")?;
    veth(&backend, "eth0", &node, "in0")?;
    let ends = [
        (&client, "eth0", CLIENT),
        (&node, "out0", NODE_OUTSIDE),
        (&backend, "eth0", BACKEND),
        (&node, "in0", NODE_INSIDE),
    ];
    for (namespace, device, address) in ends {
        namespace.enable_v6(device)?;
        namespace.up(device)?;
        namespace.address(device, address, 64)?;
        namespace.tx_offload(device, setup.tx_offload)?;
    }
    node.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    client.default_route_v6(NODE_OUTSIDE)?;
    backend.default_route_v6(NODE_INSIDE)?;
    // Without them, what a native program sends to a veth is lost.
    let _peers = [PassProgram::attach(&client, "eth0")?, PassProgram::attach(&backend, "eth0")?];
    serve(&backend)?;
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("services.yaml"), MANIFEST)?;
    let bpffs = PrivateBpffs::new()?;
    let mut options = AgentOptions::new(dir.path(), setup.mode);
    options.interfaces = vec!["out0".into(), "in0".into()];
    let agent = Agent::start(&node, &bpffs, &options)?;
    ask_all(&client)?;
    let refused = client.run(|| TcpStream::connect_timeout(&(EMPTY, 80).into(), patient(PATIENCE)));
    ensure!(refused.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused), "{refused:?}");
    let refused = client.run(|| ask_udp((EMPTY, 53).into()));
    let kind = refused.as_ref().err().and_then(|error| error.downcast_ref::<std::io::Error>());
    ensure!(kind.is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused), "{refused:?}");
    ensure!(agent.metric("xdp_agent_drops_total", r#"reason="no_endpoint""#)? >= 2.0);
    ensure!(explained(&node, &bpffs)? == (json!("shop/web:http"), json!(format!("[{BACKEND}]:8080"))));
    // Each connection is a flow, and each datagram socket.
    ensure!(agent.metric("xdp_agent_events_total", r#"event="flow_new""#)? >= 20.0);
    if setup.mode == Mode::Generic && !setup.tx_offload {
        let sent = agent.metric("xdp_agent_events_total", r#"event="redirected""#)?;
        let by_kernel = agent.metric("xdp_agent_events_total", r#"event="slow_path""#)?;
        ensure!(sent + by_kernel >= 20.0, "{sent} were sent at XDP, {by_kernel} by the kernel");
    }
    agent.kill()?;
    // Programs and maps alone; those of IPv6 are reached through a table that the kernel empties once it is not pinned.
    ask_all(&client)?;
    let agent = Agent::start(&node, &bpffs, &options)?;
    ask_all(&client)?;
    let unsaid = "net.ipv6.conf.all.forwarding is 0";
    ensure!(!agent.log().contains(unsaid), "{}", agent.log());
    agent.stop()?;
    // Nothing else would say so: what the kernel does not route is nobody's drop.
    node.sysctl("net/ipv6/conf/all/forwarding", "0")?;
    let agent = Agent::start(&node, &bpffs, &options)?;
    says(&agent.log(), &[unsaid, "sysctl net.ipv6.conf.all.forwarding=1"])?;
    agent.stop()
}

/// Asks every frontend that has an endpoint, several times, so that flows are established and go on.
fn ask_all(client: &Namespace) -> Result<()> {
    for (address, tcp, udp) in [(WEB, 80, 53), (NODE_OUTSIDE, 30080, 30053)] {
        for _ in 0..5 {
            let peer = client.run(|| ask_tcp((address, tcp).into()))?;
            ensure!(peer.ip() == NODE_INSIDE, "{address}: the backend has seen {peer}");
            let peer = client.run(|| ask_udp((address, udp).into()))?;
            ensure!(peer.ip() == NODE_INSIDE, "{address}: the backend has seen {peer}");
        }
    }
    Ok(())
}

/// Service and endpoint that the agent's maps name to a new connection.
fn explained(node: &Namespace, bpffs: &PrivateBpffs) -> Result<(Value, Value)> {
    let mut command = bpffs.command(node, agent_binary()?);
    command.args(["explain", "--live", "--pin-dir", PIN_DIR, "--metrics-bind-address", &METRICS.to_string()]);
    let to = SocketAddr::from((WEB, 80)).to_string();
    let output = command.args(["--from", &CLIENT.to_string(), "--to", &to, "--output", "json"]).output()?;
    let mut answer: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    Ok((answer["service"].take(), answer["endpoints"][0]["address"].take()))
}

/// Answers each connection and each datagram with the address it came from, until the process ends.
fn serve(backend: &Namespace) -> Result<()> {
    let listener = backend.run(|| TcpListener::bind((BACKEND, 8080)))?;
    let socket = backend.run(|| UdpSocket::bind((BACKEND, 5353)))?;
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let peer = stream.peer_addr().map_or_else(|error| error.to_string(), |peer| peer.to_string());
            let mut question = [0; 5];
            // A client that goes away early is the client's to report.
            let _ = stream.read_exact(&mut question).and_then(|()| stream.write_all(peer.as_bytes()));
        }
    });
    thread::spawn(move || {
        let mut question = [0; 16];
        while let Ok((_, peer)) = socket.recv_from(&mut question) {
            let _ = socket.send_to(peer.to_string().as_bytes(), peer);
        }
    });
    Ok(())
}

fn ask_tcp(to: SocketAddr) -> Result<SocketAddr> {
    let mut stream =
        TcpStream::connect_timeout(&to, patient(PATIENCE)).with_context(|| format!("connecting to {to}"))?;
    stream.set_read_timeout(Some(patient(PATIENCE)))?;
    stream.write_all(b"whoam")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.parse()?)
}

fn ask_udp(to: SocketAddr) -> Result<SocketAddr> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(patient(PATIENCE)))?;
    socket.connect(to)?;
    socket.send(b"whoami")?;
    let mut answer = [0; 64];
    let len = socket.recv(&mut answer)?;
    Ok(std::str::from_utf8(&answer[..len])?.parse()?)
}
