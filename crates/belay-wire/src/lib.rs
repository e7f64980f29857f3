//! Every byte that two builds of Belay may exchange: ids, the frames of the link, the negotiation of versions,
//! the list of requests in flight, and the messages of control. No I/O.
//!
//! Everything multi-byte is little-endian. Golden tests freeze the bytes: a change that breaks one needs a new
//! version of the wire, not a new golden. See `docs/wire.md`.

pub mod control;
pub mod device;
pub mod frame;
pub mod hello;
pub mod ids;
pub mod inflight;

pub use control::Refusal;
pub use device::DeviceIdentity;
pub use frame::{Frame, FrameError, FrameKind, HEADER_BYTES, Header, MAX_PAYLOAD_BYTES};
pub use hello::{ConnectionKind, Hello, Version};
pub use ids::{DeviceId, Epoch, HeadIndex, QueueIndex, TxId};
pub use inflight::{InflightList, ListedRequest, QueueBase, RequestKind, RequestState};
