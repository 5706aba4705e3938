//! `dist --check`: builds the commit twice, in clones at different places, and compares every file of the release.

use crate::arch::Arch;
use crate::dist::Commit;
use crate::image;
use crate::process;
use crate::workspace::Workspace;
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Of different lengths, so that a path in a product also moves what comes after it.
const PLACES: [&str; 2] = ["one", "another/place/with-a-longer-name"];

pub(super) fn verb(workspace: &Workspace, archs: &[Arch]) -> Result<()> {
    let commit = Commit::of(workspace)?;
    if commit.is_dirty() {
        eprintln!("dist: what is not committed is not part of the check");
    }
    let scratch = workspace.target.join("dist-check");
    if scratch.exists() {
        std::fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))?;
    }
    let tool = image::tool(workspace)?;
    let mut built = Vec::new();
    for place in PLACES {
        let root = scratch.join(place);
        process::run(Command::new("git").args(["clone", "--quiet"]).arg(&workspace.root).arg(&root))?;
        // Half an hour lies between the two, and work goes on.
        let checkout = ["checkout", "--quiet", "--detach", commit.hash()];
        process::run(Command::new("git").current_dir(&root).args(checkout))?;
        let clone = Workspace { target: root.join("target"), root };
        image::write(&clone, archs, &tool, None)?;
        built.push([clone.bpf_objects(), clone.dist()]);
    }
    let [one, another] = &built[..] else { bail!("a comparison takes two builds") };
    let (mut same, mut different) = (0, Vec::new());
    for (one, another) in one.iter().zip(another) {
        for file in files(one)?.union(&files(another)?) {
            let (left, right) = (std::fs::read(one.join(file)).ok(), std::fs::read(another.join(file)).ok());
            if left.is_some() && left == right {
                same += 1;
            } else {
                different.push(file.display().to_string());
            }
        }
    }
    if !different.is_empty() {
        bail!(
            "two builds of one commit differ in\n  {}\nboth are left in {}",
            different.join("\n  "),
            scratch.display()
        );
    }
    println!("dist: {same} files of two builds are the same, byte for byte");
    std::fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))
}

/// Every file below a directory, by its path there.
fn files(directory: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut files = BTreeSet::new();
    let mut directories = vec![directory.to_path_buf()];
    while let Some(at) = directories.pop() {
        for entry in at.read_dir().with_context(|| format!("cannot list {}", at.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
            } else {
                files.insert(path.strip_prefix(directory)?.to_path_buf());
            }
        }
    }
    Ok(files)
}
