//! Follows one kind: lists it, watches it, and begins again where that is needed.

use std::{collections::HashSet, mem, time::Duration};

use tokio::{sync::mpsc, time::Instant};
use tracing::{debug, info, warn};

use super::{
    Options, Told,
    client::{Connection, Failure, Selection},
    decode::{self, Item, Line},
    health::{Reporter, State},
    pace::{Backoff, Pace},
};
use crate::{objects::ObjectName, source::Kind};

/// Times that the API server may refuse to resume a watch before everything is listed again.
const REFUSALS_MAX: u32 = 3;

/// The follower of one kind.
#[derive(Debug)]
pub(super) struct Follower {
    kind: Kind,
    selection: Selection,
    pace: Pace,
    connection: Connection,
    told: mpsc::Sender<Told>,
    reporter: Reporter,
    /// Every object that exists as far as the consumer knows.
    known: HashSet<ObjectName>,
    /// Up to where everything has been told; none when it has to be listed.
    version: Option<String>,
    has_listed: bool,
    /// When the watch that runs now, or ran last, was opened.
    opened: Option<Instant>,
    /// Refusals since a watch last worked.
    refusals: u32,
    /// The failure that was logged and has not been overcome.
    said: Option<String>,
    /// Whether it was logged that the answers cannot be read, which a list overcomes for a moment only.
    said_unreadable: bool,
}

/// The consumer is gone, and so is the reason to go on.
#[derive(Debug)]
struct Unheard;

/// Why a round is over.
#[derive(Debug)]
enum End {
    Failed(Failure),
    Unheard,
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<Unheard> for End {
    fn from(Unheard: Unheard) -> Self {
        Self::Unheard
    }
}

impl Follower {
    pub(super) fn new(
        kind: Kind,
        options: &Options,
        connection: Connection,
        told: mpsc::Sender<Told>,
        reporter: Reporter,
    ) -> Self {
        Self {
            kind,
            selection: Selection::new(kind, (!options.all_nodes).then_some(&options.node)),
            pace: options.pace,
            connection,
            told,
            reporter,
            known: HashSet::new(),
            version: None,
            has_listed: false,
            opened: None,
            refusals: 0,
            said: None,
            said_unreadable: false,
        }
    }

    /// Follows the kind until nobody listens.
    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::new(self.pace);
        loop {
            let ended = self.round().await;
            if self.opened.take().is_some_and(|opened| opened.elapsed() >= self.pace.steady) {
                backoff.reset();
                self.said_unreadable = false;
            }
            let pause = match ended {
                Ok(()) => backoff.next(None),
                Err(End::Unheard) => return,
                Err(End::Failed(failure)) => match self.failed(failure).await {
                    Ok(Some(asked)) => asked.pause(&mut backoff),
                    Ok(None) => backoff.next(None),
                    Err(Unheard) => return,
                },
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.told.closed() => return,
            }
        }
    }

    /// Lists if need be, and watches until the watch ends.
    async fn round(&mut self) -> Result<(), End> {
        let version = match self.version.take() {
            Some(version) => version,
            None => self.list().await?,
        };
        // The place to resume at survives whatever happens, until something says that it is none.
        self.version = Some(version.clone());
        let mut lines = self.connection.watch(&self.selection, &version, &self.pace).await?;
        self.opened = Some(Instant::now());
        self.reporter.state(self.kind, State::Watching);
        if self.said.take().is_some() {
            info!(kind = self.kind.name(), "watching again");
        }
        while let Some(line) = lines.next().await? {
            let line = decode::line(self.kind, line)?;
            self.refusals = 0;
            self.line(line).await?;
        }
        debug!(kind = self.kind.name(), "the watch ended");
        Ok(())
    }

    async fn line(&mut self, line: Line) -> Result<(), Unheard> {
        let version = match line {
            Line::Applied(item) => {
                self.reporter.event(self.kind);
                let version = item.version.clone();
                self.known.insert(item.name.clone());
                self.tell(item).await?;
                version
            }
            Line::Deleted { name, version } => {
                self.reporter.event(self.kind);
                self.known.remove(&name);
                self.gone(name).await?;
                version
            }
            Line::Bookmark(version) => Some(version),
        };
        // Of an object that cannot be read not even the version may be known; resuming before it does no harm.
        if let Some(version) = version.filter(|version| !version.is_empty()) {
            self.version = Some(version);
        }
        Ok(())
    }

