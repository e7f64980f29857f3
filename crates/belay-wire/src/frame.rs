//! The frame of a data connection: a fixed header, then a payload.
//!
//! ```text
//!  byte  0      4         5      6       8             12       16     24      32       40     48
//!       ┌──────┬─────────┬──────┬───────┬─────────────┬────────┬──────┬───────┬────────┬──────┬───────────┐
//!       │magic │ version │ kind │ flags │ payload_len │ status │ txid │ epoch │ offset │ len  │ payload … │
//!       │ u32  │   u8    │  u8  │  u16  │     u32     │  i32   │ u64  │  u64  │  u64   │ u64  │           │
//!       └──────┴─────────┴──────┴───────┴─────────────┴────────┴──────┴───────┴────────┴──────┴───────────┘
//! ```

use crate::ids::{Epoch, TxId};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 48;
/// First bytes of every frame: `BLYF`.
pub const MAGIC: u32 = u32::from_le_bytes(*b"BLYF");
/// The version of this layout and of the meaning of its kinds.
pub const FRAME_VERSION: u8 = 1;
/// The largest payload, in bytes: the largest guest request we let through (1 MiB segments × 4), and more than
/// any list of requests in flight (64 queues × 1024 entries × 40 bytes).
pub const MAX_PAYLOAD_BYTES: u32 = 4 << 20;

/// What a frame says. Direction and fields are given per kind; fields not named are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameKind {
    /// Client → server, first. `epoch`: the client's, `txid`: low-water mark of finished requests. Payload: JSON
    /// [`Open`](crate::control::Open).
    Open = 1,
    /// Server → client. `epoch`: the device's. `txid`: above every number that the server knows of the client's guest.
    /// Payload: JSON [`Opened`](crate::control::Opened).
    Opened = 2,
    /// Either. `status`: a [`Refusal`](crate::control::Refusal) code; payload: the reason as UTF-8. The
    /// connection ends.
    Refused = 3,
    /// Client → server: read `offset`, `len`; `txid`, `epoch`.
    Read = 4,
    /// Client → server: write the payload at `offset`.
    Write = 5,
    /// Client → server: flush.
    Flush = 6,
    /// Client → server: discard `offset`, `len`.
    Discard = 7,
    /// Client → server: write zeroes to `offset`, `len`; [`flags::UNMAP`].
    WriteZeroes = 8,
    /// Server → client: `txid` ended. `status`: 0, an errno (positive), or -1 for "unsupported". Payload: what was
    /// read; none, with [`flags::ZERO`], if all of it is zero. `len`: bytes read.
    Reply = 9,
    /// Client → server: every request below `txid` has ended at the client; the server may forget them.
    Ack = 10,
    /// Either: are you there? `txid`: any number.
    Ping = 11,
    /// Either: yes. `txid`: the ping's.
    Pong = 12,
    /// Attachment → successor: the rings have stopped. Payload: [`InflightList`](crate::InflightList). `txid`: which
    /// list this is. Sent by a client, it goes to the backing's host, which the guest comes home to.
    List = 13,
    /// Attachment → successor: the rings run again, forget the list. Sent by a client (`txid`: its newest list), the
    /// rings wait until the server has answered with the same.
    ListRevoked = 14,
    /// Successor → attachment: my rings have started; give me the device. `epoch`: the one it will have, `txid`:
    /// the list that the rings fit.
    Claim = 15,
    /// Attachment → successor: it is yours, durably. `epoch`: the new one.
    Grant = 16,
    /// Client → server: where is data in `offset`, `len`? Answered by [`FrameKind::Reply`] with pairs of u64
    /// (start, end) as payload.
    Extents = 17,
    /// Either: this connection ends by intention; do not dial again because of it.
    Bye = 18,
    /// Server → client: the device has left you, durably: its guest is at this host. `epoch`: the new one.
    Taken = 19,
}

impl FrameKind {
    /// The kind with this number.
    #[must_use]
    pub fn from_u8(number: u8) -> Option<Self> {
        use FrameKind::{
            Ack, Bye, Claim, Discard, Extents, Flush, Grant, List, ListRevoked, Open, Opened, Ping, Pong,
            Read, Refused, Reply, Taken, Write, WriteZeroes,
        };
        const ALL: [FrameKind; 19] = [
            Open,
            Opened,
            Refused,
            Read,
            Write,
            Flush,
            Discard,
            WriteZeroes,
            Reply,
            Ack,
            Ping,
            Pong,
            List,
            ListRevoked,
            Claim,
            Grant,
            Extents,
            Bye,
            Taken,
        ];
        ALL.get(usize::from(number).checked_sub(1)?).copied()
    }
}

/// Bits of [`Header::flags`].
pub mod flags {
    /// On `WriteZeroes`: the space may be given back.
    pub const UNMAP: u16 = 1;
    /// On `Reply`: all bytes read are zero, and not sent.
    pub const ZERO: u16 = 2;
    /// On requests: sent before, on an earlier connection.
    pub const REPEATED: u16 = 4;
}

