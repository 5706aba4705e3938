//! SCTP through Services, by raw sockets: kernels need not have the protocol, and what arrives is looked at byte by byte.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{SockaddrIn, SockaddrIn6, SockaddrStorage, sendto, sockopt::ReceiveTimeout};
use nix::sys::{socket::setsockopt, time::TimeVal};
use xdp_agent_tests::lab::{netns::Namespace, patient, wait_for};
use xdp_common::{net::SCTP, sctp::chunk};

use crate::{
    dual::{PORT, TARGET, each},
    setup::Setup,
    two_backends::{Place, TwoBackends, VIP, at},
};

const PATIENCE: Duration = Duration::from_secs(5);
const CLIENT_PORT: u16 = 40_000;
const INIT: [u8; 20] = [chunk::INIT, 0, 0, 20, 1, 2, 3, 4, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 9];
const COOKIE_ECHO: [u8; 8] = [10, 0, 0, 8, b'c', b'o', b'o', b'k'];

/// A raw socket of the protocol, in a namespace.
struct Raw {
    socket: OwnedFd,
    is_v4: bool,
}

/// A packet as it arrived: ports and chunks of one whose checksum is right.
#[derive(Debug, PartialEq, Eq)]
struct Arrived {
    from: IpAddr,
    sport: u16,
    dport: u16,
    chunks: Vec<u8>,
}

impl Raw {
    fn open(namespace: &Namespace, is_v4: bool) -> Result<Self> {
        let family = if is_v4 { libc::AF_INET } else { libc::AF_INET6 };
        let socket = namespace.run(|| {
            // SAFETY: the call takes numbers only, and its result is checked.
            let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, SCTP.into()) };
            // SAFETY: a descriptor that was just made is nobody else's.
            if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
        })?;
        let patience = patient(PATIENCE);
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(patience.as_secs() as i64, 0))?;
        Ok(Self { socket, is_v4 })
    }

    fn send(&self, to: IpAddr, sport: u16, dport: u16, chunks: &[u8]) -> Result<()> {
        let mut packet =
            [&sport.to_be_bytes()[..], &dport.to_be_bytes(), &[9, 9, 9, 9, 0, 0, 0, 0], chunks].concat();
        let check = crc32c(&packet);
        packet[8..12].copy_from_slice(&check);
        let flags = nix::sys::socket::MsgFlags::empty();
        // The port of the address of a raw socket is none.
        match SocketAddr::new(to, 0) {
            SocketAddr::V4(to) => sendto(self.socket.as_raw_fd(), &packet, &SockaddrIn::from(to), flags),
            SocketAddr::V6(to) => sendto(self.socket.as_raw_fd(), &packet, &SockaddrIn6::from(to), flags),
        }?;
        Ok(())
    }

    /// The next packet, whose checksum has to be right.
    fn receive(&self) -> Result<Arrived> {
        let mut buffer = [0; 2_048];
        let (len, from) = nix::sys::socket::recvfrom::<SockaddrStorage>(self.socket.as_raw_fd(), &mut buffer)
            .context("no packet")?;
        let from = from.context("a packet without a sender")?;
        let v4 = from.as_sockaddr_in().map(|from| IpAddr::from(from.ip()));
        let from =
            v4.or_else(|| from.as_sockaddr_in6().map(|from| from.ip().into())).context("another family")?;
        // Of IPv4 a raw socket sees the header too.
        let packet = if self.is_v4 { &buffer[usize::from(buffer[0] & 15) * 4..len] } else { &buffer[..len] };
        ensure!(packet[8..12] == crc32c(packet), "a wrong checksum: {packet:02x?}");
        let port = |at| u16::from_be_bytes([packet[at], packet[at + 1]]);
        Ok(Arrived { from, sport: port(0), dport: port(2), chunks: packet[12..].to_vec() })
    }
}

