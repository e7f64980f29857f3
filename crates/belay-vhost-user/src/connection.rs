//! One VMM connection: takes its messages, keeps its rings.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::bell::Bells;
use crate::error::{ConnectionError, SetConfigError};
use crate::inflight::Region;
use crate::log::DirtyLog;
use crate::memory::GuestMemory;
use crate::message::{self, ProtocolFeatures, feature};
use crate::ring::{Ring, RingAddresses, Setup};
use crate::socket::{Message, Socket, notify};

/// Most queues of a device.
const MAX_QUEUES: u16 = 64;
/// Largest split ring (virtio 1.2, section 2.7).
pub(crate) const MAX_ENTRIES: u16 = 32768;
/// Largest configuration space: VHOST_USER_MAX_CONFIG_SIZE.
pub(crate) const MAX_CONFIG: usize = 256;
/// Most descriptors of any request but SET_MEM_TABLE.
const MAX_REQUEST_FDS: usize = 8;
/// Feature bits 24 to 40: rings and transports, not device classes.
const RESERVED_FEATURES: u64 = ((1 << 41) - 1) & !((1 << 24) - 1);

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
    /// Whether CONFIGURE_MEM_SLOTS is offered, see `docs/decisions/0012-memory-comes-with-every-start.md`.
    pub memory_slots: bool,
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
    /// The ring was stopped (GET_VRING_BASE, already answered with `base` unless stops are held
    /// ([`Connection::hold_stops`]); or RESET_DEVICE). Everything completed
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
    /// The kick eventfd of a running ring was replaced, or taken away: poll [`Ring::kick_fd`] anew, or the ring itself
    /// ([`Ring::is_polled`]).
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
    pub(crate) socket: Socket,
    pub(crate) offer: Offer,
    /// Features that SET_FEATURES acknowledged.
    pub(crate) features: u64,
    pub(crate) protocol: ProtocolFeatures,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) log: Option<Arc<DirtyLog>>,
    pub(crate) inflight: Option<Region>,
    /// Where our own messages go (SET_BACKEND_REQ_FD).
    pub(crate) channel: Option<OwnedFd>,
    pub(crate) queues: Vec<Queue>,
    rings: Vec<Option<Ring>>,
    pub(crate) events: VecDeque<Event>,
    pub(crate) held: Option<Held>,
    /// GET_VRING_BASE is answered by [`Connection::quiesced`].
    pub(crate) hold_stops: bool,
    /// GET_FEATURES, SET_PROTOCOL_FEATURES or SET_OWNER has come: the front-end knows that this connection is a new one.
    pub(crate) greeted: bool,
    /// Nothing more comes.
    over: bool,
    /// Why, until that was told.
    end: Option<ConnectionError>,
}

/// What the VMM said about a queue, whether it runs or not.
#[derive(Default)]
pub(crate) struct Queue {
    /// Entries; 0: SET_VRING_NUM did not come.
    pub(crate) size: u16,
    pub(crate) base: u16,
    pub(crate) addresses: Option<RingAddresses>,
    pub(crate) bells: Bells,
    /// What SET_VRING_ENABLE said; before it came, a ring is enabled if VHOST_USER_F_PROTOCOL_FEATURES is not
    /// negotiated.
    pub(crate) enabled: Option<bool>,
}

/// A request whose answer waits for [`Connection::quiesced`].
pub(crate) enum Held {
    Reset { need_reply: bool },
    Inflight { queues: u16, entries: u16, payload_len: usize },
    Base { queue: u16, base: u16 },
}

/// How a request went.
pub(crate) enum Answer {
    /// Well; said so only if the VMM asked.
    Ack,
    /// With this payload and descriptor.
    Reply(Vec<u8>, Option<OwnedFd>),
    /// Later.
    Held,
}

/// Why a request was not fulfilled.
pub(crate) enum Refusal {
    Unknown,
    Because(String),
}

impl<E: std::fmt::Display> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self::Because(error.to_string())
    }
}

impl Connection {
    /// Serves the VMM at the other end of `socket`, which becomes non-blocking.
    ///
    /// # Errors
    /// The offer is impossible (`InvalidInput`), or the socket cannot be made non-blocking.
    pub fn new(socket: UnixStream, offer: Offer) -> io::Result<Self> {
        offer.check().map_err(|why| io::Error::new(io::ErrorKind::InvalidInput, why))?;
        let queues = usize::from(offer.queues);
        Ok(Self {
            socket: Socket::new(socket)?,
            offer,
            features: 0,
            protocol: ProtocolFeatures::empty(),
            memory: Arc::default(),
            log: None,
            inflight: None,
            channel: None,
            queues: (0..queues).map(|_| Queue::default()).collect(),
            rings: (0..queues).map(|_| None).collect(),
            events: VecDeque::new(),
            held: None,
            hold_stops: false,
            greeted: false,
            over: false,
            end: None,
        })
    }

    /// What [`Ring::mark`] stored with every request that the in-flight region calls in flight, also in queues that
    /// have not been started yet.
    #[must_use]
    pub fn tags(&self) -> Vec<u64> {
        self.inflight.as_ref().map(Region::tags).unwrap_or_default()
    }

