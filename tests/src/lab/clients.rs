//! Ordinary clients: HTTP over a connection one can look into, and UDP with deadlines.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::task::JoinHandle;

use super::netns::Namespace;
use super::servers::{PatternCheck, UDP_WHOAMI};
use super::{runtime, within};

/// Longest wait for one answer; far above what a retransmission or two cost.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Who answered, and whom it believed to answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whoami {
    /// Name of the backend.
    pub backend: String,
    /// The address the backend saw as its client.
    pub peer: SocketAddr,
}

/// What the kernel knows about a connection, from `TCP_INFO`.
#[derive(Clone, Copy, Debug)]
pub struct TcpInfo {
    /// Segments sent again since the connection began, the SYN included.
    pub retransmits: u32,
    /// Smoothed round-trip time.
    pub rtt_us: u32,
}

/// An open HTTP/1.1 connection.
pub struct HttpConnection {
    sender: SendRequest<Empty<Bytes>>,
    driver: JoinHandle<()>,
    socket: OwnedFd,
    local: SocketAddr,
    target: SocketAddr,
    handshake: Duration,
}

/// Opens a TCP connection from the namespace, from a given local port if it is not 0.
pub async fn tcp(namespace: &Namespace, target: impl Into<SocketAddr>, local_port: u16) -> Result<TcpStream> {
    let target = target.into();
    let socket = namespace.run(|| -> std::io::Result<TcpSocket> {
        let socket = TcpSocket::new_v4()?;
        if local_port != 0 {
            socket.set_reuseaddr(true)?;
            socket.bind((Ipv4Addr::UNSPECIFIED, local_port).into())?;
        }
        Ok(socket)
    })?;
    let stream = within("connecting", ANSWER_TIMEOUT, async { Ok(socket.connect(target).await?) });
    let stream = stream.await.with_context(|| format!("TCP to {target} from {namespace:?}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

impl HttpConnection {
    /// Connects from the namespace to an HTTP server or frontend.
    pub async fn open(namespace: &Namespace, target: impl Into<SocketAddr>) -> Result<Self> {
        Self::open_from(namespace, target, 0).await
    }

    /// Connects from a chosen local port; 0 leaves the choice to the kernel.
    pub async fn open_from(
        namespace: &Namespace,
        target: impl Into<SocketAddr>,
        local_port: u16,
    ) -> Result<Self> {
        let target = target.into();
        let start = Instant::now();
        let stream = tcp(namespace, target, local_port).await?;
        let handshake = start.elapsed();
        let (local, socket) = (stream.local_addr()?, stream.as_fd().try_clone_to_owned()?);
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let driver = runtime().spawn(async move {
            // A broken connection shows in the request that needed it.
            let _ = connection.await;
        });
        Ok(Self { sender, driver, socket, local, target, handshake })
    }

    /// Asks who answers.
    pub async fn whoami(&mut self) -> Result<Whoami> {
        within("GET /whoami", ANSWER_TIMEOUT, async {
            let body = self.get("/whoami").await?.into_body().collect().await?.to_bytes();
            let value: serde_json::Value = serde_json::from_slice(&body)?;
            let field = |name| value[name].as_str().with_context(|| format!("no {name} in {value}"));
            Ok(Whoami { backend: field("backend")?.to_string(), peer: field("peer")?.parse()? })
        })
        .await
        .with_context(|| self.to_string())
    }

    /// Fetches a body, compares every byte, and returns the name of the backend.
    pub async fn bytes(&mut self, length: usize, limit: Duration) -> Result<String> {
        within("GET /bytes", limit, async {
            let mut response = self.get(&format!("/bytes/{length}")).await?;
            let backend =
                response.headers().get("x-backend").context("no x-backend header")?.to_str()?.to_string();
            let mut check = PatternCheck::default();
            while let Some(frame) = response.frame().await {
                if let Some(part) = frame?.data_ref() {
                    check.feed(part)?;
                }
            }
            ensure!(check.length() == length, "{} of {length} bytes arrived", check.length());
            Ok(backend)
        })
        .await
        .with_context(|| self.to_string())
    }

    /// Returns the client's own address of the connection.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Returns how long connecting took.
    pub fn handshake(&self) -> Duration {
        self.handshake
    }

    /// Reads what the kernel knows about the connection.
    pub fn tcp_info(&self) -> Result<TcpInfo> {
        tcp_info(self.socket.as_raw_fd())
    }

    async fn get(&mut self, path: &str) -> Result<Response<Incoming>> {
        self.sender.ready().await?;
        let request = Request::get(path).header("host", self.target.to_string()).body(Empty::new())?;
        let response = self.sender.send_request(request).await?;
        ensure!(response.status().is_success(), "{path}: {}", response.status());
        Ok(response)
    }
}

impl std::fmt::Display for HttpConnection {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "HTTP {} to {}", self.local, self.target)
    }
}

impl Drop for HttpConnection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Fetches a path in one short connection and returns status code and body.
pub async fn http_get(
    namespace: &Namespace,
    target: impl Into<SocketAddr>,
    path: &str,
) -> Result<(u16, String)> {
    let target = target.into();
    let stream = tcp(namespace, target, 0).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = runtime().spawn(connection);
    let request = Request::get(path).header("host", target.to_string()).body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status().as_u16();
    let body = response.into_body().collect().await?.to_bytes();
    driver.abort();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}

/// Asks a frontend once, over a connection of its own.
pub async fn whoami_once(namespace: &Namespace, target: impl Into<SocketAddr>) -> Result<Whoami> {
    HttpConnection::open(namespace, target).await?.whoami().await
}

/// A UDP socket in a namespace, connected to one frontend.
pub struct UdpClient {
    socket: UdpSocket,
    target: SocketAddr,
}

impl UdpClient {
    /// Opens a socket, on a chosen local port if it is not 0.
    pub async fn open(namespace: &Namespace, target: impl Into<SocketAddr>, local_port: u16) -> Result<Self> {
        let target = target.into();
        let socket = namespace.run(|| -> std::io::Result<_> {
            let socket = std::net::UdpSocket::bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, local_port))?;
            socket.connect(target)?;
            socket.set_nonblocking(true)?;
            let _context = runtime().enter();
            UdpSocket::from_std(socket)
        })?;
        Ok(Self { socket, target })
    }

    /// Returns the client's own address.
    pub fn local(&self) -> Result<SocketAddr> {
        Ok(self.socket.local_addr()?)
    }

    /// Sends a datagram and fails unless exactly the same comes back.
    pub async fn echo(&self, payload: &[u8]) -> Result<()> {
        let answer = self.exchange(payload).await?;
        ensure!(answer == payload, "{} bytes came back changed ({} bytes)", payload.len(), answer.len());
        Ok(())
    }

    /// Asks who answers.
    pub async fn whoami(&self) -> Result<Whoami> {
        let answer = String::from_utf8(self.exchange(UDP_WHOAMI).await?)?;
        let Some((backend, peer)) = answer.split_once(' ') else { bail!("not an answer: {answer}") };
        Ok(Whoami { backend: backend.to_string(), peer: peer.parse()? })
    }

    async fn exchange(&self, payload: &[u8]) -> Result<Vec<u8>> {
        let mut buffer = vec![0; 65_536];
        let length = within("a UDP answer", ANSWER_TIMEOUT, async {
            self.socket.send(payload).await?;
            Ok(self.socket.recv(&mut buffer).await?)
        });
        let length =
            length.await.with_context(|| format!("UDP of {} bytes to {}", payload.len(), self.target))?;
        buffer.truncate(length);
        Ok(buffer)
    }
}

/// Reads `TCP_INFO` of a connected socket.
pub fn tcp_info(socket: impl AsRawFd) -> Result<TcpInfo> {
    // SAFETY: an all-zero tcp_info is valid.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: `info` and `length` describe a buffer that lives through the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &mut length,
        )
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error()).context("TCP_INFO");
    }
    Ok(TcpInfo { retransmits: info.tcpi_total_retrans, rtt_us: info.tcpi_rtt })
}
