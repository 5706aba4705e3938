//! The loaded programs: each is given to the kernel when it is first needed.

use std::{
    collections::BTreeSet,
    os::fd::{AsFd, BorrowedFd},
};

use anyhow::{Context, bail};
use aya::{
    Ebpf,
    maps::ProgramArray,
    programs::{
        CgroupSockAddr, Program, ProgramError, SchedClassifier, TcAttachType, Xdp, loaded_programs,
        tc::SchedClassifierLink,
    },
};
use tracing::debug;
use xdp_common::tables::{self, next};

use super::legacy;
use crate::{
    bpf::{self, AttachType},
    host::Link,
    maps,
    preflight::KERNEL_MIN,
};

/// The programs of the object.
#[derive(Debug)]
pub struct Programs {
    ebpf: Ebpf,
    /// Filters of kernels without TCX, which end with their handle.
    pub(super) legacy: Vec<LegacyFilter>,
}

/// A tc filter without a link.
#[derive(Debug)]
pub(super) struct LegacyFilter {
    // Held, because the filter goes with it.
    pub(super) _link: SchedClassifierLink,
    /// Index of its interface.
    pub(super) interface: u32,
    /// Left behind by an earlier agent.
    pub(super) is_adopted: bool,
}

impl Programs {
    /// The programs of an object whose maps are in place.
    pub fn new(ebpf: Ebpf) -> Self {
        Self { ebpf, legacy: Vec::new() }
    }

    /// Loads the programs that every interface needs, so that a kernel which refuses them does so before anything is
    /// attached.
    ///
    /// # Errors
    /// When the kernel lacks something.
    pub fn load(&mut self) -> anyhow::Result<()> {
        self.xdp("xdp_ingress")?;
        self.classifier("tc_egress")?;
        self.classifier("tc_ingress")?;
        self.classifier("tc_release")?;
        Ok(())
    }

    /// Starts reading the log of the programs.
    ///
    /// # Errors
    /// When the object was built without tracing.
    #[cfg(feature = "trace")]
    pub fn follow_log(&mut self) -> anyhow::Result<()> {
        let logger = aya_log::EbpfLogger::init(&mut self.ebpf)
            .context("cannot read the programs' log; build the BPF object with its `trace` feature too")?;
        let interest = tokio::io::Interest::READABLE;
        // SAFETY: the descriptor belongs to the ring buffer inside, which is not replaced before it is dropped.
        let mut logger = unsafe { tokio::io::unix::AsyncFd::register_with_interest(logger, interest) }
            .context("cannot wait for the programs' log")?;
        tokio::spawn(async move {
            while let Ok(mut ready) = logger.readable_mut().await {
                ready.get_inner_mut().flush();
                ready.clear_ready();
            }
        });
        Ok(())
    }

    /// An XDP program.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn xdp(&mut self, name: &str) -> anyhow::Result<BorrowedFd<'_>> {
        load_xdp(&mut self.ebpf, name)?;
        Ok(xdp(&mut self.ebpf, name)?.fd()?.as_fd())
    }

    /// A tc program.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn classifier(&mut self, name: &str) -> anyhow::Result<BorrowedFd<'_>> {
        Ok(self.sched_classifier(name)?.fd()?.as_fd())
    }

    /// A program of a socket hook.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn socket_hook(&mut self, name: &str) -> anyhow::Result<BorrowedFd<'_>> {
        let program = self.ebpf.program_mut(name).with_context(|| missing(name))?;
        if program.fd().is_err() {
            let loaded = if let Program::CgroupSock(program) = program {
                program.load()
            } else {
                let program: &mut CgroupSockAddr = program.try_into()?;
                program.load()
            };
            loaded.map_err(|error| refused(name, error))?;
        }
        Ok(program.fd()?.as_fd())
    }

    pub(super) fn sched_classifier(&mut self, name: &str) -> anyhow::Result<&mut SchedClassifier> {
        let program: &mut SchedClassifier =
            self.ebpf.program_mut(name).with_context(|| missing(name))?.try_into()?;
        if program.fd().is_err() {
            program.load().map_err(|error| refused(name, error))?;
        }
        Ok(program)
    }

    /// Takes the filters of kernels without TCX off.
    pub(super) fn detach_legacy(&mut self) {
        // A filter goes with its handle; the qdisc of an interface then, once its last filter has gone.
        let interfaces: BTreeSet<u32> = self.legacy.drain(..).map(|filter| filter.interface).collect();
        interfaces.into_iter().for_each(legacy::remove_qdisc_without_filters);
    }

    /// Takes those off that this agent has attached, and leaves what it found running.
    pub(super) fn undo_legacy(&mut self) {
        let (adopted, ours): (Vec<_>, Vec<_>) = self.legacy.drain(..).partition(|filter| filter.is_adopted);
        adopted.into_iter().for_each(std::mem::forget);
        self.legacy = ours;
        self.detach_legacy();
    }

    /// Leaves them on.
    pub(super) fn keep_legacy(mut self) {
        self.legacy.drain(..).for_each(std::mem::forget);
    }
}

