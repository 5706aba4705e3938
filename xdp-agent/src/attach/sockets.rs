//! The socket hooks: attached to one cgroup, and with it to every process in it and below.
//!
//! Links are pinned as those of interfaces are. A starting agent adopts them, and moves those of another cgroup.

use std::{
    io,
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use tracing::{debug, info, warn};

use super::{Attacher, PinnedLink, Programs, take_off};
use crate::{
    bpf::{self, AttachType},
    cgroup::{self, Cgroup, Fate},
    pins::{self, PinDir},
};

/// Programs and where each is attached, in the order in which they are: what undoes a translation ([`UNDOING`] of them) comes
/// before what does one.
const HOOKS: [(&str, AttachType); 11] = [
    ("socket_release", AttachType::SockRelease),
    ("socket_getpeername4", AttachType::Getpeername4),
    ("socket_getpeername6", AttachType::Getpeername6),
    ("socket_recvmsg4", AttachType::UdpRecvmsg4),
    ("socket_recvmsg6", AttachType::UdpRecvmsg6),
    ("socket_sendmsg4", AttachType::UdpSendmsg4),
    ("socket_sendmsg6", AttachType::UdpSendmsg6),
    ("socket_connect4", AttachType::Connect4),
    ("socket_connect6", AttachType::Connect6),
    ("socket_bind4", AttachType::Bind4),
    ("socket_bind6", AttachType::Bind6),
];

/// How many of [`HOOKS`] undo translations.
const UNDOING: usize = 5;

/// How long these stay when the others have gone, so that who has asked hears the answer by the name it was asked by. Nothing tells
/// which questions are still open; most answers of a cluster come within milliseconds.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// Lets the last answers come; an interrupt ends that.
pub(super) async fn last_answers() {
    // Either way it is over.
    let _ = tokio::time::timeout(LAST_ANSWERS, tokio::signal::ctrl_c()).await;
}

/// Time before a cgroup that has refused is tried again: what comes before the hook that it refuses is attached for a moment.
const RETRY_PAUSE: Duration = Duration::from_secs(10);

/// Beginning of the names of pins, by which they are told from those of interfaces.
const PREFIX: &str = "socket-";

/// The hooks that are attached.
#[derive(Debug, Default)]
pub(super) struct SocketHooks {
    links: Vec<PinnedLink>,
    /// Whether the cgroup was gone at the last look, or has refused since.
    is_lost: bool,
    /// When a cgroup that had returned has refused.
    refused: Option<Instant>,
}

impl SocketHooks {
    /// Attaches every hook, or none that was not attached before.
    pub(super) fn attach(programs: &mut Programs, pins: &PinDir, cgroup: &Cgroup) -> anyhow::Result<Self> {
        let mut hooks = Self::default();
        for (program, at) in HOOKS {
            match attach(programs, pins, cgroup, program, at) {
                Ok(link) => hooks.links.push(link),
                Err(error) => {
                    hooks.undo();
                    return Err(error);
                }
            }
        }
        info!(cgroup = %cgroup.path.display(), "socket hooks are attached");
        Ok(hooks)
    }

    /// Takes off what this agent has attached, and leaves what it found running.
    pub(super) fn undo(&mut self) {
        take_off(std::mem::take(&mut self.links).into_iter().rev().filter(|link| !link.is_adopted));
    }

    /// Takes those off that translate, and says whether there were any.
    pub(super) fn stop_translating(&mut self) -> bool {
        let doing = self.links.split_off(UNDOING.min(self.links.len()));
        let was_translating = !doing.is_empty();
        take_off(doing.into_iter().rev());
        was_translating
    }

    /// Takes every hook off; what does a translation goes before what undoes one.
    pub(super) fn detach(&mut self) {
        take_off(std::mem::take(&mut self.links).into_iter().rev());
    }
}

impl Attacher {
    /// Follows the cgroup: where it has been removed and made again, the hooks are attached anew. Says whether there is anything
    /// new to tell of it.
    pub fn follow_cgroup(&mut self) -> bool {
        let Some(cgroup) = &mut self.cgroup else { return false };
        let fate = match cgroup.fate() {
            Ok(fate) => fate,
            Err(error) => {
                debug!(error = format!("{error:#}"), "cannot follow the cgroup");
                return false;
            }
        };
        match fate {
            Fate::Kept if self.sockets.is_lost => self.attach_again(),
            Fate::Kept => cgroup.is_leaf && !cgroup.look_for_others(),
            Fate::Gone => {
                let is_new = !std::mem::replace(&mut self.sockets.is_lost, true);
                if is_new {
                    warn!(cgroup = %cgroup.path.display(), "{}", cgroup::GONE);
                }
                is_new
            }
            Fate::Another(found) => {
                *cgroup = found;
                let is_new = !std::mem::replace(&mut self.sockets.is_lost, true);
                self.sockets.refused = None;
                self.attach_again() || is_new
            }
        }
    }

    /// The cgroup that carries the socket hooks.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref().filter(|_| !self.sockets.is_lost)
    }

    fn attach_again(&mut self) -> bool {
        let Some(cgroup) = &self.cgroup else { return false };
        if self.sockets.refused.is_some_and(|at| at.elapsed() < RETRY_PAUSE) {
            return false;
        }
        match SocketHooks::attach(&mut self.programs, &self.pins, cgroup) {
            Ok(hooks) => {
                self.sockets = hooks;
                true
            }
            Err(error) => {
                if self.sockets.refused.replace(Instant::now()).is_none() {
                    warn!(
                        error = format!("{error:#}"),
                        "cannot attach to a cgroup that has returned; trying again"
                    );
                }
                false
            }
        }
    }
}

