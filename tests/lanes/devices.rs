//! The agent on devices of every sort: native where the driver has it, else generic with the driver's reason, and traffic
//! by either.
//!
//! The cards are those of a machine that `cargo xtask vm` has made, each with another at the end of its cable:
//! `cargo xtask vm --lane devices`.

#[path = "devices/cable.rs"]
mod cable;
#[path = "devices/cards.rs"]
mod cards;
#[path = "devices/software.rs"]
mod software;
#[path = "devices/tagged.rs"]
mod tagged;

// What the lane netns has too.
#[path = "netns/dual.rs"]
mod dual;
#[path = "netns/layered.rs"]
mod layered;
