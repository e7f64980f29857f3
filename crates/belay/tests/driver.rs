//! A front-end that is neither QEMU nor ours: the `virtio-driver` crate, which insists on memory slots.
#![allow(unsafe_code, reason = "maps the memory that the device reads and writes, and names it in requests")]

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use belay_e2e::Bed;
use memmap2::MmapMut;
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf, VirtioFeatureFlags,
    VirtioTransport,
};

const BLOCK: usize = 4096;
const QUEUES: usize = 4;
const PATIENCE: Duration = Duration::from_secs(30);

type Queue = VirtioBlkQueue<'static, u32>;
type Transport = Box<dyn VirtioTransport<VirtioBlkConfig, VirtioBlkReqBuf>>;

/// Two blocks: what is written, and what is read.
const MEMORY: usize = 2 * BLOCK;

/// A connected device, and memory that it knows.
struct Driver {
    // Dropped in this order: the queues lie in the transport's memory.
    queues: Vec<Queue>,
    transport: Transport,
    memory: MmapMut,
    _file: File,
    next: u32,
}

impl Driver {
    fn connect(socket: &Path, queues: usize) -> Result<Self> {
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::FLUSH.bits()
            | VirtioBlkFeatureFlags::MQ.bits()
            | VirtioBlkFeatureFlags::DISCARD.bits()
            | VirtioBlkFeatureFlags::WRITE_ZEROES.bits();
        let path = socket.to_str().context("a socket's path must be text")?;
        let transport: VhostUser<VirtioBlkConfig, VirtioBlkReqBuf> = VhostUser::new(path, features)?;
        let mut transport: Transport = Box::new(transport);
        let taken = transport.get_features();
        ensure!(taken & features == features, "not all of the features {features:x} are offered: {taken:x}");
        let queues = VirtioBlkQueue::setup_queues(&mut *transport, queues, 16)?;
        let file: File = memfd_create("belay-test", MemfdFlags::CLOEXEC)?.into();
        file.set_len(MEMORY as u64)?;
        // SAFETY: the memory file is this function's own; the device changes it only where a request says.
        let memory = unsafe { MmapMut::map_mut(&file) }?;
        transport.map_mem_region(memory.as_ptr() as usize, MEMORY, file.as_raw_fd(), 0)?;
        Ok(Self { queues, transport, memory, _file: file, next: 0 })
    }

    /// Makes a request on a queue, and waits until it has ended well.
    fn finish(
        &mut self,
        queue: usize,
        request: impl FnOnce(&mut Queue, &mut MmapMut, u32) -> std::io::Result<()>,
    ) -> Result<()> {
        self.next += 1;
        let queue_of = self.queues.get_mut(queue).context("a queue")?;
        request(queue_of, &mut self.memory, self.next)?;
        self.transport.get_submission_notifier(queue).notify()?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(done) = queue_of.completions().next() {
                ensure!((done.context, done.ret) == (self.next, 0), "request {}: {}", done.context, done.ret);
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "request {} does not end", self.next);
            std::thread::yield_now();
        }
    }

    fn write(&mut self, queue: usize, offset: u64, byte: u8) -> Result<()> {
        self.memory[..BLOCK].fill(byte);
        // SAFETY: the memory outlives the request, which is waited for, and is not touched meanwhile.
        self.finish(queue, |queue, memory, id| unsafe { queue.write_raw(offset, memory.as_ptr(), BLOCK, id) })
    }

    /// The block at `offset` is full of this.
    fn reads(&mut self, queue: usize, offset: u64, byte: u8) -> Result<()> {
        self.memory[BLOCK..2 * BLOCK].fill(!byte);
        self.finish(queue, |queue, memory, id| {
            // SAFETY: as above.
            unsafe { queue.read_raw(offset, memory[BLOCK..].as_mut_ptr(), BLOCK, id) }
        })?;
        let found = &self.memory[BLOCK..2 * BLOCK];
        ensure!(found.iter().all(|found| *found == byte), "what was read at {offset} is not {byte}");
        Ok(())
    }
}

