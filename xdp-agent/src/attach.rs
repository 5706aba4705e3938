//! Attaches the programs, interface by interface, in the best mode each takes; and takes them off again.
//!
//! Links are pinned: the datapath outlives the agent, and the next one adopts the links and replaces their programs in
//! one step. What an agent cannot finish attaching it takes off again, but never what it found running.

use std::{collections::BTreeMap, fs, io, os::fd::OwnedFd, path::PathBuf};

use anyhow::{Context, bail, ensure};
use tracing::{debug, info, warn};

pub use programs::Programs;
pub use refusal::{Refusal, RefusalKind};

use crate::{
    bpf::{self, AttachType},
    cgroup::Cgroup,
    config::{ModeChoice, Pattern},
    devices::Mode,
    host::Link,
    neighbours,
    pins::{self, PinDir},
};

pub mod legacy;
pub mod overlays;
mod pods;
pub mod programs;
pub mod refusal;
mod sockets;
pub mod trial;
pub mod xdp;

/// What is asked for by [`bpf::has_tcx`].
pub(crate) const OF_TCX: &str = "cannot ask how this kernel attaches tc programs";

/// An interface with programs on it.
#[derive(Debug)]
pub struct Attached {
    /// Index of the interface.
    pub ifindex: u32,
    /// How XDP runs.
    pub mode: Mode,
    /// Why it runs so.
    pub reason: String,
    links: Vec<PinnedLink>,
}

/// A link with the file that keeps it alive.
#[derive(Debug)]
pub(crate) struct PinnedLink {
    link: bpf::Link,
    path: PathBuf,
    /// Found pinned by an earlier agent.
    is_adopted: bool,
}

/// The engine.
#[derive(Debug)]
pub struct Attacher {
    programs: Programs,
    pins: PinDir,
    mode: ModeChoice,
    /// Whether tc programs are attached by links.
    has_tcx: bool,
    attached: BTreeMap<String, Attached>,
    /// The cgroup whose sockets are served, if any.
    cgroup: Option<Cgroup>,
    sockets: sockets::SocketHooks,
    pods: pods::PodDevices,
    overlays: overlays::Overlays,
    /// Whether modes are chosen anew where an earlier agent has programs, and its maps go.
    begins_anew: bool,
}

/// A tc program, the name of its pins before the index of the interface, and where it goes.
#[derive(Clone, Copy, Debug)]
struct TcProgram {
    name: &'static str,
    pin: &'static str,
    at: AttachType,
}

impl Attacher {
    /// An engine with nothing attached.
    pub fn new(
        programs: Programs,
        pins: PinDir,
        mode: ModeChoice,
        has_tcx: bool,
        cgroup: Option<Cgroup>,
        pods: Vec<Pattern>,
        are_overlays_followed: bool,
    ) -> Self {
        let sockets = sockets::SocketHooks::default();
        let pods = pods::PodDevices::new(pods);
        let overlays = overlays::Overlays::new(are_overlays_followed);
        let attached = BTreeMap::new();
        Self { programs, pins, mode, has_tcx, attached, cgroup, sockets, pods, overlays, begins_anew: false }
    }

    /// Whether programs of an earlier agent are attached, of whatever layout.
    ///
    /// # Errors
    /// When the directory of pins cannot be read.
    pub fn follows_another(&self) -> anyhow::Result<bool> {
        self.pins.all_links().map(|links| !links.is_empty())
    }

    /// Has nothing kept of an earlier agent but the links, whose programs are replaced in one step; those of interfaces are
    /// made anew, by the mode that is chosen now.
    ///
    /// # Errors
    /// When a pin cannot be moved.
    pub fn begin_anew(&mut self) -> anyhow::Result<()> {
        self.begins_anew = true;
        self.pins.take_links_of_other_layouts()
    }

