//! Fragments that came before the first of their packet: kept until that has come, then given back to the interface.
//!
//! The programs know whose a fragment is from the ports of the first one, and cannot keep a frame themselves. What they
//! hand over waits here. It is given back by running a program on it that has it come in once more; tc ingress then finds
//! the ports and goes on as with any fragment. One whose first does not come is given up: it comes in once more too, and
//! is left to the kernel.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::io::{Interest, unix::AsyncFd};
use tracing::{debug, warn};
use xdp_common::{
    fragment::{FragmentKey, FragmentPorts, Fragmented},
    frame::{Packet, ethertype},
    net::{Family, Ip6, V4, V6},
};

use crate::{
    bpf,
    maps::{FragmentMap, HeldFragment, HeldFragments},
};

/// Time between two looks while any fragment waits.
const TICK: Duration = Duration::from_millis(1);
/// For how long a fragment waits for its first. The kernel gives those that have come 30 seconds, but packets that overtake
/// each other do so within milliseconds, and beyond that the first is lost.
const PATIENCE: Duration = Duration::from_secs(1);
/// Most that wait here; then the ring fills, and when it is full, programs leave further ones to the kernel.
const WAITING_MAX: usize = 4096;
/// Most that are taken in or given back in one look, so that a flood takes a part of one CPU and no more.
const PER_LOOK_MAX: usize = 256;

/// A fragment that waits.
struct Waiting {
    held: HeldFragment,
    key: Key,
    since: Instant,
    /// The first was there when looked for last time. It is given back one look later: the first may still be on its way up.
    is_due: bool,
}

/// What the fragments of a packet have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    V4(FragmentKey<[u8; 4]>),
    V6(FragmentKey<Ip6>),
}

/// Where the ports of packets are known.
trait Ports {
    fn is_known(&self, key: &Key, clock: u32) -> io::Result<bool>;
    fn give_up(&mut self, key: &Key, clock: u32) -> io::Result<()>;
}

/// The maps of both families.
#[derive(Debug)]
pub struct FragmentMaps {
    /// Of IPv4.
    pub v4: FragmentMap<[u8; 4]>,
    /// Of IPv6.
    pub v6: FragmentMap<Ip6>,
}

impl Ports for FragmentMaps {
    fn is_known(&self, key: &Key, clock: u32) -> io::Result<bool> {
        let ports = match key {
            Key::V4(key) => self.v4.ports(key)?,
            Key::V6(key) => self.v6.ports(key)?,
        };
        Ok(ports.is_some_and(|ports| ports.is_current(clock)))
    }

    fn give_up(&mut self, key: &Key, clock: u32) -> io::Result<()> {
        let ports = FragmentPorts { sport: [0; 2], dport: [0; 2], seen: clock };
        match key {
            Key::V4(key) => self.v4.set_ports(key, ports),
            Key::V6(key) => self.v6.set_ports(key, ports),
        }
    }
}

/// Keeps fragments and gives them back.
#[derive(Debug)]
pub struct Keeper {
    ring: AsyncFd<HeldFragments>,
    maps: FragmentMaps,
    clock: Arc<AtomicU32>,
}

impl Keeper {
    /// One with nothing kept.
    ///
    /// # Errors
    /// When the ring cannot be waited for.
    pub fn new(held: HeldFragments, maps: FragmentMaps, clock: Arc<AtomicU32>) -> anyhow::Result<Self> {
        // SAFETY: the descriptor belongs to the ring inside, which is not replaced before it is dropped.
        let ring = unsafe { AsyncFd::register_with_interest(held, Interest::READABLE) }
            .context("cannot wait for fragments")?;
        Ok(Self { ring, maps, clock })
    }

    /// Runs for good; `release` is the program that has a frame come in once more.
    pub async fn run(mut self, release: OwnedFd) {
        let mut queue = Queue::default();
        loop {
            if !queue.is_empty() {
                tokio::time::sleep(TICK).await;
            } else if let Err(error) = self.wait().await {
                warn!(%error, "fragments that come before their first are not kept any more; restart the agent");
                return;
            }
            let now = Instant::now();
            for _ in 0..queue.room().min(PER_LOOK_MAX) {
                let Some(held) = self.ring.get_mut().take() else { break };
                queue.push(held, now);
            }
            for held in queue.look(&mut self.maps, self.clock.load(Ordering::Relaxed), now) {
                match bpf::run_on_frame(release.as_fd(), held.ifindex, &held.frame) {
                    Ok(0) => {}
                    Ok(errno) => debug!(ifindex = held.ifindex, errno, "a fragment could not come in again"),
                    Err(error) => {
                        debug!(ifindex = held.ifindex, %error, "a fragment could not be given back")
                    }
                }
            }
        }
    }

    /// Waits until there is something in the ring.
    async fn wait(&mut self) -> io::Result<()> {
        self.ring.readable().await?.clear_ready();
        Ok(())
    }
}

/// Those that wait, in the order in which they came.
#[derive(Default)]
struct Queue(VecDeque<Waiting>);

impl Queue {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn room(&self) -> usize {
        WAITING_MAX - self.0.len()
    }

