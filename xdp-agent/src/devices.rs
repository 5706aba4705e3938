//! What the datapath is told about the managed interfaces.

use serde::Serialize;
use xdp_common::tables::{Device, device};

use crate::{
    cluster::wanted::IpAddress,
    host::{Host, Link},
    netdev,
};

/// How XDP runs on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// In the driver.
    Native,
    /// In the driver, with frames in several buffers.
    NativeFrags,
    /// In the stack.
    Generic,
    /// On the network card.
    Offload,
    /// Not at XDP: programs of tc alone, on the devices of overlays.
    Tc,
    /// Not at all: the interface is not there now.
    Absent,
}

impl Mode {
    /// Every mode, for metrics.
    pub const ALL: [Self; 6] =
        [Self::Native, Self::NativeFrags, Self::Generic, Self::Offload, Self::Tc, Self::Absent];

    /// The metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::NativeFrags => "native-frags",
            Self::Generic => "generic",
            Self::Offload => "offload",
            Self::Tc => "tc",
            Self::Absent => "absent",
        }
    }

    /// Whether the driver runs the program.
    pub const fn is_native(self) -> bool {
        matches!(self, Self::Native | Self::NativeFrags)
    }
}

/// Whether translated frames may leave an interface at XDP, or must take the kernel's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Transmit {
    /// Back out of the interface they came in by.
    pub transmit: bool,
    /// Out of this interface, from another.
    pub redirect: bool,
}

/// What an interface can do in a mode; `features` are the driver's, `None` on kernels before 6.3.
///
/// A veth hands frames to its peer, which must run NAPI to take them: it does once it carries an XDP program of its own.
/// Frames sent before are lost without a trace, so a veth whose peer is not known to be ready takes the kernel's way.
pub fn transmit(link: &Link, mode: Mode, features: Option<u64>) -> Transmit {
    let is_veth = link.kind == "veth";
    let takes_redirects = features.map_or(mode.is_native() && !is_veth, |bits| bits & netdev::NDO_XMIT != 0);
    match mode {
        Mode::Native | Mode::NativeFrags => {
            Transmit { transmit: !is_veth || takes_redirects, redirect: takes_redirects }
        }
        // A card knows no other device.
        Mode::Offload => Transmit { transmit: true, redirect: false },
        // Generic XDP sends by the ordinary way of the device.
        Mode::Generic => Transmit { transmit: true, redirect: takes_redirects },
        Mode::Tc | Mode::Absent => Transmit { transmit: false, redirect: false },
    }
}

/// The map entry of an interface.
pub fn device<A: IpAddress>(link: &Link, snat: A, mode: Mode, transmit: Transmit) -> Device<A> {
    let flag = |is_set: bool, bit: u32| if is_set { bit } else { 0 };
    Device {
        snat,
        flags: flag(transmit.transmit, device::TRANSMIT)
            | flag(transmit.redirect, device::REDIRECT)
            | flag(mode == Mode::Generic, device::GENERIC)
            // Through an overlay answers come back by the kernel, which must see both directions of a connection.
            | flag(link.is_ethernet && mode != Mode::Tc, device::ETHERNET)
            | flag(mode == Mode::Tc, device::WITHOUT_XDP),
        mtu: link.mtu,
        mac: link.mac,
        zero: [0; 2],
    }
}

/// The same for an interface in several networks.
pub fn in_several<A>(mut device: Device<A>) -> Device<A> {
    device.flags |= device::SEVERAL;
    device
}

/// The map entry that stands for the devices of all pods.
pub fn of_pods<A: IpAddress>(snat: A) -> Device<A> {
    Device { snat, flags: 0, mtu: 0, mac: [0; 6], zero: [0; 2] }
}

/// The driver's features of an interface, `None` on kernels that do not say.
pub fn features(host: &Host, index: u32) -> Option<u64> {
    host.features.as_ref().map(|features| features.get(&index).copied().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(kind: &str) -> Link {
        Link {
            index: 2,
            name: "eth0".to_owned(),
            is_ethernet: true,
            mtu: 1500,
            kind: kind.to_owned(),
            ..Link::default()
        }
    }

    #[test]
    fn a_native_veth_sends_only_to_a_peer_that_is_ready() {
        for (kind, mode, features, transmits, redirects) in [
            ("veth", Mode::Native, Some(3), false, false),
            ("veth", Mode::Native, Some(3 | netdev::NDO_XMIT), true, true),
            ("veth", Mode::Native, None, false, false),
            ("veth", Mode::NativeFrags, None, false, false),
            ("veth", Mode::Generic, None, true, false),
            ("veth", Mode::Generic, Some(3), true, false),
            ("", Mode::Native, None, true, true),
            ("", Mode::Native, Some(3), true, false),
            ("", Mode::Generic, None, true, false),
            ("", Mode::Absent, Some(7), false, false),
        ] {
            let found = transmit(&link(kind), mode, features);
            let wanted = Transmit { transmit: transmits, redirect: redirects };
            assert_eq!(found, wanted, "{kind} {mode:?} {features:?}");
        }
    }

    #[test]
    fn a_device_says_what_the_decision_asks() {
        let both = Transmit { transmit: true, redirect: false };
        let entry = device(&link(""), [192, 0, 2, 1], Mode::Generic, both);
        assert_eq!(entry.flags, device::TRANSMIT | device::GENERIC | device::ETHERNET);
        assert_eq!((entry.snat, entry.mtu), ([192, 0, 2, 1], 1500));
        let neither = transmit(&link("vxlan"), Mode::Tc, Some(3));
        assert_eq!(device(&link("vxlan"), [192, 0, 2, 1], Mode::Tc, neither).flags, device::WITHOUT_XDP);
    }
}
