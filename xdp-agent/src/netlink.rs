//! Netlink: requests, dumps and messages, as far as links, addresses, neighbours and XDP features need them.
//!
//! Attributes are read one by one and unknown ones are passed over, so that a newer kernel cannot make a message
//! unreadable. Layouts: include/uapi/linux/netlink.h, rtnetlink.h.

use std::{io, os::fd::AsRawFd, time::Duration};

use netlink_sys::{Socket, protocols};

/// Message types and flags of netlink itself.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_ACK_TLVS: u16 = 0x200;
/// Attribute of an error message that says in words what was wrong (`NLMSGERR_ATTR_MSG`).
const NLMSGERR_ATTR_MSG: u16 = 1;

const HEADER_LEN: usize = 16;
/// How long the kernel may take to answer; it answers at once or something is very wrong.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a dump is begun again because the table changed under it.
const DUMP_ATTEMPTS_MAX: u32 = 5;
/// Room for the messages that arrive between two reads, in bytes.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Netlink families that are spoken here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Links, addresses, routes, neighbours.
    Route,
    /// Families by name.
    Generic,
    /// Sockets.
    SockDiag,
}

/// A message without its header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Message type.
    pub kind: u16,
    /// What follows the header.
    pub body: Vec<u8>,
}

/// The kernel's refusal of a request.
#[derive(Debug, thiserror::Error)]
#[error("{error}{}", text.as_ref().map(|text| format!(" ({text})")).unwrap_or_default())]
pub struct Refused {
    /// The errno.
    pub error: io::Error,
    /// What the kernel said in words, if it did.
    pub text: Option<String>,
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self { error, text: None }
    }
}

/// A socket for requests; answers are waited for.
pub struct Requests {
    socket: Socket,
    sequence: u32,
}

impl std::fmt::Debug for Requests {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Requests").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl Requests {
    /// Opens a socket.
    pub fn open(protocol: Protocol) -> io::Result<Self> {
        let socket = open(protocol)?;
        socket.set_ext_ack(true)?;
        set_timeout(&socket)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Everything of a kind; a dump that the kernel calls inconsistent is begun again.
    pub fn dump(&mut self, kind: u16, body: &[u8]) -> Result<Vec<Message>, Refused> {
        for _ in 0..DUMP_ATTEMPTS_MAX {
            let (messages, interrupted) = self.exchange(kind, NLM_F_DUMP, body)?;
            if !interrupted {
                return Ok(messages);
            }
        }
        Err(io::Error::other("the table kept changing while it was read").into())
    }

    /// One request, with whatever it is answered by.
    pub fn request(&mut self, kind: u16, flags: u16, body: &[u8]) -> Result<Vec<Message>, Refused> {
        self.exchange(kind, flags | NLM_F_ACK, body).map(|(messages, _)| messages)
    }

    fn exchange(&mut self, kind: u16, flags: u16, body: &[u8]) -> Result<(Vec<Message>, bool), Refused> {
        self.sequence += 1;
        let length = (HEADER_LEN + body.len()) as u32;
        let mut request = Vec::with_capacity(length as usize);
        request.extend_from_slice(&length.to_ne_bytes());
        request.extend_from_slice(&kind.to_ne_bytes());
        request.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        request.extend_from_slice(&self.sequence.to_ne_bytes());
        request.extend_from_slice(&0u32.to_ne_bytes());
        request.extend_from_slice(body);
        self.socket.send(&request, 0)?;
        let mut answers = Vec::new();
        let mut interrupted = false;
        loop {
            let (buffer, _) = self.socket.recv_from_full()?;
            for (header, body) in messages(&buffer) {
                if header.sequence != self.sequence {
                    continue;
                }
                interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                match header.kind {
                    NLMSG_DONE => return Ok((answers, interrupted)),
                    NLMSG_ERROR => {
                        return match refusal(header.flags, body) {
                            Some(refused) => Err(refused),
                            None => Ok((answers, interrupted)),
                        };
                    }
                    kind => answers.push(Message { kind, body: body.to_vec() }),
                }
            }
        }
    }
}

/// A socket that listens to multicast groups without blocking.
pub struct Events(Socket);

/// What a read of events found.
#[derive(Debug)]
pub enum Heard {
    /// Messages, in order.
    Messages(Vec<Message>),
    /// Messages were lost: everything has to be read anew.
    Overrun,
}

impl Events {
    /// Joins the groups.
    pub fn open(protocol: Protocol, groups: &[u32]) -> io::Result<Self> {
        let mut socket = open(protocol)?;
        // Without the privilege the size is capped, which an overrun then repairs.
        let _ = socket.set_rx_buf_sz(RECEIVE_BUFFER as libc::c_int);
        socket.set_non_blocking(true)?;
        for group in groups {
            socket.add_membership(*group)?;
        }
        let _ = &mut socket;
        Ok(Self(socket))
    }

