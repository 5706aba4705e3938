//! TAP and TUN devices, whose other end is a process: here one that carries frames between two of them, as a hypervisor does.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::{io, mem};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::netns::Namespace;

// From linux/if_tun.h.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca_u32 as libc::Ioctl;
const IFF_TUN: i16 = 1;
const IFF_TAP: i16 = 2;
const IFF_NO_PI: i16 = 0x1000;

/// Longest frame that a device without offloads sends.
const FRAME_MAX: usize = 1 << 16;
/// How often a carrier looks whether it may go.
const LOOK_MILLISECONDS: u16 = 100;

/// Two TAP devices and what carries frames from each to the other, until it is dropped.
pub struct TapCable {
    is_over: Arc<AtomicBool>,
    carriers: Vec<JoinHandle<()>>,
}

impl TapCable {
    /// Makes the devices and brings them up.
    ///
    /// # Errors
    /// When the kernel has none (module `tun`).
    pub fn new(left: &Namespace, left_name: &str, right: &Namespace, right_name: &str) -> Result<Self> {
        let ends = [open(left, left_name, IFF_TAP)?, open(right, right_name, IFF_TAP)?];
        let is_over = Arc::new(AtomicBool::new(false));
        let mut carriers = Vec::new();
        for (from, to) in [(0, 1), (1, 0)] {
            let (from, to, is_over) = (ends[from].try_clone()?, ends[to].try_clone()?, Arc::clone(&is_over));
            carriers.push(thread::spawn(move || carry(from, to, &is_over)));
        }
        left.up(left_name)?;
        right.up(right_name)?;
        Ok(Self { is_over, carriers })
    }
}

impl Drop for TapCable {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        for carrier in self.carriers.drain(..) {
            // It has panicked then, and has said so.
            let _ = carrier.join();
        }
    }
}

/// Makes a TUN device, whose packets have no Ethernet header, and brings it up; it goes with the file.
///
/// # Errors
/// When the kernel has none (module `tun`).
pub fn tun(namespace: &Namespace, name: &str) -> Result<File> {
    let file = open(namespace, name, IFF_TUN)?;
    namespace.up(name)?;
    Ok(file)
}

fn open(namespace: &Namespace, name: &str, kind: i16) -> Result<File> {
    let made = namespace.run(|| -> io::Result<File> {
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        // SAFETY: all-zero bytes are a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = kind | IFF_NO_PI;
        // SAFETY: the descriptor is open and the request lives across the call.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(file)
    });
    made.with_context(|| format!("device {name} of the driver tun in {namespace:?}"))
}

/// Carries frames; one that the other device does not take, because it is down, is lost as on a wire.
fn carry(mut from: File, mut to: File, is_over: &AtomicBool) {
    let mut frame = vec![0u8; FRAME_MAX];
    while !is_over.load(Ordering::Relaxed) {
        match from.read(&mut frame) {
            Ok(length) => drop(to.write(&frame[..length])),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let mut waits = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
                poll(&mut waits, PollTimeout::from(LOOK_MILLISECONDS)).expect("waiting for a frame");
            }
            // The device is down, or gone with its namespace.
            Err(_) => thread::sleep(std::time::Duration::from_millis(u64::from(LOOK_MILLISECONDS))),
        }
    }
}
