//! The decision on ordinary maps: what a packet meets, from the first of a flow to the last.

mod direct;
mod fragments;
mod model;
mod node;
mod opening;
mod properties;
mod related;
mod removed;
mod sending;
mod socket;
