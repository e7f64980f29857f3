//! The guests of Belay's tests and demo: an I/O load that checks every byte it reads.
//!
//! The binary, `belay-probe`, runs inside a Linux guest (see `scripts/guest-image`); [`boot_sector`] is a guest of
//! its own.

pub mod boot;

pub use boot::boot_sector;
