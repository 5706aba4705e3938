//! A watch: what has happened since a version, and then what happens.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use futures_util::stream::unfold;
use hyper::body::{Bytes, Frame};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::selectors::Selector;
use super::store::{Entry, Injection, Resource, at_version};
use super::{Gone, Shared, State};

/// Time of a watch whose client names none.
const TIMEOUT_SECONDS: u64 = 1_800;

/// An open watch.
pub(super) struct Watch {
    shared: Arc<Shared>,
    tick: watch::Receiver<()>,
    resource: Resource,
    selector: Selector,
    bookmarks: bool,
    deadline: Instant,
    /// Lines to say before anything else.
    first: VecDeque<Bytes>,
    /// What comes next in the history.
    next: usize,
    /// Entries before it that are no changes were said before this watch was opened.
    opened_at: usize,
    /// Changes up to this version are not told.
    after: u64,
    ended: bool,
}

/// Why a watch cannot be opened.
pub(super) struct Refused {
    pub(super) code: u16,
    pub(super) message: String,
}

/// What comes next in a watch.
enum Step {
    Say(Bytes),
    End,
    Disconnect,
    Wait,
}

impl Watch {
    pub(super) fn open(
        shared: &Arc<Shared>,
        resource: Resource,
        selector: Selector,
        query: &BTreeMap<String, String>,
    ) -> Result<Self, Refused> {
        let is = |name: &str| query.get(name).is_some_and(|value| value == "true");
        let seconds = query.get("timeoutSeconds").and_then(|text| text.parse().ok());
        let asked = query.get("resourceVersion").map(String::as_str).unwrap_or_default();
        let bad = |message: String| Refused { code: 400, message };
        let (sends_initial, bookmarks) = (is("sendInitialEvents"), is("allowWatchBookmarks"));
        if sends_initial && query.get("resourceVersionMatch").map(String::as_str) != Some("NotOlderThan") {
            return Err(bad("sendInitialEvents requires resourceVersionMatch=NotOlderThan".to_string()));
        }
        let tick = shared.tick.subscribe();
        let state = &mut *shared.state();
        let present = state.store.version();
        let (mut first, mut after, mut ended) = (VecDeque::new(), present, state.hangs_up);
        if sends_initial || matches!(asked, "" | "0") {
            let wanted = state.store.objects(resource).filter(|object| selector.takes(object));
            first.extend(wanted.map(|object| line("ADDED", object)));
        } else {
            after = asked.parse().map_err(|_| bad(format!("invalid resource version {asked}")))?;
        }
        if !state.store.remembers(after) {
            let message = format!("too old resource version: {after}");
            match state.gone {
                Gone::Status => return Err(Refused { code: 410, message }),
                Gone::Event => first.push_back(line("ERROR", &status(410, &message))),
            }
            ended = true;
        }
        if sends_initial && bookmarks {
            first.push_back(line("BOOKMARK", &resource.bookmark(present, true)));
        }
        *state.open.entry(resource).or_default() += 1;
        // Made last: when it is dropped it is no longer open, and looks at the state to say so.
        Ok(Self {
            shared: Arc::clone(shared),
            tick,
            resource,
            selector,
            bookmarks,
            deadline: Instant::now() + Duration::from_secs(seconds.unwrap_or(TIMEOUT_SECONDS)),
            first,
            next: 0,
            opened_at: state.store.history().len(),
            after,
            ended,
        })
    }

    /// The watch as the body of an answer.
    pub(super) fn body(self) -> impl Stream<Item = Result<Frame<Bytes>, io::Error>> {
        unfold(Some(self), |watch| async {
            let mut watch = watch?;
            match watch.step().await {
                Ok(Some(bytes)) => Some((Ok(Frame::data(bytes)), Some(watch))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    async fn step(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            let shared = Arc::clone(&self.shared);
            let step = self.look(&shared.state());
            match step {
                Step::Say(bytes) => return Ok(Some(bytes)),
                Step::End => return Ok(None),
                Step::Disconnect => return Err(io::ErrorKind::ConnectionReset.into()),
                Step::Wait => {}
            }
            // The sender lives as long as the watch does.
            let tick = tokio::time::timeout_at(self.deadline, self.tick.changed());
            self.ended |= !matches!(tick.await, Ok(Ok(())));
        }
    }

    fn look(&mut self, state: &State) -> Step {
        if let Some(bytes) = self.first.pop_front() {
            return Step::Say(bytes);
        }
        if self.ended {
            return Step::End;
        }
        if state.held.contains(&self.resource) {
            return Step::Wait;
        }
        while let Some(entry) = state.store.history().get(self.next) {
            self.next += 1;
            match entry {
                Entry::Change { version, resource, before, after } => {
                    if *resource != self.resource || *version <= self.after {
                        continue;
                    }
                    self.after = *version;
                    let taken = |object: &Option<Arc<Value>>| {
                        object.clone().filter(|object| self.selector.takes(object))
                    };
                    match (taken(before), taken(after)) {
                        (None, None) => {}
                        (None, Some(object)) => return Step::Say(line("ADDED", &object)),
                        (Some(_), Some(object)) => return Step::Say(line("MODIFIED", &object)),
                        (Some(object), None) => {
                            return Step::Say(line("DELETED", &at_version(&object, *version)));
                        }
                    }
                }
                Entry::Injected { resource, injection } => {
                    let mine = resource.is_none_or(|resource| resource == self.resource);
                    if !mine || self.next <= self.opened_at {
                        continue;
                    }
                    match injection {
                        Injection::Bookmark if self.bookmarks => {
                            let bookmark = self.resource.bookmark(state.store.version(), false);
                            return Step::Say(line("BOOKMARK", &bookmark));
                        }
                        Injection::Bookmark => {}
                        Injection::Error(code) => {
                            return Step::Say(line("ERROR", &status(*code, "injected by the test")));
                        }
                        Injection::Bytes(bytes) => return Step::Say(Bytes::copy_from_slice(bytes)),
                        Injection::End => return Step::End,
                        Injection::Disconnect => {
                            self.ended = true;
                            return Step::Disconnect;
                        }
                    }
                }
            }
        }
        Step::Wait
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(open) = self.shared.state().open.get_mut(&self.resource) {
            *open = open.saturating_sub(1);
        }
    }
}

/// The `Status` object of a refusal.
pub(super) fn status(code: u16, message: &str) -> Value {
    let reason = match code {
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "NotFound",
        410 => "Expired",
        429 => "TooManyRequests",
        _ => "InternalError",
    };
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code
    })
}

fn line(kind: &str, object: &Value) -> Bytes {
    let mut text = json!({ "type": kind, "object": object }).to_string();
    text.push('\n');
    text.into()
}
