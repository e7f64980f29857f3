//! virtio-blk (virtio 1.2, section 5.2): what the guest is told, and what it asks for. No I/O.
//!
//! ```text
//!   chain:  readable │ header: u32 type, u32 0, u64 sector │ data to write, or segments │
//!           writable │ data to read                        │ u8 status                   │
//! ```
//! The guest may split it into descriptors as it likes (VIRTIO_F_ANY_LAYOUT is part of version 1).
#![allow(unsafe_code, reason = "the status byte is written to guest memory through its address")]

use std::any::Any;
use std::sync::Arc;

use belay_wire::device::BlockGeometry;
use smallvec::SmallVec;

use crate::op::{Buf, IoVec, OpKind, Status};

/// Bytes of a sector, the unit of virtio-blk's addresses whatever the block size.
pub const SECTOR_BYTES: u64 = 512;
/// Data segments of one request that the guest may use: with its own two descriptors this fits QEMU's rings.
pub const SEG_MAX: u32 = 126;
/// Bytes of one request that are executed. A guest is told no limit for the length of a segment (that would be one more
/// feature bit, and a guest that has it could not move to a build without); none sends as much on its own.
pub const MAX_DATA_BYTES: u64 = 64 << 20;
/// Sectors that one discard or write-zeroes may cover (2 GiB).
pub const MAX_RANGE_SECTORS: u32 = 1 << 22;
/// Bytes of the answer to GET_ID.
pub const ID_BYTES: usize = 20;
/// The status of a request that failed: VIRTIO_BLK_S_IOERR.
pub const STATUS_IO_ERROR: u8 = 1;
/// VIRTIO_BLK_F_FLUSH. A guest that does not take it relies on every write that was completed (5.2.6.2).
pub const FEATURE_FLUSH: u64 = 1 << 9;
/// Bytes of a request's header.
const HEADER_BYTES: usize = 16;
/// Bytes of a discard or write-zeroes segment.
const SEGMENT_BYTES: usize = 16;
/// Bytes of the configuration space up to `write_zeroes_may_unmap` and its padding.
const CONFIG_BYTES: usize = 60;

/// Feature bits (virtio 1.2, 5.2.3).
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = super::FEATURE_FLUSH;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// What the guest sees of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockConfig {
    /// Capacity in bytes.
    pub size_bytes: u64,
    /// Logical block size in bytes.
    pub block_bytes: u32,
    /// Queues.
    pub queues: u16,
    /// The longest queue.
    pub queue_entries: u16,
    /// Writes are refused.
    pub read_only: bool,
}

impl BlockConfig {
    /// A disk's configuration.
    #[must_use]
    pub fn of(geometry: &BlockGeometry) -> Self {
        Self {
            size_bytes: geometry.size_bytes,
            block_bytes: geometry.block_bytes,
            queues: geometry.queues,
            queue_entries: geometry.queue_entries,
            read_only: geometry.read_only,
        }
    }

    /// A new capacity, in bytes.
    pub fn set_size(&mut self, size_bytes: u64) {
        self.size_bytes = size_bytes;
    }
}

/// The feature bits to offer: the same on every host, whatever the backend there can do.
#[must_use]
pub fn features(config: &BlockConfig) -> u64 {
    let mut bits = feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH | feature::TOPOLOGY;
    if config.queues > 1 {
        bits |= feature::MQ;
    }
    if config.read_only { bits | feature::RO } else { bits | feature::DISCARD | feature::WRITE_ZEROES }
}

/// `struct virtio_blk_config` (virtio 1.2, 5.2.4).
#[must_use]
pub fn config_space(config: &BlockConfig) -> Vec<u8> {
    let mut space = vec![0u8; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(config.size_bytes / SECTOR_BYTES).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &config.block_bytes.to_le_bytes());
    // Topology: 4 KiB physical blocks, so that guests align to what files and disks of today like.
    let exponent = (4096 / config.block_bytes.max(512)).trailing_zeros() as u8;
    put(24, &[exponent, 0]);
    put(26, &1u16.to_le_bytes());
    put(28, &0u32.to_le_bytes());
    put(34, &config.queues.to_le_bytes());
    put(36, &MAX_RANGE_SECTORS.to_le_bytes());
    put(40, &1u32.to_le_bytes());
    put(44, &(config.block_bytes / SECTOR_BYTES as u32).to_le_bytes());
    put(48, &MAX_RANGE_SECTORS.to_le_bytes());
    put(52, &1u32.to_le_bytes());
    put(56, &[1]);
    space
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    size_bytes: u64,
    block_bytes: u64,
    read_only: bool,
}

