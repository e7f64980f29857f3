//! What each request of the front-end does (specification, "Front-end message types").

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::bell::Bell;
use crate::connection::{Answer, Connection, Event, Held, MAX_CONFIG, Refusal};
use crate::error::ConnectionError;
use crate::inflight::{self, Region};
use crate::log::DirtyLog;
use crate::memory::{GuestMemory, RegionSpec};
use crate::message::{Fields, ProtocolFeatures, TooShort, feature, request as r};
use crate::ring::RingAddresses;
use crate::socket::{MAX_FDS, Message};

/// SET_VRING_KICK, CALL, ERR: no descriptor comes with the message.
const NO_FD: u64 = 1 << 8;
/// SET_VRING_ADDR: log writes to the used ring.
const VRING_F_LOG: u32 = 1;
/// Bytes of the fields of GET_INFLIGHT_FD; QEMU's structure has 4 more of padding.
const INFLIGHT_FIELDS: usize = 20;
const INFLIGHT_PADDED: usize = 24;
/// Bytes of the payload of SET_LOG_BASE, which the reply repeats: QEMU reads none of them, rust-vmm all.
const LOG_PAYLOAD: usize = 16;

type Outcome = Result<Answer, Refusal>;

impl Connection {
    pub(crate) fn handle(&mut self, message: &mut Message) -> Outcome {
        match message.request {
            r::GET_FEATURES => {
                self.greeted = true;
                reply_u64(self.offer.features())
            }
            r::SET_FEATURES => self.set_features(message),
            // Ownership means no more than a greeting, and RESET_OWNER is deprecated because nobody agreed on what it does.
            r::SET_OWNER => {
                self.greeted = true;
                Ok(Answer::Ack)
            }
            r::RESET_OWNER => Ok(Answer::Ack),
            r::GET_PROTOCOL_FEATURES => reply_u64(ProtocolFeatures::offered(self.offer.memory_slots).bits()),
            r::SET_PROTOCOL_FEATURES => self.set_protocol_features(message),
            r::GET_QUEUE_NUM => reply_u64(self.offer.queues.into()),
            r::GET_MAX_MEM_SLOTS => reply_u64(GuestMemory::MAX_REGIONS as u64),
            r::SET_MEM_TABLE => self.set_mem_table(message),
            r::ADD_MEM_REG => self.add_mem_reg(message),
            r::REM_MEM_REG => self.rem_mem_reg(message),
            r::SET_LOG_BASE => self.set_log_base(message),
            // Tells the VMM's log descriptor of every write; no VMM uses it. Taken and closed.
            r::SET_LOG_FD => one_fd(message).map(|_| Answer::Ack),
            r::SET_VRING_NUM => self.set_vring_num(message),
            r::SET_VRING_ADDR => self.set_vring_addr(message),
            r::SET_VRING_BASE => self.set_vring_base(message),
            r::GET_VRING_BASE => self.get_vring_base(message),
            r::SET_VRING_KICK => self.set_vring_kick(message),
            r::SET_VRING_CALL => self.set_vring_call(message),
            r::SET_VRING_ERR => self.set_vring_err(message),
            r::SET_VRING_ENABLE => self.set_vring_enable(message),
            r::GET_CONFIG => self.get_config(message),
            r::SET_CONFIG => set_config(message),
            r::SET_BACKEND_REQ_FD => self.set_backend_req_fd(message),
            r::GET_INFLIGHT_FD => self.get_inflight_fd(message),
            r::SET_INFLIGHT_FD => self.set_inflight_fd(message),
            r::RESET_DEVICE => Ok(self.reset_device(message)),
            // Not offered; a VMM that sends it all the same loses nothing.
            r::SET_STATUS => Ok(Answer::Ack),
            r::GET_STATUS => reply_u64(0),
            _ => Err(Refusal::Unknown),
        }
    }

    fn set_features(&mut self, message: &Message) -> Outcome {
        let features = fields(message).u64()?;
        let foreign = features & !self.offer.features();
        if foreign != 0 {
            return Err(format!("the bits {foreign:#x} were not offered").into());
        }
        if !self.greeted {
            // The rings of an earlier connection are started on this one, with what was negotiated there.
            tracing::info!("the VMM has not noticed that its connection is a new one");
            self.protocol = ProtocolFeatures::offered(self.offer.memory_slots);
        }
        let logged = self.features & feature::LOG_ALL != 0;
        self.features = features;
        if logged && features & feature::LOG_ALL == 0 {
            self.log = None;
        }
        self.spread_log();
        for queue in 0..self.offer.queues {
            self.try_start(queue)?;
        }
        Ok(Answer::Ack)
    }

