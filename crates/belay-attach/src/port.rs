//! The device's port: the VMM's socket, and its rings as this device serves them.
//!
//! A stop of a ring may be a pause, a migration or a reset: nobody can know yet. Its requests are parked, and the
//! next start decides (vmm-facts, "At GET_VRING_BASE, pause, migration and reset look the same").

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::time::Instant;

use belay_block::virtio::{self};
use belay_vhost_user::{Connection, Event, Marked, Offer, Ring};
use belay_wire::{ListedRequest, TxId};

use crate::device::{Device, LISTENER, Serving, VMM};
use crate::handle::Notice;

mod requests;
mod rings;

/// Bytes of data of a guest's requests in flight above which no more are taken, until some have ended: each may need
/// as much memory of ours.
const MAX_BYTES_IN_FLIGHT: u64 = 256 << 20;

/// A ring as this device sees it; the ring itself lives in the connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct Queue {
    /// It is served: started by the VMM, and let go by the handover.
    pub(crate) running: bool,
    /// The VMM has started it, but it may not run yet.
    pub(crate) waiting: Option<Waiting>,
    /// What GET_VRING_BASE answered at its last stop on this connection.
    stopped_at: Option<u16>,
    /// Its kick descriptor is polled, under this generation.
    kick_generation: u32,
    kick_fd: Option<i32>,
    /// The guest does not kick: it is looked at again and again.
    polled: bool,
    /// The guest may have added requests.
    pub(crate) kicked: bool,
    /// Completions wait to be published.
    pub(crate) dirty: bool,
    /// The guest broke it: not served until it starts again.
    broken: bool,
    /// It has run since its in-flight region was given to the VMM: what is marked there is this process's own.
    ran: bool,
    /// It was stopped before it ran, and an earlier process had these heads of it in flight: no request here stands for
    /// them.
    unknown: Vec<u16>,
    /// Heads that the guest waits for in vain: what it put there cannot be answered, or is not what it asked for.
    lost: Vec<(u16, TxId)>,
}

impl Queue {
    /// What GET_VRING_BASE answered at its last stop on this connection.
    pub(crate) fn stopped_at(&self) -> Option<u16> {
        self.stopped_at
    }
}

/// How the VMM started a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    /// What SET_VRING_BASE said.
    pub(crate) base: u16,
    /// The used index found in guest memory.
    pub(crate) used: u16,
}

/// A ring that the VMM has started and that may not run yet.
#[derive(Clone, Debug)]
pub(crate) struct Waiting {
    pub(crate) start: Start,
    /// Where it was stopped before, on this connection.
    resumed: Option<u16>,
    /// What the in-flight region says is in flight.
    marked: Vec<Marked>,
}

/// The port's state.
#[derive(Default)]
pub(crate) struct Port {
    pub(crate) listener: Option<UnixListener>,
    pub(crate) connection: Option<Connection>,
    /// A VMM that connected while requests of its predecessor still ran.
    next_connection: Option<std::os::unix::net::UnixStream>,
    pub(crate) queues: Vec<Queue>,
    /// The VMM waits until requests in flight have ended.
    quiescing: bool,
    /// The VMM waits for the answer to a stop since then.
    pub(crate) stop_held: Option<Instant>,
    /// Rings of this connection have been started at least once.
    generation: u32,
}

impl Port {
    pub(crate) fn ring(&mut self, queue: u16) -> Option<&mut Ring> {
        self.connection.as_mut()?.ring(queue)
    }

    pub(crate) fn running(&self) -> u32 {
        self.queues.iter().filter(|queue| queue.running).count() as u32
    }

    /// Whether there is a ring whose guest does not kick.
    pub(crate) fn is_polled(&self) -> bool {
        self.queues.iter().any(|queue| queue.polled && queue.running && !queue.broken)
    }

    /// Heads that no request stands for, as the list has them. A ring with unknown ones was wound back to its used index:
    /// it fits no list that has them, and nobody takes the device by it.
    pub(crate) fn lost(&self) -> impl Iterator<Item = ListedRequest> + '_ {
        self.queues.iter().enumerate().flat_map(|(index, queue)| {
            let unknown = queue.unknown.iter().map(|head| (*head, TxId(0)));
            let heads = queue.lost.iter().copied().chain(unknown);
            heads.map(move |(head, txid)| crate::requests::listed_as_lost(index as u16, head, txid))
        })
    }

    /// Whether the guest relies on every change that was completed: it did not take the flush that it was offered.
    fn writes_through(&self) -> bool {
        self.connection.as_ref().is_some_and(|vmm| vmm.features() & virtio::FEATURE_FLUSH == 0)
    }

    fn started(&self) -> bool {
        self.queues.iter().any(|queue| queue.running || queue.waiting.is_some())
    }

    fn queue(&mut self, index: u16) -> Option<&mut Queue> {
        self.queues.get_mut(usize::from(index))
    }
}

impl Device {
    pub(crate) fn listen(&mut self, listener: UnixListener) {
        if let Err(error) = listener.set_nonblocking(true) {
            tracing::error!(device = %self.identity.name, %error, "cannot listen for VMMs");
            return;
        }
        self.poll(listener.as_raw_fd(), LISTENER, 0);
        self.port.listener = Some(listener);
        self.accept_vmm();
    }

