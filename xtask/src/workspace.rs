//! Where things are: the repository, the target directory and what the build leaves in it.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// The repository and its build directory, both absolute.
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// Finds the repository above this package, and the directory cargo builds into.
    pub(crate) fn find() -> Result<Self> {
        let package = std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = package.parent().context("the xtask package has no directory above it")?.to_path_buf();
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            // Cargo reads it relative to where it was called, and so must its children here.
            Some(dir) if !dir.is_empty() => std::path::absolute(dir)?,
            Some(_) | None => root.join("target"),
        };
        Ok(Self { root, target })
    }

    /// The BPF objects that the agent's build embeds.
    pub(crate) fn bpf_objects(&self) -> PathBuf {
        self.target.join("bpf")
    }

    /// The BPF build's own target directory: it never invalidates the host's.
    pub(crate) fn bpf_build(&self) -> PathBuf {
        self.target.join("bpf-build")
    }

    /// What is released.
    pub(crate) fn dist(&self) -> PathBuf {
        self.target.join("dist")
    }

    /// The target directory of what a released compiler builds: another one and other flags leave the host's alone, and
    /// compilers each other's.
    pub(crate) fn dist_build(&self, compiler: &str) -> PathBuf {
        self.target.join("dist-build").join(compiler)
    }

    /// A binary of this workspace, as built in `profile`.
    pub(crate) fn binary(&self, profile: Profile, name: &str) -> PathBuf {
        self.target.join(profile.directory()).join(name)
    }
}

/// The optimisation a host build is made with.
#[derive(Clone, Copy)]
pub(crate) enum Profile {
    Debug,
    Release,
}

impl Profile {
    fn directory(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Release => "release",
        }
    }

    pub(crate) fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Debug => &[],
            Self::Release => &["--release"],
        }
    }
}

/// Where this tool keeps what it installs, across clones: `$XDG_CACHE_HOME/xdp-agent` or `~/.cache/xdp-agent`.
pub(crate) fn cache() -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = variable("XDG_CACHE_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".cache")))
        .context("neither HOME nor XDG_CACHE_HOME is set: set one, tools are kept there")?;
    Ok(base.join("xdp-agent"))
}

/// Cargo's home directory, `~/.cargo` unless moved.
pub(crate) fn cargo_home() -> Option<PathBuf> {
    home_of("CARGO_HOME", ".cargo")
}

/// Rustup's home directory, `~/.rustup` unless moved.
pub(crate) fn rustup_home() -> Option<PathBuf> {
    home_of("RUSTUP_HOME", ".rustup")
}

fn home_of(variable: &str, below_home: &str) -> Option<PathBuf> {
    let set = std::env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from);
    set.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(below_home)))
}
