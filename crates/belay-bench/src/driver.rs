//! The guest's side: a virtio-blk driver in this process, from the `virtio-driver` crate, over vhost-user.
//!
//! It behaves as a guest's driver does: it sleeps until it is interrupted, takes everything that is done with
//! interrupts disabled, puts in new requests, notifies the device once if the device wants that, and looks again
//! before it sleeps. One thread drives all queues.
#![allow(unsafe_code, reason = "maps the memory that the device reads and writes, and names it in requests")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use memmap2::MmapMut;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf, VirtioFeatureFlags,
    VirtioTransport,
};

use crate::go_on;
use crate::job::{Job, Order, Outcome};
use crate::pattern::{Content, prepare};

/// Entries of a queue; a request takes three.
const QUEUE_SIZE: u16 = 128;
/// A device that completes nothing for so long is called dead.
const DEAD: Duration = Duration::from_secs(20);
/// How long the driver sleeps before it looks whether the run was interrupted.
const NAP_MS: i32 = 200;

/// A connected device.
struct Driver {
    // Dropped in this order: the queues lie in the transport's memory.
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    transport: Box<dyn VirtioTransport<VirtioBlkConfig, VirtioBlkReqBuf>>,
    memory: MmapMut,
    _memory_file: File,
}

/// A request in flight, or its place.
#[derive(Clone, Copy)]
struct Slot {
    offset: u64,
    since: Instant,
    busy: bool,
}

impl Driver {
    fn connect(socket: &Path, queues: usize, memory_bytes: usize) -> Result<Self> {
        let path = socket.to_str().context("a socket's path must be text")?;
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::FLUSH.bits()
            | VirtioBlkFeatureFlags::MQ.bits();
        let transport: VhostUser<VirtioBlkConfig, VirtioBlkReqBuf> =
            VhostUser::new(path, features).with_context(|| format!("cannot connect to {path}"))?;
        let mut transport: Box<dyn VirtioTransport<VirtioBlkConfig, VirtioBlkReqBuf>> = Box::new(transport);
        let queues = VirtioBlkQueue::setup_queues(&mut *transport, queues, QUEUE_SIZE)?;
        let file: File = memfd_create("belay-bench", MemfdFlags::CLOEXEC)?.into();
        file.set_len(memory_bytes as u64)?;
        // SAFETY: the memory file is this function's own; the device changes it only where a request of ours says.
        let mut memory = unsafe { MmapMut::map_mut(&file) }?;
        prepare(&mut memory);
        transport.map_mem_region(memory.as_ptr() as usize, memory_bytes, file.as_raw_fd(), 0)?;
        Ok(Self { queues, transport, memory, _memory_file: file })
    }

    /// Sleeps until the device interrupts on any queue.
    fn sleep(&self) -> Result<()> {
        let bells: Vec<_> =
            (0..self.queues.len()).map(|index| self.transport.get_completion_fd(index)).collect();
        let mut fds: Vec<PollFd<'_>> = bells.iter().map(|bell| PollFd::new(bell, PollFlags::IN)).collect();
        let nap = rustix::time::Timespec { tv_sec: 0, tv_nsec: i64::from(NAP_MS) * 1_000_000 };
        match poll(&mut fds, Some(&nap)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.revents().contains(PollFlags::IN)).collect();
        for (bell, ready) in bells.iter().zip(ready) {
            if ready {
                bell.read()?;
            }
        }
        Ok(())
    }
}

/// Chooses offsets.
struct Offsets {
    order: Order,
    bytes: u64,
    blocks: u64,
    next: u64,
}

impl Offsets {
    fn draw(&mut self) -> u64 {
        let block = match self.order {
            Order::Sequential => {
                self.next += 1;
                (self.next - 1) % self.blocks
            }
            Order::Random => {
                self.next ^= self.next << 13;
                self.next ^= self.next >> 7;
                self.next ^= self.next << 17;
                ((u128::from(self.next) * u128::from(self.blocks)) >> 64) as u64
            }
        };
        block * self.bytes
    }
}

/// One run of a load: the driver, its requests, and what was measured.
struct Run<'a> {
    driver: Driver,
    job: Job,
    content: &'a mut Content,
    offsets: Offsets,
    slots: Vec<Slot>,
    /// Check every byte of what is read.
    whole: bool,
    /// Requests that may still begin.
    left: u64,
    latency: Histogram<u64>,
    requests: u64,
}

impl<'a> Run<'a> {
    fn new(socket: &Path, job: Job, disk_bytes: u64, content: &'a mut Content) -> Result<Self> {
        let driver = Driver::connect(socket, job.queues, job.depth * job.bytes)?;
        let blocks = disk_bytes / job.bytes as u64;
        let seed = if job.order == Order::Sequential { 0 } else { 0x2545_f491_4f6c_dd1d };
        let idle = Slot { offset: 0, since: Instant::now(), busy: false };
        Ok(Self {
            driver,
            job,
            content,
            offsets: Offsets { order: job.order, bytes: job.bytes as u64, blocks, next: seed },
            slots: vec![idle; job.depth],
            whole: false,
            left: u64::MAX,
            latency: Histogram::new_with_bounds(1, 60_000_000_000, 3)?,
            requests: 0,
        })
    }

