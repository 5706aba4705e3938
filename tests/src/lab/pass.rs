//! XDP programs of a few instructions: above all the one that does nothing, which a veth needs before its peer may transmit by XDP.
//!
//! Without any program the receiving veth has no NAPI, and frames sent by XDP_TX or a redirect are lost without a trace.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};

use super::netns::Namespace;

// From linux/bpf.h and linux/if_link.h.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// `r0 = XDP_PASS; exit`.
const PASS: [u64; 2] = [0x0000_0002_0000_00b7, 0x0000_0000_0000_0095];

/// A pass program attached natively to a device; dropping it detaches the program.
pub struct PassProgram {
    _link: OwnedFd,
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
}

#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

impl PassProgram {
    /// Loads the program and attaches it to a device of the namespace.
    pub fn attach(namespace: &Namespace, device: &str) -> Result<Self> {
        let index = namespace.index(device)?;
        let link = namespace.run(|| {
            let program = load(&PASS)?;
            let create = LinkCreate {
                prog_fd: program.as_raw_fd() as u32,
                target_ifindex: index,
                attach_type: BPF_XDP,
                flags: XDP_FLAGS_DRV_MODE,
            };
            bpf(BPF_LINK_CREATE, &create)
        });
        let link = link.with_context(|| format!("XDP pass program on {device} in {namespace:?}"))?;
        Ok(Self { _link: link })
    }
}

/// Loads an XDP program of these instructions.
///
/// # Errors
/// When the kernel refuses it.
pub fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    let load = ProgLoad {
        prog_type: BPF_PROG_TYPE_XDP,
        insn_cnt: instructions.len() as u32,
        insns: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
    };
    bpf(BPF_PROG_LOAD, &load)
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: `attributes` is the leading part of union bpf_attr for the command, and the size passed is its own; the
    // kernel takes the missing rest as zero.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both commands return a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}
