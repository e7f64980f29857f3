//! The frames of a control connection.
//!
//! ```text
//!   u32 length of all that follows │ u64 id │ u8 kind │ JSON          little-endian
//!   request 1: {"method": …, "body": …}   response 2: the result   error 3: {"code": …, "message": …}
//!   ping 4, pong 5: no JSON; the pong has the ping's id
//! ```

use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::time::timeout;

use crate::greeting::is_end;

/// The largest JSON of a frame, in bytes: far more than the answer of any call needs, and little enough to hold.
pub const MAX_BODY_BYTES: usize = 1 << 20;
const LENGTH_BYTES: usize = 4;
const ID_AND_KIND_BYTES: usize = 9;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Request = 1,
    Response = 2,
    Error = 3,
    Ping = 4,
    Pong = 5,
}

/// The JSON of a request.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RequestBody<M, B> {
    pub(crate) method: M,
    pub(crate) body: B,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) id: u64,
    /// The number of the kind, as it came: a peer may know more kinds than we.
    pub(crate) kind: u8,
    pub(crate) json: Vec<u8>,
}

impl Frame {
    pub(crate) fn is(&self, kind: Kind) -> bool {
        self.kind == kind as u8
    }
}

/// The bytes of a frame; `None` if the JSON is too large.
pub(crate) fn encode(kind: Kind, id: u64, json: &[u8]) -> Option<Vec<u8>> {
    if json.len() > MAX_BODY_BYTES {
        return None;
    }
    let length = u32::try_from(ID_AND_KIND_BYTES + json.len()).ok()?;
    let mut frame = Vec::with_capacity(LENGTH_BYTES + ID_AND_KIND_BYTES + json.len());
    frame.extend(length.to_le_bytes());
    frame.extend(id.to_le_bytes());
    frame.push(kind as u8);
    frame.extend(json);
    Some(frame)
}

/// Reads a frame; `None` if the peer closed between two frames.
///
/// # Errors
/// Not a frame, broken off, or not a single byte for `dead_after`. The connection can not be used any more; nor can
/// it after this was cancelled.
pub(crate) async fn read<R>(reader: &mut R, dead_after: Duration) -> io::Result<Option<Frame>>
where
    R: AsyncRead + Unpin,
{
    let mut head = [0; LENGTH_BYTES + ID_AND_KIND_BYTES];
    if !fill(reader, &mut head, dead_after).await? {
        return Ok(None);
    }
    let (length, id_and_kind) = head.split_at(LENGTH_BYTES);
    let length = length.iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
    let json_bytes = length.checked_sub(ID_AND_KIND_BYTES).filter(|bytes| *bytes <= MAX_BODY_BYTES);
    let json_bytes = json_bytes
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes")))?;
    let (id, kind) = id_and_kind.split_at(8);
    let id = id.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    let mut json = vec![0; json_bytes];
    if !fill(reader, &mut json, dead_after).await? {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(Frame { id, kind: kind[0], json }))
}

/// Fills the buffer; false if the peer closed before the first byte of it.
async fn fill<R: AsyncRead + Unpin>(
    reader: &mut R,
    buffer: &mut [u8],
    dead_after: Duration,
) -> io::Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        let read = timeout(dead_after, reader.read(&mut buffer[filled..])).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, format!("nothing was heard for {dead_after:?}"))
        })?;
        match read {
            Ok(0) if filled == 0 => return Ok(false),
            Err(error) if filled == 0 && is_end(&error) => return Ok(false),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
    }

    #[test]
    fn request_keeps_its_bytes() {
        let json = serde_json::to_vec(&RequestBody { method: "ping", body: 7 }).unwrap();
        let frame = encode(Kind::Request, 0x0102, &json).unwrap();
        let golden = b"\x23\0\0\0\x02\x01\0\0\0\0\0\0\x01{\"method\":\"ping\",\"body\":7}";
        assert_eq!(frame, golden);
        let read_back = run(read(&mut &frame[..], PATIENCE)).unwrap().unwrap();
        assert_eq!(read_back, Frame { id: 0x0102, kind: 1, json });
    }

    #[test]
    fn body_above_the_limit_is_refused_on_both_sides() {
        assert!(encode(Kind::Response, 1, &vec![b' '; MAX_BODY_BYTES]).is_some());
        assert!(encode(Kind::Response, 1, &vec![b' '; MAX_BODY_BYTES + 1]).is_none());
        let mut head = u32::MAX.to_le_bytes().to_vec();
        head.extend([0; ID_AND_KIND_BYTES]);
        assert!(run(read(&mut &head[..], PATIENCE)).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_frames_or_refused_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut rest = &bytes[..];
            run(async { while let Ok(Some(_)) = read(&mut rest, PATIENCE).await {} });
        }
    }
}