impl Limits {
    /// The limits of a disk.
    #[must_use]
    pub fn of(config: &BlockConfig) -> Self {
        Self {
            size_bytes: config.size_bytes,
            block_bytes: u64::from(config.block_bytes),
            read_only: config.read_only,
        }
    }

    /// A range within the disk, of whole blocks.
    fn check(&self, offset: u64, len: u64) -> Result<(), StatusCode> {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.size_bytes);
        let whole = offset.is_multiple_of(self.block_bytes) && len.is_multiple_of(self.block_bytes);
        if fits && whole { Ok(()) } else { Err(StatusCode::IoError) }
    }
}

/// What the guest is answered (virtio 1.2, 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum StatusCode {
    Ok = 0,
    IoError = STATUS_IO_ERROR,
    Unsupported = 2,
}

/// Where a request's status byte is, and how much it can write before it.
#[derive(Clone, Copy, Debug)]
pub struct StatusByte {
    at: *mut u8,
    /// Writable bytes before the status byte.
    before: u32,
}

// SAFETY: an address in memory that the request's chain keeps mapped; it is written on the device's thread only.
unsafe impl Send for StatusByte {}

impl StatusByte {
    /// Writes the status of an operation. Returns how many bytes of the chain's writable part are written now, from
    /// its beginning: the used length.
    ///
    /// The chain that the request came from must still be held by the caller.
    #[must_use]
    pub fn complete(&self, status: Status, kind: OpKind, len: u64) -> u32 {
        let code = match status {
            Status::Ok => StatusCode::Ok,
            Status::Unsupported => StatusCode::Unsupported,
            Status::Failed { .. } => StatusCode::IoError,
        };
        self.write(code);
        // A failed read may have written anything; and the status byte lies behind the whole data.
        let data = if kind == OpKind::Read { u32::try_from(len).unwrap_or(self.before) } else { 0 };
        data.max(self.before) + 1
    }

    fn write(&self, code: StatusCode) {
        // SAFETY: `at` lies in a piece of the chain's writable part, which the caller holds mapped.
        unsafe { self.at.write_volatile(code as u8) };
    }
}

/// What the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// A block operation.
    Op(OpKind),
    /// The disk's serial.
    GetId,
}

/// A request, read out of its chain and checked.
#[derive(Debug)]
pub struct Request {
    /// What.
    pub kind: RequestKind,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub len: u64,
    /// The data's memory; empty for requests without.
    pub data: Buf,
    /// Where the answer goes.
    pub status: StatusByte,
}

impl Request {
    /// Answers GET_ID with this serial; returns the bytes written.
    #[must_use]
    pub fn answer_id(&self, serial: &str) -> u32 {
        let mut id = [0u8; ID_BYTES];
        let len = serial.len().min(ID_BYTES);
        id[..len].copy_from_slice(&serial.as_bytes()[..len]);
        let room = self.data.len().min(ID_BYTES);
        self.data.copy_from(0, &id[..room]);
        self.status.complete(Status::Ok, OpKind::Read, room as u64)
    }
}

/// A request that is answered without being executed. The status byte, if there is one, has been written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadRequest {
    written: u32,
}

impl BadRequest {
    /// Bytes of the chain's writable part that are written: 0 if there was no room for a status.
    #[must_use]
    pub fn written(&self) -> u32 {
        self.written
    }
}

type Pieces = SmallVec<[IoVec; 4]>;

/// Reads a request out of a chain's pieces; `keep` owns their memory.
///
/// # Errors
/// The request cannot be executed; it has been answered.
pub fn parse(
    readable: &[IoVec],
    writable: &[IoVec],
    keep: &Arc<dyn Any + Send + Sync>,
    limits: &Limits,
) -> Result<Request, BadRequest> {
    let total: usize = writable.iter().map(|piece| piece.len).sum();
    let Some(last) = writable.iter().rev().find(|piece| piece.len > 0) else {
        return Err(BadRequest { written: 0 });
    };
    let before = u32::try_from(total - 1).map_err(|_| BadRequest { written: 0 })?;
    // SAFETY: the last byte of a piece that is not empty.
    let status = StatusByte { at: unsafe { last.base.add(last.len - 1) }, before };
    let outgoing = Buf { pieces: Pieces::from_slice(readable), keep: Some(Arc::clone(keep)) };
    let incoming = Buf { pieces: Pieces::from_slice(writable), keep: Some(Arc::clone(keep)) };
    read(&outgoing, &incoming, total - 1, limits, status).map_err(|code| {
        status.write(code);
        BadRequest { written: before + 1 }
    })
}

