//! Real servers: HTTP and UDP echo on one address, each remembering whom it served.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, Path, State};
use axum::response::Json;
use axum::routing::get;
use tokio::task::JoinHandle;

use super::netns::Namespace;
use super::runtime;

/// Port of every HTTP server in the lab.
pub const HTTP_PORT: u16 = 8080;
/// Port of every UDP server in the lab.
pub const UDP_PORT: u16 = 9000;
/// A datagram with this content is answered with the server's name and the peer it saw; any other is echoed unchanged.
pub const UDP_WHOAMI: &[u8] = b"whoami?";

/// Length after which the test pattern repeats: a prime, so that lost or swapped segments never line up.
const PATTERN_LEN: usize = 65_521;

/// One request or datagram as the server saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    /// Source address of the connection or datagram.
    pub peer: SocketAddr,
    /// Bytes of the datagram, or of the body that was asked for.
    pub length: usize,
}

/// An HTTP server and a UDP echo server of one name, stopped when dropped.
pub struct Server {
    name: String,
    address: Ipv4Addr,
    http: Arc<Mutex<Vec<Served>>>,
    udp: Arc<Mutex<Vec<Served>>>,
    tasks: Vec<JoinHandle<()>>,
}

#[derive(Clone)]
struct HttpState {
    name: Arc<str>,
    served: Arc<Mutex<Vec<Served>>>,
}

impl Server {
    /// Starts both servers on an address of the namespace.
    pub fn start(namespace: &Namespace, name: &str, address: Ipv4Addr) -> Result<Self> {
        let (http, udp) = (Arc::default(), Arc::default());
        let tasks = vec![
            serve_http(namespace, name, address, Arc::clone(&http))?,
            serve_udp(namespace, name, address, Arc::clone(&udp))?,
        ];
        Ok(Self { name: name.to_string(), address, http, udp, tasks })
    }

    /// Returns the name the server answers with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the address the server listens on.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Returns the HTTP requests answered so far, in order.
    pub fn http_served(&self) -> Vec<Served> {
        self.http.lock().expect("no holder panics").clone()
    }

    /// Returns the datagrams answered so far, in order.
    pub fn udp_served(&self) -> Vec<Served> {
        self.udp.lock().expect("no holder panics").clone()
    }

    /// Forgets what was served.
    pub fn forget(&self) {
        self.http.lock().expect("no holder panics").clear();
        self.udp.lock().expect("no holder panics").clear();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Checks a stream against the test pattern, part by part.
#[derive(Default)]
pub struct PatternCheck {
    position: usize,
}

impl PatternCheck {
    /// Compares the next part of the body and fails at the first wrong byte.
    pub fn feed(&mut self, mut part: &[u8]) -> Result<()> {
        while !part.is_empty() {
            let expected = &pattern()[self.position % PATTERN_LEN..];
            let length = part.len().min(expected.len());
            let (now, rest) = part.split_at(length);
            if now != &expected[..length] {
                let wrong = now.iter().zip(expected).position(|(got, want)| got != want).unwrap_or(0);
                anyhow::bail!("byte {} of the body is wrong", self.position + wrong);
            }
            self.position += length;
            part = rest;
        }
        Ok(())
    }

    /// Returns how many bytes were right so far.
    pub fn length(&self) -> usize {
        self.position
    }
}

/// Returns the first bytes of the test pattern, for datagrams.
pub fn pattern_of(length: usize) -> Vec<u8> {
    pattern().iter().copied().cycle().take(length).collect()
}

fn pattern() -> &'static [u8] {
    static PATTERN: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    PATTERN.get_or_init(|| {
        // xorshift32 (Marsaglia, "Xorshift RNGs", 2003).
        let mut state = 0x9e37_79b9_u32;
        let step = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state.to_be_bytes()[0]
        };
        std::iter::repeat_with(step).take(PATTERN_LEN).collect()
    })
}

fn serve_http(
    namespace: &Namespace,
    name: &str,
    address: Ipv4Addr,
    served: Arc<Mutex<Vec<Served>>>,
) -> Result<JoinHandle<()>> {
    let listener = namespace
        .run(|| -> std::io::Result<_> {
            let socket = tokio::net::TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind((address, HTTP_PORT).into())?;
            let _context = runtime().enter();
            socket.listen(4096)
        })
        .with_context(|| format!("HTTP server {name} on {address}:{HTTP_PORT}"))?;
    let app = axum::Router::new()
        .route("/whoami", get(whoami))
        .route("/bytes/{length}", get(bytes))
        .with_state(HttpState { name: name.into(), served })
        .into_make_service_with_connect_info::<SocketAddr>();
    Ok(runtime().spawn(async move {
        // axum's server goes on after every error of a single connection and never returns.
        let _ = axum::serve(listener, app).await;
    }))
}

async fn whoami(
    State(state): State<HttpState>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
) -> Json<serde_json::Value> {
    state.served.lock().expect("no holder panics").push(Served { peer, length: 0 });
    Json(serde_json::json!({ "backend": &*state.name, "peer": peer.to_string() }))
}

async fn bytes(
    State(state): State<HttpState>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    Path(length): Path<usize>,
) -> ([(&'static str, String); 2], Body) {
    state.served.lock().expect("no holder panics").push(Served { peer, length });
    let parts = (0..length).step_by(PATTERN_LEN).map(move |start| {
        let end = PATTERN_LEN.min(length - start);
        Ok::<_, std::io::Error>(Bytes::from_static(&pattern()[..end]))
    });
    let headers = [("content-length", length.to_string()), ("x-backend", state.name.to_string())];
    (headers, Body::from_stream(futures_util::stream::iter(parts)))
}

fn serve_udp(
    namespace: &Namespace,
    name: &str,
    address: Ipv4Addr,
    served: Arc<Mutex<Vec<Served>>>,
) -> Result<JoinHandle<()>> {
    let socket = namespace
        .run(|| -> std::io::Result<_> {
            let socket = std::net::UdpSocket::bind((address, UDP_PORT))?;
            socket.set_nonblocking(true)?;
            let _context = runtime().enter();
            tokio::net::UdpSocket::from_std(socket)
        })
        .with_context(|| format!("UDP server {name} on {address}:{UDP_PORT}"))?;
    let name = name.to_string();
    Ok(runtime().spawn(async move {
        let mut buffer = vec![0; 65_536];
        loop {
            // An ICMP error of an earlier answer surfaces here and concerns nobody else.
            let Ok((length, peer)) = socket.recv_from(&mut buffer).await else { continue };
            served.lock().expect("no holder panics").push(Served { peer, length });
            let answer = if &buffer[..length] == UDP_WHOAMI {
                format!("{name} {peer}").into_bytes()
            } else {
                buffer[..length].to_vec()
            };
            let _ = socket.send_to(&answer, peer).await;
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_of_the_pattern_is_right_however_it_is_cut() {
        let body = pattern_of(200_000);
        let mut check = PatternCheck::default();
        for part in body.chunks(777) {
            check.feed(part).unwrap();
        }
        assert_eq!(check.length(), 200_000);
    }

    #[test]
    fn swapped_segments_are_noticed() {
        let mut body = pattern_of(4_096);
        body.swap(1_448, 2_896);
        assert!(PatternCheck::default().feed(&body).is_err());
    }
}
