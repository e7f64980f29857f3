//! What a device is, as its guest sees it: the same on every host it comes to.

use serde::{Deserialize, Serialize};

use crate::ids::DeviceId;

/// A device's identity, constant while it moves. The destination must know it before its VMM starts, because
/// QEMU reads it as soon as it connects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceIdentity {
    /// Its id.
    pub id: DeviceId,
    /// Its name, unique on a host; letters, digits, `-`, `_` and `.`, at most 64 of them.
    pub name: String,
    /// The VM it belongs to, if any.
    pub vm: Option<String>,
    /// What kind of device, and that kind's properties.
    pub class: DeviceClass,
}

/// A kind of device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "class", rename_all = "snake_case")]
pub enum DeviceClass {
    /// A disk.
    Block(BlockGeometry),
}

/// A disk's properties.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockGeometry {
    /// Capacity in bytes; a multiple of 512.
    pub size_bytes: u64,
    /// Logical block size in bytes: 512 or 4096.
    pub block_bytes: u32,
    /// Number of queues, 1 to 64.
    pub queues: u16,
    /// The longest queue the guest may set up, in entries; a power of two.
    pub queue_entries: u16,
    /// The guest may not write.
    pub read_only: bool,
    /// What GET_ID answers: at most 20 bytes of ASCII.
    pub serial: String,
}
