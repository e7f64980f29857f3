//! The list of requests that are in flight when a device's rings have stopped.
//!
//! ```text
//!   u32 queues │ u32 requests │ queues × { u16 queue, u16 base, u32 0 }
//!              │ requests × { u16 queue, u16 head, u8 kind, u8 state, u16 0, u64 txid, u64 offset, u64 len }
//! ```

use crate::frame::{FrameError, u32_at, u64_at};
use crate::ids::{HeadIndex, QueueIndex, TxId};

/// What a listed request does. The numbers are wire format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RequestKind {
    /// Read.
    Read = 1,
    /// Write.
    Write = 2,
    /// Flush.
    Flush = 3,
    /// Discard.
    Discard = 4,
    /// Write zeroes.
    WriteZeroes = 5,
    /// A class's other requests (GET_ID, a USB transfer …).
    Other = 6,
}

/// Whether the device has the request already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RequestState {
    /// Not given to the device: the destination submits it.
    Held = 1,
    /// Given to the device: never submitted again, its completion comes by transaction id.
    Sent = 2,
}

/// One request in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListedRequest {
    /// Its queue.
    pub queue: QueueIndex,
    /// Its first descriptor.
    pub head: HeadIndex,
    /// What it does.
    pub kind: RequestKind,
    /// Whether the device has it.
    pub state: RequestState,
    /// Its number.
    pub txid: TxId,
    /// Byte offset on the device.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Where a stopped queue stands: the index that GET_VRING_BASE answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueBase {
    /// The queue.
    pub queue: QueueIndex,
    /// The next available-ring index it would have popped.
    pub base: u16,
}

/// The list, in the order in which the requests were submitted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InflightList {
    /// Queues that ran.
    pub queues: Vec<QueueBase>,
    /// Requests in flight.
    pub requests: Vec<ListedRequest>,
}

const FIXED_BYTES: usize = 8;
const QUEUE_BYTES: usize = 8;
const REQUEST_BYTES: usize = 32;
/// More queues than any device has.
const MAX_QUEUES: usize = 1024;

impl InflightList {
    /// The list's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(
            FIXED_BYTES + QUEUE_BYTES * self.queues.len() + REQUEST_BYTES * self.requests.len(),
        );
        out.extend((self.queues.len() as u32).to_le_bytes());
        out.extend((self.requests.len() as u32).to_le_bytes());
        for queue in &self.queues {
            out.extend(queue.queue.0.to_le_bytes());
            out.extend(queue.base.to_le_bytes());
            out.extend([0; 4]);
        }
        for request in &self.requests {
            out.extend(request.queue.0.to_le_bytes());
            out.extend(request.head.0.to_le_bytes());
            out.extend([request.kind as u8, request.state as u8, 0, 0]);
            out.extend(request.txid.0.to_le_bytes());
            out.extend(request.offset.to_le_bytes());
            out.extend(request.len.to_le_bytes());
        }
        out
    }

    /// Reads a list. Whether it fits the rings it speaks of is for the destination to check.
    ///
    /// # Errors
    /// Lengths that do not match, unknown kinds or states.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        if bytes.len() < FIXED_BYTES {
            return Err(FrameError::Payload("list shorter than its counts"));
        }
        let (queues, requests) = (u32_at(bytes, 0) as usize, u32_at(bytes, 4) as usize);
        let fits = queues <= MAX_QUEUES && requests <= bytes.len() / REQUEST_BYTES;
        if !fits || bytes.len() != FIXED_BYTES + queues * QUEUE_BYTES + requests * REQUEST_BYTES {
            return Err(FrameError::Payload("list length does not match its counts"));
        }
        let (queue_bytes, request_bytes) = bytes[FIXED_BYTES..].split_at(queues * QUEUE_BYTES);
        let queues = queue_bytes
            .chunks_exact(QUEUE_BYTES)
            .map(|b| QueueBase { queue: QueueIndex(u16_at(b, 0)), base: u16_at(b, 2) })
            .collect();
        let requests =
            request_bytes.chunks_exact(REQUEST_BYTES).map(decode_request).collect::<Result<_, _>>()?;
        Ok(Self { queues, requests })
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn decode_request(bytes: &[u8]) -> Result<ListedRequest, FrameError> {
    let kind = match bytes[4] {
        1 => RequestKind::Read,
        2 => RequestKind::Write,
        3 => RequestKind::Flush,
        4 => RequestKind::Discard,
        5 => RequestKind::WriteZeroes,
        6 => RequestKind::Other,
        _ => return Err(FrameError::Payload("unknown kind of request in the list")),
    };
    let state = match bytes[5] {
        1 => RequestState::Held,
        2 => RequestState::Sent,
        _ => return Err(FrameError::Payload("unknown state of a request in the list")),
    };
    Ok(ListedRequest {
        queue: QueueIndex(u16_at(bytes, 0)),
        head: HeadIndex(u16_at(bytes, 2)),
        kind,
        state,
        txid: TxId(u64_at(bytes, 8)),
        offset: u64_at(bytes, 16),
        len: u64_at(bytes, 24),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> InflightList {
        InflightList {
            queues: vec![QueueBase { queue: QueueIndex(1), base: 0xfffe }],
            requests: vec![ListedRequest {
                queue: QueueIndex(1),
                head: HeadIndex(3),
                kind: RequestKind::Write,
                state: RequestState::Sent,
                txid: TxId(0x11),
                offset: 0x200,
                len: 0x1000,
            }],
        }
    }

    #[test]
    fn list_of_version_1_keeps_its_bytes() {
        let golden: Vec<u8> = [
            &[1u8, 0, 0, 0, 1, 0, 0, 0][..],
            &[1, 0, 0xfe, 0xff, 0, 0, 0, 0],
            &[1, 0, 3, 0, 2, 2, 0, 0],
            &[0x11, 0, 0, 0, 0, 0, 0, 0],
            &[0, 2, 0, 0, 0, 0, 0, 0],
            &[0, 0x10, 0, 0, 0, 0, 0, 0],
        ]
        .concat();
        assert_eq!(sample().encode(), golden);
        assert_eq!(InflightList::decode(&golden), Ok(sample()));
    }

    #[test]
    fn truncated_list_is_refused() {
        let bytes = sample().encode();
        for len in 0..bytes.len() {
            assert!(InflightList::decode(&bytes[..len]).is_err(), "{len} bytes were accepted");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = InflightList::decode(&bytes);
        }
    }
}