    /// Gives the programs that every interface needs to the kernel, before anything is attached.
    ///
    /// # Errors
    /// When the kernel lacks something.
    pub fn load_programs(&mut self) -> anyhow::Result<()> {
        self.programs.load()?;
        match self.cgroup {
            Some(_) => sockets::load(&mut self.programs)?,
            None => drop(self.programs.classifier("tc_host")?),
        }
        if self.pods.are_wanted() {
            pods::load(&mut self.programs)?;
        }
        #[cfg(feature = "trace")]
        self.programs.follow_log()?;
        Ok(())
    }

    /// The program by which frames come in once more, which is attached nowhere.
    ///
    /// # Errors
    /// When the kernel lacks something.
    pub fn release_program(&mut self) -> anyhow::Result<OwnedFd> {
        self.programs.classifier("tc_release")?.try_clone_to_owned().context("cannot keep a program open")
    }

    /// What is attached, by interface name.
    pub fn attached(&self) -> &BTreeMap<String, Attached> {
        &self.attached
    }

    /// Attaches to every interface, or to none that was not attached before.
    ///
    /// # Errors
    /// When an interface refuses for good.
    pub async fn attach_all(&mut self, names: &[String]) -> anyhow::Result<()> {
        let host = neighbours::read_host().context("cannot read the interfaces")?;
        for name in names {
            let result = host.link(name).context("the interface is gone").and_then(|link| self.attach(link));
            if let Err(error) = result {
                self.undo();
                return Err(error.context(format!("cannot attach to {name}")));
            }
        }
        if let Err(error) = self.check() {
            self.undo();
            return Err(error);
        }
        let hooks = match &self.cgroup {
            None => sockets::remove_leftovers(&self.pins).await.map(|()| sockets::SocketHooks::default()),
            Some(cgroup) => sockets::SocketHooks::attach(&mut self.programs, &self.pins, cgroup),
        };
        match hooks {
            Ok(hooks) => self.sockets = hooks,
            Err(error) => {
                self.undo();
                return Err(error);
            }
        }
        self.follow_overlays(&host);
        self.follow_pods(&host);
        self.tell_pods();
        self.remove_orphans();
        if std::mem::take(&mut self.begins_anew) {
            self.pins.drop_aside()?;
        }
        Ok(())
    }

    /// Names of the pods' devices that carry programs.
    pub fn pod_devices(&self) -> impl Iterator<Item = &str> {
        self.pods.names()
    }

    /// The pods' devices that have refused, and why.
    pub fn refused_pod_devices(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pods.refused()
    }

    /// Whether it is time for [`Attacher::follow_pods`] to try a device again.
    pub fn pods_are_due(&self) -> bool {
        self.pods.are_due()
    }

    /// Whether pods are served at their devices.
    pub fn serves_pods(&self) -> bool {
        self.pods.are_wanted()
    }

    /// Attaches to one interface: tc first, so that no packet is translated whose reply could not be.
    ///
    /// # Errors
    /// When no allowed mode works; nothing is left attached then that was not before.
    pub fn attach(&mut self, link: &Link) -> anyhow::Result<()> {
        let mut links = Vec::new();
        let (mode, reason) = match self.attach_programs(link, &mut links) {
            Ok(attached) => attached,
            Err(error) => {
                take_off(links.into_iter().filter(|link: &PinnedLink| !link.is_adopted));
                return Err(error);
            }
        };
        info!(interface = %link.name, mode = mode.label(), reason = %reason, "attached");
        self.attached.insert(link.name.clone(), Attached { ifindex: link.index, mode, reason, links });
        Ok(())
    }

    /// Attaches to one interface, and tells XDP's mode and why; `links` has what is attached, whether all of it is or not.
    fn attach_programs(
        &mut self,
        link: &Link,
        links: &mut Vec<PinnedLink>,
    ) -> anyhow::Result<(Mode, String)> {
        let programs = self.programs_of_interfaces();
        self.attach_tc(link, &programs, links)?;
        let found = self.adopted_pin(link, &format!("xdp-{}", link.index))?;
        let path = self.pin("xdp", link);
        let (xdp, mode, reason) =
            xdp::attach(&mut self.programs, link, self.mode, found, !self.begins_anew, &path)?;
        // XDP is the first to go when they are taken off in order.
        links.insert(0, xdp);
        xdp::prove(&mut self.programs, link, mode)?;
        Ok((mode, reason))
    }

