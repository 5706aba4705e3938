//! The cgroup whose processes the socket hooks serve.
//!
//! Socket hooks work in the hierarchy of cgroup v2 only. It is there on hybrid hosts too, below the controllers of v1;
//! in a container it has to be the host's, or the hooks would serve nobody but the container itself.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use tracing::warn;

use crate::preflight::file_system;

/// `CGROUP2_SUPER_MAGIC` (include/uapi/linux/magic.h).
const CGROUP2_MAGIC: i64 = 0x6367_7270;
const MOUNTS: &str = "/proc/self/mountinfo";

/// A cgroup of the hierarchy v2.
#[derive(Debug)]
pub struct Cgroup {
    /// Its directory.
    pub path: PathBuf,
    /// The same, open.
    pub dir: File,
    /// Its id in the kernel.
    pub id: u64,
    /// Whether no other cgroup was in it at the last look.
    pub is_leaf: bool,
}

/// What has become of a cgroup.
#[derive(Debug)]
pub enum Fate {
    /// It is there.
    Kept,
    /// It has been removed.
    Gone,
    /// There is another at its path.
    Another(Cgroup),
}

/// What is said of a cgroup with no other in it.
pub const LEAF: &str = "there is no other cgroup in it: inside a container, mount the host's /sys/fs/cgroup and name it by \
                        --cgroup, or pods do not reach Services";

/// What is said of one that was there.
pub const GONE: &str = "the cgroup is gone, and its hooks with it, until it returns";

/// What is said where there is none.
pub const NONE: &str = "there is no cgroup v2 here, which the socket hooks need: mount one (`mount -t cgroup2 none \
                        /sys/fs/cgroup/unified`) or name one by --cgroup; until then pods reach Services only by the devices of \
                        --pod-iface, and this node all but NodePorts on its own addresses";

impl Cgroup {
    /// The cgroup that a flag names, or the root of the hierarchy as it is mounted here; none, with a warning that says what
    /// to do, where it is not.
    ///
    /// # Errors
    /// When what the flag names is none.
    pub fn find(given: Option<&Path>) -> anyhow::Result<Option<Self>> {
        let path = match given {
            Some(path) => path.to_path_buf(),
            None => {
                let mounts = fs::read_to_string(MOUNTS).with_context(|| format!("cannot read {MOUNTS}"))?;
                let Some(path) = root(&mounts) else {
                    warn!("{NONE}");
                    return Ok(None);
                };
                path
            }
        };
        // Hybrid hosts have it below the controllers of v1, where a mount of all of it brings it along.
        let unified = path.join("unified");
        let is_v2 = |path: &Path| file_system(path).is_ok_and(|magic| magic == CGROUP2_MAGIC);
        let path = if !is_v2(&path) && is_v2(&unified) { unified } else { path };
        let magic = file_system(&path)
            .with_context(|| format!("cannot look at the cgroup {} (--cgroup)", path.display()))?;
        ensure!(
            magic == CGROUP2_MAGIC && path.is_dir(),
            "{} is no directory of cgroup v2; give --cgroup one, or leave it out",
            path.display()
        );
        let cgroup = Self::open(path)?;
        if cgroup.is_leaf {
            warn!(cgroup = %cgroup.path.display(), "{LEAF}");
        }
        Ok(Some(cgroup))
    }

    /// What has become of it since it was found.
    ///
    /// # Errors
    /// When there is another that cannot be opened, or what is there cannot be looked at.
    pub fn fate(&self) -> anyhow::Result<Fate> {
        // A directory that is held by a mount outlives its cgroup, but not the files in it.
        let procs = self.path.join("cgroup.procs");
        let found = fs::metadata(&self.path).and_then(|found| Ok((found.ino(), file_system(&procs)?)));
        match found {
            Ok((_, magic)) if magic != CGROUP2_MAGIC => Ok(Fate::Gone),
            Ok((id, _)) if id == self.id => Ok(Fate::Kept),
            Ok(_) => Self::open(self.path.clone()).map(Fate::Another),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Fate::Gone),
            Err(error) => Err(error).with_context(|| format!("cannot look at {}", self.path.display())),
        }
    }

    /// Looks again whether no other cgroup is in it; a directory that cannot be read stays what it was.
    pub fn look_for_others(&mut self) -> bool {
        self.is_leaf = is_leaf(&self.path).unwrap_or(self.is_leaf);
        self.is_leaf
    }

    fn open(path: PathBuf) -> anyhow::Result<Self> {
        let dir = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let id = dir.metadata().with_context(|| format!("cannot look at {}", path.display()))?.ino();
        let is_leaf = is_leaf(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self { path, dir, id, is_leaf })
    }
}

/// Whether there is no directory in a directory.
fn is_leaf(path: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(path)? {
        if entry?.file_type()?.is_dir() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Where the hierarchy v2 is mounted from its root, of all mounts that the kernel lists (proc_pid_mountinfo(5)); the
/// first, so that a private copy of somebody does not count.
fn root(mounts: &str) -> Option<PathBuf> {
    let of_line = |line: &str| {
        let (mount, kind) = line.split_once(" - ")?;
        if kind.split(' ').next()? != "cgroup2" {
            return None;
        }
        let mut fields = mount.split(' ').skip(3);
        let (root, at) = (fields.next()?, fields.next()?);
        Some((root == "/", PathBuf::from(at)))
    };
    let found: Vec<_> = mounts.lines().filter_map(of_line).collect();
    let whole = found.iter().find(|(is_whole, _)| *is_whole);
    whole.or(found.first()).map(|(_, path)| path.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_is_found_on_unified_and_hybrid_hosts() {
        let unified = "26 25 0:23 / /sys rw - sysfs sysfs rw\n29 26 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw";
        assert_eq!(root(unified), Some("/sys/fs/cgroup".into()));
        let hybrid = "31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      32 30 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
        assert_eq!(root(hybrid), Some("/sys/fs/cgroup/unified".into()));
        let bound = "40 30 0:28 /kubepods /mnt/part rw - cgroup2 cgroup2 rw\n41 30 0:28 / /mnt/whole rw - cgroup2 none rw";
        assert_eq!(root(bound), Some("/mnt/whole".into()));
        assert_eq!(root("31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"), None);
    }

    #[test]
    fn what_is_no_directory_of_a_cgroup_is_refused_by_the_name_of_the_flag() {
        let dir = tempfile::tempdir().expect("a directory");
        let mounts = fs::read_to_string(MOUNTS).expect("a process has mounts");
        let procs = root(&mounts).map(|root| root.join("cgroup.procs"));
        for path in [dir.path().to_path_buf(), dir.path().join("missing")].into_iter().chain(procs) {
            let error = Cgroup::find(Some(&path)).expect_err("no cgroup").to_string();
            assert!(error.contains("--cgroup"), "{error}");
        }
    }
}