fn read(
    outgoing: &Buf,
    incoming: &Buf,
    room: usize,
    limits: &Limits,
    status: StatusByte,
) -> Result<Request, StatusCode> {
    let out_len = outgoing.len();
    if out_len < HEADER_BYTES {
        return Err(StatusCode::IoError);
    }
    let mut header = [0u8; HEADER_BYTES];
    outgoing.copy_to(0, &mut header);
    let number = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let sector = u64::from_le_bytes([
        header[8], header[9], header[10], header[11], header[12], header[13], header[14], header[15],
    ]);
    let payload = outgoing.part(HEADER_BYTES, out_len - HEADER_BYTES);
    let request = |kind, offset, len, data| Ok(Request { kind, offset, len, data, status });
    match number {
        0 | 1 => {
            let write = number == 1;
            if write && limits.read_only {
                return Err(StatusCode::IoError);
            }
            let data = if write { payload } else { incoming.part(0, room) };
            let len = data.len() as u64;
            let offset = sector.checked_mul(SECTOR_BYTES).ok_or(StatusCode::IoError)?;
            if len == 0 || len > MAX_DATA_BYTES {
                return Err(StatusCode::IoError);
            }
            limits.check(offset, len)?;
            let kind = if write { OpKind::Write } else { OpKind::Read };
            request(RequestKind::Op(kind), offset, len, data)
        }
        4 => request(RequestKind::Op(OpKind::Flush), 0, 0, Buf::default()),
        8 => request(RequestKind::GetId, 0, ID_BYTES as u64, incoming.part(0, room)),
        11 | 13 => {
            let (kind, offset, len) = segment(number, &payload, limits)?;
            request(RequestKind::Op(kind), offset, len, Buf::default())
        }
        _ => Err(StatusCode::Unsupported),
    }
}

