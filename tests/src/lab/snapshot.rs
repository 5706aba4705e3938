//! Everything a namespace's network consists of, as text that can be compared.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::Path;

use anyhow::{Context, Result};
use futures_util::{Stream, TryStreamExt};
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage, LinkXdp};
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::packet_route::tc::TcAttribute;

use super::block_on;
use super::netns::Namespace;

// From linux/bpf.h.
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;

/// Links, addresses, routes, rules, queueing disciplines, attached programs and settings of one namespace.
#[derive(Clone, PartialEq, Eq)]
pub struct Snapshot {
    lines: BTreeSet<String>,
}

#[repr(C)]
#[derive(Default)]
struct ProgQuery {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    padding: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

impl Snapshot {
    /// Reads the present state.
    pub fn take(namespace: &Namespace) -> Result<Self> {
        let netlink = namespace.netlink();
        let mut lines = BTreeSet::new();
        for link in collect(netlink.link().get().execute())? {
            let (index, name) = (link.header.index, name_of(&link));
            lines.insert(format!("link {index} {name} {}", describe_link(&link)));
            for (hook, kind) in [("ingress", BPF_TCX_INGRESS), ("egress", BPF_TCX_EGRESS)] {
                lines.insert(format!(
                    "tcx {name} {hook}: {} programs",
                    namespace.run(|| tcx_programs(index, kind))?
                ));
            }
        }
        for mut address in collect(netlink.address().get().execute())? {
            address.attributes.retain(|attribute| !matches!(attribute, AddressAttribute::CacheInfo(_)));
            lines.insert(format!("address {address:?}"));
        }
        for route in collect(netlink.route().get(RouteMessage::default()).execute())? {
            lines.insert(format!("route {:?} {:?}", route.header, route.attributes));
        }
        for rule in collect(netlink.rule().get(rtnetlink::IpVersion::V4).execute())? {
            lines.insert(format!("rule {rule:?}"));
        }
        for qdisc in collect(netlink.qdisc().get().execute())? {
            let kind = qdisc.attributes.iter().filter(|attribute| matches!(attribute, TcAttribute::Kind(_)));
            lines.insert(format!("qdisc {:?} {:?}", qdisc.header.index, kind.collect::<Vec<_>>()));
        }
        namespace.run(|| settings(Path::new("/proc/sys/net/ipv4"), &mut lines))?;
        Ok(Self { lines })
    }

    /// Lists what differs, one line each, with `-` for what was and `+` for what is now.
    pub fn difference(&self, now: &Self) -> Vec<String> {
        let gone = self.lines.difference(&now.lines).map(|line| format!("- {line}"));
        gone.chain(now.lines.difference(&self.lines).map(|line| format!("+ {line}"))).collect()
    }
}

fn collect<T: Debug>(stream: impl Stream<Item = Result<T, rtnetlink::Error>>) -> Result<Vec<T>> {
    block_on(stream.try_collect()).context("reading the namespace by netlink")
}

fn name_of(link: &LinkMessage) -> String {
    let names = link.attributes.iter().find_map(|attribute| {
        if let LinkAttribute::IfName(name) = attribute { Some(name.clone()) } else { None }
    });
    names.unwrap_or_default()
}

/// Keeps what configuration determines and leaves out counters.
fn describe_link(link: &LinkMessage) -> String {
    // The kernel notes later, on its own, that a device with a carrier is running.
    let flags = link.header.flags.difference(LinkFlags::Running | LinkFlags::LowerUp);
    let mut parts = vec![format!("{flags:?}")];
    for attribute in &link.attributes {
        let kept = matches!(
            attribute,
            LinkAttribute::Mtu(_)
                | LinkAttribute::Address(_)
                | LinkAttribute::TxQueueLen(_)
                | LinkAttribute::Controller(_)
                | LinkAttribute::Qdisc(_)
                | LinkAttribute::GsoMaxSize(_)
                | LinkAttribute::Carrier(_)
        );
        if kept {
            parts.push(format!("{attribute:?}"));
        }
        if let LinkAttribute::Xdp(xdp) = attribute {
            let attached = xdp.iter().filter(|part| matches!(part, LinkXdp::Attached(_)));
            parts.push(format!("{:?}", attached.collect::<Vec<_>>()));
        }
    }
    parts.join(" ")
}

fn tcx_programs(index: u32, attach_type: u32) -> Result<u32> {
    let mut query = ProgQuery { target_ifindex: index, attach_type, ..ProgQuery::default() };
    // SAFETY: `query` has the layout of the query member of union bpf_attr and asks for the count only.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<ProgQuery>()) };
    let error = std::io::Error::last_os_error();
    match (result, error.raw_os_error()) {
        (0, _) => Ok(query.count),
        // Kernels before 6.6 have no TCX, hence no programs there.
        (_, Some(libc::EINVAL)) => Ok(0),
        _ => Err(error).context("asking for tc programs"),
    }
}

fn settings(directory: &Path, lines: &mut BTreeSet<String>) -> Result<()> {
    for entry in std::fs::read_dir(directory)?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            settings(&path, lines)?;
        } else if let Ok(value) = std::fs::read_to_string(&path) {
            lines.insert(format!("setting {} = {}", path.display(), value.trim()));
        }
    }
    Ok(())
}
