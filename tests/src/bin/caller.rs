//! Calls Services when it is asked to: a line on the input, a line on the output (see `lab::caller`).

use std::collections::HashMap;
use std::io::{self, BufRead, Error, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sched::sched_getcpu;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, sockopt};
use socket2::{Domain, Socket, Type};
use tokio::net::TcpSocket;
use xdp_agent_tests::lab::servers::{PatternCheck, UDP_WHOAMI};
use xdp_agent_tests::lab::{patient, stay_on};

#[path = "caller/crowd.rs"]
mod crowd;

/// Longest wait for a connection or an answer: silence has to show as such.
const PATIENCE: Duration = Duration::from_secs(3);

/// Answered, failed, reset, and why the last that was not answered was not.
type Tally = Arc<Mutex<(u64, u64, u64, String)>>;

#[derive(Default)]
struct Sockets {
    udp: HashMap<String, UdpSocket>,
    tcp: HashMap<String, TcpStream>,
    tally: Tally,
    crowd: crowd::Crowd,
}

fn main() -> io::Result<()> {
    let mut sockets = Sockets::default();
    let (mut output, input) = (io::stdout().lock(), io::stdin().lock());
    for line in input.lines() {
        let line = line?;
        match sockets.obey(&line.split(' ').collect::<Vec<_>>()) {
            Ok(text) => writeln!(output, "ok {text}")?,
            Err(error) => writeln!(output, "failed {} {error}", error.raw_os_error().unwrap_or(0))?,
        }
        output.flush()?;
    }
    Ok(())
}

impl Sockets {
    fn obey(&mut self, words: &[&str]) -> io::Result<String> {
        match *words {
            ["http", target] => whoami(&mut connect(parse(target)?)?),
            ["udp", target] => ask_once(parse(target)?),
            ["open", name, address] => {
                self.udp.insert(name.to_owned(), open(parse(address)?)?);
                Ok(String::new())
            }
            ["connect", name, target] => self.socket(name)?.connect(parse(target)?).map(|()| String::new()),
            ["ask", name] => ask(self.socket(name)?),
            ["echo", name, bytes] => {
                let (socket, bytes) = (self.socket(name)?, bytes.parse().map_err(Error::other)?);
                socket.send(&vec![7; bytes])?;
                let mut buffer = vec![0; bytes + 1];
                Ok(socket.recv(&mut buffer)?.to_string())
            }
            ["ask-at", name, target] => {
                let socket = self.socket(name)?;
                socket.send_to(UDP_WHOAMI, parse(target)?)?;
                answer(socket)
            }
            ["hold", name, target] => {
                self.tcp.insert(name.to_owned(), connect(parse(target)?)?);
                Ok(String::new())
            }
            ["ask-held", name] => whoami(self.tcp.get_mut(name).ok_or(ErrorKind::NotFound)?),
            ["both", name, target] => {
                let (socket, target) = (self.socket(name)?, parse(target)?);
                socket.send_to(UDP_WHOAMI, target)?;
                socket.send_to(UDP_WHOAMI, target)?;
                Ok(format!("{}\t{}", answer(socket)?, answer(socket)?))
            }
            ["churn", count, target] => {
                let (count, target): (u32, _) = (count.parse().map_err(Error::other)?, parse(target)?);
                for number in 0..count {
                    let socket = UdpSocket::bind(any(&target))?;
                    if number % 2 == 0 {
                        socket.connect(target)?;
                    } else {
                        socket.send_to(&[], target)?;
                    }
                }
                Ok(String::new())
            }
            ["fixed", port, target] => {
                let port = port.parse().map_err(Error::other)?;
                whoami(&mut connect_from(port, parse(target)?)?)
            }
            ["fetch", bytes, target] => fetch(bytes, &mut connect(parse(target)?)?),
            ["bind", "tcp", address] => TcpListener::bind(parse(address)?).map(|_| String::new()),
            ["bind", "udp", address] => UdpSocket::bind(parse(address)?).map(|_| String::new()),
            ["hammer", target] => {
                let (target, tally) = (parse(target)?, Arc::clone(&self.tally));
                thread::spawn(move || hammer(&tally, || whoami(&mut connect_with_request(target)?)));
                Ok(String::new())
            }
            ["hammer-udp", target] => {
                let (target, tally) = (parse(target)?, Arc::clone(&self.tally));
                thread::spawn(move || hammer(&tally, || ask_once(target)));
                Ok(String::new())
            }
            ["tally"] => {
                let tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
                let (answered, failed, reset, why) = &*tally;
                Ok(format!("{answered} {failed} {reset} {why}"))
            }
            ["crowd-serve", address] => self.crowd.serve(parse(address)?),
            ["crowd-open", target, first, count] => self.crowd.open(parse(target)?, first, count),
            ["crowd-ask"] => self.crowd.ask(),
            ["crowd-echoed"] => Ok(self.crowd.echoed()),
            _ => Err(Error::other("no such question")),
        }
    }

    fn socket(&self, name: &str) -> io::Result<&UdpSocket> {
        self.udp.get(name).ok_or_else(|| ErrorKind::NotFound.into())
    }
}

