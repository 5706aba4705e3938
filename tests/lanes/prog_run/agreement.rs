//! The programs in the kernel and the decision on the host's model say the same to a long random sequence of packets.

use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::{
    AddressFamily,
    neighbour::{NeighbourAddress, NeighbourAttribute},
};
use xdp_agent_tests::lab::block_on;
use xdp_common::{
    frame::{Headers as _, Parsed},
    net::{TCP, UDP, V4},
    tables::{Device, Route},
    verdict::{self, Counter, Event as E, Verdict},
};

use crate::{
    frames::*,
    maps,
    model::{self, Model},
    node::*,
};

const SEED: u64 = 0x0f10_77ed_cafe_2026;
const STEPS: u32 = 12_000;
const TIME_MAX: Duration = Duration::from_secs(20);
/// How many packets that have reached backends are remembered, to be answered.
const ARRIVED_MAX: usize = 64;
const PORTS: [u16; 6] = [2_000, 2_001, 29_999, 40_000, 40_001, 40_002];
const FLAGS: [u8; 6] = [SYN, ACK, ACK, ACK, FIN | ACK, RST];

/// What a sequence must have met to mean anything.
const MET: [E; 11] = [
    E::Transmitted,
    E::Delivered,
    E::SlowPath,
    E::Restored,
    E::Finished,
    E::Deferred,
    E::Unclaimed,
    E::FlowNew,
    E::FlowEstablished,
    E::FlowRenewed,
    E::HopRefreshed,
];

/// Numbers without a pattern (Marsaglia 2003, xorshift).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 16) % limit as u64) as usize
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// The same node twice.
struct Twins {
    node: Node,
    model: Model,
    dice: Dice,
    /// What backends have seen.
    arrived: Vec<Frame>,
    has_neighbour: bool,
    generation: u32,
    seed: u64,
    step: u32,
}

impl Twins {
    fn new(entry: Hook, seed: u64) -> Self {
        let node = Node::new(entry, Sizes { established: 1 << 12, buckets: 1 << 12 });
        let model = Model::new();
        let uplink = Device { snat: NODE, flags: CAPABLE, mtu: 1500, mac: node.mac, zero: [0; 2] };
        model.devices.borrow_mut().insert(node.ifindex, uplink);
        let dice = Dice(seed);
        let mut twins = Self {
            node,
            model,
            dice,
            arrived: Vec::new(),
            has_neighbour: true,
            generation: 1,
            seed,
            step: 0,
        };
        for proto in [TCP, UDP] {
            for (addr, is_local) in [(LOCAL, true), (REMOTE, false), (REMOTE_TOO, false)] {
                let ids =
                    (twins.node.backend(addr, proto, is_local), twins.model.backend(addr, proto, is_local));
                assert_eq!(ids.0, ids.1);
            }
            for vip in [VIP, VIP_TOO] {
                twins.ring(vip, proto);
            }
        }
        twins.model.route.set(twins.route());
        twins
    }

    /// What the model's routing table says, as the kernel's does.
    fn route(&self) -> Route {
        let (ifindex, smac) = (self.node.ifindex, self.node.mac);
        if self.has_neighbour {
            Route::Hop { ifindex, dmac: GATEWAY_MAC, smac, mtu: 1500 }
        } else {
            Route::NoNeighbour { ifindex }
        }
    }

    /// Gives a frontend a new ring.
    fn ring(&mut self, vip: Addr, proto: u8) {
        let first = if proto == TCP { 1 } else { 4 };
        let ids: Vec<u32> = (0..1 + self.dice.below(3)).map(|_| first + self.dice.below(3) as u32).collect();
        self.node.frontend(vip, proto, &ids, 0);
        self.model.frontend(vip, proto, &ids, 0);
    }

    /// One random thing happens.
    fn happen(&mut self) {
        let proto = self.dice.of(&[TCP, UDP]);
        match self.dice.below(100) {
            0..45 => self.send(proto),
            45..86 => self.answer(),
            86..92 => self.garble(proto),
            92..94 => {
                let vip = self.dice.of(&[VIP, VIP_TOO]);
                self.ring(vip, proto);
            }
            94..96 => self.move_neighbour(),
            96..97 => self.renew_backend(proto),
            _ => self.tick(),
        }
    }

    /// A packet of a client.
    fn send(&mut self, proto: u8) {
        let (port, vip) = (self.dice.of(&PORTS), self.dice.of(&[VIP, VIP, VIP_TOO]));
        let opener = self.node.opener(proto, port, vip);
        let client = self.dice.below(3) as u8;
        let sent = self.form(opener).with(|frame| frame.src.0[3] += client);
        self.comes_in(&sent);
    }

    /// An answer to something a backend has seen.
    fn answer(&mut self) {
        let Some(at) = self.arrived.len().checked_sub(1).map(|last| self.dice.below(last + 1)) else {
            return;
        };
        let seen = self.arrived[at].clone();
        let plain = Frame::new(seen.proto, (GATEWAY_MAC, self.node.mac), seen.dst, seen.src);
        let answer = self.form(plain);
        if seen.dst.0 == LOCAL {
            // Only a mark that test runs cannot set tells egress that a checksum is unfinished.
            self.goes_out(&answer.with(|frame| {
                if frame.check == Check::Offloaded {
                    frame.check = Check::Full;
                }
            }));
        } else {
            self.comes_in(&answer);
        }
    }

