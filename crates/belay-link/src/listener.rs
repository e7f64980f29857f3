//! Answering other agents.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use belay_wire::{ConnectionKind, Version};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsStream};
use tracing::{debug, info, warn};

use crate::connection::{ControlConnection, DataConnection};
use crate::greeting::{self, Greeting};
use crate::hosts::KnownHost;
use crate::identity::Identity;
use crate::join;
use crate::memory::{self, MemoryCall};
use crate::name::HostName;
use crate::tls::{self, PeerError};

/// Connections that are ready and not yet taken by the agent.
const READY_CONNECTIONS: usize = 64;
/// Pause after a failed accept: it fails at once again while descriptors are short.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Limits of a listener.
#[derive(Clone, Copy, Debug)]
pub struct ListenerOptions {
    /// How long TLS, hello and answer may take together. Default 10 s.
    pub handshake_timeout: Duration,
    /// Handshakes at once. One more, and the oldest is given up: those of peers take milliseconds, so it is that of a
    /// caller who says nothing. Default 256.
    pub max_handshakes: usize,
}

impl Default for ListenerOptions {
    fn default() -> Self {
        Self { handshake_timeout: Duration::from_secs(10), max_handshakes: 256 }
    }
}

/// What comes out of a listener.
#[derive(Debug)]
pub enum Incoming {
    /// A peer that wants to call; serve it with [`serve_control`](crate::serve_control).
    Control(ControlConnection),
    /// A peer that brings a device's data.
    Data(Box<DataConnection>),
    /// A peer that brings a VM's memory.
    Memory(MemoryCall),
    /// A host was enrolled over this listener; it is in [`known_hosts`](crate::known_hosts) already.
    Joined(KnownHost),
}

/// Accepts connections of peers until it is dropped.
#[derive(Debug)]
pub struct Listener {
    incoming: mpsc::Receiver<Incoming>,
    identity: watch::Sender<Arc<Identity>>,
    local_address: SocketAddr,
    task: JoinHandle<()>,
}

impl Listener {
    /// Listens at `address` (port 0: any; see [`Listener::local_address`]).
    ///
    /// # Errors
    /// The address can not be used.
    pub async fn bind(
        address: SocketAddr,
        identity: Arc<Identity>,
        options: ListenerOptions,
    ) -> io::Result<Self> {
        let socket = TcpListener::bind(address).await?;
        let local_address = socket.local_addr()?;
        let (ready, incoming) = mpsc::channel(READY_CONNECTIONS);
        let (identity, current) = watch::channel(identity);
        let task = tokio::spawn(accept_all(socket, ready, current, options));
        Ok(Self { incoming, identity, local_address, task })
    }

    /// The next connection that is ready; `None` never comes while the listener exists. Safe to cancel.
    pub async fn next(&mut self) -> Option<Incoming> {
        self.incoming.recv().await
    }

