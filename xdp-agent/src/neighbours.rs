//! Follows the kernel's network by netlink, and keeps the neighbours fresh that flows use.
//!
//! XDP sends past the kernel's neighbour table, so the kernel would take a busy neighbour for an idle one and forget it.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::IpAddr,
    sync::Arc,
};

use tokio::{io::unix::AsyncFd, sync::watch};
use tracing::{debug, warn};

use crate::{
    host::{FAMILIES, Host, ip_address, routes::read_policy, rtm},
    netdev::{self, Netdev},
    netlink::{
        Events, Heard, Message, Protocol, Refused, Requests, attributes, number_u16, number_u32,
        put_attribute,
    },
};

/// Neighbours probed after one look at the flow tables; the others wait for the next.
pub const PROBES_MAX: usize = 256;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
/// States in which a neighbour's address may be used (`NUD_VALID`, include/net/neighbour.h).
const NUD_VALID: u16 = 0x40 | 0x80 | 0x02 | 0x10 | 0x04 | 0x08;
const NUD_STALE: u16 = 0x04;
const NTF_USE: u8 = 0x01;
/// Multicast groups: links, neighbours, addresses, routes and rules of IPv4 and of IPv6 (`RTNLGRP_*`).
const GROUPS: [u32; 8] = [1, 3, 5, 7, 8, 9, 11, 19];

/// Destination MAC addresses of live flows.
pub type UsedMacs = Arc<HashSet<[u8; 6]>>;

/// What the follower tells the others.
#[derive(Clone, Debug)]
pub struct Feed {
    /// Links, addresses and XDP features.
    pub host: watch::Receiver<Arc<Host>>,
    /// How often something has changed that next hops depend on.
    pub routing: watch::Receiver<u64>,
}

/// The task that follows.
pub struct Follower {
    events: AsyncFd<Events>,
    features: Option<AsyncFd<Events>>,
    netdev: Option<Netdev>,
    requests: Requests,
    host: Host,
    neighbours: Neighbours,
    used: watch::Receiver<UsedMacs>,
    to_host: watch::Sender<Arc<Host>>,
    to_routing: watch::Sender<u64>,
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follower").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Follower {
    /// Joins the groups, then reads everything, so that no change is missed between.
    ///
    /// # Errors
    /// When netlink is not available.
    pub fn open(used: watch::Receiver<UsedMacs>) -> io::Result<(Self, Feed)> {
        let events = register(Events::open(Protocol::Route, &GROUPS)?)?;
        let netdev = Netdev::find()?;
        let features = match netdev {
            Some(netdev) => Some(register(Events::open(Protocol::Generic, &[netdev.group])?)?),
            None => None,
        };
        let mut requests = Requests::open(Protocol::Route)?;
        let (host, neighbours) = read(&mut requests, netdev)?;
        let (to_host, host_feed) = watch::channel(Arc::new(host.clone()));
        let (to_routing, routing) = watch::channel(0);
        let follower =
            Self { events, features, netdev, requests, host, neighbours, used, to_host, to_routing };
        Ok((follower, Feed { host: host_feed, routing }))
    }