fn every_queue_reads_writes_and_forgets(socket: &Path) -> Result<()> {
    let mut driver = Driver::connect(socket, QUEUES)?;
    for queue in 0..QUEUES {
        let offset = (queue * 4 * BLOCK) as u64;
        let byte = 0x50 + queue as u8;
        for block in 0..4 {
            driver.write(queue, offset + block * BLOCK as u64, byte)?;
        }
        driver.finish(queue, |queue, _, id| queue.flush(id))?;
        // What one queue has written, another one reads.
        driver.reads((queue + 1) % QUEUES, offset, byte)?;
        let at = |block: u64| offset + block * BLOCK as u64;
        driver.finish(queue, |queue, _, id| queue.discard(at(1), BLOCK as u64, id))?;
        driver.finish(queue, |queue, _, id| queue.write_zeroes(at(2), BLOCK as u64, false, id))?;
        driver.finish(queue, |queue, _, id| queue.write_zeroes(at(3), BLOCK as u64, true, id))?;
        driver.reads(queue, at(0), byte)?;
        // A discard may leave anything to the driver; Belay's file and memory forget.
        for block in 1..4 {
            driver.reads(queue, at(block), 0)?;
        }
    }
    Ok(())
}

/// All queues have a request in flight at once; each ends once, with its own data.
fn queues_work_side_by_side(socket: &Path) -> Result<()> {
    let mut driver = Driver::connect(socket, QUEUES)?;
    driver.memory[..BLOCK].fill(0x77);
    for queue in 0..QUEUES {
        let base = driver.memory.as_ptr();
        for request in 0..4 {
            let offset = ((16 + queue * 4 + request) * BLOCK) as u64;
            // SAFETY: the memory outlives the requests, which are waited for, and is not touched meanwhile.
            unsafe { driver.queues[queue].write_raw(offset, base, BLOCK, request as u32) }?;
        }
        driver.transport.get_submission_notifier(queue).notify()?;
    }
    let deadline = Instant::now() + PATIENCE;
    let mut ended = vec![Vec::new(); QUEUES];
    while ended.iter().any(|ended| ended.len() < 4) {
        for (queue, ended) in driver.queues.iter_mut().zip(&mut ended) {
            for done in queue.completions() {
                ensure!(done.ret == 0, "request {}: {}", done.context, done.ret);
                ended.push(done.context);
            }
        }
        ensure!(Instant::now() < deadline, "only {ended:?} have ended");
        std::thread::yield_now();
    }
    for mut ended in ended {
        ended.sort_unstable();
        ensure!(ended == [0, 1, 2, 3], "{ended:?} have ended");
    }
    (0..QUEUES * 4).try_for_each(|block| driver.reads(block % QUEUES, ((16 + block) * BLOCK) as u64, 0x77))
}

/// The crate asks for CONFIGURE_MEM_SLOTS in its handshake (`required_vhost_features` in its transport) and has no way
/// without: there is nothing that could be tested but that it says so.
#[test]
fn virtio_driver_is_served_if_memory_slots_are_offered() {
    let mut bed = Bed::start(Path::new(env!("CARGO_BIN_EXE_belay"))).expect("two hosts");
    let outcome = (|| {
        let queues = QUEUES.to_string();
        let memory = ["--driver", "memory", "--size", "1M", "--queues", &queues];
        let added = bed.a.json(&[&["device", "add", "refused"], &memory[..]].concat())?;
        let socket = Path::new(added["socket"].as_str().context("a socket")?).to_owned();
        let refused = Driver::connect(&socket, QUEUES).err().context("served without memory slots")?;
        let words = "doesn't support required protocol features";
        ensure!(refused.to_string().contains(words), "{refused}");
        bed.a.configure("[data_plane]\nmemory_slots = true\n")?;
        bed.a.terminate_agent()?;
        bed.a.start_agent()?;
        let image = bed.a.images.join("file.img").display().to_string();
        let file = ["--path", &image, "--size", "1M", "--queues", &queues];
        for (name, backend) in [("memory", &memory[..]), ("file", &file[..])] {
            let added = bed.a.json(&[&["device", "add", name], backend].concat())?;
            let socket = Path::new(added["socket"].as_str().context("a socket")?).to_owned();
            every_queue_reads_writes_and_forgets(&socket).context(name)?;
            queues_work_side_by_side(&socket).context(name)?;
        }
        anyhow::Ok(())
    })();
    if let Err(error) = outcome {
        panic!("{error:#}\n{}", bed.logs());
    }
}
