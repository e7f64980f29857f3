//! The block class: virtio-blk requests, and the backends that execute them.
//!
//! A data-plane thread parses a descriptor chain into a request, turns it into an [`Op`] and submits that to a
//! [`Backend`]; the backend hands a [`Done`] back. Backends own no thread: they queue work on the thread's
//! [`Ring`](belay_reactor::Ring) and are told of its completions.

pub mod backend;
mod delay;
mod fault;
mod file;
mod memory;
pub mod op;
mod open;
mod pool;
mod spec;
pub mod testing;
mod throttle;
pub mod virtio;

pub use backend::{Backend, BackendInfo, Done};
pub use delay::Delay;
pub use fault::{Fault, FaultKind, FaultRule};
pub use file::FileBackend;
pub use memory::MemoryBackend;
pub use op::{Buf, IoVec, Op, OpId, OpKind, Status};
pub use open::{FileOptions, OpenError, direct_block_bytes, free_space};
pub use pool::BufferPool;
pub use spec::{BackendSpec, Driver};
pub use throttle::{Throttle, ThrottleSpec};
pub use virtio::StatusByte;
