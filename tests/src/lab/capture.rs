//! Frames sent and seen on a device, through packet sockets.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::netns::Namespace;

/// Large enough for every frame of a case, so that a busy machine does not lose one.
const RECEIVE_BUFFER_BYTES: libc::c_int = 16 << 20;
/// How long one read waits before it looks whether the capture is over.
const READ_TIMEOUT: Duration = Duration::from_millis(20);

/// A frame as a packet socket shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// Whether the device was sending; otherwise it was receiving.
    pub outgoing: bool,
    /// The bytes from the Ethernet header on.
    pub frame: Vec<u8>,
}

/// A raw packet socket on one device.
pub struct PacketSocket {
    fd: OwnedFd,
}

impl PacketSocket {
    /// Opens the socket for every EtherType and both directions.
    pub fn open(namespace: &Namespace, device: &str) -> Result<Self> {
        let index = namespace.index(device)?;
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        let fd = namespace.run(|| -> io::Result<OwnedFd> {
            // SAFETY: a plain system call; the result is checked below.
            let fd = unsafe {
                libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol.into())
            };
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: `fd` is new and owned by nothing else.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        });
        let fd = fd.with_context(|| format!("packet socket on {device} in {namespace:?}"))?;
        set_option(&fd, libc::SO_RCVBUFFORCE, &RECEIVE_BUFFER_BYTES)?;
        let timeout = libc::timeval { tv_sec: 0, tv_usec: READ_TIMEOUT.as_micros() as _ };
        set_option(&fd, libc::SO_RCVTIMEO, &timeout)?;
        // SAFETY: an all-zero sockaddr_ll is valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index as i32;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: `address` is a complete sockaddr_ll of the length given.
        let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) };
        ensure!(bound == 0, "packet socket on {device}: {}", io::Error::last_os_error());
        Ok(Self { fd })
    }

    /// Sends a frame as it is.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: pointer and length describe `frame`.
        let sent = unsafe { libc::send(self.fd.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        ensure!(
            sent == frame.len() as isize,
            "sending {} bytes: {}",
            frame.len(),
            io::Error::last_os_error()
        );
        Ok(())
    }

    /// Receives one frame, or nothing within a short time.
    pub fn receive(&self) -> Option<Captured> {
        let mut frame = vec![0; 65_536];
        // SAFETY: an all-zero sockaddr_ll is valid.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: both buffers live through the call and their true lengths are given.
        let received = unsafe {
            libc::recvfrom(
                self.fd.as_raw_fd(),
                frame.as_mut_ptr().cast(),
                frame.len(),
                0,
                (&raw mut from).cast(),
                &mut length,
            )
        };
        frame.truncate(usize::try_from(received).ok()?);
        Some(Captured { outgoing: from.sll_pkttype == libc::PACKET_OUTGOING, frame })
    }
}

/// A running capture of one device.
pub struct Capture {
    stop: Arc<AtomicBool>,
    reader: JoinHandle<Vec<Captured>>,
}

impl Capture {
    /// Starts to collect; frames from this moment on are kept.
    pub fn start(namespace: &Namespace, device: &str) -> Result<Self> {
        let socket = PacketSocket::open(namespace, device)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let reader = std::thread::spawn(move || {
            let mut frames = Vec::new();
            loop {
                // Looked at before the read, so that an empty read afterwards means that everything was taken.
                let last = stopped.load(Ordering::Acquire);
                match socket.receive() {
                    Some(captured) => frames.push(captured),
                    None if last => return frames,
                    None => {}
                }
            }
        });
        Ok(Self { stop, reader })
    }

    /// Ends the capture and returns the frames in the order seen.
    pub fn stop(self) -> Vec<Captured> {
        self.stop.store(true, Ordering::Release);
        self.reader.join().expect("the capture thread does not panic")
    }
}

fn set_option<T>(socket: &OwnedFd, option: libc::c_int, value: &T) -> Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: pointer and length describe `value`.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const *value).cast(), length)
    };
    ensure!(result == 0, "socket option {option}: {}", io::Error::last_os_error());
    Ok(())
}
