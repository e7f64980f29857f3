//! The load on a raw disk: 4 KiB and 64 KiB reads and writes all over a region, past the page cache.

use crate::load::{Load, MAX_IO_BYTES, Worker};
use crate::pattern::{self, BLOCK_BYTES, Header};
use crate::stats::OpKind;
use crate::versions::Versions;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Blocks of a unit, which is also the long operation.
const UNIT_BLOCKS: usize = MAX_IO_BYTES / BLOCK_BYTES;

/// How often to look for a block that nobody writes.
const ATTEMPTS: usize = 8;

/// Which part of a disk is used, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// Where the region starts, bytes; a multiple of 64 KiB.
    pub offset_bytes: u64,
    /// Its size, bytes; rounded down to 64 KiB. At most what the disk has.
    pub region_bytes: u64,
    /// Reads among a hundred operations.
    pub read_percent: usize,
    /// Operations of 64 KiB among a hundred.
    pub large_percent: usize,
    /// Operations of a worker between two of its flushes; 0 for none.
    pub flush_every: u64,
}

impl Default for Mix {
    fn default() -> Self {
        Self {
            offset_bytes: 0,
            region_bytes: 64 << 20,
            read_percent: 50,
            large_percent: 10,
            flush_every: 200,
        }
    }
}

/// The load on a disk.
pub struct DiskLoad {
    path: PathBuf,
    file: File,
    mix: Mix,
    versions: Versions,
}

impl DiskLoad {
    /// Opens the disk (or a file). With `prepared`, every block of the region holds version 1 already.
    ///
    /// # Errors
    ///
    /// If it cannot be opened, or has not even one unit of 64 KiB.
    pub fn open(path: &Path, mix: Mix, prepared: bool) -> io::Result<Self> {
        let mut file = open_direct(path)?;
        let size = file.seek(SeekFrom::End(0))?;
        let bytes = mix.region_bytes.min(size.saturating_sub(mix.offset_bytes));
        let units = bytes as usize / MAX_IO_BYTES;
        if units == 0 || !mix.offset_bytes.is_multiple_of(MAX_IO_BYTES as u64) {
            let what = format!("{size} bytes are too few, or the offset is not a multiple of 64 KiB");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let versions = Versions::new(units * UNIT_BLOCKS, u32::from(prepared));
        Ok(Self { path: path.to_owned(), file, mix, versions })
    }

    fn position(&self, block: usize) -> u64 {
        self.mix.offset_bytes + (block * BLOCK_BYTES) as u64
    }

    /// Writes the next version of these blocks; false if one of them is being written, or may not be any more.
    fn write(&self, blocks: Range<usize>, worker: &mut Worker<'_>) -> bool {
        if !self.versions.begin(blocks.clone()) {
            return false;
        }
        let (writer, sequence) = (worker.id as u32, worker.sequence);
        for (block, bytes) in blocks.clone().zip(worker.buffer().chunks_exact_mut(BLOCK_BYTES)) {
            let version = self.versions.next(block);
            pattern::fill(bytes, Header { number: block as u64, version, writer, sequence });
        }
        let (position, len) = (self.position(blocks.start), blocks.len() * BLOCK_BYTES);
        let write = |bytes: &mut [u8]| self.file.write_all_at(bytes, position);
        if worker.timed(OpKind::Write, blocks.start as u64, len, write) {
            self.versions.acknowledge(blocks);
        }
        true
    }

    fn read(&self, blocks: Range<usize>, worker: &mut Worker<'_>) {
        let oldest: Vec<u32> = blocks.clone().map(|block| self.versions.oldest(block)).collect();
        let (position, len) = (self.position(blocks.start), blocks.len() * BLOCK_BYTES);
        let read = |bytes: &mut [u8]| self.file.read_exact_at(bytes, position);
        if !worker.timed(OpKind::Read, blocks.start as u64, len, read) {
            return;
        }
        for (index, block) in blocks.enumerate() {
            let newest = self.versions.newest(block);
            let bytes = &worker.buffer()[index * BLOCK_BYTES..][..BLOCK_BYTES];
            // Version 0 was never written: anything is right.
            if oldest[index] == 0 {
                continue;
            }
            if let Err(found) = pattern::check(bytes, block as u64, oldest[index], newest) {
                worker.mismatch(block as u64, oldest[index], newest, found);
            }
        }
    }

    fn flush(&self, worker: &mut Worker<'_>) {
        worker.timed(OpKind::Flush, 0, 0, |_| self.file.sync_data());
    }

    fn choose(&self, worker: &mut Worker<'_>) -> Range<usize> {
        if worker.chance(self.mix.large_percent) {
            let unit = worker.choose(self.units());
            return unit * UNIT_BLOCKS..(unit + 1) * UNIT_BLOCKS;
        }
        let block = worker.choose(self.versions.len());
        block..block + 1
    }
}

impl Load for DiskLoad {
    fn target(&self) -> String {
        self.path.display().to_string()
    }

