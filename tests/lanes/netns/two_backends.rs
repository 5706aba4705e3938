//! A client, a node and two backends, each by a link of its own and in both address families.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use xdp_agent_tests::lab::{
    agent::{Agent, AgentOptions},
    link::veth,
    manifests::Manifests,
    netns::{Namespace, PrivateBpffs},
    pass::PassProgram,
    patient,
};

use crate::setup::Setup;

/// An address in each family.
pub(crate) type Both = (Ipv4Addr, Ipv6Addr);

pub(crate) const CLIENT: Both =
    (Ipv4Addr::new(198, 51, 100, 2), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2));
const NODE: Both = (Ipv4Addr::new(198, 51, 100, 1), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1));
/// The address of the Service.
pub(crate) const VIP: Both =
    (Ipv4Addr::new(10, 96, 0, 10), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10));
/// Port of the Service.
pub(crate) const PORT: u16 = 80;
/// Port of the backends.
pub(crate) const TARGET: u16 = 8080;
/// How long a backend may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a connection may take; openers wait for neighbours to be found.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a backend is, as its EndpointSlice says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Here,
    Elsewhere,
}

/// The namespaces, their links and the manifests; the agent is the test's.
pub(crate) struct TwoBackends {
    pub(crate) client: Namespace,
    pub(crate) node: Namespace,
    pub(crate) backends: [Namespace; 2],
    pub(crate) bpffs: PrivateBpffs,
    pub(crate) place: Place,
    manifests: Manifests,
    setup: Setup,
    _programs: Vec<PassProgram>,
}

/// The address of a backend, or of the node on the link to it.
pub(crate) fn at(backend: usize, host: u16) -> Both {
    let link = backend as u16 + 1;
    let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0x10, link, 0, 0, 0, host);
    (Ipv4Addr::new(10, 244, link as u8, host as u8), v6)
}

/// Both addresses of a host.
pub(crate) fn each((v4, v6): Both) -> [IpAddr; 2] {
    [v4.into(), v6.into()]
}

impl TwoBackends {
    /// Links everything; backends answer each byte with their number, by TCP and UDP.
    pub(crate) fn build(setup: Setup, place: Place) -> Result<Self> {
        let world = Self::without_servers(setup, place)?;
        for (number, backend) in (0..).zip(&world.backends) {
            serve(backend, number)?;
        }
        Ok(world)
    }

    /// The same with nobody who answers.
    pub(crate) fn without_servers(setup: Setup, place: Place) -> Result<Self> {
        let [client, node, first, second] = ["client2", "node2b", "first", "second"].map(Namespace::new);
        let mut world = Self {
            client: client?,
            node: node?,
            backends: [first?, second?],
            bpffs: PrivateBpffs::new()?,
            place,
            manifests: Manifests::new()?,
            setup,
            _programs: Vec::new(),
        };
        world.link(&world.client, "out0", CLIENT, NODE)?;
        for backend in 0..2 {
            let device = ["in0", "in1"][backend];
            world.link(&world.backends[backend], device, at(backend, 2), at(backend, 1))?;
        }
        world.node.sysctl("net/ipv4/ip_forward", "1")?;
        world.node.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        // Without them, what a native program sends to a veth is lost.
        for namespace in [&world.client, &world.backends[0], &world.backends[1]] {
            world._programs.push(PassProgram::attach(namespace, "eth0")?);
        }
        Ok(world)
    }

