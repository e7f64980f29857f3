//! rust-vmm's vhost-user front-end as an independent VMM: it drives a device of a real agent.
#![allow(unsafe_code, reason = "borrows a descriptor that the crate only gives as a number")]

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use belay_e2e::{Bed, until};
use rustix::event::{EventfdFlags, PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{
    Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// Where the VMM says that it has the guest's memory: nobody looks.
const USER: u64 = 0x7f00_0000_0000;
const MEMORY: u64 = 1 << 20;
const RING: u16 = 16;
/// Where each ring's parts are, from its start; and where rings and buffers begin in the guest's memory.
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const RING_STRIDE: u64 = 0x4000;
const HEADER: u64 = 0x8_0000;
const STATUS: u64 = 0x8_0100;
const DATA: u64 = 0x9_0000;
const BLOCK: usize = 4096;
/// Descriptor flags.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Request types of virtio-blk.
const IN: u32 = 0;
const OUT: u32 = 1;
const LOG_ALL: u64 = 1 << 26;
const EVENT_IDX: u64 = 1 << 29;
const BACKEND_REQ: VhostUserProtocolFeatures = VhostUserProtocolFeatures::BACKEND_REQ;

fn failed(error: impl std::fmt::Debug) -> anyhow::Error {
    anyhow::anyhow!("{error:?}")
}

/// A VMM and its guest: the driver makes one request at a time on each queue.
struct Machine {
    frontend: Frontend,
    memory: File,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
    /// Requests made on each queue.
    made: Vec<u16>,
    features: u64,
    protocol: VhostUserProtocolFeatures,
}

impl Machine {
    /// Connects and negotiates everything but these protocol features; every message asks for a reply.
    fn connect(socket: &Path, queues: usize, without: VhostUserProtocolFeatures) -> Result<Self> {
        let mut frontend = Frontend::connect(socket, queues as u64).map_err(failed)?;
        frontend.set_owner().map_err(failed)?;
        let features = frontend.get_features().map_err(failed)?;
        let protocol = frontend.get_protocol_features().map_err(failed)? & !without;
        frontend.set_protocol_features(protocol).map_err(failed)?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        ensure!(frontend.get_queue_num().map_err(failed)? == queues as u64, "another number of queues");
        frontend.set_features(features & !LOG_ALL & !EVENT_IDX).map_err(failed)?;
        let memory: File = memfd_create("guest", MemfdFlags::CLOEXEC)?.into();
        memory.set_len(MEMORY)?;
        let events = || {
            (0..queues)
                .map(|_| EventFd::new(EventfdFlags::NONBLOCK.bits().cast_signed()))
                .collect::<std::io::Result<Vec<_>>>()
        };
        let (kicks, calls) = (events()?, events()?);
        Ok(Self { frontend, memory, kicks, calls, made: vec![0; queues], features, protocol })
    }

    /// Gives the device the memory and starts every ring where its last stop said.
    fn start(&mut self, bases: &[u16]) -> Result<()> {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.memory.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).map_err(failed)?;
        for (queue, base) in bases.iter().enumerate() {
            let ring = USER + queue as u64 * RING_STRIDE;
            let config = VringConfigData {
                queue_max_size: 256,
                queue_size: RING,
                flags: 0,
                desc_table_addr: ring,
                avail_ring_addr: ring + AVAILABLE,
                used_ring_addr: ring + USED,
                log_addr: None,
            };
            let frontend = &mut self.frontend;
            frontend.set_vring_num(queue, RING).map_err(failed)?;
            frontend.set_vring_base(queue, *base).map_err(failed)?;
            frontend.set_vring_addr(queue, &config).map_err(failed)?;
            frontend.set_vring_call(queue, &self.calls[queue]).map_err(failed)?;
            frontend.set_vring_kick(queue, &self.kicks[queue]).map_err(failed)?;
            frontend.set_vring_enable(queue, true).map_err(failed)?;
        }
        Ok(())
    }

    /// Stops every ring, and returns where each one goes on.
    fn stop(&mut self) -> Result<Vec<u16>> {
        let base = |queue| -> Result<u16> {
            self.frontend.set_vring_enable(queue, false).map_err(failed)?;
            Ok(u16::try_from(self.frontend.get_vring_base(queue).map_err(failed)?)?)
        };
        (0..self.made.len()).map(base).collect()
    }

    fn config(&mut self, offset: u32, size: u32) -> Result<Vec<u8>> {
        let empty = vec![0; size as usize];
        let flags = VhostUserConfigFlags::empty();
        Ok(self.frontend.get_config(offset, size, flags, &empty).map_err(failed)?.1)
    }

    /// The capacity that the device tells, in bytes.
    fn capacity(&mut self) -> Result<u64> {
        let sectors: [u8; 8] = self.config(0, 8)?.as_slice().try_into()?;
        Ok(u64::from_le_bytes(sectors) * 512)
    }

    fn index(&self, at: u64) -> Result<u16> {
        let mut bytes = [0; 2];
        self.memory.read_exact_at(&mut bytes, at)?;
        Ok(u16::from_le_bytes(bytes))
    }

    /// Reads or writes the block at `offset`, from or to [`DATA`], and returns its status.
    fn request(&mut self, queue: usize, number: u32, offset: u64) -> Result<u8> {
        let ring = queue as u64 * RING_STRIDE;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&number.to_le_bytes());
        header[8..].copy_from_slice(&(offset / 512).to_le_bytes());
        self.memory.write_all_at(&header, HEADER)?;
        self.memory.write_all_at(&[0xff], STATUS)?;
        let data = NEXT | if number == IN { WRITE } else { 0 };
        let chain = [(HEADER, 16, NEXT), (DATA, BLOCK as u32, data), (STATUS, 1, WRITE)];
        for (index, (at, len, flags)) in (0u16..).zip(chain) {
            let mut bytes = at.to_le_bytes().to_vec();
            bytes.extend(u32::to_le_bytes(len));
            bytes.extend(u16::to_le_bytes(flags));
            bytes.extend((index + 1).to_le_bytes());
            self.memory.write_all_at(&bytes, ring + 16 * u64::from(index))?;
        }
        let slot = u64::from(self.made[queue] % RING);
        self.memory.write_all_at(&[0, 0], ring + AVAILABLE + 4 + 2 * slot)?;
        self.made[queue] = self.made[queue].wrapping_add(1);
        self.memory.write_all_at(&self.made[queue].to_le_bytes(), ring + AVAILABLE + 2)?;
        self.kicks[queue].write(1)?;
        until(
            "a request that ends",
            || Ok((self.index(ring + USED + 2)? == self.made[queue]).then_some(())),
        )?;
        until("an interrupt", || Ok(self.calls[queue].read().ok()))?;
        let mut status = [0];
        self.memory.read_exact_at(&mut status, STATUS)?;
        Ok(status[0])
    }

    /// Writes a block and reads it again.
    fn write_and_read(&mut self, queue: usize, offset: u64, byte: u8) -> Result<()> {
        self.memory.write_all_at(&[byte; BLOCK], DATA)?;
        ensure!(self.request(queue, OUT, offset)? == 0, "the write at {offset} has failed");
        self.memory.write_all_at(&[!byte; BLOCK], DATA)?;
        self.reads(queue, offset, byte)
    }

    /// The block at `offset` is full of this.
    fn reads(&mut self, queue: usize, offset: u64, byte: u8) -> Result<()> {
        ensure!(self.request(queue, IN, offset)? == 0, "the read at {offset} has failed");
        let mut found = [0; BLOCK];
        self.memory.read_exact_at(&mut found, DATA)?;
        ensure!(found == [byte; BLOCK], "something else at {offset}");
        Ok(())
    }
}