/// The programs that XDP goes on to, by slot, without and with frags.
const NEXT: [(u32, &str, &str); next::ALL.len()] = [
    (next::V6, "xdp_v6", "xdp_v6_frags"),
    (next::OTHERS, "xdp_others", "xdp_others_frags"),
    (next::TUNNEL, "xdp_tunnel", "xdp_tunnel_frags"),
    (next::INGRESS, "xdp_ingress", "xdp_ingress_frags"),
];

/// Loads an XDP program of an object, if it is not loaded, and those that it goes on to.
///
/// # Errors
/// When the kernel refuses one.
pub fn load_xdp(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<()> {
    if xdp(ebpf, name)?.fd().is_ok() {
        return Ok(());
    }
    let has_frags = name.ends_with("_frags");
    let spec = if has_frags { &tables::XDP_NEXT_FRAGS } else { &tables::XDP_NEXT };
    for (slot, plain, frags) in NEXT {
        let name = if has_frags { frags } else { plain };
        let fd = loaded(ebpf, name)?.fd()?.try_clone()?;
        let map = ebpf.map_mut(spec.name).with_context(|| maps::missing(spec))?;
        ProgramArray::try_from(map)?
            .set(slot, &fd, 0)
            .with_context(|| format!("cannot put {name} where XDP goes on to it"))?;
    }
    loaded(ebpf, name)?;
    Ok(())
}

fn loaded<'a>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut Xdp> {
    let program = xdp(ebpf, name)?;
    if program.fd().is_err() {
        program.load().map_err(|error| refused(name, error))?;
    }
    Ok(program)
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut Xdp> {
    Ok(ebpf.program_mut(name).with_context(|| missing(name))?.try_into()?)
}

/// Whether a program is among the tc programs of an interface.
pub(super) fn is_on_interface(link: &Link, program: u32) -> anyhow::Result<bool> {
    for at in [AttachType::TcxIngress, AttachType::TcxEgress] {
        let programs = bpf::programs_on(link.index, at)
            .with_context(|| format!("cannot ask for the tc programs of {}", link.name))?;
        if programs.contains(&program) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The name of a loaded program.
pub(super) fn name(id: u32) -> Option<String> {
    let info = loaded_programs().filter_map(Result::ok).find(|info| info.id() == id)?;
    info.name_as_str().map(str::to_owned)
}

fn missing(name: &str) -> String {
    format!("the BPF object has no program {name}; build it again with `cargo xtask build`")
}

/// One line of what the kernel said; all of it at debug level.
fn refused(name: &str, error: ProgramError) -> anyhow::Error {
    let ProgramError::LoadError { io_error, verifier_log } = &error else {
        return anyhow::Error::new(error).context(format!("cannot load program {name}"));
    };
    let log = verifier_log.to_string();
    debug!(program = name, verifier = %log, "the kernel refused a program");
    match last_words(&log) {
        Some(words) => anyhow::anyhow!(
            "the kernel refuses program {name} ({io_error}): {words}; it needs kernel {KERNEL_MIN} or later with \
             CONFIG_BPF_SYSCALL and CONFIG_BPF_JIT (all of the verifier's log: --log xdp_agent=debug)"
        ),
        None => anyhow::anyhow!(
            "the kernel refuses program {name} ({io_error}); it needs kernel {KERNEL_MIN} or later with CONFIG_BPF_SYSCALL and \
             CONFIG_BPF_JIT, and CAP_BPF and CAP_NET_ADMIN in the first user namespace"
        ),
    }
}

/// The line of a verifier log that says why: the last that is no statistics.
fn last_words(log: &str) -> Option<&str> {
    const STATISTICS: [&str; 4] = ["processed ", "verification time ", "stack depth ", "max_states"];
    log.lines()
        .map(str::trim)
        .rfind(|line| !line.is_empty() && !STATISTICS.iter().any(|statistics| line.starts_with(statistics)))
}

impl Drop for Programs {
    fn drop(&mut self) {
        self.detach_legacy();
    }
}

/// The attach type of the netlink way.
///
/// # Errors
/// For the others, which have other ways.
pub(super) fn legacy_type(at: AttachType) -> anyhow::Result<TcAttachType> {
    match at {
        AttachType::TcxIngress => Ok(TcAttachType::Ingress),
        AttachType::TcxEgress => Ok(TcAttachType::Egress),
        AttachType::Xdp
        | AttachType::Bind4
        | AttachType::Bind6
        | AttachType::Connect4
        | AttachType::Connect6
        | AttachType::UdpSendmsg4
        | AttachType::UdpSendmsg6
        | AttachType::UdpRecvmsg4
        | AttachType::UdpRecvmsg6
        | AttachType::Getpeername4
        | AttachType::Getpeername6
        | AttachType::SockRelease => bail!("{at:?} is no tc filter"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifiers_reason_is_found_among_its_statistics() {
        let log = "0: (85) call unknown#118\nunknown func bpf_jiffies64#118\n\
                   processed 1 insns (limit 1000000) max_states_per_insn 0\nstack depth 0\n\n";
        assert_eq!(last_words(log), Some("unknown func bpf_jiffies64#118"));
        assert_eq!(last_words(""), None);
    }
}
