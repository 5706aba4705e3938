//! The directory of pins, by which programs and maps outlive the agent.
//!
//! Maps and links lie in a directory for each layout of the maps. A start with `--fresh` sets the maps of an earlier agent aside
//! until it has taken over; whatever is killed in between, the next start finds those maps that the attached programs use.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use tracing::debug;

use crate::{bpf::Link, preflight::check_pin_dir, reserved};

/// What is pinned where, below the directory of a layout.
const LINKS: &str = "links";
const MAPS: &str = "maps";
/// The maps of an earlier agent, during a start with `--fresh`; and when that has taken over.
const ASIDE: &str = "maps-of-an-earlier-agent";
const DROPPED: &str = "maps-to-remove";

/// The directory of the current layout, below that of pins.
fn of_layout() -> String {
    format!("v{}", xdp_common::tables::LAYOUT_VERSION)
}

/// The directory of pins, held by one agent at a time.
#[derive(Debug)]
pub struct PinDir {
    path: PathBuf,
    // Held for its lock.
    _lock: File,
}

/// Where maps of the current layout are pinned below a directory of pins.
pub fn maps_dir(pin_dir: &Path) -> PathBuf {
    pin_dir.join(of_layout()).join(MAPS)
}

/// Whether an agent holds a directory of pins. Asked without a lock, which an agent that starts would meet.
pub fn is_held(pin_dir: &Path) -> bool {
    let Ok(directory) = fs::metadata(pin_dir) else { return false };
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    is_locked(&locks, directory.dev(), directory.ino())
}

/// Whether `/proc/locks` (`fs/locks.c`) has a file: device and number are the field before the range.
fn is_locked(locks: &str, device: u64, number: u64) -> bool {
    let file = format!("{:02x}:{:02x}:{number}", libc::major(device), libc::minor(device));
    locks.lines().any(|line| line.split_whitespace().any(|field| field == file))
}

