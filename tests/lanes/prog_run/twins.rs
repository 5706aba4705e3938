//! The same node twice: the loaded programs with their maps, and the host's decision on ordinary ones. Every frame goes
//! through both; verdict, bytes and counters have to be the same, and so have the tables in the end.

use std::collections::{BTreeMap, HashMap};

use xdp_common::{
    frame::{self, Headers as _, Packet, Parsed, TCP_CHECK},
    net::{Address, Family as _, TCP, V4, V6},
    tunnel::{self, Tunnel},
    verdict::{self, Counter, Event, Reason, Verdict},
};

use crate::{
    applied::{applied, checked, is_icmp, same},
    datagrams::{self, Piece},
    dice::Dice,
    family::{Family, Hosts},
    frames::*,
    maps, messages,
    model::Model,
    node::*,
    world::{Arrived, BACKENDS, HOSTS, SERVICE},
};

/// The same node twice.
pub(crate) struct Twins<F: Hosts + Tunnel> {
    pub(crate) node: Node,
    pub(crate) dice: Dice,
    pub(crate) model: Model<F>,
    pub(crate) names: HashMap<F::Addr, Addr>,
    pub(crate) arrived: Vec<Arrived>,
    /// Packets that have lately come out changed, as they came and as they went.
    pub(crate) seen: Vec<Seen>,
    /// Fragments that are on their way.
    pub(crate) pieces: Vec<Piece>,
    pub(crate) has_neighbour: bool,
    pub(crate) generation: u32,
    /// The programs' counters as they are.
    counts: Vec<u64>,
    /// How often each counter was raised.
    met: Vec<u64>,
    /// What was decided on ICMP and on fragments, and what that has raised.
    outcomes: Vec<Outcome>,
    /// Frames that have gone through both, and those of them that came out changed.
    pub(crate) frames: u64,
    pub(crate) changed: u64,
    seed: u64,
}

impl<F: Hosts + Tunnel> Twins<F> {
    /// Both, without a flow; the calling thread has to be in the node's namespace when frames are run.
    pub(crate) fn new(entry: Hook, seed: u64) -> Self {
        let node = Node::new(F::FAMILY, entry, Sizes { established: 1 << 14, buckets: 1 << 14 });
        let counts = node.maps.counts();
        let mut twins = Self {
            node,
            dice: Dice::new(seed),
            model: Model::of(F::addr(NODE)),
            names: HOSTS.into_iter().map(|name| (F::addr(name), name)).collect(),
            arrived: Vec::new(),
            seen: Vec::new(),
            pieces: Vec::new(),
            has_neighbour: true,
            generation: 1,
            met: vec![0; counts.len()],
            outcomes: Vec::new(),
            counts,
            frames: 0,
            changed: 0,
            seed,
        };
        twins.networks();
        twins.begin();
        twins
    }

    /// Runs a frame through both and compares; returns what became of it.
    pub(crate) fn agree(&mut self, hook: Hook, frame: &[u8]) -> (Action, Vec<u8>) {
        let inner = self.taken_out(hook, frame);
        let sent = frame;
        let frame = inner.as_deref().unwrap_or(frame);
        let expected = self.expected(hook, frame);
        if expected.is_limited {
            self.node.maps.allow_answers();
        }
        let counts = self.counted(&expected, inner.is_some());
        let (done, after) = self.node.run_here(hook, sent);
        let (raised, held) = (self.raised(), self.node.maps.held());
        assert_eq!(held, expected.held, "{}: what the agent is given", self.place(hook, frame));
        if (done, &raised) != (expected.action, &counts) || !same(&after, &expected.frame, &expected.checks) {
            panic!(
                "{}: the program says {done:?}, counts {:?} and makes it\n{after:02x?};\nthe host says {:?}, counts {:?} and makes it\n{:02x?}",
                self.place(hook, frame),
                names(&raised),
                expected.action,
                names(&counts),
                expected.frame,
            );
        }
        if let Some((sort, decided)) = expected.decided {
            self.note(sort, decided, &raised);
        }
        self.must_hold(hook, frame, done, &after, &raised);
        (done, after)
    }

