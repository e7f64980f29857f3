//! What can go wrong: with the connection, with a ring, with a chain.

use std::io;

/// Why a connection is over. The socket is to be closed; the VMM may connect again.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The VMM closed its end, between two messages.
    #[error("the VMM closed the vhost-user connection")]
    Closed,
    /// The VMM closed its end in the middle of a message.
    #[error(
        "the VMM closed the vhost-user connection in the middle of a message, after {have} of {need} bytes"
    )]
    Truncated {
        /// Bytes of the message that came.
        have: usize,
        /// Bytes that were awaited.
        need: usize,
    },
    /// The socket failed.
    #[error("vhost-user socket: {0}")]
    Socket(#[source] io::Error),
    /// The VMM does not read our replies.
    #[error("the VMM does not read the replies on its vhost-user connection")]
    NotReading,
    /// What came is not a vhost-user request.
    #[error("not a vhost-user request: {0}")]
    Malformed(String),
    /// A request of a kind that this back-end does not have, and that asked for no reply.
    #[error("the VMM sent vhost-user request {request}, which this back-end neither offers nor knows")]
    Unknown {
        /// The request's number.
        request: u32,
    },
    /// A request that could not be fulfilled, from a VMM that did not ask for a reply.
    #[error("vhost-user {request}: {reason}")]
    Refused {
        /// The request's name in the specification.
        request: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// Why the VMM could not be told of a new configuration space.
#[derive(Debug, thiserror::Error)]
pub enum SetConfigError {
    /// The configuration space is larger than the protocol can carry (256 bytes).
    #[error("a configuration space of {len} bytes: vhost-user carries at most 256")]
    TooLarge {
        /// Its length in bytes.
        len: usize,
    },
    /// The new space is in place, but the notification could not be sent: the guest sees it when it asks next.
    #[error("could not tell the VMM that the device's configuration changed: {0}")]
    Notify(#[source] io::Error),
}

/// Why a descriptor chain could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// This chain is bad; the ring is not yet. The head was consumed: answer it with [`Ring::reject`](crate::Ring::reject).
    #[error("bad descriptor chain at head {head}: {fault}")]
    BadChain {
        /// The chain's head.
        head: u16,
        /// What is wrong with it.
        fault: ChainFault,
    },
    /// The ring cannot be used any more until the VMM stops and starts it. Every later `pop` says the same.
    #[error("the ring is unusable: {0}")]
    Broken(RingFault),
}

/// What is wrong with a descriptor chain (virtio 1.2, section 2.7.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// The head is not below the ring's size (only for heads that did not come from the ring).
    #[error("the head is outside the ring")]
    HeadOutOfRange,
    /// A `next` is not below the table's size.
    #[error("a next index is outside the table")]
    NextOutOfRange,
    /// More descriptors than the ring or table has: a loop.
    #[error("the descriptors form a loop")]
    Loop,
    /// A descriptor of length zero.
    #[error("a descriptor has length zero")]
    ZeroLength,
    /// A buffer that is not, or not wholly, in the guest's memory.
    #[error("a buffer is outside the guest's memory")]
    OutsideMemory,
    /// The chain's buffers are longer than 2^32 bytes together.
    #[error("the chain is longer than 4 GiB")]
    TooLong,
    /// A device-readable descriptor behind a device-writable one.
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
    /// An indirect descriptor though VIRTIO_F_INDIRECT_DESC was not negotiated.
    #[error("an indirect descriptor, which was not negotiated")]
    IndirectNotNegotiated,
    /// An indirect descriptor inside an indirect table.
    #[error("an indirect table inside an indirect table")]
    NestedIndirect,
    /// An indirect descriptor that also has a next.
    #[error("an indirect descriptor has a next")]
    IndirectWithNext,
    /// An indirect table whose length is no multiple of 16 bytes, or that has more than 32768 entries.
    #[error("an indirect table has an impossible length")]
    IndirectLength,
}

/// What makes a ring unusable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// The available index is ahead by more than the ring's size.
    #[error("the available index jumped to {avail}, with {next} next of a ring of {size}")]
    AvailJumped {
        /// The index found in the available ring.
        avail: u16,
        /// The index to be popped next.
        next: u16,
        /// The ring's size.
        size: u16,
    },
    /// The available ring names a head that is not below the ring's size.
    #[error("the available ring names head {head}, outside the ring")]
    HeadOutOfRange {
        /// The head.
        head: u16,
    },
    /// The available ring names a head that is in flight already.
    #[error("the available ring names head {head}, which is in flight already")]
    HeadInFlight {
        /// The head.
        head: u16,
    },
    /// A bad chain that has no place for an answer. It is not given back: a driver might take what is in its memory
    /// for one.
    #[error("the bad chain at head {head} has no place for an answer")]
    NoAnswer {
        /// The head.
        head: u16,
    },
}
