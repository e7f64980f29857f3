//! rust-vmm's front-end as an independent VMM: what it says and awaits is not of our making.
#![allow(unsafe_code, reason = "the device writes guest memory through raw pointers")]

mod common;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use belay_vhost_user::{Connection, Event, Marked};
use common::*;
use rustix::event::{PollFd, PollFlags};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

struct Machine {
    connection: Connection,
    frontend: Frontend,
    guest: Guest,
    kick: EventFd,
    call: EventFd,
}

impl Machine {
    /// Connects, with every request asking for a reply once that is negotiated.
    fn new(guest: Guest) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut machine = Self {
            connection: Connection::new(ours, offer()).unwrap(),
            frontend: Frontend::from_stream(theirs, 4),
            guest,
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        };
        machine.vmm(|vmm| {
            let features = vmm.get_features().unwrap();
            let protocol = vmm.get_protocol_features().unwrap();
            assert_eq!(protocol.bits(), OFFERED_PROTOCOL);
            let understood = protocol | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
            vmm.set_protocol_features(understood).unwrap();
            vmm.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            assert_eq!(vmm.get_queue_num().unwrap(), 4);
            assert_eq!(vmm.get_max_mem_slots().unwrap(), 509);
            vmm.set_owner().unwrap();
            vmm.set_features(features & !LOG_ALL).unwrap();
        });
        machine
    }

    /// Runs a VMM's calls in a thread of their own, and serves them here. A quiesce is answered at once.
    fn vmm<R: Send>(&mut self, calls: impl FnOnce(&mut Frontend) -> R + Send) -> (R, Vec<Event>) {
        let done = eventfd();
        let mut frontend = self.frontend.clone();
        let mut events = Vec::new();
        let connection = &mut self.connection;
        let result = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| calls(&mut frontend)));
                rustix::io::write(&done, &1u64.to_ne_bytes()).unwrap();
                result
            });
            let mut finished = false;
            while !finished {
                // SAFETY: the connection outlives this borrow of its descriptor.
                let socket = unsafe { std::os::fd::BorrowedFd::borrow_raw(connection.as_raw_fd()) };
                let mut fds = [PollFd::new(&socket, PollFlags::IN), PollFd::new(&done, PollFlags::IN)];
                rustix::event::poll(&mut fds, None).unwrap();
                finished = !fds[1].revents().is_empty();
                while let Some(event) = connection.next_event().unwrap() {
                    if matches!(event, Event::Quiesce { .. }) {
                        connection.quiesced().unwrap();
                    }
                    events.push(event);
                }
            }
            thread.join().unwrap()
        });
        (result.unwrap(), events)
    }

    fn memory(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.guest.memory.as_raw_fd(),
        }
    }

    fn ring_config(&self, log: bool) -> VringConfigData {
        VringConfigData {
            queue_max_size: 256,
            queue_size: self.guest.size,
            flags: log.into(),
            desc_table_addr: USER + self.guest.descriptors,
            used_ring_addr: USER + self.guest.used,
            avail_ring_addr: USER + self.guest.available,
            log_addr: log.then_some(self.guest.used),
        }
    }

    fn start(&mut self, base: u16) -> Vec<Event> {
        let (size, config) = (self.guest.size, self.ring_config(false));
        let (kick, call) = (self.kick.try_clone().unwrap(), self.call.try_clone().unwrap());
        let start = move |vmm: &mut Frontend| {
            vmm.set_vring_num(0, size).unwrap();
            vmm.set_vring_base(0, base).unwrap();
            vmm.set_vring_addr(0, &config).unwrap();
            vmm.set_vring_call(0, &call).unwrap();
            vmm.set_vring_kick(0, &kick).unwrap();
            vmm.set_vring_enable(0, true).unwrap();
        };
        self.vmm(start).1
    }

    /// Offers a read at `head` to `addr`, and serves it.
    fn read(&mut self, head: u16, addr: u64) {
        self.guest.chain(head, &[(0x8000, 16, false), (addr, 512, true)]);
        self.guest.offer(head);
        let ring = self.connection.ring(0).unwrap();
        let chain = ring.pop().unwrap().unwrap();
        for piece in &chain.writable {
            // SAFETY: the piece is mapped for as long as the chain lives.
            unsafe { piece.base.write_bytes(0x5a, piece.len) };
        }
        ring.log_written(&chain, 512);
        ring.complete(chain.head, 512);
        ring.publish();
    }
}

#[test]
fn device_lives_from_handshake_to_stop() {
    let mut machine = Machine::new(Guest::new(8));
    let memory = machine.memory();
    machine.vmm(|vmm| vmm.set_mem_table(&[memory]).unwrap());
    let events = machine.start(0);
    let started = Event::RingStarted { queue: 0, base: 0, used: 0, marked: vec![], inflight_region: false };
    assert_eq!(events, [started]);
    machine.read(3, 0x9000);
    assert_eq!((machine.guest.used_idx(), machine.guest.used_entry(0)), (1, (3, 512)));
    assert_eq!(machine.guest.read::<2>(0x91ff), [0x5a, 0]);
    assert_eq!(machine.call.read().unwrap(), 1);
    let (base, events) = machine.vmm(|vmm| {
        vmm.set_vring_enable(0, false).unwrap();
        vmm.get_vring_base(0).unwrap()
    });
    assert_eq!(base, 1);
    assert_eq!(events, [Event::RingDisabled { queue: 0 }, Event::RingStopped { queue: 0, base: 1 }]);
}

