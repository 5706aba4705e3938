//! What the kernel's network looks like: links and addresses, kept current message by message.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::netlink::{Message, Refused, Requests, attributes, number_u16, number_u32, string};

pub(crate) mod routes;
mod sources;

/// rtnetlink message types (include/uapi/linux/rtnetlink.h).
pub mod rtm {
    /// A link is there or has changed.
    pub const NEWLINK: u16 = 16;
    /// A link is gone.
    pub const DELLINK: u16 = 17;
    /// Asks for links.
    pub const GETLINK: u16 = 18;
    /// Changes a link.
    pub const SETLINK: u16 = 19;
    /// An address is there.
    pub const NEWADDR: u16 = 20;
    /// An address is gone.
    pub const DELADDR: u16 = 21;
    /// Asks for addresses.
    pub const GETADDR: u16 = 22;
    /// A route is there.
    pub const NEWROUTE: u16 = 24;
    /// A route is gone.
    pub const DELROUTE: u16 = 25;
    /// Asks for routes.
    pub const GETROUTE: u16 = 26;
    /// A neighbour is there or has changed.
    pub const NEWNEIGH: u16 = 28;
    /// A neighbour is gone.
    pub const DELNEIGH: u16 = 29;
    /// Asks for neighbours.
    pub const GETNEIGH: u16 = 30;
    /// A rule is there.
    pub const NEWRULE: u16 = 32;
    /// A rule is gone.
    pub const DELRULE: u16 = 33;
    /// Asks for rules.
    pub const GETRULE: u16 = 34;
}

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_ATTACHED: u16 = 2;
const IFLA_XDP_PROG_ID: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// Of IPv6: a temporary one (RFC 8981).
const IFA_F_SECONDARY: u8 = 0x01;
const IFA_F_DADFAILED: u8 = 0x08;
const IFA_F_DEPRECATED: u8 = 0x20;
const IFA_F_TENTATIVE: u8 = 0x40;
const AF_UNSPEC: u8 = 0;
/// Address families that are followed.
pub(crate) const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];
const ARPHRD_ETHER: u16 = 1;

/// How an XDP program is attached (`XDP_ATTACHED_*`, include/uapi/linux/if_link.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XdpState {
    /// 0 none, 1 native, 2 generic, 3 offloaded, 4 several.
    pub attached: u8,
    /// Id of the program, 0 for none.
    pub program: u32,
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MAC address, zero when it has none of that length.
    pub mac: [u8; 6],
    /// Its MTU in bytes of IP packet.
    pub mtu: u32,
    /// Whether it is switched on (`IFF_UP`), with a carrier or without.
    pub is_up: bool,
    /// Whether it is the loopback.
    pub is_loopback: bool,
    /// Whether its frames have an Ethernet header.
    pub is_ethernet: bool,
    /// Its kind (`veth`, `vxlan`), empty for hardware.
    pub kind: String,
    /// Its XDP program.
    pub xdp: XdpState,
}

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub addr: IpAddr,
    /// What its network is that of: the address itself, or the other end's of a point-to-point link.
    pub peer: IpAddr,
    /// Prefix length of that network.
    pub len: u8,
    /// 0 for the whole world (`RT_SCOPE_UNIVERSE`).
    pub scope: u8,
    /// Whether another address is better for new connections: one of the same network came first, or this one is temporary
    /// or deprecated.
    pub is_secondary: bool,
    /// Whether it may not be used, or not yet (RFC 4862, section 5.4).
    pub is_tentative: bool,
}

/// Links and addresses of a network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Links by index.
    pub links: BTreeMap<u32, Link>,
    /// Addresses by interface, in the kernel's order.
    pub addresses: BTreeMap<u32, Vec<Address>>,
    /// Whether rules of the routing policy look at more than the destination.
    pub has_policy_routing: bool,
    /// Whether there has been a route whose next hop depends on more than the destination.
    pub has_several_ways: bool,
    /// What drivers can do at XDP, by interface (see [`crate::netdev`]); `None` on kernels that do not say.
    pub features: Option<BTreeMap<u32, u64>>,
}

