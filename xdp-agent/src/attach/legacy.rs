//! tc programs on kernels without TCX (before 6.6): filters under the clsact qdisc, named by priority and handle.

use anyhow::Context;
use aya::programs::{
    TcAttachType,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
};
use tracing::debug;

use super::programs::{self, LegacyFilter, Programs};
use crate::bpf::AttachType;

/// Behind filters that redirect or classify (they use low numbers), before catch-alls.
const PRIORITY: u16 = 7_864;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// Attaches a filter, or replaces the one that an earlier agent has left.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn attach(
    programs: &mut Programs,
    interface: &str,
    program: &str,
    at: AttachType,
) -> anyhow::Result<()> {
    let at = programs::legacy_type(at)?;
    match tc::qdisc_add_clsact(interface) {
        Ok(()) | Err(TcError::AlreadyAttached) => {}
        // Older kernels say EEXIST in words only; if the qdisc is really missing, the filter says so.
        Err(error) => debug!(interface, %error, "clsact was not added"),
    }
    let classifier = programs.sched_classifier(program)?;
    let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
    let (id, is_adopted) =
        match classifier.attach_with_options(interface, at, TcAttachOptions::Netlink(options)) {
            Ok(id) => (id, false),
            Err(refused) => {
                debug!(interface, program, %refused, "replacing the filter of an earlier agent");
                let id = classifier.attach_to_link(left_behind(interface, at)?).with_context(|| {
                    format!("cannot attach {program}; it needs CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS")
                })?;
                (id, true)
            }
        };
    let link = classifier.take_link(id)?;
    programs.legacy.push(LegacyFilter { _link: link, is_adopted });
    Ok(())
}

/// Removes the filters that an agent has left on an interface.
pub(super) fn remove(interface: &str) {
    for at in [TcAttachType::Ingress, TcAttachType::Egress] {
        // Dropping the link removes the filter; there is none on most interfaces.
        if let Err(error) = left_behind(interface, at) {
            debug!(interface, %error, "no filter was removed");
        }
    }
}

fn left_behind(interface: &str, at: TcAttachType) -> anyhow::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(interface, at, PRIORITY, HANDLE, None)
        .with_context(|| format!("cannot find {interface}"))
}
