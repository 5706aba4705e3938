//! Devices, addresses, routes and neighbours of a namespace, by netlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressHeaderFlags;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
use rtnetlink::packet_route::route::RouteType;
use rtnetlink::{
    LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder, RouteNextHopBuilder,
};

use super::netns::Namespace;
use super::{block_on, wait_for};

/// How long the kernel may take to tell a device that it has a carrier.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// From `linux/ethtool.h`.
const ETHTOOL_STXCSUM: u32 = 0x17;
const ETHTOOL_SGRO: u32 = 0x2c;

/// Makes a veth pair with one end in each namespace, both up.
pub fn veth(left: &Namespace, left_name: &str, right: &Namespace, right_name: &str) -> Result<()> {
    veth_with(left, left_name, right, right_name, &[])
}

/// As [`veth`], with further attributes for both ends.
pub fn veth_with(
    left: &Namespace,
    left_name: &str,
    right: &Namespace,
    right_name: &str,
    attributes: &[LinkAttribute],
) -> Result<()> {
    use std::os::fd::AsFd;
    let peer =
        LinkMessageBuilder::<LinkUnspec>::new().name(right_name).setns_by_fd(right.as_fd().as_raw_fd());
    let peer = attributes.iter().cloned().fold(peer, LinkMessageBuilder::append_extra_attribute).build();
    let message = LinkMessageBuilder::<LinkVeth>::new(left_name, right_name)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)));
    let message =
        attributes.iter().cloned().fold(message, LinkMessageBuilder::append_extra_attribute).build();
    block_on(left.netlink().link().add(message).execute())
        .with_context(|| format!("veth {left_name} in {left:?} to {right_name} in {right:?}"))?;
    left.up(left_name)?;
    right.up(right_name)
}

impl Namespace {
    /// Returns the index of a device.
    pub fn index(&self, device: &str) -> Result<u32> {
        Ok(self.link(device)?.header.index)
    }

    /// Returns the hardware address of a device.
    pub fn mac(&self, device: &str) -> Result<[u8; 6]> {
        let attributes = self.link(device)?.attributes;
        let address = attributes.iter().find_map(|attribute| {
            let LinkAttribute::Address(bytes) = attribute else { return None };
            <[u8; 6]>::try_from(bytes.as_slice()).ok()
        });
        address.with_context(|| format!("{device} in {self:?} has no Ethernet address"))
    }

    /// Returns the netlink message that describes a device.
    pub fn link(&self, device: &str) -> Result<LinkMessage> {
        let mut links = self.netlink().link().get().match_name(device.to_string()).execute();
        let found = block_on(links.try_next()).with_context(|| format!("device {device} in {self:?}"))?;
        found.with_context(|| format!("no device {device} in {self:?}"))
    }

    /// Brings a device up.
    pub fn up(&self, device: &str) -> Result<()> {
        self.change(device, |link| link.up())
    }

    /// Lets a device have addresses of IPv6.
    pub fn enable_v6(&self, device: &str) -> Result<()> {
        self.sysctl(&format!("net/ipv6/conf/{device}/disable_ipv6"), "0")
    }

    /// Takes a device down.
    pub fn down(&self, device: &str) -> Result<()> {
        self.change(device, |link| link.down())
    }

    /// Gives a device another name, while it is down.
    pub fn rename(&self, device: &str, name: &str) -> Result<()> {
        self.down(device)?;
        self.change(device, |link| link.name(name.to_owned()))?;
        self.up(name)
    }

    /// Sets the MTU of a device.
    pub fn mtu(&self, device: &str, mtu: u32) -> Result<()> {
        self.change(device, |link| link.mtu(mtu))
    }

    /// Adds a bridge that is up.
    pub fn bridge(&self, name: &str) -> Result<()> {
        block_on(self.netlink().link().add(LinkBridge::new(name).build()).execute())
            .with_context(|| format!("bridge {name} in {self:?}"))
    }

    /// Makes a device a port of a bridge.
    pub fn enslave(&self, device: &str, bridge: &str) -> Result<()> {
        let controller = self.index(bridge)?;
        self.change(device, |link| link.controller(controller))
    }

    /// Removes a device.
    pub fn delete(&self, device: &str) -> Result<()> {
        let index = self.index(device)?;
        block_on(self.netlink().link().del(index).execute())
            .with_context(|| format!("deleting {device} in {self:?}"))
    }