/// What a message has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Next hops that were resolved before may be wrong.
    pub routing: bool,
    /// Links or addresses are not what they were.
    pub devices: bool,
}

impl Host {
    /// Reads links and addresses.
    ///
    /// # Errors
    /// When the kernel refuses a dump.
    pub fn read(requests: &mut Requests) -> Result<Self, Refused> {
        let mut host = Self::default();
        let addresses = FAMILIES.map(|family| (rtm::GETADDR, family, 8));
        for (kind, family, length) in [(rtm::GETLINK, AF_UNSPEC, 16)].into_iter().chain(addresses) {
            host.take_in(requests, kind, family, length)?;
        }
        Ok(host)
    }

    /// Reads what next hops depend on: rules, and routes, of which there may be many.
    ///
    /// # Errors
    /// When the kernel refuses a dump.
    pub fn read_routing(&mut self, requests: &mut Requests) -> Result<(), Refused> {
        for family in FAMILIES {
            self.take_in(requests, rtm::GETROUTE, family, routes::HEADER_LEN)?;
        }
        self.has_policy_routing = routes::read_policy(requests)?;
        Ok(())
    }

    /// Takes a dump in; the header of its request has this length and is zero but for the family.
    fn take_in(
        &mut self,
        requests: &mut Requests,
        kind: u16,
        family: u8,
        length: usize,
    ) -> Result<(), Refused> {
        let mut body = vec![0; length];
        body[0] = family;
        for message in requests.dump(kind, &body)? {
            self.apply(&message);
        }
        Ok(())
    }

    /// Takes a message in.
    pub fn apply(&mut self, message: &Message) -> Change {
        let body = message.body.as_slice();
        match message.kind {
            rtm::NEWLINK => self.new_link(body).unwrap_or_default(),
            rtm::DELLINK => self.del_link(body).unwrap_or_default(),
            rtm::NEWADDR | rtm::DELADDR => self.address(message.kind, body).unwrap_or_default(),
            rtm::NEWROUTE | rtm::DELROUTE | rtm::NEWRULE | rtm::DELRULE => {
                let routing = body.first().is_some_and(|family| FAMILIES.contains(family));
                let has_several = routing && message.kind == rtm::NEWROUTE && routes::has_several_ways(body);
                let devices = has_several && !self.has_several_ways;
                self.has_several_ways |= has_several;
                Change { routing, devices }
            }
            _ => Change::default(),
        }
    }

