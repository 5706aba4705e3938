//! Tells when the files may have changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    sync::mpsc::{self as signals, RecvTimeoutError},
    thread,
    time::{Duration, Instant, SystemTime},
};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, ModifyKind, RenameMode},
};
use tokio::sync::mpsc;

use super::{
    files,
    in_place::{By, Written},
};

/// How long it must be quiet before a change is reported: editors and `kubectl` write in several steps.
const QUIET: Duration = Duration::from_millis(50);
/// How long a change waits at most for quiet.
const QUIET_MAX: Duration = Duration::from_millis(500);
/// How often the files are looked at in any case: network filesystems tell nothing.
const POLL: Duration = Duration::from_secs(10);

/// A writer has closed its file.
const CLOSED: EventKind = EventKind::Access(AccessKind::Close(AccessMode::Write));
/// A file has come to where it is from elsewhere.
const MOVED: EventKind = EventKind::Modify(ModifyKind::Name(RenameMode::To));

/// Signals changes of files until it is dropped.
#[derive(Debug)]
pub struct Watcher {
    stop: signals::Sender<Wake>,
}

/// Why the watching thread wakes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wake {
    Changed,
    Stop,
}

impl Watcher {
    /// Starts watching, and notes which files their writers have closed; each message means "read again", and changes in quick succession are one message. Never fails:
    /// where the kernel tells nothing the slow poll remains, and the reason is logged.
    pub fn start(paths: Vec<PathBuf>, written: Written) -> (Self, mpsc::Receiver<()>) {
        let (wake, woken) = signals::channel();
        let (sender, receiver) = mpsc::channel(1);
        let stop = wake.clone();
        // Looking at files may block for long (NFS), so this is a thread of its own.
        let spawned = thread::Builder::new().name("manifests".to_owned()).spawn(move || {
            let watched = watch(&paths, wake, written);
            run(&paths, watched, &woken, &sender);
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "files are not watched: cannot start a thread");
        }
        (Self { stop }, receiver)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.stop.send(Wake::Stop); // it has stopped already
    }
}

/// The kernel's side of watching.
struct Watched {
    notifier: Option<RecommendedWatcher>,
    directories: BTreeSet<PathBuf>,
}

fn watch(paths: &[PathBuf], wake: signals::Sender<Wake>, written: Written) -> Watched {
    let owned = paths.to_vec();
    let notifier = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        let relevant = match event {
            Ok(event) => {
                let is_relevant = is_change(&event.kind) && is_ours(&event.paths, &owned);
                let by = [(CLOSED, By::Closing), (MOVED, By::Moving)]
                    .into_iter()
                    .find_map(|(kind, by)| (event.kind == kind).then_some(by));
                if let Some(by) = by.filter(|_| is_relevant) {
                    event.paths.iter().for_each(|path| written.note(path, by));
                }
                is_relevant || event.need_rescan()
            }
            Err(_) => true, // events were lost
        };
        if relevant {
            let _ = wake.send(Wake::Changed);
        }
    });
    let notifier = notifier.inspect_err(|error| {
        tracing::warn!(%error, poll_seconds = POLL.as_secs(), "changes of files are found by polling only");
    });
    let mut watched = Watched { notifier: notifier.ok(), directories: BTreeSet::new() };
    watched.follow(paths);
    watched
}

impl Watched {
    /// Watches every directory that may bring a change; again, because directories are replaced too.
    fn follow(&mut self, paths: &[PathBuf]) {
        let Some(notifier) = &mut self.notifier else { return };
        let wanted: BTreeSet<PathBuf> = targets(paths).into_iter().map(|(directory, _)| directory).collect();
        for directory in self.directories.difference(&wanted) {
            let _ = notifier.unwatch(directory); // it may be gone
        }
        self.directories = wanted;
        for directory in &self.directories {
            if let Err(error) = notifier.watch(directory, RecursiveMode::NonRecursive) {
                tracing::debug!(directory = %directory.display(), %error, "directory is polled only");
            }
        }
    }
}

fn run(paths: &[PathBuf], mut watched: Watched, woken: &signals::Receiver<Wake>, out: &mpsc::Sender<()>) {
    let mut last = look(paths);
    // What changed between the caller's own first read and this look would never be told from it later.
    if let Err(mpsc::error::TrySendError::Closed(())) = out.try_send(()) {
        return;
    }
    loop {
        match woken.recv_timeout(POLL) {
            Ok(Wake::Changed) => {
                if !settle(woken) {
                    return;
                }
                watched.follow(paths);
                last = look(paths);
            }
            Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                watched.follow(paths);
                let now = look(paths);
                if now == last {
                    continue;
                }
                last = now;
            }
        }
        // A full channel holds the same message already.
        if let Err(mpsc::error::TrySendError::Closed(())) = out.try_send(()) {
            return;
        }
    }
}

/// Waits for quiet; false when watching ends.
fn settle(woken: &signals::Receiver<Wake>) -> bool {
    let end = Instant::now() + QUIET_MAX;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        match woken.recv_timeout(QUIET.min(left)) {
            Ok(Wake::Changed) => {}
            Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return false,
            Err(RecvTimeoutError::Timeout) => return true,
        }
    }
}

/// What tells one state of the files from another without reading them.
fn look(paths: &[PathBuf]) -> BTreeMap<PathBuf, Option<(SystemTime, u64)>> {
    let mark = |path: &PathBuf| {
        let meta = fs::metadata(path).ok()?;
        Some((meta.modified().ok()?, meta.len()))
    };
    files(paths).into_iter().map(|path| (path.clone(), mark(&path))).collect()
}

