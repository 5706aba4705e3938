//! The compiler of the BPF programs: which rustc can build `core` for the BPF target, and where its LLVM is.
//!
//! Debian's rustc-web brings a `core` for BPF ready-made. Elsewhere a toolchain with `rust-src` builds one; the unstable
//! cargo flag this takes is allowed by `RUSTC_BOOTSTRAP=1`, so it need not be a nightly.

use crate::process;
use crate::workspace;
use anyhow::{Context, Result, bail};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The BPF target of this machine's byte order: kernel programs run in it.
pub(crate) const BPF_TARGET: &str =
    if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };

/// bpf-linker reads rustc's bitcode with rustc's own LLVM; its pinned version is written against this major version.
const LLVM_MAJOR: u32 = 22;

/// The oldest compiler the workspace allows, from its one place in the root manifest.
const RUST_VERSION_MIN: &str = env!("CARGO_PKG_RUST_VERSION");

/// A rustc that can compile the BPF programs.
pub(crate) struct Compiler {
    pub(crate) rustc: PathBuf,
    pub(crate) sysroot: PathBuf,
    pub(crate) core: Core,
    pub(crate) release: String,
}

/// Where `core` for the BPF target comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Core {
    ReadyMade,
    FromSource,
}

impl fmt::Display for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadyMade => "brings core for BPF",
            Self::FromSource => "builds core for BPF from rust-src",
        })
    }
}

impl Compiler {
    /// The cargo to drive it: the toolchain's own where core is built from source, since the two must agree on how.
    pub(crate) fn cargo(&self) -> std::ffi::OsString {
        let own = self.sysroot.join("bin/cargo");
        match self.core {
            Core::FromSource if process::is_executable(&own) => own.into(),
            Core::FromSource | Core::ReadyMade => process::cargo_program(),
        }
    }

    /// The LLVM library this rustc is linked with.
    pub(crate) fn llvm(&self) -> Option<PathBuf> {
        let direct = process::output(Command::new("ldd").arg(&self.rustc)).unwrap_or_default();
        llvm_in_ldd(&direct)
    }
}

fn llvm_in_ldd(output: &str) -> Option<PathBuf> {
    let line = output.lines().find(|line| line.trim_start().starts_with("libLLVM"))?;
    let (_, path) = line.split_once("=>")?;
    path.split_whitespace().next().map(PathBuf::from)
}

/// Finds a compiler on this machine; without one, says what each candidate lacks.
pub(crate) fn find() -> Result<std::result::Result<Compiler, Vec<String>>> {
    if let Some(named) = std::env::var_os("XDP_AGENT_BPF_RUSTC").filter(|v| !v.is_empty()) {
        let named = PathBuf::from(named);
        return match inspect(&named) {
            Ok(compiler) => Ok(Ok(compiler)),
            Err(why) => bail!("XDP_AGENT_BPF_RUSTC names {}, which {why}", named.display()),
        };
    }
    let mut from_source = None;
    let mut refused = Vec::new();
    for candidate in candidates() {
        match inspect(&candidate) {
            // Ready-made wins wherever it stands in the list: it saves compiling core.
            Ok(compiler) if compiler.core == Core::ReadyMade => return Ok(Ok(compiler)),
            Ok(compiler) => from_source = from_source.or(Some(compiler)),
            Err(why) => refused.push(format!("{} {why}", candidate.display())),
        }
    }
    Ok(from_source.ok_or(refused))
}

fn candidates() -> Vec<PathBuf> {
    let mut found = process::all_on_path("rustc");
    found.push(PathBuf::from("/usr/bin/rustc"));
    if let Some(toolchains) = workspace::rustup_home().map(|home| home.join("toolchains")) {
        let mut installed: Vec<_> = toolchains
            .read_dir()
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path().join("bin/rustc"))
            .collect();
        installed.sort();
        found.extend(installed);
    }
    let mut seen = Vec::new();
    // On merged-usr systems /bin is /usr/bin; rustup's proxies all link to one file but act by name, so only the
    // directory is resolved.
    found.retain(|rustc| {
        let directory = rustc.parent().and_then(|dir| dir.canonicalize().ok());
        let fresh = process::is_executable(rustc) && !seen.contains(&directory);
        seen.push(directory);
        fresh
    });
    found
}

