//! Why a driver will not run XDP, and what would change its mind.

use std::fmt;

use crate::devices::Mode;

/// What sort of refusal it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// Another program is there.
    Busy,
    /// This process may not.
    Permission,
    /// The driver has no native XDP.
    Unsupported,
    /// Frames can be longer than one buffer of the driver.
    Mtu,
    /// The device merges, finishes or splits frames before XDP could see them.
    Offloads,
    /// The driver has too few queues left to give XDP its own.
    Queues,
    /// The kernel has not enough memory.
    Memory,
    /// The interface is gone.
    Gone,
    /// Anything else.
    Other,
}

/// A refusal, in the driver's words where it has some.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The mode that was asked for.
    pub mode: Mode,
    /// What sort of refusal it is.
    pub kind: RefusalKind,
    /// The errno.
    pub errno: i32,
    /// What the driver said (extended acknowledgement).
    pub text: Option<String>,
    /// MTU of the interface, for the message.
    pub mtu: u32,
}

impl Refusal {
    /// Classifies a refusal.
    pub fn new(mode: Mode, errno: i32, text: Option<String>, mtu: u32) -> Self {
        let kind = match (mode, errno, &text) {
            // Without words there is nothing that a long MTU, or another setting, could be told by.
            (Mode::Offload, libc::EINVAL | libc::EOPNOTSUPP, None) => RefusalKind::Unsupported,
            _ => classify(errno, text.as_deref().unwrap_or_default(), mtu),
        };
        Self { mode, kind, errno, text, mtu }
    }

    /// What would change the driver's mind.
    pub const fn remedy(&self) -> &'static str {
        match self.kind {
            RefusalKind::Busy => "take the other program off (`ip link set dev IFACE xdp off`)",
            RefusalKind::Permission => "grant CAP_NET_ADMIN and CAP_BPF in the first user namespace",
            RefusalKind::Unsupported if matches!(self.mode, Mode::Offload) => {
                "choose another --mode: no card is known that takes these programs"
            }
            RefusalKind::Unsupported => {
                "none needed: the driver has no native XDP, or not for a device that is set up so"
            }
            RefusalKind::Mtu => {
                "lower the MTU to the driver's limit (often 3498), or use a kernel whose driver has frags"
            }
            RefusalKind::Offloads => {
                "turn the offloads off that are named (`ethtool -K IFACE lro off rx-gro-hw off`, `ethtool -G IFACE \
                 tcp-data-split off`, or guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off,guest_csum=off in the \
                 hypervisor)"
            }
            RefusalKind::Queues => {
                "use fewer channels (`ethtool -L IFACE combined N`), or give the device more queues"
            }
            RefusalKind::Memory => "free memory, or use smaller rings (`ethtool -G IFACE rx N tx N`)",
            RefusalKind::Gone => "none: the interface is gone",
            RefusalKind::Other => "see the kernel's log",
        }
    }

    /// Whether another native variant might fare better.
    pub fn may_frags_help(&self) -> bool {
        match self.kind {
            RefusalKind::Mtu | RefusalKind::Other => true,
            // Headers apart from their data are several buffers too; frames that were merged before are too long for any.
            RefusalKind::Offloads => self.text.as_ref().is_some_and(|text| text.contains(DATA_SPLIT)),
            RefusalKind::Busy
            | RefusalKind::Permission
            | RefusalKind::Unsupported
            | RefusalKind::Queues
            | RefusalKind::Memory
            | RefusalKind::Gone => false,
        }
    }

    /// Whether generic mode is worth a try.
    pub const fn may_generic_help(&self) -> bool {
        !matches!(self.kind, RefusalKind::Busy | RefusalKind::Permission | RefusalKind::Gone)
    }

    const fn what(&self) -> &'static str {
        match self.kind {
            RefusalKind::Busy => "another program is attached",
            RefusalKind::Permission => "not permitted",
            RefusalKind::Unsupported => "not supported by the driver",
            RefusalKind::Mtu => "MTU over the driver's limit",
            RefusalKind::Offloads => "receive offloads are on",
            RefusalKind::Queues => "too few queues",
            RefusalKind::Memory => "not enough memory",
            RefusalKind::Gone => "the interface is gone",
            RefusalKind::Other => "refused",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.mode.label(), self.what())?;
        if self.kind == RefusalKind::Mtu {
            write!(f, " ({})", self.mtu)?;
        }
        match &self.text {
            Some(text) => write!(f, " [{text}]"),
            None => write!(f, " [{}]", std::io::Error::from_raw_os_error(self.errno)),
        }
    }
}

