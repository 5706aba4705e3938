//! Network namespaces on this machine, and the one of this process.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::PathBuf,
    thread,
};

use crate::{
    cluster::wanted::{Ip6, IpAddress},
    neighbours,
};

/// Where container runtimes and `ip netns` keep namespaces by name (CRI: /run/netns/cni-…).
const NAMED: [&str; 2] = ["/run/netns", "/var/run/netns"];
/// `SO_NETNS_COOKIE` (include/uapi/asm-generic/socket.h), from kernel 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Cookie of the network namespace that this thread is in.
///
/// # Errors
/// Before kernel 5.14.
pub fn own_cookie() -> io::Result<u64> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor to us.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: pointer and length describe a live number, and so does the pointer to the length.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// The addresses of global use that this thread's namespace has: the least of each family.
pub(super) fn own_addresses() -> Option<(Option<[u8; 4]>, Option<Ip6>)> {
    let host = neighbours::read_host().ok()?;
    let global = || host.addresses.values().flatten().filter(|address| address.scope == 0);
    let v4 = global().filter_map(|address| <[u8; 4]>::from_ip(address.addr)).min();
    Some((v4, global().filter_map(|address| Ip6::from_ip(address.addr)).min()))
}

/// Calls `visit` on a thread in every network namespace that can be found and entered, the own one first; with the error
/// in place of one that cannot be entered.
pub(super) fn each(mut visit: impl FnMut(io::Result<()>) + Send) {
    visit(Ok(()));
    let mut seen: HashSet<(u64, u64)> = HashSet::new();
    if let Ok(own) = fs::metadata("/proc/self/ns/net") {
        seen.insert((own.dev(), own.ino()));
    }
    for path in candidates() {
        let Ok(found) = fs::metadata(&path) else { continue };
        if !seen.insert((found.dev(), found.ino())) {
            continue;
        }
        // A process may end meanwhile, and a name go.
        let Ok(namespace) = File::open(&path) else { continue };
        // A thread of its own: whoever enters another namespace stays there.
        let is_done = thread::scope(|scope| {
            let visit = &mut visit;
            scope.spawn(move || visit(enter(&namespace))).join().is_ok()
        });
        if !is_done {
            return;
        }
    }
}

fn enter(namespace: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open; only this thread moves.
    let result = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Files that stand for network namespaces: of every process in sight, and named ones.
fn candidates() -> impl Iterator<Item = PathBuf> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let is_process = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
    let processes = processes.filter(move |entry| entry.file_name().to_str().is_some_and(is_process));
    let named = NAMED.into_iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten();
    processes.map(|entry| entry.path().join("ns/net")).chain(named.map(|entry| entry.path()))
}
