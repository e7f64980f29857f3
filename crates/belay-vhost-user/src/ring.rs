//! One split virtqueue that runs (virtio 1.2, section 2.7).
#![allow(
    unsafe_code,
    reason = "rings live in guest memory, which is reached through raw pointers and atomics"
)]

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use crate::bell::Bells;
use crate::chain::Chain;
use crate::connection::Marked;
use crate::error::{ChainFault, RingError, RingFault};
use crate::inflight::InflightQueue;
use crate::log::DirtyLog;
use crate::memory::GuestMemory;
use crate::walk::{DESCRIPTOR, Walk};

/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;
/// VIRTQ_USED_F_NO_NOTIFY.
const NO_NOTIFY: u16 = 1;
/// Offset of `idx` in both rings, behind `flags`.
const IDX: usize = 2;
/// Offset of the entries in both rings.
const ENTRIES: usize = 4;
/// Bytes of an entry of the used ring.
const USED_ENTRY: usize = 8;

/// Where the VMM says that a ring is (SET_VRING_ADDR), in its own addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingAddresses {
    pub(crate) descriptors: u64,
    pub(crate) used: u64,
    pub(crate) available: u64,
    /// Guest-physical address of the used ring, if it is to be logged (VHOST_VRING_F_LOG).
    pub(crate) log: Option<u64>,
}

/// The three parts of a ring, mapped.
struct Parts {
    descriptors: *const u8,
    available: *const u8,
    used: *mut u8,
    /// Keeps them mapped.
    _memory: Arc<GuestMemory>,
}

impl Parts {
    fn locate(memory: &Arc<GuestMemory>, at: &RingAddresses, size: u16) -> Result<Self, String> {
        let entries = u64::from(size);
        let find = |part: &str, addr: u64, len: u64, align: u64| {
            let base = memory.locate_user(addr, len).ok_or_else(|| {
                format!("the {part} at {addr:#x} ({len} bytes) is not in one region of the guest's memory")
            })?;
            if !addr.is_multiple_of(align) || !(base.addr() as u64).is_multiple_of(align) {
                return Err(format!("the {part} at {addr:#x} is not aligned to {align} bytes"));
            }
            Ok(base)
        };
        Ok(Self {
            descriptors: find("descriptor table", at.descriptors, DESCRIPTOR as u64 * entries, 16)?,
            available: find("available ring", at.available, 6 + 2 * entries, 2)?,
            used: find("used ring", at.used, 6 + USED_ENTRY as u64 * entries, 4)?,
            _memory: Arc::clone(memory),
        })
    }

    /// A 16-bit field of the available ring.
    #[inline]
    fn available(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: callers name fields of the ring, all of which is mapped and aligned to 2; the guest writes them
        // meanwhile, and they are reached with atomics only.
        unsafe { AtomicU16::from_ptr(self.available.add(offset).cast_mut().cast()) }
    }

    /// A 16-bit field of the used ring.
    #[inline]
    fn used(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as for `available`.
        unsafe { AtomicU16::from_ptr(self.used.add(offset).cast()) }
    }
}

/// What a ring is made of.
pub(crate) struct Setup<'a> {
    pub(crate) size: u16,
    pub(crate) base: u16,
    pub(crate) addresses: RingAddresses,
    pub(crate) memory: &'a Arc<GuestMemory>,
    pub(crate) event_idx: bool,
    pub(crate) indirect: bool,
    pub(crate) bells: Bells,
    pub(crate) log: Option<Arc<DirtyLog>>,
    pub(crate) inflight: Option<InflightQueue>,
}

/// A started ring: pops the guest's chains and gives them back used.
///
/// The order for one request: [`pop`](Self::pop), [`mark`](Self::mark), do it, write its data,
/// [`log_written`](Self::log_written), [`complete`](Self::complete); then [`publish`](Self::publish) once per batch.
pub struct Ring {
    size: u16,
    next_avail: u16,
    /// The available index read last.
    seen_avail: u16,
    used_idx: u16,
    /// The used index that the guest sees.
    published: u16,
    /// The head popped last, while nothing else has moved where popping goes on.
    last_popped: Option<u16>,
    /// Something was published since the start: before, the guest is interrupted in any case.
    signalled: bool,
    /// The used index at the last interrupt.
    told: u16,
    enabled: bool,
    event_idx: bool,
    indirect: bool,
    broken: Option<RingFault>,
    parts: Parts,
    /// Guest-physical address of the used ring, if it is to be logged.
    log_addr: Option<u64>,
    log: Option<Arc<DirtyLog>>,
    memory: Arc<GuestMemory>,
    /// The region found last.
    hint: usize,
    /// One bit for each head that is in flight.
    in_flight: Vec<u64>,
    inflight: Option<InflightQueue>,
    bells: Bells,
}

