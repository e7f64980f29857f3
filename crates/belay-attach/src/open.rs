//! Reads the first frame of a peer's data connection, before it is known which device's thread gets it.

use std::io::{self, Read};
use std::time::{Duration, Instant};

use belay_wire::control::Open;
use belay_wire::{Epoch, FrameError, FrameKind, HEADER_BYTES, Header};

use crate::conn::PeerSocket;

/// The longest OPEN payload, in bytes.
const MAX_OPEN_BYTES: usize = 4096;

/// Why there is no OPEN.
#[derive(Debug, thiserror::Error)]
pub enum OpenFrameError {
    /// The connection failed, was closed, or nothing came in time.
    #[error("the peer's data connection failed before its OPEN: {0}")]
    Io(#[from] io::Error),
    /// What came is not an OPEN.
    #[error("the peer's data connection does not begin with OPEN: {0}")]
    Frame(#[from] FrameError),
}

/// Waits, at most `limit`, for a connection's OPEN; blocks the calling thread. What comes behind it stays for the
/// device's thread.
///
/// # Errors
/// See [`OpenFrameError`].
pub fn read_open(mut peer: PeerSocket, limit: Duration) -> Result<(PeerSocket, Open, Epoch), OpenFrameError> {
    let deadline = Instant::now() + limit;
    peer.socket.set_nonblocking(false)?;
    let mut bytes = std::mem::take(&mut peer.early);
    fill(&mut peer, &mut bytes, HEADER_BYTES, deadline)?;
    let mut first = [0; HEADER_BYTES];
    first.copy_from_slice(&bytes[..HEADER_BYTES]);
    let header = Header::decode(&first)?;
    let len = header.payload_len as usize;
    if header.kind != FrameKind::Open || len > MAX_OPEN_BYTES {
        return Err(FrameError::Payload("the first frame is not OPEN").into());
    }
    fill(&mut peer, &mut bytes, HEADER_BYTES + len, deadline)?;
    let open = serde_json::from_slice(&bytes[HEADER_BYTES..HEADER_BYTES + len])
        .map_err(|_| FrameError::Payload("OPEN's payload is not what it should be"))?;
    peer.early = bytes.split_off(HEADER_BYTES + len);
    peer.socket.set_read_timeout(None)?;
    peer.socket.set_nonblocking(true)?;
    Ok((peer, open, header.epoch))
}

/// Reads plaintext until `bytes` has at least `want`.
fn fill(peer: &mut PeerSocket, bytes: &mut Vec<u8>, want: usize, deadline: Instant) -> io::Result<()> {
    let mut chunk = [0; 4096];
    while bytes.len() < want {
        match peer.tls.reader().read(&mut chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                bytes.extend_from_slice(&chunk[..count]);
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        peer.socket.set_read_timeout(Some(left))?;
        if peer.tls.read_tls(&mut peer.socket)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        peer.tls.process_new_packets().map_err(io::Error::other)?;
    }
    Ok(())
}
