//! The load-balancing decision, compiled once for the host and once for the kernel.
//!
//! Everything here is a function of its inputs: no I/O, no clock, no `unsafe`, no aya. The kernel programs implement
//! [`tables::Tables`] on BPF maps; tests, `explain` and fuzzers implement it on ordinary maps. What is tested on the
//! host is what runs in the kernel.
//!
//! Read in the order of a packet: [`frame`] parses, [`gate`] turns away what is not ours, [`decide`] finds the flow or
//! makes one ([`select`], [`conntrack`]), [`verdict`] says what to do with the frame.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod answer;
pub mod checksum;
pub mod conntrack;
pub mod decide;
pub mod fragment;
pub mod frame;
pub mod gate;
pub mod icmp;
pub mod net;
pub mod sctp;
pub mod select;
pub mod tables;
pub mod tunnel;
pub mod verdict;
