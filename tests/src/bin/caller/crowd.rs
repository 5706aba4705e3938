//! Connections by the thousand: more than a process may have descriptors take several callers, at either end.

use std::io::{self, Error, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, connect, listen, setsockopt, socket,
    sockopt,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{PATIENCE, patient};

/// Openers that may wait for a listener.
const BACKLOG: i32 = 4_096;
/// Connections that speak before the first of them hears. A veth has room for 256 frames, and what thousands send at once most
/// of them lose at their own device.
const AT_A_TIME: usize = 32;

/// Connections of one process.
#[derive(Default)]
pub(super) struct Crowd {
    opened: Vec<TcpStream>,
    echoed: Arc<AtomicUsize>,
}

impl Crowd {
    /// Accepts whoever connects from now on, in turn with other processes at the same address, and sends back what each says.
    pub(super) fn serve(&self, address: SocketAddr) -> io::Result<String> {
        let socket = tcp_socket(&address)?;
        listen(&socket, Backlog::new(BACKLOG)?)?;
        let (listener, echoed) = (std::net::TcpListener::from(socket), Arc::clone(&self.echoed));
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        thread::spawn(move || {
            runtime.block_on(async {
                let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
                while let Ok((mut stream, _)) = listener.accept().await {
                    let echoed = Arc::clone(&echoed);
                    tokio::spawn(async move {
                        let mut number = [0; 4];
                        // What fails here is missing at the client.
                        while stream.read_exact(&mut number).await.is_ok()
                            && stream.write_all(&number).await.is_ok()
                        {
                            echoed.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
            });
        });
        Ok(String::new())
    }

    /// How often something was sent back.
    pub(super) fn echoed(&self) -> String {
        self.echoed.load(Ordering::Relaxed).to_string()
    }

    /// Opens connections that stay, from these ports on: the kernel would look for free ones ever longer.
    pub(super) fn open(&mut self, target: SocketAddr, first: &str, count: &str) -> io::Result<String> {
        let first: u16 = first.parse().map_err(Error::other)?;
        let count: u16 = count.parse().map_err(Error::other)?;
        for port in first..first + count {
            let own = SocketAddr::new(super::any(&target).ip(), port);
            let socket = tcp_socket(&own)?;
            connect(socket.as_raw_fd(), &SockaddrStorage::from(target))?;
            let stream = TcpStream::from(socket);
            stream.set_read_timeout(Some(patient(PATIENCE)))?;
            self.opened.push(stream);
        }
        Ok(self.opened.len().to_string())
    }

    /// Sends the number of each connection by it, and checks that it comes back.
    pub(super) fn ask(&mut self) -> io::Result<String> {
        let mut number = 0u32;
        for streams in self.opened.chunks_mut(AT_A_TIME) {
            for (own, stream) in (number..).zip(&mut *streams) {
                stream.write_all(&own.to_be_bytes())?;
            }
            for (own, stream) in (number..).zip(&mut *streams) {
                let mut answer = [0; 4];
                stream.read_exact(&mut answer).map_err(|error| {
                    Error::other(format!("nothing by {:?}: {error}", stream.local_addr()))
                })?;
                if answer != own.to_be_bytes() {
                    return Err(Error::other(format!("connection {own} got {answer:?}")));
                }
            }
            number += streams.len() as u32;
        }
        Ok(number.to_string())
    }
}

/// A socket that is bound, beside others at the same address.
fn tcp_socket(own: &SocketAddr) -> io::Result<OwnedFd> {
    let family = if own.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReusePort, &true)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(*own))?;
    Ok(socket)
}
