//! Fragments that came before the first of their packet: kept until that has come, then given back to the interface.
//!
//! The programs know whose a fragment is from the ports of the first one, and cannot keep a frame themselves. What they
//! hand over waits here until they say that its first has come. It is given back by running a program on it that has it
//! come in once more; tc ingress then finds the ports and goes on as with any fragment. One whose first does not come is
//! given up: it comes in once more too, and is left to the kernel.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::MissedTickBehavior,
};
use tokio_util::time::{DelayQueue, delay_queue};
use tracing::{debug, warn};
use xdp_common::{
    fragment::{FragmentKey, FragmentPorts, Fragmented, first},
    frame::{Packet, ethertype},
    net::{Family, Ip6, V4, V6},
};

use crate::{
    bpf,
    maps::{FragmentMap, HeldFragment, HeldFragments},
};

/// Longer than the first takes from tc ingress to tc egress, where fragments behind it ask for its ports once more.
const WAY_OF_THE_FIRST: Duration = Duration::from_millis(1);
/// For how long a fragment waits for its first. The kernel gives those that have come 30 seconds, but packets that overtake
/// each other do so within milliseconds, and beyond that the first is lost.
const PATIENCE: Duration = Duration::from_secs(1);
/// Most that wait here; then the ring fills, and when it is full, programs leave further ones to the kernel.
const WAITING_MAX: usize = 4096;
/// Most that are taken in during a turn, so that a flood takes a part of one CPU and no more.
const PER_TURN_MAX: usize = 256;
/// Least time from turn to turn.
const TURN: Duration = Duration::from_millis(1);

/// What the fragments of a packet have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
        Ok(ports.is_some_and(|ports| ports.is_current(clock) && ports.first == first::COME))
    }

    fn give_up(&mut self, key: &Key, clock: u32) -> io::Result<()> {
        let ports = FragmentPorts::without(first::GIVEN_UP, clock);
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
        let mut turns = tokio::time::interval(TURN);
        turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut allowance = PER_TURN_MAX;
        // Whether the ring may hold more than was taken; the kernel says only that something new has come.
        let mut has_more = true;
        loop {
            while has_more && allowance > 0 && queue.has_room() {
                let Some(held) = self.ring.get_mut().take() else {
                    has_more = false;
                    break;
                };
                allowance -= 1;
                queue.take(held, &self.maps, self.clock.load(Ordering::Relaxed));
            }
            tokio::select! {
                Some(key) = queue.due() => {
                    let due = queue.leave(key, &mut self.maps, self.clock.load(Ordering::Relaxed));
                    give_back(&release, due);
                }
                ready = self.ring.readable(), if !has_more => match ready {
                    Ok(mut ready) => {
                        ready.clear_ready();
                        has_more = true;
                    }
                    Err(error) => {
                        warn!(%error, "fragments that come before their first are not kept any more; restart the agent");
                        return;
                    }
                },
                _ = turns.tick(), if allowance == 0 => allowance = PER_TURN_MAX,
            }
        }
    }
}

/// Has fragments come in once more.
fn give_back(release: &OwnedFd, fragments: Vec<HeldFragment>) {
    for HeldFragment { ifindex, frame } in fragments {
        match bpf::run_on_frame(release.as_fd(), ifindex, &frame) {
            Ok(0) => {}
            Ok(errno) => debug!(ifindex, errno, "a fragment could not come in again"),
            Err(error) => debug!(ifindex, %error, "a fragment could not be given back"),
        }
    }
}

/// Those that wait, by packet.
#[derive(Default)]
struct Queue {
    packets: HashMap<Key, Waiting>,
    /// When those of each packet leave, whether their first has come or not.
    timers: DelayQueue<Key>,
    /// How many wait.
    waiting: usize,
    /// How many have come.
    number: u64,
}

/// The fragments of a packet that wait, with their numbers.
struct Waiting {
    fragments: Vec<(u64, HeldFragment)>,
    timer: delay_queue::Key,
}

impl Queue {
    fn has_room(&self) -> bool {
        self.waiting < WAITING_MAX
    }

    /// Takes in what a program has handed over.
    fn take(&mut self, held: HeldFragment, ports: &impl Ports, clock: u32) {
        // The programs have parsed it by the same code.
        let Some(key) = key(&held.frame) else { return };
        let waiting = self.packets.get_mut(&key);
        if held.is_first() {
            if let Some(waiting) = waiting {
                self.timers.reset(&waiting.timer, WAY_OF_THE_FIRST);
            }
            return;
        }
        self.number += 1;
        self.waiting += 1;
        if let Some(waiting) = waiting {
            waiting.fragments.push((self.number, held));
            return;
        }
        // It may have come between the program's look and this one.
        let patience = if is_known(ports, &key, clock) { WAY_OF_THE_FIRST } else { PATIENCE };
        let timer = self.timers.insert(key, patience);
        self.packets.insert(key, Waiting { fragments: vec![(self.number, held)], timer });
    }

