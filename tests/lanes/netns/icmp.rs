//! ICMP through a Service, IPv4 and IPv6: narrow links on either side, hops that end on the way, unreachable ports, pings.
//!
//! ```text
//! client ── near ══ edge ══ node ══ inner ══ far ── backend
//! ```
//! The backend serves two Services: for `here` it is an endpoint of the node, for `elsewhere` one of another.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, FromRawFd, IntoRawFd},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage,
        recvmsg, setsockopt, socket, sockopt,
    },
};
use xdp_agent_tests::lab::{
    agent::{Agent, AgentOptions},
    link::veth,
    netns::{Namespace, PrivateBpffs},
    pass::PassProgram,
};

use crate::setup::Setup;

/// Namespaces from the client to the backend.
const CHAIN: [&str; 7] = ["client", "near", "edge", "node", "inner", "far", "backend"];
const NODE: usize = 3;
const BACKEND: usize = 6;
const NARROW: u32 = 1_300;
const TRANSFER: usize = 100 << 20;
const BLOCK: usize = 1 << 16;
const PATIENCE: Duration = Duration::from_secs(10);
/// Ports of both Services: transfers and echoed datagrams, and one that no process of the backend has.
const HTTP: u16 = 80;
const ECHO: u16 = 53;
const CLOSED: u16 = 54;

/// Frontends that are pinged: ClusterIPs, external and load-balancer addresses.
const HERE: [&str; 2] = ["10.96.0.1", "fd00:10:96::1"];
const ELSEWHERE: [&str; 2] = ["10.96.0.2", "fd00:10:96::2"];
const EXTERNAL: [&str; 4] = ["203.0.113.7", "203.0.113.8", "2001:db8:f::7", "2001:db8:f::8"];

const MANIFEST: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: NAME, namespace: shop}
spec:
  type: LoadBalancer
  allocateLoadBalancerNodePorts: false
  clusterIP: "10.96.0.N"
  clusterIPs: ["10.96.0.N", "fd00:10:96::N"]
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  externalIPs: EXTERNAL_IPS
  ports:
  - {name: http, port: 80, targetPort: 8080, protocol: TCP}
  - {name: echo, port: 53, targetPort: 5353, protocol: UDP}
  - {name: closed, port: 54, targetPort: 5454, protocol: UDP}
status: {loadBalancer: {ingress: LOAD_BALANCER}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: NAME-4, namespace: shop, labels: {kubernetes.io/service-name: NAME}}
addressType: IPv4
ports: PORTS
endpoints: [{addresses: ["10.0.5.2"], nodeName: PLACE, conditions: {ready: true}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: NAME-6, namespace: shop, labels: {kubernetes.io/service-name: NAME}}
addressType: IPv6
ports: PORTS
endpoints: [{addresses: ["2001:db8:5::2"], nodeName: PLACE, conditions: {ready: true}}]
"#;

fn manifest() -> String {
    let ports = "[{name: http, port: 8080, protocol: TCP}, {name: echo, port: 5353, protocol: UDP}, \
                 {name: closed, port: 5454, protocol: UDP}]";
    let of = |name: &str, place: &str, number: &str, external: &str, ingress: &str| {
        let text = MANIFEST.replace("NAME", name).replace("PLACE", place).replace("PORTS", ports);
        let text = text.replace("EXTERNAL_IPS", external).replace("LOAD_BALANCER", ingress);
        text.replace("10.96.0.N", &format!("10.96.0.{number}")).replace("::N\"", &format!("::{number}\""))
    };
    let external = format!(r#"["{}", "{}"]"#, EXTERNAL[0], EXTERNAL[2]);
    let ingress = format!(r#"[{{ip: "{}"}}, {{ip: "{}"}}]"#, EXTERNAL[1], EXTERNAL[3]);
    [of("here", "node", "1", &external, &ingress), of("elsewhere", "other", "2", "[]", "[]")].join("---\n")
}

/// The address of an end of a link, 0 nearer to the client.
fn v4(link: usize, end: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, link as u8, 1 + end as u8)
}

fn v6(link: usize, end: usize) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, link as u16, 0, 0, 0, 0, 1 + end as u16)
}

/// Routes the networks of a link.
fn route(namespace: &Namespace, link: usize, gateway: Ipv4Addr, gateway_v6: Ipv6Addr) -> Result<()> {
    namespace.route_via(Ipv4Addr::new(10, 0, link as u8, 0), 24, gateway)?;
    namespace.route_via_v6(Ipv6Addr::new(0x2001, 0xdb8, link as u16, 0, 0, 0, 0, 0), 64, gateway_v6)
}

