//! vhost-user back-end protocol server: a VMM's messages become started and stopped queues.
//!
//! One [`Connection`] serves one VMM socket for a device of any class; the class gives its feature bits, queue
//! count and configuration space as an [`Offer`]. The connection has no thread and no event loop of its own: a
//! data-plane thread owns it, polls its descriptor for readability and asks for the [`Event`]s.
//!
//! ```text
//!   VMM socket ──▶ Connection ──▶ Event (ring started, stopped, …)
//!                      │
//!                      └── Ring ──▶ pop() → Chain ──▶ device ──▶ log_written() · complete() · publish()
//! ```
//!
//! What differs from other servers, and why there is one of our own: GET_VRING_BASE is answered without draining, at
//! once or when the device says so; requests in flight are recorded in the in-flight region with a tag of the device's; the dirty log stays
//! exact when its base is replaced or the memory table changes; and clearing VHOST_F_LOG_ALL is respected.
//!
//! Only split rings are served. Guest memory is shared with a guest that may change it at any time: it is reached
//! only through raw pointers and atomics, never through Rust references.

mod bell;
mod chain;
mod connection;
mod error;
mod guard;
mod inflight;
mod log;
mod mapping;
mod memory;
mod message;
mod requests;
mod ring;
mod socket;
mod walk;

pub use chain::{Chain, Piece};
pub use connection::{Connection, Event, Marked, Offer};
pub use error::{ChainFault, ConnectionError, RingError, RingFault, SetConfigError};
pub use guard::faults;
pub use memory::GuestMemory;
pub use ring::Ring;