#[test]
fn configuration_is_read_by_offset_and_size() {
    let mut machine = Machine::new(Guest::new(8));
    let get = |vmm: &mut Frontend, offset, size: usize| {
        vmm.get_config(offset, size as u32, VhostUserConfigFlags::empty(), &vec![0; size])
            .map(|(_, bytes)| bytes)
    };
    machine.vmm(|vmm| {
        assert_eq!(get(vmm, 0, 60).unwrap(), (0..60).collect::<Vec<u8>>());
        assert_eq!(get(vmm, 20, 4).unwrap(), [20, 21, 22, 23]);
        assert_eq!(get(vmm, 56, 8).unwrap(), [56, 57, 58, 59, 0, 0, 0, 0]);
        assert!(vmm.set_config(0, VhostUserConfigFlags::WRITABLE, &[1]).is_err());
    });
}

#[test]
fn inflight_region_comes_back_to_a_new_connection() {
    let mut machine = Machine::new(Guest::new(8));
    let memory = machine.memory();
    machine.vmm(|vmm| vmm.set_mem_table(&[memory]).unwrap());
    let ((inflight, file), events) = machine.vmm(|vmm| {
        let (inflight, file) = vmm.get_inflight_fd(&VhostUserInflight::new(0, 0, 4, 8)).unwrap();
        vmm.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
        (inflight, file)
    });
    assert_eq!(events, [Event::Quiesce { reset: false }]);
    machine.start(0);
    for head in [4, 1] {
        machine.guest.chain(head, &[(0x9000, 16, true)]);
        machine.guest.offer(head);
        let ring = machine.connection.ring(0).unwrap();
        ring.pop().unwrap().unwrap();
        ring.mark(head, 100 + u64::from(head));
    }
    let Machine { guest, .. } = machine;
    let mut machine = Machine::new(guest);
    let memory = machine.memory();
    machine.vmm(|vmm| {
        vmm.add_mem_region(&memory).unwrap();
        vmm.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
    });
    let marked = vec![Marked { head: 4, tag: 104 }, Marked { head: 1, tag: 101 }];
    let events = machine.start(0);
    assert_eq!(events, [Event::RingStarted { queue: 0, base: 0, used: 0, marked, inflight_region: true }]);
}

#[test]
fn dirty_log_is_kept_while_the_vmm_asks_for_it() {
    let mut machine = Machine::new(Guest::new(8));
    let memory = machine.memory();
    machine.vmm(|vmm| vmm.add_mem_region(&memory).unwrap());
    machine.start(0);
    let log: OwnedFd = memfd(64);
    let region =
        VhostUserDirtyLogRegion { mmap_size: 64, mmap_offset: 0, mmap_handle: log.as_fd().as_raw_fd() };
    let config = machine.ring_config(true);
    machine.vmm(|vmm| {
        vmm.set_log_base(0, Some(region)).unwrap();
        vmm.set_features(PROTOCOL | VERSION_1 | EVENT_IDX | INDIRECT | LOG_ALL).unwrap();
        vmm.set_vring_addr(0, &config).unwrap();
    });
    machine.read(2, 0x1_fff0);
    assert_eq!(dirty(&log, 64), [0x5, 0x1f, 0x20]);
    machine.vmm(|vmm| vmm.set_features(PROTOCOL | VERSION_1).unwrap());
    machine.read(2, 0x3_0000);
    assert_eq!(dirty(&log, 64), [0x5, 0x1f, 0x20]);
}

#[test]
fn memory_region_removed_under_a_chain_stays_mapped_for_it() {
    let mut machine = Machine::new(Guest::new(8));
    let memory = machine.memory();
    machine.vmm(|vmm| vmm.add_mem_region(&memory).unwrap());
    machine.start(0);
    machine.guest.chain(0, &[(0x9000, 16, true)]);
    machine.guest.offer(0);
    let chain = machine.connection.ring(0).unwrap().pop().unwrap().unwrap();
    machine.vmm(|vmm| vmm.remove_mem_region(&memory).unwrap());
    // SAFETY: the piece is mapped for as long as the chain lives; that is what is tested.
    unsafe { chain.writable[0].base.write_bytes(3, 16) };
    assert_eq!(machine.guest.read::<1>(0x900f), [3]);
}

#[test]
fn reset_is_acknowledged_after_the_device_is_quiet() {
    let mut machine = Machine::new(Guest::new(8));
    let memory = machine.memory();
    machine.vmm(|vmm| vmm.add_mem_region(&memory).unwrap());
    machine.start(0);
    let (_, events) = machine.vmm(|vmm| vmm.reset_device().unwrap());
    assert_eq!(events, [Event::RingStopped { queue: 0, base: 0 }, Event::Quiesce { reset: true }]);
}
