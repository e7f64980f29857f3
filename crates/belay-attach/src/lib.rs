//! A device on this host: port plus backend, joined by a table of requests in flight, on one thread.
//!
//! The thread owns everything of its device: the VMM's socket and queues, the backend, the connections to other
//! agents, and one io_uring that they share. It carries out what the machines of `belay-handover` decide. The
//! control plane reaches it through a [`DeviceHandle`] only.

mod client;
mod conn;
mod device;
mod exchange;
mod handle;
mod handover;
mod home;
mod open;
mod parked;
mod parts;
mod port;
mod requests;
mod serve;
mod spin;
mod stats;
mod thread;

pub use conn::PeerSocket;
pub use device::BACKEND_OWNER;
pub use handle::{Command, DeviceConfig, DeviceHandle, ExchangeOptions, LinkTimes, Notice, Role};
pub use open::{OpenFrameError, read_open};
pub use stats::{ExchangeProgress, LATENCY_BOUNDS_US, Latency, LatencyHistogram, Snapshot};