    /// Where it listens.
    #[must_use]
    pub fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// Uses a renewed identity for all handshakes from now on.
    pub fn set_identity(&self, identity: Arc<Identity>) {
        self.identity.send_replace(identity);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept_all(
    socket: TcpListener,
    ready: mpsc::Sender<Incoming>,
    identity: watch::Receiver<Arc<Identity>>,
    options: ListenerOptions,
) {
    let under_way = Arc::new(UnderWay::default());
    // Ends the handshakes under way when the listener is dropped.
    let mut handshakes = JoinSet::new();
    for number in 0_u64.. {
        while handshakes.try_join_next().is_some() {}
        match socket.accept().await {
            Ok((stream, address)) => {
                let identity = Arc::clone(&identity.borrow());
                let caller = Caller { identity, address, ready: ready.clone() };
                under_way.make_room(options.max_handshakes);
                let entry = Entry { under_way: Arc::clone(&under_way), number };
                let (limit, (began, begin)) = (options.handshake_timeout, oneshot::channel());
                let task = handshakes.spawn(async move {
                    // Not before it is known how to end it.
                    let _ = begin.await;
                    caller.admit(stream, limit, entry).await;
                });
                under_way.add(number, address, task);
                let _ = began.send(());
            }
            Err(error) => {
                warn!(%error, "could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Handshakes that have not ended, the oldest first.
#[derive(Default)]
struct UnderWay(Mutex<BTreeMap<u64, (SocketAddr, AbortHandle)>>);

impl UnderWay {
    fn all(&self) -> MutexGuard<'_, BTreeMap<u64, (SocketAddr, AbortHandle)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, number: u64, address: SocketAddr, task: AbortHandle) {
        self.all().insert(number, (address, task));
    }

    /// Gives up the oldest if there is no room for another.
    fn make_room(&self, at_most: usize) {
        let mut all = self.all();
        while all.len() >= at_most.max(1) {
            let Some((_, (peer, task))) = all.pop_first() else { return };
            task.abort();
            warn!(%peer, at_most, "a connection was rejected: too many callers at once, and it was the slowest");
        }
    }
}

/// A handshake's place among those under way, until it ends.
struct Entry {
    under_way: Arc<UnderWay>,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.under_way.all().remove(&self.number);
    }
}

/// Why a caller did not get in.
#[derive(Debug, thiserror::Error)]
enum Rejection {
    #[error("TLS handshake failed: {0}")]
    Tls(io::Error),
    #[error("no hello: {0}")]
    Hello(io::Error),
    #[error("refused: {0}")]
    Refused(String),
    #[error("connection lost: {0}")]
    Lost(#[from] io::Error),
}

struct Caller {
    identity: Arc<Identity>,
    address: SocketAddr,
    ready: mpsc::Sender<Incoming>,
}

impl Caller {
    async fn admit(self, stream: TcpStream, limit: Duration, entry: Entry) {
        let peer = self.address;
        let outcome = timeout(limit, self.handshake(stream)).await;
        match outcome {
            Ok(Ok(Some(incoming))) => {
                // From here on it is not given up.
                drop(entry);
                // An error means that the listener is gone, and with it the wish for connections.
                let _ = self.ready.send(incoming).await;
            }
            Ok(Ok(None)) => debug!(%peer, "the caller left without a word"),
            Ok(Err(Rejection::Tls(error))) if greeting::is_end(&error) => {
                debug!(%peer, "the caller left during the handshake");
            }
            Ok(Err(reason)) => warn!(%peer, %reason, "a connection was rejected"),
            Err(_) => warn!(%peer, seconds = limit.as_secs_f32(), "a connection was rejected: too slow"),
        }
    }

    async fn handshake(&self, stream: TcpStream) -> Result<Option<Incoming>, Rejection> {
        stream.set_nodelay(true)?;
        let acceptor = TlsAcceptor::from(tls::server_config(&self.identity));
        let mut stream = TlsStream::Server(acceptor.accept(stream).await.map_err(Rejection::Tls)?);
        let name = tls::peer_name(stream.get_ref().1.peer_certificates(), &self.identity);
        let (kind, version) = match greeting::read_hello(&mut stream).await.map_err(Rejection::Hello)? {
            Greeting::Welcome { kind, version } => (kind, version),
            Greeting::Refuse(reason) => return refuse(&mut stream, reason).await,
            Greeting::Nothing => return Ok(None),
        };
        match (kind, name) {
            (ConnectionKind::Join, _) => self.enrol(stream, version).await,
            (_, Err(error @ PeerError::NoCertificate)) => {
                refuse(&mut stream, format!("this host is not known here: {error}")).await
            }
            (_, Err(error)) => refuse(&mut stream, error.to_string()).await,
            (_, Ok(peer)) => self.welcome(stream, peer, kind, version).await,
        }
    }

    async fn welcome(
        &self,
        mut stream: TlsStream<TcpStream>,
        peer: HostName,
        kind: ConnectionKind,
        version: Version,
    ) -> Result<Option<Incoming>, Rejection> {
        greeting::answer(&mut stream, Ok(version)).await?;
        let address = self.address;
        Ok(Some(match kind {
            ConnectionKind::Data => {
                Incoming::Data(Box::new(DataConnection::detach(stream, peer, address, version)?))
            }
            ConnectionKind::Memory => {
                let (vm, stream) = memory::read_call(stream).await?;
                Incoming::Memory(MemoryCall { peer, vm, stream })
            }
            ConnectionKind::Control | ConnectionKind::Join => {
                Incoming::Control(ControlConnection { peer, address, version, stream: Box::new(stream) })
            }
        }))
    }

    async fn enrol(
        &self,
        mut stream: TlsStream<TcpStream>,
        version: Version,
    ) -> Result<Option<Incoming>, Rejection> {
        greeting::answer(&mut stream, Ok(version)).await?;
        let outcome = join::answer(&mut stream, self.identity.directory()).await?;
        // The client may be gone once it has the answer.
        let _ = stream.shutdown().await;
        match outcome {
            Ok(host) => {
                info!(host = %host.name, peer = %self.address, "a host was enrolled");
                Ok(Some(Incoming::Joined(host)))
            }
            Err(refusal) => Err(Rejection::Refused(refusal.to_string())),
        }
    }
}

async fn refuse(stream: &mut TlsStream<TcpStream>, reason: String) -> Result<Option<Incoming>, Rejection> {
    greeting::answer(stream, Err(&reason)).await?;
    stream.shutdown().await?;
    Err(Rejection::Refused(reason))
}
