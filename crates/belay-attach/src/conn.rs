//! A data connection: frames over TLS on a non-blocking socket, driven by the data-plane thread.
//!
//! The control plane dials, shakes hands and agrees on a version; then the socket and the TLS state come here.
//! Nothing here waits. Reading is a pull: [`DataConn::next`] gives a header, its reader says where the payload goes
//! ([`DataConn::deliver_to`], or nowhere in particular), and `next` goes on. Bulk data is decrypted and copied once,
//! to where it belongs.

use std::io::{self, BufRead, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Instant;

use belay_block::Buf;
use belay_wire::TxId;
use belay_wire::frame::{FrameError, HEADER_BYTES, Header};

/// Bytes taken from the socket with one system call. rustls alone reads 4 KiB at a time.
const RECEIVE_BYTES: usize = 256 << 10;
/// Plaintext that waits to be sent above which the connection is called congested.
const CONGESTED_BYTES: usize = 8 << 20;
/// Bytes of bulk data copied out of a guest at a time, on their way into TLS records: one record's, so that it is
/// still in the processor's nearest cache when it is encrypted.
const STAGING_BYTES: usize = 16 << 10;
/// Bytes of bulk data after which what is queued goes to the socket at once: the peer begins to decrypt while we go
/// on to encrypt.
const SEND_BYTES: usize = 128 << 10;

/// A socket with its TLS state, handshake done, as the control plane hands it over.
pub struct PeerSocket {
    /// The peer's host name, from its certificate.
    pub peer: String,
    /// The socket; made non-blocking here.
    pub socket: TcpStream,
    /// The TLS connection, either side's.
    pub tls: rustls::Connection,
    /// Plaintext that came before and is not read yet.
    pub early: Vec<u8>,
}

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnError {
    #[error("the peer closed the connection")]
    Closed,
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    #[error("TLS failed: {0}")]
    Tls(#[from] rustls::Error),
    #[error("the peer sent a malformed frame: {0}")]
    Frame(#[from] FrameError),
}

/// What [`DataConn::next`] found.
#[derive(Debug)]
pub(crate) enum Received {
    /// Nothing more for now.
    WouldBlock,
    /// A header; a payload follows. Say where it goes, then call `next` again.
    Header(Header),
    /// A whole frame. The payload is empty if there is none, or if it was delivered to a buffer.
    Frame(Header, Vec<u8>),
}

enum Reading {
    Header { bytes: [u8; HEADER_BYTES], got: usize },
    Payload { header: Header, target: Option<Buf>, collected: Vec<u8>, got: usize },
}

impl Reading {
    fn start() -> Self {
        Self::Header { bytes: [0; HEADER_BYTES], got: 0 }
    }
}

/// A connection to a peer's data plane.
pub(crate) struct DataConn {
    pub(crate) peer: String,
    socket: TcpStream,
    tls: rustls::Connection,
    early: Vec<u8>,
    early_at: usize,
    raw: Box<[u8]>,
    raw_at: usize,
    raw_end: usize,
    closed: bool,
    reading: Reading,
    staging: Box<[u8]>,
    /// Set while the socket does not take more: the thread polls for writability.
    pub(crate) blocked_on_write: bool,
    queued_bytes: usize,
    /// Bytes of bulk data queued since the last write.
    unsent_bytes: usize,
    /// Something was written since the last flush.
    wrote: bool,
    pub(crate) last_heard: Instant,
    pub(crate) last_sent: Instant,
    /// Bytes of payload received and sent, for the counters.
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
}

impl DataConn {
    pub(crate) fn new(peer: PeerSocket, now: Instant) -> io::Result<Self> {
        let PeerSocket { peer, socket, mut tls, early } = peer;
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        tls.set_buffer_limit(None);
        Ok(Self {
            peer,
            socket,
            tls,
            early,
            early_at: 0,
            raw: vec![0; RECEIVE_BYTES].into_boxed_slice(),
            raw_at: 0,
            raw_end: 0,
            closed: false,
            reading: Reading::start(),
            staging: vec![0; STAGING_BYTES].into_boxed_slice(),
            blocked_on_write: false,
            queued_bytes: 0,
            unsent_bytes: 0,
            wrote: false,
            last_heard: now,
            last_sent: now,
            bytes_in: 0,
            bytes_out: 0,
        })
    }

    pub(crate) fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Queues a frame. `payload` is small; bulk data goes through [`DataConn::send_buf`].
    pub(crate) fn send(&mut self, mut header: Header, payload: &[u8]) -> Result<(), ConnError> {
        header.payload_len = payload.len() as u32;
        self.tls.writer().write_all(&header.encode())?;
        self.tls.writer().write_all(payload)?;
        self.queued_bytes += HEADER_BYTES + payload.len();
        Ok(())
    }

    /// Queues a frame whose payload is all of `buf`.
    pub(crate) fn send_buf(&mut self, mut header: Header, buf: &Buf) -> Result<(), ConnError> {
        let len = buf.len();
        header.payload_len = len as u32;
        // Header and the data's beginning share a TLS record.
        self.staging[..HEADER_BYTES].copy_from_slice(&header.encode());
        let mut filled = HEADER_BYTES;
        let mut at = 0;
        loop {
            let take = (self.staging.len() - filled).min(len - at);
            buf.copy_to(at, &mut self.staging[filled..filled + take]);
            self.tls.writer().write_all(&self.staging[..filled + take])?;
            at += take;
            filled = 0;
            if at == len {
                break;
            }
        }
        self.bytes_out += len as u64;
        self.queued_bytes += HEADER_BYTES + len;
        self.unsent_bytes += len;
        if self.unsent_bytes >= SEND_BYTES && !self.blocked_on_write {
            self.write()?;
        }
        Ok(())
    }

    /// Whether so much waits to be sent that the peer should not be asked for more.
    pub(crate) fn congested(&self) -> bool {
        self.queued_bytes > CONGESTED_BYTES
    }

    /// Writes what is queued, as far as the socket takes it.
    pub(crate) fn flush(&mut self, now: Instant) -> Result<(), ConnError> {
        self.write()?;
        self.blocked_on_write = self.tls.wants_write();
        if std::mem::take(&mut self.wrote) {
            self.last_sent = now;
        }
        if !self.blocked_on_write {
            self.queued_bytes = 0;
        }
        Ok(())
    }

    /// Writes until the socket takes no more.
    fn write(&mut self) -> Result<(), ConnError> {
        self.unsent_bytes = 0;
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.socket) {
                Ok(0) => return Err(ConnError::Closed),
                Ok(_) => self.wrote = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The payload of the header just given goes into `buf`, which must be exactly as long.
    pub(crate) fn deliver_to(&mut self, buf: Buf) {
        if let Reading::Payload { header, target, got: 0, .. } = &mut self.reading {
            assert_eq!(buf.len(), header.payload_len as usize, "the caller checked the length");
            *target = Some(buf);
        }
    }

    /// What is still to come of a payload that was to go elsewhere goes into `buf`, and what has come already, too.
    pub(crate) fn divert(&mut self, txid: TxId, buf: &Buf) {
        if let Reading::Payload { header, target: Some(target), got, .. } = &mut self.reading
            && header.txid == txid
        {
            buf.copy_from_buf(0, &target.part(0, *got));
            *target = buf.clone();
        }
    }

    /// The next header or frame that has come.
    pub(crate) fn next(&mut self, now: Instant) -> Result<Received, ConnError> {
        loop {
            if let Some(received) = self.advance()? {
                return Ok(received);
            }
            if !self.receive(now)? {
                return if self.closed { Err(ConnError::Closed) } else { Ok(Received::WouldBlock) };
            }
        }
    }

    /// Goes on with the plaintext that is there. `None`: more is needed.
    fn advance(&mut self) -> Result<Option<Received>, ConnError> {
        match &mut self.reading {
            Reading::Header { bytes, got } => {
                let rest = &self.early[self.early_at..];
                let take = rest.len().min(HEADER_BYTES - *got);
                bytes[*got..*got + take].copy_from_slice(&rest[..take]);
                self.early_at += take;
                *got += take;
                *got += read_plain(&mut self.tls, &mut bytes[*got..])?;
                if *got < HEADER_BYTES {
                    return Ok(None);
                }
                let header = Header::decode(bytes)?;
                if header.payload_len == 0 {
                    self.reading = Reading::start();
                    return Ok(Some(Received::Frame(header, Vec::new())));
                }
                self.reading = Reading::Payload { header, target: None, collected: Vec::new(), got: 0 };
                Ok(Some(Received::Header(header)))
            }
            Reading::Payload { header, target, collected, got } => {
                let len = header.payload_len as usize;
                let rest = &self.early[self.early_at..];
                let take = rest.len().min(len - *got);
                match target {
                    Some(buf) => buf.copy_from(*got, &rest[..take]),
                    None => collected.extend_from_slice(&rest[..take]),
                }
                self.early_at += take;
                *got += take;
                while *got < len {
                    let mut reader = self.tls.reader();
                    let chunk = match reader.fill_buf() {
                        Ok(chunk) => chunk,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                        Err(error) => return Err(error.into()),
                    };
                    if chunk.is_empty() {
                        return Err(ConnError::Closed);
                    }
                    let take = chunk.len().min(len - *got);
                    match target {
                        Some(buf) => buf.copy_from(*got, &chunk[..take]),
                        None => collected.extend_from_slice(&chunk[..take]),
                    }
                    reader.consume(take);
                    *got += take;
                }
                self.bytes_in += len as u64;
                let frame = Received::Frame(*header, std::mem::take(collected));
                self.reading = Reading::start();
                Ok(Some(frame))
            }
        }
    }

    /// Gives rustls more ciphertext. `false`: the socket has none, or is closed.
    fn receive(&mut self, now: Instant) -> Result<bool, ConnError> {
        if self.raw_at == self.raw_end {
            self.raw_at = 0;
            self.raw_end = 0;
            match self.socket.read(&mut self.raw) {
                Ok(0) => {
                    self.closed = true;
                    return Ok(false);
                }
                Ok(count) => self.raw_end = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
                Err(error) => return Err(error.into()),
            }
            self.last_heard = now;
        }
        let mut rest = &self.raw[self.raw_at..self.raw_end];
        let before = rest.len();
        let taken = self.tls.read_tls(&mut rest)?;
        self.raw_at += before - rest.len();
        debug_assert!(taken > 0);
        self.tls.process_new_packets()?;
        Ok(true)
    }
}

impl Drop for DataConn {
    /// Ends the connection for the peer too: a poll that is still armed holds the socket open beyond this.
    fn drop(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

/// Reads what plaintext there is; 0 if none.
fn read_plain(tls: &mut rustls::Connection, out: &mut [u8]) -> Result<usize, ConnError> {
    if out.is_empty() {
        return Ok(0);
    }
    match tls.reader().read(out) {
        Ok(0) => Err(ConnError::Closed),
        Ok(count) => Ok(count),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(ConnError::Closed),
        Err(error) => Err(error.into()),
    }
}
