//! `tidy`: the rules of the source tree that a program can check, also run as tests of this package.

mod manifests;
mod source;
mod sources;

use crate::workspace::Workspace;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// A text file of the repository, named from its root.
pub(crate) struct File {
    path: String,
    text: String,
}

/// The text files a rule may look at. Directories of git and of builds, which cargo marks as caches, are left out.
const EXTENSIONS: [&str; 9] = ["rs", "toml", "md", "yaml", "yml", "json", "sh", "lock", "txt"];

pub(crate) fn verb(workspace: &Workspace, args: &[String]) -> Result<()> {
    if let Some(arg) = args.first() {
        bail!("`tidy` takes no arguments, and `{arg}` was given");
    }
    check(workspace)?;
    println!("tidy: clean");
    Ok(())
}

/// Fails with every finding, one per line.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let files = files(&workspace.root)?;
    let findings = findings(&files);
    if findings.is_empty() {
        return Ok(());
    }
    bail!("tidy found:\n  {}", findings.join("\n  "))
}

fn findings(files: &[File]) -> Vec<String> {
    let mut findings = Vec::new();
    for file in files {
        findings.extend(sources::findings(file));
        findings.extend(manifests::findings(file));
    }
    findings
}

fn files(root: &Path) -> Result<Vec<File>> {
    let mut files = Vec::new();
    let mut directories = vec![PathBuf::from(root)];
    while let Some(directory) = directories.pop() {
        let entries = directory.read_dir().with_context(|| format!("cannot list {}", directory.display()))?;
        for entry in entries {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_symlink() || name == ".git" || name == "target" || path.join("CACHEDIR.TAG").is_file()
            {
                continue;
            }
            if path.is_dir() {
                directories.push(path);
            } else if is_text(&path) {
                let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
                let path = path.strip_prefix(root)?.to_string_lossy().into_owned();
                files.push(File { path, text: String::from_utf8_lossy(&text).into_owned() });
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn is_text(path: &Path) -> bool {
    match path.extension() {
        Some(extension) => EXTENSIONS.iter().any(|known| extension == *known),
        None => path.parent().and_then(Path::file_name).is_some_and(|directory| directory == ".ci"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_repository_is_tidy() {
        if let Err(error) = check(&Workspace::find().unwrap()) {
            panic!("{error:#}");
        }
    }

    #[test]
    fn the_walk_sees_the_crates_and_not_what_was_built() {
        let files = files(&Workspace::find().unwrap().root).unwrap();
        let has = |path: &str| files.iter().any(|file| file.path == path);
        assert!(has("xdp-common/src/lib.rs") && has("Cargo.toml") && has(".ci/run"));
        assert!(!files.iter().any(|file| file.path.starts_with("target/")));
    }
}