impl PinDir {
    /// Makes the directory, if it is on a BPF file system, and takes hold of it.
    ///
    /// # Errors
    /// When it is on another file system, or another agent holds it.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        check_pin_dir(path)?;
        let path_of_version = path.join(of_layout());
        for dir in [path_of_version.join(MAPS), path_of_version.join(LINKS)] {
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let lock = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        // SAFETY: the descriptor is open for as long as the call lasts.
        if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            let error = io::Error::last_os_error();
            ensure!(
                error.raw_os_error() != Some(libc::EWOULDBLOCK),
                "another xdp-agent uses {}; stop it, or give this one another --pin-dir",
                path.display()
            );
            bail!("cannot lock {}: {error}", path.display());
        }
        Ok(Self { path: path.to_path_buf(), _lock: lock })
    }

    /// Where maps of the current layout are pinned.
    pub fn maps(&self) -> PathBuf {
        maps_dir(&self.path)
    }

    /// Where links are pinned.
    pub fn links(&self) -> PathBuf {
        self.path.join(of_layout()).join(LINKS)
    }

    /// The pins of links of every layout that there has been.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub fn all_links(&self) -> anyhow::Result<Vec<PathBuf>> {
        let links: Result<Vec<_>, _> =
            self.versions()?.iter().map(|version| pins_in(&version.join(LINKS))).collect();
        Ok(links?.concat())
    }

    /// Sets the maps of earlier agents aside, of every layout, so that new ones are made; the programs that are attached
    /// keep them.
    ///
    /// # Errors
    /// When a directory cannot be renamed.
    pub fn set_maps_aside(&self) -> anyhow::Result<()> {
        for version in self.versions()? {
            let maps = version.join(MAPS);
            if !pins_in(&maps)?.is_empty() {
                let aside = version.join(ASIDE);
                fs::rename(&maps, &aside).with_context(|| format!("cannot set {} aside", maps.display()))?;
            }
        }
        let maps = self.maps();
        fs::create_dir_all(&maps).with_context(|| format!("cannot make {}", maps.display()))
    }

    /// Gives maps their place again that were set aside for a start that was killed, in place of its own: what is attached
    /// uses them, unless the start was about to end.
    ///
    /// # Errors
    /// When a pin cannot be removed or moved.
    pub fn take_maps_back(&self) -> anyhow::Result<()> {
        self.remove_dropped()?;
        for version in self.versions()? {
            let (maps, aside) = (version.join(MAPS), version.join(ASIDE));
            if aside.exists() {
                remove_maps(&maps)?;
                let _ = fs::remove_dir(&maps);
                fs::rename(&aside, &maps).with_context(|| format!("cannot move {} back", aside.display()))?;
            }
        }
        Ok(())
    }

    /// Removes the pins of maps that were set aside. The first step of each layout is the one that counts, should the agent be
    /// killed meanwhile.
    ///
    /// # Errors
    /// When a pin cannot be moved or removed.
    pub fn drop_aside(&self) -> anyhow::Result<()> {
        for version in self.versions()? {
            let aside = version.join(ASIDE);
            if aside.exists() {
                let dropped = version.join(DROPPED);
                fs::rename(&aside, dropped).with_context(|| format!("cannot drop {}", aside.display()))?;
            }
        }
        self.remove_dropped()
    }

    fn remove_dropped(&self) -> anyhow::Result<()> {
        for version in self.versions()? {
            let dropped = version.join(DROPPED);
            remove_maps(&dropped)?;
            let _ = fs::remove_dir(dropped);
        }
        Ok(())
    }

    /// Takes the links of other layouts for those of this one, which are replaced where they are; of two in one place the
    /// other goes.
    ///
    /// # Errors
    /// When a pin cannot be moved.
    pub fn take_links_of_other_layouts(&self) -> anyhow::Result<()> {
        let links = self.links();
        for path in self.all_links()?.into_iter().filter(|path| !path.starts_with(&links)) {
            let Some(name) = path.file_name() else { continue };
            let own = links.join(name);
            if own.exists() {
                take_off(&path)?;
            } else {
                fs::rename(&path, own).with_context(|| format!("cannot move {}", path.display()))?;
            }
        }
        Ok(())
    }

    /// Takes the programs of every pinned link off and removes every pin, of every layout; maps that nobody holds any more
    /// go with them.
    ///
    /// # Errors
    /// When a pin cannot be removed.
    pub fn clear(&self) -> anyhow::Result<()> {
        self.all_links()?.iter().try_for_each(|path| take_off(path))?;
        self.remove_dropped()?;
        self.drop_aside()?;
        self.versions()?.iter().try_for_each(|version| remove_maps(&version.join(MAPS)))
    }

    /// Removes the directories, as far as they are empty. Maps that were set aside, for a start that has failed, are in their
    /// place again.
    pub fn remove(&self) {
        // What somebody else has put there stays, and its directory with it.
        for version in self.versions().unwrap_or_default() {
            let _ = fs::remove_dir(version.join(MAPS));
            if fs::rename(version.join(ASIDE), version.join(MAPS)).is_err() {
                for dir in [version.join(LINKS), version] {
                    let _ = fs::remove_dir(dir);
                }
            }
        }
        let _ = fs::remove_dir(&self.path);
    }

    /// The directory of every layout that there has been.
    fn versions(&self) -> anyhow::Result<Vec<PathBuf>> {
        let mut versions = pins_in(&self.path)?;
        versions.retain(|path| {
            let name = path.file_name().and_then(OsStr::to_str).and_then(|name| name.strip_prefix('v'));
            name.is_some_and(|number| number.parse::<u32>().is_ok())
        });
        Ok(versions)
    }
}

/// Takes a pinned link's program off and removes the pin.
///
/// # Errors
/// When the pin cannot be removed.
pub fn take_off(path: &Path) -> anyhow::Result<()> {
    // Without this the program stays for as long as the kernel takes to notice.
    if let Err(error) = Link::open(path).and_then(|link| link.detach()) {
        debug!(pin = %path.display(), %error, "a pinned link was not detached");
    }
    fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))
}

