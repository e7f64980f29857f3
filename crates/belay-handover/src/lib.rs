//! The decisions, without I/O: the handover and the exchange.
//!
//! Plain machines: an event goes in, the next state and a list of actions come out. No socket, file, clock, thread
//! or async. The agent drives them on a device's thread, tests drive them in any order they like.

pub mod exchange;
pub mod handover;