// SAFETY: the addresses inside are kept mapped by the owners beside them and are valid on every thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Starts a ring, and says what the in-flight region calls in flight.
    pub(crate) fn new(setup: Setup<'_>) -> Result<(Self, Vec<Marked>), String> {
        let parts = Parts::locate(setup.memory, &setup.addresses, setup.size)?;
        let used_idx = u16::from_le(parts.used(IDX).load(Ordering::Acquire));
        let mut inflight = setup.inflight;
        let marked = inflight.as_mut().map(|queue| queue.recover(used_idx)).unwrap_or_default();
        let ring = Self {
            size: setup.size,
            next_avail: setup.base,
            seen_avail: setup.base,
            used_idx,
            published: used_idx,
            last_popped: None,
            signalled: false,
            told: used_idx,
            enabled: true,
            event_idx: setup.event_idx,
            indirect: setup.indirect,
            broken: None,
            parts,
            log_addr: setup.addresses.log,
            log: setup.log,
            memory: Arc::clone(setup.memory),
            hint: 0,
            in_flight: vec![0; usize::from(setup.size).div_ceil(64)],
            inflight,
            bells: setup.bells,
        };
        Ok((ring, marked))
    }

    /// Whether the guest does not kick (SET_VRING_KICK without a descriptor): the ring has to be looked at again and
    /// again.
    #[must_use]
    pub fn is_polled(&self) -> bool {
        self.bells.kick.is_none()
    }

    /// The eventfd that the guest's kicks arrive on, unless the ring is polled. It is non-blocking.
    #[must_use]
    pub fn kick_fd(&self) -> Option<RawFd> {
        self.bells.kick.as_ref().map(|fd| fd.as_raw_fd())
    }

    /// Takes the pending kicks from the eventfd, so that polling it waits for the next one. Never blocks.
    pub fn clear_kick(&self) {
        if let Some(kick) = &self.bells.kick {
            kick.clear();
        }
    }

    /// Sets where popping begins. After `RingStarted` it is the event's `base`.
    pub fn start_at(&mut self, next_avail: u16) {
        self.next_avail = next_avail;
        self.seen_avail = next_avail;
        self.last_popped = None;
    }

    /// The next chain that the guest made available; `None`: there is none, or the VMM disabled the ring.
    ///
    /// Marks nothing in the in-flight region: see [`mark`](Self::mark).
    ///
    /// # Errors
    /// [`RingError::BadChain`]: the head was consumed; [`reject`](Self::reject) it. [`RingError::Broken`]: pop no more.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        if !self.enabled {
            return Ok(None);
        }
        if let Some(fault) = self.broken {
            return Err(RingError::Broken(fault));
        }
        if self.next_avail == self.seen_avail && !self.look()? {
            return Ok(None);
        }
        let slot = usize::from(self.next_avail & (self.size - 1));
        let head = u16::from_le(self.parts.available(ENTRIES + 2 * slot).load(Ordering::Relaxed));
        if head >= self.size {
            return Err(self.broken(RingFault::HeadOutOfRange { head }));
        }
        if self.is_in_flight(head) {
            return Err(self.broken(RingFault::HeadInFlight { head }));
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        self.last_popped = Some(head);
        self.set_in_flight(head, true);
        self.walk(head).map(Some)
    }

    /// Reads the available index. `false`: nothing new.
    fn look(&mut self) -> Result<bool, RingError> {
        let avail = u16::from_le(self.parts.available(IDX).load(Ordering::Acquire));
        if avail.wrapping_sub(self.next_avail) > self.size {
            let fault = RingFault::AvailJumped { avail, next: self.next_avail, size: self.size };
            return Err(self.broken(fault));
        }
        self.seen_avail = avail;
        Ok(avail != self.next_avail)
    }

    #[inline]
    fn walker(&mut self) -> Walk<'_> {
        Walk {
            memory: &self.memory,
            table: self.parts.descriptors,
            size: self.size,
            indirect: self.indirect,
            hint: &mut self.hint,
        }
    }

    #[inline]
    fn walk(&mut self, head: u16) -> Result<Chain, RingError> {
        self.walker().chain(head).map_err(|fault| RingError::BadChain { head, fault })
    }

    /// Gives a request back that cannot be executed, or not even be read: writes `code` to the last byte that the
    /// device may write of its chain, which is where device classes have their status, and completes it. For heads that
    /// count as in flight; others are left alone.
    ///
    /// # Errors
    /// [`RingError::Broken`]: there is no such byte, as the descriptors lead nowhere, or the device may write nothing.
    /// A driver that got the head back would read an old status. So it does not: the ring is unusable until its driver
    /// is reset, and the head, if it was popped last, is popped again should the ring only be stopped and started.
    #[cold]
    pub fn reject(&mut self, head: u16, code: u8) -> Result<(), RingError> {
        if !self.is_in_flight(head) {
            return Ok(());
        }
        let Some(tail) = self.walker().tail(head) else { return Err(self.keep_back(head)) };
        let Some((at, _)) = self.memory.locate(tail.guest_addr, &mut self.hint) else {
            return Err(self.keep_back(head));
        };
        // SAFETY: one byte of the guest's memory, mapped as long as `memory` lives; the guest may touch it meanwhile.
        unsafe { at.write_volatile(code) };
        self.log_range(tail.guest_addr, 1);
        self.complete(head, tail.len);
        Ok(())
    }

    /// Does not give back a head that cannot be answered.
    fn keep_back(&mut self, head: u16) -> RingError {
        if self.last_popped.take() == Some(head) {
            self.next_avail = self.next_avail.wrapping_sub(1);
            self.set_in_flight(head, false);
            if let Some(queue) = &mut self.inflight {
                queue.unmark(head);
            }
        }
        self.broken(RingFault::NoAnswer { head })
    }

    #[cold]
    fn broken(&mut self, fault: RingFault) -> RingError {
        self.broken = Some(fault);
        tracing::warn!(%fault, "a guest's ring is unusable until its driver is reset");
        if let Some(error) = &self.bells.error {
            error.ring();
        }
        RingError::Broken(fault)
    }

    /// Parses the chain at `head` again, without touching the available index: for a request that is known to be in
    /// flight, adopted after a migration or found marked after a restart. From then on the head counts as in flight.
    ///
    /// # Errors
    /// [`RingError::BadChain`]: there is no valid chain at this head. It counts as in flight all the same, unless it
    /// is outside the ring.
    pub fn chain_at(&mut self, head: u16) -> Result<Chain, RingError> {
        if head >= self.size {
            return Err(RingError::BadChain { head, fault: ChainFault::HeadOutOfRange });
        }
        self.set_in_flight(head, true);
        self.walk(head)
    }

    /// Records in the in-flight region that `head` is in flight, with the device's `tag` for it.
    /// Without a region this does nothing.
    #[inline]
    pub fn mark(&mut self, head: u16, tag: u64) {
        if head < self.size
            && let Some(queue) = &mut self.inflight
        {
            queue.mark(head, tag);
        }
    }

    /// Takes back a mark of a request that will never be completed (one that a reset has made meaningless); the head
    /// no longer counts as in flight.
    pub fn unmark(&mut self, head: u16) {
        if head < self.size {
            self.set_in_flight(head, false);
            if let Some(queue) = &mut self.inflight {
                queue.unmark(head);
            }
        }
    }

    /// Whether `head` was popped or parsed, and not yet completed.
    #[inline]
    #[must_use]
    pub fn is_in_flight(&self, head: u16) -> bool {
        self.in_flight.get(usize::from(head / 64)).is_some_and(|bits| bits & (1 << (head % 64)) != 0)
    }

    #[inline]
    fn set_in_flight(&mut self, head: u16, on: bool) {
        if let Some(bits) = self.in_flight.get_mut(usize::from(head / 64)) {
            let bit = 1 << (head % 64);
            *bits = if on { *bits | bit } else { *bits & !bit };
        }
    }

    /// Puts `head` into the used ring, with the bytes `written` to its writable part. The guest sees it after
    /// [`publish`](Self::publish). A head outside the ring is ignored.
    #[inline]
    pub fn complete(&mut self, head: u16, written: u32) {
        if head >= self.size {
            return;
        }
        let offset = ENTRIES + USED_ENTRY * usize::from(self.used_idx & (self.size - 1));
        // SAFETY: the entry is inside the used ring, which is mapped and aligned to 4; the guest may touch it
        // meanwhile, and it is reached with atomics only.
        unsafe {
            let entry = self.parts.used.add(offset);
            AtomicU32::from_ptr(entry.cast()).store(u32::from(head).to_le(), Ordering::Relaxed);
            AtomicU32::from_ptr(entry.add(4).cast()).store(written.to_le(), Ordering::Relaxed);
        }
        self.log_used(offset, USED_ENTRY as u64);
        self.set_in_flight(head, false);
        if let Some(queue) = &mut self.inflight {
            queue.complete(head);
        }
        self.used_idx = self.used_idx.wrapping_add(1);
    }

    /// Sets the dirty log's bits for the first `written` bytes of the chain's writable part. To be called after the
    /// data is in place and before [`complete`](Self::complete). Does nothing while the VMM does not log.
    #[inline]
    pub fn log_written(&mut self, chain: &Chain, written: u32) {
        if let Some(log) = &self.log {
            let mut left = u64::from(written);
            for piece in &chain.writable {
                let len = left.min(piece.len as u64);
                log.mark(piece.guest_addr, len);
                left -= len;
                if left == 0 {
                    break;
                }
            }
        }
    }

    /// Sets the dirty log's bits for `len` bytes written anywhere in a chain's writable part, beginning at guest
    /// address `guest_addr`: for a status byte that lies behind data of which little was written.
    #[inline]
    pub fn log_range(&mut self, guest_addr: u64, len: u64) {
        if let Some(log) = &self.log {
            log.mark(guest_addr, len);
        }
    }

    #[inline]
    fn log_used(&self, offset: usize, len: u64) {
        if let (Some(log), Some(addr)) = (&self.log, self.log_addr) {
            log.mark(addr.wrapping_add(offset as u64), len);
        }
    }

    /// Makes everything completed so far visible to the guest, with one store of the used index, and interrupts the
    /// guest if it wants that.
    #[inline]
    pub fn publish(&mut self) {
        let old = self.published;
        if old == self.used_idx {
            return;
        }
        self.parts.used(IDX).store(self.used_idx.to_le(), Ordering::Release);
        self.published = self.used_idx;
        self.log_used(IDX, 2);
        if let Some(queue) = &mut self.inflight {
            queue.published(self.used_idx);
        }
        // The guest writes what it wants and then looks at the index; we wrote the index and now look at that.
        fence(Ordering::SeqCst);
        if self.wants_interrupt(old) {
            self.signal();
        }
        self.signalled = true;
    }

    /// Interrupts the guest if it waits for something that was published without an interrupt. To be called before
    /// going to sleep, and once more a little later.
    ///
    /// By the rules [`publish`](Self::publish) is enough: the guest says what it wants, then looks at the used index,
    /// with a barrier between. But QEMU's TCG drops that barrier for a VM with one processor, so the guest's word may
    /// come after its look: neither side sees the other's, and the guest waits for ever (seen with 7.2: about once in
    /// 50,000 requests that found the queue empty). An interrupt too many is harmless.
    pub fn remind(&mut self) {
        if self.told != self.published && self.wants_interrupt(self.told) {
            self.signal();
        }
    }

    #[inline]
    fn wants_interrupt(&self, old: u16) -> bool {
        if !self.event_idx {
            let flags = u16::from_le(self.parts.available(0).load(Ordering::Relaxed));
            return flags & NO_INTERRUPT == 0;
        }
        let used_event = self.parts.available(ENTRIES + 2 * usize::from(self.size));
        let event = u16::from_le(used_event.load(Ordering::Relaxed));
        let new = self.published;
        !self.signalled || new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Asks the guest not to kick (a hint: kicks may still come).
    pub fn disable_notifications(&mut self) {
        // With an event index the guest kicks only when it passes the one written last: nothing to do.
        if !self.event_idx {
            self.parts.used(0).store(NO_NOTIFY.to_le(), Ordering::Relaxed);
            self.log_used(0, 2);
        }
    }

    /// Asks the guest to kick from now on. `true`: more chains came meanwhile, pop again first.
    pub fn enable_notifications(&mut self) -> bool {
        if self.event_idx {
            let offset = ENTRIES + USED_ENTRY * usize::from(self.size);
            self.parts.used(offset).store(self.next_avail.to_le(), Ordering::Relaxed);
            self.log_used(offset, 2);
        } else {
            self.parts.used(0).store(0, Ordering::Relaxed);
            self.log_used(0, 2);
        }
        fence(Ordering::SeqCst);
        let avail = u16::from_le(self.parts.available(IDX).load(Ordering::Acquire));
        self.enabled && self.broken.is_none() && avail != self.next_avail
    }

    /// Interrupts the guest unconditionally (after a start on a migration's destination).
    pub fn signal(&mut self) {
        if let Some(call) = &self.bells.call {
            call.ring();
        }
        self.told = self.published;
    }

    /// Whether the VMM lets the ring be processed now (SET_VRING_ENABLE).
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Whether the VMM keeps a dirty log now.
    #[must_use]
    pub fn is_logging(&self) -> bool {
        self.log.is_some()
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

    pub(crate) fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    pub(crate) fn set_log(&mut self, log: Option<Arc<DirtyLog>>) {
        self.log = log;
    }

    pub(crate) fn set_bells(&mut self, bells: Bells) {
        self.bells = bells;
    }

    /// Takes new addresses or a new memory table; an error leaves the ring where it was.
    pub(crate) fn relocate(&mut self, memory: &Arc<GuestMemory>, at: &RingAddresses) -> Result<(), String> {
        self.memory = Arc::clone(memory);
        self.log_addr = at.log;
        self.parts = Parts::locate(memory, at, self.size)?;
        Ok(())
    }
}
