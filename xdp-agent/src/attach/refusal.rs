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
    /// The device merges or finishes frames before XDP could see them.
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
        let kind = classify(errno, text.as_deref().unwrap_or_default(), mtu);
        Self { mode, kind, errno, text, mtu }
    }

    /// What would change the driver's mind.
    pub const fn remedy(&self) -> &'static str {
        match self.kind {
            RefusalKind::Busy => "take the other program off (`ip link set dev IFACE xdp off`)",
            RefusalKind::Permission => "grant CAP_NET_ADMIN and CAP_BPF in the first user namespace",
            RefusalKind::Unsupported => "none needed: this driver has no native XDP",
            RefusalKind::Mtu => {
                "lower the MTU to the driver's limit (often 3498), or use a kernel whose driver has frags"
            }
            RefusalKind::Offloads => {
                "turn the guest offloads off (`ethtool -K IFACE lro off gro off`, or guest_tso4=off,guest_tso6=off,\
                 guest_ecn=off,guest_ufo=off,guest_csum=off in the hypervisor)"
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
    pub const fn may_frags_help(&self) -> bool {
        match self.kind {
            RefusalKind::Mtu | RefusalKind::Other => true,
            RefusalKind::Busy
            | RefusalKind::Permission
            | RefusalKind::Unsupported
            | RefusalKind::Offloads
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
            RefusalKind::Offloads => "guest offloads are on",
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

fn classify(errno: i32, text: &str, mtu: u32) -> RefusalKind {
    let text = text.to_ascii_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    match errno {
        libc::EBUSY | libc::EEXIST => RefusalKind::Busy,
        libc::EPERM | libc::EACCES => RefusalKind::Permission,
        libc::ENODEV | libc::ENXIO => RefusalKind::Gone,
        // The words first: drivers disagree about the numbers.
        _ if says(&["lro", "gro_hw", "csum", "rsc", "header split", "offload"]) => RefusalKind::Offloads,
        _ if says(&["queue", "rings", "channels"]) => RefusalKind::Queues,
        _ if says(&["mtu", "frame size", "too large", "single-buffer", "single buffer", "frags"]) => {
            RefusalKind::Mtu
        }
        libc::EOPNOTSUPP => RefusalKind::Unsupported,
        libc::ENOMEM | libc::ENOSPC => RefusalKind::Memory,
        // Drivers that give no reason mean a long MTU by these; a page less headroom and tail is the usual limit.
        libc::EINVAL | libc::ERANGE | libc::E2BIG if mtu > 3_498 => RefusalKind::Mtu,
        _ => RefusalKind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_refusals_are_classified() {
        // errno and extended acknowledgement as drivers give them, with the MTU at the time.
        for (errno, text, mtu, kind) in [
            (libc::EBUSY, "XDP program already attached", 1500, RefusalKind::Busy),
            (
                libc::EEXIST,
                "Native and generic XDP can't be active at the same time",
                1500,
                RefusalKind::Busy,
            ),
            (libc::EPERM, "", 1500, RefusalKind::Permission),
            (
                libc::EOPNOTSUPP,
                "Underlying driver does not support XDP in native mode",
                1500,
                RefusalKind::Unsupported,
            ),
            (libc::EOPNOTSUPP, "", 1500, RefusalKind::Unsupported),
            (libc::ERANGE, "Peer MTU is too large to set XDP", 9000, RefusalKind::Mtu),
            (libc::EINVAL, "MTU requires frame size larger than page", 9000, RefusalKind::Mtu),
            (libc::EINVAL, "single-buffer XDP requires MTU less than 3506", 9000, RefusalKind::Mtu),
            (libc::EINVAL, "MTU too large to enable XDP", 3818, RefusalKind::Mtu),
            (libc::EINVAL, "", 9001, RefusalKind::Mtu),
            (libc::EINVAL, "", 1500, RefusalKind::Other),
            (
                libc::EOPNOTSUPP,
                "virtio_net: Can't set XDP while host is implementing GRO_HW/CSUM, disable GRO_HW/CSUM first",
                1500,
                RefusalKind::Offloads,
            ),
            (
                libc::EOPNOTSUPP,
                "Can't set XDP while host is implementing LRO, disable LRO first",
                1500,
                RefusalKind::Offloads,
            ),
            (libc::ENOMEM, "Too few free TX rings available", 1500, RefusalKind::Queues),
            (libc::EINVAL, "Failed to set XDP: too many channels", 1500, RefusalKind::Queues),
            (libc::ENOMEM, "", 1500, RefusalKind::Memory),
            (libc::ENODEV, "", 1500, RefusalKind::Gone),
        ] {
            let text = Some(text.to_owned()).filter(|text| !text.is_empty());
            let refusal = Refusal::new(Mode::Native, errno, text, mtu);
            assert_eq!(refusal.kind, kind, "{refusal}");
            assert!(!refusal.remedy().is_empty());
        }
    }

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
}
