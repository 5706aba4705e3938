//! The compiler of released binaries: a rustc with the standard library of every architecture, and linkers for them.
//!
//! The compiler that builds everything else is preferred, so that what is released is what the tests run; rustup adds a
//! standard library to it. Where rustup has nothing to offer, Debian's rustc-web does: its standard library for another
//! architecture is a package of that architecture, unpacked into this tool's cache.

use crate::arch::Arch;
use crate::compiler;
use crate::process;
use crate::setup;
use crate::workspace;
use anyhow::{Context, Result, bail};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where Debian's rustc-web keeps its standard libraries.
const DEBIAN_RUSTLIB: &str = "/usr/lib/rustlib";

const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// The package with the standard library, one for each architecture.
const DEBIAN_STD: &str = "libstd-rust-web-dev";

/// A compiler that builds for all the architectures asked for.
pub(crate) struct Cross {
    pub(crate) rustc: PathBuf,
    /// The compiler's own, or one put together in the cache.
    pub(crate) sysroot: PathBuf,
    /// As `rustc --version` has it.
    pub(crate) version: String,
    /// The number in it.
    pub(crate) release: String,
}

/// Finds compiler and linkers and installs what is missing; quick and silent when all is there.
pub(crate) fn ensure(archs: &[Arch]) -> Result<Cross> {
    for &arch in archs {
        ensure_linker(arch)?;
    }
    if let Some(found) = find(archs) {
        return Ok(found);
    }
    let mut tried = Vec::new();
    for way in [add_by_rustup, unpack_from_debian] {
        match way(archs) {
            Ok(()) => {}
            Err(error) => {
                eprintln!("setup: {error:#}");
                tried.push(format!("{error:#}"));
            }
        }
        if let Some(found) = find(archs) {
            return Ok(found);
        }
    }
    let targets: Vec<_> = archs.iter().map(|arch| arch.target()).collect();
    bail!(
        "no compiler with a standard library for {} could be found or put together:\n  {}\n\
         `rustup target add {}` is the shortest way",
        targets.join(" and "),
        tried.join("\n  "),
        targets.join(" ")
    )
}

fn find(archs: &[Arch]) -> Option<Cross> {
    let active = process::on_path("rustc").and_then(|rustc| inspect(&rustc, None, archs));
    let debian = || {
        let rustc = Path::new(DEBIAN_RUSTC);
        let sysroot = debian_sysroot(&debian_version(rustc)?).ok()?;
        inspect(rustc, None, archs).or_else(|| inspect(rustc, Some(&sysroot), archs))
    };
    active.or_else(debian)
}

/// The compiler, when it is new enough and has all it takes.
fn inspect(rustc: &Path, sysroot: Option<&Path>, archs: &[Arch]) -> Option<Cross> {
    let ask = |args: &[&str]| {
        process::output(Command::new(rustc).env("RUSTUP_AUTO_INSTALL", "0").args(args))
            .map(|answer| answer.trim().to_owned())
    };
    let version = ask(&["--version"])?;
    let release = version.split_whitespace().nth(1)?.to_owned();
    if !compiler::is_new_enough(&release).ok()? {
        return None;
    }
    let own = PathBuf::from(ask(&["--print", "sysroot"])?);
    // A rustup proxy acts by the directory it is called in; what compiles is the binary it stands for.
    let real = own.join("bin/rustc");
    let rustc = if process::is_executable(&real) { real } else { rustc.to_path_buf() };
    let sysroot = sysroot.map_or(own, Path::to_path_buf);
    let has_all = archs.iter().all(|arch| has_std(&sysroot, *arch));
    has_all.then_some(Cross { rustc, sysroot, version, release })
}

fn has_std(sysroot: &Path, arch: Arch) -> bool {
    let libraries = sysroot.join("lib/rustlib").join(arch.target()).join("lib");
    let names = libraries.read_dir().into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.into_iter().any(|name| {
        let name = name.to_string_lossy();
        name.starts_with("libstd-") && name.ends_with(".rlib")
    })
}

fn ensure_linker(arch: Arch) -> Result<()> {
    setup::ensure_packages(&arch.linker(), &arch.linker_packages())
        .with_context(|| format!("nothing links for {} here", arch.name()))
}