struct World {
    chain: Vec<Namespace>,
    agent: Option<Agent>,
    _programs: Vec<PassProgram>,
    _bpffs: PrivateBpffs,
    _objects: tempfile::TempDir,
}

impl World {
    /// Builds the chain with one link, if any, that takes no more than [`NARROW`] bytes.
    fn start(setup: Setup, narrow: Option<usize>, extra: &[&str]) -> Result<Self> {
        let chain = CHAIN.map(|name| Namespace::new(&format!("{name}-icmp")));
        let chain = chain.into_iter().collect::<Result<Vec<_>>>()?;
        for namespace in &chain {
            namespace.sysctl("net/ipv6/conf/all/disable_ipv6", "0")?;
            namespace.sysctl("net/ipv6/conf/default/disable_ipv6", "0")?;
            namespace.sysctl("net/ipv4/ping_group_range", "0 2147483647")?;
            // Each error counts: hops are asked for faster than they are to answer.
            namespace.sysctl("net/ipv4/icmp_ratelimit", "0")?;
            namespace.sysctl("net/ipv6/icmp/ratelimit", "0")?;
        }
        for (link, ends) in chain.windows(2).enumerate() {
            veth(&ends[0], "right0", &ends[1], "left0")?;
            for (end, device) in ["right0", "left0"].into_iter().enumerate() {
                let namespace = &ends[end];
                namespace.enable_v6(device)?;
                namespace.address(device, v4(link, end), 24)?;
                namespace.address(device, v6(link, end), 64)?;
                namespace.tx_offload(device, setup.tx_offload)?;
                if narrow == Some(link) {
                    namespace.mtu(device, NARROW)?;
                }
            }
        }
        for (at, namespace) in chain.iter().enumerate() {
            if at != 0 && at != BACKEND {
                namespace.sysctl("net/ipv4/ip_forward", "1")?;
                namespace.sysctl("net/ipv6/conf/all/forwarding", "1")?;
            }
            // By default toward the node, and back outward to the networks behind.
            if at < NODE {
                namespace.route_via(Ipv4Addr::UNSPECIFIED, 0, v4(at, 1))?;
                namespace.default_route_v6(v6(at, 1))?;
            } else if at > NODE {
                namespace.route_via(Ipv4Addr::UNSPECIFIED, 0, v4(at - 1, 0))?;
                namespace.default_route_v6(v6(at - 1, 0))?;
            }
            for link in (0..at.saturating_sub(1)).filter(|_| at <= NODE) {
                route(namespace, link, v4(at - 1, 0), v6(at - 1, 0))?;
            }
            for link in (at + 1..BACKEND).filter(|_| at >= NODE) {
                route(namespace, link, v4(at, 1), v6(at, 1))?;
            }
        }
        // Without them, what a native program sends to a veth is lost.
        let programs = vec![
            PassProgram::attach(&chain[NODE - 1], "right0")?,
            PassProgram::attach(&chain[NODE + 1], "left0")?,
        ];
        serve(&chain[BACKEND])?;
        let objects = tempfile::tempdir()?;
        fs::write(objects.path().join("services.yaml"), manifest())?;
        let bpffs = PrivateBpffs::new()?;
        let mut options = AgentOptions::new(objects.path(), setup.mode);
        options.interfaces = vec!["left0".into(), "right0".into()];
        options.extra = extra.iter().map(|&arg| arg.into()).collect();
        let agent = Agent::start(&chain[NODE], &bpffs, &options)?;
        setup.check_mode(&agent, "left0")?;
        Ok(Self { chain, agent: Some(agent), _programs: programs, _bpffs: bpffs, _objects: objects })
    }

    fn client(&self) -> &Namespace {
        &self.chain[0]
    }

    fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("the agent runs")
    }

    fn events(&self, event: &str) -> Result<f64> {
        self.agent()?.metric("xdp_agent_events_total", &format!(r#"event="{event}""#))
    }

    fn stop(mut self) -> Result<()> {
        self.agent.take().context("the agent runs")?.stop()
    }
}

/// Serves transfers and echoes datagrams until the process ends.
fn serve(backend: &Namespace) -> Result<()> {
    let listener = backend.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, 8080)))?;
    let socket = backend.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 5353)))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A transfer that fails is the client's to report.
            thread::spawn(move || transfer_to(stream));
        }
    });
    thread::spawn(move || {
        let mut data = [0; 2048];
        while let Ok((len, peer)) = socket.recv_from(&mut data) {
            let _ = socket.send_to(&data[..len], peer);
        }
    });
    Ok(())
}

