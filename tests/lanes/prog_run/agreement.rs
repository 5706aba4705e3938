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
        Counter::{self, Drop, Event},
        Event as E, Reason,
    },
};

use crate::{family::Hosts, frames::ETHERNET, mutation::mutated, node::*, twins::Twins, world::TRANSPORTS};

const SEED: u64 = 0x0f10_77ed_cafe_2026;
/// Frames of a sequence before it begins anew with other services.
const WORLD_FRAMES: u64 = 2_500;
/// Pairs of a state and a frame that are compared, and mutated frames, in a test run.
const PAIRS: u64 = 40_000;
const FRAMES: u64 = 60_000;

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

/// A number from the environment, which `cargo xtask fuzz` sets.
fn wanted(variable: &str, default: u64) -> u64 {
    match env::var(variable) {
        Ok(value) => value.parse().unwrap_or_else(|error| panic!("{variable}={value}: {error}")),
        Err(_) => default,
    }
}

/// Runs sequences for each family and each XDP program until so many frames have gone through both.
fn sequences(name: &str, frames: u64, met: &[Counter], is_mutated: bool) {
    let seed = wanted("XDP_AGENT_FUZZ_SEED", SEED);
    println!("{name}: {frames} frames of seed {seed}");
    let (begin, mut changed) = (Instant::now(), 0);
    for entry in [Hook::Xdp, Hook::XdpFrags] {
        changed += sequence::<V4>(entry, seed, frames / 4, met, is_mutated);
        changed += sequence::<V6>(entry, seed, frames / 4, met, is_mutated);
    }
    println!("{name}: {changed} of them were changed; {:.0?}", begin.elapsed());
}

/// One sequence, on a thread of its own that enters the node's namespace; how many frames were changed.
fn sequence<F: Hosts + Tunnel>(
    entry: Hook,
    seed: u64,
    frames: u64,
    met: &[Counter],
    is_mutated: bool,
) -> u64 {
    let work = move || {
        let mut twins = Twins::<F>::new(entry, seed);
        setns(&twins.node.namespace, CloneFlags::CLONE_NEWNET).expect("a namespace we made can be entered");
        let mut end = 0;
        while end < frames {
            end = (end + WORLD_FRAMES).min(frames);
            while twins.frames < end {
                if is_mutated && !twins.dice.once_in(4) {
                    mutate(&mut twins);
                } else {
                    twins.happen();
                }
            }
            twins.compare_tables();
            twins.begin();
        }
        let missing: Vec<_> = met.iter().filter(|counter| twins.met(**counter) == 0).collect();
        assert!(missing.is_empty(), "{entry:?}, {:?}: never met {missing:?}", F::FAMILY);
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
    // The kernel makes no skb of less than an IP header.
    // What tc does with fragments depends on those before, which the host's tables do not hold.
    if bytes.len() < ETHERNET + 40 || twins.is_fragment(&bytes) {
        hook = twins.node.entry;
    }
    twins.agree(hook, &bytes);
}

#[test]
fn the_programs_and_the_host_agree_on_every_packet_of_long_sequences() {
    sequences("agreement", wanted("XDP_AGENT_FUZZ_PAIRS", PAIRS), &MET, false);
}

#[test]
fn mutated_frames_are_left_alone_or_come_out_whole() {
    let met = [&MET[..], &MET_MUTATED[..]].concat();
    sequences("mutated", wanted("XDP_AGENT_FUZZ_FRAMES", FRAMES), &met, true);
}