    /// The tc programs of every interface.
    fn programs_of_interfaces(&self) -> [TcProgram; 2] {
        // Where no socket hook does it, what processes of this node send is translated on its way out.
        let egress = if self.cgroup.is_some() { "tc_egress" } else { "tc_host" };
        [
            TcProgram { name: egress, pin: "tc-egress", at: AttachType::TcxEgress },
            TcProgram { name: "tc_ingress", pin: "tc-ingress", at: AttachType::TcxIngress },
        ]
    }

    /// Forgets an interface that is gone; the kernel has taken the programs off with it.
    pub fn forget(&mut self, name: &str) {
        let Some(attached) = self.attached.remove(name) else { return };
        for link in attached.links {
            remove_pin(&link.path);
        }
    }

    /// Takes every program off and removes what is pinned. The socket hooks that translate go first, and the last answers come by
    /// the others.
    ///
    /// # Errors
    /// When a pin cannot be removed.
    pub async fn detach_all(mut self) -> anyhow::Result<()> {
        if self.sockets.stop_translating() {
            sockets::last_answers().await;
        }
        self.sockets.detach();
        self.pods.detach(false);
        for (_, attached) in std::mem::take(&mut self.attached) {
            take_off(attached.links.into_iter());
        }
        self.programs.detach_legacy();
        self.pins.clear()?;
        self.pins.remove();
        Ok(())
    }

    /// Ends a start that failed: the directories of pins go, as far as nobody else has anything in them.
    pub fn give_up(mut self) {
        self.undo();
        self.pins.remove();
    }

    /// Leaves every program attached and pinned.
    pub fn leave(self) {
        self.programs.keep_legacy();
    }

    fn attach_tc(
        &mut self,
        link: &Link,
        programs: &[TcProgram],
        links: &mut Vec<PinnedLink>,
    ) -> anyhow::Result<()> {
        for &TcProgram { name: program, pin, at } in programs {
            if !self.has_tcx {
                legacy::attach(&mut self.programs, link, program, at)?;
                continue;
            }
            let found = self.adopted_pin(link, &format!("{pin}-{}", link.index))?;
            let path = self.pin(pin, link);
            let program_fd = self.programs.classifier(program)?;
            let pinned = match found {
                Some(found) => {
                    found.update(program_fd).with_context(|| format!("cannot replace {program}"))?;
                    PinnedLink { link: found, path, is_adopted: true }
                }
                None => {
                    let made = bpf::Link::create(program_fd, link.index, at, 0).with_context(|| {
                        format!("cannot attach {program}; it needs a kernel with CONFIG_NET_XGRESS")
                    })?;
                    made.pin(&path).with_context(|| format!("cannot pin {}", path.display()))?;
                    PinnedLink { link: made, path, is_adopted: false }
                }
            };
            links.push(pinned);
        }
        Ok(())
    }

    /// A link that an earlier agent has pinned for this very interface; a pin whose interface is gone is removed.
    fn adopted_pin(&self, link: &Link, name: &str) -> anyhow::Result<Option<bpf::Link>> {
        let path = self.pins.links().join(name);
        let found = match bpf::Link::open(&path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot open {}", path.display())),
        };
        let info = found.info().with_context(|| format!("cannot look at {}", path.display()))?;
        if info.ifindex != link.index {
            debug!(pin = %path.display(), "the interface of a pinned link is gone");
            remove_pin(&path);
            return Ok(None);
        }
        // Indices repeat in other network namespaces; a program is on this interface only if the interface says so.
        let is_here = if name.starts_with("xdp") {
            link.xdp.program == info.program
        } else {
            programs::is_on_interface(link, info.program)?
        };
        if !is_here && self.begins_anew {
            pins::take_off(&path)?;
            return Ok(None);
        }
        ensure!(
            is_here,
            "{} belongs to an interface of another network namespace; give each agent its own --pin-dir",
            path.display()
        );
        Ok(Some(found))
    }

