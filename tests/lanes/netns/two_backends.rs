//! A client, a node and two backends, each by a link of its own and in both address families.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::Result;
use xdp_agent_tests::lab::{
    agent::{Agent, AgentOptions},
    manifests::Manifests,
    netns::{Namespace, PrivateBpffs},
    pass::PassProgram,
};

use crate::{
    dual::{self, Both},
    setup::Setup,
};

pub(crate) const CLIENT: Both =
    (Ipv4Addr::new(198, 51, 100, 2), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2));
pub(crate) const NODE: Both =
    (Ipv4Addr::new(198, 51, 100, 1), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1));
pub(crate) use crate::dual::VIP;
/// How long a backend may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);

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
        dual::link(&world.client, "eth0", CLIENT, &world.node, "out0", NODE, setup.tx_offload)?;
        for (backend, device) in ["in0", "in1"].into_iter().enumerate() {
            let host = &world.backends[backend];
            dual::link(host, "eth0", at(backend, 2), &world.node, device, at(backend, 1), setup.tx_offload)?;
        }
        dual::forward(&world.node)?;
        // Without them, what a native program sends to a veth is lost.
        for namespace in [&world.client, &world.backends[0], &world.backends[1]] {
            world._programs.push(PassProgram::attach(namespace, "eth0")?);
        }
        Ok(world)
    }

    /// Says which backends serve.
    pub(crate) fn publish(&self, backends: &[usize]) -> Result<()> {
        self.publish_with(backends, "")
    }

    /// The same with further lines in the specification of the Service.
    pub(crate) fn publish_with(&self, backends: &[usize], spec: &str) -> Result<()> {
        let node = if self.place == Place::Here { "node" } else { "other" };
        let endpoints: Vec<_> = backends.iter().map(|&backend| (at(backend, 2), node)).collect();
        let [v4, v6] = dual::slices(&endpoints);
        self.manifests.write("web.yaml", &[dual::service(VIP, &[]) + spec, v4, v6])
    }

    /// Says that a host behind both serves by UDP and TCP, on another node.
    pub(crate) fn publish_behind_both(&self, host: Both) -> Result<()> {
        let [v4, v6] = dual::slices(&[(host, "other")]);
        self.manifests.write("web.yaml", &[dual::service(VIP, &[]), v4, v6])
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
}

/// Answers each byte with the backend's number, until the process ends.
fn serve(backend: &Namespace, number: u8) -> Result<()> {
    let stream = move |mut stream: TcpStream| {
        let mut question = [0];
        while stream.read_exact(&mut question).is_ok() {
            stream.write_all(&[number])?;
        }
        Ok(())
    };
    dual::serve(backend, stream, move |_, _| vec![number])
}

/// A connection or a socket of the client.
pub(crate) enum Talk {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Talk {
    /// Connects by TCP.
    pub(crate) fn tcp(client: &Namespace, to: IpAddr) -> Result<Self> {
        dual::connect(client, to, ANSWER_TIMEOUT).map(Self::Tcp)
    }

    /// Opens a UDP socket.
    pub(crate) fn udp(client: &Namespace, to: IpAddr) -> Result<Self> {
        dual::socket(client, to, ANSWER_TIMEOUT).map(Self::Udp)
    }

    /// The same from an address of the client.
    pub(crate) fn udp_from(client: &Namespace, from: IpAddr, to: IpAddr) -> Result<Self> {
        dual::socket_from(client, from, to, ANSWER_TIMEOUT).map(Self::Udp)
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
