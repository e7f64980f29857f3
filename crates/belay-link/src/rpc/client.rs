//! Calling a peer.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};
use tracing::{debug, info, warn};

use super::codec::{self, Kind, RequestBody};
use super::{Heartbeat, RpcError};
use crate::backoff::Backoff;
use crate::connection::ControlConnection;
use crate::dial::dial_control;
use crate::identity::Identity;
use crate::name::HostName;

/// Requests that wait for the socket.
const OUTBOX_FRAMES: usize = 64;

/// Times of a client.
#[derive(Clone, Copy, Debug)]
pub struct ControlClientOptions {
    /// How a silent connection is found out.
    pub heartbeat: Heartbeat,
    /// How long one attempt to connect may take. Default 5 s.
    pub dial_timeout: Duration,
    /// How long a call may take, waiting for a connection included, unless it is said otherwise. Default 10 s.
    pub call_timeout: Duration,
}

impl Default for ControlClientOptions {
    fn default() -> Self {
        Self {
            heartbeat: Heartbeat::default(),
            dial_timeout: Duration::from_secs(5),
            call_timeout: Duration::from_secs(10),
        }
    }
}

/// Whether the peer is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// There is no connection yet, or it was lost just now.
    Connecting,
    /// The last attempt failed; another will follow. The reason is for people.
    Failing(String),
    /// Calls go through.
    Connected,
}

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It was never sent: there was no connection in time. Nothing happened there.
    #[error("{host} can not be reached: {reason}")]
    Unreachable {
        /// The peer.
        host: HostName,
        /// Why not.
        reason: String,
    },
    /// The connection was lost after the call was sent. It may or may not have been carried out.
    #[error("the connection to {host} was lost during `{method}`: whether it was done is not known")]
    Interrupted {
        /// The peer.
        host: HostName,
        /// The call.
        method: String,
    },
    /// No answer in time, although the connection stands. It may or may not be carried out.
    #[error("{host} did not answer `{method}` in time: whether it was done is not known")]
    TimedOut {
        /// The peer.
        host: HostName,
        /// The call.
        method: String,
    },
    /// The peer said no.
    #[error("{host} refused `{method}`: {error}")]
    Refused {
        /// The peer.
        host: HostName,
        /// The call.
        method: String,
        /// Its answer.
        error: RpcError,
    },
    /// The request can not be sent: too large, or not JSON. Nothing happened there.
    #[error("`{method}` can not be sent: {reason}")]
    Unsendable {
        /// The call.
        method: String,
        /// Why not.
        reason: String,
    },
    /// The call was carried out, but its result is not what we expect.
    #[error("the answer of {host} to `{method}` was not understood: {reason}")]
    NotUnderstood {
        /// The peer.
        host: HostName,
        /// The call.
        method: String,
        /// What was wrong with it.
        reason: String,
    },
}

/// Calls one peer. Keeps a connection to it, and dials again when it is lost. Cheap to clone; the connection ends
/// with the last clone.
#[derive(Clone, Debug)]
pub struct ControlClient {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    host: HostName,
    options: ControlClientOptions,
    link: watch::Receiver<Link>,
    state: watch::Receiver<LinkState>,
    addresses: watch::Sender<Vec<String>>,
    identity: watch::Sender<Arc<Identity>>,
    keeper: JoinHandle<()>,
}

type Link = Option<Arc<Session>>;

impl Drop for Shared {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl ControlClient {
    /// A client of a host at these addresses (`host:port`). Begins to connect at once.
    #[must_use]
    pub fn new(
        host: HostName,
        addresses: Vec<String>,
        identity: Arc<Identity>,
        options: ControlClientOptions,
    ) -> Self {
        let (link_sender, link) = watch::channel(None);
        let (state_sender, state) = watch::channel(LinkState::Connecting);
        let (addresses, current_addresses) = watch::channel(addresses);
        let (identity, current_identity) = watch::channel(identity);
        let keeper = Keeper {
            host: host.clone(),
            options,
            addresses: current_addresses,
            identity: current_identity,
            link: link_sender,
            state: state_sender,
        };
        let keeper = tokio::spawn(keeper.keep());
        Self { shared: Arc::new(Shared { host, options, link, state, addresses, identity, keeper }) }
    }

    /// The peer.
    #[must_use]
    pub fn host(&self) -> &HostName {
        &self.shared.host
    }

    /// Whether the peer is there, and every change of it.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<LinkState> {
        self.shared.state.clone()
    }

    /// Uses other addresses from the next attempt on.
    pub fn set_addresses(&self, addresses: Vec<String>) {
        self.shared.addresses.send_replace(addresses);
    }

