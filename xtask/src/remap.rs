//! Path prefixes mapped away in what rustc writes: products are the same wherever they are built.

use crate::workspace::{self, Workspace};
use std::path::{Path, PathBuf};

/// Flags of rustc for a build into `build` by the compiler of `sysroot`.
pub(crate) fn flags(workspace: &Workspace, sysroot: &Path, build: &Path) -> Vec<String> {
    let flag = |(from, to): (PathBuf, &str)| format!("--remap-path-prefix={}={to}", from.display());
    prefixes(workspace, sysroot, build).into_iter().map(flag).collect()
}

/// Flags of a C compiler for the same; its prefixes are matched in the same order.
pub(crate) fn c_flags(workspace: &Workspace, sysroot: &Path, build: &Path) -> Vec<String> {
    let flag = |(from, to): (PathBuf, &str)| format!("-ffile-prefix-map={}={to}", from.display());
    prefixes(workspace, sysroot, build).into_iter().map(flag).collect()
}

fn prefixes(workspace: &Workspace, sysroot: &Path, build: &Path) -> Vec<(PathBuf, &'static str)> {
    let mut prefixes = Vec::new();
    if let Some(home) = workspace::cargo_home() {
        // Below this, crates lie in a directory named after the registry or mirror they were fetched from.
        let registries = home.join("registry/src").read_dir().into_iter().flatten().flatten();
        prefixes.extend(registries.map(|registry| (registry.path(), "/crates")));
        prefixes.push((home, "/cargo"));
    }
    prefixes.push((sysroot.join("lib/rustlib/src/rust"), "/rust"));
    prefixes.push((workspace.root.clone(), "/xdp-agent"));
    prefixes.push((build.to_path_buf(), "/build"));
    // Of several that match, the compilers take the last: what lies inside another comes after it.
    prefixes.sort();
    prefixes
}
