//! Messages on the wire: takes them off the socket whole, with their descriptors, and puts replies on it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::error::ConnectionError;

/// Bytes of a message's header: request, flags, size of the payload.
const HEADER: usize = 12;
/// Longest payload that is accepted; the longest real one (SET_MEM_TABLE) has 1032 bytes.
const MAX_PAYLOAD: usize = 4096;
/// Most descriptors that come with a message: one for each region of SET_MEM_TABLE.
pub(crate) const MAX_FDS: usize = 32;
/// Protocol version, in the two lowest bits of the flags.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// A message of the VMM's.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) request: u32,
    /// The VMM wants to know how it went (counts only if REPLY_ACK is negotiated).
    pub(crate) need_reply: bool,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// The VMM's socket, and the message that is coming in.
pub(crate) struct Socket {
    stream: UnixStream,
    /// Header and payload, as far as they have come.
    bytes: Vec<u8>,
    have: usize,
    fds: Vec<OwnedFd>,
}

impl Socket {
    pub(crate) fn new(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, bytes: vec![0; HEADER], have: 0, fds: Vec::new() })
    }

    pub(crate) fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// The next message, if all of it has come.
    ///
    /// Exactly one header is read, then exactly its payload: a larger read would glue messages together and mix up
    /// whose descriptors are whose.
    pub(crate) fn receive(&mut self) -> Result<Option<Message>, ConnectionError> {
        loop {
            while self.have < self.bytes.len() {
                if !self.receive_some()? {
                    return Ok(None);
                }
            }
            let size = self.check_header()?;
            if self.bytes.len() == HEADER && size > 0 {
                self.bytes.resize(HEADER + size, 0);
                continue;
            }
            let payload = self.bytes.split_off(HEADER);
            let request = self.word(0);
            let need_reply = self.word(1) & NEED_REPLY != 0;
            self.have = 0;
            return Ok(Some(Message { request, need_reply, payload, fds: std::mem::take(&mut self.fds) }));
        }
    }

    fn word(&self, index: usize) -> u32 {
        let bytes = self.bytes.get(4 * index..4 * index + 4).and_then(|b| b.try_into().ok());
        u32::from_ne_bytes(bytes.unwrap_or_default())
    }

    fn check_header(&self) -> Result<usize, ConnectionError> {
        let (request, flags, size) = (self.word(0), self.word(1), self.word(2) as usize);
        if flags & VERSION_MASK != VERSION {
            let version = flags & VERSION_MASK;
            return Err(ConnectionError::Malformed(format!(
                "protocol version {version} in request {request}"
            )));
        }
        if flags & REPLY != 0 {
            return Err(ConnectionError::Malformed(format!(
                "a reply (of request {request}) where none is awaited"
            )));
        }
        if size > MAX_PAYLOAD {
            return Err(ConnectionError::Malformed(format!(
                "request {request} with {size} bytes of payload"
            )));
        }
        Ok(size)
    }

    /// Reads more of the current message. `false`: nothing has come.
    fn receive_some(&mut self) -> Result<bool, ConnectionError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut to = [IoSliceMut::new(&mut self.bytes[self.have..])];
        let received = match rustix::net::recvmsg(&self.stream, &mut to, &mut control, flags) {
            Ok(received) => received,
            Err(Errno::AGAIN) => return Ok(false),
            Err(Errno::INTR) => return Ok(true),
            Err(Errno::CONNRESET) => return Err(self.closed()),
            Err(error) => return Err(ConnectionError::Socket(error.into())),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_FDS {
            return Err(ConnectionError::Malformed(format!(
                "a message with more than {MAX_FDS} descriptors"
            )));
        }
        if received.bytes == 0 {
            return Err(self.closed());
        }
        self.have += received.bytes;
        Ok(true)
    }

    fn closed(&self) -> ConnectionError {
        match self.have {
            0 => ConnectionError::Closed,
            have => ConnectionError::Truncated { have, need: self.bytes.len() },
        }
    }

    /// Replies to `request`.
    pub(crate) fn reply(
        &self,
        request: u32,
        payload: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), ConnectionError> {
        match send(self.stream.as_fd(), request, VERSION | REPLY, payload, fd) {
            Ok(()) => Ok(()),
            Err(Errno::AGAIN) => Err(ConnectionError::NotReading),
            Err(Errno::PIPE | Errno::CONNRESET) => Err(ConnectionError::Closed),
            Err(error) => Err(ConnectionError::Socket(error.into())),
        }
    }
}

/// Sends a message of our own, which asks for no reply, on the channel that SET_BACKEND_REQ_FD gave.
pub(crate) fn notify(channel: BorrowedFd<'_>, request: u32) -> std::io::Result<()> {
    Ok(send(channel, request, VERSION, &[], None)?)
}

fn send(
    socket: BorrowedFd<'_>,
    request: u32,
    flags: u32,
    payload: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    for word in [request, flags, payload.len() as u32] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(payload);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds {
        let pushed = control.push(SendAncillaryMessage::ScmRights(fds));
        debug_assert!(pushed);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, flags) {
            // Messages are far smaller than a socket's buffer: a part of one means that the buffer is full.
            Ok(sent) if sent < bytes.len() => return Err(Errno::AGAIN),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}