    fn set_protocol_features(&mut self, message: &Message) -> Outcome {
        let bits = fields(message).u64()?;
        self.greeted = true;
        self.protocol = ProtocolFeatures::from_bits(bits).ok_or_else(|| {
            format!("the bits {:#x} were not offered", bits & !ProtocolFeatures::all().bits())
        })?;
        Ok(Answer::Ack)
    }

    fn set_mem_table(&mut self, message: &mut Message) -> Outcome {
        let mut fields = Fields(&message.payload);
        let (count, _padding) = (fields.u32()? as usize, fields.u32()?);
        if count > MAX_FDS || count != message.fds.len() {
            return Err(format!("{count} regions with {} descriptors", message.fds.len()).into());
        }
        let mut memory = GuestMemory::default();
        for fd in message.fds.drain(..) {
            memory = memory.with(region(&mut fields)?, fd.as_fd())?;
        }
        self.set_memory(memory);
        Ok(Answer::Ack)
    }

    fn add_mem_reg(&mut self, message: &mut Message) -> Outcome {
        let fd = one_fd(message)?;
        let mut fields = fields(message);
        let _padding = fields.u64()?;
        let memory = self.memory.with(region(&mut fields)?, fd.as_fd())?;
        self.set_memory(memory);
        Ok(Answer::Ack)
    }

    fn rem_mem_reg(&mut self, message: &mut Message) -> Outcome {
        // Some front-ends send the region's descriptor along.
        message.fds.clear();
        let mut fields = fields(message);
        let _padding = fields.u64()?;
        let memory = self.memory.without(region(&mut fields)?)?;
        self.set_memory(memory);
        Ok(Answer::Ack)
    }

    fn set_log_base(&mut self, message: &mut Message) -> Outcome {
        if !self.protocol.contains(ProtocolFeatures::LOG_SHMFD) {
            return Err("the log can only be shared memory: negotiate LOG_SHMFD".to_owned().into());
        }
        let fd = one_fd(message)?;
        let mut fields = fields(message);
        let (len, offset) = (fields.u64()?, fields.u64()?);
        // The old log stays in use until the rings have the new one; then the reply lets the VMM read the old one.
        self.log = Some(Arc::new(DirtyLog::new(fd.as_fd(), offset, len)?));
        self.spread_log();
        Ok(Answer::Reply(message.payload[..LOG_PAYLOAD].to_vec(), None))
    }

    fn queue(&self, index: u32) -> Result<u16, Refusal> {
        u16::try_from(index)
            .ok()
            .filter(|queue| *queue < self.offer.queues)
            .ok_or_else(|| format!("there is no queue {index}: the device has {}", self.offer.queues).into())
    }

    /// Index and number of a "vring state" payload.
    fn vring_state(&self, message: &Message) -> Result<(u16, u32), Refusal> {
        let mut fields = fields(message);
        Ok((self.queue(fields.u32()?)?, fields.u32()?))
    }

    fn set_vring_num(&mut self, message: &Message) -> Outcome {
        let (queue, entries) = self.vring_state(message)?;
        let size =
            u16::try_from(entries).ok().filter(|n| n.is_power_of_two() && *n <= self.offer.queue_entries);
        let most = self.offer.queue_entries;
        let size =
            size.ok_or_else(|| format!("{entries} entries: a power of two up to {most} is possible"))?;
        self.queues[usize::from(queue)].size = size;
        self.try_start(queue)?;
        Ok(Answer::Ack)
    }

    fn set_vring_addr(&mut self, message: &Message) -> Outcome {
        let mut fields = fields(message);
        let queue = self.queue(fields.u32()?)?;
        let flags = fields.u32()?;
        let (descriptors, used, available, log) =
            (fields.u64()?, fields.u64()?, fields.u64()?, fields.u64()?);
        let log = (flags & VRING_F_LOG != 0).then_some(log);
        let addresses = RingAddresses { descriptors, used, available, log };
        let memory = Arc::clone(&self.memory);
        self.queues[usize::from(queue)].addresses = Some(addresses);
        match self.ring(queue) {
            Some(ring) => ring.relocate(&memory, &addresses)?,
            None => self.try_start(queue)?,
        }
        Ok(Answer::Ack)
    }

    fn set_vring_base(&mut self, message: &Message) -> Outcome {
        let (queue, base) = self.vring_state(message)?;
        let base = u16::try_from(base).map_err(|_| format!("{base} is not an index of a split ring"))?;
        self.queues[usize::from(queue)].base = base;
        Ok(Answer::Ack)
    }