    /// Adds an address to a device; one of IPv6 can be used then, for which the device has to be up.
    pub fn address(&self, device: &str, address: impl Into<IpAddr>, prefix: u8) -> Result<()> {
        let (index, address) = (self.index(device)?, address.into());
        block_on(self.netlink().address().add(index, address, prefix).execute())
            .with_context(|| format!("address {address}/{prefix} on {device} in {self:?}"))?;
        if address.is_ipv4() {
            return Ok(());
        }
        // A device that has just come up is told of its carrier later, and its addresses are tentative until then.
        wait_for(&format!("{address} on {device} in {self:?}"), READY_TIMEOUT, || {
            let found = self.netlink().address().get().set_link_index_filter(index);
            let mut found = found.set_address_filter(address).execute();
            let found = block_on(found.try_next())?.context("it is not there")?;
            ensure!(!found.header.flags.contains(AddressHeaderFlags::Tentative), "it is tentative");
            Ok(())
        })
    }

    /// Takes an address from a device.
    pub fn forget_address(&self, device: &str, address: impl Into<IpAddr>) -> Result<()> {
        let (index, address) = (self.index(device)?, address.into());
        let found = self.netlink().address().get().set_link_index_filter(index);
        let mut found = found.set_address_filter(address).execute();
        let found = block_on(found.try_next())?;
        let found = found.with_context(|| format!("{address} is not on {device} in {self:?}"))?;
        block_on(self.netlink().address().del(found).execute())
            .with_context(|| format!("taking {address} from {device} in {self:?}"))
    }

    /// Adds a route through a gateway; prefix 0 is the default route.
    pub fn route_via(&self, destination: Ipv4Addr, prefix: u8, gateway: Ipv4Addr) -> Result<()> {
        let route =
            RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(destination, prefix).gateway(gateway);
        block_on(self.netlink().route().add(route.build()).execute())
            .with_context(|| format!("route {destination}/{prefix} via {gateway} in {self:?}"))
    }

    /// Adds a route of IPv6 through a gateway.
    pub fn route_via_v6(&self, destination: Ipv6Addr, prefix: u8, gateway: Ipv6Addr) -> Result<()> {
        let route =
            RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(destination, prefix).gateway(gateway);
        block_on(self.netlink().route().add(route.build()).execute())
            .with_context(|| format!("route {destination}/{prefix} via {gateway} in {self:?}"))
    }

    /// Adds the route to one host, or replaces the one there is.
    pub fn reroute_via(&self, host: IpAddr, gateway: IpAddr) -> Result<()> {
        let route = match (host, gateway) {
            (IpAddr::V4(host), IpAddr::V4(gateway)) => {
                RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(host, 32).gateway(gateway).build()
            }
            (IpAddr::V6(host), IpAddr::V6(gateway)) => {
                RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(host, 128).gateway(gateway).build()
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
                bail!("{host} and {gateway} are of different families")
            }
        };
        block_on(self.netlink().route().add(route).replace().execute())
            .with_context(|| format!("route to {host} via {gateway} in {self:?}"))
    }

    /// Adds a route of equal ways to one host of IPv4.
    pub fn route_by_either(&self, host: Ipv4Addr, gateways: &[Ipv4Addr]) -> Result<()> {
        let hops = gateways.iter().map(|&gateway| {
            let hop = RouteNextHopBuilder::new_ipv4().via(gateway.into());
            Ok(hop.with_context(|| format!("{gateway} is no gateway of IPv4"))?.build())
        });
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(host, 32)
            .multipath(hops.collect::<Result<Vec<_>>>()?);
        block_on(self.netlink().route().add(route.build()).execute())
            .with_context(|| format!("route to {host} via {gateways:?} in {self:?}"))
    }

    /// Adds a route to one host of IPv4, for packets of one type of service or, with zero, for those without a route of their own.
    pub fn route_for_service_type(&self, host: Ipv4Addr, service_type: u8, gateway: Ipv4Addr) -> Result<()> {
        let mut route =
            RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(host, 32).gateway(gateway).build();
        route.header.tos = service_type;
        block_on(self.netlink().route().add(route).execute())
            .with_context(|| format!("route to {host} for {service_type:#x} via {gateway} in {self:?}"))
    }

    /// Makes a host unreachable, whatever other routes say, or no more so.
    pub fn refuse_way(&self, host: IpAddr, is_refused: bool) -> Result<()> {
        let route = match host {
            IpAddr::V4(host) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(host, 32)
                .kind(RouteType::Unreachable)
                .build(),
            IpAddr::V6(host) => {
                let route = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(host, 128);
                // The loopback is what the kernel takes for such routes.
                route.kind(RouteType::Unreachable).output_interface(self.index("lo")?).build()
            }
        };
        let routes = self.netlink().route();
        let done = if is_refused {
            block_on(routes.add(route).execute())
        } else {
            block_on(routes.del(route).execute())
        };
        done.with_context(|| format!("unreachable {host} in {self:?}: {is_refused}"))
    }

