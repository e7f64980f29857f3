//! Two writes of one block: the older one is held up somewhere below, the newer one is issued meanwhile.
//!
//! A disk may do such writes in any order; but a migration must not turn them round by doing one of them twice, or
//! late. `older` begins the first, `newer` does the second, waits for both, and reads which of them is there.

use crate::console::quoted;
use crate::disk::open_direct;
use crate::load::Buffer;
use crate::pattern::BLOCK_BYTES;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// What the older write leaves in every byte.
const OLDER: u8 = 0x0d;
/// What the newer one leaves.
const NEWER: u8 = 0xe3;

/// The race for the last block of a disk, which is no load's.
pub(crate) struct Race {
    path: PathBuf,
    older: Option<JoinHandle<io::Result<()>>>,
}

impl Race {
    pub(crate) fn new(target: &str) -> Self {
        Self { path: target.into(), older: None }
    }

    /// Begins the older write, and does not wait for it.
    pub(crate) fn older(&mut self) -> String {
        let path = self.path.clone();
        self.older = Some(std::thread::spawn(move || write(&path, OLDER)));
        r#"{"older":"begun"}"#.to_owned()
    }

    /// Does the newer write, waits for the older one, and looks.
    pub(crate) fn newer(&mut self) -> String {
        let waited = self.older.as_ref().is_some_and(|older| !older.is_finished());
        let newer = write(&self.path, NEWER);
        let older = self.older.take().map_or(Ok(()), |older| {
            older.join().unwrap_or_else(|_| Err(io::Error::other("the older write panicked")))
        });
        match older.and(newer).and_then(|()| read(&self.path)) {
            Ok(found) => {
                let what = if found == NEWER { "newer" } else { "older" };
                format!(r#"{{"race":{{"found":"{what}","older_in_flight":{waited}}}}}"#)
            }
            Err(error) => format!(r#"{{"error":{{"what":{}}}}}"#, quoted(&error.to_string())),
        }
    }
}

fn last_block(path: &Path) -> io::Result<(std::fs::File, u64)> {
    let mut file = open_direct(path)?;
    let size = file.seek(SeekFrom::End(0))?;
    let at = size.checked_sub(BLOCK_BYTES as u64).ok_or(io::ErrorKind::InvalidInput)?;
    Ok((file, at))
}

fn write(path: &Path, byte: u8) -> io::Result<()> {
    let (file, at) = last_block(path)?;
    let mut buffer = Buffer::new();
    buffer.bytes().fill(byte);
    file.write_all_at(&buffer.bytes()[..BLOCK_BYTES], at)
}

/// The byte that the whole block holds; 0 if it is mixed.
fn read(path: &Path) -> io::Result<u8> {
    let (file, at) = last_block(path)?;
    let mut buffer = Buffer::new();
    let block = &mut buffer.bytes()[..BLOCK_BYTES];
    file.read_exact_at(block, at)?;
    let first = block[0];
    Ok(if block.iter().all(|byte| *byte == first) { first } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_write_is_found_and_an_older_one_that_comes_late_too() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let mut race = Race::new(file.path().to_str().unwrap());
        assert!(race.older().contains("begun"));
        while !race.older.as_ref().unwrap().is_finished() {
            std::thread::yield_now();
        }
        assert_eq!(race.newer(), r#"{"race":{"found":"newer","older_in_flight":false}}"#);
        write(file.path(), OLDER).unwrap();
        assert_eq!(read(file.path()).unwrap(), OLDER);
    }
}
