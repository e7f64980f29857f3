//! Connections that carry a VM's memory between VMMs, which so need neither keys nor an open port of their own.
//!
//! ```text
//!   client → server:   u16 length │ the VM's name
//!   server → client:   u16 length │ why not; empty: go on
//!   then the VMMs' bytes, both ways, until both have ended theirs
//! ```

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional_with_sizes};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsStream;

use crate::name::HostName;

/// The longest name or reason, in bytes.
const MAX_TEXT_BYTES: usize = 1024;
/// Bytes that are moved at a time.
const CHUNK_BYTES: usize = 256 << 10;
/// A peer whose kernel takes nothing for so long is gone: the VMM is told, and gives the migration up.
const DEAD_AFTER: Duration = Duration::from_secs(30);
/// How often the peer's kernel is asked when there is nothing to send.
const PROBE_EVERY: Duration = Duration::from_secs(3);

/// A peer that wants to bring a VM's memory. Dropped without an answer, it is turned away.
#[derive(Debug)]
pub struct MemoryCall {
    /// The host, as its certificate says.
    pub peer: HostName,
    /// The VM's name, as the peer says.
    pub vm: String,
    pub(crate) stream: Box<TlsStream<TcpStream>>,
}

impl MemoryCall {
    /// Lets it in.
    ///
    /// # Errors
    /// The connection is lost.
    pub async fn accept(mut self) -> io::Result<MemoryStream> {
        write_text(&mut self.stream, "").await?;
        Ok(MemoryStream { stream: self.stream })
    }

    /// Turns it away, with the reason.
    ///
    /// # Errors
    /// The connection is lost.
    pub async fn refuse(mut self, reason: &str) -> io::Result<()> {
        write_text(&mut self.stream, if reason.is_empty() { "refused" } else { reason }).await?;
        self.stream.shutdown().await
    }
}

/// A connection that carries a VM's memory.
#[derive(Debug)]
pub struct MemoryStream {
    stream: Box<TlsStream<TcpStream>>,
}

impl MemoryStream {
    /// Carries bytes between the peer and `vmm`, one end of a pair of Unix sockets whose other end the VMM has.
    /// Each side's end of sending is passed on. Returns the bytes to the peer and from it.
    ///
    /// # Errors
    /// One of the two connections was lost: both are closed.
    pub async fn carry(mut self, vmm: OwnedFd) -> io::Result<(u64, u64)> {
        let socket = std::os::unix::net::UnixStream::from(vmm);
        socket.set_nonblocking(true)?;
        let mut vmm = UnixStream::from_std(socket)?;
        copy_bidirectional_with_sizes(&mut vmm, &mut self.stream, CHUNK_BYTES, CHUNK_BYTES).await
    }
}

/// The client's part: what for, and the peer's answer.
pub(crate) async fn call(stream: TlsStream<TcpStream>, vm: &str) -> io::Result<Result<MemoryStream, String>> {
    let mut stream = watched(stream)?;
    write_text(&mut stream, vm).await?;
    let refusal = read_text(&mut stream).await?;
    Ok(if refusal.is_empty() { Ok(MemoryStream { stream }) } else { Err(refusal) })
}

/// The server's part.
pub(crate) async fn read_call(
    stream: TlsStream<TcpStream>,
) -> io::Result<(String, Box<TlsStream<TcpStream>>)> {
    let mut stream = watched(stream)?;
    let vm = read_text(&mut stream).await?;
    Ok((vm, stream))
}

/// Nothing here pings: the kernel finds out that the peer is gone.
fn watched(stream: TlsStream<TcpStream>) -> io::Result<Box<TlsStream<TcpStream>>> {
    let socket = stream.get_ref().0.as_fd();
    sockopt::set_tcp_user_timeout(socket, DEAD_AFTER.as_millis() as u32)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, PROBE_EVERY)?;
    sockopt::set_tcp_keepintvl(socket, PROBE_EVERY)?;
    Ok(Box::new(stream))
}

async fn write_text(stream: &mut TlsStream<TcpStream>, text: &str) -> io::Result<()> {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut bytes = (end as u16).to_le_bytes().to_vec();
    bytes.extend(&text.as_bytes()[..end]);
    stream.write_all(&bytes).await?;
    stream.flush().await
}

async fn read_text(stream: &mut TlsStream<TcpStream>) -> io::Result<String> {
    let length = usize::from(stream.read_u16_le().await?);
    if length > MAX_TEXT_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a text of a memory connection is too long"));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    Ok(String::from_utf8_lossy(&bytes).escape_debug().to_string())
}
