//! The few bpf(2) calls that the loader does not offer: links by index with their pins, what is attached to an interface,
//! and map batches.
//!
//! Layouts are those of `union bpf_attr` and `struct bpf_link_info` in include/uapi/linux/bpf.h.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_long = 21;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

/// Most programs that one hook of an interface takes (include/linux/bpf_mprog.h).
const BPF_MPROG_MAX: usize = 64;

/// Where a link attaches a program (`enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum AttachType {
    /// XDP on an interface.
    Xdp = 37,
    /// tc ingress, from kernel 6.6.
    TcxIngress = 46,
    /// tc egress, from kernel 6.6.
    TcxEgress = 47,
    /// A socket of IPv4 is bound.
    Bind4 = 8,
    /// A socket of IPv6 is bound.
    Bind6 = 9,
    /// A socket of IPv4 connects.
    Connect4 = 10,
    /// A socket of IPv6 connects.
    Connect6 = 11,
    /// A UDP socket names an address of IPv4 with a datagram.
    UdpSendmsg4 = 14,
    /// A UDP socket names an address of IPv6 with a datagram.
    UdpSendmsg6 = 15,
    /// A UDP socket of IPv4 is told where a datagram has come from.
    UdpRecvmsg4 = 19,
    /// A UDP socket of IPv6 is told where a datagram has come from.
    UdpRecvmsg6 = 20,
    /// A socket of IPv4 is asked for its peer.
    Getpeername4 = 29,
    /// A socket of IPv6 is asked for its peer.
    Getpeername6 = 30,
    /// A socket is closed.
    SockRelease = 34,
}

/// What the kernel says about a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// Link id.
    pub id: u32,
    /// Id of its program.
    pub program: u32,
    /// Interface index, 0 once the interface is gone.
    pub ifindex: u32,
    /// Id of the cgroup, for a link of a socket hook; 0 once the cgroup is gone.
    pub cgroup: u64,
}

/// A BPF link that this process holds open; whether it survives the process depends on its pin.
#[derive(Debug)]
pub struct Link(OwnedFd);

#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    pad: u32,
    expected_revision: u64,
}

#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

#[repr(C)]
struct Object {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
struct InfoByFd {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
#[derive(Default)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    prog_id: u32,
    pad: u32,
    ifindex: u32,
    attach_type: u32,
    rest: [u64; 8],
}

#[repr(C)]
#[derive(Default)]
struct ProgramQuery {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    count: u32,
    pad: u32,
    rest: [u64; 4],
}

#[repr(C)]
struct Entry {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a live, fully initialised prefix of `union bpf_attr` of the size given; every pointer inside it
    // comes from a borrow that the caller holds across the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr as *mut T, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn owned(fd: libc::c_long) -> OwnedFd {
    // SAFETY: the kernel has just returned this descriptor to us, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

fn path_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

impl Link {
    /// Attaches a program to an interface (by index) or a cgroup (by descriptor); `flags` are those of the attach type (XDP modes).
    pub fn create(program: BorrowedFd<'_>, target: u32, at: AttachType, flags: u32) -> io::Result<Self> {
        let mut attr =
            LinkCreate { prog_fd: raw(program), target, attach_type: at as u32, flags, ..Default::default() };
        bpf(BPF_LINK_CREATE, &mut attr).map(|fd| Self(owned(fd)))
    }

    /// Attaches a program of a socket hook to a cgroup and all below it, beside those of others.
    pub fn create_in_cgroup(
        program: BorrowedFd<'_>,
        cgroup: BorrowedFd<'_>,
        at: AttachType,
    ) -> io::Result<Self> {
        Self::create(program, raw(cgroup), at, 0)
    }

    /// Opens a pinned link.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = path_string(path)?;
        let mut attr = Object { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
        bpf(BPF_OBJ_GET, &mut attr).map(|fd| Self(owned(fd)))
    }