    /// Tells everything that exists, then what does not exist any more, and returns from where to watch.
    async fn list(&mut self) -> Result<String, End> {
        if self.has_listed {
            self.reporter.relist(self.kind);
        }
        if self.said.is_none() {
            self.reporter.state(self.kind, State::Listing);
        }
        let mut found = HashSet::new();
        let mut next = None;
        let version = loop {
            let bytes = self.connection.page(&self.selection, next, &self.pace).await?;
            let page = decode::page(self.kind, &bytes)?;
            for item in page.items {
                // Known from now on, even when a later page fails and it is gone before the next list.
                self.known.insert(item.name.clone());
                found.insert(item.name.clone());
                self.tell(item).await?;
            }
            if page.continue_token.is_some() {
                next = page.continue_token;
                continue;
            }
            let missing = || Failure::Unreadable("the list has no resource version".to_owned());
            break page.version.ok_or_else(missing)?;
        };
        debug!(kind = self.kind.name(), objects = found.len(), version, "listed");
        let before = mem::replace(&mut self.known, found);
        for name in before {
            if !self.known.contains(&name) {
                self.gone(name).await?;
            }
        }
        self.has_listed = true;
        self.send(Told::Listed(self.kind)).await?;
        Ok(version)
    }

    async fn tell(&self, item: Item) -> Result<(), Unheard> {
        let told = match item.content {
            Ok(change) => Told::Object(self.kind, item.name, change),
            Err(message) => {
                self.reporter.bad_object(self.kind);
                Told::Bad(self.kind, item.name, message)
            }
        };
        self.send(told).await
    }

    async fn gone(&self, name: ObjectName) -> Result<(), Unheard> {
        self.send(Told::Object(self.kind, name.clone(), self.kind.gone(name))).await
    }

    async fn send(&self, told: Told) -> Result<(), Unheard> {
        self.told.send(told).await.map_err(|_| Unheard)
    }

    /// Says what went wrong, once, and decides where to go on; returns what the pause depends on.
    async fn failed(&mut self, failure: Failure) -> Result<Option<Asked>, Unheard> {
        let mut asked = None;
        match &failure {
            Failure::Expired => {
                debug!(kind = self.kind.name(), "the watch is too old to be resumed; listing again");
                self.version = None;
                return Ok(None);
            }
            Failure::Refused { code: 403 | 404, .. } if self.kind == Kind::ServiceCidr => {
                return self.absent(&failure).await.map(Some);
            }
            Failure::Refused { retry_after, .. } => {
                asked = retry_after.map(Asked::AtLeast);
                self.refusals += 1;
                if self.refusals >= REFUSALS_MAX {
                    self.version = None;
                    self.refusals = 0;
                }
            }
            Failure::Unreachable(_) => {}
            Failure::Unreadable(_) => self.version = None,
        }
        self.reporter.failure(self.kind);
        let message = failure.to_string();
        let is_unreadable = matches!(failure, Failure::Unreadable(_));
        if self.said.as_ref() == Some(&message) || is_unreadable && self.said_unreadable {
            debug!(
                kind = self.kind.name(),
                error = message,
                "cannot follow the API server yet; trying again"
            );
        } else {
            warn!(kind = self.kind.name(), error = message, "cannot follow the API server; trying again");
        }
        self.said_unreadable |= is_unreadable;
        self.reporter.state(self.kind, State::Failing(message.clone()));
        // Its end is not worth a word either.
        self.said = Some(message).filter(|_| !is_unreadable);
        if let Err(error) = self.connection.renew().await {
            debug!(kind = self.kind.name(), error = format!("{error:#}"), "the client stays as it is");
        }
        Ok(asked)
    }

    /// Before Kubernetes 1.33 there need not be ServiceCIDRs, and the role does not speak of them then.
    async fn absent(&mut self, failure: &Failure) -> Result<Asked, Unheard> {
        let message = failure.to_string();
        if self.said.as_ref() != Some(&message) {
            info!(
                kind = self.kind.name(),
                answer = message,
                "the cluster does not say what its Service networks are"
            );
        }
        self.said = Some(message);
        self.reporter.state(self.kind, State::Absent);
        self.send(Told::Listed(self.kind)).await?;
        Ok(Asked::Exactly(self.pace.absent()))
    }
}

/// What a failure says about the pause after it.
#[derive(Clone, Copy, Debug)]
enum Asked {
    AtLeast(Duration),
    Exactly(Duration),
}

impl Asked {
    fn pause(self, backoff: &mut Backoff) -> Duration {
        match self {
            Self::AtLeast(time) => backoff.next(Some(time)),
            Self::Exactly(time) => time,
        }
    }
}