    /// Uses a renewed identity from the next attempt on.
    pub fn set_identity(&self, identity: Arc<Identity>) {
        self.shared.identity.send_replace(identity);
    }

    /// Waits until there is a connection.
    ///
    /// # Errors
    /// [`CallError::Unreachable`]: there is none within `limit`.
    pub async fn reach(&self, limit: Duration) -> Result<(), CallError> {
        self.session(Instant::now() + limit).await.map(drop)
    }

    /// Calls a method, with the default timeout.
    ///
    /// # Errors
    /// See [`CallError`]: the variants say whether the call may have been carried out.
    pub async fn call<Q, A>(&self, method: &str, request: &Q) -> Result<A, CallError>
    where
        Q: Serialize + Sync + ?Sized,
        A: DeserializeOwned,
    {
        self.call_within(self.shared.options.call_timeout, method, request).await
    }

    /// Calls a method. `timeout` covers everything: waiting for a connection, and for the answer.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn call_within<Q, A>(
        &self,
        timeout: Duration,
        method: &str,
        request: &Q,
    ) -> Result<A, CallError>
    where
        Q: Serialize + Sync + ?Sized,
        A: DeserializeOwned,
    {
        let deadline = Instant::now() + timeout;
        let unsendable = |reason: String| CallError::Unsendable { method: method.to_owned(), reason };
        let json = serde_json::to_vec(&RequestBody { method, body: request })
            .map_err(|error| unsendable(error.to_string()))?;
        let answer = self.send(deadline, &json, method).await?;
        let host = || self.shared.host.clone();
        match timeout_at(deadline, answer.receiver).await {
            Ok(Ok(Ok(json))) => serde_json::from_slice(&json).map_err(|error| CallError::NotUnderstood {
                host: host(),
                method: method.to_owned(),
                reason: error.to_string(),
            }),
            Ok(Ok(Err(error))) => Err(CallError::Refused { host: host(), method: method.to_owned(), error }),
            Ok(Err(_)) => Err(CallError::Interrupted { host: host(), method: method.to_owned() }),
            Err(_) => Err(CallError::TimedOut { host: host(), method: method.to_owned() }),
        }
    }

    /// Hands the request to a connection, waiting for one if need be. What was not handed over was not sent, and
    /// may be handed to the next connection.
    async fn send(&self, deadline: Instant, json: &[u8], method: &str) -> Result<Waiting, CallError> {
        loop {
            let session = self.session(deadline).await?;
            if Instant::now() >= deadline {
                return Err(self.unreachable("no connection in time".to_owned()));
            }
            let Some(waiting) = session.wait_for_answer() else {
                // It ended this instant; its successor will be announced.
                tokio::task::yield_now().await;
                continue;
            };
            let frame =
                codec::encode(Kind::Request, waiting.id, json).ok_or_else(|| CallError::Unsendable {
                    method: method.to_owned(),
                    reason: format!(
                        "{} bytes are more than the limit of {}",
                        json.len(),
                        codec::MAX_BODY_BYTES
                    ),
                })?;
            match timeout_at(deadline, session.outbox.send(frame)).await {
                Ok(Ok(())) => return Ok(waiting),
                Ok(Err(_)) => tokio::task::yield_now().await,
                Err(_) => return Err(self.unreachable("the connection is congested".to_owned())),
            }
        }
    }

    async fn session(&self, deadline: Instant) -> Result<Arc<Session>, CallError> {
        let mut link = self.shared.link.clone();
        let found = timeout_at(deadline, link.wait_for(Option::is_some)).await;
        if let Ok(Ok(link)) = found
            && let Some(session) = link.as_ref()
        {
            return Ok(Arc::clone(session));
        }
        let reason = match &*self.shared.state.borrow() {
            LinkState::Failing(reason) => reason.clone(),
            _ => "no connection in time".to_owned(),
        };
        Err(self.unreachable(reason))
    }

    fn unreachable(&self, reason: String) -> CallError {
        CallError::Unreachable { host: self.shared.host.clone(), reason }
    }
}

type Answer = Result<Vec<u8>, RpcError>;

/// One connection, as callers see it.
#[derive(Debug)]
struct Session {
    outbox: mpsc::Sender<Vec<u8>>,
    next_id: AtomicU64,
    /// Calls that wait; `None` once the connection has ended.
    waiting: Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>,
}

/// A call that waits for its answer. A caller that goes away is forgotten.
struct Waiting {
    id: u64,
    receiver: oneshot::Receiver<Answer>,
    _forget: Forget,
}

struct Forget {
    id: u64,
    session: Arc<Session>,
}

impl Drop for Forget {
    fn drop(&mut self) {
        self.session.take(self.id);
    }
}