    /// Some form of a packet.
    fn form(&mut self, plain: Frame) -> Frame {
        let mut frame = plain.flags(self.dice.of(&FLAGS));
        frame.payload = vec![0x5a; 2 * self.dice.below(40)];
        match self.dice.below(24) {
            0 => frame.ttl = 1,
            1 => frame.payload = vec![0xa5; 1_600],
            2 => frame.options = vec![1; 4 * (1 + self.dice.below(10))],
            3 => frame.payload.push(7),
            4 => frame.check = Check::Offloaded,
            5 => return frame.looking_offloaded(),
            6 if frame.proto == UDP => frame.check = Check::Absent,
            7 => frame.padding = vec![0xee; 6],
            8 => frame.mac.1 = [2, 9, 9, 9, 9, 9],
            _ => {}
        }
        frame
    }

    /// A packet comes in: XDP first, tc behind it, and out again where it goes up half-translated.
    fn comes_in(&mut self, sent: &Frame) {
        let (action, mut after) = self.agree(self.node.entry, sent);
        if action == Action::Pass && after.is_none() && sent.check != Check::Offloaded {
            after = self.agree(Hook::TcIngress, sent).1;
        }
        let Some(after) = after else { return };
        if action == Action::Pass && after.dst.0 != LOCAL {
            self.goes_out(&after);
        } else {
            self.arrives(after);
        }
    }

    /// A packet leaves.
    fn goes_out(&mut self, sent: &Frame) {
        if let (_, Some(after)) = self.agree(Hook::TcEgress, sent) {
            self.arrives(after);
        }
    }

    fn arrives(&mut self, frame: Frame) {
        if frame.dst.1 == TARGET {
            self.arrived.truncate(ARRIVED_MAX - 1);
            self.arrived.insert(0, frame);
        }
    }

    /// Runs a packet through both and compares; returns what became of it, and the packet unless it is untouched.
    fn agree(&mut self, hook: Hook, sent: &Frame) -> (Action, Option<Frame>) {
        let bytes = sent.bytes();
        let (verdict, counts) = self.modelled(hook, &bytes);
        let (action, after) = translated(sent, verdict);
        let expected = after.as_ref().map_or(bytes.clone(), Frame::bytes);
        let name = format!("step {} of seed {:#x}, at {hook:?}: {sent:?}", self.step, self.seed);
        self.node.run(hook, &bytes).check(&name, action, &expected, &counts);
        (action, after)
    }

    /// What the model says to a frame, and what it counts.
    fn modelled(&self, hook: Hook, frame: &[u8]) -> (Verdict<Addr>, Vec<Counter>) {
        let before = self.model.counters.borrow().clone();
        let (verdict, counter) = match V4::parse(frame, self.node.ifindex) {
            Parsed::Packet(packet) => {
                let verdict = match hook {
                    Hook::Xdp | Hook::XdpFrags => self.model.xdp(&packet),
                    Hook::TcIngress => self.model.tc(&packet),
                    Hook::TcEgress => self.model.egress(&packet),
                };
                (verdict, None)
            }
            Parsed::Other => (Verdict::PASS, None),
            Parsed::Fragment => (Verdict::PASS, None),
            Parsed::Malformed => (Verdict::PASS, Some(Counter::Event(E::Malformed))),
        };
        let after = self.model.counters.borrow();
        let times = |counter: &Counter| {
            let of = |counters: &std::collections::HashMap<u32, u64>| {
                counters.get(&counter.index()).copied().unwrap_or(0)
            };
            (of(&after) - of(&before)) as usize
        };
        let all = maps::all().filter(|&counter| counter != Counter::Event(E::HopRefreshed));
        let counts = all.flat_map(|counter| vec![counter; times(&counter)]).chain(counter).collect();
        (verdict, counts)
    }

    /// A frame with random bytes in its headers is understood or left alone by both.
    fn garble(&mut self, proto: u8) {
        let plain = self.node.opener(proto, self.dice.of(&PORTS), VIP);
        let mut bytes = self.form(plain).bytes();
        for _ in 0..=self.dice.below(3) {
            // Not the addresses and ports: a flow of its own for each would outgrow the table of new flows.
            let at = ETHERNET - 2 + self.dice.below(14);
            bytes[at] = self.dice.below(256) as u8;
        }
        let cut = self.dice.of(&[0, 0, 1, 20]);
        bytes.truncate(bytes.len() - cut);
        let mut hook = self.dice.of(&[self.node.entry, Hook::TcIngress, Hook::TcEgress]);
        // What tc does with fragments depends on those before, which the model does not remember.
        let is_fragment = V4::parse(&bytes[..], self.node.ifindex) == Parsed::Fragment;
        if bytes.len() < SKB_MIN || is_fragment {
            hook = self.node.entry;
        }
        let (verdict, counts) = self.modelled(hook, &bytes);
        let name = format!("step {} of seed {:#x}, at {hook:?}: {bytes:02x?}", self.step, self.seed);
        let outcome = self.node.run(hook, &bytes);
        if matches!(verdict.action, verdict::Action::Pass | verdict::Action::Drop(_)) {
            outcome.check(&name, action(verdict), &bytes, &counts);
            return;
        }
        outcome.check(&name, action(verdict), &outcome.frame, &counts);
        let Parsed::Packet(packet) = V4::parse(&outcome.frame[..], self.node.ifindex) else {
            panic!("{name}: it came out as another kind of packet");
        };
        let (key, to) = (packet.key, verdict.rewrite);
        assert_eq!((key.src, key.sport, key.dst, key.dport), (to.src, to.sport, to.dst, to.dport), "{name}");
    }