    /// The link of a name.
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.values().find(|link| link.name == name)
    }

    /// Every address of the node.
    pub fn own_addresses(&self) -> BTreeSet<IpAddr> {
        self.addresses.values().flatten().map(|address| address.addr).collect()
    }

    fn new_link(&mut self, body: &[u8]) -> Option<Change> {
        let (family, layer) = (*body.first()?, number_u16(body, 2)?);
        // A bridge speaks of its ports in messages of its own family, which say nothing of the link itself.
        if family != AF_UNSPEC {
            return None;
        }
        let (index, flags) = (number_u32(body, 4)?, number_u32(body, 8)?);
        let mut link = Link {
            index,
            is_up: flags & libc::IFF_UP as u32 != 0,
            is_loopback: flags & libc::IFF_LOOPBACK as u32 != 0,
            is_ethernet: layer == ARPHRD_ETHER,
            ..Link::default()
        };
        for (kind, value) in attributes(body.get(16..)?) {
            match kind {
                IFLA_ADDRESS => link.mac = value.try_into().unwrap_or_default(),
                IFLA_IFNAME => link.name = string(value),
                IFLA_MTU => link.mtu = number_u32(value, 0)?,
                IFLA_LINKINFO => {
                    let info = attributes(value).find(|(kind, _)| *kind == IFLA_INFO_KIND);
                    link.kind = info.map(|(_, kind)| string(kind)).unwrap_or_default();
                }
                IFLA_XDP => link.xdp = xdp_state(value),
                _ => {}
            }
        }
        let old = self.links.get(&index);
        let is_same_device = old.is_some_and(|old| Link { xdp: link.xdp, ..old.clone() } == link);
        if old == Some(&link) {
            return None;
        }
        self.links.insert(index, link);
        Some(Change { routing: !is_same_device, devices: true })
    }

    fn del_link(&mut self, body: &[u8]) -> Option<Change> {
        if *body.first()? != AF_UNSPEC {
            return None;
        }
        let index = number_u32(body, 4)?;
        self.links.remove(&index)?;
        self.addresses.remove(&index);
        if let Some(features) = &mut self.features {
            features.remove(&index);
        }
        Some(Change { routing: true, devices: true })
    }

    fn address(&mut self, kind: u16, body: &[u8]) -> Option<Change> {
        let family = *body.first()?;
        if !FAMILIES.contains(&family) {
            return None;
        }
        let (len, flags, scope, index) = (*body.get(1)?, *body.get(2)?, *body.get(3)?, number_u32(body, 4)?);
        let (mut addr, mut peer) = (None, None);
        for (kind, value) in attributes(body.get(8..)?) {
            let value = ip_address(value);
            match kind {
                // Of a point-to-point link the other end's; the local one is its own then.
                IFA_ADDRESS => (addr, peer) = (addr.or(value), value),
                IFA_LOCAL => addr = value,
                _ => {}
            }
        }
        let address = Address {
            addr: addr?,
            peer: peer.or(addr)?,
            len,
            scope,
            is_secondary: flags & (IFA_F_SECONDARY | IFA_F_DEPRECATED) != 0,
            is_tentative: flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED) != 0,
        };
        let addresses = self.addresses.entry(index).or_default();
        let before = addresses.clone();
        match addresses.iter().position(|other| other.is_same(&address)) {
            Some(at) if kind == rtm::NEWADDR => addresses[at] = address,
            Some(at) => drop(addresses.remove(at)),
            None if kind == rtm::NEWADDR => addresses.push(address),
            None => {}
        }
        let changed = *addresses != before;
        Some(Change { routing: changed, devices: changed })
    }
}

impl Address {
    /// Whether another message is about this address: an interface can have one of IPv4 several times, with other networks
    /// (`inet_rtm_deladdr` in net/ipv4/devinet.c), but of IPv6 once.
    fn is_same(&self, other: &Self) -> bool {
        let is_same_network = (self.len, self.peer) == (other.len, other.peer);
        self.addr == other.addr && (is_same_network || self.addr.is_ipv6())
    }

    /// Whether packets from it are answered from anywhere: RFC 3927 and RFC 4291 (section 2.5.6) addresses are not routed.
    fn is_global(&self) -> bool {
        let is_link_local = match self.addr {
            IpAddr::V4(addr) => addr.is_link_local(),
            IpAddr::V6(addr) => addr.is_unicast_link_local(),
        };
        self.scope == 0 && !is_link_local && !self.is_tentative
    }
}

/// An address in an attribute, of the family that its length says.
pub(crate) fn ip_address(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => <[u8; 4]>::try_from(value).ok().map(|octets| Ipv4Addr::from(octets).into()),
        16 => <[u8; 16]>::try_from(value).ok().map(|octets| Ipv6Addr::from(octets).into()),
        _ => None,
    }
}

/// Attributes of a rule that say where it leads, and the destination (`FRA_*`, include/uapi/linux/fib_rules.h): DST, GOTO,
/// PRIORITY, FLOW, SUPPRESS_IFGROUP, SUPPRESS_PREFIXLEN, TABLE, PAD, PROTOCOL. Any other selects by something else.
const DESTINATION_ONLY: [u16; 9] = [1, 4, 6, 11, 13, 14, 15, 18, 21];

fn looks_at_destination_only(body: &[u8]) -> bool {
    // struct fib_rule_hdr: source prefix length and type of service select too.
    let selects_in_header = body.get(2..4).is_none_or(|selectors| selectors != [0, 0]);
    let mut attributes = attributes(body.get(12..).unwrap_or_default());
    !selects_in_header && attributes.all(|(kind, _)| DESTINATION_ONLY.contains(&kind))
}