fn block() -> Vec<u8> {
    (0..BLOCK).map(|at| (at ^ at >> 8) as u8).collect()
}

/// Sends the transfer.
fn give(stream: &mut TcpStream) -> std::io::Result<()> {
    let block = block();
    (0..TRANSFER / BLOCK).try_for_each(|_| stream.write_all(&block))
}

/// Receives the transfer, and says whether it is what was sent.
fn take(stream: &mut TcpStream) -> std::io::Result<bool> {
    let (sent, mut block) = (block(), vec![0; BLOCK]);
    for _ in 0..TRANSFER / BLOCK {
        stream.read_exact(&mut block)?;
        if block != sent {
            return Ok(false);
        }
    }
    Ok(true)
}

fn transfer_to(mut stream: TcpStream) -> std::io::Result<()> {
    let mut question = [0];
    stream.read_exact(&mut question)?;
    if &question == b"d" {
        return give(&mut stream);
    }
    let is_whole = take(&mut stream)?;
    stream.write_all(&[u8::from(is_whole)])
}

fn connect(target: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn upload(target: SocketAddr) -> Result<()> {
    let mut stream = connect(target)?;
    stream.write_all(b"u")?;
    give(&mut stream)?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    ensure!(answer == [1], "the backend has received something else");
    Ok(())
}

fn download(target: SocketAddr) -> Result<()> {
    let mut stream = connect(target)?;
    stream.write_all(b"d")?;
    ensure!(take(&mut stream)?, "something else has come");
    Ok(())
}

fn address(text: &str) -> Result<IpAddr> {
    Ok(text.parse()?)
}

each_mode_and_offload!(large_transfers_pass_narrow_links_anywhere);
fn large_transfers_pass_narrow_links_anywhere(setup: Setup) -> Result<()> {
    // Between routers and beside the node, on the client's side and on the backend's. What does not fit into the node's
    // own link to the client comes untranslated from a backend of the node, and so does the error about it.
    for (narrow, related_min) in [(1, 4), (2, 2), (3, 4), (4, 4)] {
        let world = World::start(setup, Some(narrow), &[])?;
        for frontend in HERE.into_iter().chain(ELSEWHERE) {
            let target = SocketAddr::new(address(frontend)?, HTTP);
            let upload = || {
                let done = world.client().run(|| upload(target));
                done.with_context(|| format!("upload to {target}, link {narrow} is narrow"))
            };
            let download = || {
                let done = world.client().run(|| download(target));
                done.with_context(|| format!("download from {target}, link {narrow} is narrow"))
            };
            // What meets the narrow link behind the node comes first: later connections begin with what the other way round
            // has learned.
            if narrow < NODE {
                download()?;
                upload()?;
            } else {
                upload()?;
                download()?;
            }
        }
        let related = world.events("related")?;
        ensure!(
            related >= f64::from(related_min),
            "link {narrow} is narrow: {related} errors were translated"
        );
        world.stop()?;
    }
    Ok(())
}

/// What a hop answers to a datagram that ends there: who says so, and which error the socket gets.
fn probe(target: SocketAddr, ttl: u32) -> Result<(IpAddr, i32)> {
    let any: IpAddr =
        if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    if target.is_ipv4() {
        setsockopt(&socket, sockopt::Ipv4Ttl, &(ttl as i32))?;
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
    } else {
        setsockopt(&socket, sockopt::Ipv6Ttl, &(ttl as i32))?;
        setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
    }
    socket.connect(target)?;
    socket.send(b"who is there?")?;
    let mut ready = [PollFd::new(std::os::fd::AsFd::as_fd(&socket), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(PATIENCE)?;
    ensure!(poll(&mut ready, timeout)? == 1, "no answer to a datagram of {ttl} hops to {target}");
    let is_error = ready[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR));
    if !is_error {
        let mut answer = [0; 64];
        let len = socket.recv(&mut answer)?;
        ensure!(&answer[..len] == b"who is there?");
        return Ok((target.ip(), 0));
    }
    let (mut data, mut control) = ([0; 512], nix::cmsg_space!([u8; 256]));
    let mut parts = [std::io::IoSliceMut::new(&mut data)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT,
    )?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::Ipv4RecvErr(error, Some(from)) = control {
            return Ok((Ipv4Addr::from(u32::from_be(from.sin_addr.s_addr)).into(), error.ee_errno as i32));
        }
        if let ControlMessageOwned::Ipv6RecvErr(error, Some(from)) = control {
            return Ok((Ipv6Addr::from(from.sin6_addr.s6_addr).into(), error.ee_errno as i32));
        }
    }
    bail!("an error without its sender")
}

each_mode_and_offload!(every_hop_on_the_way_to_a_backend_has_its_name);
fn every_hop_on_the_way_to_a_backend_has_its_name(setup: Setup) -> Result<()> {
    let world = World::start(setup, None, &[])?;
    for frontend in HERE.into_iter().chain(ELSEWHERE) {
        let vip = address(frontend)?;
        let hop = |at: usize| -> IpAddr { if vip.is_ipv4() { v4(at, 1).into() } else { v6(at, 1).into() } };
        // Twice: once by flows that the datagram opens, and once after the backend has answered.
        for round in 0..2 {
            for ttl in 1..=5 {
                let found = world.client().run(|| probe((vip, ECHO).into(), ttl))?;
                ensure!(
                    found == (hop(ttl as usize - 1), libc::EHOSTUNREACH),
                    "hop {ttl} to {vip}, round {round}: {found:?}"
                );
            }
            let found = world.client().run(|| probe((vip, ECHO).into(), 64))?;
            ensure!(found == (vip, 0), "{vip}: {found:?}");
        }
        let found = world.client().run(|| probe((vip, CLOSED).into(), 64))?;
        ensure!(found == (vip, libc::ECONNREFUSED), "a closed port of the backend of {vip}: {found:?}");
    }
    // Of each Service and family: the node's own, those of both routers behind it, twice, and the closed port.
    let related = world.events("related")?;
    ensure!(related >= 28.0, "{related} errors were translated");
    world.stop()
}

/// Sends an echo request and returns what comes back, if anything does.
fn ping(target: IpAddr, data: &[u8], patience: Duration) -> Result<Option<Vec<u8>>> {
    let (family, protocol, request) = match target {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128),
    };
    let socket = socket(family, SockType::Datagram, SockFlag::empty(), protocol)?;
    // SAFETY: a descriptor that nobody else owns; its datagrams are ICMP messages.
    let socket = unsafe { UdpSocket::from_raw_fd(socket.into_raw_fd()) };
    socket.connect((target, 0))?;
    socket.set_read_timeout(Some(patience))?;
    // Checksum and identifier are the kernel's.
    socket.send(&[&[request, 0, 0, 0, 0, 0, 0, 7][..], data].concat())?;
    let mut answer = [0; 4096];
    match socket.recv(&mut answer) {
        Ok(len) => Ok(Some(answer[8..len].to_vec())),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

each_mode!(addresses_of_services_answer_pings);
fn addresses_of_services_answer_pings(setup: Setup) -> Result<()> {
    let world = World::start(setup, None, &[])?;
    let frontends = || HERE.into_iter().chain(ELSEWHERE).chain(EXTERNAL);
    for (count, frontend) in frontends().enumerate() {
        for data in [&b""[..], b"odd", &[0x5a; 1_400]] {
            let target = address(frontend)?;
            let answer = world.client().run(|| ping(target, data, PATIENCE))?;
            ensure!(answer.as_deref() == Some(data), "{target}, {} bytes: {answer:?}", data.len());
        }
        ensure!(world.events("echo_answered")? == 3.0 * (count + 1) as f64, "{frontend} is answered here");
    }
    let before = world.events("echo_answered")?;
    for own in [IpAddr::from(v4(2, 1)), v6(2, 1).into()] {
        ensure!(world.client().run(|| ping(own, b"node", PATIENCE))?.is_some(), "{own}: the kernel answers");
    }
    ensure!(world.events("echo_answered")? == before, "the node's own addresses are the kernel's");
    world.stop()?;
    let world = World::start(setup, None, &["--echo=false"])?;
    for frontend in [HERE[0], EXTERNAL[0], HERE[1], EXTERNAL[2]] {
        let target = address(frontend)?;
        // What nobody answers is told by the clock alone, or by a router that finds no way.
        let answer = world.client().run(|| ping(target, b"", Duration::from_millis(300)));
        ensure!(!matches!(answer, Ok(Some(_))), "{target} is answered though told not to: {answer:?}");
    }
    ensure!(world.events("echo_answered")? == 0.0);
    world.stop()
}
