//! What has to be true before anything is loaded, each with one message that says what to do.

use std::{ffi::CString, fmt, fs, io, os::unix::ffi::OsStrExt, path::Path};

use anyhow::{Context, bail, ensure};
use tracing::warn;

use crate::{
    cluster::wanted::{Ip6, IpAddress},
    host::Host,
};

/// `BPF_FS_MAGIC` (include/uapi/linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
/// Capability numbers (include/uapi/linux/capability.h).
const CAPABILITIES: [(u32, &str); 3] = [(12, "CAP_NET_ADMIN"), (39, "CAP_BPF"), (38, "CAP_PERFMON")];
const CAP_SYS_ADMIN: u32 = 21;
/// The programs exchange and compare words in one step, which BPF learned in 5.12 (`BPF_ATOMIC`, kernel commit 5ca419f2864a), and the
/// compiler of arm64 in 5.18 (1902472b4fa9); and they have both functions and tail calls, which arm64 takes from 6.0 on
/// (d4609a5d8c70).
pub const KERNEL_MIN: KernelVersion =
    if cfg!(target_arch = "aarch64") { KernelVersion(6, 0) } else { KernelVersion(5, 12) };

/// Version of a kernel, as far as it decides what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelVersion(pub u32, pub u32);

impl KernelVersion {
    /// The running kernel's.
    ///
    /// # Errors
    /// When the release cannot be read or understood.
    pub fn current() -> anyhow::Result<Self> {
        let path = "/proc/sys/kernel/osrelease";
        let release = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
        Self::parse(&release)
            .with_context(|| format!("cannot understand the kernel release {:?}", release.trim()))
    }

    /// Reads a release as `uname -r` prints it.
    pub fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.trim().split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some(Self(numbers.next()?.ok()?, numbers.next()?.ok()?))
    }
}

impl fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// Checks that the programs can run on a kernel at all.
///
/// # Errors
/// On kernels before [`KERNEL_MIN`].
pub fn check_kernel(kernel: KernelVersion) -> anyhow::Result<()> {
    ensure!(
        kernel >= KERNEL_MIN,
        "kernel {kernel} is too old: the programs need {KERNEL_MIN} on {}; run a newer kernel",
        std::env::consts::ARCH
    );
    Ok(())
}

/// Checks that this process may load and attach programs.
///
/// # Errors
/// Naming the capabilities that are missing.
pub fn check_privileges() -> anyhow::Result<()> {
    let status = fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let effective = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .context("cannot find CapEff in /proc/self/status")?;
    let missing = missing_capabilities(effective);
    ensure!(
        missing.is_empty(),
        "no privileges to load and attach BPF programs: {} missing; run as root, or grant CAP_BPF, CAP_NET_ADMIN and \
         CAP_PERFMON (before kernel 5.8 CAP_SYS_ADMIN and CAP_NET_ADMIN)",
        missing.join(", ")
    );
    Ok(())
}

fn missing_capabilities(effective: u64) -> Vec<&'static str> {
    let has = |capability: u32| effective >> capability & 1 == 1;
    let mut missing = Vec::new();
    for (capability, name) in CAPABILITIES {
        // CAP_SYS_ADMIN stands for the newer two.
        let is_replaced = name != "CAP_NET_ADMIN" && has(CAP_SYS_ADMIN);
        if !has(capability) && !is_replaced {
            missing.push(name);
        }
    }
    missing
}

/// Lifts the limit on locked memory, which BPF maps counted against before kernel 5.11.
pub fn raise_memlock(kernel: KernelVersion) {
    if kernel >= KernelVersion(5, 11) {
        return;
    }
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the pointer is to a live `rlimit`.
    if unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) } != 0 {
        warn!(
            error = %io::Error::last_os_error(),
            "cannot raise RLIMIT_MEMLOCK; maps may not fit, start with `ulimit -l unlimited`"
        );
    }
}

/// Checks that a directory of pins can be where it is told to be.
///
/// # Errors
/// When it is on another file system.
pub fn check_pin_dir(path: &Path) -> anyhow::Result<()> {
    ensure!(path.is_absolute(), "--pin-dir {} is not an absolute path", path.display());
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let magic = file_system(existing).with_context(|| format!("cannot look at {}", existing.display()))?;
    ensure!(
        magic == BPF_FS_MAGIC,
        "{} is not on a BPF file system; mount one with `mount -t bpf bpf {}`, or choose another --pin-dir",
        path.display(),
        mount_point(path).display()
    );
    Ok(())
}

/// The magic number of the file system that a path is on.
pub(crate) fn file_system(path: &Path) -> io::Result<i64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the path ends in a zero and the structure is writable; both live across the call.
    if unsafe { libc::statfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all-zero bytes are a valid `statfs`, and the call has filled it.
    let stat = unsafe { stat.assume_init() };
    #[allow(clippy::unnecessary_cast, reason = "the type differs by architecture")]
    Ok(stat.f_type as i64)
}

/// Where a BPF file system would have to be mounted for a path: the usual place if it is on the way.
fn mount_point(path: &Path) -> &Path {
    let usual = Path::new("/sys/fs/bpf");
    if path.starts_with(usual) { usual } else { path.parent().unwrap_or(path) }
}

/// What of the flags' interfaces is wrong for good.
///
/// # Errors
/// For an unknown interface, the loopback, one without an Ethernet header, and one without a usable address.
pub fn check_interfaces(names: &[String], host: &Host) -> anyhow::Result<()> {
    for name in names {
        let Some(link) = host.link(name) else {
            let there: Vec<&str> = host.links.values().map(|link| link.name.as_str()).collect();
            bail!("there is no interface {name}; there are: {}", there.join(", "));
        };
        ensure!(
            !link.is_loopback,
            "{name} is the loopback, which needs no load balancing; leave it out of --iface"
        );
        ensure!(
            link.is_ethernet,
            "{name} has no Ethernet header (a tunnel, WireGuard, PPP), where the programs would take addresses for something else; \
             leave it out of --iface"
        );
        ensure!(
            host.has_source_address(link.index),
            "{name} has no address of global scope, nor has the loopback, so nothing can be addressed to it and translated \
             flows would have no source; give it one with `ip address add ADDRESS/PREFIX dev {name}`"
        );
    }
    Ok(())
}