    fn units(&self) -> usize {
        self.versions.len() / UNIT_BLOCKS
    }

    fn blocks(&self) -> usize {
        self.versions.len()
    }

    fn prepare(&self, unit: usize, worker: &mut Worker<'_>) {
        let _ = self.write(unit * UNIT_BLOCKS..(unit + 1) * UNIT_BLOCKS, worker);
    }

    fn step(&self, worker: &mut Worker<'_>) {
        if self.mix.flush_every > 0 && worker.sequence % self.mix.flush_every == self.mix.flush_every - 1 {
            return self.flush(worker);
        }
        if worker.chance(self.mix.read_percent) {
            let blocks = self.choose(worker);
            return self.read(blocks, worker);
        }
        for _ in 0..ATTEMPTS {
            let blocks = self.choose(worker);
            if self.write(blocks, worker) {
                return;
            }
        }
        // Everything is being written, or has failed before.
        let blocks = self.choose(worker);
        self.read(blocks, worker);
    }

    fn verify(&self, unit: usize, worker: &mut Worker<'_>) {
        self.read(unit * UNIT_BLOCKS..(unit + 1) * UNIT_BLOCKS, worker);
    }

    fn sync(&self, worker: &mut Worker<'_>) {
        self.flush(worker);
    }
}

/// Opens past the page cache, where the file system allows it.
pub(crate) fn open_direct(path: &Path) -> io::Result<File> {
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    let open = |flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
    match open(direct) {
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => open(0),
        result => result,
    }
}

/// Writes version 1 of every block of the region into an image, for a guest that runs with `prepared`.
///
/// # Errors
///
/// What the file said.
pub fn prepare_image(path: &Path, offset_bytes: u64, region_bytes: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
    let mut bytes = vec![0; MAX_IO_BYTES];
    for unit in 0..region_bytes / MAX_IO_BYTES as u64 {
        for (index, block) in bytes.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            let number = unit * UNIT_BLOCKS as u64 + index as u64;
            pattern::fill(block, Header { number, version: 1, writer: 0, sequence: 0 });
        }
        file.write_all_at(&bytes, offset_bytes + unit * MAX_IO_BYTES as u64)?;
    }
    file.sync_all()
}

/// Reads a region of an image without a guest: how many blocks there are, and how many of them are not a valid
/// block of their place, in whichever version.
///
/// # Errors
///
/// What the file said.
pub fn check_image(path: &Path, offset_bytes: u64, region_bytes: u64) -> io::Result<(u64, u64)> {
    let file = File::open(path)?;
    let mut bytes = vec![0; BLOCK_BYTES];
    let blocks = region_bytes / MAX_IO_BYTES as u64 * UNIT_BLOCKS as u64;
    let mut wrong = 0;
    for number in 0..blocks {
        file.read_exact_at(&mut bytes, offset_bytes + number * BLOCK_BYTES as u64)?;
        let version = pattern::header_of(&bytes).map_or(0, |header| header.version);
        wrong += u64::from(pattern::check(&bytes, number, version, version).is_err());
    }
    Ok((blocks, wrong))
}
