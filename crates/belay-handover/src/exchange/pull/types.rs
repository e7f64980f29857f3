//! What a copy is told, and what it asks for.

use std::time::Duration;

/// The driver's number for a guest operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OpId(pub u64);

/// A piece of work given to the driver; its end comes back under this number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepId(pub u64);

/// What a guest operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestKind {
    /// Read.
    Read,
    /// Write, discard or write zeroes: the driver knows which.
    Change,
    /// Flush.
    Flush,
}

/// How a step or an operation ended: 0, or an errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Well.
    Ok,
    /// With this errno.
    Errno(i32),
}

/// What the driver must do. `step`s are reported back by [`super::Pull::step_done`] (or [`super::Pull::extents`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Execute a guest read here, straight into the guest's memory.
    ReadLocal {
        /// Report.
        step: StepId,
        /// The read.
        op: OpId,
    },
    /// Read from the old backing into a buffer that belongs to `job`.
    Fetch {
        /// Report; say whether all bytes were zero.
        step: StepId,
        /// Whose buffer.
        job: u64,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// For the guest: on its own channel. Otherwise on the copier's.
        for_guest: bool,
    },
    /// Copy a guest read's bytes out of the job's buffer.
    Answer {
        /// The read.
        op: OpId,
        /// Whose buffer, and where it begins on the device.
        job: u64,
        /// The buffer's first byte on the device.
        at: u64,
    },
    /// Write part of the job's buffer here.
    Store {
        /// Report.
        step: StepId,
        /// Whose buffer.
        job: u64,
        /// First byte on the device.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Where the buffer begins on the device.
        at: u64,
    },
    /// Make a range read as zeroes here, freeing its space.
    ZeroLocal {
        /// Report.
        step: StepId,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Free the job's buffer.
    EndJob(u64),
    /// Execute a guest's change at the old backing, from a stable copy of its data.
    ChangeRemote {
        /// Report.
        step: StepId,
        /// The change.
        op: OpId,
    },
    /// Execute part of a guest's change here, from the same copy.
    ChangeLocal {
        /// Report.
        step: StepId,
        /// The change.
        op: OpId,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Flush the old backing.
    FlushRemote(StepId),
    /// Flush the local side.
    FlushLocal(StepId),
    /// A guest operation has ended.
    Complete {
        /// Which.
        op: OpId,
        /// How.
        outcome: Outcome,
    },
    /// Ask the old backing where there is data; answer with [`super::Pull::extents`].
    AskExtents {
        /// Report.
        step: StepId,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Write the map given by [`super::Pull::take_snapshot`] to its file, durably: the local side has just been flushed.
    SaveMap,
    /// Everything is here, flushed on both sides; changes are held. Commit on both hosts.
    ReadyToCut,
    /// The local side failed: the copy is worth nothing. Once nothing is in flight, go back to plain remote.
    Abandon {
        /// Why.
        errno: i32,
    },
}

/// Knobs of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PullConfig {
    /// The device's size in bytes.
    pub size_bytes: u64,
    /// Bytes fetched at a time by the copier.
    pub chunk_bytes: u64,
    /// Bytes that the copier may have asked for and not got.
    pub window_bytes: u64,
    /// The copier's limit in bytes per second.
    pub bandwidth: Option<u64>,
    /// How often the map is saved while it changes.
    pub save_every: Duration,
}

impl PullConfig {
    /// The defaults for a device of this size: 256 KiB chunks, 1 MiB window, saved every 2 s.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            chunk_bytes: 256 << 10,
            window_bytes: 1 << 20,
            bandwidth: None,
            save_every: Duration::from_secs(2),
        }
    }
}

/// Bytes so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Of the device.
    pub total: u64,
    /// Here.
    pub local: u64,
    /// Fetched.
    pub copied: u64,
    /// Written by the guest to both sides.
    pub echoed: u64,
    /// Not sent, being holes or zeroes.
    pub skipped: u64,
}
