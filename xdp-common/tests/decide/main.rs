//! The decision on ordinary maps: what a packet meets, from the first of a flow to the last.

mod model;
mod node;
mod opening;
mod properties;
mod sending;
mod socket;