    /// Adds a default route of IPv6.
    pub fn default_route_v6(&self, gateway: Ipv6Addr) -> Result<()> {
        let route = RouteMessageBuilder::<Ipv6Addr>::new().gateway(gateway);
        block_on(self.netlink().route().add(route.build()).execute())
            .with_context(|| format!("default route via {gateway} in {self:?}"))
    }

    /// Adds a route to destinations that are neighbours on a device.
    pub fn route_dev(&self, destination: Ipv4Addr, prefix: u8, device: &str) -> Result<()> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(destination, prefix)
            .output_interface(self.index(device)?)
            .scope(rtnetlink::packet_route::route::RouteScope::Link);
        block_on(self.netlink().route().add(route.build()).execute())
            .with_context(|| format!("route {destination}/{prefix} dev {device} in {self:?}"))
    }

    /// Removes every learned neighbour and returns how many there were.
    pub fn flush_neighbours(&self) -> Result<usize> {
        let mut removed = 0;
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let entries = self.netlink().neighbours().get().set_address_family(family).execute();
            for entry in block_on(entries.try_collect::<Vec<_>>())? {
                if matches!(
                    entry.header.state,
                    NeighbourState::Noarp | NeighbourState::Permanent | NeighbourState::None
                ) {
                    continue;
                }
                // The kernel may have dropped the entry since it was listed: the aim is reached either way.
                removed += usize::from(block_on(self.netlink().neighbours().del(entry).execute()).is_ok());
            }
        }
        Ok(removed)
    }

    /// Lists the IPv4 neighbours the kernel could send to now.
    pub fn neighbours(&self) -> Result<Vec<Ipv4Addr>> {
        let entries = self.netlink().neighbours().get().set_address_family(AddressFamily::Inet).execute();
        let entries = block_on(entries.try_collect::<Vec<_>>())?;
        let usable = entries.iter().filter(|entry| {
            !matches!(
                entry.header.state,
                NeighbourState::Incomplete
                    | NeighbourState::Failed
                    | NeighbourState::Noarp
                    | NeighbourState::None
            )
        });
        let addresses = usable.flat_map(|entry| {
            entry.attributes.iter().filter_map(|attribute| {
                let NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) = attribute else {
                    return None;
                };
                Some(*address)
            })
        });
        Ok(addresses.collect())
    }

    /// Adds a neighbour that never expires.
    pub fn static_neighbour(&self, device: &str, address: IpAddr, mac: [u8; 6]) -> Result<()> {
        let request = self.netlink().neighbours().add(self.index(device)?, address);
        block_on(request.link_layer_address(&mac).state(NeighbourState::Permanent).replace().execute())
            .with_context(|| format!("neighbour {address} on {device} in {self:?}"))
    }

    /// Adds a neighbour of IPv6 that never expires.
    pub fn static_neighbour_v6(&self, device: &str, address: Ipv6Addr, mac: [u8; 6]) -> Result<()> {
        let request = self.netlink().neighbours().add(self.index(device)?, IpAddr::V6(address));
        block_on(request.link_layer_address(&mac).state(NeighbourState::Permanent).replace().execute())
            .with_context(|| format!("neighbour {address} on {device} in {self:?}"))
    }

    /// Turns transmit checksum offload on or off; off means that frames leave with complete checksums.
    pub fn tx_offload(&self, device: &str, on: bool) -> Result<()> {
        self.set_feature(device, ETHTOOL_STXCSUM, on)
            .with_context(|| format!("tx offload of {device} in {self:?}"))
    }

    /// Has the kernel merge received segments, as it does for network cards, or not.
    pub fn gro(&self, device: &str, on: bool) -> Result<()> {
        self.set_feature(device, ETHTOOL_SGRO, on).with_context(|| format!("GRO of {device} in {self:?}"))
    }

    fn set_feature(&self, device: &str, command: u32, on: bool) -> Result<()> {
        #[repr(C)]
        struct EthtoolValue {
            command: u32,
            data: u32,
        }
        let mut value = EthtoolValue { command, data: on.into() };
        // SAFETY: an all-zero ifreq is valid; the name is filled in below.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (target, byte) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(device.bytes()) {
            *target = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        // The socket decides which namespace the request concerns.
        let socket = self.run(|| std::net::UdpSocket::bind("0.0.0.0:0"))?;
        // SAFETY: the request names a device and points to an ethtool_value, and both live through the call.
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &request) };
        if result != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(())
    }

    fn change(
        &self,
        device: &str,
        edit: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) -> Result<()> {
        let message = edit(LinkUnspec::new_with_index(self.index(device)?)).build();
        block_on(self.netlink().link().set(message).execute())
            .with_context(|| format!("changing {device} in {self:?}"))
    }
}
