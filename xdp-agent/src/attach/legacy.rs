//! tc programs on kernels without TCX (before 6.6): filters under the clsact qdisc, named by priority and handle.

use anyhow::Context;
use aya::programs::{
    TcAttachType,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
};
use tracing::debug;

use super::programs::{self, LegacyFilter, Programs};
use crate::{
    bpf::AttachType,
    host::Link,
    netlink::{Message, Protocol, Refused, Requests, number_u32},
};

/// Behind filters that redirect or classify (they use low numbers), before catch-alls.
const PRIORITY: u16 = 7_864;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// Messages, and places of filters (include/uapi/linux/rtnetlink.h, pkt_sched.h).
const RTM_DELQDISC: u16 = 37;
const RTM_GETTFILTER: u16 = 46;
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const CLSACT_INGRESS: u32 = 0xffff_fff2;
const CLSACT_EGRESS: u32 = 0xffff_fff3;

/// Attaches a filter, or replaces the one that an earlier agent has left.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn attach(
    programs: &mut Programs,
    link: &Link,
    program: &str,
    at: AttachType,
) -> anyhow::Result<()> {
    let interface = link.name.as_str();
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
    let filter = classifier.take_link(id)?;
    programs.legacy.push(LegacyFilter { _link: filter, interface: link.index, is_adopted });
    Ok(())
}

/// Removes the filters that an agent has left on an interface, and the qdisc that it has added for them.
pub(super) fn remove(link: &Link) {
    let interface = link.name.as_str();
    let is_ours =
        |filter: &Message| number_u32(&filter.body, 16).is_some_and(|info| info >> 16 == u32::from(PRIORITY));
    if !filters(link.index).is_ok_and(|found| found.iter().any(is_ours)) {
        return;
    }
    for at in [TcAttachType::Ingress, TcAttachType::Egress] {
        // Dropping the link removes the filter; there is none on most interfaces.
        if let Err(error) = left_behind(interface, at) {
            debug!(interface, %error, "no filter was removed");
        }
    }
    remove_qdisc_without_filters(link.index);
}

/// Takes the qdisc off an interface that had filters of ours, unless filters of others are in it. Without a filter it does
/// nothing; which agent has added it is not known after a restart.
pub(super) fn remove_qdisc_without_filters(interface: u32) {
    let removed = filters(interface).and_then(|found| {
        if found.is_empty() {
            Requests::open(Protocol::Route)?.request(
                RTM_DELQDISC,
                0,
                &message(interface, CLSACT_HANDLE, CLSACT),
            )?;
        }
        Ok(())
    });
    if let Err(error) = removed {
        debug!(interface, %error, "the qdisc was not removed");
    }
}

fn filters(interface: u32) -> Result<Vec<Message>, Refused> {
    let mut requests = Requests::open(Protocol::Route)?;
    let mut found = requests.dump(RTM_GETTFILTER, &message(interface, 0, CLSACT_INGRESS))?;
    found.extend(requests.dump(RTM_GETTFILTER, &message(interface, 0, CLSACT_EGRESS))?);
    Ok(found)
}

/// A `struct tcmsg`: family, padding, index, handle, parent, info.
fn message(interface: u32, handle: u32, parent: u32) -> Vec<u8> {
    [0, interface, handle, parent, 0].iter().flat_map(|word: &u32| word.to_ne_bytes()).collect()
}

fn left_behind(interface: &str, at: TcAttachType) -> anyhow::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(interface, at, PRIORITY, HANDLE, None)
        .with_context(|| format!("cannot find {interface}"))
}
