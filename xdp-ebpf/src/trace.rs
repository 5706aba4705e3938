//! Debug tracing through aya-log, in builds with the feature `trace`: a line for every frame that is ours.

use aya_ebpf::EbpfContext;
use aya_log_ebpf::debug;
use xdp_common::{
    net::FlowKey,
    verdict::{Action, Verdict},
};

/// Logs what becomes of a frame; silent about frames that pass.
#[inline(never)] // a frame of its own on a stack of 512 bytes
pub(crate) fn verdict<C: EbpfContext>(
    ctx: &C,
    hook: &str,
    key: &FlowKey<[u8; 4]>,
    verdict: &Verdict<[u8; 4]>,
) {
    let what = match verdict.action {
        Action::Pass => return,
        Action::Drop(reason) => reason.label(),
        Action::Reject(reason) => reason.label(),
        Action::Stack => "to the stack",
        Action::Transmit => "transmitted",
        Action::Redirect => "redirected",
    };
    let rewrite = &verdict.rewrite;
    debug!(
        ctx,
        "{} {:i}:{} > {:i}:{} {}, as {:i}:{} > {:i}:{}",
        hook,
        u32::from_be_bytes(key.src),
        u16::from_be_bytes(key.sport),
        u32::from_be_bytes(key.dst),
        u16::from_be_bytes(key.dport),
        what,
        u32::from_be_bytes(rewrite.src),
        u16::from_be_bytes(rewrite.sport),
        u32::from_be_bytes(rewrite.dst),
        u16::from_be_bytes(rewrite.dport)
    );
}
