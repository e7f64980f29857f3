//! A VM in miniature: guest memory in a memfd, several split rings in it, a driver that checks every request, and
//! rust-vmm's vhost-user front-end. "Live migration" is connecting the same memory to another back-end.

#![allow(unsafe_code, reason = "it writes guest memory, which a mapping is for Rust")]
#![allow(clippy::missing_panics_doc, reason = "a test's failure is a panic")]

mod memory;
mod model;

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use memory::Memory;
use model::{Model, content};

use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// Entries of a ring.
pub const RING_SIZE: u16 = 128;
const QUEUE_STRIDE: usize = 0x1_0000;
const AVAIL: usize = 0x2000;
const USED: usize = 0x3000;
const BUFFERS: usize = 0x40_0000;
const SLOT_STRIDE: usize = 16 << 10;
const DATA: usize = 4096;
const MEMORY: usize = 64 << 20;
/// Requests that a queue can have in flight: three descriptors each.
pub const SLOTS: usize = 40;
/// Bytes of a request's data.
pub const BLOCK: usize = 4096;
/// A zombie's writes have versions from here on.
const ZOMBIE_VERSIONS: u64 = 1 << 40;
/// A lost completion would wait for ever: that long is "for ever".
const PATIENCE: Duration = Duration::from_secs(30);

/// A sequence of numbers that a seed determines.
pub struct Random(pub u64);

impl Random {
    /// The next, below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % limit
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Read { block: u64 },
    Write { block: u64, version: u64 },
    Flush,
}

struct Connection {
    frontend: Frontend,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
}

/// What a VM that moves leaves behind.
pub struct Left {
    connection: Option<Connection>,
    region: Option<(VhostUserInflight, std::fs::File)>,
    bases: Vec<u16>,
}

impl Left {
    /// The agent there has died.
    pub fn lose_connection(&mut self) {
        self.connection = None;
    }
}

/// The VM.
pub struct Guest {
    memory: Memory,
    queues: usize,
    blocks: u64,
    avail: Vec<u16>,
    seen: Vec<u16>,
    in_flight: HashMap<(usize, usize), Doing>,
    model: Model,
    /// Slots of requests that are not to be answered any more.
    spoiled: Vec<(usize, usize)>,
    /// Queue, head and written bytes of completed chains that were offered raw.
    pub raw: Vec<(usize, u32, u32)>,
    next_version: u64,
    /// Requests completed.
    pub completed: u64,
    /// Requests that ended with an error status.
    pub errors: u64,
    connection: Option<Connection>,
    inflight_region: Option<(VhostUserInflight, std::fs::File)>,
    /// Where each ring begins at its next start.
    pub bases: Vec<u16>,
    /// What it draws its requests from.
    pub random: Random,
    /// Does not kick.
    pub mute: bool,
    /// Feature bits that the driver does not take.
    pub declines: u64,
}

impl Guest {
    /// A VM with so many queues, whose disk has so many blocks, all zero.
    pub fn new(queues: usize, blocks: u64, seed: u64) -> Self {
        Self {
            memory: Memory::new(MEMORY),
            queues,
            blocks,
            avail: vec![0; queues],
            seen: vec![0; queues],
            in_flight: HashMap::new(),
            model: Model::default(),
            spoiled: Vec::new(),
            raw: Vec::new(),
            next_version: 1,
            completed: 0,
            errors: 0,
            connection: None,
            inflight_region: None,
            bases: vec![0; queues],
            random: Random(seed),
            mute: false,
            declines: 0,
        }
    }

    fn ring(&self, queue: usize) -> usize {
        queue * QUEUE_STRIDE
    }

    fn slot(&self, queue: usize, slot: usize) -> usize {
        BUFFERS + (queue * SLOTS + slot) * SLOT_STRIDE
    }

    /// Connects to a back-end as QEMU does; rings start at the bases of the last stop.
    pub fn connect(&mut self, socket: &Path) {
        assert!(self.try_connect(socket), "nobody listens at {}", socket.display());
    }

