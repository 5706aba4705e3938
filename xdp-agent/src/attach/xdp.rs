//! XDP on one interface: native, native with frags, generic, until one is taken; on the card where that is asked for.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    path::Path,
};

use anyhow::{Context, bail};
use tracing::{debug, info, warn};

use super::{PinnedLink, Programs, Refusal, RefusalKind, ensure_free};
use crate::{
    bpf::{self, AttachType},
    config::ModeChoice,
    devices::Mode,
    host::{Link, rtm},
    netlink::{Protocol, Requests, put_attribute},
};

/// Flags of an attachment (include/uapi/linux/if_link.h).
const XDP_FLAGS_UPDATE_IF_NOEXIST: u32 = 1;
const XDP_FLAGS_SKB_MODE: u32 = 2;
const XDP_FLAGS_DRV_MODE: u32 = 4;
const XDP_FLAGS_HW_MODE: u32 = 8;
const XDP_ATTACHED_SKB: u8 = 2;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_FD: u16 = 1;
const IFLA_XDP_FLAGS: u16 = 3;
const NLA_F_NESTED: u16 = 0x8000;

/// The kind of a bond, which hands a native program to the devices that it is made of. The kernel runs it there and calls those
/// the devices that frames come in by (`bond_xdp_set` in drivers/net/bonding/bond_main.c); addresses and routes are the bond's.
pub(crate) const BOND: &str = "bond";
/// Why it is not native on a bond.
pub(crate) const OF_BONDS: &str =
    "a bond runs programs on the devices it is made of, which have no addresses";

/// Lengths of frames that a program is tried on, in bytes: the shortest of Ethernet, the longest of its usual MTU, and between them.
const PROOF_LENGTHS: [usize; 7] = [60, 64, 128, 256, 512, 1024, 1514];
/// Where a frame has its ethertype, and one that is nobody's protocol (IEEE 802, local experimental ethertype 1).
const ETHERTYPE_AT: usize = 12;
const ETHERTYPE_OF_EXPERIMENTS: [u8; 2] = [0x88, 0xb5];
/// The verdict by which a frame goes on to the kernel (`enum xdp_action`, include/uapi/linux/bpf.h).
const XDP_PASS: u32 = 2;

const PLAIN: &str = "xdp_ingress";
pub(super) const FRAGS: &str = "xdp_ingress_frags";

/// Attaches to an interface, or takes over the link that an earlier agent has left on it. `may_stay_generic` says whether that may
/// stay in generic mode where another is not known to be refused.
///
/// # Errors
/// When no allowed mode is taken.
pub(super) fn attach(
    programs: &mut Programs,
    link: &Link,
    choice: ModeChoice,
    found: Option<bpf::Link>,
    may_stay_generic: bool,
    path: &Path,
) -> anyhow::Result<(PinnedLink, Mode, String)> {
    if let Some(found) = found {
        let is_generic = link.xdp.attached == XDP_ATTACHED_SKB;
        let is_allowed = match choice {
            ModeChoice::Auto if is_generic => may_stay_generic,
            ModeChoice::Auto => link.kind != BOND,
            ModeChoice::Native => !is_generic,
            ModeChoice::Generic => is_generic,
            // A program of a card is bound to it when it is loaded, and is not replaced.
            ModeChoice::Offload => false,
        };
        if is_allowed {
            let (mode, reason) = adopt(programs, link, &found, is_generic)?;
            return Ok((
                PinnedLink { link: found, path: path.to_path_buf(), is_adopted: true },
                mode,
                reason,
            ));
        }
        info!(interface = %link.name, "taking the program of an earlier agent off, to choose the mode anew");
        std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
        found.detach().context("cannot take the program of an earlier agent off")?;
    } else {
        ensure_free(link)?;
    }
    let (made, mode, reason) = create(programs, link, choice)?;
    if let Err(error) = made.pin(path) {
        return Err(error).with_context(|| format!("cannot pin {}", path.display()));
    }
    Ok((PinnedLink { link: made, path: path.to_path_buf(), is_adopted: false }, mode, reason))
}

/// Replaces the program of a link in one step.
fn adopt(
    programs: &mut Programs,
    link: &Link,
    found: &bpf::Link,
    is_generic: bool,
) -> anyhow::Result<(Mode, String)> {
    if is_generic {
        found.update(programs.xdp(PLAIN)?).context("cannot replace the program of an earlier agent")?;
        return Ok((
            Mode::Generic,
            "kept from an earlier agent; a start with --fresh chooses anew".to_owned(),
        ));
    }
    let refused = match found.update(programs.xdp(PLAIN)?) {
        Ok(()) => return Ok((Mode::Native, "kept from an earlier agent".to_owned())),
        Err(error) => Refusal::new(Mode::Native, error.raw_os_error().unwrap_or(0), None, link.mtu),
    };
    found
        .update(programs.xdp(FRAGS)?)
        .with_context(|| format!("cannot replace the program of an earlier agent ({refused})"))?;
    Ok((Mode::NativeFrags, format!("kept from an earlier agent; {refused}")))
}

