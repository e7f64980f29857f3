//! Which blocks of a device are here, and the file that remembers it.
//!
//! ```text
//!   file:  "BELAYMAP" │ u32 version │ u32 block_bytes │ 16 bytes device id │ u64 blocks │ u64 checksum
//!          │ 16 bytes boot id │ words …
//! ```
//! Little-endian; a bit is set if the block's content is here; bit 0 of word 0 is block 0. The checksum is FNV-1a (64
//! bit) over everything else.
//!
//! A map holds for the boot of the host that it was written in. The guest writes again to blocks that are marked already,
//! and no flush follows; after a power loss such a write may be lost or torn here, while the old backing has it. A
//! process that dies loses nothing that it wrote to a file.

use belay_wire::DeviceId;

/// Bytes of a block.
pub const BLOCK_BYTES: u64 = 4096;
const MAGIC: &[u8; 8] = b"BELAYMAP";
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 64;

/// The boot of a host: a random number that its kernel draws when it starts (`/proc/sys/kernel/random/boot_id`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootId(pub [u8; 16]);

impl BootId {
    /// Reads the kernel's text: 32 hexadecimal digits, with dashes between some.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let digits: String = text.trim().chars().filter(|char| *char != '-').collect();
        let value = u128::from_str_radix(&digits, 16).ok()?;
        (digits.len() == 32).then_some(Self(value.to_be_bytes()))
    }
}

/// One bit per block: its content is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMap {
    words: Vec<u64>,
    blocks: u64,
    set: u64,
}

/// Why a map file is not used. The exchange then starts from nothing: no block is believed to be here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The bytes are not a map, or damaged.
    #[error("the exchange map is damaged: {0}")]
    Damaged(&'static str),
    /// It belongs to another device, or to another size of this one.
    #[error("the exchange map is of another device or size")]
    Foreign,
    /// The host was started anew since: writes that were not flushed may be lost.
    #[error("the host was started anew since the exchange map was written")]
    OtherBoot,
    /// A version that this build does not read.
    #[error("the exchange map has version {0}, this build reads {VERSION}")]
    Version(u32),
}

impl BlockMap {
    /// A map of a device of so many bytes, nothing here.
    #[must_use]
    pub fn empty(size_bytes: u64) -> Self {
        let blocks = size_bytes.div_ceil(BLOCK_BYTES);
        Self { words: vec![0; blocks.div_ceil(64) as usize], blocks, set: 0 }
    }

    /// Number of blocks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Blocks that are here.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.set
    }

    /// Whether every block is here.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.set == self.blocks
    }

    /// Whether a block is here.
    #[must_use]
    pub fn has(&self, block: u64) -> bool {
        block < self.blocks && self.words[(block / 64) as usize] >> (block % 64) & 1 == 1
    }

    /// Whether all of `from..to` is here.
    #[must_use]
    pub fn has_all(&self, from: u64, to: u64) -> bool {
        self.next_missing(from).is_none_or(|missing| missing >= to)
    }

    /// Notes that `from..to` is here; blocks beyond the end are ignored.
    pub fn set(&mut self, from: u64, to: u64) {
        for block in from..to.min(self.blocks) {
            let word = &mut self.words[(block / 64) as usize];
            let bit = 1 << (block % 64);
            if *word & bit == 0 {
                *word |= bit;
                self.set += 1;
            }
        }
    }

    /// The first block from `from` on that is not here.
    #[must_use]
    pub fn next_missing(&self, from: u64) -> Option<u64> {
        self.next(from, |word| !word)
    }

    /// The first block from `from` on that is here.
    #[must_use]
    pub fn next_present(&self, from: u64) -> Option<u64> {
        self.next(from, |word| word)
    }

    fn next(&self, from: u64, wanted: impl Fn(u64) -> u64) -> Option<u64> {
        let mut at = from;
        while at < self.blocks {
            let word = wanted(self.words[(at / 64) as usize]) >> (at % 64);
            if word != 0 {
                let found = at + u64::from(word.trailing_zeros());
                return (found < self.blocks).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// The runs of blocks within `from..to` that are not here.
    #[must_use]
    pub fn missing_runs(&self, from: u64, to: u64) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        let mut at = from;
        while let Some(start) = self.next_missing(at).filter(|start| *start < to) {
            let end = self.next_present(start).unwrap_or(self.blocks).min(to);
            runs.push((start, end));
            at = end;
        }
        runs
    }

    /// The file's bytes, as of this boot of the host.
    #[must_use]
    pub fn encode(&self, device: DeviceId, boot: BootId) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES + self.words.len() * 8);
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend((BLOCK_BYTES as u32).to_le_bytes());
        out.extend(device.0.as_bytes());
        out.extend(self.blocks.to_le_bytes());
        out.extend([0; 8]);
        out.extend(boot.0);
        for word in &self.words {
            out.extend(word.to_le_bytes());
        }
        let sum = checksum(&out);
        out[40..48].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// Reads a file's bytes.
    ///
    /// # Errors
    /// Damaged, of another version, device or size, or written before the host was started anew.
    pub fn decode(bytes: &[u8], device: DeviceId, size_bytes: u64, boot: BootId) -> Result<Self, MapError> {
        if bytes.len() < HEADER_BYTES || &bytes[..8] != MAGIC {
            return Err(MapError::Damaged("it is not a map"));
        }
        let version = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        if version != VERSION {
            return Err(MapError::Version(version));
        }
        let mut map = Self::empty(size_bytes);
        if bytes[16..32] != *device.0.as_bytes() || word_at(bytes, 32) != map.blocks {
            return Err(MapError::Foreign);
        }
        if bytes.len() != HEADER_BYTES + map.words.len() * 8 {
            return Err(MapError::Damaged("its length is wrong"));
        }
        let mut cleared = bytes.to_vec();
        cleared[40..48].fill(0);
        if word_at(bytes, 40) != checksum(&cleared) {
            return Err(MapError::Damaged("its checksum is wrong"));
        }
        if bytes[48..HEADER_BYTES] != boot.0 {
            return Err(MapError::OtherBoot);
        }
        for (index, word) in map.words.iter_mut().enumerate() {
            *word = word_at(bytes, HEADER_BYTES + index * 8);
        }
        map.set = map.words.iter().map(|word| u64::from(word.count_ones())).sum();
        if map.set > map.blocks {
            return Err(MapError::Damaged("it has blocks beyond its end"));
        }
        Ok(map)
    }
}