/// Loads the programs, so that a kernel which refuses them does so before anything is attached.
pub(super) fn load(programs: &mut Programs) -> anyhow::Result<()> {
    HOOKS.iter().try_for_each(|(program, _)| programs.socket_hook(program).map(drop))
}

/// Whether a pin is that of a socket hook.
pub(super) fn is_pin(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(PREFIX))
}

/// Takes off the hooks that earlier agents have left, of every layout; what does a translation goes before what undoes one.
///
/// # Errors
/// When the directories of pins cannot be read.
pub(super) async fn remove_leftovers(pins: &PinDir) -> anyhow::Result<()> {
    if stop_leftovers(pins)? {
        last_answers().await;
    }
    pins.all_links()?.iter().filter(|path| is_pin(path)).for_each(|path| release(path));
    Ok(())
}

/// Takes those off that translate, of the hooks that earlier agents have left, and says whether there were any.
///
/// # Errors
/// When the directories of pins cannot be read.
pub(super) fn stop_leftovers(pins: &PinDir) -> anyhow::Result<bool> {
    let undoing: Vec<String> = HOOKS[..UNDOING].iter().map(|(program, _)| pin_name(program)).collect();
    let mut doing = pins.all_links()?;
    doing.retain(|path| is_pin(path) && !undoing.iter().any(|name| path.ends_with(name)));
    for path in &doing {
        info!(pin = %path.display(), "taking off a socket hook of an earlier agent");
        release(path);
    }
    Ok(!doing.is_empty())
}

/// Name of the pin of a program's link.
fn pin_name(program: &str) -> String {
    program.replace('_', "-")
}

fn attach(
    programs: &mut Programs,
    pins: &PinDir,
    cgroup: &Cgroup,
    program: &str,
    at: AttachType,
) -> anyhow::Result<PinnedLink> {
    let path = pins.links().join(pin_name(program));
    let found = adopted(&path, cgroup)?;
    let program_fd = programs.socket_hook(program)?;
    if let Some(link) = found {
        link.update(program_fd).with_context(|| format!("cannot replace {program}"))?;
        return Ok(PinnedLink { link, path, is_adopted: true });
    }
    let made = match bpf::Link::create_in_cgroup(program_fd, cgroup.dir.as_fd(), at) {
        Ok(made) => made,
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => bail!(
            "the kernel does not permit {program} on cgroup {}: {error}; either CAP_NET_ADMIN is missing, or somebody has \
             attached a program there that allows no other (look with `bpftool cgroup show {}`)",
            cgroup.path.display(),
            cgroup.path.display()
        ),
        Err(error) => {
            return Err(error).with_context(|| {
                format!(
                    "cannot attach {program} to cgroup {}; it needs a kernel with CONFIG_CGROUP_BPF, or \
                     --socket-lb=off, and then pods and this node do not reach Services",
                    cgroup.path.display()
                )
            });
        }
    };
    made.pin(&path).with_context(|| format!("cannot pin {}", path.display()))?;
    Ok(PinnedLink { link: made, path, is_adopted: false })
}

/// A link that an earlier agent has pinned for this very cgroup; one for another cgroup is taken off.
fn adopted(path: &Path, cgroup: &Cgroup) -> anyhow::Result<Option<bpf::Link>> {
    let found = match bpf::Link::open(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot open {}", path.display())),
    };
    let info = found.info().with_context(|| format!("cannot look at {}", path.display()))?;
    if info.cgroup == cgroup.id {
        return Ok(Some(found));
    }
    debug!(pin = %path.display(), "a pinned socket hook is of another cgroup");
    release(path);
    Ok(None)
}

fn release(path: &Path) {
    if let Err(error) = pins::take_off(path) {
        warn!(error = format!("{error:#}"), "cannot remove a pin");
    }
}