    /// Says which backends serve.
    pub(crate) fn publish(&self, backends: &[usize]) -> Result<()> {
        let node = if self.place == Place::Here { "node" } else { "other" };
        let slice = |family: &str, addresses: Vec<IpAddr>| {
            let entry = |address| {
                format!("- {{addresses: [\"{address}\"], nodeName: {node}, conditions: {{ready: true}}}}\n")
            };
            let endpoints: String = addresses.into_iter().map(entry).collect();
            format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: web-{}, namespace: shop, labels: \
                 {{kubernetes.io/service-name: web}}}}\naddressType: {family}\nports:\n{PORTS_OF_SLICE}endpoints:{}",
                family.to_lowercase(),
                if endpoints.is_empty() { " []\n".into() } else { format!("\n{endpoints}") }
            )
        };
        let [v4, v6]: [Vec<IpAddr>; 2] =
            [0, 1].map(|family| backends.iter().map(|&backend| each(at(backend, 2))[family]).collect());
        self.manifests.write("web.yaml", &[service(), slice("IPv4", v4), slice("IPv6", v6)])
    }

    /// Removes Service and endpoints.
    pub(crate) fn unpublish(&self) -> Result<()> {
        self.manifests.remove("web.yaml")
    }

    /// Starts an agent, also over what an earlier one has left.
    pub(crate) fn start_agent(&self, extra: &[&str]) -> Result<Agent> {
        let mut options = AgentOptions::new(self.manifests.directory(), self.setup.mode);
        options.interfaces = ["out0", "in0", "in1"].map(Into::into).into();
        options.extra = extra.iter().map(ToString::to_string).collect();
        Agent::start(&self.node, &self.bpffs, &options)
    }

    /// Links a namespace to the node, which is its gateway.
    fn link(&self, namespace: &Namespace, device: &str, own: Both, gateway: Both) -> Result<()> {
        veth(namespace, "eth0", &self.node, device)?;
        for (namespace, device, (v4, v6)) in [(namespace, "eth0", own), (&self.node, device, gateway)] {
            namespace.sysctl(&format!("net/ipv6/conf/{device}/disable_ipv6"), "0")?;
            namespace.sysctl(&format!("net/ipv6/conf/{device}/accept_dad"), "0")?;
            namespace.up(device)?;
            namespace.address(device, v4, 24)?;
            namespace.address(device, v6, 64)?;
            namespace.tx_offload(device, self.setup.tx_offload)?;
        }
        namespace.route_via(Ipv4Addr::UNSPECIFIED, 0, gateway.0)?;
        namespace.default_route_v6(gateway.1)
    }
}

const PORTS_OF_SLICE: &str = "- {name: tcp, port: 8080, protocol: TCP}\n- {name: udp, port: 8080, protocol: UDP}\n\
                              - {name: sctp, port: 8080, protocol: SCTP}\n";

fn service() -> String {
    let (v4, v6) = VIP;
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec:\n  clusterIP: {v4}\n  clusterIPs: \
         [{v4}, \"{v6}\"]\n  ipFamilies: [IPv4, IPv6]\n  ports:\n  - {{name: tcp, port: {PORT}, protocol: TCP}}\n  \
         - {{name: udp, port: {PORT}, protocol: UDP}}\n  - {{name: sctp, port: {PORT}, protocol: SCTP}}\n"
    )
}

/// Answers each byte with the backend's number, until the process ends.
fn serve(backend: &Namespace, number: u8) -> Result<()> {
    let any = (Ipv6Addr::UNSPECIFIED, TARGET);
    let listener = backend.run(|| TcpListener::bind(any))?;
    let socket = backend.run(|| UdpSocket::bind(any))?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut question = [0];
                while stream.read_exact(&mut question).is_ok() && stream.write_all(&[number]).is_ok() {}
            });
        }
    });
    thread::spawn(move || {
        let mut question = [0];
        while let Ok((_, peer)) = socket.recv_from(&mut question) {
            // A client that goes away early is the client's to report.
            let _ = socket.send_to(&[number], peer);
        }
    });
    Ok(())
}

/// A connection or a socket of the client.
pub(crate) enum Talk {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Talk {
    /// Connects by TCP.
    pub(crate) fn tcp(client: &Namespace, to: IpAddr) -> Result<Self> {
        let to = SocketAddr::new(to, PORT);
        let stream = client.run(|| TcpStream::connect_timeout(&to, patient(CONNECT_TIMEOUT)));
        let stream = stream.with_context(|| format!("connecting to {to}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patient(ANSWER_TIMEOUT)))?;
        Ok(Self::Tcp(stream))
    }

    /// Opens a UDP socket.
    pub(crate) fn udp(client: &Namespace, to: IpAddr) -> Result<Self> {
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = client.run(|| {
            UdpSocket::bind((any, 0)).and_then(|socket| {
                socket.connect((to, PORT))?;
                Ok(socket)
            })
        })?;
        socket.set_read_timeout(Some(patient(ANSWER_TIMEOUT)))?;
        Ok(Self::Udp(socket))
    }

    /// The number of the backend that answers.
    pub(crate) fn ask(&mut self) -> std::io::Result<usize> {
        let mut answer = [0];
        match self {
            Self::Tcp(stream) => {
                stream.write_all(b"?")?;
                stream.read_exact(&mut answer)?;
            }
            Self::Udp(socket) => {
                socket.send(b"?")?;
                socket.recv(&mut answer)?;
            }
        }
        Ok(answer[0].into())
    }
}