    /// Follows until the process ends.
    ///
    /// # Errors
    /// When the socket itself fails.
    pub async fn run(mut self) -> io::Result<()> {
        loop {
            tokio::select! {
                ready = self.events.readable() => {
                    let mut ready = ready?;
                    match ready.try_io(|events| events.get_ref().read()) {
                        Ok(heard) => self.heard(heard?)?,
                        Err(_would_block) => continue,
                    }
                }
                heard = features_heard(self.features.as_ref()) => self.features_heard(heard?)?,
                changed = self.used.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    self.probe();
                }
            }
        }
    }

    fn heard(&mut self, heard: Heard) -> io::Result<()> {
        let messages = match heard {
            Heard::Messages(messages) => messages,
            Heard::Overrun => {
                warn!("netlink messages were lost, reading links, addresses and neighbours anew");
                return self.resync();
            }
        };
        let (mut routing, mut devices) = (false, false);
        for message in &messages {
            let change = self.host.apply(message);
            routing |= change.routing | self.neighbours.apply(message);
            devices |= change.devices;
            if matches!(message.kind, rtm::NEWRULE | rtm::DELRULE) {
                let before = self.host.has_policy_routing;
                self.host.has_policy_routing = read_policy(&mut self.requests)?;
                devices |= before != self.host.has_policy_routing;
            }
        }
        self.publish(routing, devices);
        Ok(())
    }

    fn features_heard(&mut self, heard: Heard) -> io::Result<()> {
        match heard {
            Heard::Messages(messages) => {
                let Some(features) = &mut self.host.features else { return Ok(()) };
                let changed = messages.iter().filter(|message| netdev::apply(features, message)).count() > 0;
                self.publish(changed, changed);
                Ok(())
            }
            Heard::Overrun => self.resync(),
        }
    }

    fn resync(&mut self) -> io::Result<()> {
        (self.host, self.neighbours) = read(&mut self.requests, self.netdev)?;
        self.publish(true, true);
        Ok(())
    }

    fn publish(&self, routing: bool, devices: bool) {
        // The links first: whoever raises the epoch has to see them.
        if devices {
            self.to_host.send_replace(Arc::new(self.host.clone()));
        }
        if routing {
            self.to_routing.send_modify(|changes| *changes += 1);
        }
    }

    /// Asks the kernel to confirm stale neighbours that flows send to.
    fn probe(&mut self) {
        let used = Arc::clone(&self.used.borrow_and_update());
        let stale = self.neighbours.stale(&used);
        if stale.len() > PROBES_MAX {
            debug!(
                stale = stale.len(),
                probed = PROBES_MAX,
                "more stale neighbours than are probed at a time"
            );
        }
        for (ifindex, addr) in stale.into_iter().take(PROBES_MAX) {
            let [inet, inet6] = FAMILIES;
            let (family, octets) = match addr {
                IpAddr::V4(addr) => (inet, addr.octets().to_vec()),
                IpAddr::V6(addr) => (inet6, addr.octets().to_vec()),
            };
            let mut body = vec![family, 0, 0, 0];
            body.extend_from_slice(&ifindex.to_ne_bytes());
            body.extend_from_slice(&[0, 0, NTF_USE, 0]);
            put_attribute(&mut body, NDA_DST, &octets);
            if let Err(refused) = self.requests.request(rtm::NEWNEIGH, 0, &body) {
                // It may have gone meanwhile; the flow then takes the kernel's way, which resolves it.
                debug!(ifindex, %refused, "a neighbour was not probed");
            }
        }
    }
}

fn register(events: Events) -> io::Result<AsyncFd<Events>> {
    // SAFETY: the descriptor belongs to the socket inside, which is neither replaced nor closed before it is dropped.
    Ok(unsafe { AsyncFd::register(events) }?)
}

async fn features_heard(features: Option<&AsyncFd<Events>>) -> io::Result<Heard> {
    let Some(features) = features else { return std::future::pending().await };
    loop {
        let mut ready = features.readable().await?;
        if let Ok(heard) = ready.try_io(|events| events.get_ref().read()) {
            return heard;
        }
    }
}

/// Reads links and addresses as they are.
///
/// # Errors
/// When the kernel refuses a dump.
pub fn read_host() -> io::Result<Host> {
    Ok(read_links(&mut Requests::open(Protocol::Route)?, Netdev::find()?)?)
}

fn read_links(requests: &mut Requests, netdev: Option<Netdev>) -> Result<Host, Refused> {
    let mut host = Host::read(requests)?;
    host.features = netdev.map(Netdev::features).transpose()?;
    Ok(host)
}

fn read(requests: &mut Requests, netdev: Option<Netdev>) -> Result<(Host, Neighbours), Refused> {
    let mut host = read_links(requests, netdev)?;
    host.read_routing(requests)?;
    let mut neighbours = Neighbours::default();
    for family in FAMILIES {
        for message in requests.dump(rtm::GETNEIGH, &[family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])? {
            neighbours.apply(&message);
        }
    }
    Ok((host, neighbours))
}

/// Usable neighbours, by interface and address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Neighbours(HashMap<(u32, IpAddr), Neighbour>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Neighbour {
    mac: [u8; 6],
    is_stale: bool,
}

impl Neighbours {
    /// Takes a message in; whether a next hop that was resolved before may be wrong now.
    pub fn apply(&mut self, message: &Message) -> bool {
        match message.kind {
            rtm::NEWNEIGH | rtm::DELNEIGH => self.neighbour(message).unwrap_or(false),
            rtm::DELLINK => {
                let index = number_u32(&message.body, 4);
                self.0.retain(|(at, _), _| Some(*at) != index);
                false
            }
            _ => false,
        }
    }