fn add_by_rustup(archs: &[Arch]) -> Result<()> {
    if process::on_path("rustup").is_none() {
        bail!("no rustup on PATH: it cannot add a standard library");
    }
    eprintln!("setup: adding standard libraries by rustup");
    let mut add = process::in_outer_netns("rustup".as_ref());
    process::run(add.args(["target", "add"]).args(archs.iter().map(|arch| arch.target())))
}

/// Unpacks the package of each other architecture beside the libraries of the installed compiler.
fn unpack_from_debian(archs: &[Arch]) -> Result<()> {
    for tool in ["apt-get", "dpkg-deb", "dpkg-query"] {
        if process::on_path(tool).is_none() {
            bail!("no {tool}: Debian's packages are not an option");
        }
    }
    let rustc = Path::new(DEBIAN_RUSTC);
    if debian_version(rustc).is_none() {
        setup::install_packages()?;
    }
    let version = debian_version(rustc).context("there is no package rustc-web in use here")?;
    let sysroot = debian_sysroot(&version)?;
    let rustlib = sysroot.join("lib/rustlib");
    std::fs::create_dir_all(&rustlib).with_context(|| format!("cannot create {}", rustlib.display()))?;
    for &arch in archs {
        if has_std(&sysroot, arch) {
            continue;
        }
        let target = arch.target();
        let installed = Path::new(DEBIAN_RUSTLIB).join(&target);
        let libraries = if installed.is_dir() { installed } else { unpacked(arch, &version, &sysroot)? };
        symlink(&libraries, rustlib.join(&target))
            .with_context(|| format!("cannot link to {}", libraries.display()))?;
    }
    Ok(())
}

/// The version of the package that a rustc comes from, when that is rustc-web.
fn debian_version(rustc: &Path) -> Option<String> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${db:Status-Abbrev}${Version}", "rustc-web"]);
    let answer = process::output(&mut query)?;
    let version = answer.strip_prefix("ii ")?.trim().to_owned();
    (process::is_executable(rustc) && !version.is_empty()).then_some(version)
}

/// Of its own for each version: a standard library fits the compiler it was built by and no other.
fn debian_sysroot(version: &str) -> Result<PathBuf> {
    Ok(workspace::cache()?.join("sysroot").join(version))
}

/// Downloads and unpacks the libraries of an architecture, with package lists of its own: the system's stay as they are,
/// and it takes no root.
fn unpacked(arch: Arch, version: &str, sysroot: &Path) -> Result<PathBuf> {
    eprintln!("setup: unpacking {DEBIAN_STD} {version} for {} into {}", arch.name(), sysroot.display());
    let apt = sysroot.join("apt");
    for directory in ["lists/partial", "cache/archives/partial"] {
        let directory = apt.join(directory);
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
    }
    let apt_get = |args: &[&str]| {
        let mut command = process::in_outer_netns("apt-get".as_ref());
        for option in ["APT::Architecture", "APT::Architectures"] {
            command.arg("-o").arg(format!("{option}={}", arch.name()));
        }
        for (option, place) in [("Dir::State::lists", "lists"), ("Dir::Cache", "cache")] {
            command.arg("-o").arg(format!("{option}={}", apt.join(place).display()));
        }
        // What is installed here is of another architecture; and the user apt downloads by cannot write here.
        command.args(["-o", "Dir::State::status=/dev/null", "-o", "APT::Sandbox::User=", "--quiet"]);
        process::run(command.args(args).current_dir(&apt))
    };
    apt_get(&["update"])?;
    apt_get(&["download", &format!("{DEBIAN_STD}={version}")])?;
    let package = apt
        .read_dir()?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get left no package")?;
    let into = sysroot.join(arch.name());
    process::run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(&into))?;
    std::fs::remove_dir_all(&apt).with_context(|| format!("cannot remove {}", apt.display()))?;
    let libraries = into.join(DEBIAN_RUSTLIB.trim_start_matches('/')).join(arch.target());
    if !libraries.is_dir() {
        bail!("{DEBIAN_STD} {version} has no libraries for {}", arch.target());
    }
    Ok(libraries)
}