/// Attaches in the first mode that the interface takes; nothing is pinned.
///
/// # Errors
/// When no allowed mode is taken, with every refusal.
pub(super) fn create(
    programs: &mut Programs,
    link: &Link,
    choice: ModeChoice,
) -> anyhow::Result<(bpf::Link, Mode, String)> {
    let mut refusals: Vec<Refusal> = Vec::new();
    for mode in [Mode::Offload, Mode::Native, Mode::NativeFrags, Mode::Generic] {
        if !is_worth_trying(mode, choice, refusals.last()) {
            continue;
        }
        if mode != Mode::Generic && link.kind == BOND {
            refusals.push(Refusal::new(mode, libc::EOPNOTSUPP, Some(OF_BONDS.to_owned()), link.mtu));
            continue;
        }
        let program = programs.xdp(if mode == Mode::NativeFrags { FRAGS } else { PLAIN })?;
        let flags = match mode {
            Mode::Generic => XDP_FLAGS_SKB_MODE,
            Mode::Offload => XDP_FLAGS_HW_MODE,
            Mode::Native | Mode::NativeFrags | Mode::Tc | Mode::Absent => XDP_FLAGS_DRV_MODE,
        };
        match bpf::Link::create(program, link.index, AttachType::Xdp, flags) {
            Ok(made) => return Ok((made, mode, reason(mode, choice, &refusals))),
            Err(error) => {
                let refusal = explained(program, link, mode, flags, &error);
                debug!(interface = %link.name, %refusal, remedy = refusal.remedy(), "refused");
                refusals.push(refusal);
            }
        }
    }
    let refused: Vec<String> = refusals.iter().map(Refusal::to_string).collect();
    let remedy = refusals.last().map_or("", Refusal::remedy);
    let hint = match choice {
        ModeChoice::Native => ", or allow generic mode with --mode auto",
        ModeChoice::Offload => ", or let this machine run it with --mode auto",
        ModeChoice::Auto | ModeChoice::Generic => "",
    };
    bail!("no XDP mode works: {}; remedy: {remedy}{hint}", refused.join("; "))
}

/// Runs the program that an interface has been given on frames of every length that it may get in one buffer, as if they had come in
/// by it: they are nobody's, and have to go on to the kernel as they are.
///
/// # Errors
/// When one does not.
pub(super) fn prove(programs: &mut Programs, link: &Link, mode: Mode) -> anyhow::Result<()> {
    let name = match mode {
        Mode::Native | Mode::Generic => PLAIN,
        Mode::NativeFrags => FRAGS,
        // A program of a card runs there alone.
        Mode::Offload | Mode::Tc | Mode::Absent => return Ok(()),
    };
    prove_on(programs.xdp(name)?, link)
}

/// Runs a program on frames that are nobody's, as if they had come in by the interface.
///
/// # Errors
/// When a frame does not go on to the kernel as it is.
pub fn prove_on(program: BorrowedFd<'_>, link: &Link) -> anyhow::Result<()> {
    for length in PROOF_LENGTHS {
        let mut frame = vec![0x5a; length];
        frame[ETHERTYPE_AT..ETHERTYPE_AT + 2].copy_from_slice(&ETHERTYPE_OF_EXPERIMENTS);
        match bpf::run_xdp_on_frame(program, link.index, &frame) {
            Ok((XDP_PASS, left)) if left == frame => {}
            Ok((verdict, left)) => bail!(
                "the program on {} has answered a frame of {length} bytes that is nobody's with verdict {verdict} and {} bytes, {}; \
                 it has to leave it to the kernel (please report this with the kernel's version)",
                link.name,
                left.len(),
                if left == frame { "unchanged" } else { "changed" }
            ),
            Err(error) => {
                warn!(interface = %link.name, %error, "the program cannot be tried on frames of this interface");
                return Ok(());
            }
        }
    }
    Ok(())
}

fn is_worth_trying(mode: Mode, choice: ModeChoice, last: Option<&Refusal>) -> bool {
    match (mode, choice) {
        (Mode::Native, ModeChoice::Auto | ModeChoice::Native) => true,
        (Mode::NativeFrags, ModeChoice::Auto | ModeChoice::Native) => {
            last.is_some_and(Refusal::may_frags_help)
        }
        (Mode::Generic, ModeChoice::Auto) => last.is_some_and(Refusal::may_generic_help),
        (Mode::Generic, ModeChoice::Generic) | (Mode::Offload, ModeChoice::Offload) => true,
        (Mode::Native | Mode::NativeFrags, ModeChoice::Generic | ModeChoice::Offload)
        | (Mode::Generic, ModeChoice::Native | ModeChoice::Offload)
        | (Mode::Offload, ModeChoice::Auto | ModeChoice::Native | ModeChoice::Generic)
        | (Mode::Tc | Mode::Absent, _) => false,
    }
}