fn with_disk(queues: &str, test: impl FnOnce(&Bed, &Path, &Path) -> Result<()>) {
    let bed = Bed::start(Path::new(env!("CARGO_BIN_EXE_belay"))).expect("two hosts");
    let outcome = (|| {
        let image = bed.a.images.join("d.img");
        let path = image.display().to_string();
        let added =
            bed.a.json(&["device", "add", "d", "--path", &path, "--size", "1M", "--queues", queues])?;
        test(&bed, &PathBuf::from(added["socket"].as_str().context("a socket")?), &image)
    })();
    if let Err(error) = outcome {
        panic!("{error:#}\n{}", bed.logs());
    }
}

#[test]
fn rust_vmms_frontend_drives_a_device_from_handshake_to_stop_and_again() {
    with_disk("2", |_, socket, image| {
        let mut machine = Machine::connect(socket, 2, VhostUserProtocolFeatures::empty())?;
        // Version 1, event index, indirect descriptors; flush, block size, topology, queues, discard, zeroes, segments.
        for bit in [32, 29, 28, 9, 6, 10, 12, 13, 14, 2] {
            ensure!(machine.features & 1 << bit != 0, "no feature {bit}");
        }
        let expected = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | BACKEND_REQ;
        ensure!(machine.protocol.contains(expected), "only {:?}", machine.protocol);
        ensure!(machine.capacity()? == 1 << 20, "another capacity");
        ensure!(machine.config(20, 4)? == 512u32.to_le_bytes(), "another block size");
        ensure!(machine.config(34, 2)? == 2u16.to_le_bytes(), "another number of queues");
        machine.start(&[0, 0])?;
        machine.write_and_read(0, 8192, 0x5a)?;
        machine.write_and_read(1, 0, 0x11)?;
        machine.reads(1, 8192, 0x5a)?;
        ensure!(machine.request(0, OUT, 1 << 20)? == 1, "a write behind the end was not refused");
        ensure!(machine.stop()? == [3, 3], "the rings have stopped elsewhere");
        machine.start(&[3, 3])?;
        machine.reads(0, 0, 0x11)?;
        ensure!(machine.stop()? == [4, 3], "the rings have stopped elsewhere");
        let mut on_disk = vec![0; 3 * BLOCK];
        File::open(image)?.read_exact_at(&mut on_disk, 0)?;
        ensure!(on_disk[..BLOCK] == [0x11; BLOCK] && on_disk[2 * BLOCK..] == [0x5a; BLOCK]);
        // Another VMM comes after it, and starts from nothing.
        drop(machine);
        let mut next = Machine::connect(socket, 2, VhostUserProtocolFeatures::empty())?;
        next.start(&[0, 0])?;
        next.reads(1, 8192, 0x5a)
    });
}