impl Session {
    fn wait_for_answer(self: &Arc<Self>) -> Option<Waiting> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.as_mut()?.insert(id, sender);
        Some(Waiting { id, receiver, _forget: Forget { id, session: Arc::clone(self) } })
    }

    fn take(&self, id: u64) -> Option<oneshot::Sender<Answer>> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.as_mut()?.remove(&id)
    }

    /// Every call that waits is told that its connection is lost.
    fn end(&self) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Keeps the connection.
struct Keeper {
    host: HostName,
    options: ControlClientOptions,
    addresses: watch::Receiver<Vec<String>>,
    identity: watch::Receiver<Arc<Identity>>,
    link: watch::Sender<Link>,
    state: watch::Sender<LinkState>,
}

impl Keeper {
    async fn keep(mut self) {
        let mut backoff = Backoff::new();
        loop {
            let addresses = self.addresses.borrow_and_update().clone();
            let identity = Arc::clone(&self.identity.borrow_and_update());
            match dial_control(&addresses, &self.host, &identity, self.options.dial_timeout).await {
                Ok(connection) => {
                    info!(host = %self.host, address = %connection.address, "connected");
                    let since = Instant::now();
                    self.use_connection(connection).await;
                    // A peer that accepts and hangs up at once must not be called twenty times a second.
                    if since.elapsed() >= Backoff::LONGEST {
                        backoff.reset();
                    }
                }
                Err(error) => {
                    debug!(host = %self.host, %error, "could not connect");
                    self.state.send_replace(LinkState::Failing(error.to_string()));
                }
            }
            let delay = backoff.next_delay(rand::random());
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                // Something to try at once.
                Ok(()) = self.addresses.changed() => {}
                Ok(()) = self.identity.changed() => {}
            }
        }
    }

    async fn use_connection(&self, connection: ControlConnection) {
        let (outbox, frames) = mpsc::channel(OUTBOX_FRAMES);
        let session = Arc::new(Session {
            outbox,
            next_id: AtomicU64::new(1),
            waiting: Mutex::new(Some(HashMap::new())),
        });
        let ending = Ending(Arc::clone(&session));
        self.link.send_replace(Some(Arc::clone(&session)));
        self.state.send_replace(LinkState::Connected);
        let outcome = drive(connection, frames, &session, self.options.heartbeat).await;
        // First no new caller finds this connection, then those that wait are told.
        self.link.send_replace(None);
        self.state.send_replace(LinkState::Connecting);
        drop(ending);
        match outcome {
            Ok(()) => info!(host = %self.host, "the peer closed the connection"),
            Err(error) => warn!(host = %self.host, %error, "the connection was lost"),
        }
    }
}

/// Ends the session, also when the task that drives it is ended.
struct Ending(Arc<Session>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Carries frames both ways until the connection ends.
async fn drive(
    connection: ControlConnection,
    frames: mpsc::Receiver<Vec<u8>>,
    session: &Session,
    heartbeat: Heartbeat,
) -> io::Result<()> {
    let (mut reader, writer) = tokio::io::split(connection.stream);
    let read_all = async {
        while let Some(frame) = codec::read(&mut reader, heartbeat.dead_after).await? {
            deliver(session, frame)?;
        }
        io::Result::Ok(())
    };
    tokio::select! {
        outcome = read_all => outcome,
        outcome = write_all(writer, frames, heartbeat.every) => outcome,
    }
}

fn deliver(session: &Session, frame: codec::Frame) -> io::Result<()> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let answer = if frame.is(Kind::Response) {
        Ok(frame.json)
    } else if frame.is(Kind::Error) {
        Err(serde_json::from_slice(&frame.json).map_err(|error| invalid(error.to_string()))?)
    } else if frame.is(Kind::Pong) {
        return Ok(());
    } else {
        return Err(invalid(format!("a frame of kind {}", frame.kind)));
    };
    // Nobody waits any more for a call that timed out.
    if let Some(sender) = session.take(frame.id) {
        let _ = sender.send(answer);
    }
    Ok(())
}

async fn write_all<W>(mut writer: W, mut frames: mpsc::Receiver<Vec<u8>>, every: Duration) -> io::Result<()>
where
    W: AsyncWrite + Unpin,
{
    let mut beat = interval(every);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut pings = 0;
    loop {
        let frame = tokio::select! {
            frame = frames.recv() => frame,
            _ = beat.tick() => {
                pings += 1;
                codec::encode(Kind::Ping, pings, &[])
            }
        };
        let Some(frame) = frame else { return Ok(()) };
        writer.write_all(&frame).await?;
        writer.flush().await?;
    }
}