/// Asks one rustc what it is; the error completes a sentence that begins with its path.
fn inspect(rustc: &Path) -> std::result::Result<Compiler, String> {
    let ask = |args: &[&str]| {
        // A rustup proxy must answer for what is installed, and not start a download.
        process::output(Command::new(rustc).env("RUSTUP_AUTO_INSTALL", "0").args(args))
            .ok_or_else(|| format!("does not answer `{}`", args.join(" ")))
    };
    let places = ask(&["--print", "sysroot", "--print", "target-libdir", "--target", BPF_TARGET])?;
    let mut places = places.lines().map(PathBuf::from);
    let (Some(sysroot), Some(libdir)) = (places.next(), places.next()) else {
        return Err("does not say where its libraries are".into());
    };
    let core = if has_core(&libdir) {
        Core::ReadyMade
    } else if sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file() {
        Core::FromSource
    } else {
        return Err("has neither core for BPF nor rust-src".into());
    };
    let version = ask(&["-vV"])?;
    let (release, llvm_major) = versions(&version).ok_or("prints a version in an unknown form")?;
    if parse_version(&release) < parse_version(RUST_VERSION_MIN) {
        return Err(format!("is {release}; at least {RUST_VERSION_MIN} is needed"));
    }
    if llvm_major != LLVM_MAJOR {
        return Err(format!("uses LLVM {llvm_major}; bpf-linker here needs LLVM {LLVM_MAJOR}"));
    }
    // A rustup proxy is named `rustc` too: what compiles is the binary in the sysroot it points to.
    let real = sysroot.join("bin/rustc");
    let rustc = if process::is_executable(&real) { real } else { rustc.to_path_buf() };
    Ok(Compiler { rustc, sysroot, core, release })
}

fn has_core(libdir: &Path) -> bool {
    let names = libdir.read_dir().into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.into_iter().any(|name| {
        let name = name.to_string_lossy();
        name.starts_with("libcore-") && name.ends_with(".rlib")
    })
}

fn versions(verbose: &str) -> Option<(String, u32)> {
    let field = |name: &str| verbose.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let llvm = field("LLVM version:")?.split('.').next()?.parse().ok()?;
    Some((field("release:")?.to_owned(), llvm))
}

/// Major and minor number of a version such as `1.96.0+dfsg1-1`.
pub(crate) fn parse_version(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Whether a packaged version such as `1.85.0+dfsg3` is new enough to compile the workspace.
pub(crate) fn is_new_enough(version: &str) -> Result<bool> {
    let version = parse_version(version).with_context(|| format!("cannot read the version `{version}`"))?;
    Ok(Some(version) >= parse_version(RUST_VERSION_MIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_llvm_of_a_compiler_is_read_from_its_version() {
        let text = "rustc 1.96.0\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(versions(text), Some(("1.96.0".into(), 22)));
        assert_eq!(versions("release: 1.96.0\n"), None);
    }

    #[test]
    fn versions_compare_as_numbers() {
        assert!(parse_version("1.100.0-nightly") > parse_version("1.95"));
        assert!(parse_version("1.85.0+dfsg3-1") < parse_version("1.95"));
        assert!(parse_version("nonsense") < parse_version("1.95"));
    }

    #[test]
    fn the_llvm_library_is_found_in_what_ldd_prints() {
        let text = "\tlibrustc_driver-1.so => /l/librustc_driver-1.so (0x7)\n\tlibLLVM.so.22.1 => /l/libLLVM.so.22.1 (0x7)\n";
        assert_eq!(llvm_in_ldd(text), Some(PathBuf::from("/l/libLLVM.so.22.1")));
        assert_eq!(llvm_in_ldd("\tstatically linked\n"), None);
    }
}