/// What a refusal means. Its words decide where it has some, because drivers disagree about the numbers.
fn classify(errno: i32, text: &str, mtu: u32) -> RefusalKind {
    let text = text.to_ascii_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    match errno {
        // Drivers use these numbers too, for queues and for what else a device is used for.
        libc::EBUSY | libc::EEXIST
            if text.is_empty() || says(&["program", "xdp link", "native and generic"]) =>
        {
            RefusalKind::Busy
        }
        libc::EPERM | libc::EACCES => RefusalKind::Permission,
        libc::ENODEV | libc::ENXIO => RefusalKind::Gone,
        _ if says(&["re-create rx queues"]) => RefusalKind::Memory,
        _ if says(&["lro", "gro_hw", "hw-gro", "csum", "rsc", "data-split", "data split", "offload"]) => {
            RefusalKind::Offloads
        }
        _ if says(&["queue", "rings", "channels", "txqs", "not enough tx resources"]) => RefusalKind::Queues,
        _ if says(&[
            "mtu",
            "frame size",
            "too large",
            "single-buffer",
            "single buffer",
            "frags",
            "jumbo",
        ]) =>
        {
            RefusalKind::Mtu
        }
        // A kernel without XDP in the driver says so. A driver that refuses without words has it, and means the MTU.
        libc::EOPNOTSUPP if text.is_empty() && mtu > MTU_USUAL => RefusalKind::Mtu,
        libc::EOPNOTSUPP => RefusalKind::Unsupported,
        libc::ENOMEM | libc::ENOSPC => RefusalKind::Memory,
        // Drivers that give no reason mean a long MTU by these; a page less headroom and tail is the usual limit.
        libc::EINVAL | libc::ERANGE | libc::E2BIG if mtu > MTU_OF_A_PAGE => RefusalKind::Mtu,
        _ => RefusalKind::Other,
    }
}

/// How the kernel calls a device that puts headers and data into buffers of their own.
const DATA_SPLIT: &str = "tcp-data-split";

/// The longest MTU whose frames every driver with XDP takes.
const MTU_USUAL: u32 = 1_500;

/// The longest MTU whose frames fit a page beside the room that XDP needs.
const MTU_OF_A_PAGE: u32 = 3_498;

#[cfg(test)]
mod recorded;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_the_driver_said() {
        let text = Some("Peer MTU is too large to set XDP".to_owned());
        let refusal = Refusal::new(Mode::Native, libc::ERANGE, text, 9000);
        let message = refusal.to_string();
        assert_eq!(message, "native: MTU over the driver's limit (9000) [Peer MTU is too large to set XDP]");
        assert!(refusal.may_frags_help() && refusal.may_generic_help());
        let busy = Refusal::new(Mode::Native, libc::EBUSY, None, 1500);
        assert!(!busy.may_frags_help() && !busy.may_generic_help(), "never past a foreign program");
    }

    #[test]
    fn a_driver_that_runs_no_programs_on_its_card_is_told_from_a_long_mtu() {
        let refusal = Refusal::new(Mode::Offload, libc::EINVAL, None, 9000);
        assert_eq!(refusal.kind, RefusalKind::Unsupported);
        assert!(refusal.remedy().contains("--mode"), "{}", refusal.remedy());
    }

    #[test]
    fn frames_in_several_buffers_help_where_headers_are_apart_and_not_where_frames_are_merged() {
        let refusal = |text: &str| Refusal::new(Mode::Native, libc::EBUSY, Some(text.to_owned()), 1500);
        assert!(refusal("unable to install XDP to device using tcp-data-split").may_frags_help());
        assert!(!refusal("XDP is not supported when HW-GRO is on.").may_frags_help());
    }
}
