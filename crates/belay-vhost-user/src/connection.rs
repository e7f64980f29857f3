//! One VMM connection: takes its messages, keeps its rings.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use crate::error::{ConnectionError, SetConfigError};
use crate::ring::Ring;

/// What a device offers to the VMM.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Feature bits of the device class (for example `VIRTIO_BLK_F_*`). The connection adds VERSION_1, indirect
    /// descriptors, event index, VHOST_F_LOG_ALL and VHOST_USER_F_PROTOCOL_FEATURES.
    pub device_features: u64,
    /// Number of queues, 1 to 64.
    pub queues: u16,
    /// The largest ring that is accepted, in entries: a power of two, at most 32768.
    pub queue_entries: u16,
    /// The device configuration space, at most 256 bytes. Reads beyond its end give zeroes.
    pub config: Vec<u8>,
}

/// A request that the in-flight region calls in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marked {
    /// Its head.
    pub head: u16,
    /// What [`Ring::mark`] stored with it; 0 if the region was made by another back-end.
    pub tag: u64,
}

/// What the device must act on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The ring has everything it needs: [`Connection::ring`] gives it. It begins at `base`, with notifications as
    /// the guest finds them: call [`Ring::enable_notifications`] when nothing is left to pop.
    RingStarted {
        /// The queue's index.
        queue: u16,
        /// What SET_VRING_BASE said: the available index to pop next, unless requests are adopted.
        base: u16,
        /// The used index found in guest memory.
        used: u16,
        /// What the in-flight region says is in flight, in the order of submission. Empty without a region.
        marked: Vec<Marked>,
        /// Whether there is an in-flight region for this queue.
        inflight_region: bool,
    },
    /// The ring was stopped (GET_VRING_BASE, already answered with `base`; or RESET_DEVICE). Everything completed
    /// before is published and logged. [`Connection::ring`] no longer gives it, and guest memory must not be changed
    /// on its behalf any more; the memory of chains in flight stays mapped as long as they are held.
    RingStopped {
        /// The queue's index.
        queue: u16,
        /// The available index to be popped next, as told to the VMM.
        base: u16,
    },
    /// SET_VRING_ENABLE 0: the ring stays, may complete and publish, but pops nothing.
    RingDisabled {
        /// The queue's index.
        queue: u16,
    },
    /// SET_VRING_ENABLE 1 on a ring that was disabled while it ran: pop again.
    RingEnabled {
        /// The queue's index.
        queue: u16,
    },
    /// The kick eventfd of a running ring was replaced: poll [`Ring::kick_fd`] anew.
    KickChanged {
        /// The queue's index.
        queue: u16,
    },
    /// RESET_DEVICE (`reset`) or GET_INFLIGHT_FD (not `reset`): what was in flight before has lost its meaning and
    /// must not touch guest memory any more. No further message is handled until [`Connection::quiesced`], which must
    /// be called in any case, at once if nothing is in flight.
    Quiesce {
        /// It is RESET_DEVICE.
        reset: bool,
    },
}

/// One VMM's connection, for one device.
///
/// After [`next_event`](Self::next_event) has failed the rings can still be reached, so that what is done can be
/// completed and published for a VMM that reconnects.
pub struct Connection {
    socket: UnixStream,
    offer: Offer,
    rings: Vec<Option<Ring>>,
}

impl Connection {
    /// Serves the VMM at the other end of `socket`, which becomes non-blocking.
    ///
    /// # Errors
    /// The offer is impossible (`InvalidInput`), or the socket cannot be made non-blocking.
    pub fn new(socket: UnixStream, offer: Offer) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let rings = (0..offer.queues).map(|_| None).collect();
        Ok(Self { socket, offer, rings })
    }

    /// The socket, to be polled for readability.
    #[must_use]
    pub fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Handles messages that have come, replying as the protocol says, up to the first one that the device must act
    /// on. `None`: nothing more has come. Call it again until it says so.
    ///
    /// # Errors
    /// The connection is over.
    pub fn next_event(&mut self) -> Result<Option<Event>, ConnectionError> {
        Ok(None)
    }

    /// A ring that runs; `None` if it was not started, was stopped, or does not exist.
    #[inline]
    pub fn ring(&mut self, queue: u16) -> Option<&mut Ring> {
        self.rings.get_mut(usize::from(queue))?.as_mut()
    }

    /// Answers the message behind [`Event::Quiesce`]: nothing of before touches guest memory any more.
    ///
    /// # Errors
    /// The connection is over.
    pub fn quiesced(&mut self) -> Result<(), ConnectionError> {
        Ok(())
    }

    /// Replaces the device configuration space (a resize) and tells the VMM, if it gave a channel for that.
    ///
    /// # Errors
    /// The space is too large, or the VMM could not be told.
    pub fn set_config(&mut self, config: Vec<u8>) -> Result<(), SetConfigError> {
        self.offer.config = config;
        Ok(())
    }
}