    /// Neighbours that the kernel has not heard of for a while and that have one of the MAC addresses.
    pub fn stale(&self, used: &HashSet<[u8; 6]>) -> Vec<(u32, IpAddr)> {
        let wanted = |neighbour: &Neighbour| neighbour.is_stale && used.contains(&neighbour.mac);
        self.0.iter().filter(|(_, neighbour)| wanted(neighbour)).map(|(at, _)| *at).collect()
    }

    fn neighbour(&mut self, message: &Message) -> Option<bool> {
        let body = message.body.as_slice();
        if !FAMILIES.contains(body.first()?) {
            return None;
        }
        let (index, state) = (number_u32(body, 4)?, number_u16(body, 8)?);
        let (mut addr, mut mac) = (None, None);
        for (kind, value) in attributes(body.get(12..)?) {
            match kind {
                NDA_DST => addr = ip_address(value),
                NDA_LLADDR => mac = <[u8; 6]>::try_from(value).ok(),
                _ => {}
            }
        }
        let at = (index, addr?);
        let before = self.0.get(&at).map(|neighbour| neighbour.mac);
        let now = mac.filter(|_| message.kind == rtm::NEWNEIGH && state & NUD_VALID != 0);
        match now {
            Some(mac) => drop(self.0.insert(at, Neighbour { mac, is_stale: state & NUD_STALE != 0 })),
            None => drop(self.0.remove(&at)),
        }
        Some(before != now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
    const INCOMPLETE: u16 = 0x01;
    const REACHABLE: u16 = 0x02;
    const FAILED: u16 = 0x20;

    fn neighbour(kind: u16, state: u16, mac: Option<[u8; 6]>) -> Message {
        let mut body = vec![FAMILIES[0], 0, 0, 0];
        body.extend_from_slice(&2u32.to_ne_bytes());
        body.extend_from_slice(&state.to_ne_bytes());
        body.extend_from_slice(&[0, 1]);
        put_attribute(&mut body, NDA_DST, &[10, 0, 0, 9]);
        if let Some(mac) = mac {
            put_attribute(&mut body, NDA_LLADDR, &mac);
        }
        Message { kind, body }
    }

    #[test]
    fn only_a_neighbours_address_or_validity_changes_routing() {
        let mut neighbours = Neighbours::default();
        for (kind, state, mac, routing) in [
            (rtm::NEWNEIGH, INCOMPLETE, None, false),
            (rtm::NEWNEIGH, REACHABLE, Some(MAC), true),
            (rtm::NEWNEIGH, NUD_STALE, Some(MAC), false),
            (rtm::NEWNEIGH, REACHABLE, Some(MAC), false),
            (rtm::NEWNEIGH, REACHABLE, Some([2, 0, 0, 0, 0, 8]), true),
            (rtm::NEWNEIGH, FAILED, Some([2, 0, 0, 0, 0, 8]), true),
            (rtm::NEWNEIGH, INCOMPLETE, None, false),
            (rtm::NEWNEIGH, REACHABLE, Some(MAC), true),
            (rtm::DELNEIGH, NUD_STALE, Some(MAC), true),
        ] {
            assert_eq!(neighbours.apply(&neighbour(kind, state, mac)), routing, "{kind} state {state:#x}");
        }
        assert_eq!(neighbours, Neighbours::default());
    }

    #[test]
    fn only_stale_neighbours_in_use_are_probed() {
        let mut neighbours = Neighbours::default();
        neighbours.apply(&neighbour(rtm::NEWNEIGH, REACHABLE, Some(MAC)));
        assert!(neighbours.stale(&HashSet::from([MAC])).is_empty(), "reachable");
        neighbours.apply(&neighbour(rtm::NEWNEIGH, NUD_STALE, Some(MAC)));
        assert!(neighbours.stale(&HashSet::new()).is_empty(), "unused");
        assert_eq!(neighbours.stale(&HashSet::from([MAC])), [(2, IpAddr::from([10, 0, 0, 9]))]);
    }

    #[test]
    fn this_namespace_can_be_read() {
        let host = read_host().expect("netlink answers");
        assert!(host.links.values().any(|link| link.is_loopback), "{host:?}");
    }
}