/// A frame's header. Field meanings are given per [`FrameKind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame says.
    pub kind: FrameKind,
    /// [`flags`].
    pub flags: u16,
    /// Bytes that follow.
    pub payload_len: u32,
    /// Outcome.
    pub status: i32,
    /// The request.
    pub txid: TxId,
    /// The sender's idea of the device's epoch.
    pub epoch: Epoch,
    /// Byte offset on the device.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Why bytes are not a frame. The connection that brought them is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first four bytes are not ours.
    #[error("not a Belay frame (magic {0:#010x})")]
    Magic(u32),
    /// A version that was not agreed on.
    #[error("frame version {0}, this connection speaks {FRAME_VERSION}")]
    Version(u8),
    /// A kind that this version does not know.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// A payload above the limit.
    #[error("payload of {0} bytes, at most {MAX_PAYLOAD_BYTES} are allowed")]
    TooLong(u32),
    /// The payload does not hold what its kind promises.
    #[error("malformed payload: {0}")]
    Payload(&'static str),
}

impl Header {
    /// A header of this kind, everything else 0.
    #[must_use]
    pub fn new(kind: FrameKind) -> Self {
        Self { kind, flags: 0, payload_len: 0, status: 0, txid: TxId(0), epoch: Epoch(0), offset: 0, len: 0 }
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4] = FRAME_VERSION;
        out[5] = self.kind as u8;
        out[6..8].copy_from_slice(&self.flags.to_le_bytes());
        out[8..12].copy_from_slice(&self.payload_len.to_le_bytes());
        out[12..16].copy_from_slice(&self.status.to_le_bytes());
        out[16..24].copy_from_slice(&self.txid.0.to_le_bytes());
        out[24..32].copy_from_slice(&self.epoch.0.to_le_bytes());
        out[32..40].copy_from_slice(&self.offset.to_le_bytes());
        out[40..48].copy_from_slice(&self.len.to_le_bytes());
        out
    }

    /// Reads a header.
    ///
    /// # Errors
    /// The bytes are not a frame of this version, or its payload would be too long.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let magic = u32_at(bytes, 0);
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        if bytes[4] != FRAME_VERSION {
            return Err(FrameError::Version(bytes[4]));
        }
        let kind = FrameKind::from_u8(bytes[5]).ok_or(FrameError::Kind(bytes[5]))?;
        let payload_len = u32_at(bytes, 8);
        if payload_len > MAX_PAYLOAD_BYTES {
            return Err(FrameError::TooLong(payload_len));
        }
        Ok(Self {
            kind,
            flags: u16::from_le_bytes([bytes[6], bytes[7]]),
            payload_len,
            status: u32_at(bytes, 12) as i32,
            txid: TxId(u64_at(bytes, 16)),
            epoch: Epoch(u64_at(bytes, 24)),
            offset: u64_at(bytes, 32),
            len: u64_at(bytes, 40),
        })
    }
}

/// A header with its payload, for small frames. Bulk data is not copied into one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The header.
    pub header: Header,
    /// The payload; `header.payload_len` bytes.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame; sets the header's `payload_len`.
    #[must_use]
    pub fn new(mut header: Header, payload: Vec<u8>) -> Self {
        header.payload_len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        debug_assert!(header.payload_len <= MAX_PAYLOAD_BYTES);
        Self { header, payload }
    }
}

/// The little-endian u32 at `at`; the caller has checked the length.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The little-endian u64 at `at`; the caller has checked the length.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn header_of_version_1_keeps_its_bytes() {
        let header = Header {
            kind: FrameKind::Write,
            flags: 0x0201,
            payload_len: 0x0000_1000,
            status: -2,
            txid: TxId(0x0102_0304_0506_0708),
            epoch: Epoch(9),
            offset: 0x1_0000_0000,
            len: 4096,
        };
        let golden: [u8; HEADER_BYTES] = [
            b'B', b'L', b'Y', b'F', 1, 5, 1, 2, 0, 0x10, 0, 0, 0xfe, 0xff, 0xff, 0xff, 8, 7, 6, 5, 4, 3, 2,
            1, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(header.encode(), golden);
        assert_eq!(Header::decode(&golden), Ok(header));
    }

    #[test]
    fn every_kind_is_found_by_its_number() {
        for number in 1..=19 {
            assert_eq!(FrameKind::from_u8(number).map(|kind| kind as u8), Some(number));
        }
        assert_eq!(FrameKind::from_u8(0), None);
        assert_eq!(FrameKind::from_u8(20), None);
    }

    #[test]
    fn foreign_future_and_oversized_headers_are_refused() {
        let good = Header::new(FrameKind::Flush).encode();
        let mut bad = good;
        bad[0] = 0;
        assert!(matches!(Header::decode(&bad), Err(FrameError::Magic(_))));
        bad = good;
        bad[4] = 2;
        assert_eq!(Header::decode(&bad), Err(FrameError::Version(2)));
        bad = good;
        bad[5] = 200;
        assert_eq!(Header::decode(&bad), Err(FrameError::Kind(200)));
        bad = good;
        bad[11] = 0xff;
        assert!(matches!(Header::decode(&bad), Err(FrameError::TooLong(_))));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic_and_accepted_ones_encode_back(mut bytes: [u8; 32], tail: [u8; 16], ours: bool) {
            if ours {
                bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
                bytes[4] = FRAME_VERSION;
                bytes[5] %= 20;
            }
            let mut all = [0; HEADER_BYTES];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&tail);
            if let Ok(header) = Header::decode(&all) {
                prop_assert_eq!(header.encode(), all);
            }
        }
    }
}
