//! The programs in the kernel and the decision on the host say the same, to long random sequences of packets and to
//! frames that are almost packets.
//!
//! `cargo xtask fuzz` runs more of both than a test has time for.

use std::{env, thread, time::Instant};

use nix::sched::{CloneFlags, setns};
use xdp_common::{
    net::{V4, V6},
    tunnel::Tunnel,
    verdict::{
        self,
        Counter::{self, Drop, Event},
        Event as E, Reason,
    },
};

use crate::{
    datagrams, errors,
    family::{Family, Hosts},
    frames::SKB_MIN,
    mutation::mutated,
    node::*,
    twins::{Sort, Twins},
    world::TRANSPORTS,
};

const SEED: u64 = 0x0f10_77ed_cafe_2026;
/// Frames of a sequence before it begins anew with other services.
const WORLD_FRAMES: u64 = 2_500;
/// Frames in a test run: of sequences, mutated ones, with ICMP among them, with fragments among them.
const PAIRS: u64 = 40_000;
const FRAMES: u64 = 60_000;
const ERRORS: u64 = 60_000;
const FRAGMENTS: u64 = 60_000;

/// Each family through each XDP program. The programs are loaded for every sequence, which takes longer than a test run's share
/// of frames.
const SEQUENCES: [(Hook, Family); 4] = [
    (Hook::Xdp, Family::V4),
    (Hook::XdpFrags, Family::V6),
    (Hook::Xdp, Family::V6),
    (Hook::XdpFrags, Family::V4),
];

/// What a sequence must have met to mean anything.
const MET: [Counter; 24] = [
    Event(E::Transmitted),
    Event(E::Redirected),
    Event(E::Delivered),
    Event(E::SlowPath),
    Event(E::Restored),
    Event(E::Finished),
    Event(E::Deferred),
    Event(E::Unclaimed),
    Event(E::Answered),
    Event(E::Unanswered),
    Event(E::NoEndpointPassed),
    Event(E::FlowNew),
    Event(E::FlowEstablished),
    Event(E::FlowRenewed),
    Event(E::HopRefreshed),
    Drop(Reason::NoEndpoint),
    Drop(Reason::NoLocalEndpoint),
    Drop(Reason::SourceRange),
    Drop(Reason::UnknownPort),
    Drop(Reason::UnknownServiceAddress),
    Drop(Reason::TunnelMtu),
    Event(E::Tunnelled),
    Event(E::Untunnelled),
    Counter::SnatAttempt(1),
];

/// What mutated frames must have met besides.
const MET_MUTATED: [Counter; 1] = [Event(E::Malformed)];

/// What must have become of ICMP messages, as no counter tells alone.
const MET_OF_ERRORS: [(Sort, verdict::Action, Counter); 14] = [
    (Sort::ErrorIn, verdict::Action::Transmit, Event(E::Related)),
    (Sort::ErrorIn, verdict::Action::Redirect, Event(E::Related)),
    (Sort::ErrorIn, verdict::Action::Tunnel, Event(E::Related)),
    (Sort::ErrorIn, verdict::Action::Stack, Event(E::Related)),
    (Sort::ErrorIn, verdict::Action::Stack, Event(E::Untunnelled)),
    (Sort::ErrorIn, verdict::Action::Drop(Reason::UnknownPort), Drop(Reason::UnknownPort)),
    (Sort::ErrorAround, verdict::Action::Transmit, Event(E::Related)),
    (Sort::ErrorAround, verdict::Action::Redirect, Event(E::Related)),
    (Sort::ErrorAround, verdict::Action::Stack, Event(E::Related)),
    (Sort::ErrorOut, verdict::Action::Stack, Event(E::Related)),
    (Sort::ErrorOut, verdict::Action::Stack, Event(E::Finished)),
    (Sort::Echo, verdict::Action::Transmit, Event(E::EchoAnswered)),
    (Sort::Unserved, verdict::Action::Drop(Reason::UnknownPort), Drop(Reason::UnknownPort)),
    (
        Sort::Unserved,
        verdict::Action::Drop(Reason::UnknownServiceAddress),
        Drop(Reason::UnknownServiceAddress),
    ),
];

