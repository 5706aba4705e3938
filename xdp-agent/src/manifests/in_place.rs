//! Files that are written in place: meanwhile they can be read empty, or cut off where half an object reads like a whole one.
//!
//! A file that was replaced is another inode, or was seen to be moved there, and whole. One that has changed under its inode is taken as soon as its writer
//! has closed it, unless anything is wrong or missing then; in that case when it has rested for [`REST`]. If nobody is seen to
//! close it, as over a network, it has to rest for [`REST_OPEN`]. Until then it stands for what it held before.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::{objects::ObjectName, source::Kind};

/// How long a file that is closed must not change to be taken as it is: scripts empty a file first, and then write it.
pub const REST: Duration = Duration::from_secs(2);
/// The same for a file that may still be open: its writer may wait for something.
pub const REST_OPEN: Duration = Duration::from_secs(10);

/// One state of a file, without its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    inode: Inode,
    modified: (i64, i64),
    len: u64,
}

/// Device and inode.
type Inode = (u64, u64);

impl Stamp {
    /// The state that a file is in; none when there is no such file.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let meta = fs::metadata(path).ok()?;
        Some(Self {
            inode: (meta.dev(), meta.ino()),
            modified: (meta.mtime(), meta.mtime_nsec()),
            len: meta.len(),
        })
    }
}

/// The states in which writers have closed files, or moved them to where they are.
#[derive(Clone, Debug, Default)]
pub struct Written(Arc<Mutex<BTreeMap<Inode, (Stamp, By)>>>);

/// What a writer has done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// Closed it.
    Closing,
    /// Moved it to where it is. Of two that take turns the second may have the inode that the first had before.
    Moving,
}

impl Written {
    /// The writer of a file is done with it.
    pub(super) fn note(&self, path: &Path, by: By) {
        if let Some(stamp) = Stamp::of(path) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(stamp.inode, (stamp, by));
        }
    }

    fn done(&self, now: &Stamp) -> Option<By> {
        let written = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        written.get(&now.inode).filter(|(stamp, _)| stamp == now).map(|(_, by)| *by)
    }

    /// Forgets files that are none of these any more.
    pub(super) fn retain<'a>(&self, files: impl Iterator<Item = &'a Held>) {
        let known: BTreeSet<Inode> = files.filter_map(|held| Some(held.seen?.inode)).collect();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|inode, _| known.contains(inode));
    }
}

/// What is held of a file.
#[derive(Clone, Debug, Default)]
pub(super) struct Held {
    /// Its objects.
    pub(super) objects: BTreeSet<(Kind, ObjectName)>,
    /// The state in which it was seen last.
    seen: Option<Stamp>,
    /// What it waits for, if its objects do not come from that state.
    waits: Option<Wait>,
}

/// A state that is not believed yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wait {
    since: Instant,
    /// When it is believed, if it is the same then.
    until: Instant,
}

/// What to do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// To take it as it is.
    Take,
    /// To take it if nothing is wrong with it or missing.
    TakeIfWhole(Wait),
    /// To hold what it held before.
    Hold(Wait),
}

/// What there is to judge by, for a reader that follows files.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caution<'a> {
    pub(super) written: &'a Written,
    pub(super) now: Instant,
}

impl Caution<'_> {
    /// What to do with a file that is in this state now, by what is held of it.
    pub(super) fn judge(&self, held: &Held, now: Option<Stamp>) -> Verdict {
        let Some(now) = now else { return Verdict::Take };
        let done = self.written.done(&now);
        let is_replaced = done == Some(By::Moving) || held.seen.is_some_and(|seen| seen.inode != now.inode);
        let is_same = held.seen == Some(now);
        if is_replaced || (is_same && held.waits.is_none()) {
            return Verdict::Take;
        }
        let since = held.waits.filter(|_| is_same).map_or(self.now, |wait| wait.since);
        let is_closed = done.is_some();
        let until = since + if is_closed { REST } else { REST_OPEN };
        if self.now >= until {
            Verdict::Take
        } else if is_closed {
            Verdict::TakeIfWhole(Wait { since, until })
        } else {
            Verdict::Hold(Wait { since, until })
        }
    }
}

impl Held {
    /// Nothing yet of a file in this state.
    pub(super) fn taken(seen: Option<Stamp>) -> Self {
        Self { objects: BTreeSet::new(), seen, waits: None }
    }

    /// Nothing yet of a file that is in this state, and stands for what it held before.
    pub(super) fn waiting(seen: Option<Stamp>, wait: Wait) -> Self {
        Self { objects: BTreeSet::new(), seen, waits: Some(wait) }
    }

    /// When it will have rested, if it is waited for.
    pub(super) fn rested_at(&self) -> Option<Instant> {
        self.waits.map(|wait| wait.until)
    }
}
