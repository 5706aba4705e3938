//! What the lane `image` finds in a guest: the image's layout, and a runc that starts it.

use super::initramfs::Initramfs;
use super::packages::{self, Apt};
use crate::arch::Arch;
use crate::image;
use crate::process;
use crate::setup;
use crate::workspace::Workspace;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Debian's runc and the libraries it is linked to.
const PACKAGES: [&str; 3] = ["runc", "libseccomp2", "libc6"];

/// Adds the half of an architecture as `cargo xtask image` makes it, below `/layout`, and `/bin/runc`; returns the programs
/// whose libraries are still to be added.
pub(crate) fn pack(workspace: &Workspace, arch: Arch, archive: &mut Initramfs) -> Result<Vec<PathBuf>> {
    add(archive, &image::layout(workspace, &[arch], None)?, "layout")?;
    if arch == Arch::here()? {
        setup::ensure_packages("runc", &["runc"])?;
        let runc = process::on_path("runc").context("the package runc has no runc")?;
        archive.copy("bin/runc", &runc)?;
        return Ok(vec![runc]);
    }
    let root = packages::cache()?.join(format!("runc-{}", arch.name()));
    if !root.is_dir() {
        Apt::of(arch.name())?.unpack(&PACKAGES.map(str::to_owned), &root)?;
    }
    archive.copy("bin/runc", &root.join("usr/sbin/runc"))?;
    let libraries = root.join("usr/lib").join(format!("{}-linux-gnu", arch.machine()));
    for library in ["libseccomp.so.2", "libc.so.6"] {
        archive.copy(&format!("lib/{library}"), &libraries.join(library))?;
    }
    let loader = arch.loader();
    archive.copy(loader, &libraries.join(Path::new(loader).file_name().context("a loader has a name")?))?;
    Ok(Vec::new())
}

/// Adds a directory and all that is in it.
fn add(archive: &mut Initramfs, directory: &Path, to: &str) -> Result<()> {
    let entries = directory.read_dir().with_context(|| format!("cannot list {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        let to = format!("{to}/{}", path.file_name().context("an entry has a name")?.to_string_lossy());
        if path.is_dir() { add(archive, &path, &to)? } else { archive.copy(&to, &path)? }
    }
    Ok(())
}
