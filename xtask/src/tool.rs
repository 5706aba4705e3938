//! Cargo-installed tools of pinned versions: found where they usually are, or built once into this tool's cache.

use crate::process;
use crate::workspace;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// A binary crate this repository needs at one exact version.
pub(crate) struct Tool {
    name: &'static str,
    version: &'static str,
    /// What a newcomer waits for, on two cores.
    takes: &'static str,
}

/// Links rustc's bitcode to BPF objects. 0.10 loads rustc's own LLVM; 0.11 and later link to one of the system.
pub(crate) const BPF_LINKER: Tool = Tool { name: "bpf-linker", version: "0.10.4", takes: "about a minute" };

/// Checks licences, sources, duplicates and advisories of the dependencies.
pub(crate) const CARGO_DENY: Tool = Tool { name: "cargo-deny", version: "0.20.2", takes: "some minutes" };

impl Tool {
    /// Finds the tool, or installs it and says so.
    pub(crate) fn ensure(&self) -> Result<PathBuf> {
        match self.find()? {
            Some(found) => Ok(found),
            None => self.install(),
        }
    }

    fn find(&self) -> Result<Option<PathBuf>> {
        let mut places = process::all_on_path(self.name);
        places.extend(workspace::cargo_home().map(|home| home.join("bin").join(self.name)));
        places.push(self.installed_at()?);
        let wanted = format!("{} {}", self.name, self.version);
        Ok(places.into_iter().find(|place| {
            let answer = process::output(Command::new(place).arg("--version"));
            answer.is_some_and(|answer| answer.trim() == wanted)
        }))
    }

    fn installed_at(&self) -> Result<PathBuf> {
        Ok(workspace::cache()?.join("bin").join(self.name))
    }

    /// Builds in the cache, so that neither the caller's target directory nor another version the user has is touched.
    fn install(&self) -> Result<PathBuf> {
        let root = workspace::cache()?;
        let build = root.join("build").join(self.name);
        eprintln!(
            "setup: installing {} {} into {} ({}, once)",
            self.name,
            self.version,
            root.join("bin").display(),
            self.takes
        );
        let mut install = process::cargo_compile_by(&process::cargo_program());
        install
            .args(["install", "--locked", "--quiet", "--root"])
            .arg(&root)
            .arg("--target-dir")
            .arg(&build)
            .arg(format!("{}@{}", self.name, self.version));
        for variable in
            ["RUSTC", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET", "RUSTC_BOOTSTRAP"]
        {
            install.env_remove(variable);
        }
        process::run(&mut install).with_context(|| format!("cannot install {}", self.name))?;
        // Intermediate files are kept after a failure, to go on from there, and are of no use after a success.
        std::fs::remove_dir_all(&build).with_context(|| format!("cannot remove {}", build.display()))?;
        self.installed_at()
    }
}
