//! A guest and its VMM in miniature: memory in a memfd, a split ring in it, and raw vhost-user messages.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own part of this")]

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use belay_vhost_user::{Connection, ConnectionError, Event, Offer};
use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

pub const NEED_REPLY: u32 = 8;
pub const LOG_ALL: u64 = 1 << 26;
pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const PROTOCOL: u64 = 1 << 30;
pub const VERSION_1: u64 = 1 << 32;
/// What is offered without memory slots.
pub const OFFERED_PROTOCOL: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 10 | 1 << 12 | 1 << 13;
/// What is understood: also memory slots.
pub const ALL_PROTOCOL: u64 = OFFERED_PROTOCOL | 1 << 15;

/// Where the test's VMM has the guest's address 0 mapped.
pub const USER: u64 = 0x7f00_0000_0000;
/// Bytes of the guest's memory.
pub const MEMORY: u64 = 0x10_0000;

pub fn offer() -> Offer {
    Offer {
        device_features: 1 << 9,
        queues: 4,
        queue_entries: 256,
        config: (0..60).collect(),
        memory_slots: false,
    }
}

pub fn memfd(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

pub fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

/// Takes an eventfd's count; 0 if nothing came.
pub fn count(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    match rustix::io::read(fd, &mut bytes) {
        Ok(8) => u64::from_ne_bytes(bytes),
        _ => 0,
    }
}

/// The pages whose bits a dirty log has.
pub fn dirty(log: &OwnedFd, len: usize) -> Vec<u64> {
    let mut bytes = vec![0; len];
    rustix::io::pread(log, &mut bytes, 0).unwrap();
    (0..len as u64 * 8).filter(|p| bytes[(p / 8) as usize] & (1 << (p % 8)) != 0).collect()
}

/// The guest: its memory (guest address = offset in the memfd) and one ring.
pub struct Guest {
    pub memory: OwnedFd,
    pub size: u16,
    pub avail_idx: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

pub const F_NEXT: u16 = 1;
pub const F_WRITE: u16 = 2;
pub const F_INDIRECT: u16 = 4;

impl Guest {
    pub fn new(size: u16) -> Self {
        let (descriptors, available, used) = (0x1000, 0x4000, 0x5000);
        Self { memory: memfd(MEMORY), size, avail_idx: 0, descriptors, available, used }
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) {
        assert_eq!(rustix::io::pwrite(&self.memory, bytes, addr).unwrap(), bytes.len());
    }

    pub fn read<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        assert_eq!(rustix::io::pread(&self.memory, &mut bytes, addr).unwrap(), N);
        bytes
    }

    pub fn describe(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    /// A chain of direct descriptors from `head` on: buffers with address, length and whether the device writes them.
    pub fn chain(&self, head: u16, buffers: &[(u64, u32, bool)]) {
        for (step, (addr, len, writable)) in buffers.iter().enumerate() {
            let index = head + step as u16;
            let more = step + 1 < buffers.len();
            let flags = if *writable { F_WRITE } else { 0 } | if more { F_NEXT } else { 0 };
            self.describe(self.descriptors, index, *addr, *len, flags, index + 1);
        }
    }

    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.write(self.available + 4 + 2 * slot, &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.set_avail_idx(self.avail_idx);
    }

    pub fn set_avail_idx(&self, idx: u16) {
        self.write(self.available + 2, &idx.to_le_bytes());
    }

    pub fn used_idx(&self) -> u16 {
        u16::from_le_bytes(self.read(self.used + 2))
    }

    pub fn used_entry(&self, index: u16) -> (u32, u32) {
        let at = self.used + 4 + 8 * u64::from(index % self.size);
        (u32::from_le_bytes(self.read(at)), u32::from_le_bytes(self.read(at + 4)))
    }
}

/// A VMM that speaks in raw messages, with the connection it speaks to.
pub struct Vmm {
    pub socket: UnixStream,
    pub connection: Connection,
    pub kick: OwnedFd,
    pub call: OwnedFd,
}

impl Vmm {
    pub fn new() -> Self {
        let (socket, other) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        let connection = Connection::new(other, offer()).unwrap();
        Self { socket, connection, kick: eventfd(), call: eventfd() }
    }

    /// A VMM that has negotiated every protocol feature and these features.
    pub fn negotiated(features: u64) -> Self {
        let mut vmm = Self::new();
        vmm.tell(16, &ALL_PROTOCOL.to_ne_bytes(), &[]);
        vmm.tell(2, &features.to_ne_bytes(), &[]);
        vmm
    }

    pub fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut bytes = Vec::new();
        for word in [request, 1 | flags, payload.len() as u32] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(payload);
        self.send_bytes(&bytes, fds);
    }

    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent =
            rustix::net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
                .unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// Handles everything sent, and gives the events; a quiesce is answered at once.
    pub fn events(&mut self) -> Result<Vec<Event>, ConnectionError> {
        let mut events = Vec::new();
        while let Some(event) = self.connection.next_event()? {
            if matches!(event, Event::Quiesce { .. }) {
                self.connection.quiesced()?;
            }
            events.push(event);
        }
        Ok(events)
    }

    /// Sends a request that must go well and has no reply of its own.
    pub fn tell(&mut self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Vec<Event> {
        self.send(request, 0, payload, fds);
        self.events().unwrap()
    }

    /// Sends a request and gives payload and descriptor of the reply.
    pub fn ask(
        &mut self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> (Vec<u8>, Option<OwnedFd>) {
        self.send(request, flags, payload, fds);
        self.events().unwrap();
        self.reply(request).expect("a reply")
    }

    /// The reply to a request, if there is one.
    pub fn reply(&self, request: u32) -> Option<(Vec<u8>, Option<OwnedFd>)> {
        let mut bytes = [0; 512];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut to = [IoSliceMut::new(&mut bytes)];
        let received = rustix::net::recvmsg(&self.socket, &mut to, &mut control, RecvFlags::DONTWAIT).ok()?;
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let word = |index: usize| u32::from_ne_bytes(bytes[4 * index..4 * index + 4].try_into().unwrap());
        assert_eq!(word(0), request, "reply to another request");
        assert_eq!(word(1), 5, "flags of a reply");
        assert_eq!(word(2) as usize, received.bytes - 12, "size of a reply");
        Some((bytes[12..received.bytes].to_vec(), fd))
    }

    pub fn set_memory(&mut self, guest: &Guest) -> Vec<Event> {
        self.tell(5, &[words(&[1, 0]), longs(&[0, MEMORY, USER, 0])].concat(), &[guest.memory.as_fd()])
    }

    /// Sends everything that starts a ring, and gives the events.
    pub fn start(&mut self, guest: &Guest, queue: u32, base: u16, log: bool) -> Vec<Event> {
        let mut events = self.tell(8, &words(&[queue, guest.size.into()]), &[]);
        events.extend(self.tell(10, &words(&[queue, base.into()]), &[]));
        events.extend(self.set_address(guest, queue, log));
        let (kick, call) = (self.kick.try_clone().unwrap(), self.call.try_clone().unwrap());
        events.extend(self.tell(13, &longs(&[queue.into()]), &[call.as_fd()]));
        events.extend(self.tell(12, &longs(&[queue.into()]), &[kick.as_fd()]));
        events.extend(self.tell(18, &words(&[queue, 1]), &[]));
        events
    }

    pub fn set_address(&mut self, guest: &Guest, queue: u32, log: bool) -> Vec<Event> {
        let at = [guest.descriptors + USER, guest.used + USER, guest.available + USER, guest.used];
        self.tell(9, &[words(&[queue, log.into()]), longs(&at)].concat(), &[])
    }
}

/// A VMM with one running ring, and its guest.
pub fn running(size: u16, features: u64) -> (Vmm, Guest) {
    let guest = Guest::new(size);
    let mut vmm = Vmm::negotiated(features | PROTOCOL | VERSION_1);
    vmm.set_memory(&guest);
    let events = vmm.start(&guest, 0, 0, false);
    assert!(matches!(events[..], [Event::RingStarted { queue: 0, base: 0, used: 0, .. }]), "{events:?}");
    (vmm, guest)
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

pub fn long(bytes: &[u8]) -> u64 {
    u64::from_ne_bytes(bytes[..8].try_into().unwrap())
}

impl Vmm {
    /// Takes whatever reply is there.
    pub fn reply_any(&self) -> bool {
        use std::io::Read;
        (&self.socket).read(&mut [0; 512]).is_ok_and(|len| len > 0)
    }
}
