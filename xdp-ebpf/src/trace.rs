//! Debug tracing through aya-log, in builds with the feature `trace`: a line for every frame that is ours.

use aya_ebpf::EbpfContext;
use aya_log_ebpf::debug;
use xdp_common::{
    net::{Family, FlowKey, V4, V6},
    verdict::{Action, Rewrite, Verdict},
};

/// Families whose addresses can be logged.
pub(crate) trait Traced: Family {
    /// Writes a line.
    fn log<C: EbpfContext>(
        ctx: &C,
        hook: &str,
        what: &str,
        key: &FlowKey<Self::Addr>,
        rewrite: &Rewrite<Self::Addr>,
    );
}

macro_rules! traced {
    ($family:ident, $addr:expr) => {
        impl Traced for $family {
            #[inline(always)] // one caller
            fn log<C: EbpfContext>(
                ctx: &C,
                hook: &str,
                what: &str,
                key: &FlowKey<Self::Addr>,
                rewrite: &Rewrite<Self::Addr>,
            ) {
                let port = u16::from_be_bytes;
                debug!(
                    ctx,
                    "{} {:i}:{} > {:i}:{} {}, as {:i}:{} > {:i}:{}",
                    hook,
                    $addr(key.src),
                    port(key.sport),
                    $addr(key.dst),
                    port(key.dport),
                    what,
                    $addr(rewrite.src),
                    port(rewrite.sport),
                    $addr(rewrite.dst),
                    port(rewrite.dport)
                );
            }
        }
    };
}

traced!(V4, u32::from_be_bytes);
traced!(V6, xdp_common::net::Ip6::octets);

/// Logs what becomes of a frame; silent about frames that pass.
#[inline(never)] // a frame of its own on a stack of 512 bytes
pub(crate) fn verdict<F: Traced, C: EbpfContext>(
    ctx: &C,
    hook: &str,
    key: &FlowKey<F::Addr>,
    verdict: &Verdict<F::Addr>,
) {
    let what = match verdict.action {
        Action::Pass => return,
        Action::Drop(reason) => reason.label(),
        Action::Reject(reason) => reason.label(),
        Action::Stack => "to the stack",
        Action::Transmit => "transmitted",
        Action::Redirect => "redirected",
        Action::Tunnel => "tunnel",
    };
    F::log(ctx, hook, what, key, &verdict.rewrite);
}
