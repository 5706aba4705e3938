//! The names of Services, from the running agent: its maps hold numbers.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    path::Path,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

/// How long the agent may take for any step of its answer; it is on this machine.
const PATIENCE: Duration = Duration::from_secs(3);
/// Longest answer; those of 30,000 service ports take 2 MiB.
const BYTES_MAX: u64 = 64 << 20;

/// Service ports by their ids; each family counts its own.
pub(super) type NamesById = BTreeMap<u32, String>;

/// The service ports of both families.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Names {
    #[serde(rename = "IPv4")]
    pub(super) v4: NamesById,
    #[serde(rename = "IPv6")]
    pub(super) v6: NamesById,
}

/// Asks the agent that listens on an address, if it is the one whose maps are below this directory.
pub(super) fn ask(address: SocketAddr, pin_dir: &Path) -> anyhow::Result<Names> {
    let body = get(reachable(address), "/services")?;
    let answer: Value = serde_json::from_str(&body).context("its answer is not JSON")?;
    let pins = answer["pin-dir"].as_str().context("its answer names no maps")?;
    ensure!(Path::new(pins) == pin_dir, "it has its maps in {pins}");
    serde_json::from_value(answer).context("its answer has no names")
}

/// Where a server on this machine is reached that listens everywhere.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip @ (IpAddr::V4(_) | IpAddr::V6(_)) => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// HTTP/1.0 (RFC 1945), in which an answer ends with its connection.
fn get(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    let read = stream.take(BYTES_MAX).read_to_string(&mut answer);
    if read? as u64 == BYTES_MAX {
        bail!(io::Error::other("its answer is longer than any"));
    }
    let (head, body) = answer.split_once("\r\n\r\n").context("its answer is not HTTP")?;
    let line = head.lines().next().unwrap_or_default();
    ensure!(line.split(' ').nth(1) == Some("200"), "it answers {line:?}");
    Ok(body.to_owned())
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use super::*;

    /// What is said of one answer.
    fn ask_one(answer: &'static str, pin_dir: &str) -> anyhow::Result<Names> {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a connection");
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).expect("a request");
                request.extend(byte);
            }
            assert!(request.starts_with(b"GET /services HTTP/1.0\r\n"));
            stream.write_all(answer.as_bytes()).expect("it listens");
        });
        let names = ask(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port), Path::new(pin_dir));
        server.join().expect("the server has answered");
        names
    }

    #[test]
    fn names_are_those_of_the_agent_whose_maps_are_asked() {
        let good = "HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n\
                    {\"pin-dir\": \"/pins\", \"IPv4\": {\"7\": \"shop/web:http\"}, \"IPv6\": {\"2\": \"shop/dns:udp\"}}";
        let names = ask_one(good, "/pins").expect("names");
        let named = |id, name: &str| NamesById::from([(id, name.to_owned())]);
        assert_eq!(names, Names { v4: named(7, "shop/web:http"), v6: named(2, "shop/dns:udp") });
        for (answer, pin_dir, says) in [
            (good, "/other", "has its maps in /pins"),
            ("HTTP/1.0 404 Not Found\r\n\r\n", "/pins", "404"),
            ("HTTP/1.0 200 OK\r\n\r\n{}", "/pins", "names no maps"),
            ("HTTP/1.0 200 OK\r\n\r\n{\"pin-dir\": \"/pins\"}", "/pins", "has no names"),
            ("HTTP/1.0 200 OK\r\n\r\nok", "/pins", "not JSON"),
            ("SSH-2.0-x\r\n", "/pins", "not HTTP"),
        ] {
            let error = format!("{:#}", ask_one(answer, pin_dir).expect_err(answer));
            assert!(error.contains(says), "{answer}: {error}");
        }
    }

    #[test]
    fn a_port_where_nobody_listens_is_an_error() {
        let free =
            TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
        assert!(ask(free, Path::new("/pins")).is_err());
    }
}