/// Counts what the device says on its own.
#[derive(Default)]
struct Heard(AtomicU32);

impl VhostUserFrontendReqHandler for Heard {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(0)
    }
}

/// Waits until the device says something: the crate's handler would wait for ever.
fn listen(handler: &mut FrontendReqHandler<Heard>) -> Result<()> {
    // SAFETY: the handler outlives this borrow of its descriptor.
    let channel = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) };
    let patience = rustix::time::Timespec { tv_sec: 30, tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(&channel, PollFlags::IN)], Some(&patience))?;
    ensure!(ready == 1, "the device does not say that its configuration has changed");
    handler.handle_request().map(drop).map_err(failed)
}

#[test]
fn grown_disk_is_told_to_the_running_vmm_which_uses_the_new_part() {
    with_disk("2", |bed, socket, image| {
        let mut machine = Machine::connect(socket, 2, VhostUserProtocolFeatures::empty())?;
        let heard = Arc::new(Heard::default());
        let mut handler = FrontendReqHandler::new(Arc::clone(&heard)).map_err(failed)?;
        machine.frontend.set_backend_request_fd(&handler.get_tx_raw_fd()).map_err(failed)?;
        machine.start(&[0, 0])?;
        machine.write_and_read(0, (1 << 20) - BLOCK as u64, 0x21)?;
        ensure!(machine.request(1, IN, 1 << 20)? == 1, "there is something behind the end");
        for (round, size) in [(1u8, "2M"), (2, "5M")] {
            let before = machine.capacity()?;
            bed.a.belay(&["device", "resize", "d", size])?;
            listen(&mut handler)?;
            ensure!(heard.0.load(Ordering::SeqCst) == u32::from(round), "not told once");
            let now = machine.capacity()?;
            ensure!(now == if round == 1 { 2 << 20 } else { 5 << 20 }, "capacity {now}");
            machine.reads(0, before, 0)?;
            machine.write_and_read(1, before, round)?;
            machine.write_and_read(0, now - BLOCK as u64, 0x40 | round)?;
            ensure!(machine.request(0, IN, now)? == 1, "there is something behind the new end");
            machine.reads(1, (1 << 20) - BLOCK as u64, 0x21)?;
        }
        ensure!(image.metadata()?.len() == 5 << 20, "the image is not as long");
        ensure!(bed.a.device("d")?["size_bytes"] == 5 << 20);
        Ok(())
    });
}

#[test]
fn grown_disk_is_found_by_a_vmm_that_has_no_channel_for_it() {
    with_disk("1", |bed, socket, _| {
        let mut machine = Machine::connect(socket, 1, BACKEND_REQ)?;
        machine.start(&[0])?;
        machine.write_and_read(0, 0, 0x21)?;
        bed.a.belay(&["device", "resize", "d", "2M"])?;
        ensure!(machine.capacity()? == 2 << 20, "another capacity");
        machine.write_and_read(0, (2 << 20) - BLOCK as u64, 0x22)?;
        machine.reads(0, 0, 0x21)
    });
}