/// Removes the pins of maps, and what they say of the node.
fn remove_maps(dir: &Path) -> anyhow::Result<()> {
    reserved::release(dir);
    for path in pins_in(dir)? {
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

fn pins_in(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    };
    entries.with_context(|| format!("cannot read {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with these files; see [`at`].
    fn pins(files: &[&str]) -> (tempfile::TempDir, PinDir) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pins");
        let pins = PinDir { _lock: File::open(dir.path()).expect("the directory"), path };
        fs::create_dir_all(pins.maps()).expect("a directory");
        fs::create_dir_all(pins.links()).expect("a directory");
        files.iter().for_each(|file| pin(&pins, file));
        (dir, pins)
    }

    /// Where a file is: below the directory of the current layout, or of the one before where it begins with `<`.
    fn at(pins: &PinDir, file: &str) -> PathBuf {
        let before = format!("v{}", xdp_common::tables::LAYOUT_VERSION - 1);
        let (layout, file) = file.strip_prefix('<').map_or((of_layout(), file), |file| (before, file));
        pins.path.join(layout).join(file)
    }

    fn pin(pins: &PinDir, file: &str) {
        let path = at(pins, file);
        fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
        fs::write(path, "").expect("a file");
    }

    /// Which of these files are there, and how many others.
    fn left(pins: &PinDir, files: &[&str]) -> (Vec<bool>, usize) {
        let there: Vec<bool> = files.iter().map(|file| at(pins, file).exists()).collect();
        let layouts = pins.versions().expect("layouts");
        let dirs = layouts.iter().flat_map(|layout| pins_in(layout).expect("a layout"));
        let all = dirs.map(|dir| pins_in(&dir).expect("pins").len()).sum::<usize>();
        let others = all - there.iter().filter(|is_there| **is_there).count();
        (there, others)
    }

    #[test]
    fn a_directory_is_held_while_it_is_locked() {
        let directory = tempfile::tempdir().expect("a directory");
        assert!(!is_held(directory.path()) && !is_held(&directory.path().join("never-made")));
        let lock = File::open(directory.path()).expect("the directory");
        // SAFETY: the descriptor is open for as long as the call lasts.
        assert_eq!(unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }, 0);
        assert!(is_held(directory.path()));
        drop(lock);
        assert!(!is_held(directory.path()));
        let locks = "1: FLOCK  ADVISORY  WRITE 812 00:1f:4711 0 EOF\n";
        let device = libc::makedev(0, 0x1f);
        assert!(
            is_locked(locks, device, 4711) && !is_locked(locks, device, 471) && !is_locked(locks, 0, 4711)
        );
    }

    #[test]
    fn maps_that_were_set_aside_come_back_unless_the_start_has_taken_over() {
        let set_aside = || {
            let (dir, pins) = pins(&["maps/old", "maps/older", "links/xdp-2"]);
            pins.set_maps_aside().expect("set aside");
            pin(&pins, "maps/new");
            (dir, pins)
        };
        let of_old = ["maps/old", "maps/older", "links/xdp-2"];
        let (_dir, pins) = set_aside();
        pins.take_maps_back().expect("back");
        assert_eq!(left(&pins, &of_old), (vec![true; 3], 0));
        let (_dir, pins) = set_aside();
        fs::remove_file(pins.maps().join("new")).expect("the failed start's");
        pins.remove();
        assert_eq!(left(&pins, &of_old), (vec![true; 3], 0));
        let of_new = ["maps/new", "links/xdp-2"];
        let (_dir, pins) = set_aside();
        pins.drop_aside().expect("dropped");
        assert_eq!(left(&pins, &of_new), (vec![true; 2], 0));
        // Killed while it dropped them.
        let (_dir, pins) = set_aside();
        let layout = pins.path.join(of_layout());
        fs::rename(layout.join(ASIDE), layout.join(DROPPED)).expect("the first step");
        fs::remove_file(layout.join(DROPPED).join("old")).expect("a part of the second");
        pins.take_maps_back().expect("back");
        assert_eq!(left(&pins, &of_new), (vec![true; 2], 0));
    }

    #[test]
    fn a_start_after_another_layout_keeps_its_own_maps_once_the_links_are_its_own() {
        let (_dir, pins) = pins(&["<maps/old", "<links/xdp-2"]);
        pins.set_maps_aside().expect("set aside");
        pin(&pins, "maps/new");
        pins.take_links_of_other_layouts().expect("links");
        // Killed before it dropped the others.
        pins.take_maps_back().expect("back");
        assert_eq!(left(&pins, &["maps/new", "links/xdp-2", "<maps/old"]), (vec![true; 3], 0));
    }

    #[test]
    fn a_failed_start_leaves_no_directory_where_there_was_none() {
        let (_dir, pins) = pins(&[]);
        pins.set_maps_aside().expect("set aside");
        pins.remove();
        assert!(!pins.path.exists());
    }

    #[test]
    fn a_pin_directory_elsewhere_is_refused_with_the_mount_command() {
        let dir = tempfile::tempdir().expect("a directory");
        let error = PinDir::open(&dir.path().join("pins")).expect_err("not a bpffs").to_string();
        assert!(error.contains("mount -t bpf bpf"), "{error}");
    }
}