    /// What the host counts for a frame.
    fn counted(&self, expected: &Expected, is_taken_out: bool) -> Vec<u64> {
        let mut counts = vec![0; self.counts.len()];
        let untunnelled = Counter::Event(Event::Untunnelled);
        for counter in expected.counts.iter().chain(is_taken_out.then_some(&untunnelled)) {
            counts[counter.index() as usize] += 1;
        }
        for (index, times) in std::mem::take(&mut *self.model.counters.borrow_mut()) {
            counts[index as usize] += times;
        }
        counts[HOP_REFRESHED] = 0;
        counts
    }

    /// Notes what was decided, and what it has raised.
    fn note(&mut self, sort: Sort, decided: verdict::Action, raised: &[u64]) {
        for (index, _) in raised.iter().enumerate().filter(|(_, times)| **times > 0) {
            let outcome = (sort, decided, index as u32);
            if !self.outcomes.contains(&outcome) {
                self.outcomes.push(outcome);
            }
        }
    }

    /// The frame that XDP takes out of one from another node, if it does.
    pub(crate) fn taken_out(&self, hook: Hook, frame: &[u8]) -> Option<Vec<u8>> {
        let at_xdp = matches!(hook, Hook::Xdp | Hook::XdpFrags);
        let packet = tunnel::parse::<F, _>(frame, self.node.from)?;
        if !at_xdp
            || frame[12..14] != F::ETHERTYPE.to_be_bytes()
            || !tunnel::is_ours::<F, _>(&self.model, &packet)
        {
            return None;
        }
        let inner = &frame[ETHERNET + usize::from(F::HEADER_LEN)..];
        Some([&frame[..6], &tunnel::MARK[..], &frame[12..ETHERNET], inner].concat())
    }

    fn place(&self, hook: Hook, frame: &[u8]) -> String {
        format!("frame {} of seed {:#x}, at {hook:?}:\n{frame:02x?}", self.frames, self.seed)
    }

    /// What the host makes of a frame.
    fn expected(&self, hook: Hook, frame: &[u8]) -> Expected {
        let from = self.node.from;
        let is_of_family = frame::ethertype(frame) == F::ETHERTYPE;
        let parsed = match frame::ethertype(frame) {
            _ if is_of_family => F::read_frame(frame, from),
            V4::ETHERTYPE => foreign(V4::parse(frame, from)),
            V6::ETHERTYPE => foreign(V6::parse(frame, from)),
            _ => Parsed::Other,
        };
        match parsed {
            Parsed::Packet(packet) => {
                let verdict = match hook {
                    Hook::Xdp | Hook::XdpFrags => self.model.xdp(&packet),
                    Hook::TcIngress => self.model.tc(&packet),
                    Hook::TcEgress => self.model.egress(&packet),
                };
                Expected::of::<F>(hook, from, frame, &packet, &verdict)
            }
            Parsed::Other if is_of_family => messages::expected(&self.model, hook, from, frame),
            Parsed::Fragment if is_of_family => datagrams::expected(&self.model, hook, from, frame),
            Parsed::Other | Parsed::Fragment => Expected::left(frame),
            Parsed::Malformed => {
                let counts = vec![Counter::Event(Event::Malformed)];
                Expected { counts, ..Expected::left(frame) }
            }
        }
    }

    /// The counters that the last run has raised. That of refreshed next hops depends on the kernel's clock too.
    fn raised(&mut self) -> Vec<u64> {
        let now = self.node.maps.counts();
        let mut raised: Vec<u64> = now.iter().zip(&self.counts).map(|(now, before)| now - before).collect();
        self.counts = now;
        for (met, raised) in self.met.iter_mut().zip(&raised) {
            *met += raised;
        }
        raised[HOP_REFRESHED] = 0;
        raised
    }

    /// What holds for every frame, whatever the host thinks of it: what is not ours is not changed, what is changed has
    /// valid lengths and checksums, and each drop has exactly one counted reason.
    fn must_hold(&mut self, hook: Hook, before: &[u8], action: Action, after: &[u8], raised: &[u64]) {
        self.frames += 1;
        let times = |event: Event| raised[Counter::Event(event).index() as usize];
        let is_answered = times(Event::Answered) == 1;
        let drops: u64 = raised[..Reason::ALL.len()].iter().sum();
        let is_dropped = (action == Action::Drop && times(Event::FragmentHeld) == 0) || is_answered;
        assert_eq!(drops, u64::from(is_dropped), "{}: reasons of {action:?}", self.place(hook, before));
        if after == before {
            return;
        }
        self.changed += 1;
        for frame in [before, after] {
            self.remember(frame);
        }
        assert!(self.is_ours(hook, before), "{}: not ours, and changed", self.place(hook, before));
        let Some(whole) = checked(after) else {
            panic!("{}: no valid packet any more:\n{after:02x?}", self.place(hook, before))
        };
        let was = checked(before)
            .unwrap_or_else(|| panic!("{}: changed, though it is no valid packet", self.place(hook, before)));
        let is_finished = matches!(hook, Hook::Xdp | Hook::XdpFrags);
        let (ip, l4) = if is_answered { (true, is_finished) } else { (was.ip, was.l4) };
        assert!(
            whole.ip >= ip && whole.l4 >= l4,
            "{}: was {was:?} and is {whole:?}:\n{after:02x?}",
            self.place(hook, before)
        );
    }

