//! sock_diag: the connected UDP sockets of a network namespace, and their end (include/uapi/linux/inet_diag.h).

use std::{collections::HashSet, io};

use xdp_common::{
    net::{Address, Ip6},
    tables::Connected,
};

use crate::netlink::{self, Message, Protocol, Requests};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// Bit of the state that a connected UDP socket has (`TCP_ESTABLISHED`, net/tcp_states.h).
const CONNECTED: u32 = 1 << 1;
/// Where the identity of a socket is in a message, and in a request (`struct inet_diag_sockid`).
const ID_IN_MESSAGE: usize = 4;
const ID_IN_REQUEST: usize = 8;
const ID_LEN: usize = 48;
/// Where the attributes of a message begin, behind `struct inet_diag_msg`.
const ATTRIBUTES: usize = 72;
/// `INET_DIAG_CGROUP_ID`, from kernel 5.9.
const CGROUP_ID: u16 = 21;

/// A connected UDP socket, as the kernel tells of it.
#[derive(Debug, PartialEq)]
pub(super) struct Found {
    family: u8,
    /// Its identity, as the kernel wants it back.
    id: [u8; ID_LEN],
    pub(super) cookie: u64,
    /// Address of its peer; one of IPv4 is mapped.
    pub(super) addr: Ip6,
    /// Port of its peer.
    pub(super) port: [u8; 2],
    /// The cgroup it was made in, where the kernel tells.
    pub(super) cgroup: Option<u64>,
}

impl Found {
    /// Whether it still has the peer that it was led to. One that has been connected again, to what is no Service, has another.
    pub(super) fn is_connected_to(&self, to: &Connected) -> bool {
        (to.addr, to.port) == (self.addr, self.port)
    }
}

/// Ends sockets of this thread's namespace, those that are wanted, and notes them by their cookies.
///
/// # Errors
/// When the kernel does not tell of sockets, or has refused to end some; it ends all others first.
pub(super) fn destroy(is_wanted: impl Fn(&Found) -> bool, ended: &mut HashSet<u64>) -> io::Result<()> {
    let mut requests = Requests::open(Protocol::SockDiag)?;
    // The kernel looks for a socket by its addresses, and of several with the same ones (SO_REUSEPORT), of which some may be of IPv6
    // with mapped ones, it finds one.
    loop {
        let (before, mut missed, mut failed) = (ended.len(), 0, Ok(()));
        for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
            let body = request(family, CONNECTED, &[0; ID_LEN]);
            let found = requests.dump(SOCK_DIAG_BY_FAMILY, &body).map_err(|refused| refused.error)?;
            for socket in found.iter().filter_map(read) {
                if ended.contains(&socket.cookie) || !is_wanted(&socket) {
                    continue;
                }
                match requests.request(SOCK_DESTROY, 0, &request(socket.family, u32::MAX, &socket.id)) {
                    Ok(_) => _ = ended.insert(socket.cookie),
                    // Closed meanwhile, or behind another.
                    Err(refused) if refused.error.raw_os_error() == Some(libc::ENOENT) => missed += 1,
                    Err(refused) => failed = Err(refused.error),
                }
            }
        }
        if missed == 0 || ended.len() == before {
            return failed;
        }
    }
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, states: u32, id: &[u8; ID_LEN]) -> [u8; ID_IN_REQUEST + ID_LEN] {
    let mut body = [0; ID_IN_REQUEST + ID_LEN];
    body[0] = family;
    body[1] = libc::IPPROTO_UDP as u8;
    body[4..ID_IN_REQUEST].copy_from_slice(&states.to_ne_bytes());
    body[ID_IN_REQUEST..].copy_from_slice(id);
    body
}

/// `struct inet_diag_msg`; nothing for what is too short.
fn read(message: &Message) -> Option<Found> {
    let family = *message.body.first()?;
    let id: [u8; ID_LEN] = message.body.get(ID_IN_MESSAGE..ID_IN_MESSAGE + ID_LEN)?.try_into().ok()?;
    let addr: [u8; 16] = id[20..36].try_into().ok()?;
    let addr = if i32::from(family) == libc::AF_INET {
        <[u8; 4]>::try_from(&addr[..4]).ok()?.wide()
    } else {
        addr.into()
    };
    let cookie = u64::from(u32::from_ne_bytes(id[40..44].try_into().ok()?))
        | u64::from(u32::from_ne_bytes(id[44..48].try_into().ok()?)) << 32;
    let attributes = message.body.get(ATTRIBUTES..).unwrap_or_default();
    let cgroup = netlink::attributes(attributes).find(|(kind, _)| *kind == CGROUP_ID);
    let cgroup = cgroup.and_then(|(_, value)| netlink::number_u64(value, 0));
    Some(Found { family, id, cookie, addr, port: [id[2], id[3]], cgroup })
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn a_connected_socket_is_found_with_its_peer() {
        let (one, other) = (UdpSocket::bind("127.0.0.1:0"), UdpSocket::bind("127.0.0.1:0"));
        let (one, other) = (one.expect("a socket"), other.expect("a socket"));
        let peer = other.local_addr().expect("an address");
        one.connect(peer).expect("connected");
        let mut requests = Requests::open(Protocol::SockDiag).expect("netlink");
        let body = request(libc::AF_INET as u8, CONNECTED, &[0; ID_LEN]);
        let found = requests.dump(SOCK_DIAG_BY_FAMILY, &body).expect("a dump");
        let own: [u8; 2] = one.local_addr().expect("an address").port().to_be_bytes();
        let socket = found.iter().filter_map(read).find(|socket| socket.id[..2] == own);
        let socket = socket.expect("the socket is among them");
        assert_eq!((socket.addr, socket.port), ([127, 0, 0, 1].wide(), peer.port().to_be_bytes()));
        assert_ne!(socket.cookie, 0);
        assert!(socket.cgroup.is_some(), "kernels of today tell");
        assert_eq!(read(&Message { kind: SOCK_DIAG_BY_FAMILY, body: vec![2; 40] }), None, "too short");
    }
}