    fn get_vring_base(&mut self, message: &Message) -> Outcome {
        let (queue, _) = self.vring_state(message)?;
        let ran = self.ring(queue).is_some();
        let base = self.stop(queue);
        if ran && self.hold_stops {
            self.held = Some(Held::Base { queue, base });
            return Ok(Answer::Held);
        }
        Ok(Answer::Reply(crate::connection::base_payload(queue, base), None))
    }

    /// Queue and descriptor of SET_VRING_KICK, CALL or ERR.
    fn vring_fd(&self, message: &mut Message) -> Result<(u16, Option<OwnedFd>), Refusal> {
        let value = fields(message).u64()?;
        let queue = self.queue((value & 0xff) as u32)?;
        let fd = if value & NO_FD == 0 { Some(one_fd(message)?) } else { None };
        Ok((queue, fd))
    }

    fn set_vring_kick(&mut self, message: &mut Message) -> Outcome {
        let (queue, fd) = self.vring_fd(message)?;
        // Without a descriptor the guest does not kick: "polling should be used instead of waiting for the kick".
        let kick = fd.map(Bell::incoming).transpose()?;
        let bells = &mut self.queues[usize::from(queue)].bells;
        bells.polled = kick.is_none();
        bells.kick = kick;
        if self.spread_bells(queue) {
            self.events.push_back(Event::KickChanged { queue });
        } else {
            self.try_start(queue)?;
        }
        Ok(Answer::Ack)
    }

    fn set_vring_call(&mut self, message: &mut Message) -> Outcome {
        let (queue, fd) = self.vring_fd(message)?;
        self.queues[usize::from(queue)].bells.call = fd.map(Bell::outgoing).transpose()?;
        self.spread_bells(queue);
        if let Some(ring) = self.ring(queue) {
            // What was signalled to the descriptor of before may never have reached the guest.
            ring.signal();
        }
        Ok(Answer::Ack)
    }

    fn set_vring_err(&mut self, message: &mut Message) -> Outcome {
        let (queue, fd) = self.vring_fd(message)?;
        self.queues[usize::from(queue)].bells.error = fd.map(Bell::outgoing).transpose()?;
        self.spread_bells(queue);
        Ok(Answer::Ack)
    }

    /// Gives a queue's eventfds to its ring. `false`: it does not run.
    fn spread_bells(&mut self, queue: u16) -> bool {
        let bells = self.queues[usize::from(queue)].bells.clone();
        let ring = self.ring(queue);
        let runs = ring.is_some();
        if let Some(ring) = ring {
            ring.set_bells(bells);
        }
        runs
    }

    fn set_vring_enable(&mut self, message: &Message) -> Outcome {
        let (queue, on) = self.vring_state(message)?;
        let on = match on {
            0 => false,
            1 => true,
            other => return Err(format!("{other} is neither 0 nor 1").into()),
        };
        self.queues[usize::from(queue)].enabled = Some(on);
        if on && self.is_mistaken() {
            return Err("the rings of an earlier connection are started on this one".to_owned().into());
        }
        match self.ring(queue) {
            Some(ring) if ring.is_enabled() != on => {
                ring.set_enabled(on);
                let event = if on { Event::RingEnabled { queue } } else { Event::RingDisabled { queue } };
                self.events.push_back(event);
            }
            Some(_) => {}
            None => self.try_start(queue)?,
        }
        Ok(Answer::Ack)
    }

    /// Whether the front-end starts rings without having said where their memory is: it has not noticed that its
    /// connection is a new one. QEMU does not if its back-end went away while the rings were stopped. It sends the
    /// memory all the same if it was not offered CONFIGURE_MEM_SLOTS; if it was, the guest would hang. When the
    /// connection ends at this point, a later QEMU greets the next one.
    fn is_mistaken(&self) -> bool {
        let all = self.queues.iter().all(|queue| queue.enabled == Some(true));
        !self.greeted && self.memory.regions() == 0 && all
    }

    /// Bytes of the configuration space, zeroes beyond its end; an impossible range is answered with size 0.
    fn get_config(&mut self, message: &Message) -> Outcome {
        let mut fields = fields(message);
        let (offset, size, flags) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let end = (offset as usize).saturating_add(size as usize);
        let size = if end <= MAX_CONFIG { size } else { 0 };
        let mut payload = Vec::with_capacity(12 + size as usize);
        for word in [offset, size, flags] {
            payload.extend_from_slice(&word.to_ne_bytes());
        }
        let at = |index: usize| self.offer.config.get(index).copied().unwrap_or(0);
        payload.extend((0..size as usize).map(|index| at(offset as usize + index)));
        Ok(Answer::Reply(payload, None))
    }

