//! Kernels: which package one is, and what of it a guest needs.

use super::packages::{self, Apt};
use super::{Architecture, initramfs::Initramfs};
use crate::arch::Arch;
use crate::process;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the lanes make devices with, and drivers of the machine's network cards. One that is neither built in nor there
/// ends the run.
const MODULES: [&str; 16] = [
    "veth",
    "bridge",
    "bonding",
    "vxlan",
    "tun",
    "8021q",
    "dummy",
    "sch_ingress",
    "cls_bpf",
    "udp_diag",
    "virtio_pci",
    "virtio_net",
    "e1000",
    "e1000e",
    "igb",
    "vmxnet3",
];

/// The word for the highest version there is.
pub(crate) const NEWEST: &str = "newest";

/// The first kernel that the programs run on (`KERNEL_MIN` in the agent, which refuses those before it).
const fn oldest(arch: Arch) -> [u64; 2] {
    match arch {
        Arch::Amd64 => [5, 12],
        Arch::Arm64 => [6, 0],
    }
}

/// A kernel, unpacked.
pub(crate) struct Kernel {
    /// As `uname -r` says it.
    pub(crate) release: String,
    /// The image that is booted.
    pub(crate) image: PathBuf,
    root: PathBuf,
}

impl Kernel {
    /// Finds the newest kernel of a version (`6.1`, `6.1.0-9`, [`NEWEST`]), and fetches it once.
    pub(crate) fn find(architecture: Architecture, version: &str) -> Result<Self> {
        let apt = Apt::of(architecture.arch().name())?;
        let names = apt.names("linux-")?;
        let packages = candidates(&names, architecture.flavour(), version);
        ensure!(
            !packages.is_empty(),
            "no Debian kernel {version} for {}; there are {}",
            architecture.name(),
            versions(&names, architecture.flavour()).join(", ")
        );
        let mut refused = Vec::new();
        for package in packages {
            match Self::fetch(&apt, &names, &package) {
                Ok(kernel) => return Ok(kernel),
                // Lists may be older than the archive: the next best is tried.
                Err(error) => refused.push(format!("{package}: {error:#}")),
            }
        }
        bail!("no kernel {version} can be had:\n  {}", refused.join("\n  "))
    }

    /// Whether the agent is to refuse it.
    pub(crate) fn is_too_old(&self, arch: Arch) -> bool {
        numbers(&self.release) < oldest(arch).to_vec()
    }

    fn fetch(apt: &Apt, names: &[String], package: &str) -> Result<Self> {
        let release = package.trim_start_matches(IMAGE).trim_end_matches(UNSIGNED).to_owned();
        let root = packages::cache()?.join("kernels").join(&release);
        if !root.is_dir() {
            eprintln!("vm: fetching {package}");
            // From 7.2 on an image comes in three packages.
            let parts =
                ["linux-binary-", "linux-modules-", "linux-base-"].map(|part| format!("{part}{release}"));
            let mut wanted = vec![package.to_owned()];
            wanted.extend(parts.into_iter().filter(|part| names.contains(part)));
            let partial = root.with_extension("partial");
            let _ = std::fs::remove_dir_all(&partial);
            std::fs::create_dir_all(&partial)?;
            apt.unpack(&wanted, &partial)?;
            std::fs::rename(&partial, &root)?;
        }
        let image = ["boot", "usr/lib/modules", "lib/modules"].iter().find_map(|directory| {
            let names = [format!("vmlinuz-{release}"), format!("{release}/vmlinuz")];
            names.iter().map(|name| root.join(directory).join(name)).find(|path| path.is_file())
        });
        let image = image.with_context(|| format!("no image in {}", root.display()))?;
        Ok(Self { release, image, root })
    }

    /// The archive with the modules, in the order in which they are loaded, their names in `/modules`.
    pub(crate) fn modules(&self) -> Result<Vec<u8>> {
        let directory =
            ["usr/lib/modules", "lib/modules"].map(|path| self.root.join(path).join(&self.release));
        let directory = directory.into_iter().find(|path| path.is_dir());
        let directory = directory.with_context(|| format!("no modules in {}", self.root.display()))?;
        let built_in = std::fs::read_to_string(directory.join("modules.builtin")).unwrap_or_default();
        let mut files = BTreeMap::new();
        index(&directory.join("kernel"), &mut files)?;
        let mut found = Modules {
            files,
            built_in: built_in.lines().filter_map(module_name).collect(),
            order: Vec::new(),
        };
        for module in MODULES {
            found.load(module).with_context(|| format!("kernel {}", self.release))?;
        }
        let mut archive = Initramfs::default();
        let mut order = String::new();
        for (name, content) in &found.order {
            archive.file(&format!("lib/modules/{name}.ko"), content);
            order.push_str(&format!("/lib/modules/{name}.ko\n"));
        }
        archive.file("modules", order.as_bytes());
        Ok(archive.finish())
    }
}

struct Modules {
    files: BTreeMap<String, PathBuf>,
    built_in: Vec<String>,
    order: Vec<(String, Vec<u8>)>,
}

impl Modules {
    /// Adds a module behind those it needs.
    fn load(&mut self, name: &str) -> Result<()> {
        let is_there = |known: &(String, Vec<u8>)| known.0 == name;
        if self.built_in.iter().any(|known| known == name) || self.order.iter().any(is_there) {
            return Ok(());
        }
        let file = self.files.get(name).with_context(|| format!("there is no module {name}"))?;
        let content = decompressed(file)?;
        for needed in dependencies(&content) {
            self.load(&needed)?;
        }
        self.order.push((name.to_owned(), content));
        Ok(())
    }
}