    pub(crate) fn accept_vmm(&mut self) {
        loop {
            let Some(listener) = &self.port.listener else { return };
            match listener.accept() {
                Ok((socket, _)) if self.port.connection.is_some() => {
                    // One VMM at a time. A VMM that reconnects closed its old socket first, so look for that.
                    self.on_vmm_readable();
                    if self.port.connection.is_some() {
                        tracing::warn!(device = %self.identity.name, "a second VMM was turned away");
                        drop(socket);
                    } else {
                        self.port.next_connection = Some(socket);
                    }
                }
                Ok((socket, _)) => self.port.next_connection = Some(socket),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    tracing::warn!(device = %self.identity.name, %error, "accepting a VMM failed");
                    break;
                }
            }
            self.take_next_vmm();
        }
    }

    /// Connects the VMM that waits, unless requests of its predecessor still run.
    fn take_next_vmm(&mut self) {
        if self.port.connection.is_some() || self.port.next_connection.is_none() {
            return;
        }
        if self.serving() == Serving::Guest {
            // Requests of a VMM that is gone: those that are marked in flight come again with the new one.
            self.drop_guest_requests(None);
        }
        if self.requests.orphans() > 0 {
            return;
        }
        let Some(socket) = self.port.next_connection.take() else { return };
        let offer = Offer {
            device_features: belay_block::virtio::features(&self.block),
            queues: self.block.queues,
            queue_entries: self.block.queue_entries,
            config: belay_block::virtio::config_space(&self.block),
            memory_slots: self.memory_slots,
        };
        match Connection::new(socket, offer) {
            Ok(connection) => {
                self.poll(connection.as_raw_fd(), VMM, u64::from(self.port.generation));
                self.port.connection = Some(connection);
                self.port.queues = vec![Queue::default(); usize::from(self.block.queues)];
                self.notice(Notice::Vmm { connected: true, reason: None });
                self.on_vmm_readable();
            }
            Err(error) => tracing::warn!(device = %self.identity.name, %error, "accepting a VMM failed"),
        }
    }

    /// Handles the messages that the VMM has sent.
    pub(crate) fn on_vmm_readable(&mut self) {
        loop {
            if self.port.quiescing {
                return;
            }
            let hold = self.holds_stops();
            let Some(connection) = &mut self.port.connection else { return };
            connection.hold_stops(hold);
            match connection.next_event() {
                Ok(Some(event)) => self.on_vmm_event(event),
                Ok(None) => return,
                Err(error) => {
                    self.vmm_gone(&error.to_string());
                    return;
                }
            }
        }
    }

    /// Memory of the VMM's was gone when it was touched: nothing that is found there can be relied on.
    pub(crate) fn lose_memory(&mut self) {
        if self.port.connection.is_some() {
            self.vmm_gone("a file of its guest's memory was cut short");
        }
    }

    fn vmm_gone(&mut self, reason: &str) {
        tracing::info!(device = %self.identity.name, reason, "the VMM's connection ended");
        let had_rings = self.port.started();
        if let Some(connection) = self.port.connection.take() {
            self.unpoll(VMM, u64::from(self.port.generation));
            drop(connection);
        }
        for index in 0..self.port.queues.len() as u16 {
            self.forget_kick(index);
            self.ring_left(index);
        }
        self.port.queues.clear();
        self.port.quiescing = false;
        self.port.stop_held = None;
        self.port.generation = self.port.generation.wrapping_add(1);
        if had_rings {
            self.rings_all_stopped();
        }
        // A VMM that stopped its rings first may have handed its guest to another host: what is in flight may still
        // be claimed there.
        if self.serving() != Serving::Nobody && (had_rings || self.offered_to().is_none()) {
            self.drop_guest_requests(None);
        }
        self.notice(Notice::Vmm { connected: false, reason: Some(reason.to_owned()) });
        self.accept_vmm();
    }

    fn on_vmm_event(&mut self, event: Event) {
        match event {
            Event::RingStarted { queue, base, used, marked, .. } => {
                self.on_ring_started(queue, Start { base, used }, &marked)
            }
            Event::RingStopped { queue, base } => self.on_ring_stopped(queue, base),
            Event::RingDisabled { .. } => {}
            Event::RingEnabled { queue } => {
                if let Some(queue) = self.port.queue(queue) {
                    queue.kicked = true;
                }
            }
            Event::KickChanged { queue } => {
                self.forget_kick(queue);
                self.poll_kick(queue);
            }
            Event::Quiesce { reset } => {
                tracing::debug!(device = %self.identity.name, reset, "the VMM wants no request in flight");
                self.port.quiescing = true;
                for queue in &mut self.port.queues {
                    queue.stopped_at = None;
                    queue.ran = false;
                    queue.unknown.clear();
                    queue.lost.clear();
                }
                if self.owns_guest() {
                    self.drop_guest_requests(None);
                    if reset && !self.port.started() {
                        // What was listed at the stop is in flight no more.
                        self.rings_all_stopped();
                    }
                }
                self.quiet();
            }
        }
    }

    /// The guest forgets its requests (of one queue, or all): what has not begun is cancelled, the rest runs to its
    /// end, and is then dropped.
    fn drop_guest_requests(&mut self, queue: Option<u16>) {
        for key in self.requests.orphan(queue) {
            self.cancel_guest(key);
        }
    }

    /// Answers a VMM that waited for requests to end, and connects one that waited for its predecessor's.
    pub(crate) fn quiet(&mut self) {
        if self.requests.orphans() > 0 {
            return;
        }
        if self.port.quiescing {
            self.port.quiescing = false;
            if let Some(connection) = &mut self.port.connection
                && let Err(error) = connection.quiesced()
            {
                self.vmm_gone(&error.to_string());
                return;
            }
            self.vmm_readable_later = true;
        }
        self.take_next_vmm();
    }
}
