//! The client: a process in a pod's network namespace and cgroup, asked by lines on its input.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, ChildStdin, ChildStdout, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{SetSockOpt as _, sockopt};
use xdp_agent_tests::lab::{cgroup::Cgroup, netns::Namespace, stay_on};

/// Bytes of a request, and of its answer.
const MESSAGE: usize = 64;
const BULK: usize = 32 << 10;
/// What may wait in a connection, in bytes: so little that it stays in the cache of a core, because memory is shared with
/// neighbours.
const WINDOW: usize = 256 << 10;
/// Requests whose time is looked at together: a look costs as much as a tenth of a request.
const BATCH: u32 = 16;
const PATIENCE: Duration = Duration::from_secs(10);

/// What is done as often as it can be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Verb {
    /// Connect, send a request, read the answer and the end.
    Connect,
    /// Requests over one connection, one after the other.
    Request,
    /// Bytes over one connection.
    Bulk,
}

impl Verb {
    pub(super) const ALL: [Self; 3] = [Self::Connect, Self::Request, Self::Bulk];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Connect => "connections a second",
            Self::Request => "requests a second",
            Self::Bulk => "MiB a second",
        }
    }

    /// The least share of a direct connection that the project promises.
    pub(super) fn floor(self) -> f64 {
        match self {
            Self::Connect | Self::Request => 0.97,
            Self::Bulk => 0.99,
        }
    }

    /// What the first byte of a connection tells the server.
    fn letter(self) -> u8 {
        match self {
            Self::Connect => b'c',
            Self::Request => b'r',
            Self::Bulk => b'b',
        }
    }

    fn of_letter(letter: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|verb| verb.letter() == letter)
    }
}

/// A running client; dropping it ends the process.
pub(super) struct Client {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Client {
    pub(super) fn start(namespace: &Namespace, cgroup: &Cgroup) -> Result<Self> {
        let mut command = namespace.command(std::env::current_exe()?);
        command.args(["sockets", "--client"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        cgroup.start_in(&mut command)?;
        let mut child = command.spawn().context("cannot start a client")?;
        let stdin = child.stdin.take().context("the client has an input")?;
        let stdout = BufReader::new(child.stdout.take().context("the client has an output")?);
        Ok(Self { child, stdin, stdout })
    }

    /// The rate at which the client has done it for some time.
    pub(super) fn ask(&mut self, verb: Verb, target: SocketAddr, turn: Duration) -> Result<f64> {
        writeln!(self.stdin, "{} {target} {}", char::from(verb.letter()), turn.as_millis())?;
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        match line.trim().split_once(' ') {
            Some(("ok", rate)) => Ok(rate.parse()?),
            _ => bail!("the client says {:?}", line.trim()),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Both fail only when the process is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The CPU of the client; where the scheduler puts it and the server makes a factor of two in the rates. Bytes stay on one:
/// between two, the queue decides.
fn client_cpu(verb: Verb) -> Result<usize> {
    if matches!(verb, Verb::Bulk) { server_cpu() } else { Ok(0) }
}

fn server_cpu() -> Result<usize> {
    Ok(thread::available_parallelism()?.get().min(2) - 1)
}

/// Is a client until its input ends.
pub(super) fn serve() -> Result<()> {
    for line in io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let [verb, target, turn] = words[..] else { bail!("not a question: {line:?}") };
        let verb = verb.bytes().next().and_then(Verb::of_letter).context("an unknown verb")?;
        stay_on(client_cpu(verb)?)?;
        match rate(verb, target.parse()?, Duration::from_millis(turn.parse()?)) {
            Ok(rate) => println!("ok {rate}"),
            Err(error) => println!("failed {error}"),
        }
    }
    Ok(())
}

fn rate(verb: Verb, target: SocketAddr, turn: Duration) -> io::Result<f64> {
    let mut count = 0.0;
    let began;
    match verb {
        Verb::Connect => {
            began = Instant::now();
            while began.elapsed() < turn {
                let mut stream = open(verb, target)?;
                exchange(&mut stream)?;
                // The server ends it, so that no port of this side has to wait.
                if stream.read(&mut [0])? > 0 {
                    return Err(io::Error::other("the server says more than its answer"));
                }
                count += 1.0;
            }
        }
        Verb::Request => {
            let mut stream = open(verb, target)?;
            began = Instant::now();
            while began.elapsed() < turn {
                for _ in 0..BATCH {
                    exchange(&mut stream)?;
                }
                count += f64::from(BATCH);
            }
        }
        Verb::Bulk => {
            let mut stream = open(verb, target)?;
            let bytes = vec![0; BULK];
            // Until window and buffers have grown.
            let opened = Instant::now();
            while opened.elapsed() < turn {
                stream.write_all(&bytes)?;
            }
            began = Instant::now();
            while began.elapsed() < turn {
                stream.write_all(&bytes)?;
                count += BULK as f64 / f64::from(1 << 20);
            }
        }
    }
    Ok(count / began.elapsed().as_secs_f64())
}

fn open(verb: Verb, target: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(target)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    if matches!(verb, Verb::Bulk) {
        sockopt::SndBuf.set(&stream, &WINDOW)?;
    }
    if !matches!(verb, Verb::Connect) {
        stream.write_all(&[verb.letter()])?;
    }
    Ok(stream)
}

fn exchange(stream: &mut TcpStream) -> io::Result<()> {
    let mut message = [b'c'; MESSAGE];
    stream.write_all(&message)?;
    stream.read_exact(&mut message)
}

/// Serves one connection after the other for ever; clients take turns.
pub(super) fn answer(listener: &TcpListener) -> Result<()> {
    stay_on(server_cpu()?)?;
    let mut bytes = vec![0; BULK];
    for stream in listener.incoming() {
        // A client that ends shows in its own figures.
        let _ = stream.and_then(|stream| answer_one(stream, &mut bytes));
    }
    Ok(())
}

fn answer_one(mut stream: TcpStream, bytes: &mut [u8]) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut letter = [0];
    stream.read_exact(&mut letter)?;
    let message = &mut [0; MESSAGE];
    match Verb::of_letter(letter[0]) {
        // The first byte was one of the request.
        Some(Verb::Connect) => {
            stream.read_exact(&mut message[1..])?;
            stream.write_all(message)
        }
        Some(Verb::Request) => loop {
            stream.read_exact(message)?;
            stream.write_all(message)?;
        },
        Some(Verb::Bulk) => {
            sockopt::RcvBuf.set(&stream, &WINDOW)?;
            while stream.read(bytes)? > 0 {}
            Ok(())
        }
        None => Err(io::Error::other("an unknown verb")),
    }
}
