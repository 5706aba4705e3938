//! What has to be there, one line each: what was found, and what to change.

use std::{fs, path::Path};

use serde::Serialize;

use crate::{
    attach::overlays::is_overlay,
    cluster::wanted::{Ip6, IpAddress},
    host::{Host, Link},
    pins,
    preflight::{self, KernelVersion},
};

/// From this version on kernels were run with the programs (docs/compatibility.md).
const TESTED_SINCE: KernelVersion = KernelVersion(6, 1);

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// As it should be.
    Good,
    /// It works, and could be better.
    Warning,
    /// `run` would fail.
    Bad,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// How it is.
    pub health: Health,
    /// What was found.
    pub found: String,
    /// What to change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Check {
    pub(super) fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, health: Health::Good, found: found.into(), advice: None }
    }

    pub(super) fn warning(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, health: Health::Warning, found: found.into(), advice: Some(advice.into()) }
    }

    /// Something without which `run` fails.
    pub(super) fn bad(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, health: Health::Bad, found: found.into(), advice: Some(advice.into()) }
    }

    /// What a check of `run` says.
    fn of(name: &'static str, found: impl Into<String>, result: anyhow::Result<()>) -> Self {
        match result {
            Ok(()) => Self::good(name, found),
            Err(error) => Self::bad(name, found, format!("{error:#}")),
        }
    }
}

/// The kernel, this process's privileges, and the file systems.
pub(super) fn system(pin_dir: &Path) -> Vec<Check> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    vec![
        kernel(&fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default()),
        jit(fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").ok().as_deref()),
        Check::of("capabilities", "of this process", preflight::check_privileges()),
        bpffs(pin_dir),
        cgroups(&mounts),
    ]
}

fn bpffs(pin_dir: &Path) -> Check {
    let found = pin_dir.display().to_string();
    let check = Check::of("bpffs", found, preflight::check_pin_dir(pin_dir));
    if check.health == Health::Good && pins::is_held(pin_dir) {
        return Check::warning(
            "bpffs",
            check.found,
            "an agent runs over it: another one is refused until that has ended",
        );
    }
    check
}

/// What the kernel said to the programs.
pub(super) fn programs(refused: Option<&anyhow::Error>) -> Check {
    match refused {
        None => Check::good("programs", "taken by the kernel"),
        Some(error) => Check::bad("programs", "refused by the kernel", format!("{error:#}")),
    }
}

/// The interfaces, and settings that traffic depends on.
pub(super) fn network(names: &[String], host: &Host) -> Vec<Check> {
    let mut checks = Vec::new();
    for name in names {
        let result = preflight::check_interfaces(std::slice::from_ref(name), host);
        checks.push(Check::of("interface", format!("{name}{}", sources(name, host)), result));
    }
    let settings = preflight::settings(names, host);
    if settings.is_empty() {
        checks.push(Check::good("settings", "forwarding is on, no strict rp_filter"));
    }
    checks.extend(settings.into_iter().map(|setting| {
        let (found, advice) = setting.split_once("; ").unwrap_or((&setting, ""));
        Check::warning("settings", found, advice)
    }));
    checks
}

/// The overlays that are served without being named.
pub(super) fn overlays(names: &[String], host: &Host) -> Vec<Check> {
    let links = host.links.values().filter(|link| is_overlay(host, link) && !names.contains(&link.name));
    let check = |link: &Link| Check::good("overlay", format!("{}, by programs of tc", link.name));
    links.map(check).collect()
}

/// By which addresses an interface serves, of each family.
fn sources(name: &str, host: &Host) -> String {
    let Some(link) = host.link(name) else { return String::new() };
    let (v4, v6) = (host.source_address::<[u8; 4]>(link.index), host.source_address::<Ip6>(link.index));
    [("IPv4", v4.map(IpAddress::to_ip)), ("IPv6", v6.map(IpAddress::to_ip))]
        .map(|(family, addr)| match addr {
            Some(addr) => format!(", {family} as {addr}"),
            None => format!(", no {family} (neither it nor the loopback has an address)"),
        })
        .concat()
}

fn kernel(release: &str) -> Check {
    let release = release.trim();
    let Some(version) = KernelVersion::parse(release) else {
        return Check::warning(
            "kernel",
            release,
            "the release says no version; what it lacks shows when it runs",
        );
    };
    let check = Check::of("kernel", release, preflight::check_kernel(version));
    if check.health == Health::Good && version < TESTED_SINCE {
        let advice = format!(
            "the programs should run from {} on, and have been run from {TESTED_SINCE} on",
            preflight::KERNEL_MIN
        );
        return Check::warning("kernel", release, advice);
    }
    check
}

fn jit(setting: Option<&str>) -> Check {
    match setting.map(str::trim) {
        Some("0") => Check::warning(
            "jit",
            "off",
            "interpreted programs are many times slower; run `sysctl net.core.bpf_jit_enable=1`",
        ),
        Some(_) => Check::good("jit", "on"),
        None => Check::warning(
            "jit",
            "unknown",
            "only the first network namespace shows net.core.bpf_jit_enable; it should be 1",
        ),
    }
}

fn cgroups(mounts: &str) -> Check {
    let unified = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let place = fields.next()?;
        (fields.next() == Some("cgroup2")).then_some(place)
    });
    match unified {
        Some("/sys/fs/cgroup") => Check::good("cgroups", "unified"),
        Some(place) => Check::good("cgroups", format!("hybrid, version 2 at {place}")),
        None => Check::warning(
            "cgroups",
            "version 1 only",
            "socket programs have nowhere to go: mount one with `mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_refused_doubted_or_taken_by_its_version() {
        for (release, health) in [
            ("5.10.0-46-amd64\n", Health::Bad),
            ("5.15.0-100-generic", Health::Warning),
            ("6.1.0-56-amd64", Health::Good),
            ("7.3.4+deb13-arm64", Health::Good),
            ("unknown", Health::Warning),
        ] {
            let check = kernel(release);
            assert_eq!(check.health, health, "{check:?}");
            assert_eq!(check.advice.is_none(), health == Health::Good, "{check:?}");
        }
    }

    #[test]
    fn a_jit_that_is_off_is_a_warning() {
        assert_eq!(jit(Some("1\n")).health, Health::Good);
        assert_eq!(jit(Some("2\n")).health, Health::Good, "on with debugging");
        assert_eq!(jit(Some("0\n")).health, Health::Warning);
        assert_eq!(jit(None).health, Health::Warning);
    }

    #[test]
    fn the_cgroup_mode_is_read_from_the_mounts() {
        let unified = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let legacy = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n";
        assert_eq!(cgroups(unified).found, "unified");
        assert_eq!(cgroups(hybrid).found, "hybrid, version 2 at /sys/fs/cgroup/unified");
        assert_eq!(cgroups(legacy).health, Health::Warning);
    }
}
