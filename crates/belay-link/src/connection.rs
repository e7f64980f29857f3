//! Connections that are established: TLS and the hello are done.

use std::io::{self, Read as _};
use std::net::SocketAddr;

use belay_wire::Version;
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use crate::name::HostName;

/// A connection for control calls, driven by tokio. See [`rpc`](crate::rpc).
#[derive(Debug)]
pub struct ControlConnection {
    /// The host at the other end, as its certificate says.
    pub peer: HostName,
    /// Its address.
    pub address: SocketAddr,
    /// The version selected.
    pub version: Version,
    pub(crate) stream: Box<TlsStream<TcpStream>>,
}

/// A connection for a device's data, to be driven by a thread of the data plane.
///
/// The TLS state has read from the socket already; what it decrypted is in [`early`](Self::early), which comes
/// before anything read later. It may still have something to write (`wants_write`).
#[derive(Debug)]
pub struct DataConnection {
    /// The host at the other end, as its certificate says.
    pub peer: HostName,
    /// Its address.
    pub address: SocketAddr,
    /// The version selected.
    pub version: Version,
    /// The socket: non-blocking, without Nagle's delay.
    pub socket: std::net::TcpStream,
    /// The TLS state, after the handshake.
    pub tls: rustls::Connection,
    /// Plaintext that followed right behind the hello or its answer.
    pub early: Vec<u8>,
}

impl DataConnection {
    pub(crate) fn detach(
        stream: TlsStream<TcpStream>,
        peer: HostName,
        address: SocketAddr,
        version: Version,
    ) -> io::Result<Self> {
        let (socket, mut tls) = match stream {
            TlsStream::Client(stream) => {
                let (socket, tls) = stream.into_inner();
                (socket, rustls::Connection::from(tls))
            }
            TlsStream::Server(stream) => {
                let (socket, tls) = stream.into_inner();
                (socket, rustls::Connection::from(tls))
            }
        };
        let mut early = Vec::new();
        loop {
            let state = tls
                .process_new_packets()
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let ready = state.plaintext_bytes_to_read();
            if ready == 0 {
                break;
            }
            let start = early.len();
            early.resize(start + ready, 0);
            tls.reader().read_exact(&mut early[start..])?;
        }
        let socket = socket.into_std()?;
        Ok(Self { peer, address, version, socket, tls, early })
    }
}
