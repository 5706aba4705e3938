//! The same node twice: the loaded programs with their maps, and the host's decision on ordinary ones. Every frame goes
//! through both; verdict, bytes and counters have to be the same, and so have the tables in the end.

use std::collections::{BTreeMap, HashMap};

use xdp_common::{
    frame::{self, Headers as _, Packet, Parsed},
    net::{Address, Family as _, V4, V6},
    tunnel::{self, Tunnel},
    verdict::{self, Counter, Event, Reason, Verdict},
};

use crate::{
    applied::{applied, checked, is_icmp, same},
    dice::Dice,
    family::{Family, Hosts},
    frames::*,
    maps,
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
    pub(crate) has_neighbour: bool,
    pub(crate) generation: u32,
    /// The programs' counters as they are.
    counts: Vec<u64>,
    /// How often each counter was raised.
    met: Vec<u64>,
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
            has_neighbour: true,
            generation: 1,
            met: vec![0; counts.len()],
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
        let decided = self.decide(hook, frame);
        let mut counts = vec![0u64; self.counts.len()];
        counts[Counter::Event(Event::Untunnelled).index() as usize] += u64::from(inner.is_some());
        for (index, times) in std::mem::take(&mut *self.model.counters.borrow_mut()) {
            counts[index as usize] = times;
        }
        let (action, expected) = match &decided {
            Decided::Parsed(packet, verdict) => {
                let (expected, is_answered) = applied::<F>(hook, frame, packet, verdict);
                if let verdict::Action::Reject(_) = verdict.action {
                    let event = if is_answered { Event::Answered } else { Event::Unanswered };
                    counts[Counter::Event(event).index() as usize] += 1;
                    self.node.maps.allow_answers();
                }
                (action(hook, self.node.from, verdict, is_answered), expected)
            }
            Decided::Left(counter) => {
                if let Some(counter) = counter {
                    counts[counter.index() as usize] += 1;
                }
                (Action::Pass, frame.to_vec())
            }
            Decided::Beside => {
                self.node.maps.allow_answers();
                let (done, after) = self.node.run_here(hook, sent);
                let raised = self.raised();
                self.must_hold(hook, frame, done, &after, &raised);
                return (done, after);
            }
        };
        let (done, after) = self.node.run_here(hook, sent);
        let raised = self.raised();
        counts[HOP_REFRESHED] = 0;
        let is_same = match &decided {
            Decided::Parsed(packet, _) => same(&after, &expected, packet.l4_offset.into(), packet.key.proto),
            Decided::Left(_) | Decided::Beside => after == expected,
        };
        if (done, &raised) != (action, &counts) || !is_same {
            panic!(
                "{}: the program says {done:?}, counts {:?} and makes it\n{after:02x?};\nthe host says {action:?}, counts {:?} and makes it\n{expected:02x?}",
                self.place(hook, frame),
                names(&raised),
                names(&counts),
            );
        }
        self.must_hold(hook, frame, done, &after, &raised);
        (done, after)
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

    /// Whether a frame is a fragment of TCP or UDP.
    pub(crate) fn is_fragment(&self, frame: &[u8]) -> bool {
        let from = self.node.from;
        V4::parse(frame, from) == Parsed::Fragment || V6::parse(frame, from) == Parsed::Fragment
    }

    /// What the host decides.
    fn decide(&self, hook: Hook, bytes: &[u8]) -> Decided<F> {
        let parsed = match frame::ethertype(bytes) {
            family if family == F::ETHERTYPE => F::read_frame(bytes, self.node.from),
            V4::ETHERTYPE => foreign(V4::parse(bytes, self.node.from)),
            V6::ETHERTYPE => foreign(V6::parse(bytes, self.node.from)),
            _ => Parsed::Other,
        };
        match parsed {
            Parsed::Packet(packet) => {
                let verdict = match hook {
                    Hook::Xdp | Hook::XdpFrags => self.model.xdp(&packet),
                    Hook::TcIngress => self.model.tc(&packet),
                    Hook::TcEgress => self.model.egress(&packet),
                };
                Decided::Parsed(packet, verdict)
            }
            Parsed::Other if is_icmp(bytes) => Decided::Beside,
            // Left to tc, whose answer depends on the fragments before.
            Parsed::Other | Parsed::Fragment => Decided::Left(None),
            Parsed::Malformed => Decided::Left(Some(Counter::Event(Event::Malformed))),
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
        let is_dropped = action == Action::Drop || is_answered;
        assert_eq!(drops, u64::from(is_dropped), "{}: reasons of {action:?}", self.place(hook, before));
        if after == before {
            return;
        }
        self.changed += 1;
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

    /// Whether a frame has to do with the services, by its addresses alone: out of a tunnel, one to another node has too.
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
}

/// What the host makes of a frame.
enum Decided<F: Hosts> {
    Parsed(Packet<F::Addr>, Verdict<F::Addr>),
    /// There is nothing to decide; something may be counted.
    Left(Option<Counter>),
    /// ICMP, which has functions and cases of its own: only what must hold of every frame is checked.
    Beside,
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

fn action<A>(hook: Hook, from: u32, verdict: &Verdict<A>, is_answered: bool) -> Action {
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