fn reason(mode: Mode, choice: ModeChoice, refusals: &[Refusal]) -> String {
    if let Some(last) = refusals.last() {
        let refused: Vec<String> = refusals.iter().map(Refusal::to_string).collect();
        let refused = refused.join("; ");
        // With frags nothing is lost that a remedy would bring back.
        return if mode == Mode::Generic { format!("{refused}; remedy: {}", last.remedy()) } else { refused };
    }
    match (mode, choice) {
        (Mode::Generic, _) => "asked for by --mode generic".to_owned(),
        (Mode::Native | Mode::NativeFrags | Mode::Offload | Mode::Tc | Mode::Absent, _) => {
            "the driver takes it".to_owned()
        }
    }
}

/// The refusal with the driver's own words. A link reports only a number, the older netlink way reports the words too,
/// so it is asked for the same again.
fn explained(program: BorrowedFd<'_>, link: &Link, mode: Mode, flags: u32, error: &io::Error) -> Refusal {
    let errno = error.raw_os_error().unwrap_or(0);
    let plain = Refusal::new(mode, errno, None, link.mtu);
    // A number that stands for another program can stand for something else, with words alone; what is there stays.
    if matches!(plain.kind, RefusalKind::Permission | RefusalKind::Gone) {
        return plain;
    }
    let Ok(mut requests) = Requests::open(Protocol::Route) else { return plain };
    let asked = set_link(&mut requests, link.index, program.as_raw_fd(), flags | XDP_FLAGS_UPDATE_IF_NOEXIST);
    match asked {
        Err(refused) => Refusal::new(mode, errno, refused.text, link.mtu),
        Ok(()) => {
            // It went on after all, without a link that would survive: off with it.
            if let Err(refused) = set_link(&mut requests, link.index, -1, flags) {
                debug!(interface = %link.name, %refused, "a trial program was not taken off");
            }
            plain
        }
    }
}

fn set_link(
    requests: &mut Requests,
    ifindex: u32,
    fd: i32,
    flags: u32,
) -> Result<(), crate::netlink::Refused> {
    let mut xdp = Vec::new();
    put_attribute(&mut xdp, IFLA_XDP_FD, &fd.to_ne_bytes());
    put_attribute(&mut xdp, IFLA_XDP_FLAGS, &flags.to_ne_bytes());
    // struct ifinfomsg: family, padding, type, index, flags, change mask.
    let mut body = vec![0; 16];
    body[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    put_attribute(&mut body, IFLA_XDP | NLA_F_NESTED, &xdp);
    requests.request(rtm::SETLINK, 0, &body).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(errno: i32, mtu: u32) -> Refusal {
        Refusal::new(Mode::Native, errno, None, mtu)
    }

    #[test]
    fn modes_are_tried_in_order_and_only_where_they_may_help() {
        let unsupported = refusal(libc::EOPNOTSUPP, 1500);
        let long = refusal(libc::EINVAL, 9000);
        let busy = refusal(libc::EBUSY, 1500);
        for (mode, choice, last, wanted) in [
            (Mode::Native, ModeChoice::Auto, None, true),
            (Mode::Native, ModeChoice::Generic, None, false),
            (Mode::NativeFrags, ModeChoice::Auto, Some(&long), true),
            (Mode::NativeFrags, ModeChoice::Auto, Some(&unsupported), false),
            (Mode::Generic, ModeChoice::Auto, Some(&unsupported), true),
            (Mode::Generic, ModeChoice::Auto, Some(&busy), false),
            (Mode::Generic, ModeChoice::Native, Some(&unsupported), false),
            (Mode::Generic, ModeChoice::Generic, None, true),
            (Mode::Offload, ModeChoice::Offload, None, true),
            (Mode::Offload, ModeChoice::Auto, None, false),
            (Mode::Native, ModeChoice::Offload, Some(&unsupported), false),
            (Mode::Generic, ModeChoice::Offload, Some(&unsupported), false),
        ] {
            assert_eq!(is_worth_trying(mode, choice, last), wanted, "{mode:?} {choice:?} {last:?}");
        }
    }

    #[test]
    fn a_fallback_names_every_refusal_and_the_remedy() {
        let reason = reason(Mode::Generic, ModeChoice::Auto, &[refusal(libc::EOPNOTSUPP, 1500)]);
        assert!(
            reason.contains("native: not supported by the driver") && reason.contains("remedy"),
            "{reason}"
        );
    }
}
