//! What a block holds.
//!
//! ```text
//!   0  magic u64 │ 8  number u64 │ 16  version u32 │ 20  writer u32 │ 24  sequence u64 │ 32  checksum u64
//!  40  filler: 507 words, each derived from number, version and its place
//! ```
//!
//! All little-endian. A block that is stale, misplaced, torn or foreign is told apart from every other one, sector
//! by sector.

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;

/// The unit that a disk writes as a whole, bytes.
pub const SECTOR_BYTES: usize = 512;

const MAGIC: u64 = u64::from_le_bytes(*b"BELAYBLK");
const HEADER_BYTES: usize = 40;

/// Who wrote a block, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The block's number, from the start of the region.
    pub number: u64,
    /// How often it has been written; the first is 1.
    pub version: u32,
    /// The worker that wrote it.
    pub writer: u32,
    /// That worker's count of operations.
    pub sequence: u64,
}

impl Header {
    fn checksum(&self) -> u64 {
        let first = mix(self.number ^ mix(u64::from(self.version) << 32 | u64::from(self.writer)));
        mix(first ^ self.sequence ^ MAGIC)
    }
}

/// Writes a block's whole content.
///
/// # Panics
///
/// If `block` has not [`BLOCK_BYTES`] bytes.
pub fn fill(block: &mut [u8], header: Header) {
    assert_eq!(block.len(), BLOCK_BYTES);
    block[0..8].copy_from_slice(&MAGIC.to_le_bytes());
    block[8..16].copy_from_slice(&header.number.to_le_bytes());
    block[16..20].copy_from_slice(&header.version.to_le_bytes());
    block[20..24].copy_from_slice(&header.writer.to_le_bytes());
    block[24..32].copy_from_slice(&header.sequence.to_le_bytes());
    block[32..40].copy_from_slice(&header.checksum().to_le_bytes());
    let seed = seed(header.number, header.version);
    for (index, word) in block.chunks_exact_mut(8).enumerate().skip(HEADER_BYTES / 8) {
        word.copy_from_slice(&filler(seed, index).to_le_bytes());
    }
}

/// What is wrong with a block that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The sector within the block that is wrong.
    pub sector: usize,
    /// The version that the block's header tells, if it has a valid header of this block.
    pub version: Option<u32>,
}

/// Checks that `block` is block `number` in a version between `oldest` and `newest`.
///
/// If these differ, the block was being written while it was read: then each sector may have another version.
///
/// # Errors
///
/// The first sector that is wrong.
pub fn check(block: &[u8], number: u64, oldest: u32, newest: u32) -> Result<Header, Mismatch> {
    let header = header_of(block).filter(|header| header.number == number);
    let Some(header) = header.filter(|header| (oldest..=newest).contains(&header.version)) else {
        return Err(Mismatch { sector: 0, version: header.map(|header| header.version) });
    };
    let own_seed = seed(number, header.version);
    for (sector, bytes) in block.chunks_exact(SECTOR_BYTES).enumerate() {
        let right = holds(bytes, sector, own_seed)
            || (sector > 0 && oldest != newest && any_version(bytes, sector, number, oldest, newest));
        if !right {
            return Err(Mismatch { sector, version: Some(header.version) });
        }
    }
    Ok(header)
}

/// The header of a block, if it is one of ours and its checksum is right.
#[must_use]
pub fn header_of(block: &[u8]) -> Option<Header> {
    let word = |at: usize| Some(u64::from_le_bytes(block.get(at..at + 8)?.try_into().ok()?));
    let pair = word(16)?;
    let header =
        Header { number: word(8)?, version: pair as u32, writer: (pair >> 32) as u32, sequence: word(24)? };
    (word(0)? == MAGIC && word(32)? == header.checksum()).then_some(header)
}

fn any_version(bytes: &[u8], sector: usize, number: u64, oldest: u32, newest: u32) -> bool {
    // Writes that overlap one read: a handful.
    (oldest..=newest).any(|version| holds(bytes, sector, seed(number, version)))
}

fn holds(bytes: &[u8], sector: usize, seed: u64) -> bool {
    let first = sector * (SECTOR_BYTES / 8);
    let skip = if sector == 0 { HEADER_BYTES / 8 } else { 0 };
    bytes
        .chunks_exact(8)
        .enumerate()
        .skip(skip)
        .all(|(index, word)| word == filler(seed, first + index).to_le_bytes())
}

fn seed(number: u64, version: u32) -> u64 {
    mix(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ mix(u64::from(version)))
}

fn filler(seed: u64, index: usize) -> u64 {
    mix(seed.wrapping_add((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// The finaliser of splitmix64: every input bit changes half of the output bits.
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(number: u64, version: u32) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES];
        fill(&mut block, Header { number, version, writer: 3, sequence: 99 });
        block
    }

    #[test]
    fn block_is_right_only_in_its_place_and_version() {
        let block = block(7, 4);
        assert_eq!(check(&block, 7, 4, 4), Ok(Header { number: 7, version: 4, writer: 3, sequence: 99 }));
        assert!(check(&block, 7, 3, 5).is_ok());
        assert_eq!(check(&block, 7, 5, 9), Err(Mismatch { sector: 0, version: Some(4) }));
        assert_eq!(check(&block, 7, 1, 3), Err(Mismatch { sector: 0, version: Some(4) }));
        assert_eq!(check(&block, 8, 4, 4), Err(Mismatch { sector: 0, version: None }));
    }

    #[test]
    fn any_changed_byte_is_found() {
        let good = block(7, 4);
        for at in (0..BLOCK_BYTES).step_by(13).chain([0, 8, 16, 20, 24, 32, 39, 40, 511, 512, 4095]) {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(check(&bad, 7, 4, 4).is_err(), "byte {at}");
            assert!(check(&bad, 7, 3, 5).is_err(), "byte {at}");
        }
    }

    #[test]
    fn torn_block_is_right_only_while_it_is_written() {
        let mut torn = block(7, 5);
        torn[1024..2048].copy_from_slice(&block(7, 4)[1024..2048]);
        assert!(check(&torn, 7, 4, 5).is_ok());
        assert_eq!(check(&torn, 7, 5, 5), Err(Mismatch { sector: 2, version: Some(5) }));
        assert_eq!(check(&torn, 7, 5, 6), Err(Mismatch { sector: 2, version: Some(5) }));
    }
}