    /// Remembers a packet, or one around it, as far as anybody would quote it.
    fn remember(&mut self, frame: &[u8]) {
        let around = match tunnel::parse::<F, _>(frame, self.node.from) {
            Some(_) => usize::from(F::HEADER_LEN),
            None => 0,
        };
        let inside = [&frame[..ETHERNET], &frame[ETHERNET + around..]].concat();
        let Parsed::Packet(packet) = F::read_frame(&inside[..], self.node.from) else { return };
        let end = (ETHERNET + around + usize::from(packet.total_len)).min(QUOTED_MAX);
        let l4 = around + usize::from(packet.l4_offset) - ETHERNET;
        self.seen.truncate(SEEN_MAX - 1);
        self.seen.insert(0, Seen { packet: frame[ETHERNET..end].to_vec(), l4 });
    }

    /// Whether a frame has to do with the services, by its addresses alone: out of a tunnel, one to another node has too, and
    /// what the node says of a backend's packets has by what it quotes.
    fn is_ours(&self, hook: Hook, frame: &[u8]) -> bool {
        let len = F::Addr::LEN;
        let at = ETHERNET + if F::FAMILY == Family::V4 { 12 } else { 8 };
        let (Some(src), Some(dst)) = (frame.get(at..at + len), frame.get(at + len..at + 2 * len)) else {
            return false;
        };
        let is_among = |addr: &[u8], hosts: &[Addr]| hosts.iter().any(|host| F::FAMILY.octets(*host) == addr);
        let is_tunnelled = frame[8..12] == tunnel::MARK[2..];
        frame[12..14] == F::ETHERTYPE.to_be_bytes()
            && match hook {
                Hook::Xdp | Hook::XdpFrags | Hook::TcIngress => {
                    is_among(dst, &[VIP, VIP_TOO, NODE, NODE_TOO])
                        || (is_tunnelled && is_among(dst, &[OTHER_NODE]))
                }
                Hook::TcEgress if is_icmp(frame) => frame
                    .windows(len)
                    .any(|part| is_among(part, &BACKENDS) || is_among(part, &[VIP, VIP_TOO, NODE])),
                Hook::TcEgress => is_among(src, &BACKENDS) || is_among(dst, &BACKENDS),
            }
    }

    /// Compares the tables.
    pub(crate) fn compare_tables(&self) {
        let model: BTreeMap<String, String> = self
            .model
            .established
            .borrow()
            .iter()
            .map(|(key, flow)| maps::entry_text(key, &flow.get()))
            .collect();
        let (seed, frames) = (self.seed, self.frames);
        assert_eq!(self.node.maps.established_dump(), model, "seed {seed:#x}, after {frames} frames");
        let accounts = self.model.accounts.borrow();
        let account = accounts.get(&SERVICE).copied().unwrap_or_default();
        assert_eq!(self.node.maps.account(SERVICE), account, "seed {seed:#x}, after {frames} frames");
    }

    /// How often something was counted.
    pub(crate) fn met(&self, counter: Counter) -> u64 {
        self.met[counter.index() as usize]
    }

    /// Whether something was decided and counted.
    pub(crate) fn has_met(&self, (sort, decided, counter): (Sort, verdict::Action, Counter)) -> bool {
        self.outcomes.contains(&(sort, decided, counter.index()))
    }
}

/// How many packets are remembered, to be quoted, and how much of a frame is.
const SEEN_MAX: usize = 64;
const QUOTED_MAX: usize = 256;

/// A packet that was seen, without its Ethernet header and perhaps without its end.
#[derive(Clone)]
pub(crate) struct Seen {
    pub(crate) packet: Vec<u8>,
    /// Where its transport header is.
    pub(crate) l4: usize,
}