/// Keeps what each connection sends on one CPU, and so in order where every device on the way keeps it.
fn stay_on_one_cpu() -> io::Result<()> {
    // A thread that is pinned stays where it is.
    stay_on(sched_getcpu()?)
}

/// Asks by a UDP socket of its own.
fn ask_once(target: SocketAddr) -> io::Result<String> {
    let socket = open(any(&target))?;
    socket.connect(target)?;
    ask(&socket)
}

fn hammer(tally: &Tally, ask: impl Fn() -> io::Result<String>) {
    loop {
        let result = stay_on_one_cpu().and_then(|()| ask());
        let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(_) => tally.0 += 1,
            Err(error) => {
                let is_reset = error.kind() == ErrorKind::ConnectionReset;
                *(if is_reset { &mut tally.2 } else { &mut tally.1 }) += 1;
                tally.3 = error.to_string();
            }
        }
    }
}

fn parse(text: &str) -> io::Result<SocketAddr> {
    text.parse().map_err(Error::other)
}

fn any(target: &SocketAddr) -> SocketAddr {
    match target {
        SocketAddr::V4(_) => SocketAddr::from(([0; 4], 0)),
        SocketAddr::V6(_) => SocketAddr::from(([0u16; 8], 0)),
    }
}

/// Opens a UDP socket; a port that is named it shares with others.
fn open(address: SocketAddr) -> io::Result<UdpSocket> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket::socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    socket::setsockopt(&socket, sockopt::ReusePort, &(address.port() != 0))?;
    socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(patient(PATIENCE)))?;
    Ok(socket)
}

fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, patient(PATIENCE))?;
    stream.set_read_timeout(Some(patient(PATIENCE)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Connects so that the last segment of the handshake carries the request.
///
/// `inet_ehash_insert` (net/ipv4/inet_hashtables.c, without the change "inet: Avoid ehash lookup race in
/// inet_ehash_insert()") takes a handshake out of the table before its connection is in: a request behind the handshake
/// that another CPU delivers in between meets the listener, which resets the connection. No proxy has a part in that, so
/// clients whose resets are counted send no such segment. A client without quick ACKs delays that of the handshake to go
/// with data (net/ipv4/tcp_input.c, `tcp_rcv_synsent_state_process`).
fn connect_with_request(target: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    socket.set_tcp_quickack(false)?;
    socket.connect_timeout(&target.into(), patient(PATIENCE))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(patient(PATIENCE)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Connects from a port of its own choice, and leaves it free at once when it closes, as clients of NFS do.
fn connect_from(port: u16, target: SocketAddr) -> io::Result<TcpStream> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let stream = runtime.block_on(async {
        let (socket, any) = match target {
            SocketAddr::V4(_) => (TcpSocket::new_v4()?, SocketAddr::from(([0; 4], port))),
            SocketAddr::V6(_) => (TcpSocket::new_v6()?, SocketAddr::from(([0u16; 8], port))),
        };
        socket.set_reuseaddr(true)?;
        socket.set_zero_linger()?;
        socket.bind(any)?;
        tokio::time::timeout(PATIENCE, socket.connect(target)).await?
    })?;
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Asks for the test pattern and checks every byte of it.
fn fetch(bytes: &str, stream: &mut TcpStream) -> io::Result<String> {
    stream.write_all(format!("GET /bytes/{bytes} HTTP/1.0\r\nhost: service\r\n\r\n").as_bytes())?;
    let (mut head, mut buffer) = (Vec::new(), [0; 1 << 16]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut buffer[..1])?;
        head.push(buffer[0]);
    }
    let mut check = PatternCheck::default();
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(check.length().to_string()),
            length => check.feed(&buffer[..length]).map_err(Error::other)?,
        }
    }
}

fn ask(socket: &UdpSocket) -> io::Result<String> {
    socket.send(UDP_WHOAMI)?;
    answer(socket)
}

/// Backend, client and source of an answer; of a connected socket its peer has to be the source.
fn answer(socket: &UdpSocket) -> io::Result<String> {
    let mut buffer = [0; 256];
    let (length, from) = socket.recv_from(&mut buffer)?;
    if let Ok(peer) = socket.peer_addr()
        && peer != from
    {
        return Err(Error::other(format!("the peer is {peer}, the answer came from {from}")));
    }
    Ok(format!("{} {from}", String::from_utf8_lossy(&buffer[..length])))
}

/// Backend, client and peer of a connection, which stays open.
fn whoami(stream: &mut TcpStream) -> io::Result<String> {
    stream.write_all(b"GET /whoami HTTP/1.1\r\nhost: service\r\n\r\n")?;
    let mut read = Vec::new();
    let mut buffer = [0; 1024];
    let body = loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        read.extend_from_slice(&buffer[..length]);
        let text = String::from_utf8_lossy(&read);
        if let Some((_, body)) = text.split_once("\r\n\r\n")
            && body.ends_with('}')
        {
            break body.to_string();
        }
    };
    let value: serde_json::Value = serde_json::from_str(&body).map_err(Error::other)?;
    let field = |name: &str| value[name].as_str().map(str::to_owned).ok_or(ErrorKind::InvalidData);
    Ok(format!("{} {} {}", field("backend")?, field("peer")?, stream.peer_addr()?))
}
