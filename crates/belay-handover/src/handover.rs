//! The handover: how a device's attachment moves from one host to another, inside the VM's live migration.
//!
//! Machines on each side, joined by an ordered connection. None knows of sockets, files or clocks. [`Source`] is at
//! the host that has the backing: it lends the device, and takes it back. [`Destination`] is where a guest comes to a
//! backing elsewhere; once it is there, [`Borrower`] holds the device, until the guest goes home.

mod borrower;
mod destination;
mod rings;
mod source;
#[cfg(test)]
mod source_tests;

pub use borrower::{Borrower, BorrowerAction, BorrowerEvent};
pub use destination::{Destination, DestinationAction, DestinationEvent};
pub use rings::RingStart;
pub use source::{Source, SourceAction, SourceEvent};