    /// As [`Guest::connect`]. `false`: nobody listens there, or nobody answers: the socket of an agent that was killed
    /// takes connections until the kernel has cleaned up its io_uring.
    pub fn try_connect(&mut self, socket: &Path) -> bool {
        let Ok(stream) = UnixStream::connect(socket) else { return false };
        let mut frontend = Frontend::from_stream(stream, self.queues as u64);
        let Ok(features) = frontend.get_features() else { return false };
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD));
        frontend.set_owner().unwrap();
        // Everything but LOG_ALL and the event index, which this little driver does not use.
        frontend.set_features(features & !(1 << 26) & !(1 << 29) & !self.declines).unwrap();
        let kicks = (0..self.queues).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect();
        let calls = (0..self.queues).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect();
        self.connection = Some(Connection { frontend, kicks, calls });
        true
    }

    /// A region of a new life (a fresh VMM, a reset): nothing in flight.
    pub fn fresh_inflight_region(&mut self) {
        let frontend = &mut self.connection.as_mut().unwrap().frontend;
        let want = VhostUserInflight {
            mmap_size: 0,
            mmap_offset: 0,
            num_queues: self.queues as u16,
            queue_size: RING_SIZE,
        };
        self.inflight_region = Some(frontend.get_inflight_fd(&want).unwrap());
    }

    /// Connects for the first time, and starts the rings.
    pub fn plug_in(&mut self, socket: &Path) {
        self.connect(socket);
        self.fresh_inflight_region();
        self.start();
    }

    /// Starts the rings.
    pub fn start(&mut self) {
        self.give_memory();
        for queue in 0..self.queues {
            self.start_ring(queue);
        }
    }

    /// Gives the back-end the memory, and what is in flight: then rings can be started one by one.
    pub fn give_memory(&mut self) {
        let memory = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: self.memory.len() as u64,
            userspace_addr: self.memory.address(),
            mmap_offset: 0,
            mmap_handle: self.memory.fd(),
        };
        let connection = self.connection.as_mut().unwrap();
        if let Some((region, file)) = &self.inflight_region {
            connection.frontend.set_inflight_fd(region, file.as_raw_fd()).unwrap();
        }
        connection.frontend.set_mem_table(&[memory]).unwrap();
    }

    /// Plugs in more memory, so many pieces of a page, which it does not use. The back-end must offer memory slots.
    pub fn plug_memory(&mut self, pieces: u64) {
        const PAGE: u64 = 4096;
        let (end, len) = (self.memory.address() + self.memory.len() as u64, self.memory.len() as u64);
        let connection = self.connection.as_mut().unwrap();
        for piece in 0..pieces {
            let memory = VhostUserMemoryRegionInfo {
                guest_phys_addr: len + piece * PAGE,
                memory_size: PAGE,
                userspace_addr: end + piece * PAGE,
                mmap_offset: 0,
                mmap_handle: self.memory.fd(),
            };
            connection.frontend.add_mem_region(&memory).unwrap();
        }
    }

    /// Starts one ring; see [`Guest::give_memory`].
    pub fn start_ring(&mut self, queue: usize) {
        let ring = self.memory.address() + (queue * QUEUE_STRIDE) as u64;
        let connection = self.connection.as_mut().unwrap();
        let frontend = &mut connection.frontend;
        frontend.set_vring_num(queue, RING_SIZE).unwrap();
        frontend.set_vring_base(queue, self.bases[queue]).unwrap();
        let config = VringConfigData {
            queue_max_size: RING_SIZE,
            queue_size: RING_SIZE,
            flags: 0,
            desc_table_addr: ring,
            avail_ring_addr: ring + AVAIL as u64,
            used_ring_addr: ring + USED as u64,
            log_addr: None,
        };
        frontend.set_vring_addr(queue, &config).unwrap();
        frontend.set_vring_call(queue, &connection.calls[queue]).unwrap();
        connection.kicks[queue].write(1).unwrap();
        frontend.set_vring_kick(queue, &connection.kicks[queue]).unwrap();
        frontend.set_vring_enable(queue, true).unwrap();
    }

    /// Stops the rings, as at a pause or at the switchover.
    pub fn stop(&mut self) {
        let connection = self.connection.as_mut().unwrap();
        for queue in 0..self.queues {
            connection.frontend.set_vring_enable(queue, false).unwrap();
        }
        for queue in 0..self.queues {
            self.bases[queue] = connection.frontend.get_vring_base(queue).unwrap() as u16;
        }
    }

    /// Closes the connection, as a VMM that ends.
    pub fn disconnect(&mut self) {
        self.connection = None;
    }

    /// The back-end has died: its rings begin where the used ring ends, the in-flight region tells the rest.
    pub fn lose_connection(&mut self) {
        self.connection = None;
        for queue in 0..self.queues {
            self.bases[queue] = self.memory.index(self.ring(queue) + USED + 2).load(Ordering::Acquire);
        }
    }

    /// The VM moves: the region of in-flight requests stays behind.
    pub fn migrate_away(&mut self) {
        self.connection = None;
        self.inflight_region = None;
    }

    /// The VM, stopped, tries to move. What stays behind is a VMM that is still connected: the VM can go back to it.
    pub fn leave(&mut self) -> Left {
        Left {
            connection: self.connection.take(),
            region: self.inflight_region.take(),
            bases: self.bases.clone(),
        }
    }

    /// The move did not happen: the VM goes on where it was, with what was in flight there. Nothing may have completed
    /// meanwhile. `false`: the agent there has died since, so connect first, then start.
    pub fn go_back(&mut self, left: Left) -> bool {
        self.inflight_region = left.region;
        self.bases = left.bases;
        self.connection = left.connection;
        if self.connection.is_none() {
            self.lose_connection();
            return false;
        }
        self.start();
        true
    }

    /// A second VM with the same memory, as it is left behind by a migration: a zombie if it runs again.
    #[must_use]
    pub fn zombie(&self) -> Self {
        Self {
            memory: self.memory.copy(),
            queues: self.queues,
            blocks: self.blocks,
            avail: self.avail.clone(),
            seen: self.seen.clone(),
            in_flight: self.in_flight.clone(),
            model: self.model.clone(),
            spoiled: self.spoiled.clone(),
            raw: Vec::new(),
            next_version: ZOMBIE_VERSIONS,
            completed: 0,
            errors: 0,
            connection: None,
            inflight_region: None,
            bases: self.bases.clone(),
            random: Random(self.random.0 ^ ZOMBIE_VERSIONS),
            mute: self.mute,
            declines: self.declines,
        }
    }

    /// Whether a VMM's connection is open, as far as this side knows.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connection.is_some()
    }

    /// Checks a disk's content against what the VM has written. Nothing may be in flight.
    pub fn check_image(&self, bytes: &[u8]) {
        assert!(self.in_flight.is_empty(), "a disk in use is not checked");
        assert_eq!(bytes.len() as u64, self.blocks * BLOCK as u64);
        for (block, bytes) in (0..).zip(bytes.chunks_exact(BLOCK)) {
            self.model.check(block, bytes);
        }
    }

    /// The VM's memory is at the other back-end, and its rings start there.
    pub fn migrate_to(&mut self, socket: &Path) {
        self.migrate_away();
        self.plug_in(socket);
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Forgets everything, as a reset does; used and available rings begin anew.
    pub fn reset(&mut self) {
        self.spoiled.clear();
        let lost: Vec<Doing> = self.in_flight.drain().map(|(_, doing)| doing).collect();
        for doing in lost {
            if let Doing::Write { block, version } = doing {
                self.model.given_up(block, version);
            }
        }
        for queue in 0..self.queues {
            let ring = self.ring(queue);
            self.memory.put(ring, &[0; 0x4000]);
            self.avail[queue] = 0;
            self.seen[queue] = 0;
            self.bases[queue] = 0;
        }
    }

    /// The memory that reads in flight are to fill.
    pub fn read_buffers(&self) -> Vec<((usize, usize), [u8; BLOCK])> {
        let reads = self.in_flight.iter().filter(|(_, doing)| matches!(doing, Doing::Read { .. }));
        reads
            .map(|((queue, slot), _)| ((*queue, *slot), self.memory.get(self.slot(*queue, *slot) + DATA)))
            .collect()
    }

    /// How many requests the device had not even taken at the last stop.
    pub fn not_taken(&self) -> usize {
        let counts = self.avail.iter().zip(&self.bases).map(|(avail, base)| avail.wrapping_sub(*base));
        counts.map(usize::from).sum()
    }

    /// Whether the memory of these buffers is as it was.
    pub fn same_buffers(&self, buffers: &[((usize, usize), [u8; BLOCK])]) -> bool {
        buffers
            .iter()
            .all(|((queue, slot), bytes)| self.memory.get(self.slot(*queue, *slot) + DATA) == *bytes)
    }

    fn busy(&self, wanted: u64) -> bool {
        self.in_flight.values().any(|doing| match doing {
            Doing::Read { block } | Doing::Write { block, .. } => *block == wanted,
            Doing::Flush => false,
        })
    }

    /// Offers one more request on this queue, if it has room.
    pub fn offer(&mut self, queue: usize) -> bool {
        let free = |slot: &usize| {
            !self.in_flight.contains_key(&(queue, *slot)) && !self.spoiled.contains(&(queue, *slot))
        };
        let Some(slot) = (0..SLOTS).find(free) else { return false };
        let block = self.random.below(self.blocks);
        let doing = match self.random.below(20) {
            0 => Doing::Flush,
            _ if self.busy(block) => return false,
            1..=10 => {
                self.next_version += 1;
                Doing::Write { block, version: self.next_version }
            }
            _ => Doing::Read { block },
        };
        self.write_request(queue, slot, doing);
        self.in_flight.insert((queue, slot), doing);
        true
    }

    fn write_request(&mut self, queue: usize, slot: usize, doing: Doing) {
        let at = self.slot(queue, slot);
        let (number, block) = match doing {
            Doing::Read { block } => (0u32, block),
            Doing::Write { block, version } => {
                self.memory.put(at + DATA, &content(version, block));
                (1, block)
            }
            Doing::Flush => (4, 0),
        };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&number.to_le_bytes());
        header[8..].copy_from_slice(&(block * (BLOCK as u64 / 512)).to_le_bytes());
        self.memory.put(at, &header);
        self.memory.put(at + 16, &[0xff]);
        if number == 0 {
            self.memory.put(at + DATA, &[0xa5; BLOCK]);
        }
        let head = (slot * 3) as u16;
        let (next, write) = (1u16, 2u16);
        self.descriptor(queue, head, at, 16, next, head + 1);
        match number {
            4 => self.descriptor(queue, head + 1, at + 16, 1, write, 0),
            _ => {
                let flags = next | if number == 0 { write } else { 0 };
                self.descriptor(queue, head + 1, at + DATA, BLOCK, flags, head + 2);
                self.descriptor(queue, head + 2, at + 16, 1, write, 0);
            }
        }
        self.make_available(queue, head);
    }

    fn make_available(&mut self, queue: usize, head: u16) {
        let ring = self.ring(queue);
        let position = usize::from(self.avail[queue] % RING_SIZE);
        self.memory.put(ring + AVAIL + 4 + position * 2, &head.to_le_bytes());
        self.avail[queue] = self.avail[queue].wrapping_add(1);
        self.memory.index(ring + AVAIL + 2).store(self.avail[queue], Ordering::Release);
    }

    /// Offers a chain as it is, at a head that this driver does not use: address, length and flags of each descriptor.
    /// The next descriptor is the one behind, for the last one the first.
    pub fn offer_raw(&mut self, queue: usize, descriptors: &[(u64, u32, u16)]) {
        let head = SLOTS as u16 * 3;
        for (step, (addr, len, flags)) in descriptors.iter().enumerate() {
            let next = if step + 1 < descriptors.len() { head + step as u16 + 1 } else { head };
            self.descriptor(queue, head + step as u16, *addr as usize, *len as usize, *flags, next);
        }
        self.make_available(queue, head);
        self.kick(queue);
    }

    /// Cuts the file of the VM's memory to nothing. Only [`Guest::kick`] and [`Guest::disconnect`] work then.
    pub fn take_memory_away(&self) {
        self.memory.cut();
    }

    /// The VM starts again, in new memory.
    pub fn start_in_new_memory(&mut self, socket: &Path) {
        self.disconnect();
        self.memory = Memory::new(self.memory.len());
        self.reset();
        self.connect(socket);
        self.fresh_inflight_region();
        self.start();
    }

    /// Memory that this driver does not use.
    pub fn scratch(&self) -> usize {
        MEMORY - (1 << 20)
    }

    /// Writes to the guest's memory at this address.
    pub fn poke(&self, at: usize, bytes: &[u8]) {
        self.memory.put(at, bytes);
    }

    /// So many bytes of the guest's memory from this address on.
    #[must_use]
    pub fn peek_all(&self, at: usize, len: usize) -> Vec<u8> {
        (at..at + len).step_by(512).flat_map(|at| self.memory.get::<512>(at)).collect()
    }

    /// The byte of the guest's memory at this address.
    #[must_use]
    pub fn peek(&self, at: usize) -> u8 {
        self.memory.get::<1>(at)[0]
    }

    /// Takes completions until so many raw chains have come back.
    pub fn wait_raw(&mut self, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.raw.len() < count {
            assert!(Instant::now() < deadline, "{} raw chains came back", self.raw.len());
            self.reap();
            std::thread::yield_now();
        }
    }

    /// Rewrites the descriptors of a request of a stopped queue that the device has taken, as no driver may: it cannot be
    /// answered any more. `false`: there is no such request.
    pub fn spoil(&mut self, queue: usize) -> bool {
        let mut not_taken = Vec::new();
        let mut index = self.bases[queue];
        while index != self.avail[queue] {
            let position = usize::from(index % RING_SIZE);
            not_taken.push(u16::from_le_bytes(self.memory.get(self.ring(queue) + AVAIL + 4 + position * 2)));
            index = index.wrapping_add(1);
        }
        let slot = self.in_flight.iter().find_map(|((q, slot), doing)| {
            let write = matches!(doing, Doing::Write { .. });
            (*q == queue && write && !not_taken.contains(&((slot * 3) as u16))).then_some(*slot)
        });
        let Some(slot) = slot else { return false };
        let head = (slot * 3) as u16;
        self.descriptor(queue, head + 1, self.slot(queue, slot) + DATA, BLOCK / 2, 1, head + 2);
        if let Some(Doing::Write { block, version }) = self.in_flight.remove(&(queue, slot)) {
            self.model.given_up(block, version);
        }
        self.spoiled.push((queue, slot));
        true
    }

    /// Announces a queue's kick without a descriptor: the device has to poll.
    pub fn stop_kicking(&self, queue: u8) {
        let frontend = &self.connection.as_ref().unwrap().frontend;
        let mut message = Vec::new();
        for word in [12u32, 1, 8] {
            message.extend(word.to_ne_bytes());
        }
        message.extend((1u64 << 8 | u64::from(queue)).to_ne_bytes());
        // SAFETY: the descriptor is open as long as the frontend, which is not used meanwhile.
        let socket = unsafe { std::os::fd::BorrowedFd::borrow_raw(frontend.as_raw_fd()) };
        assert_eq!(rustix::io::write(socket, &message).unwrap(), message.len());
    }

    /// Replaces every number in the in-flight region.
    pub fn scribble_tags(&self, number: impl Fn(u64) -> u64) {
        use std::os::unix::fs::FileExt;
        let (_, file) = self.inflight_region.as_ref().unwrap();
        let entries = u64::from(RING_SIZE);
        let queue = (16 + 16 * entries).next_multiple_of(64);
        let tags = queue * self.queues as u64 + 64;
        for index in 0..entries * self.queues as u64 {
            file.write_all_at(&number(index).to_ne_bytes(), tags + 8 * index).unwrap();
        }
    }

    fn descriptor(&self, queue: usize, index: u16, addr: usize, len: usize, flags: u16, next: u16) {
        let at = self.ring(queue) + usize::from(index) * 16;
        self.memory.put(at, &(addr as u64).to_le_bytes());
        self.memory.put(at + 8, &(len as u32).to_le_bytes());
        self.memory.put(at + 12, &flags.to_le_bytes());
        self.memory.put(at + 14, &next.to_le_bytes());
    }

    /// Tells the back-end, if there is one, that there are new requests.
    pub fn kick(&self, queue: usize) {
        fence(Ordering::SeqCst);
        if self.mute {
            return;
        }
        if let Some(connection) = &self.connection {
            connection.kicks[queue].write(1).unwrap();
        }
    }

    /// Takes completions and checks them. Returns how many there were.
    pub fn reap(&mut self) -> usize {
        let mut count = 0;
        for queue in 0..self.queues {
            let used = self.ring(queue) + USED;
            let end = self.memory.index(used + 2).load(Ordering::Acquire);
            while self.seen[queue] != end {
                let position = usize::from(self.seen[queue] % RING_SIZE);
                let id = u32::from_le_bytes(self.memory.get(used + 4 + position * 8));
                let written = u32::from_le_bytes(self.memory.get(used + 8 + position * 8));
                self.seen[queue] = self.seen[queue].wrapping_add(1);
                self.complete(queue, id, written);
                count += 1;
            }
        }
        count
    }

    fn complete(&mut self, queue: usize, id: u32, written: u32) {
        if id as usize >= SLOTS * 3 {
            self.raw.push((queue, id, written));
            return;
        }
        let slot = id as usize / 3;
        let doing =
            self.in_flight.remove(&(queue, slot)).unwrap_or_else(|| panic!("head {id} completed twice"));
        let at = self.slot(queue, slot);
        let [status] = self.memory.get::<1>(at + 16);
        self.completed += 1;
        if status != 0 {
            self.errors += 1;
            return;
        }
        match doing {
            Doing::Flush => assert_eq!(written, 1),
            Doing::Write { block, version } => {
                assert_eq!(written, 1);
                self.model.written(block, version);
            }
            Doing::Read { block } => {
                assert_eq!(written as usize, BLOCK + 1);
                let bytes = self.memory.get::<BLOCK>(at + DATA);
                self.model.read(block, &bytes);
            }
        }
    }

    /// Keeps the queues full until so many more requests have completed.
    pub fn run(&mut self, requests: u64, depth: usize) {
        let target = self.completed + requests;
        self.run_until(depth, |guest| guest.completed >= target);
    }

    /// Keeps the queues full until `done`; it is asked again and again.
    pub fn run_until(&mut self, depth: usize, mut done: impl FnMut(&Self) -> bool) {
        let mut deadline = Instant::now() + PATIENCE;
        while !done(self) {
            if self.step(depth) == 0 {
                assert!(Instant::now() < deadline, "stuck with {}", self.stuck());
                std::thread::yield_now();
            } else {
                deadline = Instant::now() + PATIENCE;
            }
        }
    }

    /// Fills the queues once, and takes what has completed. Returns how many requests have.
    pub fn step(&mut self, depth: usize) -> usize {
        self.fill(depth);
        self.reap()
    }

    /// Offers requests until every queue has so many in flight (or happens to draw a block that is busy).
    pub fn fill(&mut self, depth: usize) {
        for queue in 0..self.queues {
            let mut offered = false;
            while self.in_flight.keys().filter(|(q, _)| *q == queue).count() < depth && self.offer(queue) {
                offered = true;
            }
            if offered {
                self.kick(queue);
            }
        }
    }

    /// What is in flight, for whoever wonders why it stays so.
    #[must_use]
    pub fn stuck(&self) -> String {
        let rings: Vec<String> = (0..self.queues)
            .map(|queue| {
                let used = self.memory.index(self.ring(queue) + USED + 2).load(Ordering::Acquire);
                let here = self.in_flight.keys().filter(|(q, _)| *q == queue).count();
                format!(
                    "queue {queue}: {here} (avail {}, used {used}, started at {})",
                    self.avail[queue], self.bases[queue]
                )
            })
            .collect();
        format!("{} requests in flight: {}", self.in_flight.len(), rings.join(", "))
    }

    /// Waits until nothing is in flight.
    pub fn drain(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.in_flight.is_empty() {
            if self.reap() == 0 {
                assert!(Instant::now() < deadline, "stuck with {}", self.stuck());
                std::thread::yield_now();
            }
        }
    }

    /// Reads every block that was ever written.
    pub fn verify(&mut self) {
        self.drain();
        for block in self.model.blocks() {
            let doing = Doing::Read { block };
            self.write_request(0, 0, doing);
            self.in_flight.insert((0, 0), doing);
            self.kick(0);
            self.drain();
        }
        assert_eq!(self.errors, 0);
    }
}