/// Directories to watch, each with the name in it that matters, or none when all do.
fn targets(paths: &[PathBuf]) -> BTreeSet<(PathBuf, Option<OsString>)> {
    let mut targets = BTreeSet::new();
    for path in paths {
        targets.insert(parent(path));
        if path.is_dir() {
            targets.insert((path.clone(), None));
        }
        // What a link points to changes elsewhere.
        if path.is_symlink()
            && let Ok(real) = fs::canonicalize(path)
        {
            targets.insert(parent(&real));
        }
    }
    targets
}

fn parent(path: &Path) -> (PathBuf, Option<OsString>) {
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        Some(_) => PathBuf::from("."),
        None => path.to_owned(),
    };
    (directory, path.file_name().map(OsString::from))
}

/// Whether an event can mean new contents; reading the files must not be one, or it would never end.
fn is_change(kind: &EventKind) -> bool {
    match kind {
        EventKind::Access(_) => *kind == CLOSED,
        EventKind::Any
        | EventKind::Create(_)
        | EventKind::Modify(_)
        | EventKind::Remove(_)
        | EventKind::Other => true,
    }
}

/// Whether any path of an event is one of ours; a shared directory sees much that is not.
fn is_ours(changed: &[PathBuf], paths: &[PathBuf]) -> bool {
    let targets = targets(paths);
    changed.iter().any(|path| {
        targets.iter().any(|(directory, wanted)| {
            let Some(name) = path.file_name().filter(|_| path.parent() == Some(directory)) else {
                return path == directory;
            };
            // A mounted ConfigMap changes by renaming its `..data`.
            wanted.as_deref().is_none_or(|wanted| wanted == name)
                || name.as_encoded_bytes().starts_with(b"..")
        })
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Waits for a signal, far longer than one may take.
    async fn signalled(receiver: &mut mpsc::Receiver<()>) -> bool {
        matches!(tokio::time::timeout(Duration::from_secs(8), receiver.recv()).await, Ok(Some(())))
    }

    #[tokio::test]
    async fn changes_of_a_file_are_signalled_however_they_are_made() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("web.yaml");
        let (_watcher, mut changes) = Watcher::start(vec![file.clone()], Written::default());
        // The watching thread may not be there yet, so write until it notices.
        let mut seen = false;
        for n in 0..80 {
            fs::write(&file, format!("# {n}")).unwrap();
            seen = matches!(
                tokio::time::timeout(Duration::from_millis(100), changes.recv()).await,
                Ok(Some(()))
            );
            if seen {
                break;
            }
        }
        assert!(seen);
        let next = dir.path().join(".web.yaml.tmp");
        fs::write(&next, "# renamed").unwrap();
        while changes.try_recv().is_ok() {}
        fs::rename(&next, &file).unwrap();
        assert!(signalled(&mut changes).await);
    }

    #[tokio::test]
    async fn a_mounted_config_map_is_followed_through_its_links() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("..1")).unwrap();
        fs::write(at("..1").join("web.yaml"), "a: 1").unwrap();
        symlink("..1", at("..data")).unwrap();
        symlink("..data/web.yaml", at("web.yaml")).unwrap();
        let (_watcher, mut changes) = Watcher::start(vec![dir.path().to_owned()], Written::default());
        let mut seen = false;
        for n in 2..80 {
            let next = at(&format!("..{n}"));
            fs::create_dir(&next).unwrap();
            fs::write(next.join("web.yaml"), format!("a: {n}")).unwrap();
            symlink(format!("..{n}"), at("..tmp")).unwrap();
            fs::rename(at("..tmp"), at("..data")).unwrap();
            seen = matches!(
                tokio::time::timeout(Duration::from_millis(200), changes.recv()).await,
                Ok(Some(()))
            );
            if seen {
                break;
            }
        }
        assert!(seen);
    }

    #[tokio::test]
    async fn watching_ends_when_the_watcher_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let (watcher, mut changes) = Watcher::start(vec![dir.path().to_owned()], Written::default());
        drop(watcher);
        let end =
            tokio::time::timeout(Duration::from_secs(8), async { while changes.recv().await.is_some() {} });
        assert!(end.await.is_ok());
    }

    #[test]
    fn reading_and_strangers_are_no_changes() {
        use notify::event::{CreateKind, ModifyKind};
        assert!(!is_change(&EventKind::Access(AccessKind::Open(AccessMode::Any))));
        assert!(!is_change(&EventKind::Access(AccessKind::Close(AccessMode::Read))));
        assert!(is_change(&EventKind::Access(AccessKind::Close(AccessMode::Write))));
        assert!(
            is_change(&EventKind::Modify(ModifyKind::Any)) && is_change(&EventKind::Create(CreateKind::File))
        );
        let dir = tempfile::tempdir().unwrap();
        let ours = [dir.path().join("web.yaml")];
        assert!(is_ours(&[dir.path().join("web.yaml")], &ours));
        assert!(is_ours(&[dir.path().join("..data")], &ours));
        assert!(is_ours(&[dir.path().to_owned()], &ours));
        assert!(!is_ours(&[dir.path().join("other.yaml")], &ours));
        assert_eq!(parent(Path::new("web.yaml")).0, Path::new("."));
    }
}