fn xdp_state(value: &[u8]) -> XdpState {
    let mut state = XdpState::default();
    for (kind, value) in attributes(value) {
        match kind {
            IFLA_XDP_ATTACHED => state.attached = value.first().copied().unwrap_or(0),
            IFLA_XDP_PROG_ID => state.program = number_u32(value, 0).unwrap_or(0),
            _ => {}
        }
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cluster::wanted::Ip6, cluster::wanted::IpAddress, netlink::put_attribute};

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    const AF_INET: u8 = libc::AF_INET as u8;
    const AF_INET6: u8 = libc::AF_INET6 as u8;

    fn address(kind: u16, addr: [u8; 4], scope: u8, flags: u8) -> Message {
        let mut body = vec![AF_INET, 24, flags, scope];
        body.extend_from_slice(&2u32.to_ne_bytes());
        put_attribute(&mut body, IFA_ADDRESS, &addr);
        put_attribute(&mut body, IFA_LOCAL, &addr);
        Message { kind, body }
    }

    fn link(family: u8, kind: u16, mtu: u32, program: u32) -> Message {
        let mut body = vec![family, 0];
        body.extend_from_slice(&ARPHRD_ETHER.to_ne_bytes());
        body.extend_from_slice(&2u32.to_ne_bytes());
        body.extend_from_slice(&((libc::IFF_UP | libc::IFF_RUNNING) as u32).to_ne_bytes());
        body.extend_from_slice(&[0; 4]);
        put_attribute(&mut body, IFLA_IFNAME, b"eth0\0");
        put_attribute(&mut body, IFLA_MTU, &mtu.to_ne_bytes());
        put_attribute(&mut body, IFLA_ADDRESS, &MAC);
        let mut xdp = Vec::new();
        put_attribute(&mut xdp, IFLA_XDP_ATTACHED, &[1]);
        put_attribute(&mut xdp, IFLA_XDP_PROG_ID, &program.to_ne_bytes());
        put_attribute(&mut body, IFLA_XDP, &xdp);
        Message { kind, body }
    }

    #[test]
    fn the_source_address_is_the_first_global_primary_one() {
        let mut host = Host::default();
        assert!(host.apply(&address(rtm::NEWADDR, [169, 254, 1, 1], 0, 0)).devices);
        assert_eq!(host.source_address::<[u8; 4]>(2), None, "link-local");
        host.apply(&address(rtm::NEWADDR, [10, 0, 0, 3], 253, 0));
        assert_eq!(host.source_address::<[u8; 4]>(2), None, "scope link");
        host.apply(&address(rtm::NEWADDR, [10, 0, 0, 2], 0, IFA_F_SECONDARY));
        host.apply(&address(rtm::NEWADDR, [192, 0, 2, 1], 0, 0));
        assert_eq!(host.source_address::<[u8; 4]>(2), Some([192, 0, 2, 1]));
        assert!(!host.apply(&address(rtm::NEWADDR, [192, 0, 2, 1], 0, 0)).devices, "known already");
        host.apply(&address(rtm::DELADDR, [192, 0, 2, 1], 0, 0));
        assert_eq!(
            host.source_address::<[u8; 4]>(2),
            Some([10, 0, 0, 2]),
            "a secondary one is better than none"
        );
    }

    #[test]
    fn an_address_that_an_interface_has_twice_goes_when_both_are_gone() {
        let of_length = |kind, len| {
            let mut message = address(kind, [192, 0, 2, 1], 0, 0);
            message.body[1] = len;
            message
        };
        let mut host = Host::default();
        let source = |host: &Host| host.source_address::<[u8; 4]>(2);
        // As the length of a prefix is changed without losing the address.
        host.apply(&of_length(rtm::NEWADDR, 24));
        host.apply(&of_length(rtm::NEWADDR, 23));
        assert!(host.apply(&of_length(rtm::DELADDR, 24)).devices);
        assert_eq!((source(&host), host.own_addresses().len()), (Some([192, 0, 2, 1]), 1));
        assert!(!host.apply(&of_length(rtm::DELADDR, 22)).devices, "there is none");
        host.apply(&of_length(rtm::DELADDR, 23));
        assert_eq!((source(&host), host.own_addresses().len()), (None, 0));
    }

    #[test]
    fn the_source_address_of_ipv6_is_neither_link_local_nor_tentative_and_rather_not_temporary() {
        let address = |addr: &str, scope: u8, flags: u8| {
            let mut body = vec![AF_INET6, 64, flags, scope];
            body.extend_from_slice(&2u32.to_ne_bytes());
            put_attribute(&mut body, IFA_ADDRESS, &addr.parse::<Ipv6Addr>().unwrap().octets());
            Message { kind: rtm::NEWADDR, body }
        };
        let mut host = Host::default();
        let source = |host: &Host| host.source_address::<Ip6>(2).map(|addr| addr.to_ip().to_string());
        host.apply(&address("fe80::1", 253, 0));
        host.apply(&address("2001:db8::7", 0, IFA_F_TENTATIVE));
        assert_eq!((source(&host), host.has_source_address(2)), (None, false));
        host.apply(&address("2001:db8::8", 0, IFA_F_SECONDARY));
        assert_eq!(source(&host).as_deref(), Some("2001:db8::8"), "a temporary one is better than none");
        host.apply(&address("2001:db8::7", 0, 0));
        assert_eq!(source(&host).as_deref(), Some("2001:db8::7"));
        assert_eq!(host.source_address::<[u8; 4]>(2), None);
        assert_eq!(host.own_addresses().len(), 3);
    }

    #[test]
    fn our_own_program_on_a_link_does_not_change_routing() {
        let mut host = Host::default();
        assert!(host.apply(&link(AF_UNSPEC, rtm::NEWLINK, 1500, 0)).routing);
        assert_eq!(
            host.apply(&link(AF_UNSPEC, rtm::NEWLINK, 1500, 7)),
            Change { routing: false, devices: true }
        );
        assert_eq!(host.link("eth0").map(|link| link.xdp.program), Some(7));
        assert_eq!(host.apply(&link(AF_UNSPEC, rtm::NEWLINK, 1500, 7)), Change::default());
        assert!(host.apply(&link(AF_UNSPEC, rtm::NEWLINK, 1400, 7)).routing);
    }

    #[test]
    fn leaving_a_bridge_is_not_the_end_of_a_link() {
        let mut host = Host::default();
        host.apply(&link(AF_UNSPEC, rtm::NEWLINK, 1500, 0));
        host.apply(&address(rtm::NEWADDR, [192, 0, 2, 1], 0, 0));
        assert_eq!(host.apply(&link(libc::AF_BRIDGE as u8, rtm::DELLINK, 1500, 0)), Change::default());
        assert!(host.link("eth0").is_some());
        assert!(host.apply(&link(AF_UNSPEC, rtm::DELLINK, 1500, 0)).devices);
        assert_eq!(host, Host::default());
    }

    #[test]
    fn a_rule_that_selects_by_more_than_the_destination_is_noticed() {
        let rule = |source_length: u8, attribute: u16| {
            let mut body = vec![AF_INET, 0, source_length, 0, 254, 0, 0, 1, 0, 0, 0, 0];
            put_attribute(&mut body, 15, &254u32.to_ne_bytes());
            put_attribute(&mut body, attribute, &[0; 4]);
            body
        };
        assert!(looks_at_destination_only(&rule(0, 6)), "the default rules");
        assert!(!looks_at_destination_only(&rule(24, 2)), "from a network");
        assert!(!looks_at_destination_only(&rule(0, 10)), "fwmark");
        assert!(!looks_at_destination_only(&rule(0, 3)), "iif");
        assert!(!looks_at_destination_only(&[]), "unreadable");
    }

    #[test]
    fn a_truncated_message_changes_nothing() {
        let mut host = Host::default();
        let whole = link(AF_UNSPEC, rtm::NEWLINK, 1500, 0);
        for length in 0..16 {
            let message = Message { kind: whole.kind, body: whole.body[..length].to_vec() };
            assert_eq!(host.apply(&message), Change::default());
        }
    }
}