/// The one segment of a discard (11) or write-zeroes (13).
fn segment(number: u32, payload: &Buf, limits: &Limits) -> Result<(OpKind, u64, u64), StatusCode> {
    if limits.read_only || payload.len() != SEGMENT_BYTES {
        return Err(StatusCode::IoError);
    }
    let mut bytes = [0u8; SEGMENT_BYTES];
    payload.copy_to(0, &mut bytes);
    let sector =
        u64::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]]);
    let sectors = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
    let flags = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
    let unmap = flags & 1 != 0;
    // Unmap is defined for write-zeroes only; other bits are reserved (5.2.6.2).
    if flags & !1 != 0 || (number == 11 && unmap) {
        return Err(StatusCode::Unsupported);
    }
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(StatusCode::IoError)?;
    let len = u64::from(sectors) * SECTOR_BYTES;
    if len == 0 || sectors > MAX_RANGE_SECTORS {
        return Err(StatusCode::IoError);
    }
    limits.check(offset, len)?;
    let kind = if number == 11 { OpKind::Discard } else { OpKind::WriteZeroes { unmap } };
    Ok((kind, offset, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { size_bytes: 1 << 20, block_bytes: 512, read_only: false };

    struct Chain {
        memory: Buf,
        readable: usize,
        cuts: Vec<usize>,
    }

    impl Chain {
        fn new(number: u32, sector: u64, payload: &[u8], writable: usize) -> Self {
            let memory = Buf::aligned(HEADER_BYTES + payload.len() + writable, 16);
            memory.copy_from(0, &number.to_le_bytes());
            memory.copy_from(8, &sector.to_le_bytes());
            memory.copy_from(HEADER_BYTES, payload);
            Self { memory, readable: HEADER_BYTES + payload.len(), cuts: Vec::new() }
        }

        fn parse(&self, limits: &Limits) -> Result<Request, BadRequest> {
            let keep = self.memory.keep.clone().unwrap();
            let all = self.memory.len();
            let mut readable = Vec::new();
            let mut writable = Vec::new();
            let mut at = 0;
            for end in self.cuts.iter().copied().chain([self.readable, all]) {
                let list = if at < self.readable { &mut readable } else { &mut writable };
                list.extend(self.memory.part(at, end - at).pieces);
                at = end;
            }
            parse(&readable, &writable, &keep, limits)
        }

        fn status(&self) -> u8 {
            let mut byte = [0xee];
            self.memory.copy_to(self.memory.len() - 1, &mut byte);
            byte[0]
        }
    }

    #[test]
    fn read_split_anywhere_is_understood() {
        for cut in 1..HEADER_BYTES {
            let mut chain = Chain::new(0, 3, &[], 1025);
            chain.cuts = vec![cut];
            let request = chain.parse(&LIMITS).unwrap();
            assert_eq!(request.kind, RequestKind::Op(OpKind::Read));
            assert_eq!((request.offset, request.len, request.data.len()), (1536, 1024, 1024));
            assert_eq!(request.status.complete(Status::Ok, OpKind::Read, 1024), 1025);
            assert_eq!(chain.status(), 0);
        }
    }

    #[test]
    fn write_takes_the_readable_rest() {
        let chain = Chain::new(1, 0, &[7; 512], 1);
        let request = chain.parse(&LIMITS).unwrap();
        assert_eq!(request.kind, RequestKind::Op(OpKind::Write));
        assert_eq!(request.len, 512);
        assert_eq!(request.status.complete(Status::Failed { errno: 5 }, OpKind::Write, 512), 1);
        assert_eq!(chain.status(), 1);
    }

    #[test]
    fn ranges_outside_the_disk_or_of_part_blocks_are_io_errors() {
        let end = (1 << 20) / 512;
        for (sector, len) in
            [(end, 512), (end - 1, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 100), (0, 0)]
        {
            let chain = Chain::new(1, sector, &vec![0; len], 1);
            assert_eq!(chain.parse(&LIMITS).unwrap_err().written(), 1, "sector {sector}, {len} bytes");
            assert_eq!(chain.status(), 1);
        }
    }

    #[test]
    fn unknown_types_are_unsupported_and_missing_status_writes_nothing() {
        let chain = Chain::new(99, 0, &[], 1);
        assert_eq!(chain.parse(&LIMITS).unwrap_err().written(), 1);
        assert_eq!(chain.status(), 2);
        let keep = chain.memory.keep.clone().unwrap();
        assert_eq!(parse(&chain.memory.pieces, &[], &keep, &LIMITS).unwrap_err().written(), 0);
    }

    #[test]
    fn short_header_is_an_io_error() {
        let memory = Buf::aligned(16, 16);
        let keep = memory.keep.clone().unwrap();
        let (header, status) = (memory.part(0, 15).pieces, memory.part(15, 1).pieces);
        assert_eq!(parse(&header, &status, &keep, &LIMITS).unwrap_err().written(), 1);
    }

    #[test]
    fn discard_and_write_zeroes_take_one_segment() {
        let mut payload = [0u8; SEGMENT_BYTES];
        payload[0] = 8;
        payload[8] = 16;
        let request = Chain::new(11, 0, &payload, 1).parse(&LIMITS).unwrap();
        assert_eq!(
            (request.kind, request.offset, request.len),
            (RequestKind::Op(OpKind::Discard), 4096, 8192)
        );
        payload[12] = 1;
        let request = Chain::new(13, 0, &payload, 1).parse(&LIMITS).unwrap();
        assert_eq!(request.kind, RequestKind::Op(OpKind::WriteZeroes { unmap: true }));
        let chain = Chain::new(11, 0, &payload, 1);
        assert!(chain.parse(&LIMITS).is_err());
        assert_eq!(chain.status(), 2);
    }

    #[test]
    fn discards_and_write_zeroes_beyond_what_was_announced_are_refused() {
        let segment = |sector: u64, sectors: u32, flags: u32| {
            let mut payload = sector.to_le_bytes().to_vec();
            payload.extend(sectors.to_le_bytes());
            payload.extend(flags.to_le_bytes());
            payload
        };
        let large = Limits { size_bytes: 1 << 40, block_bytes: 4096, read_only: false };
        let most = MAX_RANGE_SECTORS;
        for (number, payload, limits, status) in [
            (11, segment(0, most, 0), large, None),
            (13, segment(0, most, 1), large, None),
            (11, segment(0, most + 8, 0), large, Some(1)),
            (13, segment(0, most + 8, 0), large, Some(1)),
            (13, segment(0, 0, 0), large, Some(1)),
            (13, segment(0, 4, 0), large, Some(1)),
            (13, segment(4, 8, 0), large, Some(1)),
            (13, segment(u64::MAX, 8, 0), large, Some(1)),
            (13, segment((1 << 20) / 512 - 1, 2, 0), LIMITS, Some(1)),
            (13, segment(0, 8, 2), large, Some(2)),
            (11, [segment(0, 8, 0), segment(8, 8, 0)].concat(), large, Some(1)),
            (11, segment(0, 8, 0)[..15].to_vec(), large, Some(1)),
            (13, Vec::new(), large, Some(1)),
        ] {
            let chain = Chain::new(number, 0, &payload, 1);
            let refused = chain.parse(&limits).is_err().then(|| chain.status());
            assert_eq!(refused, status, "type {number}, segments {payload:?}");
        }
    }

    #[test]
    fn request_of_more_than_is_executed_is_an_io_error() {
        let limits = Limits { size_bytes: 1 << 40, ..LIMITS };
        for (len, fits) in [(MAX_DATA_BYTES, true), (MAX_DATA_BYTES + 512, false)] {
            let chain = Chain::new(0, 0, &[], len as usize + 1);
            assert_eq!(chain.parse(&limits).is_ok(), fits, "{len}");
        }
    }

    #[test]
    fn large_blocks_are_announced_in_every_field_that_has_them() {
        let config = BlockConfig {
            size_bytes: 1 << 30,
            block_bytes: 4096,
            queues: 64,
            queue_entries: 256,
            read_only: false,
        };
        let space = config_space(&config);
        assert_eq!(space[0..8], (1u64 << 21).to_le_bytes(), "the capacity stays in sectors");
        assert_eq!(space[20..24], 4096u32.to_le_bytes());
        assert_eq!(space[24..28], [0, 0, 1, 0], "physical blocks are no larger; one is the best minimum");
        assert_eq!(space[34..36], 64u16.to_le_bytes());
        assert_eq!(space[44..48], 8u32.to_le_bytes(), "discards are aligned to blocks");
    }

    #[test]
    fn read_only_disk_refuses_changes_and_does_not_offer_them() {
        let limits = Limits { read_only: true, ..LIMITS };
        assert!(Chain::new(1, 0, &[0; 512], 1).parse(&limits).is_err());
        assert!(Chain::new(0, 0, &[], 513).parse(&limits).is_ok());
        let config = BlockConfig {
            size_bytes: 1 << 20,
            block_bytes: 512,
            queues: 1,
            queue_entries: 128,
            read_only: true,
        };
        assert_eq!(features(&config) & (feature::DISCARD | feature::RO), feature::RO);
    }

    #[test]
    fn serial_is_answered_cut_to_twenty_bytes() {
        let chain = Chain::new(8, 0, &[], 21);
        let request = chain.parse(&LIMITS).unwrap();
        assert_eq!(request.answer_id("0123456789abcdefghijXYZ"), 21);
        let mut id = [0u8; 20];
        chain.memory.copy_to(16, &mut id);
        assert_eq!(&id, b"0123456789abcdefghij");
    }

    #[test]
    fn configuration_space_keeps_its_layout() {
        let config = BlockConfig {
            size_bytes: 1 << 30,
            block_bytes: 512,
            queues: 4,
            queue_entries: 256,
            read_only: false,
        };
        let space = config_space(&config);
        let word = |at: usize| u32::from_le_bytes([space[at], space[at + 1], space[at + 2], space[at + 3]]);
        assert_eq!(space.len(), 60);
        assert_eq!(space[0..8], (1u64 << 21).to_le_bytes(), "capacity");
        assert_eq!(word(8), 0, "size_max is not offered");
        assert_eq!(word(12), 126, "seg_max");
        assert_eq!(word(20), 512, "blk_size");
        assert_eq!(space[24..28], [3, 0, 1, 0], "physical_block_exp, alignment_offset, min_io_size");
        assert_eq!(word(28), 0, "opt_io_size");
        assert_eq!(space[34..36], 4u16.to_le_bytes(), "num_queues");
        assert_eq!(word(36), 1 << 22, "max_discard_sectors");
        assert_eq!(word(40), 1, "max_discard_seg");
        assert_eq!(word(44), 1, "discard_sector_alignment");
        assert_eq!(word(48), 1 << 22, "max_write_zeroes_sectors");
        assert_eq!(word(52), 1, "max_write_zeroes_seg");
        assert_eq!(space[56], 1, "write_zeroes_may_unmap");
    }
}