/// CRC32c (RFC 9260, appendix A) of a packet whose checksum counts as zero.
fn crc32c(packet: &[u8]) -> [u8; 4] {
    let mut crc = u32::MAX;
    for (at, byte) in packet.iter().enumerate() {
        crc ^= u32::from(if (8..12).contains(&at) { 0 } else { *byte });
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    (!crc).to_le_bytes()
}

each_mode!(sctp_reaches_backends_by_other_ports_with_the_right_checksum_and_so_do_answers);
fn sctp_reaches_backends_by_other_ports_with_the_right_checksum_and_so_do_answers(
    setup: Setup,
) -> Result<()> {
    for place in [Place::Elsewhere, Place::Here] {
        let world = TwoBackends::build(setup, place)?;
        world.publish(&[0])?;
        let agent = world.start_agent(&[])?;
        for vip in each(VIP) {
            talk(&world, vip).with_context(|| format!("{vip}, {place:?}"))?;
        }
        let flows = wait_for("associations to be counted", PATIENCE * 3, || {
            let flows = agent.metric("xdp_agent_flows", r#"state="sctp""#)?;
            ensure!(flows >= 2.0, "{flows} associations");
            Ok(flows)
        })?;
        ensure!(flows <= 2.0, "{flows} associations of two");
        let packets = agent.metric("xdp_agent_service_packets_total", r#"protocol="SCTP""#)?;
        ensure!(packets >= 8.0, "{packets} packets");
        // Without an endpoint, whoever calls is told so at once.
        world.publish(&[])?;
        for vip in each(VIP) {
            let client = Raw::open(&world.client, vip.is_ipv4())?;
            // An INIT from before the change is the backend's, which leaves it unanswered.
            setsockopt(&client.socket, ReceiveTimeout, &TimeVal::new(1, 0))?;
            wait_for("an ABORT", PATIENCE, || {
                client.send(vip, CLIENT_PORT + 1, PORT, &INIT)?;
                let answer = client.receive()?;
                ensure!(answer.chunks == [chunk::ABORT, 0, 0, 4], "{answer:?}");
                ensure!(
                    (answer.from, answer.sport, answer.dport) == (vip, PORT, CLIENT_PORT + 1),
                    "{answer:?}"
                );
                Ok(())
            })?;
        }
        agent.stop()?;
    }
    Ok(())
}

/// A handshake and data, each step seen at the other end.
fn talk(world: &TwoBackends, vip: IpAddr) -> Result<()> {
    let is_v4 = vip.is_ipv4();
    let (client, backend) = (Raw::open(&world.client, is_v4)?, Raw::open(&world.backends[0], is_v4)?);
    let [client_addr, node_addr] =
        [crate::two_backends::CLIENT, at(0, 1)].map(|both| each(both)[usize::from(!is_v4)]);
    let expected = if world.place == Place::Here { client_addr } else { node_addr };
    let init_ack = [&[chunk::INIT_ACK][..], &INIT[1..]].concat();
    for (sent, answered) in [
        (&INIT[..], &init_ack[..]),
        (&COOKIE_ECHO, &[chunk::COOKIE_ACK, 0, 0, 4]),
        (&[chunk::DATA, 3, 0, 19, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, b'o', b'd', b'd', 0], &[3, 0, 0, 4]),
    ] {
        client.send(vip, CLIENT_PORT, PORT, sent)?;
        let seen = backend.receive().context("at the backend")?;
        ensure!(
            (seen.from, seen.dport, &seen.chunks[..]) == (expected, TARGET, sent),
            "the backend has seen {seen:?}"
        );
        backend.send(seen.from, TARGET, seen.sport, answered)?;
        let answer = client.receive().context("at the client")?;
        let whole = Arrived { from: vip, sport: PORT, dport: CLIENT_PORT, chunks: answered.to_vec() };
        ensure!(answer == whole, "the client has seen {answer:?}");
    }
    Ok(())
}
