//! Connections by the thousand: more than a process may have descriptors take several callers, at either end.

use std::io::{self, Error, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, connect, listen, setsockopt, socket,
    sockopt,
};

use super::{PATIENCE, patient};

/// Connections that speak in a turn, and how long one lasts. A veth has room for 256 frames; where thousands speak at once most
/// of them lose theirs at their own device, and again with each repetition (on 6.18 until TCP gives up).
const PER_TURN: u32 = 32;
const TURN: Duration = Duration::from_millis(1);
/// Openers that may wait for a listener.
const BACKLOG: i32 = 4_096;

/// Connections of one process.
#[derive(Default)]
pub(super) struct Crowd {
    opened: Vec<TcpStream>,
    accepted: Arc<Mutex<Vec<TcpStream>>>,
}

impl Crowd {
    /// Accepts whoever connects from now on, in turn with other processes at the same address.
    pub(super) fn serve(&self, address: SocketAddr) -> io::Result<String> {
        let socket = tcp_socket(&address)?;
        listen(&socket, Backlog::new(BACKLOG)?)?;
        let (listener, accepted) = (TcpListener::from(socket), Arc::clone(&self.accepted));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                accepted.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
            }
        });
        Ok(String::new())
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

    /// Sends the number of each connection by it, in turns.
    pub(super) fn tell(&mut self) -> io::Result<String> {
        for (number, stream) in (0u32..).zip(&mut self.opened) {
            stream.write_all(&number.to_be_bytes())?;
            take_turn(number);
        }
        Ok(String::new())
    }

    /// Sends back what has come by each connection that was accepted, in turns.
    pub(super) fn echo(&self) -> io::Result<String> {
        let mut accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        for (turn, stream) in (0u32..).zip(accepted.iter_mut()) {
            let mut number = [0; 4];
            stream.set_read_timeout(Some(patient(PATIENCE)))?;
            stream
                .read_exact(&mut number)
                .map_err(|error| Error::other(format!("nothing from {:?}: {error}", stream.peer_addr())))?;
            stream.write_all(&number)?;
            take_turn(turn);
        }
        Ok(accepted.len().to_string())
    }

    /// Checks that each number has come back by its own connection.
    pub(super) fn hear(&mut self) -> io::Result<String> {
        for (number, stream) in (0u32..).zip(&mut self.opened) {
            let mut answer = [0; 4];
            stream.read_exact(&mut answer)?;
            if answer != number.to_be_bytes() {
                return Err(Error::other(format!("connection {number} got {answer:?}")));
            }
        }
        Ok(self.opened.len().to_string())
    }
}

/// Pauses after each turn.
fn take_turn(spoken: u32) {
    if spoken.is_multiple_of(PER_TURN) {
        thread::sleep(TURN);
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
