//! One split virtqueue that runs (virtio 1.2, section 2.7).
#![allow(unsafe_code, reason = "rings live in guest memory, which is reached through raw pointers")]

use std::os::fd::RawFd;

use crate::chain::Chain;
use crate::error::RingError;

/// A started ring: pops the guest's chains and gives them back used.
///
/// The order for one request: [`pop`](Self::pop), [`mark`](Self::mark), do it, write its data,
/// [`log_written`](Self::log_written), [`complete`](Self::complete); then [`publish`](Self::publish) once per batch.
pub struct Ring {
    size: u16,
    next_avail: u16,
    used_idx: u16,
}

impl Ring {
    /// The eventfd that the guest's kicks arrive on; `None` only before the VMM gave one.
    #[must_use]
    pub fn kick_fd(&self) -> Option<RawFd> {
        None
    }

    /// Takes the pending kicks from the eventfd, so that polling it waits for the next one. Never blocks.
    pub fn clear_kick(&self) {}

    /// Sets where popping begins. After `RingStarted` it is the event's `base`.
    pub fn start_at(&mut self, next_avail: u16) {
        self.next_avail = next_avail;
    }

    /// The next chain that the guest made available; `None`: there is none, or the VMM disabled the ring.
    ///
    /// Marks nothing in the in-flight region: see [`mark`](Self::mark).
    ///
    /// # Errors
    /// [`RingError::BadChain`]: the head was consumed; complete it with 0. [`RingError::Broken`]: pop no more.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        Ok(None)
    }

    /// Parses the chain at `head` again, without touching the available index: for a request that is known to be in
    /// flight, adopted after a migration or found marked after a restart.
    ///
    /// # Errors
    /// [`RingError::BadChain`]: there is no valid chain at this head.
    pub fn chain_at(&mut self, head: u16) -> Result<Chain, RingError> {
        Err(RingError::BadChain { head, fault: crate::ChainFault::HeadOutOfRange })
    }

    /// Records in the in-flight region that `head` is in flight, with the device's `tag` for it.
    /// Without a region this does nothing.
    pub fn mark(&mut self, _head: u16, _tag: u64) {}

    /// Takes back a mark of a request that will never be completed (one that a reset has made meaningless).
    pub fn unmark(&mut self, _head: u16) {}

    /// Puts `head` into the used ring, with the bytes `written` to its writable part. The guest sees it after
    /// [`publish`](Self::publish).
    pub fn complete(&mut self, _head: u16, _written: u32) {}

    /// Sets the dirty log's bits for the first `written` bytes of the chain's writable part. To be called after the
    /// data is in place and before [`complete`](Self::complete). Does nothing while the VMM does not log.
    pub fn log_written(&mut self, _chain: &Chain, _written: u32) {}

    /// Makes everything completed so far visible to the guest, with one store of the used index, and interrupts the
    /// guest if it wants that.
    pub fn publish(&mut self) {}

    /// Asks the guest not to kick (a hint: kicks may still come).
    pub fn disable_notifications(&mut self) {}

    /// Asks the guest to kick from now on. `true`: more chains came meanwhile, pop again first.
    pub fn enable_notifications(&mut self) -> bool {
        false
    }

    /// Interrupts the guest unconditionally (after a start on a migration's destination).
    pub fn signal(&self) {}

    /// Whether the VMM lets the ring be processed now (SET_VRING_ENABLE).
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        true
    }

    /// Whether the VMM keeps a dirty log now.
    #[must_use]
    pub fn is_logging(&self) -> bool {
        false
    }

    /// The index of the available ring that is popped next.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The used index, counting what is completed but not yet published.
    #[must_use]
    pub fn used_idx(&self) -> u16 {
        self.used_idx
    }

    /// Number of entries, a power of two.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }
}
