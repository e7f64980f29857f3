//! The exchange: how a device's backing moves to the host of its attachment, while the guest uses it.
//!
//! A [`BlockMap`] says for every 4 KiB block whether its content is here. [`Pull`] decides what to fetch, what to
//! write on which side, and when both sides are equal and the old one may be let go.

mod locks;
mod map;
mod pull;
#[cfg(test)]
mod pull_tests;

pub use map::{BLOCK_BYTES, BlockMap, BootId, MapError};
pub use pull::{Action, GuestKind, OpId, Outcome, Progress, Pull, PullConfig, StepId};
