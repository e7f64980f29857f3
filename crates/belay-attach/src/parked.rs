//! Reads that are in flight when their ring stops.
//!
//! Nobody can know at a stop whether the guest is paused, moved or reset (`port.rs`). A guest that is reset uses its
//! memory for something else at once: its firmware lies where a buffer was. So data that comes late must not land in
//! the guest's memory any more, unless its ring starts again and goes on with the request:
//!
//! - What another host reads for the guest, or an exchange, lands in memory of ours, and is copied when the ring goes
//!   on.
//! - What a backend here reads is on its way into the guest's memory and cannot be called back. The answer to the
//!   stop waits for it, which is no longer than the disk takes. Only if another host may take the device, the answer
//!   does not wait: the guest is then most likely about to move, and this would be its downtime. Its memory here is
//!   not used any more after the move.

use std::time::Duration;

use belay_block::{Buf, OpKind};

use crate::device::Device;
use crate::stats::since;

/// The longest that a stop waits for the disk: a VMM that waits cannot even be asked how it is.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// Alignment of memory in which data lands.
const BUFFER_ALIGN: usize = 4096;

impl Device {
    /// Whether the answer to a stop has to wait.
    pub(crate) fn holds_stops(&self) -> bool {
        self.offered_to().is_none() && self.requests.any_reading()
    }

    /// A ring has been stopped: data of its reads lands elsewhere from now on, as far as that can be.
    pub(crate) fn park_reads(&mut self, queue: u16) {
        for key in self.requests.of_queue(queue) {
            let Some(request) = self.requests.get_mut(key) else { continue };
            let lands_here = request.done.is_some() || request.reading || request.landing.is_some();
            if request.kind != OpKind::Read || lands_here {
                continue;
            }
            let landing = Buf::aligned(request.len as usize, BUFFER_ALIGN);
            request.landing = Some(landing.clone());
            let txid = request.txid;
            self.divert_remote(txid, &landing);
        }
        if self.port.connection.as_ref().is_some_and(belay_vhost_user::Connection::is_stop_held) {
            self.port.stop_held = Some(self.now);
            self.answer_stop();
        }
    }

    /// Answers a stop that waits, if nothing is read into the guest's memory any more.
    pub(crate) fn answer_stop(&mut self) {
        if self.port.stop_held.is_some() && !self.requests.any_reading() {
            self.answer_held_stop();
        }
    }

    /// Answers a stop that has waited for too long.
    pub(crate) fn answer_stop_in_time(&mut self) {
        if self.port.stop_held.is_some_and(|held| since(self.now, held) > STOP_LIMIT) {
            tracing::warn!(device = %self.identity.name, "the disk does not answer: a ring is stopped with reads in flight");
            self.answer_held_stop();
        }
    }

    fn answer_held_stop(&mut self) {
        self.port.stop_held = None;
        if let Some(connection) = &mut self.port.connection
            && let Err(error) = connection.quiesced()
        {
            tracing::debug!(device = %self.identity.name, %error, "the VMM that stopped a ring is gone");
        }
        // Its next message, or its end, may be there already.
        self.vmm_readable_later = true;
    }
}
