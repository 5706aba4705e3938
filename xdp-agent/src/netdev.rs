//! What drivers can do at XDP: the generic netlink family `netdev` (kernel 6.3, include/uapi/linux/netdev.h).

use std::{collections::BTreeMap, io};

use crate::netlink::{
    Message, Protocol, Refused, Requests, attributes, number_u32, number_u64, put_attribute, string,
};

/// Runs programs natively, and passes, drops and sends back what they say (`NETDEV_XDP_ACT_BASIC`).
pub const BASIC: u64 = 1;
/// Takes programs that know frames in several buffers (`NETDEV_XDP_ACT_RX_SG`).
pub const RX_SG: u64 = 32;
/// Takes frames that native XDP redirects to it (`NETDEV_XDP_ACT_NDO_XMIT`).
pub const NDO_XMIT: u64 = 4;

const NLCTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_CMD_DEV_ADD_NTF: u8 = 2;
const NETDEV_CMD_DEV_DEL_NTF: u8 = 3;
const NETDEV_CMD_DEV_CHANGE_NTF: u8 = 4;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
/// Length of `struct genlmsghdr`.
const GENL_HEADER: usize = 4;

/// Numbers that the kernel has given the family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Netdev {
    family: u16,
    /// Multicast group of changes.
    pub group: u32,
}

impl Netdev {
    /// Finds the family; `None` where the kernel does not have it.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub fn find() -> Result<Option<Self>, Refused> {
        let mut requests = Requests::open(Protocol::Generic)?;
        let mut body = vec![CTRL_CMD_GETFAMILY, 1, 0, 0];
        put_attribute(&mut body, CTRL_ATTR_FAMILY_NAME, b"netdev\0");
        match requests.request(NLCTRL, 0, &body) {
            Ok(answers) => Ok(answers.first().and_then(Self::from_answer)),
            Err(refused) if refused.error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(refused) => Err(refused),
        }
    }

    fn from_answer(message: &Message) -> Option<Self> {
        let (mut family, mut group) = (None, None);
        for (kind, value) in attributes(message.body.get(GENL_HEADER..)?) {
            match kind {
                CTRL_ATTR_FAMILY_ID => family = crate::netlink::number_u16(value, 0),
                CTRL_ATTR_MCAST_GROUPS => {
                    group = attributes(value).find_map(|(_, group)| management_group(group))
                }
                _ => {}
            }
        }
        Some(Self { family: family?, group: group? })
    }

    /// Features of every interface, by index.
    ///
    /// # Errors
    /// When the kernel refuses the dump.
    pub fn features(self) -> Result<BTreeMap<u32, u64>, Refused> {
        let mut requests = Requests::open(Protocol::Generic)?;
        let mut features = BTreeMap::new();
        for message in requests.dump(self.family, &[NETDEV_CMD_DEV_GET, 1, 0, 0])? {
            apply(&mut features, &message);
        }
        Ok(features)
    }
}

/// Takes a message in; whether anything changed.
pub fn apply(features: &mut BTreeMap<u32, u64>, message: &Message) -> bool {
    let Some(&command) = message.body.first() else { return false };
    let (mut ifindex, mut bits) = (None, None);
    for (kind, value) in attributes(message.body.get(GENL_HEADER..).unwrap_or_default()) {
        match kind {
            NETDEV_A_DEV_IFINDEX => ifindex = number_u32(value, 0),
            NETDEV_A_DEV_XDP_FEATURES => bits = number_u64(value, 0),
            _ => {}
        }
    }
    match (command, ifindex, bits) {
        (
            NETDEV_CMD_DEV_GET | NETDEV_CMD_DEV_ADD_NTF | NETDEV_CMD_DEV_CHANGE_NTF,
            Some(ifindex),
            Some(bits),
        ) => features.insert(ifindex, bits) != Some(bits),
        (NETDEV_CMD_DEV_DEL_NTF, Some(ifindex), _) => features.remove(&ifindex).is_some(),
        _ => false,
    }
}

fn management_group(group: &[u8]) -> Option<u32> {
    let (mut name, mut id) = (None, None);
    for (kind, value) in attributes(group) {
        match kind {
            CTRL_ATTR_MCAST_GRP_NAME => name = Some(string(value)),
            CTRL_ATTR_MCAST_GRP_ID => id = number_u32(value, 0),
            _ => {}
        }
    }
    id.filter(|_| name.as_deref() == Some("mgmt"))
}

impl From<Refused> for io::Error {
    fn from(refused: Refused) -> Self {
        Self::new(refused.error.kind(), refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(command: u8, ifindex: u32, bits: Option<u64>) -> Message {
        let mut body = vec![command, 1, 0, 0];
        put_attribute(&mut body, NETDEV_A_DEV_IFINDEX, &ifindex.to_ne_bytes());
        if let Some(bits) = bits {
            put_attribute(&mut body, NETDEV_A_DEV_XDP_FEATURES, &bits.to_ne_bytes());
        }
        Message { kind: 0x20, body }
    }

    #[test]
    fn features_follow_the_notifications() {
        let mut features = BTreeMap::new();
        assert!(apply(&mut features, &message(NETDEV_CMD_DEV_ADD_NTF, 4, Some(3))));
        assert!(!apply(&mut features, &message(NETDEV_CMD_DEV_CHANGE_NTF, 4, Some(3))), "nothing new");
        assert!(apply(&mut features, &message(NETDEV_CMD_DEV_CHANGE_NTF, 4, Some(3 | NDO_XMIT))));
        assert_eq!(features.get(&4), Some(&7));
        assert!(apply(&mut features, &message(NETDEV_CMD_DEV_DEL_NTF, 4, None)));
        assert!(features.is_empty());
        assert!(!apply(&mut features, &Message { kind: 0x20, body: vec![] }));
    }

    #[test]
    fn the_kernel_answers_for_this_namespace() {
        // Asking needs no privilege; kernels before 6.3 have nothing to say.
        if let Some(netdev) = Netdev::find().expect("generic netlink answers") {
            let features = netdev.features().expect("a dump");
            assert!(!features.is_empty(), "the loopback at least");
        }
    }
}
