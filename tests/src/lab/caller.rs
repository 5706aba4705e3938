//! A process in a namespace and a cgroup of its own that calls Services when it is asked to: what socket hooks do depends
//! on who calls, so these callers are no threads of the test.
//!
//! The process is `src/bin/caller.rs`; questions and answers are lines.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::cgroup::Cgroup;
use super::netns::Namespace;

/// A running caller; dropping it ends the process.
pub struct Caller {
    name: String,
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

/// An answer of a backend, and what the socket says about where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Name of the backend.
    pub backend: String,
    /// The client, as the backend saw it.
    pub client: SocketAddr,
    /// Where the answer came from, for a TCP connection its peer.
    pub from: SocketAddr,
}

/// What a caller was told instead of an answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Failed {
    /// The error number.
    pub errno: i32,
    /// The same in words.
    pub what: String,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} (errno {})", self.what, self.errno)
    }
}

impl std::error::Error for Failed {}

/// How connections made one after the other have ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tally {
    /// How many were answered.
    pub answered: u64,
    /// How many were not, but for those that were reset.
    pub failed: u64,
    /// How many were reset after they had been accepted.
    pub reset: u64,
    /// Why the last that was not answered was not.
    pub why: String,
}

impl Tally {
    /// Fails unless every connection was answered.
    pub fn is_whole(&self) -> Result<()> {
        ensure!(self.failed == 0 && self.reset == 0, "{self:?}");
        Ok(())
    }
}

impl Caller {
    /// Starts the program at `binary` in the namespace and the cgroup.
    pub fn start(binary: &Path, namespace: &Namespace, cgroup: &Cgroup) -> Result<Self> {
        let mut command = namespace.command(binary);
        cgroup.start_in(&mut command)?;
        Self::spawn(command, namespace)
    }

    /// The same in the cgroup of the test.
    pub fn start_beside(binary: &Path, namespace: &Namespace) -> Result<Self> {
        Self::spawn(namespace.command(binary), namespace)
    }