    /// The socket, to be polled for readability.
    #[must_use]
    pub fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Handles messages that have come, replying as the protocol says, up to the first one that the device must act
    /// on. `None`: nothing more has come (or an [`Event::Quiesce`] is not answered yet). Call it again until it says
    /// so.
    ///
    /// # Errors
    /// The connection is over. Every later call says so too.
    pub fn next_event(&mut self) -> Result<Option<Event>, ConnectionError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            if let Some(error) = self.end.take() {
                return Err(error);
            }
            if self.over {
                return Err(ConnectionError::Closed);
            }
            if self.held.is_some() {
                return Ok(None);
            }
            match self.socket.receive().and_then(|message| message.map_or(Ok(false), |m| self.serve(m))) {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(error) => {
                    // What the request did before it failed (a ring stopped, its reply lost) is told first.
                    self.over = true;
                    self.end = Some(error);
                }
            }
        }
    }

    /// Fulfils one request and replies.
    fn serve(&mut self, mut message: Message) -> Result<bool, ConnectionError> {
        let request = message.request;
        let name = message::name(request).unwrap_or("of an unknown kind");
        if message.fds.len() > MAX_REQUEST_FDS && request != message::request::SET_MEM_TABLE {
            let fds = message.fds.len();
            return Err(ConnectionError::Malformed(format!("request {request} with {fds} descriptors")));
        }
        let asked = message.need_reply;
        message.need_reply = asked && self.protocol.contains(ProtocolFeatures::REPLY_ACK);
        tracing::trace!(request = name, need_reply = message.need_reply, "vhost-user request");
        let outcome = self.handle(&mut message);
        // The very request that negotiates replies may ask for one.
        message.need_reply = asked && self.protocol.contains(ProtocolFeatures::REPLY_ACK);
        match outcome {
            Ok(Answer::Reply(payload, fd)) => {
                self.socket.reply(request, &payload, fd.as_ref().map(AsFd::as_fd))?;
            }
            Ok(Answer::Ack) => self.acknowledge(&message, true)?,
            Ok(Answer::Held) => {}
            Err(refusal) if message.need_reply => {
                if let Refusal::Because(reason) = refusal {
                    tracing::warn!(request = name, reason, "vhost-user request refused");
                }
                self.acknowledge(&message, false)?;
            }
            Err(Refusal::Unknown) => return Err(ConnectionError::Unknown { request }),
            Err(Refusal::Because(reason)) => return Err(ConnectionError::Refused { request: name, reason }),
        }
        if !message.fds.is_empty() {
            tracing::debug!(request = name, "descriptors that do not belong to the request were closed");
        }
        Ok(true)
    }

    fn acknowledge(&self, message: &Message, well: bool) -> Result<(), ConnectionError> {
        if !message.need_reply {
            return Ok(());
        }
        self.socket.reply(message.request, &u64::from(!well).to_ne_bytes(), None)
    }

    /// A ring that runs; `None` if it was not started, was stopped, or does not exist.
    #[inline]
    pub fn ring(&mut self, queue: u16) -> Option<&mut Ring> {
        self.rings.get_mut(usize::from(queue))?.as_mut()
    }

    /// The number of queues offered.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.offer.queues
    }

    /// The virtio and vhost feature bits that the VMM acknowledged last; 0 before it did.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether the next GET_VRING_BASE is answered at once (as at first), or by [`Connection::quiesced`], until
    /// which no further message is handled: for a device that must not let go of guest memory yet.
    pub fn hold_stops(&mut self, hold: bool) {
        self.hold_stops = hold;
    }

    /// Pieces of the guest's memory that the VMM has told of.
    #[must_use]
    pub fn memory_pieces(&self) -> usize {
        self.memory.regions()
    }

    /// Whether the VMM has begun to talk. QEMU greets as soon as it has connected, unless it has not noticed that the
    /// connection is a new one; then it is silent until it starts the rings.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.greeted || self.features != 0
    }

    /// Whether a ring has been stopped and the VMM waits for [`Connection::quiesced`].
    #[must_use]
    pub fn is_stop_held(&self) -> bool {
        matches!(self.held, Some(Held::Base { .. }))
    }

    /// Answers the message behind [`Event::Quiesce`], or a stop that is held: nothing of before touches guest memory
    /// any more.
    ///
    /// # Errors
    /// The connection is over.
    pub fn quiesced(&mut self) -> Result<(), ConnectionError> {
        let answered = match self.held.take() {
            None => Ok(()),
            Some(Held::Reset { need_reply }) => self.answer_reset(need_reply),
            Some(Held::Inflight { queues, entries, payload_len }) => {
                self.answer_get_inflight(queues, entries, payload_len)
            }
            Some(Held::Base { queue, base }) => {
                self.socket.reply(message::request::GET_VRING_BASE, &base_payload(queue, base), None)
            }
        };
        self.over |= answered.is_err();
        answered
    }

    /// Replaces the device configuration space (a resize) and tells the VMM, if it gave a channel for that.
    ///
    /// # Errors
    /// The space is too large, or the VMM could not be told.
    pub fn set_config(&mut self, config: Vec<u8>) -> Result<(), SetConfigError> {
        if config.len() > MAX_CONFIG {
            return Err(SetConfigError::TooLarge { len: config.len() });
        }
        self.offer.config = config;
        match &self.channel {
            Some(channel)
                if self.protocol.contains(ProtocolFeatures::CONFIG | ProtocolFeatures::BACKEND_REQ) =>
            {
                notify(channel.as_fd(), message::CONFIG_CHANGE_MSG).map_err(SetConfigError::Notify)
            }
            _ => Ok(()),
        }
    }

    /// Starts a queue's ring if everything for it is there: size, addresses, kick, enabled, memory.
    pub(crate) fn try_start(&mut self, queue: u16) -> Result<(), String> {
        let index = usize::from(queue);
        let settings = &self.queues[index];
        let enabled = settings.enabled.unwrap_or(self.features & feature::PROTOCOL_FEATURES == 0);
        let complete = enabled && settings.size > 0 && settings.bells.has_kick() && self.memory.regions() > 0;
        let (true, None, Some(addresses)) = (complete, &self.rings[index], settings.addresses) else {
            return Ok(());
        };
        let inflight = self.inflight.as_ref().and_then(|region| region.attach(queue, settings.size));
        let inflight_region = inflight.is_some();
        let (ring, marked) = Ring::new(Setup {
            size: settings.size,
            base: settings.base,
            addresses,
            memory: &self.memory,
            event_idx: self.features & feature::EVENT_IDX != 0,
            indirect: self.features & feature::INDIRECT_DESC != 0,
            bells: settings.bells.clone(),
            log: self.active_log(),
            inflight,
        })?;
        let (base, used) = (settings.base, ring.used_idx());
        tracing::debug!(queue, base, used, marked = marked.len(), "ring started");
        self.rings[index] = Some(ring);
        self.events.push_back(Event::RingStarted { queue, base, used, marked, inflight_region });
        Ok(())
    }

    /// Stops a queue's ring if it runs, with everything completed published, and says where it would go on.
    pub(crate) fn stop(&mut self, queue: u16) -> u16 {
        let index = usize::from(queue);
        self.queues[index].bells.forget_kick();
        if let Some(mut ring) = self.rings[index].take() {
            ring.publish();
            let base = ring.next_avail();
            self.queues[index].base = base;
            tracing::debug!(queue, base, "ring stopped");
            self.events.push_back(Event::RingStopped { queue, base });
        }
        self.queues[index].base
    }

    /// The log to write now: the one given last, while VHOST_F_LOG_ALL is on.
    pub(crate) fn active_log(&self) -> Option<Arc<DirtyLog>> {
        self.log.clone().filter(|_| self.features & feature::LOG_ALL != 0)
    }

    /// Gives the log that is to be written now to every ring that runs.
    pub(crate) fn spread_log(&mut self) {
        let log = self.active_log();
        for ring in self.rings.iter_mut().flatten() {
            ring.set_log(log.clone());
        }
    }

    /// Takes a new memory table. Rings that run follow it; if one cannot (a region is replaced in two steps), its
    /// own pages stay where they are, kept mapped by the ring, until a later table has them.
    pub(crate) fn set_memory(&mut self, memory: GuestMemory) {
        self.memory = Arc::new(memory);
        for queue in 0..self.offer.queues {
            let index = usize::from(queue);
            let moved = match (&mut self.rings[index], self.queues[index].addresses) {
                (Some(ring), Some(addresses)) => ring.relocate(&self.memory, &addresses),
                _ => self.try_start(queue),
            };
            if let Err(why) = moved {
                tracing::debug!(queue, why, "the new memory table does not hold a ring");
            }
        }
    }
}