/// Says what in the kernel's settings will keep traffic from passing.
pub fn warn_of_settings(names: &[String], host: &Host) {
    for problem in settings(names, host) {
        warn!("{problem}");
    }
}

/// What in the kernel's settings will keep traffic from passing, with what to change.
pub fn settings(names: &[String], host: &Host) -> Vec<String> {
    let read = |path: String| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u32>().ok());
    let mut problems = Vec::new();
    if read("/proc/sys/net/ipv4/ip_forward".to_owned()) == Some(0) {
        problems.push(
            "net.ipv4.ip_forward is 0: the kernel will not route to backends on other nodes or in pods; run `sysctl \
             net.ipv4.ip_forward=1`"
                .to_owned(),
        );
    }
    let all = read("/proc/sys/net/ipv4/conf/all/rp_filter".to_owned()).unwrap_or(0);
    let mut links = names.iter().filter_map(|name| host.link(name));
    // The settings of interfaces do not matter (net/ipv6/ip6_output.c, `ip6_forward`).
    if read("/proc/sys/net/ipv6/conf/all/forwarding".to_owned()) == Some(0)
        && links.any(|link| host.source_address::<Ip6>(link.index).is_some())
    {
        problems.push(
            "net.ipv6.conf.all.forwarding is 0: the kernel will not route to IPv6 backends on other nodes or in pods; run \
             `sysctl net.ipv6.conf.all.forwarding=1`, and accept_ra=2 where routes come by advertisements"
                .to_owned(),
        );
    }
    for name in names {
        let own = read(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter")).unwrap_or(0);
        // The kernel takes the greater of the two; 1 is strict.
        if all.max(own) == 1 {
            problems.push(format!(
                "rp_filter of {name} is strict: packets whose way back is another interface are dropped on the slow path; \
                 run `sysctl net.ipv4.conf.{name}.rp_filter=2` where clients come in by more than one"
            ));
        }
    }
    problems
}

/// The addresses NodePorts are served on when no Node object says so: those of the managed interfaces.
pub fn node_addresses<A: IpAddress>(names: &[String], host: &Host) -> Vec<A> {
    let links = names.iter().filter_map(|name| host.link(name));
    links.filter_map(|link| host.source_address(link.index)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Address, Link as Interface};

    #[test]
    fn releases_are_understood() {
        for (release, version) in [
            ("6.18.44-fc-v657\n", (6, 18)),
            ("5.10.0-30-amd64", (5, 10)),
            ("6.6-rc1", (6, 6)),
            ("7.2+", (7, 2)),
        ] {
            assert_eq!(KernelVersion::parse(release), Some(KernelVersion(version.0, version.1)), "{release}");
        }
        assert_eq!(KernelVersion::parse("unknown"), None);
    }

    #[test]
    fn kernels_without_atomic_exchange_are_refused() {
        assert!(check_kernel(KERNEL_MIN).is_ok() && check_kernel(KernelVersion(6, 1)).is_ok());
        let error = check_kernel(KernelVersion(5, 10)).expect_err("too old").to_string();
        assert!(
            error.contains("kernel 5.10 is too old") && error.contains(&KERNEL_MIN.to_string()),
            "{error}"
        );
    }

    #[test]
    fn missing_capabilities_are_named() {
        assert_eq!(missing_capabilities(0), ["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"]);
        assert_eq!(missing_capabilities(1 << 12 | 1 << 21), [""; 0]);
        assert_eq!(missing_capabilities(1 << 12 | 1 << 39), ["CAP_PERFMON"]);
        assert_eq!(missing_capabilities(u64::MAX), [""; 0]);
    }

    #[test]
    fn a_bpf_file_system_is_mounted_at_the_usual_place_if_that_is_on_the_way() {
        assert_eq!(mount_point(Path::new("/sys/fs/bpf/xdp-agent")), Path::new("/sys/fs/bpf"));
        assert_eq!(mount_point(Path::new("/run/bpf/xdp-agent")), Path::new("/run/bpf"));
    }

    #[test]
    fn interfaces_that_cannot_work_are_refused() {
        let mut host = Host::default();
        for (index, name) in [(1, "lo"), (2, "eth0"), (3, "eth1"), (4, "wg0")] {
            let (is_loopback, is_ethernet) = (name == "lo", name.starts_with("eth"));
            let link =
                Interface { index, name: name.to_owned(), is_loopback, is_ethernet, ..Interface::default() };
            host.links.insert(index, link);
        }
        let addr = [192, 0, 2, 1].into();
        let address =
            Address { addr, peer: addr, len: 24, scope: 0, is_secondary: false, is_tentative: false };
        host.addresses.insert(2, vec![address]);
        host.addresses.insert(4, vec![address]);
        let check =
            |name: &str| check_interfaces(&[name.to_owned()], &host).map_err(|error| error.to_string());
        assert_eq!(check("eth0"), Ok(()));
        assert!(check("eth7").expect_err("unknown").contains("there are: lo, eth0, eth1, wg0"));
        assert!(check("wg0").expect_err("a tunnel").contains("no Ethernet header"));
        assert!(check("lo").expect_err("loopback").contains("loopback"));
        assert!(check("eth1").expect_err("no address").contains("ip address add"));
    }
}
