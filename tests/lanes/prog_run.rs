//! Frames in, frames and counters out: the product's programs by `BPF_PROG_TEST_RUN`.
//!
//! Every frame that comes out is compared byte for byte with one that etherparse has built from scratch, and every
//! counter with what the frame should have raised. Needs root and the BPF object, and fails with what to do when one is
//! missing: `cargo test -p xdp-agent-tests --features prog-run --test prog_run`.

#[path = "prog_run/agreement.rs"]
mod agreement;
#[path = "prog_run/answers.rs"]
mod answers;
#[path = "prog_run/applied.rs"]
mod applied;
#[path = "prog_run/batch.rs"]
mod batch;
#[path = "prog_run/checksums.rs"]
mod checksums;
#[path = "prog_run/datagrams.rs"]
mod datagrams;
#[path = "prog_run/dice.rs"]
mod dice;
#[path = "prog_run/errors.rs"]
mod errors;
#[path = "prog_run/established.rs"]
mod established;
#[path = "prog_run/extensions.rs"]
mod extensions;
#[path = "prog_run/family.rs"]
mod family;
#[path = "prog_run/flows.rs"]
mod flows;
#[path = "prog_run/forwarding.rs"]
mod forwarding;
#[path = "prog_run/fragments.rs"]
mod fragments;
#[path = "prog_run/frames.rs"]
mod frames;
#[path = "prog_run/full_tables.rs"]
mod full_tables;
#[path = "prog_run/here.rs"]
mod here;
#[path = "prog_run/icmp.rs"]
mod icmp;
#[path = "prog_run/icmp_v6.rs"]
mod icmp_v6;
#[path = "prog_run/maps.rs"]
mod maps;
#[path = "prog_run/messages.rs"]
mod messages;
/// The node of the host's own tests, of which this lane needs a part.
#[allow(dead_code, reason = "the host's tests use the rest")]
#[path = "../../xdp-common/tests/decide/model.rs"]
mod model;
#[path = "prog_run/mutation.rs"]
mod mutation;
#[path = "prog_run/node.rs"]
mod node;
#[path = "prog_run/not_ours.rs"]
mod not_ours;
#[path = "prog_run/places.rs"]
mod places;
#[path = "prog_run/policies.rs"]
mod policies;
#[path = "prog_run/programs.rs"]
mod programs;
#[path = "prog_run/proof.rs"]
mod proof;
#[path = "prog_run/refusals.rs"]
mod refusals;
#[path = "prog_run/relay.rs"]
mod relay;
#[path = "prog_run/removed.rs"]
mod removed;
#[path = "prog_run/renewal.rs"]
mod renewal;
#[path = "prog_run/sctp.rs"]
mod sctp;
#[path = "prog_run/slow_path.rs"]
mod slow_path;
#[path = "prog_run/spare.rs"]
mod spare;
/// The stack that programs take, as the build counts it.
#[path = "../../xtask/src/stack.rs"]
mod stack;
#[path = "prog_run/tcp.rs"]
mod tcp;
#[path = "prog_run/tunnel.rs"]
mod tunnel;
#[path = "prog_run/twins.rs"]
mod twins;
#[path = "prog_run/verifier.rs"]
mod verifier;
#[path = "prog_run/world.rs"]
mod world;