fn word_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> DeviceId {
        DeviceId("00112233-4455-6677-8899-aabbccddeeff".parse().unwrap())
    }

    const BOOT: BootId = BootId([7; 16]);

    #[test]
    fn map_of_an_earlier_boot_counts_as_empty() {
        let mut map = BlockMap::empty(70 * BLOCK_BYTES);
        map.set(0, 70);
        let bytes = map.encode(device(), BOOT);
        let other = BootId([8; 16]);
        assert_eq!(BlockMap::decode(&bytes, device(), 70 * BLOCK_BYTES, other), Err(MapError::OtherBoot));
    }

    #[test]
    fn boot_id_is_read_as_the_kernel_writes_it() {
        let text = "00010203-0405-0607-0809-0a0b0c0d0e0f\n";
        assert_eq!(BootId::parse(text), Some(BootId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15])));
        assert_eq!(BootId::parse("0001"), None);
        assert_eq!(BootId::parse(""), None);
        assert!(
            BootId::parse(&std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap()).is_some()
        );
    }

    #[test]
    fn map_file_of_version_2_keeps_its_bytes() {
        let mut map = BlockMap::empty(70 * BLOCK_BYTES);
        map.set(0, 2);
        map.set(69, 70);
        let bytes = map.encode(device(), BOOT);
        assert_eq!(bytes.len(), 80);
        assert_eq!(bytes[..16], *b"BELAYMAP\x02\0\0\0\0\x10\0\0");
        assert_eq!(bytes[32], 70);
        assert_eq!(bytes[48..64], BOOT.0);
        assert_eq!(bytes[64..], [3, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(BlockMap::decode(&bytes, device(), 70 * BLOCK_BYTES, BOOT), Ok(map));
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_noticed() {
        let mut map = BlockMap::empty(70 * BLOCK_BYTES);
        map.set(3, 5);
        let good = map.encode(device(), BOOT);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            // The block size field is informative; everything else decides.
            assert!(BlockMap::decode(&bad, device(), 70 * BLOCK_BYTES, BOOT).is_err(), "bit {bit}");
        }
        for len in 0..good.len() {
            assert!(BlockMap::decode(&good[..len], device(), 70 * BLOCK_BYTES, BOOT).is_err());
        }
        assert_eq!(BlockMap::decode(&good, device(), 71 * BLOCK_BYTES, BOOT), Err(MapError::Foreign));
    }

    #[test]
    fn missing_runs_are_exact_across_words() {
        let mut map = BlockMap::empty(200 * BLOCK_BYTES);
        map.set(60, 70);
        map.set(130, 200);
        assert_eq!(map.missing_runs(0, 200), [(0, 60), (70, 130)]);
        assert_eq!(map.missing_runs(61, 65), []);
        assert_eq!(map.missing_runs(65, 71), [(70, 71)]);
        assert!(map.has_all(130, 200));
        assert!(!map.has_all(129, 200));
        assert_eq!(map.count(), 80);
    }
}
