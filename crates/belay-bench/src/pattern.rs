//! What the disk holds: every sector says where it belongs and which write it is of.
//!
//! ```text
//!   sector:  number: u64 │ generation: u64 │ the same 496 bytes everywhere
//! ```
//!
//! A driver that only measured could be given wrong answers and be content: reads that are measured are checked at
//! their first and last sector, and the whole region is read and checked once per target and job that wrote.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use anyhow::{Result, ensure};

/// Bytes of a sector.
pub(crate) const SECTOR: usize = 512;
/// The unit in which writes are counted, in bytes.
pub(crate) const BLOCK: usize = 4096;
/// Bytes of a sector that differ from sector to sector.
const STAMP: usize = 16;

/// What every block of one target's disk should hold.
pub(crate) struct Content {
    generations: Vec<u64>,
}

/// The bytes of a sector behind its stamp.
fn body() -> [u8; SECTOR] {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = [0; SECTOR];
    for word in bytes.chunks_exact_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.copy_from_slice(&(state >> 7).to_le_bytes());
    }
    bytes
}

fn stamp(sector: &mut [u8], number: u64, generation: u64) {
    sector[..8].copy_from_slice(&number.to_le_bytes());
    sector[8..STAMP].copy_from_slice(&generation.to_le_bytes());
}

/// Fills a buffer with what all sectors have in common.
pub(crate) fn prepare(buffer: &mut [u8]) {
    let body = body();
    for sector in buffer.chunks_exact_mut(SECTOR) {
        sector.copy_from_slice(&body);
    }
}

impl Content {
    /// Writes the first generation into a file of `len` bytes, and makes it durable.
    pub(crate) fn create(file: &File, len: u64) -> io::Result<Self> {
        let mut content = Self { generations: vec![0; (len / BLOCK as u64) as usize] };
        let mut chunk = vec![0; 1 << 20];
        prepare(&mut chunk);
        for at in (0..len).step_by(chunk.len()) {
            let take = chunk.len().min((len - at) as usize);
            content.stamp(&mut chunk[..take], at);
            file.write_all_at(&chunk[..take], at)?;
        }
        file.sync_all()?;
        Ok(content)
    }

    /// Turns a prepared buffer into the next generation of the blocks at `offset`.
    pub(crate) fn stamp(&mut self, buffer: &mut [u8], offset: u64) {
        for (index, block) in buffer.chunks_exact_mut(BLOCK).enumerate() {
            let number = offset / BLOCK as u64 + index as u64;
            let generation = &mut self.generations[number as usize];
            *generation += 1;
            for (index, sector) in block.chunks_exact_mut(SECTOR).enumerate() {
                stamp(sector, number * (BLOCK / SECTOR) as u64 + index as u64, *generation);
            }
        }
    }

    /// Checks the stamps of the first and the last sector of what was read.
    pub(crate) fn check_ends(&self, buffer: &[u8], offset: u64) -> Result<()> {
        self.check_stamp(&buffer[..SECTOR], offset)?;
        let last = buffer.len() - SECTOR;
        self.check_stamp(&buffer[last..], offset + last as u64)
    }

    /// Checks every byte of what was read.
    pub(crate) fn check_all(&self, buffer: &[u8], offset: u64) -> Result<()> {
        let body = body();
        for (index, sector) in buffer.chunks_exact(SECTOR).enumerate() {
            let at = offset + (index * SECTOR) as u64;
            self.check_stamp(sector, at)?;
            ensure!(sector[STAMP..] == body[STAMP..], "wrong data in the sector at byte {at}");
        }
        Ok(())
    }

    fn check_stamp(&self, sector: &[u8], at: u64) -> Result<()> {
        let word = |from: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&sector[from..from + 8]);
            u64::from_le_bytes(bytes)
        };
        let expected = (at / SECTOR as u64, self.generations[(at / BLOCK as u64) as usize]);
        let found = (word(0), word(8));
        ensure!(
            found == expected,
            "wrong data at byte {at}: sector {} of write {}, expected sector {} of write {}",
            found.0,
            found.1,
            expected.0,
            expected.1
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content_and_buffer() -> (Content, Vec<u8>) {
        let mut content = Content { generations: vec![0; 4] };
        let mut buffer = vec![0; 2 * BLOCK];
        prepare(&mut buffer);
        content.stamp(&mut buffer, BLOCK as u64);
        (content, buffer)
    }

    #[test]
    fn stamped_buffer_passes_where_it_belongs() {
        let (content, buffer) = content_and_buffer();
        content.check_ends(&buffer, BLOCK as u64).unwrap();
        content.check_all(&buffer, BLOCK as u64).unwrap();
    }

    #[test]
    fn stale_misplaced_and_damaged_data_is_found() {
        let (mut content, mut buffer) = content_and_buffer();
        assert!(content.check_ends(&buffer, 0).is_err());
        buffer[BLOCK + 100] ^= 1;
        assert!(content.check_all(&buffer, BLOCK as u64).is_err());
        buffer[BLOCK + 100] ^= 1;
        let stale = buffer.clone();
        content.stamp(&mut buffer, BLOCK as u64);
        assert!(content.check_ends(&stale, BLOCK as u64).is_err());
    }
}