    /// The messages of one datagram; `WouldBlock` when there is none.
    pub fn read(&self) -> io::Result<Heard> {
        match self.0.recv_from_full() {
            Ok((buffer, _)) => {
                let mut heard = Vec::new();
                for (header, body) in messages(&buffer) {
                    if header.kind == NLMSG_OVERRUN {
                        return Ok(Heard::Overrun);
                    }
                    heard.push(Message { kind: header.kind, body: body.to_vec() });
                }
                Ok(Heard::Messages(heard))
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(Heard::Overrun),
            Err(error) => Err(error),
        }
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

fn open(protocol: Protocol) -> io::Result<Socket> {
    let mut socket = Socket::new(match protocol {
        Protocol::Route => protocols::NETLINK_ROUTE,
        Protocol::Generic => protocols::NETLINK_GENERIC,
        Protocol::SockDiag => protocols::NETLINK_SOCK_DIAG,
    })?;
    socket.bind_auto()?;
    Ok(socket)
}

fn set_timeout(socket: &Socket) -> io::Result<()> {
    let timeout = libc::timeval { tv_sec: ANSWER_TIMEOUT.as_secs() as libc::time_t, tv_usec: 0 };
    // SAFETY: the pointer and the length describe a live `timeval`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const timeout).cast(),
            size_of::<libc::timeval>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

struct Header {
    kind: u16,
    flags: u16,
    sequence: u32,
}

/// The messages in a datagram, up to the first that contradicts its length.
fn messages(mut buffer: &[u8]) -> impl Iterator<Item = (Header, &[u8])> {
    std::iter::from_fn(move || {
        let length = number_u32(buffer, 0)? as usize;
        let header = Header {
            kind: number_u16(buffer, 4)?,
            flags: number_u16(buffer, 6)?,
            sequence: number_u32(buffer, 8)?,
        };
        let body = buffer.get(HEADER_LEN..length)?;
        buffer = buffer.get(aligned(length)..).unwrap_or_default();
        Some((header, body))
    })
}

/// The refusal in an error message; an errno of zero is an acknowledgement.
fn refusal(flags: u16, body: &[u8]) -> Option<Refused> {
    let errno = number_u32(body, 0)? as i32;
    if errno == 0 {
        return None;
    }
    let mut text = None;
    if flags & NLM_F_ACK_TLVS != 0 {
        // The request's header follows, and all of the request unless it is capped.
        let request = number_u32(body, 4).map_or(HEADER_LEN, |length| length as usize);
        let echoed = if flags & NLM_F_CAPPED != 0 { HEADER_LEN } else { aligned(request) };
        text = attributes(body.get(4 + echoed..).unwrap_or_default())
            .find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)
            .map(|(_, value)| string(value));
    }
    Some(Refused { error: io::Error::from_raw_os_error(-errno), text })
}

/// The attributes in a stretch of bytes, up to the first that contradicts its length; flags in their type are off.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    const NLA_TYPE_MASK: u16 = 0x3fff;
    std::iter::from_fn(move || {
        let length = number_u16(bytes, 0)? as usize;
        let kind = number_u16(bytes, 2)? & NLA_TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Appends an attribute.
pub fn put_attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(aligned(bytes.len()), 0);
}

/// A number in native order at an offset.
pub fn number_u16(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(offset..offset + 2)?.try_into().ok()?))
}

/// A number in native order at an offset.
pub fn number_u32(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(offset..offset + 4)?.try_into().ok()?))
}

/// A number in native order at an offset.
pub fn number_u64(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(offset..offset + 8)?.try_into().ok()?))
}

/// A string as the kernel ends it.
pub fn string(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_they_are_written() {
        let mut bytes = Vec::new();
        put_attribute(&mut bytes, 3, b"eth0\0");
        put_attribute(&mut bytes, 4, &1500u32.to_ne_bytes());
        let read: Vec<_> = attributes(&bytes).collect();
        assert_eq!(read.len(), 2);
        assert_eq!((read[0].0, string(read[0].1).as_str()), (3, "eth0"));
        assert_eq!((read[1].0, number_u32(read[1].1, 0)), (4, Some(1500)));
    }

    #[test]
    fn truncated_attributes_end_the_walk() {
        let mut bytes = Vec::new();
        put_attribute(&mut bytes, 3, &[1; 12]);
        for length in 0..bytes.len() {
            assert_eq!(attributes(&bytes[..length]).count(), 0, "{length}");
        }
        assert_eq!(attributes(&[0, 0, 0, 0]).count(), 0, "a length of zero does not loop for ever");
    }

    #[test]
    fn a_refusal_carries_the_words_of_the_kernel() {
        let mut body = (-libc::EINVAL).to_ne_bytes().to_vec();
        body.extend_from_slice(&32u32.to_ne_bytes());
        body.resize(4 + HEADER_LEN, 0);
        put_attribute(&mut body, NLMSGERR_ATTR_MSG, b"Peer MTU is too large to set XDP\0");
        let refused = refusal(NLM_F_CAPPED | NLM_F_ACK_TLVS, &body).expect("an error");
        assert_eq!(refused.error.raw_os_error(), Some(libc::EINVAL));
        assert_eq!(refused.text.as_deref(), Some("Peer MTU is too large to set XDP"));
        assert!(refusal(0, &[0; 20]).is_none(), "errno 0 acknowledges");
    }
}