    /// The gateway's neighbour entry goes, or comes back.
    fn move_neighbour(&mut self) {
        self.has_neighbour = !self.has_neighbour;
        if self.has_neighbour {
            let added = self.node.namespace.static_neighbour("eth0", GATEWAY.into(), GATEWAY_MAC);
            added.expect("a neighbour can be added");
        } else {
            forget_gateway(&self.node);
        }
        self.model.route.set(self.route());
        self.raise_epoch();
    }

    fn raise_epoch(&mut self) {
        self.node.raise_epoch();
        let mut config = self.model.config.get();
        config.epoch += 1;
        self.model.config.set(config);
    }

    /// A backend's id is given to another endpoint, which happens to have its address.
    fn renew_backend(&mut self, proto: u8) {
        let id = if proto == TCP { 1 } else { 4 } + self.dice.below(3) as u32;
        let mut backend = self.model.backends.borrow()[id as usize];
        self.generation += 1;
        backend.generation = self.generation;
        self.model.backends.borrow_mut()[id as usize] = backend;
        self.node.set_backend(id, backend.addr, proto, backend.addr == LOCAL, self.generation);
    }

    /// Time passes, and routes are looked at again.
    fn tick(&mut self) {
        self.raise_epoch();
        self.node.configure(|config| config.clock += 1);
        let mut config = self.model.config.get();
        config.clock += 1;
        self.model.config.set(config);
    }
}

/// What a verdict makes of a packet; nothing when it leaves it alone.
fn translated(sent: &Frame, verdict: Verdict<Addr>) -> (Action, Option<Frame>) {
    let is_sent = match verdict.action {
        verdict::Action::Reject(_) => panic!("every frontend of the sequence has endpoints"),
        verdict::Action::Pass | verdict::Action::Drop(_) => return (action(verdict), None),
        verdict::Action::Stack => false,
        verdict::Action::Transmit | verdict::Action::Redirect => true,
    };
    let to = verdict.rewrite;
    let after = sent.with(|frame| {
        frame.src = (to.src, u16::from_be_bytes(to.sport));
        frame.dst = (to.dst, u16::from_be_bytes(to.dport));
        if is_sent {
            frame.mac = (verdict.hop.smac, verdict.hop.dmac);
            frame.ttl -= 1;
        }
    });
    (action(verdict), Some(after))
}

fn action(verdict: Verdict<Addr>) -> Action {
    match verdict.action {
        verdict::Action::Pass | verdict::Action::Stack => Action::Pass,
        verdict::Action::Drop(_) | verdict::Action::Reject(_) => Action::Drop,
        verdict::Action::Transmit => Action::Transmit,
        verdict::Action::Redirect => Action::Redirect,
    }
}

fn forget_gateway(node: &Node) {
    let neighbours = node.namespace.netlink().neighbours();
    let entries = neighbours.get().set_address_family(AddressFamily::Inet).execute();
    let entries = block_on(entries.try_collect::<Vec<_>>()).expect("neighbours can be listed");
    let gateway = NeighbourAttribute::Destination(NeighbourAddress::Inet(GATEWAY.into()));
    let entry = entries.into_iter().find(|entry| entry.attributes.contains(&gateway));
    let entry = entry.expect("the gateway is a neighbour");
    block_on(node.namespace.netlink().neighbours().del(entry).execute()).expect("a neighbour can be removed");
}

#[test]
fn the_programs_and_the_model_agree_on_every_packet_of_a_long_sequence() {
    // The model speaks of the same addresses and ports, so that its builders and ours mean the same.
    assert_eq!((model::NODE, model::TARGET, model::HTTP), (NODE, TARGET.to_be_bytes(), HTTP.to_be_bytes()));
    for (entry, seed) in [(Hook::Xdp, SEED), (Hook::XdpFrags, SEED.rotate_left(7))] {
        let mut twins = Twins::new(entry, seed);
        let end = Instant::now() + TIME_MAX / 2;
        while twins.step < STEPS / 2 && Instant::now() < end {
            twins.happen();
            twins.step += 1;
        }
        println!("{entry:?}: {} steps", twins.step);
        for event in MET {
            let times = twins.model.events(event);
            assert!(times > 0, "{entry:?}: {} steps have never met {}", twins.step, event.label());
        }
    }
}
