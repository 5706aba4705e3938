//! What the cases share: the four combinations of mode and offload, and ways to reach a chosen backend.

use std::io::Write;
use std::net::SocketAddr;
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use xdp_agent_tests::lab::agent::{Agent, Mode};
use xdp_agent_tests::lab::clients::{HttpConnection, UdpClient, Whoami};
use xdp_agent_tests::lab::netns::Namespace;
use xdp_agent_tests::lab::world::{CLIENT, NODE, NODE_DIRECT, World, WorldOptions};

/// Connections after which a backend that was never chosen is not in the ring: with four backends the chance to miss one
/// by luck is (3/4)^100, below 1e-12.
const TRIES_MAX: usize = 100;

/// One combination of attach mode and transmit checksum offload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) mode: Mode,
    pub(crate) tx_offload: bool,
}

/// A world with a running agent; fields drop in order, so the agent ends before its world.
pub(crate) struct Running {
    pub(crate) agent: Agent,
    pub(crate) world: World,
}

/// Makes a module with one test per combination of mode and offload.
macro_rules! each_mode_and_offload {
    ($name:ident) => {
        mod $name {
            use xdp_agent_tests::lab::agent::Mode;

            use crate::setup::Setup;

            #[test]
            fn native_with_tx_offload() -> anyhow::Result<()> {
                super::$name(Setup { mode: Mode::Native, tx_offload: true })
            }

            #[test]
            fn native_with_complete_checksums() -> anyhow::Result<()> {
                super::$name(Setup { mode: Mode::Native, tx_offload: false })
            }

            #[test]
            fn generic_with_tx_offload() -> anyhow::Result<()> {
                super::$name(Setup { mode: Mode::Generic, tx_offload: true })
            }

            #[test]
            fn generic_with_complete_checksums() -> anyhow::Result<()> {
                super::$name(Setup { mode: Mode::Generic, tx_offload: false })
            }
        }
    };
}

/// Makes a module with one test per mode, with checksum offload on as devices come.
macro_rules! each_mode {
    ($name:ident) => {
        each_mode!($name, true);
    };
    ($name:ident, $tx_offload:literal) => {
        mod $name {
            use xdp_agent_tests::lab::agent::Mode;

            use crate::setup::Setup;

            #[test]
            fn native() -> anyhow::Result<()> {
                super::$name(Setup { mode: Mode::Native, tx_offload: $tx_offload })
            }

            #[test]
            fn generic() -> anyhow::Result<()> {
                super::$name(Setup { mode: Mode::Generic, tx_offload: $tx_offload })
            }
        }
    };
}

/// The same with complete checksums, as frames have them on a wire.
macro_rules! each_mode_of_a_wire {
    ($name:ident) => {
        each_mode!($name, false);
    };
}

impl Setup {
    /// Builds the standard world of two local and two remote backends and starts the agent.
    pub(crate) fn start(self) -> Result<Running> {
        self.start_with(WorldOptions::default())
    }

    /// Builds a world with this combination's offload and starts the agent in its mode.
    pub(crate) fn start_with(self, options: WorldOptions) -> Result<Running> {
        let world = self.world(options)?;
        let agent = world.start_agent(self.mode)?;
        self.check_mode(&agent, "eth0")?;
        Ok(Running { agent, world })
    }

    /// Builds a world without an agent.
    pub(crate) fn world(self, options: WorldOptions) -> Result<World> {
        World::build(WorldOptions { tx_offload: self.tx_offload, ..options })
    }

    /// Fails unless the agent attached as it was told.
    pub(crate) fn check_mode(self, agent: &Agent, interface: &str) -> Result<()> {
        let (mode, reason) = agent.mode_of(interface)?;
        ensure!(mode == self.mode.name(), "{interface} is {mode} ({reason}), not {:?}", self.mode);
        Ok(())
    }
}

/// Opens connections until one reaches a backend whose name begins with a text.
pub(crate) async fn connection_to(
    client: &Namespace,
    target: SocketAddr,
    prefix: &str,
) -> Result<HttpConnection> {
    for _ in 0..TRIES_MAX {
        let mut connection = HttpConnection::open(client, target).await?;
        let whoami = connection.whoami().await?;
        check_peer(&whoami)?;
        if whoami.backend.starts_with(prefix) {
            return Ok(connection);
        }
    }
    bail!("{TRIES_MAX} connections to {target} met no backend {prefix}")
}

/// Opens UDP sockets until one is served by a backend whose name begins with a text.
pub(crate) async fn socket_to(client: &Namespace, target: SocketAddr, prefix: &str) -> Result<UdpClient> {
    for _ in 0..TRIES_MAX {
        let socket = UdpClient::open(client, target, 0).await?;
        let whoami = socket.whoami().await.with_context(|| format!("UDP to {target}"))?;
        check_peer(&whoami)?;
        if whoami.backend.starts_with(prefix) {
            return Ok(socket);
        }
    }
    bail!("{TRIES_MAX} sockets to {target} met no backend {prefix}")
}

/// Fails unless a local backend saw the client's own address and a remote one an address of the node.
///
/// The port is the client's own too unless another connection to the same backend has it already.
pub(crate) fn check_peer(whoami: &Whoami) -> Result<()> {
    let Whoami { backend, peer } = whoami;
    if backend.starts_with("local") {
        ensure!(peer.ip() == CLIENT, "{backend} saw {peer}, not {CLIENT}");
    } else {
        ensure!(peer.ip() == NODE || peer.ip() == NODE_DIRECT, "{backend} saw {peer}, not the node");
    }
    Ok(())
}

/// Fails unless the log holds every one of these texts.
pub(crate) fn says(log: &str, parts: &[&str]) -> Result<()> {
    for part in parts {
        ensure!(log.contains(part), "the log does not say {part:?}:\n{log}");
    }
    Ok(())
}

/// Fails unless a metric with this value of a label is above zero.
pub(crate) fn counted(agent: &Agent, label: &str) -> Result<()> {
    let count = agent.metric("", &format!("\"{label}\""))?;
    ensure!(count > 0.0, "no metric counts {label}");
    Ok(())
}

/// Has a node take rules, as a CNI or another proxy writes them.
pub(crate) fn nft(node: &Namespace, rules: &str) -> Result<()> {
    let mut command = node.command("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped());
    let mut nft = command.spawn().context("cannot run nft; install nftables")?;
    nft.stdin.take().context("nft has an input")?.write_all(rules.as_bytes())?;
    let status = nft.wait()?;
    ensure!(status.success(), "nft ended with {status} at {rules}");
    Ok(())
}