/// What must have become of fragments.
const MET_OF_FRAGMENTS: [(Sort, verdict::Action, Counter); 20] = [
    (Sort::FirstIn, verdict::Action::Stack, Event(E::SlowPath)),
    (Sort::FirstIn, verdict::Action::Stack, Event(E::Delivered)),
    (Sort::FirstIn, verdict::Action::Stack, Event(E::FlowNew)),
    (Sort::FirstIn, verdict::Action::Tunnel, Event(E::Tunnelled)),
    (Sort::FirstIn, verdict::Action::Reject(Reason::NoEndpoint), Drop(Reason::NoEndpoint)),
    (Sort::FirstIn, verdict::Action::Drop(Reason::NoEndpoint), Drop(Reason::NoEndpoint)),
    (Sort::FirstIn, verdict::Action::Pass, Event(E::Fragment)),
    (Sort::AwaitedIn, verdict::Action::Stack, Event(E::SlowPath)),
    (Sort::AwaitedIn, verdict::Action::Stack, Event(E::Delivered)),
    (Sort::LaterIn, verdict::Action::Stack, Event(E::SlowPath)),
    (Sort::LaterIn, verdict::Action::Stack, Event(E::Delivered)),
    (Sort::LaterIn, verdict::Action::Tunnel, Event(E::Tunnelled)),
    (Sort::LaterIn, verdict::Action::Reject(Reason::NoEndpoint), Event(E::Unanswered)),
    (Sort::LaterIn, verdict::Action::Drop(Reason::NoEndpoint), Drop(Reason::NoEndpoint)),
    (Sort::LaterIn, verdict::Action::Pass, Event(E::FragmentHeld)),
    (Sort::LaterIn, verdict::Action::Pass, Event(E::FragmentLost)),
    (Sort::FirstOut, verdict::Action::Stack, Event(E::Restored)),
    (Sort::FirstOut, verdict::Action::Stack, Event(E::Finished)),
    (Sort::LaterOut, verdict::Action::Stack, Event(E::Restored)),
    (Sort::LaterOut, verdict::Action::Stack, Event(E::Finished)),
];

/// What goes through both besides the packets of a sequence.
#[derive(Clone, Copy)]
enum Traffic {
    Nothing,
    /// Frames that are almost packets of it.
    Mutated,
    /// ICMP about its packets.
    Errors,
    /// Packets of it in fragments.
    Fragments,
}

impl Traffic {
    /// The sequences that so many frames are worth: what is beside the path of whole TCP and UDP packets is the same code in both
    /// XDP programs.
    fn sequences(self, frames: u64) -> &'static [(Hook, Family)] {
        match self {
            Self::Errors if frames <= ERRORS => &SEQUENCES[..2],
            Self::Fragments if frames <= FRAGMENTS => &SEQUENCES[..2],
            Self::Nothing | Self::Mutated | Self::Errors | Self::Fragments => &SEQUENCES,
        }
    }

    /// What must have been decided on what.
    fn outcomes(self) -> &'static [(Sort, verdict::Action, Counter)] {
        match self {
            Self::Nothing | Self::Mutated => &[],
            Self::Errors => &MET_OF_ERRORS,
            Self::Fragments => &MET_OF_FRAGMENTS,
        }
    }

    /// One random thing happens.
    fn happen<F: Hosts + Tunnel>(self, twins: &mut Twins<F>) {
        match self {
            Self::Mutated if !twins.dice.once_in(4) => mutate(twins),
            Self::Errors if !twins.dice.once_in(3) => errors::happen(twins),
            Self::Fragments if !twins.dice.once_in(3) => datagrams::happen(twins),
            Self::Nothing | Self::Mutated | Self::Errors | Self::Fragments => twins.happen(),
        }
    }
}