fn index(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries =
        std::fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            index(&path, files)?;
        } else if let Some(name) = module_name(&path.to_string_lossy()) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// The name of a module, from its path.
fn module_name(path: &str) -> Option<String> {
    let (_, file) = path.rsplit_once('/')?;
    let (name, _) = file.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

fn decompressed(file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_some_and(|extension| extension == "ko") {
        return std::fs::read(file).with_context(|| format!("cannot read {}", file.display()));
    }
    let output =
        Command::new("xz").arg("-dc").arg(file).output().context("cannot start `xz`: install xz-utils")?;
    ensure!(output.status.success(), "xz cannot read {}", file.display());
    Ok(output.stdout)
}

/// What a module says it needs (`depends=` in its section `.modinfo`).
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = module[at + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    let value = String::from_utf8_lossy(value).replace('-', "_");
    value.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

const IMAGE: &str = "linux-image-";
const UNSIGNED: &str = "-unsigned";

/// Packages of a version, best first: the newest, and the signed one before its twin.
fn candidates(names: &[String], flavour: &str, version: &str) -> Vec<String> {
    let mut found: Vec<(Vec<u64>, bool, &String)> = Vec::new();
    for name in names {
        let Some(release) = release(name, flavour) else { continue };
        if version == NEWEST || is_version(release, version) {
            found.push((numbers(release), !name.ends_with(UNSIGNED), name));
        }
    }
    found.sort();
    found.into_iter().rev().map(|(_, _, name)| name.clone()).collect()
}

/// The versions there are, for a message.
fn versions(names: &[String], flavour: &str) -> Vec<String> {
    let releases = names.iter().filter_map(|name| release(name, flavour));
    let mut versions: Vec<Vec<u64>> = releases.map(|release| numbers(release)[..2].to_vec()).collect();
    versions.sort();
    versions.dedup();
    versions.iter().map(|numbers| format!("{}.{}", numbers[0], numbers[1])).collect()
}

/// The release that an image's package is named after, without the flavour: at least three numbers, which tells it from a
/// package that only points to the newest.
fn release<'a>(name: &'a str, flavour: &str) -> Option<&'a str> {
    let release = name.strip_prefix(IMAGE)?;
    let release =
        release.strip_suffix(UNSIGNED).unwrap_or(release).strip_suffix(flavour)?.strip_suffix('-')?;
    let is_plain = !release.ends_with("-cloud") && !release.ends_with("-rt");
    (is_plain && numbers(release).len() > 2).then_some(release)
}

fn is_version(release: &str, version: &str) -> bool {
    release.strip_prefix(version).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '-', '+']))
}

fn numbers(release: &str) -> Vec<u64> {
    release.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

/// The shell of a guest, of its own architecture.
pub(crate) fn busybox(architecture: Architecture) -> Result<PathBuf> {
    let root = packages::cache()?.join(format!("busybox-{}", architecture.arch().name()));
    let places = ["usr/bin/busybox", "bin/busybox"].map(|path| root.join(path));
    if let Some(found) = places.iter().find(|path| process::is_executable(path)) {
        return Ok(found.clone());
    }
    Apt::of(architecture.arch().name())?.unpack(&["busybox-static".to_owned()], &root)?;
    places
        .into_iter()
        .find(|path| process::is_executable(path))
        .context("the package busybox-static has no busybox")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Vec<String> {
        [
            "linux-image-6.1-amd64",
            "linux-image-6.1.0-9-amd64",
            "linux-image-6.1.0-56-amd64-unsigned",
            "linux-image-6.1.0-56-amd64",
            "linux-image-6.1.0-57-cloud-amd64",
            "linux-image-6.12.117+deb12-amd64",
            "linux-image-7.3.4+deb13-amd64",
            "linux-image-7.3.4+deb13-arm64-16k",
            "linux-image-7.3.4+deb13-arm64",
            "linux-image-amd64",
        ]
        .map(str::to_owned)
        .to_vec()
    }

    #[test]
    fn the_newest_package_of_a_version_comes_first() {
        let of_6_1 = candidates(&names(), "amd64", "6.1");
        let packages = [
            "linux-image-6.1.0-56-amd64",
            "linux-image-6.1.0-56-amd64-unsigned",
            "linux-image-6.1.0-9-amd64",
        ];
        assert_eq!(of_6_1, packages);
        assert_eq!(candidates(&names(), "amd64", "6.1.0-9"), ["linux-image-6.1.0-9-amd64"]);
        assert_eq!(candidates(&names(), "amd64", NEWEST)[0], "linux-image-7.3.4+deb13-amd64");
        assert_eq!(candidates(&names(), "arm64-16k", NEWEST), ["linux-image-7.3.4+deb13-arm64-16k"]);
        assert_eq!(candidates(&names(), "arm64", "7.3"), ["linux-image-7.3.4+deb13-arm64"]);
        assert_eq!(versions(&names(), "amd64"), ["6.1", "6.12", "7.3"]);
    }

    #[test]
    fn a_module_says_what_it_needs() {
        let module = b"\x7fELF\0license=GPL\0depends=net-failover,failover\0retpoline=Y\0";
        assert_eq!(dependencies(module), ["net_failover", "failover"]);
        assert_eq!(dependencies(b"\0depends=\0name=x\0"), [""; 0]);
        assert_eq!(module_name("kernel/net/sched/sch-ingress.ko.xz").as_deref(), Some("sch_ingress"));
        assert_eq!(module_name("kernel/modules.order"), None);
    }
}
