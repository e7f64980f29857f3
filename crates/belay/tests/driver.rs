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
const PATIENCE: Duration = Duration::from_secs(30);

type Queue = VirtioBlkQueue<'static, u32>;
type Transport = Box<dyn VirtioTransport<VirtioBlkConfig, VirtioBlkReqBuf>>;

/// Notifies the device, and waits until a request has ended well.
fn finish(transport: &mut Transport, queue: &mut Queue, request: u32) -> Result<()> {
    transport.get_submission_notifier(0).notify()?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(done) = queue.completions().next() {
            ensure!((done.context, done.ret) == (request, 0), "request {}: {}", done.context, done.ret);
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "request {request} does not end");
        std::thread::yield_now();
    }
}

fn write_and_read(socket: &Path) -> Result<()> {
    let features = VirtioFeatureFlags::VERSION_1.bits()
        | VirtioFeatureFlags::RING_EVENT_IDX.bits()
        | VirtioBlkFeatureFlags::FLUSH.bits();
    let path = socket.to_str().context("a socket's path must be text")?;
    let transport: VhostUser<VirtioBlkConfig, VirtioBlkReqBuf> = VhostUser::new(path, features)?;
    let mut transport: Transport = Box::new(transport);
    let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, 1, 16)?;
    let queue = queues.first_mut().context("a queue")?;
    let file: File = memfd_create("belay-test", MemfdFlags::CLOEXEC)?.into();
    file.set_len(2 * BLOCK as u64)?;
    // SAFETY: the memory file is this function's own; the device changes it only where a request says.
    let mut memory = unsafe { MmapMut::map_mut(&file) }?;
    transport.map_mem_region(memory.as_ptr() as usize, 2 * BLOCK, file.as_raw_fd(), 0)?;
    memory[..BLOCK].fill(0x5a);
    // SAFETY: the memory outlives the requests, which are waited for, and is not touched meanwhile.
    unsafe { queue.write_raw(8192, memory.as_ptr(), BLOCK, 1) }?;
    finish(&mut transport, queue, 1)?;
    queue.flush(2)?;
    finish(&mut transport, queue, 2)?;
    // SAFETY: as above.
    unsafe { queue.read_raw(8192, memory[BLOCK..].as_mut_ptr(), BLOCK, 3) }?;
    finish(&mut transport, queue, 3)?;
    ensure!(memory[BLOCK..].iter().all(|byte| *byte == 0x5a), "what was read is not what was written");
    Ok(())
}

#[test]
fn virtio_driver_is_served_if_memory_slots_are_offered() {
    let mut bed = Bed::start(Path::new(env!("CARGO_BIN_EXE_belay"))).expect("two hosts");
    let outcome = (|| {
        bed.a.configure("[data_plane]\nmemory_slots = true\n")?;
        bed.a.terminate_agent()?;
        bed.a.start_agent()?;
        let added = bed.a.json(&["device", "add", "d", "--driver", "memory", "--size", "1M"])?;
        write_and_read(Path::new(added["socket"].as_str().context("a socket")?))
    })();
    if let Err(error) = outcome {
        panic!("{error:#}\n{}", bed.logs());
    }
}
