//! The guests of Belay's tests and demo: an I/O load that checks every byte it reads.
//!
//! The binary, `belay-probe`, runs inside a Linux guest (see `scripts/guest-image`) and talks to the host on the
//! serial console: lines of JSON out, one-word commands in. [`boot_sector`] is a guest of its own, for tests that
//! need no Linux.
//!
//! | module | what it is |
//! |---|---|
//! | [`pattern`] | what a block holds: who wrote it, when, and a filler that nothing else looks like |
//! | [`versions`] | which version of each block a read may return |
//! | [`load`] | the parts of a load: workers, preparation, verification, commands |
//! | [`disk`], [`files`] | the two loads: a raw disk, and files in a file system |
//! | [`stats`] | counters and latencies |
//! | [`console`] | reports and commands |

pub mod boot;
pub mod console;
pub mod disk;
pub mod files;
pub mod load;
pub mod pattern;
mod race;
pub mod stats;
pub mod versions;

pub use boot::boot_sector;
