//! How long to wait: between attempts, for answers, and for a watch that says nothing.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

/// Times of watching; the default is what every agent uses, and tests are less patient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Longest pause before the second attempt; each pause after it may be twice as long.
    pub first: Duration,
    /// Longest pause.
    pub cap: Duration,
    /// Time that a watch has to live for the pauses to be short again.
    pub steady: Duration,
    /// Longest time for one page of a list.
    pub list: Duration,
    /// Silence after which a watch is taken for dead; an API server sends a bookmark about every minute.
    pub idle: Duration,
    /// Least time for which a watch is asked for; the most is twice as much, so that not all agents ask at once.
    pub watch: Duration,
    /// Pause before a kind that the API server does not know is asked for again.
    pub absent: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(100),
            cap: Duration::from_secs(30),
            steady: Duration::from_secs(30),
            list: Duration::from_secs(60),
            idle: Duration::from_secs(150),
            watch: Duration::from_secs(300),
            absent: Duration::from_secs(600),
        }
    }
}

impl Pace {
    /// The time to ask a watch for, in seconds.
    pub(super) fn watch_seconds(&self) -> u32 {
        between(self.watch, self.watch * 2).as_secs().max(1) as u32
    }

    /// A pause of about the time that a kind stays away.
    pub(super) fn absent(&self) -> Duration {
        between(self.absent, self.absent * 2)
    }
}

/// The pauses of one kind.
#[derive(Debug)]
pub(super) struct Backoff {
    pace: Pace,
    attempts: u32,
}

impl Backoff {
    pub(super) const fn new(pace: Pace) -> Self {
        Self { pace, attempts: 0 }
    }

    /// Begins with short pauses again.
    pub(super) const fn reset(&mut self) {
        self.attempts = 0;
    }

    /// The next pause: between half and all of a time that doubles up to the cap, and never less than the server asks
    /// for, within reason.
    pub(super) fn next(&mut self, asked: Option<Duration>) -> Duration {
        let doubled = self.pace.first.saturating_mul(1 << self.attempts.min(20));
        self.attempts = self.attempts.saturating_add(1);
        let ours = doubled.min(self.pace.cap);
        match asked.map(|asked| asked.min(self.pace.cap * 2)) {
            Some(asked) if asked > ours / 2 => between(asked, asked + ours),
            Some(_) | None => between(ours / 2, ours),
        }
    }
}

/// A random time; agents that were cut off together must not come back together.
fn between(min: Duration, max: Duration) -> Duration {
    // Each hasher of this kind has keys of its own, seeded by the system.
    let random = RandomState::new().hash_one(());
    let share = (random >> 11) as f64 / (1_u64 << 53) as f64;
    min + max.saturating_sub(min).mul_f64(share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_cap_and_begin_short_again() {
        let mut backoff = Backoff::new(Pace::default());
        for limit_ms in [100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000, 30_000] {
            let limit = Duration::from_millis(limit_ms);
            let pause = backoff.next(None);
            assert!(limit / 2 <= pause && pause <= limit, "{pause:?} of {limit:?}");
        }
        backoff.reset();
        assert!(backoff.next(None) <= Duration::from_millis(100));
    }

    #[test]
    fn the_pause_a_server_asks_for_is_kept_within_reason() {
        let mut backoff = Backoff::new(Pace::default());
        assert!(backoff.next(Some(Duration::from_secs(7))) >= Duration::from_secs(7));
        assert!(backoff.next(Some(Duration::from_secs(86_400))) <= Duration::from_secs(61));
        for _ in 0..10 {
            backoff.next(None);
        }
        assert!(backoff.next(Some(Duration::from_secs(1))) >= Duration::from_secs(15));
    }

    #[test]
    fn agents_do_not_wait_alike() {
        let pauses: std::collections::HashSet<Duration> =
            (0..100).map(|_| Backoff::new(Pace::default()).next(None)).collect();
        assert!(pauses.len() > 90, "{} different pauses of 100", pauses.len());
    }
}
