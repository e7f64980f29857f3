//! The load on a file system: files that are rewritten, replaced by rename, and read back past the page cache.
//!
//! Each file belongs to one worker, so every read must find exactly the version that was acknowledged last.

use crate::disk::open_direct;
use crate::load::{Load, MAX_IO_BYTES, Worker};
use crate::pattern::{self, BLOCK_BYTES, Header};
use crate::stats::OpKind;
use crate::versions::Versions;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Pieces of 64 KiB of a file.
const FILE_PIECES: usize = 4;
/// Blocks of a piece.
const PIECE_BLOCKS: usize = MAX_IO_BYTES / BLOCK_BYTES;
/// One rewrite of so many goes into a new file that replaces the old one.
const REPLACE_PERCENT: usize = 25;

/// The load on a directory of a file system.
pub struct FilesLoad {
    dir: PathBuf,
    threads: usize,
    versions: Versions,
}

impl FilesLoad {
    /// `files` files in `dir`, shared out among `threads` workers. With `prepared`, all exist in version 1.
    ///
    /// # Errors
    ///
    /// If `dir` is no directory, or there are fewer files than workers.
    pub fn open(dir: &Path, files: usize, threads: usize, prepared: bool) -> io::Result<Self> {
        if !std::fs::metadata(dir)?.is_dir() || files < threads {
            let what = "a directory, and at least one file per thread, are needed";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        Ok(Self { dir: dir.to_owned(), threads, versions: Versions::new(files, u32::from(prepared)) })
    }

    fn path(&self, file: usize) -> PathBuf {
        self.dir.join(format!("f{file:05}"))
    }

    fn number(file: usize, block: usize) -> u64 {
        (file as u64) << 32 | block as u64
    }

    /// Writes the next version of a file. It is acknowledged when it is durable.
    fn write(&self, file: usize, replace: bool, worker: &mut Worker<'_>) {
        if !self.versions.begin(file..file + 1) {
            return;
        }
        let path = self.path(file);
        let target = if replace { path.with_extension("new") } else { path.clone() };
        let opened = OpenOptions::new().write(true).create(true).truncate(replace).open(&target);
        let good = match opened {
            Ok(opened) => self.write_pieces(&opened, file, worker),
            Err(error) => worker.timed(OpKind::Write, file as u64, 0, |_| Err(error)),
        };
        let placed = good
            && (!replace
                || worker.timed(OpKind::Flush, file as u64, 0, |_| self.put_in_place(&target, &path)));
        if placed {
            self.versions.acknowledge(file..file + 1);
        }
    }

    fn write_pieces(&self, opened: &File, file: usize, worker: &mut Worker<'_>) -> bool {
        let version = self.versions.next(file);
        let (writer, sequence) = (worker.id as u32, worker.sequence);
        for piece in 0..FILE_PIECES {
            for (index, bytes) in worker.buffer().chunks_exact_mut(BLOCK_BYTES).enumerate() {
                let number = Self::number(file, piece * PIECE_BLOCKS + index);
                pattern::fill(bytes, Header { number, version, writer, sequence });
            }
            let position = (piece * MAX_IO_BYTES) as u64;
            let write = |bytes: &mut [u8]| opened.write_all_at(bytes, position);
            if !worker.timed(OpKind::Write, file as u64, MAX_IO_BYTES, write) {
                return false;
            }
        }
        worker.timed(OpKind::Flush, file as u64, 0, |_| opened.sync_all())
    }

    fn put_in_place(&self, new: &Path, path: &Path) -> io::Result<()> {
        std::fs::rename(new, path)?;
        File::open(&self.dir)?.sync_all()
    }

    fn read(&self, file: usize, worker: &mut Worker<'_>) {
        let (oldest, newest) = (self.versions.oldest(file), self.versions.newest(file));
        if oldest == 0 {
            return;
        }
        let opened = match open_direct(&self.path(file)) {
            Ok(opened) => opened,
            Err(error) => {
                worker.timed(OpKind::Read, file as u64, 0, |_| Err(error));
                return;
            }
        };
        for piece in 0..FILE_PIECES {
            let position = (piece * MAX_IO_BYTES) as u64;
            let read = |bytes: &mut [u8]| opened.read_exact_at(bytes, position);
            if !worker.timed(OpKind::Read, file as u64, MAX_IO_BYTES, read) {
                return;
            }
            for index in 0..PIECE_BLOCKS {
                let number = Self::number(file, piece * PIECE_BLOCKS + index);
                let bytes = &worker.buffer()[index * BLOCK_BYTES..][..BLOCK_BYTES];
                if let Err(found) = pattern::check(bytes, number, oldest, newest) {
                    worker.mismatch(number, oldest, newest, found);
                }
            }
        }
    }
}

impl Load for FilesLoad {
    fn target(&self) -> String {
        self.dir.display().to_string()
    }

    fn units(&self) -> usize {
        self.versions.len()
    }

    fn blocks(&self) -> usize {
        self.versions.len() * FILE_PIECES * PIECE_BLOCKS
    }

    fn prepare(&self, unit: usize, worker: &mut Worker<'_>) {
        self.write(unit, false, worker);
    }

    fn step(&self, worker: &mut Worker<'_>) {
        // The files of this worker are id, id + threads, id + 2 × threads, …
        let own = (self.versions.len() - worker.id).div_ceil(self.threads);
        let file = worker.id + worker.choose(own) * self.threads;
        if worker.chance(50) {
            self.read(file, worker);
        } else {
            let replace = worker.chance(REPLACE_PERCENT);
            self.write(file, replace, worker);
        }
    }

    fn verify(&self, unit: usize, worker: &mut Worker<'_>) {
        self.read(unit, worker);
    }

    fn sync(&self, worker: &mut Worker<'_>) {
        worker.timed(OpKind::Flush, 0, 0, |_| File::open(&self.dir)?.sync_all());
    }
}