    fn submit(&mut self, slot: usize) -> Result<()> {
        let mut offset = self.offsets.draw();
        // Two writes of one block in flight would leave open which comes last.
        while self.job.write && self.slots.iter().any(|slot| slot.busy && slot.offset == offset) {
            offset = self.offsets.draw();
        }
        let range = slot * self.job.bytes..(slot + 1) * self.job.bytes;
        if self.job.write {
            self.content.stamp(&mut self.driver.memory[range.clone()], offset);
        }
        let queue_index = slot % self.job.queues;
        let buffer = &mut self.driver.memory[range];
        let queue = &mut self.driver.queues[queue_index];
        // SAFETY: the buffer is the slot's own part of the mapped memory, which lives as long as the device's
        // connection, and is not touched before the slot's completion.
        unsafe {
            if self.job.write {
                queue.write_raw(offset, buffer.as_ptr(), buffer.len(), slot)?;
            } else {
                queue.read_raw(offset, buffer.as_mut_ptr(), buffer.len(), slot)?;
            }
        }
        self.left -= 1;
        self.slots[slot] = Slot { offset, since: Instant::now(), busy: true };
        Ok(())
    }

    fn complete(&mut self, slot: usize, ret: i32, now: Instant) -> Result<()> {
        ensure!(ret == 0, "the device failed a request: {}", std::io::Error::from_raw_os_error(-ret));
        let done = &mut self.slots[slot];
        ensure!(done.busy, "the device completed a request twice");
        done.busy = false;
        let offset = done.offset;
        self.latency.saturating_record((now - done.since).as_nanos() as u64);
        self.requests += 1;
        if !self.job.write {
            let data = &self.driver.memory[slot * self.job.bytes..(slot + 1) * self.job.bytes];
            if self.whole {
                self.content.check_all(data, offset)?;
            } else {
                self.content.check_ends(data, offset)?;
            }
        }
        Ok(())
    }

    /// Takes what is done, and begins as many requests again. Returns how many were done.
    fn turn(&mut self, queue: usize) -> Result<usize> {
        let done: Vec<(usize, i32)> =
            self.driver.queues[queue].completions().map(|c| (c.context, c.ret)).collect();
        let count = done.len();
        let now = Instant::now();
        for (slot, ret) in done {
            self.complete(slot, ret, now)?;
            if self.left > 0 {
                self.submit(slot)?;
            }
        }
        if count > 0 {
            self.notify(queue)?;
        }
        Ok(count)
    }

    fn notify(&mut self, queue: usize) -> Result<()> {
        if self.driver.queues[queue].avail_notif_needed() {
            self.driver.transport.get_submission_notifier(queue).notify()?;
        }
        Ok(())
    }

    fn fill(&mut self) -> Result<()> {
        for slot in 0..self.slots.len() {
            if self.left > 0 {
                self.submit(slot)?;
            }
        }
        (0..self.job.queues).try_for_each(|queue| self.notify(queue))
    }

    /// Goes on until `end` says so. Requests stay in flight, unless none may begin.
    fn until(&mut self, end: impl Fn(&Self, Instant) -> bool) -> Result<()> {
        let mut last = Instant::now();
        loop {
            let mut done = 0;
            for queue in 0..self.job.queues {
                self.driver.queues[queue].set_used_notif_enabled(false);
                done += self.turn(queue)?;
            }
            let now = Instant::now();
            if end(self, now) {
                return Ok(());
            }
            if done > 0 {
                last = now;
                continue;
            }
            let mut more = false;
            for queue in &mut self.driver.queues {
                queue.set_used_notif_enabled(true);
                more |= queue.completions().has_next();
            }
            if !more {
                self.driver.sleep()?;
                go_on()?;
                if now - last > DEAD {
                    bail!("the device has completed nothing for {} seconds", DEAD.as_secs());
                }
            }
        }
    }

    /// Lets no request begin, and waits for those in flight.
    fn drain(&mut self) -> Result<()> {
        self.left = 0;
        self.until(|run, _| run.slots.iter().all(|slot| !slot.busy))
    }
}

/// Runs a load for `length` after a warm-up, over a connection of its own.
pub(crate) fn measure(
    socket: &Path,
    job: Job,
    disk_bytes: u64,
    content: &mut Content,
    warm_up: Duration,
    length: Duration,
) -> Result<Outcome> {
    let mut run = Run::new(socket, job, disk_bytes, content)?;
    run.fill()?;
    let warm = Instant::now() + warm_up;
    run.until(|_, now| now >= warm)?;
    run.latency.reset();
    run.requests = 0;
    let begin = Instant::now();
    run.until(|_, now| now >= begin + length)?;
    let took = begin.elapsed();
    let outcome = Outcome {
        requests: run.requests,
        bytes: run.requests * job.bytes as u64,
        took,
        p50: Duration::from_nanos(run.latency.value_at_quantile(0.5)),
    };
    run.drain()?;
    Ok(outcome)
}

/// Reads the whole disk and checks every byte.
pub(crate) fn verify(socket: &Path, disk_bytes: u64, content: &mut Content) -> Result<()> {
    let job = Job { order: Order::Sequential, write: false, bytes: 128 << 10, depth: 16, queues: 1 };
    let mut run = Run::new(socket, job, disk_bytes, content)?;
    run.whole = true;
    run.left = disk_bytes / job.bytes as u64;
    run.fill()?;
    run.until(|run, _| run.left == 0 && run.slots.iter().all(|slot| !slot.busy))
}
