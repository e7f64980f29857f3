//! What the device tells of itself.

use super::{Device, SNAPSHOT_EVERY};
use crate::handle::Notice;
use crate::stats::{Snapshot, since};

impl Device {
    pub(crate) fn notice(&self, notice: Notice) {
        let _ = self.notices.send(notice);
    }

    pub(super) fn renew_snapshot(&mut self, force: bool) {
        if !force && since(self.now, self.snapshot_at) < SNAPSHOT_EVERY {
            return;
        }
        if force && since(self.now, self.snapshot_at) < SNAPSHOT_EVERY / 10 {
            return;
        }
        self.snapshot_at = self.now;
        let snapshot = self.describe();
        *self.snapshot.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = snapshot;
    }

    fn describe(&mut self) -> Snapshot {
        let mut link_in = self.counters.link_in_bytes;
        let mut link_out = self.counters.link_out_bytes;
        for (_, session) in &self.server.sessions {
            link_in += session.conn.bytes_in;
            link_out += session.conn.bytes_out;
        }
        let mut link_up = false;
        if let Some(client) = &mut self.client {
            link_up = client.guest.is_up();
            for state in client.channels() {
                link_in += state.conn.as_ref().map_or(0, |conn| conn.bytes_in);
                link_out += state.conn.as_ref().map_or(0, |conn| conn.bytes_out);
            }
        }
        Snapshot {
            state: self.state_name(),
            epoch: self.epoch.0,
            vmm_connected: self.port.connection.is_some(),
            memory_pieces: self.port.connection.as_ref().map_or(0, |vmm| vmm.memory_pieces() as u64),
            vmm_silent: self.port.connection.as_ref().is_some_and(|connection| !connection.has_begun()),
            rings_running: self.port.running(),
            in_flight: self.requests.live() as u64,
            requests: self.counters.requests,
            errors: self.counters.errors,
            bad_requests: self.counters.bad_requests,
            read_bytes: self.counters.read_bytes,
            written_bytes: self.counters.written_bytes,
            latency: self.counters.latency(),
            latency_histogram: self.counters.buckets,
            last_completion_ns: self.counters.last_completion_ns,
            first_completion_ns: self.counters.first_completion_ns,
            rings_stopped_ns: self.counters.rings_stopped_ns,
            link_up,
            successor_ready: self.server.guest_session().is_some() && self.lent_to.is_none(),
            link_in_bytes: link_in,
            link_out_bytes: link_out,
            served: self.counters.served,
            fenced: self.counters.fenced,
            exchange: self.exchange.as_ref().map(|exchange| exchange.progress()),
            last_exchange: self.last_exchange,
        }
    }
}