    fn pin(&self, program: &str, link: &Link) -> PathBuf {
        self.pins.links().join(format!("{program}-{}", link.index))
    }

    /// Asks the kernel whether what was attached is there.
    fn check(&self) -> anyhow::Result<()> {
        let host = neighbours::read_host().context("cannot read the interfaces")?;
        for (name, attached) in self.attached.iter().filter(|(_, attached)| attached.mode != Mode::Tc) {
            let xdp = attached
                .links
                .first()
                .context("no XDP link")?
                .link
                .info()
                .context("cannot read the XDP link")?;
            let found = host.link(name).map(|link| link.xdp.program);
            ensure!(
                found == Some(xdp.program),
                "{name} should carry XDP program {} and carries {found:?}: something else has replaced it; stop that first",
                xdp.program
            );
        }
        Ok(())
    }

    /// Takes off what this agent has attached, and leaves what it found running.
    fn undo(&mut self) {
        self.sockets.undo();
        self.pods.detach(true);
        for (_, attached) in std::mem::take(&mut self.attached) {
            take_off(attached.links.into_iter().filter(|link| !link.is_adopted));
        }
        self.programs.undo_legacy();
    }

    /// Takes off the programs of interfaces that are no longer managed.
    fn remove_orphans(&self) {
        let Ok(entries) = fs::read_dir(self.pins.links()) else { return };
        let kept: Vec<&PathBuf> = self
            .attached
            .values()
            .flat_map(|attached| &attached.links)
            .chain(self.pods.links())
            .map(|link| &link.path)
            .collect();
        for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
            if !kept.contains(&&path) && !sockets::is_pin(&path) {
                info!(pin = %path.display(), "taking off a program of an interface that is no longer managed");
                remove_pin(&path);
            }
        }
    }
}

/// Takes off what agents have left on any interface and removes their pins; no agent runs while `pins` is held.
///
/// # Errors
/// When a pin cannot be removed, or the kernel does not say how tc programs are attached.
pub async fn remove_leftovers(pins: &PinDir) -> anyhow::Result<()> {
    sockets::remove_leftovers(pins).await?;
    pins.clear()?;
    if !bpf::has_tcx().context(OF_TCX)? {
        let host = neighbours::read_host().context("cannot read the interfaces")?;
        for link in host.links.values() {
            legacy::remove(link);
        }
    }
    pins.remove();
    Ok(())
}

fn take_off(links: impl Iterator<Item = PinnedLink>) {
    for link in links {
        remove_pin(&link.path);
        // Whoever else holds the link open must not keep the program on the interface.
        if let Err(error) = link.link.detach() {
            debug!(pin = %link.path.display(), %error, "the link was gone already");
        }
    }
}

fn remove_pin(path: &PathBuf) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        warn!(pin = %path.display(), %error, "cannot remove a pin");
    }
}

/// The XDP program that an interface carries, by its name where the kernel tells it.
pub fn owner(link: &Link) -> Option<Option<String>> {
    (link.xdp.program != 0).then(|| programs::name(link.xdp.program))
}

/// Refuses an interface whose XDP program is somebody else's.
pub(crate) fn ensure_free(link: &Link) -> anyhow::Result<()> {
    if link.xdp.program == 0 {
        return Ok(());
    }
    let name = programs::name(link.xdp.program).map(|name| format!(" ({name})")).unwrap_or_default();
    bail!(
        "{} already carries XDP program id {}{name}, which is never replaced; stop its owner or take it off with `ip link set \
         dev {} xdp off` (and `xdpgeneric off`), or leave the interface out of --iface",
        link.name,
        link.xdp.program,
        link.name
    )
}
