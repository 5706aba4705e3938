//! UDP sockets that were connected to a Service when no hook saw it: before the hooks were there, or before the Service was.
//!
//! Their datagrams go to an address that no host has. A packet filter would translate the next one; here the socket is ended
//! instead, as when its backend is gone, so that the process connects it again.

use std::{collections::HashSet, fs, io, os::unix::fs::MetadataExt as _, path::Path};

/// The id of the root of the hierarchy (`kernfs_root` in fs/kernfs/dir.c numbers it first).
const ROOT_ID: u64 = 1;

/// The cgroups whose processes the hooks serve.
#[derive(Debug)]
pub(super) enum Served {
    /// All of them.
    All,
    /// Those of these ids.
    Some(HashSet<u64>),
}

impl Served {
    /// A cgroup and all below it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn below(cgroup: &Path) -> io::Result<Self> {
        let id = fs::metadata(cgroup)?.ino();
        if id == ROOT_ID {
            return Ok(Self::All);
        }
        let mut ids = HashSet::from([id]);
        let mut dirs = vec![cgroup.to_path_buf()];
        while let Some(dir) = dirs.pop() {
            // Cgroups go at any time.
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    ids.extend(entry.metadata().map(|found| found.ino()));
                    dirs.push(entry.path());
                }
            }
        }
        Ok(Self::Some(ids))
    }

    /// Whether it is among them; one that is not known is among all only.
    pub(super) fn contains(&self, cgroup: Option<u64>) -> bool {
        match self {
            Self::All => true,
            Self::Some(ids) => cgroup.is_some_and(|id| ids.contains(&id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_served_with_all_below_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let [served, below, beside] = ["served", "served/a/b", "beside"].map(|name| dir.path().join(name));
        for path in [&served, &below, &beside] {
            fs::create_dir_all(path).expect("a directory");
        }
        fs::write(served.join("cgroup.procs"), "").expect("a file");
        let id = |path: &Path| Some(fs::metadata(path).expect("it is there").ino());
        let found = Served::below(&served).expect("it is there");
        assert!([&served, &below].into_iter().all(|path| found.contains(id(path))));
        assert!(!found.contains(id(&beside)) && !found.contains(id(dir.path())) && !found.contains(None));
        assert!(!found.contains(id(&served.join("cgroup.procs"))), "a file is no cgroup");
        assert!(Served::All.contains(None));
        assert!(Served::below(&dir.path().join("none")).is_err());
    }
}