    fn push(&mut self, held: HeldFragment, now: Instant) {
        // The programs have parsed it by the same code.
        let Some(key) = key(&held.frame) else { return };
        self.0.push_back(Waiting { held, key, since: now, is_due: false });
    }

    /// Those that are to be given back now.
    fn look(&mut self, ports: &mut impl Ports, clock: u32, now: Instant) -> Vec<HeldFragment> {
        let mut due = Vec::new();
        let mut left = VecDeque::with_capacity(self.0.len());
        for mut waiting in self.0.drain(..) {
            if waiting.is_due && due.len() < PER_LOOK_MAX {
                due.push(waiting.held);
                continue;
            }
            if !waiting.is_due {
                let result = ports.is_known(&waiting.key, clock).and_then(|is_known| {
                    let is_late = !is_known && now.duration_since(waiting.since) > PATIENCE;
                    if is_late {
                        ports.give_up(&waiting.key, clock)?;
                    }
                    Ok(is_known || is_late)
                });
                waiting.is_due = result.unwrap_or_else(|error| {
                    debug!(%error, "cannot ask for the ports of a fragment");
                    false
                });
            }
            left.push_back(waiting);
        }
        self.0 = left;
        due
    }
}

/// What a fragment has in common with the others of its packet.
fn key(frame: &[u8]) -> Option<Key> {
    match ethertype(frame) {
        V4::ETHERTYPE => key_of::<V4>(frame).map(Key::V4),
        V6::ETHERTYPE => key_of::<V6>(frame).map(Key::V6),
        _ => None,
    }
}

fn key_of<F: Fragmented>(frame: &[u8]) -> Option<FragmentKey<F::Addr>> {
    let (mut packet, mut key) = (Packet::ZERO, FragmentKey::ZERO);
    F::parse_fragment(frame, 0, &mut packet, &mut key).then_some(key)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Packets by identification: whether their first fragment has come.
    #[derive(Default)]
    struct Known(HashMap<[u8; 4], bool>);

    impl Ports for Known {
        fn is_known(&self, key: &Key, _: u32) -> io::Result<bool> {
            Ok(self.0.contains_key(&id(key)))
        }

        fn give_up(&mut self, key: &Key, _: u32) -> io::Result<()> {
            self.0.insert(id(key), false);
            Ok(())
        }
    }

    fn id(key: &Key) -> [u8; 4] {
        match key {
            Key::V4(key) => key.id,
            Key::V6(key) => key.id,
        }
    }

    /// A later fragment of UDP with an identification.
    fn fragment(id: u8) -> HeldFragment {
        let ip = [0x45, 0, 0, 28, 0, id, 0, 7, 64, 17, 0, 0, 198, 51, 100, 2, 203, 0, 113, 10];
        let frame = [&[0; 12][..], &[8, 0], &ip, &[0xaa; 8]].concat();
        HeldFragment { ifindex: 3, frame }
    }

    #[test]
    fn a_fragment_is_given_back_one_look_after_its_first_has_come() {
        let (mut queue, mut known, start) = (Queue::default(), Known::default(), Instant::now());
        queue.push(fragment(1), start);
        queue.push(fragment(2), start);
        assert_eq!(queue.look(&mut known, 0, start), []);
        known.0.insert([0, 2, 0, 0], true);
        assert_eq!(queue.look(&mut known, 0, start + TICK), [], "its first may be on its way");
        assert_eq!(queue.look(&mut known, 0, start + 2 * TICK), [fragment(2)]);
        assert_eq!(queue.0.len(), 1);
    }

    #[test]
    fn a_fragment_whose_first_never_comes_is_given_up_and_given_back() {
        let (mut queue, mut known, start) = (Queue::default(), Known::default(), Instant::now());
        queue.push(fragment(1), start);
        assert_eq!(queue.look(&mut known, 0, start + PATIENCE), []);
        assert!(known.0.is_empty());
        assert_eq!(queue.look(&mut known, 0, start + PATIENCE + TICK), []);
        assert_eq!(known.0, HashMap::from([([0, 1, 0, 0], false)]));
        assert_eq!(queue.look(&mut known, 0, start + PATIENCE + 2 * TICK), [fragment(1)]);
        assert!(queue.is_empty());
    }

    #[test]
    fn one_look_gives_back_no_more_than_its_share_and_keeps_the_order() {
        let (mut queue, mut known, start) = (Queue::default(), Known::default(), Instant::now());
        known.0.insert([0, 1, 0, 0], true);
        known.0.insert([0, 2, 0, 0], true);
        for number in 0..PER_LOOK_MAX + 3 {
            queue.push(fragment(if number < PER_LOOK_MAX { 1 } else { 2 }), start);
        }
        assert_eq!(queue.look(&mut known, 0, start).len(), 0);
        assert_eq!(queue.look(&mut known, 0, start), vec![fragment(1); PER_LOOK_MAX]);
        assert_eq!(queue.look(&mut known, 0, start), vec![fragment(2); 3]);
    }

    #[test]
    fn what_is_no_fragment_does_not_wait() {
        let mut queue = Queue::default();
        for frame in [&[0; 20][..], &[0; 64]] {
            queue.push(HeldFragment { ifindex: 3, frame: frame.to_vec() }, Instant::now());
        }
        assert!(queue.is_empty());
    }
}