/// A number from the environment, which `cargo xtask fuzz` sets.
fn wanted(variable: &str, default: u64) -> u64 {
    match env::var(variable) {
        Ok(value) => value.parse().unwrap_or_else(|error| panic!("{variable}={value}: {error}")),
        Err(_) => default,
    }
}

/// Runs sequences until so many frames have gone through both.
fn sequences(name: &str, frames: u64, met: &[Counter], traffic: Traffic) {
    let seed = wanted("XDP_AGENT_FUZZ_SEED", SEED);
    println!("{name}: {frames} frames of seed {seed}");
    let (begin, mut changed) = (Instant::now(), 0);
    let sequences = traffic.sequences(frames);
    let each = frames / sequences.len() as u64;
    for (entry, family) in sequences {
        changed += match family {
            Family::V4 => sequence::<V4>(*entry, seed, each, met, traffic),
            Family::V6 => sequence::<V6>(*entry, seed, each, met, traffic),
        };
    }
    println!("{name}: {changed} of them were changed; {:.0?}", begin.elapsed());
}

/// One sequence, on a thread of its own that enters the node's namespace; how many frames were changed.
fn sequence<F: Hosts + Tunnel>(
    entry: Hook,
    seed: u64,
    frames: u64,
    met: &[Counter],
    traffic: Traffic,
) -> u64 {
    let work = move || {
        let mut twins = Twins::<F>::new(entry, seed);
        setns(&twins.node.namespace, CloneFlags::CLONE_NEWNET).expect("a namespace we made can be entered");
        let mut end = 0;
        while end < frames {
            end = (end + WORLD_FRAMES).min(frames);
            while twins.frames < end {
                traffic.happen(&mut twins);
            }
            twins.compare_tables();
            twins.begin();
        }
        let missing: Vec<_> = met.iter().filter(|counter| twins.met(**counter) == 0).collect();
        let undecided: Vec<_> =
            traffic.outcomes().iter().filter(|outcome| !twins.has_met(**outcome)).collect();
        assert!(
            missing.is_empty() && undecided.is_empty(),
            "{entry:?}, {:?}: never met {missing:?} {undecided:?}",
            F::FAMILY
        );
        twins.changed
    };
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(changed) => changed,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// A frame that is almost one of a flow, at some hook.
fn mutate<F: Hosts + Tunnel>(twins: &mut Twins<F>) {
    let proto = twins.dice.of(&TRANSPORTS);
    let answer = if twins.dice.once_in(2) { twins.backend_frame() } else { None };
    let plain = answer.unwrap_or_else(|| twins.client_frame(proto));
    let bytes = mutated(&mut twins.dice, &plain);
    let mut hook = twins.dice.of(&[twins.node.entry, twins.node.entry, Hook::TcIngress, Hook::TcEgress]);
    if bytes.len() < SKB_MIN {
        hook = twins.node.entry;
    }
    twins.agree(hook, &bytes);
}

#[test]
fn the_programs_and_the_host_agree_on_every_packet_of_long_sequences() {
    sequences("agreement", wanted("XDP_AGENT_FUZZ_PAIRS", PAIRS), &MET, Traffic::Nothing);
}

#[test]
fn mutated_frames_are_left_alone_or_come_out_whole() {
    let met = [&MET[..], &MET_MUTATED[..]].concat();
    sequences("mutated", wanted("XDP_AGENT_FUZZ_FRAMES", FRAMES), &met, Traffic::Mutated);
}

#[test]
fn errors_about_flows_are_translated_whole_or_left_alone() {
    sequences("errors", wanted("XDP_AGENT_FUZZ_ERRORS", ERRORS), &[], Traffic::Errors);
}

#[test]
fn fragments_go_where_the_first_of_them_goes() {
    sequences("fragments", wanted("XDP_AGENT_FUZZ_FRAGMENTS", FRAGMENTS), &[], Traffic::Fragments);
}
