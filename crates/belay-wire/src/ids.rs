//! Ids that travel on the link and are kept in ledgers.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A device, for its whole life and on every host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceId(pub uuid::Uuid);

impl DeviceId {
    /// A new, random id.
    #[must_use]
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4())
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How often a device's attachment has moved. The backing executes only requests of the newest epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A request's number: unique within a device for all its epochs, and growing.
///
/// The attachment that first sees a request draws it as `epoch << 40 | counter`, so that two epochs never draw
/// the same; a request that is in flight at a handover keeps the number it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TxId(pub u64);

/// Bits of a [`TxId`] that count within one epoch: a million requests a second for twelve days.
const TXID_COUNTER_BITS: u32 = 40;

impl TxId {
    /// The first number of an epoch. The counter starts at 1; 0 is no request.
    #[must_use]
    pub fn first_of(epoch: Epoch) -> Self {
        Self(epoch.0 << TXID_COUNTER_BITS | 1)
    }

    /// The epoch in which it was drawn.
    #[must_use]
    pub fn epoch(self) -> Epoch {
        Epoch(self.0 >> TXID_COUNTER_BITS)
    }

    /// The number after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for TxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// A queue of a device, from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct QueueIndex(pub u16);

impl fmt::Display for QueueIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The first descriptor of a chain: what the guest put into the available ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HeadIndex(pub u16);