    /// The next packet whose fragments have waited long enough; `None` at once when none wait.
    async fn due(&mut self) -> Option<Key> {
        self.timers.next().await.map(delay_queue::Expired::into_inner)
    }

    /// Takes the fragments of a packet that is due, and of all others that are, in the order in which they came: a receiver
    /// drops what is too much out of order (`net.ipv4.ipfrag_max_dist`). A first that has not come is given up.
    fn leave(&mut self, key: Key, ports: &mut impl Ports, clock: u32) -> Vec<HeldFragment> {
        let mut leaving = Vec::new();
        let mut next = Some(key);
        while let Some(key) = next {
            if !is_known(ports, &key, clock)
                && let Err(error) = ports.give_up(&key, clock)
            {
                debug!(%error, "cannot say that the first of a packet's fragments never came");
            }
            leaving.extend(self.packets.remove(&key).into_iter().flat_map(|waiting| waiting.fragments));
            next = self.due().now_or_never().flatten();
        }
        self.waiting -= leaving.len();
        leaving.sort_unstable_by_key(|(number, _)| *number);
        leaving.into_iter().map(|(_, held)| held).collect()
    }
}

fn is_known(ports: &impl Ports, key: &Key, clock: u32) -> bool {
    ports.is_known(key, clock).unwrap_or_else(|error| {
        debug!(%error, "cannot ask for the ports of a fragment");
        false
    })
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
    use tokio::time::Instant;

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

    /// The first of the same packet, as the programs tell of it.
    fn first_of(id: u8) -> HeldFragment {
        let mut held = fragment(id);
        held.ifindex = 0;
        held.frame[14 + 6..][..2].copy_from_slice(&[0x20, 0]);
        held
    }

    /// What is given back next, and after how long.
    async fn next(queue: &mut Queue, known: &mut Known) -> (Vec<HeldFragment>, Duration) {
        let start = Instant::now();
        let key = queue.due().await.expect("something waits");
        (queue.leave(key, known, 0), start.elapsed())
    }

    /// The timers of the queue count whole milliseconds.
    const ROUNDING: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn fragments_are_given_back_in_order_soon_after_their_first_has_come() {
        let (mut queue, mut known) = (Queue::default(), Known::default());
        for id in [1, 2, 3, 2] {
            queue.take(fragment(id), &known, 0);
        }
        for id in [3, 2, 2] {
            known.0.insert([0, id, 0, 0], true);
            queue.take(first_of(id), &known, 0);
        }
        let (given, after) = next(&mut queue, &mut known).await;
        assert_eq!(given, [2, 3, 2].map(fragment));
        assert!(after >= WAY_OF_THE_FIRST && after <= WAY_OF_THE_FIRST + ROUNDING, "{after:?}");
        assert_eq!(queue.waiting, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_fragment_that_is_handed_over_while_its_first_comes_does_not_wait_for_it() {
        let (mut queue, mut known) = (Queue::default(), Known::default());
        known.0.insert([0, 1, 0, 0], true);
        queue.take(first_of(1), &known, 0);
        queue.take(fragment(1), &known, 0);
        let (given, after) = next(&mut queue, &mut known).await;
        assert_eq!(given, [fragment(1)]);
        assert!(after <= WAY_OF_THE_FIRST + ROUNDING, "{after:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_fragment_whose_first_never_comes_is_given_up_and_given_back() {
        let (mut queue, mut known) = (Queue::default(), Known::default());
        queue.take(fragment(1), &known, 0);
        let (given, after) = next(&mut queue, &mut known).await;
        assert_eq!(given, [fragment(1)]);
        assert!(after >= PATIENCE && after <= PATIENCE + ROUNDING, "{after:?}");
        assert_eq!(known.0, HashMap::from([([0, 1, 0, 0], false)]));
        assert!(queue.due().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_wait_than_there_is_room_for() {
        let (mut queue, mut known) = (Queue::default(), Known::default());
        for _ in 0..WAITING_MAX {
            assert!(queue.has_room());
            queue.take(fragment(1), &known, 0);
        }
        assert!(!queue.has_room());
        assert_eq!(next(&mut queue, &mut known).await.0.len(), WAITING_MAX);
        assert!(queue.has_room());
    }

    #[tokio::test]
    async fn what_is_no_fragment_does_not_wait() {
        let mut queue = Queue::default();
        for frame in [&[0; 20][..], &[0; 64]] {
            queue.take(HeldFragment { ifindex: 3, frame: frame.to_vec() }, &Known::default(), 0);
        }
        assert!(queue.packets.is_empty());
    }
}