    /// Pins the link, so that it survives this process.
    pub fn pin(&self, path: &Path) -> io::Result<()> {
        let path = path_string(path)?;
        let mut attr = Object { pathname: path.as_ptr() as u64, bpf_fd: raw(self.0.as_fd()), file_flags: 0 };
        bpf(BPF_OBJ_PIN, &mut attr).map(drop)
    }

    /// Replaces the program of the link in one step; no packet meets neither.
    pub fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut attr =
            LinkUpdate { link_fd: raw(self.0.as_fd()), new_prog_fd: raw(program), flags: 0, old_prog_fd: 0 };
        bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
    }

    /// Takes the program off the interface, whoever else holds the link open.
    pub fn detach(&self) -> io::Result<()> {
        // The attribute is one descriptor; the padding keeps it a whole word.
        let mut attr = [raw(self.0.as_fd()), 0];
        bpf(BPF_LINK_DETACH, &mut attr).map(drop)
    }

    /// What the kernel says about the link.
    pub fn info(&self) -> io::Result<LinkInfo> {
        let mut info = RawLinkInfo::default();
        let mut attr = InfoByFd {
            bpf_fd: raw(self.0.as_fd()),
            info_len: size_of::<RawLinkInfo>() as u32,
            info: &raw mut info as u64,
        };
        bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
        // The two overlay each other (`struct bpf_link_info`): the id of a cgroup is a word of 64 bits.
        let [a, b, c, d] = info.ifindex.to_ne_bytes();
        let [e, f, g, h] = info.attach_type.to_ne_bytes();
        let cgroup = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
        Ok(LinkInfo { id: info.id, program: info.prog_id, ifindex: info.ifindex, cgroup })
    }
}

/// Ids of the tc programs on an interface, in order; from kernel 6.6.
///
/// Ids are all that CAP_NET_ADMIN may ask for: turning one into a descriptor takes CAP_SYS_ADMIN.
///
/// # Errors
/// When the kernel refuses: `EINVAL` before 6.6, `ENODEV` without the interface.
pub fn programs_on(ifindex: u32, at: AttachType) -> io::Result<Vec<u32>> {
    let mut ids = vec![0u32; BPF_MPROG_MAX];
    let mut attr = ProgramQuery {
        target_ifindex: ifindex,
        attach_type: at as u32,
        program_ids: ids.as_mut_ptr() as u64,
        count: BPF_MPROG_MAX as u32,
        ..Default::default()
    };
    bpf(BPF_PROG_QUERY, &mut attr)?;
    ids.truncate(attr.count as usize);
    Ok(ids)
}

/// Whether the kernel attaches tc programs by links (TCX, from kernel 6.6, with `CONFIG_NET_XGRESS`).
///
/// # Errors
/// When the kernel refuses for another reason.
pub fn has_tcx() -> io::Result<bool> {
    match programs_on(LOOPBACK, AttachType::TcxIngress) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Index of the loopback interface in every network namespace (`LOOPBACK_IFINDEX`, include/net/flow.h).
const LOOPBACK: u32 = 1;

/// Runs an XDP program on a frame as if an interface had received it: what the program returns, and the frame that it leaves.
///
/// # Errors
/// When the kernel refuses: `ENODEV` without the interface, `EINVAL` for a frame that is too short or too long for it.
pub fn run_xdp_on_frame(program: BorrowedFd<'_>, ifindex: u32, frame: &[u8]) -> io::Result<(u32, Vec<u8>)> {
    let context = XdpMd { data_end: frame.len() as u32, ingress_ifindex: ifindex, ..Default::default() };
    let mut out = vec![0u8; frame.len() + XDP_GROWTH_MAX];
    let mut attr = TestRun {
        prog_fd: raw(program),
        data_size_in: frame.len() as u32,
        data_size_out: out.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        ctx_size_in: size_of::<XdpMd>() as u32,
        ctx_in: &raw const context as u64,
        ..Default::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr)?;
    out.truncate(attr.data_size_out as usize);
    Ok((attr.retval, out))
}

/// By how much a program can make a frame longer: the room before it (`XDP_PACKET_HEADROOM`, include/uapi/linux/bpf.h).
const XDP_GROWTH_MAX: usize = 256;

/// `struct xdp_md` (include/uapi/linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct XdpMd {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue_index: u32,
    egress_ifindex: u32,
}

/// Runs a tc program on a frame as if it were of an interface; what the program returns is the answer.
///
/// # Errors
/// When the kernel refuses: `ENODEV` without the interface, `EINVAL` for a frame that is too short or too long for it.
pub fn run_on_frame(program: BorrowedFd<'_>, ifindex: u32, frame: &[u8]) -> io::Result<i32> {
    let mut context = [0u32; SK_BUFF_WORDS];
    context[SK_BUFF_IFINDEX] = ifindex;
    let mut attr = TestRun {
        prog_fd: raw(program),
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        ctx_size_in: size_of_val(&context) as u32,
        ctx_in: context.as_ptr() as u64,
        ..Default::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr)?;
    Ok(attr.retval as i32)
}

/// Words of `struct __sk_buff`, and the one that holds the interface index (include/uapi/linux/bpf.h).
const SK_BUFF_WORDS: usize = 48;
const SK_BUFF_IFINDEX: usize = 10;

/// Removes an entry of a map and writes what it was to `value`, in one step.
///
/// # Safety
/// `key` must be a key of the map, and `value` have room for one of its values, which must be one of the caller's type.
///
/// # Errors
/// `ENOENT` when there is none; `EINVAL` or `ENOTSUPP` where the kernel cannot, for hashes before 5.14.
pub(crate) unsafe fn map_take(map: BorrowedFd<'_>, key: *const u8, value: *mut u8) -> io::Result<()> {
    let mut attr = Entry { map_fd: raw(map), pad: 0, key: key as u64, value: value as u64, flags: 0 };
    bpf(BPF_MAP_LOOKUP_AND_DELETE_ELEM, &mut attr).map(drop)
}

/// Reads or writes entries of a map in one call; returns how many.
///
/// # Safety
/// `keys` and `values` must have room for `count` keys and values of the map's sizes, a key must fit into a token, and what
/// the kernel writes there must be valid values of the caller's types. A write changes neither.
///
/// # Errors
/// `EINVAL` on kernels without batches (before 5.6), `ENOTSUPP` where a map has none; the count means nothing then.
/// `ENOSPC` when a bucket of a hash holds more than `count`. Reads end with `ENOENT`, beside what they found.
pub(crate) unsafe fn map_batch(call: BatchCall<'_>) -> (u32, io::Result<()>) {
    let mut attr = Batch {
        in_batch: call.from.map_or(0, |token| std::ptr::from_ref(token) as u64),
        out_batch: call.next as u64,
        keys: call.keys as u64,
        values: call.values as u64,
        count: call.count,
        map_fd: raw(call.map),
        elem_flags: 0,
        flags: 0,
    };
    let result = bpf(if call.writes { BPF_MAP_UPDATE_BATCH } else { BPF_MAP_LOOKUP_BATCH }, &mut attr);
    (attr.count, result.map(drop))
}

/// Room for where a read ended: the number of a bucket, or a key.
pub(crate) const TOKEN_BYTES: usize = 64;

/// The parameters of [`map_batch`].
pub(crate) struct BatchCall<'a> {
    /// The map.
    pub(crate) map: BorrowedFd<'a>,
    /// Whether to write.
    pub(crate) writes: bool,
    /// Where the last read ended; `None` for the beginning, and for writes.
    pub(crate) from: Option<&'a [u8; TOKEN_BYTES]>,
    /// Where this read ends.
    pub(crate) next: *mut [u8; TOKEN_BYTES],
    /// Keys.
    pub(crate) keys: *mut u8,
    /// Values.
    pub(crate) values: *mut u8,
    /// How many.
    pub(crate) count: u32,
}
