//! By which address a backend sees the clients of a Service.

use std::{
    io::{Read, Write},
    net::{IpAddr, Shutdown, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::netns::Namespace;

use crate::dual::{self, Both, connect, socket};

/// Has a host serve until the process ends: whoever asks is told the address that it is seen by.
pub(crate) fn serve(host: &Namespace) -> Result<()> {
    dual::serve(host, |mut stream| stream.write_all(&name(stream.peer_addr()?)), |peer, _| name(peer))
}

/// A client's address; the sockets of [`dual::serve`] are of IPv6 for both families.
fn name(peer: SocketAddr) -> Vec<u8> {
    peer.ip().to_canonical().to_string().into_bytes()
}

/// Asks the Service by TCP and UDP; what serves names has to see the client by this address.
pub(crate) fn seen_as(client: &Namespace, to: IpAddr, address: Both, timeout: Duration) -> Result<()> {
    let seen = if to.is_ipv4() { address.0.to_string() } else { address.1.to_string() };
    let mut stream = connect(client, to, timeout)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer == seen, "{answer} was seen by TCP, not {seen}");
    let socket = socket(client, to, timeout)?;
    socket.send(b"?")?;
    let mut answer = [0; 64];
    let len = socket.recv(&mut answer).with_context(|| format!("{to} by UDP"))?;
    ensure!(
        answer[..len] == *seen.as_bytes(),
        "{:?} was seen by UDP, not {seen}",
        String::from_utf8_lossy(&answer[..len])
    );
    Ok(())
}