/// What is decided on by more than its own headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sort {
    /// An ICMP error that comes in.
    ErrorIn,
    /// An ICMP error about a packet around a client's.
    ErrorAround,
    /// An ICMP error that leaves.
    ErrorOut,
    /// An echo request.
    Echo,
    /// What no service takes.
    Unserved,
    /// A first fragment that comes in.
    FirstIn,
    /// The same, and others wait for it.
    AwaitedIn,
    /// Another fragment that comes in.
    LaterIn,
    /// A first fragment that leaves.
    FirstOut,
    /// Another fragment that leaves.
    LaterOut,
}

/// What was decided on what, and the index of a counter that was raised by that.
type Outcome = (Sort, verdict::Action, u32);

/// What the host makes of a frame.
pub(crate) struct Expected {
    pub(crate) action: Action,
    pub(crate) frame: Vec<u8>,
    /// Where the frame has checksums besides those of IP, whose zero has two forms.
    pub(crate) checks: Vec<usize>,
    /// What is counted besides what the tables have counted.
    pub(crate) counts: Vec<Counter>,
    /// Whether it is answered, which is done so many times a second only.
    pub(crate) is_limited: bool,
    /// What the agent is given: an interface and a frame.
    pub(crate) held: Option<(u32, Vec<u8>)>,
    pub(crate) decided: Option<(Sort, verdict::Action)>,
}

impl Expected {
    /// Nothing is decided.
    pub(crate) fn left(frame: &[u8]) -> Self {
        let (frame, checks, counts) = (frame.to_vec(), Vec::new(), Vec::new());
        Self { action: Action::Pass, frame, checks, counts, is_limited: false, held: None, decided: None }
    }

    /// What a verdict makes of a packet.
    pub(crate) fn of<F: Hosts>(
        hook: Hook,
        from: u32,
        frame: &[u8],
        packet: &Packet<F::Addr>,
        verdict: &Verdict<F::Addr>,
    ) -> Self {
        let (frame, is_answered) = applied::<F>(hook, frame, packet, verdict);
        let is_limited = matches!(verdict.action, verdict::Action::Reject(_));
        let event = if is_answered { Event::Answered } else { Event::Unanswered };
        Self {
            action: action(hook, from, verdict, is_answered),
            frame,
            // A UDP datagram that has one has none of zero, and a CRC has one zero only.
            checks: (packet.key.proto == TCP && !packet.is_later_fragment())
                .then_some(usize::from(packet.l4_offset) + TCP_CHECK)
                .into_iter()
                .collect(),
            counts: is_limited.then_some(Counter::Event(event)).into_iter().collect(),
            is_limited,
            held: None,
            decided: None,
        }
    }
}

const HOP_REFRESHED: usize = Counter::Event(Event::HopRefreshed).index() as usize;

/// What is of the other family, which has no services here, is left alone.
fn foreign<A, B>(parsed: Parsed<A>) -> Parsed<B> {
    match parsed {
        Parsed::Packet(_) | Parsed::Other => Parsed::Other,
        Parsed::Fragment => Parsed::Fragment,
        Parsed::Malformed => Parsed::Malformed,
    }
}

/// What a program says that does what a verdict says.
pub(crate) fn action<A>(hook: Hook, from: u32, verdict: &Verdict<A>, is_answered: bool) -> Action {
    let is_xdp = matches!(hook, Hook::Xdp | Hook::XdpFrags);
    match verdict.action {
        verdict::Action::Pass | verdict::Action::Stack => Action::Pass,
        verdict::Action::Reject(_) if is_answered && is_xdp => Action::Transmit,
        verdict::Action::Reject(_) if is_answered => Action::Redirect,
        verdict::Action::Drop(_) | verdict::Action::Reject(_) => Action::Drop,
        verdict::Action::Transmit => Action::Transmit,
        verdict::Action::Redirect => Action::Redirect,
        verdict::Action::Tunnel if is_xdp && verdict.hop.ifindex == from => Action::Transmit,
        verdict::Action::Tunnel => Action::Redirect,
    }
}

fn names(counts: &[u64]) -> Vec<String> {
    let raised = counts.iter().enumerate().filter(|(_, times)| **times > 0);
    raised.map(|(index, times)| format!("{} x {times}", maps::name(index as u32))).collect()
}
