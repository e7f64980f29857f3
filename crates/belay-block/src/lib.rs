//! The block class: virtio-blk requests, and the backends that execute them.
//!
//! A data-plane thread parses a descriptor chain into a request, turns it into an [`Op`] and submits that to a
//! [`Backend`]; the backend hands a [`Done`] back. Backends own no thread: they queue work on the thread's
//! [`Ring`](belay_reactor::Ring) and are told of its completions.

pub mod backend;
pub mod op;
pub mod virtio;

pub use backend::{Backend, BackendInfo, Done};
pub use op::{Buf, IoVec, Op, OpId, OpKind, Status};