/// The payload that answers GET_VRING_BASE.
pub(crate) fn base_payload(queue: u16, base: u16) -> Vec<u8> {
    let mut payload = u32::from(queue).to_ne_bytes().to_vec();
    payload.extend_from_slice(&u32::from(base).to_ne_bytes());
    payload
}

impl Offer {
    fn check(&self) -> Result<(), String> {
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return Err(format!("{} queues: offer 1 to {MAX_QUEUES}", self.queues));
        }
        if !self.queue_entries.is_power_of_two() || self.queue_entries > MAX_ENTRIES {
            return Err(format!("{} entries: offer a power of two up to {MAX_ENTRIES}", self.queue_entries));
        }
        if self.config.len() > MAX_CONFIG {
            return Err(format!(
                "a configuration space of {} bytes: offer up to {MAX_CONFIG}",
                self.config.len()
            ));
        }
        let foreign = self.device_features & RESERVED_FEATURES & !feature::COMMON;
        if foreign != 0 {
            return Err(format!(
                "feature bits {foreign:#x} do not belong to a device class and are not supported"
            ));
        }
        Ok(())
    }

    /// All feature bits that the VMM may acknowledge.
    pub(crate) fn features(&self) -> u64 {
        self.device_features | feature::COMMON
    }
}

const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Connection>();
    is_send::<Ring>();
    is_send::<crate::Chain>();
};
