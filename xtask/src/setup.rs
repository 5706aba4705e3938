//! `setup`: finds or installs what building the BPF programs takes.

use crate::arch::ARCHS;
use crate::compiler::{self, Compiler};
use crate::cross;
use crate::host;
use crate::process;
use crate::tool::BPF_LINKER;
use crate::workspace::Workspace;
use anyhow::{Result, bail};
use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;

/// Debian's rustc with its ready-made core for BPF.
const PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];

/// A nightly whose LLVM is the one the pinned bpf-linker expects; a floating one leaves that version behind.
const NIGHTLY: &str = "nightly-2026-05-20";

/// All that turns the kernel crate into loadable objects.
pub(crate) struct Toolchain {
    pub(crate) compiler: Compiler,
    pub(crate) linker: PathBuf,
}

pub(crate) fn verb(_: &Workspace, args: &[String]) -> Result<()> {
    let cross = match args {
        [] => false,
        [flag] if flag == "--cross" => true,
        other => bail!("`setup` takes --cross only, and `{}` was given", other.join(" ")),
    };
    let toolchain = ensure()?;
    let compiler = &toolchain.compiler;
    println!("rustc       {} {} ({})", compiler.rustc.display(), compiler.release, compiler.core);
    println!("bpf-linker  {}", toolchain.linker.display());
    if cross {
        let found = cross::ensure(&ARCHS)?;
        println!("releases    {} {}", found.rustc.display(), found.version);
        for arch in ARCHS {
            println!("{:11} linked by {}", arch.name(), arch.linker());
        }
    }
    Ok(())
}

/// Finds the toolchain and installs what is missing; quick and silent when all is there.
pub(crate) fn ensure() -> Result<Toolchain> {
    if process::on_path("cc").is_none() {
        bail!(
            "no C compiler (`cc`) on PATH, and Rust links with it: install one, `apt-get install gcc libc6-dev` on Debian"
        );
    }
    let compiler = match compiler::find()? {
        Ok(compiler) => compiler,
        Err(refused) => install_compiler(&refused)?,
    };
    Ok(Toolchain { compiler, linker: BPF_LINKER.ensure()? })
}

fn install_compiler(refused: &[String]) -> Result<Compiler> {
    eprintln!("setup: no compiler for BPF programs yet");
    for reason in refused {
        eprintln!("setup:   {reason}");
    }
    let mut tried = Vec::new();
    for way in [install_packages, install_nightly] {
        if let Err(error) = way() {
            eprintln!("setup: {error:#}");
            tried.push(format!("{error:#}"));
            continue;
        }
        match compiler::find()? {
            Ok(compiler) => return Ok(compiler),
            Err(refused) => tried.extend(refused),
        }
    }
    bail!(
        "no compiler for BPF programs could be found or installed:\n  {}\nDo one of these, then try again:\n  \
         apt-get install {} (as root, where the packaged version is new enough)\n  \
         rustup toolchain install {NIGHTLY} --profile minimal --component rust-src",
        tried.join("\n  "),
        PACKAGES.join(" ")
    )
}

/// Installs Debian's compiler, where it is packaged and new enough.
pub(crate) fn install_packages() -> Result<()> {
    if process::on_path("apt-get").is_none() {
        bail!("not a Debian-like system: its packages are not an option");
    }
    if !host::is_root() {
        bail!("not root: the packages {} are not installed from here", PACKAGES.join(" "));
    }
    eprintln!("setup: installing the packages {}", PACKAGES.join(" "));
    process::run(Command::new("apt-get").args(["update", "--quiet"]))?;
    for package in PACKAGES {
        let version = packaged_version(package);
        let Some(version) = version else { bail!("no package {package} in this system's sources") };
        if !compiler::is_new_enough(&version)? {
            bail!("the package {package} is {version}, which is too old");
        }
    }
    install(&PACKAGES)
}

/// Finds a program, or installs the Debian packages that bring it and what it needs.
pub(crate) fn ensure_packages(program: &str, packages: &[impl AsRef<str>]) -> Result<()> {
    let packages: Vec<&str> = packages.iter().map(AsRef::as_ref).collect();
    let names = packages.join(" ");
    if process::on_path(program).is_some() {
        return Ok(());
    }
    if process::on_path("apt-get").is_none() || !host::is_root() {
        bail!("no `{program}` on PATH: install it (`apt-get install {names}` on Debian)");
    }
    eprintln!("setup: installing the packages {names}");
    process::run(process::in_outer_netns("apt-get".as_ref()).args(["update", "--quiet"]))?;
    install(&packages)
}

/// Installs Debian packages; as root only.
pub(crate) fn install(packages: &[impl AsRef<OsStr>]) -> Result<()> {
    let mut install = Command::new("apt-get");
    install.env("DEBIAN_FRONTEND", "noninteractive").args(["install", "--quiet", "--yes"]);
    // A compiler the machine already has must stay: rustc-web conflicts with the package rustc.
    install.args(["--no-install-recommends", "--no-remove", "-o", "DPkg::Lock::Timeout=120"]).args(packages);
    process::run(&mut install)
}

fn packaged_version(package: &str) -> Option<String> {
    let policy = process::output(Command::new("apt-cache").args(["policy", package]))?;
    let candidate = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate:"))?.trim();
    (candidate != "(none)").then(|| candidate.to_owned())
}

fn install_nightly() -> Result<()> {
    if process::on_path("rustup").is_none() {
        bail!("no rustup on PATH: a nightly cannot be installed from here (https://rustup.rs)");
    }
    eprintln!("setup: installing the toolchain {NIGHTLY} with rust-src");
    process::run(Command::new("rustup").args([
        "toolchain",
        "install",
        NIGHTLY,
        "--profile",
        "minimal",
        "--component",
        "rust-src",
    ]))
}
