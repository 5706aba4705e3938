//! What the agent tries a program on once it is attached, before anything is served: frames that are nobody's.

use std::os::fd::{AsFd, BorrowedFd};

use aya::EbpfLoader;
use xdp_agent::{
    attach::{programs::load_xdp, xdp::prove_on},
    host::Link,
};
use xdp_agent_tests::lab::pass;

use crate::programs;

/// `r0 = XDP_DROP; exit`.
const DROP: [u64; 2] = [0x0000_0001_0000_00b7, 0x0000_0000_0000_0095];
/// Writes 1 to the first byte of the frame, if there is one, and passes it.
const CHANGE: [u64; 8] = [
    0x0000_0000_0000_1261, // r2 = ctx->data
    0x0000_0000_0004_1361, // r3 = ctx->data_end
    0x0000_0000_0000_24bf, // r4 = r2
    0x0000_0001_0000_0407, // r4 += 1
    0x0000_0000_0001_342d, // if r4 > r3 goto +1
    0x0000_0001_0000_0272, // *(u8 *)(r2 + 0) = 1
    0x0000_0002_0000_00b7, // r0 = XDP_PASS
    0x0000_0000_0000_0095, // exit
];

fn prove(program: BorrowedFd<'_>) -> Result<(), String> {
    let loopback = Link { index: 1, name: "lo".to_owned(), ..Link::default() };
    prove_on(program, &loopback).map_err(|error| error.to_string())
}

#[test]
fn the_products_programs_leave_frames_of_every_length_to_the_kernel() {
    let mut object = EbpfLoader::new().load_file(programs::object()).expect("the object");
    for name in ["xdp_ingress", "xdp_ingress_frags"] {
        load_xdp(&mut object, name).unwrap_or_else(|error| panic!("loading {name}: {error:#}"));
        let program: &aya::programs::Xdp =
            object.program(name).expect("the program").try_into().expect("a program of XDP");
        assert_eq!(prove(program.fd().expect("it is loaded").as_fd()), Ok(()), "{name}");
    }
}

#[test]
fn a_program_that_drops_or_changes_a_frame_is_found() {
    for (instructions, words) in
        [(&DROP[..], "verdict 1 and 60 bytes, unchanged"), (&CHANGE, "verdict 2 and 60 bytes, changed")]
    {
        let program = pass::load(instructions).expect("a program");
        let error = prove(program.as_fd()).expect_err("the program does what it must not");
        assert!(error.contains("lo has answered a frame of 60 bytes") && error.contains(words), "{error}");
    }
}
