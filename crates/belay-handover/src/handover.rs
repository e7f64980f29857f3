//! The handover: how a device's attachment moves from one host to another, inside the VM's live migration.
//!
//! Two machines, one on each side, joined by an ordered connection. Neither knows of sockets, files or clocks.

mod destination;
mod source;

pub use destination::{Destination, DestinationAction, DestinationEvent, RingStart};
pub use source::{Source, SourceAction, SourceEvent};