    fn set_backend_req_fd(&mut self, message: &mut Message) -> Outcome {
        let fd = one_fd(message)?;
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(io::Error::from)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(io::Error::from)?;
        self.channel = Some(fd);
        Ok(Answer::Ack)
    }

    fn get_inflight_fd(&mut self, message: &Message) -> Outcome {
        let mut fields = fields(message);
        let (_size, _offset) = (fields.u64()?, fields.u64()?);
        let (queues, entries) = (fields.u16()?, fields.u16()?);
        let payload_len = message.payload.len().clamp(INFLIGHT_FIELDS, INFLIGHT_PADDED);
        self.held = Some(Held::Inflight { queues, entries, payload_len });
        self.events.push_back(Event::Quiesce { reset: false });
        Ok(Answer::Held)
    }

    /// Replies to GET_INFLIGHT_FD with a fresh region; with size 0, "no region", if it cannot be made, or is for more
    /// than was offered: memory of ours is not for the VMM to fill.
    pub(crate) fn answer_get_inflight(
        &mut self,
        queues: u16,
        entries: u16,
        payload_len: usize,
    ) -> Result<(), ConnectionError> {
        let offered = queues <= self.offer.queues && entries <= self.offer.queue_entries;
        let made =
            if offered { inflight::create(queues, entries) } else { inflight::refuse(queues, entries) };
        let (fd, len) = match made {
            Ok((fd, len)) => (Some(fd), len),
            Err(error) => {
                tracing::warn!(%error, "no in-flight region: requests in flight will not survive the agent");
                (None, 0)
            }
        };
        let mut payload = len.to_ne_bytes().to_vec();
        payload.extend_from_slice(&0u64.to_ne_bytes());
        payload.extend_from_slice(&queues.to_ne_bytes());
        payload.extend_from_slice(&entries.to_ne_bytes());
        payload.resize(payload_len, 0);
        self.socket.reply(r::GET_INFLIGHT_FD, &payload, fd.as_ref().map(AsFd::as_fd))
    }

    fn set_inflight_fd(&mut self, message: &mut Message) -> Outcome {
        let fd = one_fd(message)?;
        let mut fields = fields(message);
        let (len, offset) = (fields.u64()?, fields.u64()?);
        let (queues, entries) = (fields.u16()?, fields.u16()?);
        self.inflight = Some(Region::open(fd.as_fd(), offset, len, queues, entries)?);
        Ok(Answer::Ack)
    }

    /// Stops every ring at once; the device then gives up what is in flight, and only then the reset is answered.
    fn reset_device(&mut self, message: &Message) -> Answer {
        for queue in 0..self.offer.queues {
            self.stop(queue);
        }
        self.held = Some(Held::Reset { need_reply: message.need_reply });
        self.events.push_back(Event::Quiesce { reset: true });
        Answer::Held
    }

    pub(crate) fn answer_reset(&mut self, need_reply: bool) -> Result<(), ConnectionError> {
        // What the region marks belongs to the time before the reset.
        self.inflight = None;
        for settings in &mut self.queues {
            settings.base = 0;
            settings.addresses = None;
            settings.enabled = None;
        }
        if need_reply {
            self.socket.reply(r::RESET_DEVICE, &0u64.to_ne_bytes(), None)?;
        }
        Ok(())
    }
}

/// No device class of ours has configuration that the guest may write. Saying so must not cost the VM its device,
/// so a VMM that asked for no reply hears nothing.
fn set_config(message: &Message) -> Outcome {
    let why = "the device's configuration space is read-only";
    if message.need_reply {
        return Err(why.to_owned().into());
    }
    tracing::debug!("SET_CONFIG ignored: {why}");
    Ok(Answer::Ack)
}

fn fields(message: &Message) -> Fields<'_> {
    Fields(&message.payload)
}

fn region(fields: &mut Fields<'_>) -> Result<RegionSpec, TooShort> {
    Ok(RegionSpec {
        guest_addr: fields.u64()?,
        size: fields.u64()?,
        user_addr: fields.u64()?,
        mmap_offset: fields.u64()?,
    })
}

/// The one descriptor that must come with the message.
fn one_fd(message: &mut Message) -> Result<OwnedFd, Refusal> {
    match (message.fds.pop(), message.fds.len()) {
        (Some(fd), 0) => Ok(fd),
        (None, _) => Err("the descriptor is missing".to_owned().into()),
        (Some(_), more) => Err(format!("{} descriptors instead of one", more + 1).into()),
    }
}

fn reply_u64(value: u64) -> Outcome {
    Ok(Answer::Reply(value.to_ne_bytes().to_vec(), None))
}
