//! `image`: the multi-arch OCI image from what `dist` builds, by a program of its own: a registry's client is more than
//! the first thing a newcomer compiles should hold.

use crate::arch::{ARCHS, Arch};
use crate::build;
use crate::cross;
use crate::dist::{self, Commit};
use crate::process;
use crate::workspace::Workspace;
use anyhow::{Context, Result, bail};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub(crate) fn verb(workspace: &Workspace, args: &[String]) -> Result<()> {
    let (mut archs, mut push) = (Vec::new(), None);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("`{arg}` needs a value"));
        match arg.as_str() {
            "--arch" => archs.push(Arch::parse(value()?)?),
            "--push" => push = Some(value()?.clone()),
            other => {
                bail!("`image` does not know `{other}`; it takes --arch NAME and --push REGISTRY/NAME:TAG")
            }
        }
    }
    if archs.is_empty() {
        archs = ARCHS.to_vec();
    }
    layout(workspace, &archs, push.as_deref()).map(drop)
}

/// Builds the binaries and writes the layout, then pushes it where that is asked for; returns its directory.
pub(crate) fn layout(workspace: &Workspace, archs: &[Arch], push: Option<&str>) -> Result<PathBuf> {
    write(workspace, archs, &tool(workspace)?, push)
}

/// Builds the program that makes images.
pub(crate) fn tool(workspace: &Workspace) -> Result<PathBuf> {
    build::binary(workspace, "xdp-agent-image")
}

/// As [`layout`], by a program that is there.
pub(crate) fn write(
    workspace: &Workspace,
    archs: &[Arch],
    tool: &Path,
    push: Option<&str>,
) -> Result<PathBuf> {
    let commit = Commit::of(workspace)?;
    if push.is_some() && commit.is_dirty() {
        bail!(
            "the tree has changes that are not committed, and an image names its commit: commit them first"
        );
    }
    let mut files = dist::binaries(workspace, archs)?;
    let rust = cross::ensure(archs)?.release;
    let layout = workspace.dist().join("image");
    let mut command = Command::new(tool);
    command.arg("--repository").arg(&workspace.root);
    command.arg("--dist").arg(workspace.dist());
    command.arg("--layout").arg(&layout);
    command.args(["--revision", &commit.revision, "--epoch", &commit.epoch]);
    for &arch in archs {
        command.arg("--half").arg(format!("{},{rust},{}", arch.name(), c_library(arch)?));
    }
    if let Some(to) = push {
        command.args(["--push", to]);
    }
    process::run(&mut command)?;
    // The bills of materials are beside the binaries now, and belong to what is checked.
    files.retain(|file| file.file_name() != Some(dist::CHECKSUMS.as_ref()));
    files.extend(archs.iter().map(|&arch| dist::binary(workspace, arch).with_added_extension("cdx.json")));
    dist::checksums(&workspace.dist(), &files)?;
    Ok(layout)
}

/// The version of the C library that is linked into the binary, from the headers beside it.
fn c_library(arch: Arch) -> Result<String> {
    let linker = arch.linker();
    let mut child = Command::new(&linker)
        .args(["-E", "-P", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {linker}"))?;
    let mut source = child.stdin.take().context("the compiler has no input")?;
    source.write_all(b"#include <features.h>\n__GLIBC__ __GLIBC_MINOR__\n")?;
    drop(source);
    let output = String::from_utf8(child.wait_with_output()?.stdout)?;
    let words: Vec<&str> = output.split_whitespace().collect();
    match words[..] {
        [major, minor] if major.parse::<u32>().is_ok() && minor.parse::<u32>().is_ok() => {
            Ok(format!("{major}.{minor}"))
        }
        _ => bail!("{linker} has the headers of another C library than glibc: {output}"),
    }
}