    fn spawn(mut command: Command, namespace: &Namespace) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let stdin = child.stdin.take().context("a caller has an input")?;
        let stdout = BufReader::new(child.stdout.take().context("a caller has an output")?);
        Ok(Self { name: namespace.name().to_string(), child, stdin, stdout })
    }

    /// Asks over a TCP connection of its own.
    pub fn http(&mut self, target: SocketAddr) -> Result<Result<Answer, Failed>> {
        self.answer(&format!("http {target}"))
    }

    /// Asks over a UDP socket of its own that is connected first.
    pub fn udp(&mut self, target: SocketAddr) -> Result<Result<Answer, Failed>> {
        self.answer(&format!("udp {target}"))
    }

    /// Opens a UDP socket under a name; it stays open.
    pub fn open(&mut self, socket: &str, is_v6: bool) -> Result<()> {
        self.plain(&format!("open {socket} {}", if is_v6 { "[::]:0" } else { "0.0.0.0:0" }))
    }

    /// Opens a UDP socket at a port that others may have too.
    pub fn open_at(&mut self, socket: &str, is_v6: bool, port: u16) -> Result<()> {
        self.plain(&format!("open {socket} {}:{port}", if is_v6 { "[::]" } else { "0.0.0.0" }))
    }

    /// Connects an open UDP socket.
    pub fn connect(&mut self, socket: &str, target: SocketAddr) -> Result<()> {
        self.plain(&format!("connect {socket} {target}"))
    }

    /// Asks over a connected UDP socket.
    pub fn ask(&mut self, socket: &str) -> Result<Result<Answer, Failed>> {
        self.answer(&format!("ask {socket}"))
    }

    /// Asks over an open UDP socket, naming the target with the datagram.
    pub fn ask_at(&mut self, socket: &str, target: SocketAddr) -> Result<Result<Answer, Failed>> {
        self.answer(&format!("ask-at {socket} {target}"))
    }

    /// Sends so many bytes over a connected UDP socket, and tells how many came back.
    pub fn echo(&mut self, socket: &str, bytes: usize) -> Result<usize> {
        Ok(self.exchange(&format!("echo {socket} {bytes}"))??.parse()?)
    }

    /// Opens so many UDP sockets, one after the other: each is connected and closed, or sends a datagram and is closed.
    pub fn churn(&mut self, sockets: u32, target: SocketAddr) -> Result<()> {
        self.plain(&format!("churn {sockets} {target}"))
    }

    /// Opens a TCP connection under a name; it stays open.
    pub fn hold(&mut self, connection: &str, target: SocketAddr) -> Result<()> {
        self.plain(&format!("hold {connection} {target}"))
    }

    /// Asks over an open TCP connection.
    pub fn ask_held(&mut self, connection: &str) -> Result<Result<Answer, Failed>> {
        self.answer(&format!("ask-held {connection}"))
    }

    /// Asks twice from an open UDP socket before it reads either answer, as resolvers ask for A and AAAA.
    pub fn ask_both(&mut self, socket: &str, target: SocketAddr) -> Result<Result<[Answer; 2], Failed>> {
        let question = format!("both {socket} {target}");
        let text = match self.exchange(&question)? {
            Ok(text) => text,
            Err(failed) => return Ok(Err(failed)),
        };
        let (first, second) = text.split_once('\t').context("two answers")?;
        Ok(Ok([answer_of(&question, first)?, answer_of(&question, second)?]))
    }

    /// Connects from a port, asks, and closes so that the port is free at once.
    pub fn http_from(&mut self, port: u16, target: SocketAddr) -> Result<Result<Answer, Failed>> {
        self.answer(&format!("fixed {port} {target}"))
    }

    /// Fetches so many bytes and says how many have come; a wrong one is a failure.
    pub fn fetch(&mut self, bytes: usize, target: SocketAddr) -> Result<Result<usize, Failed>> {
        Ok(match self.exchange(&format!("fetch {bytes} {target}"))? {
            Ok(text) => Ok(text.parse()?),
            Err(failed) => Err(failed),
        })
    }

    /// Binds a socket of a protocol and closes it again.
    pub fn bind(&mut self, protocol: &str, address: SocketAddr) -> Result<Result<(), Failed>> {
        Ok(self.exchange(&format!("bind {protocol} {address}"))?.map(drop))
    }

    /// Begins to connect, ask and close again and again, until the process ends.
    pub fn hammer(&mut self, target: SocketAddr) -> Result<()> {
        self.plain(&format!("hammer {target}"))
    }

    /// The same over UDP, with a socket for each question.
    pub fn hammer_udp(&mut self, target: SocketAddr) -> Result<()> {
        self.plain(&format!("hammer-udp {target}"))
    }

    /// Tells how the connections have gone so far.
    pub fn tally(&mut self) -> Result<Tally> {
        let text = self.exchange("tally")??;
        let mut words = text.splitn(4, ' ');
        let mut number = || words.next().unwrap_or_default().parse::<u64>();
        let (answered, failed, reset) = (number()?, number()?, number()?);
        Ok(Tally { answered, failed, reset, why: words.next().unwrap_or_default().to_string() })
    }

    /// Accepts connections by the thousand, in turn with other callers at the same address, and sends back what each says.
    pub fn crowd_serve(&mut self, address: SocketAddr) -> Result<()> {
        self.plain(&format!("crowd-serve {address}"))
    }

    /// Opens so many connections that stay, from a port and those after it.
    pub fn crowd_open(&mut self, target: SocketAddr, first: usize, count: usize) -> Result<()> {
        self.plain(&format!("crowd-open {target} {first} {count}"))
    }

    /// Sends something of its own by each of them, and checks that it comes back; how many they are.
    pub fn crowd_ask(&mut self) -> Result<usize> {
        Ok(self.exchange("crowd-ask")??.parse()?)
    }

    /// How often something was sent back by [`Self::crowd_serve`].
    pub fn crowd_echoed(&mut self) -> Result<usize> {
        Ok(self.exchange("crowd-echoed")??.parse()?)
    }

    fn plain(&mut self, question: &str) -> Result<()> {
        self.exchange(question)?.with_context(|| question.to_string())?;
        Ok(())
    }

    fn answer(&mut self, question: &str) -> Result<Result<Answer, Failed>> {
        let text = match self.exchange(question)? {
            Ok(text) => text,
            Err(failed) => return Ok(Err(failed)),
        };
        Ok(Ok(answer_of(question, &text)?))
    }

    fn exchange(&mut self, question: &str) -> Result<Result<String, Failed>> {
        writeln!(self.stdin, "{question}")?;
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        let line = line.trim_end();
        ensure!(!line.is_empty(), "the caller in {} ended at {question:?}", self.name);
        let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
        match kind {
            "ok" => Ok(Ok(rest.to_string())),
            "failed" => {
                let (errno, what) = rest.split_once(' ').context("an error number and a text")?;
                Ok(Err(Failed { errno: errno.parse()?, what: what.to_string() }))
            }
            _ => bail!("{question}: not an answer: {line}"),
        }
    }
}

fn answer_of(question: &str, text: &str) -> Result<Answer> {
    let words: Vec<&str> = text.split(' ').collect();
    let [backend, client, from] = words[..] else { bail!("{question}: not an answer: {text}") };
    Ok(Answer { backend: backend.to_string(), client: client.parse()?, from: from.parse()? })
}

impl Drop for Caller {
    fn drop(&mut self) {
        // An ended process is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
