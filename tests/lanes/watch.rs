//! The watch against an API server of the tests, over the loopback device: no root, no cluster.

#[path = "watch/failures.rs"]
mod failures;
#[path = "watch/follow.rs"]
mod follow;
#[path = "watch/hostile.rs"]
mod hostile;
#[path = "watch/recorded.rs"]
mod recorded;
#[path = "watch/setup.rs"]
mod setup;
