//! What has been told and is not in the maps yet.

use std::time::{Instant, SystemTime};

/// Changes that wait for the maps.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    since: Option<Instant>,
    last_synced: Option<SystemTime>,
}

impl Backlog {
    /// Something waits from now on, if nothing did.
    pub(super) fn wait(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }

    /// Everything is in the maps.
    pub(super) fn written(&mut self) {
        if self.since.take().is_some() || self.last_synced.is_none() {
            self.last_synced = Some(SystemTime::now());
        }
    }

    /// Since when the oldest change waits.
    pub(super) fn since(&self) -> Option<Instant> {
        self.since
    }

    /// When everything that was known was in the maps for the last time.
    pub(super) fn last_synced(&self) -> Option<SystemTime> {
        self.last_synced
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_longest_counts_until_everything_is_written() {
        let mut backlog = Backlog::default();
        assert_eq!((backlog.since(), backlog.last_synced()), (None, None));
        backlog.wait();
        let first = backlog.since();
        backlog.wait();
        assert!(first.is_some() && backlog.since() == first);
        backlog.written();
        assert_eq!(backlog.since(), None);
        let synced = backlog.last_synced();
        backlog.written();
        assert!(synced.is_some() && backlog.last_synced() == synced, "nothing has come since");
    }
}
