//! The QMP connection: commands with ids, replies, and a broadcast of events.
//!
//! One task reads the socket. Replies find their caller by id; everything with an `event` key goes to all
//! subscribers. A caller that gives up (time limit, dropped future) leaves nothing behind: its reply is discarded.
//!
//! Specification: QEMU's `docs/interop/qmp-spec.rst`. Works with QEMU 7.2 to 11.

use crate::detect::QemuVersion;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, oneshot, watch};
use tokio::task::AbortHandle;

/// How long a command may take unless the caller says otherwise. QEMU answers within milliseconds, but a
/// `migrate_cancel` or `stop` waits for every device's backend first.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// A message longer than this is not QMP. The longest real one, `query-qmp-schema`, has about 300 KiB.
const MAX_LINE_BYTES: u64 = 16 << 20;

/// Events that a slow subscriber may fall behind before it misses some.
const EVENT_BACKLOG: usize = 1024;

/// Pause between attempts to connect while the VMM starts.
const CONNECT_RETRY: Duration = Duration::from_millis(20);

/// What can go wrong on a QMP connection.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody answered at the socket within the time given.
    #[error(
        "cannot connect to QMP at {path}: {source}; is the VM running, and may this user open the socket?"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the last attempt met.
        #[source]
        source: std::io::Error,
    },
    /// The peer did not greet as QMP does. QMP sockets serve one client at a time: another one may hold it.
    #[error("no QMP greeting from {path} within {after:?}; does another program hold the QMP socket?")]
    NoGreeting {
        /// The socket.
        path: PathBuf,
        /// How long we waited.
        after: Duration,
    },
    /// The peer sent something that is not QMP.
    #[error("the VMM sent something that is not QMP: {0}")]
    Protocol(String),
    /// The VMM refused or failed the command.
    #[error("QEMU refused {command}: {desc} ({class})")]
    Command {
        /// The command.
        command: String,
        /// QEMU's error class, such as `GenericError` or `CommandNotFound`.
        class: String,
        /// QEMU's own words.
        desc: String,
    },
    /// No reply in time. The command may still take effect.
    #[error("QEMU did not answer {command} within {after:?}; it may still carry it out")]
    Timeout {
        /// The command.
        command: String,
        /// How long we waited.
        after: Duration,
    },
    /// The connection ended: the VMM exited, or closed it.
    #[error("the QMP connection is closed: {0}")]
    Closed(String),
    /// The reply is not what this command returns.
    #[error("QEMU's answer to {command} has an unexpected form: {source}")]
    Reply {
        /// The command.
        command: String,
        /// What does not fit.
        #[source]
        source: serde_json::Error,
    },
}

impl QmpError {
    /// Whether the VMM does not know the command at all (an older QEMU).
    #[must_use]
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, Self::Command { class, .. } if class == "CommandNotFound")
    }
}

/// An asynchronous event of the VMM.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, such as `STOP` or `MIGRATION`.
    pub name: String,
    /// Its data; an empty object if it has none.
    pub data: Value,
    /// When it happened, microseconds since the Unix epoch, by the VMM's clock; 0 if it could not tell.
    pub timestamp_us: u64,
}

type Pending = HashMap<u64, oneshot::Sender<Result<Value, (String, String)>>>;

/// Replies that are awaited, and why no more will come.
#[derive(Default)]
struct Waiting {
    pending: Pending,
    closed: Option<String>,
}

struct Inner {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    waiting: Arc<Mutex<Waiting>>,
    events: broadcast::WeakSender<Event>,
    closed: watch::Receiver<bool>,
    next_id: AtomicU64,
    version: QemuVersion,
    reader: AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// A QMP connection, past its greeting and negotiation. Clones share it; the last one closes it.
#[derive(Clone)]
pub struct Qmp(Arc<Inner>);

impl std::fmt::Debug for Qmp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qmp").field("version", &self.0.version).finish_non_exhaustive()
    }
}

impl Qmp {
    /// Connects to the socket at `path`, waiting up to `within` for it to appear and to greet.
    ///
    /// # Errors
    ///
    /// [`QmpError::Connect`] if nobody listens in time, [`QmpError::NoGreeting`] if somebody does but is silent.
    pub async fn connect(path: impl AsRef<Path>, within: Duration) -> Result<Self, QmpError> {
        let path = path.as_ref();
        let deadline = tokio::time::Instant::now() + within;
        let stream = loop {
            match UnixStream::connect(path).await {
                Ok(stream) => break stream,
                Err(source) if tokio::time::Instant::now() + CONNECT_RETRY >= deadline => {
                    return Err(QmpError::Connect { path: path.to_owned(), source });
                }
                Err(_) => tokio::time::sleep(CONNECT_RETRY).await,
            }
        };
        match tokio::time::timeout_at(deadline, Self::over(stream)).await {
            Ok(result) => result,
            Err(_) => Err(QmpError::NoGreeting { path: path.to_owned(), after: within }),
        }
    }

    /// Takes over a connected socket: greeting, then `qmp_capabilities`. Waits without a limit of its own.
    ///
    /// # Errors
    ///
    /// [`QmpError::Protocol`] or [`QmpError::Closed`] if the peer is no QMP server.
    pub async fn over(stream: UnixStream) -> Result<Self, QmpError> {
        let (read, write) = stream.into_split();
        let mut read = BufReader::new(read);
        let greeting = read_message(&mut read)
            .await?
            .ok_or_else(|| QmpError::Closed("the VMM hung up before its greeting".into()))?;
        let version =
            greeting.pointer("/QMP/version/qemu").and_then(QemuVersion::from_qmp).ok_or_else(|| {
                QmpError::Protocol(format!("greeting expected, got {}", abbreviated(&greeting)))
            })?;
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let (events, _) = broadcast::channel(EVENT_BACKLOG);
        let weak = events.downgrade();
        let (closed_tx, closed) = watch::channel(false);
        let reader = tokio::spawn(read_loop(read, Arc::clone(&waiting), events, closed_tx)).abort_handle();
        let qmp = Self(Arc::new(Inner {
            writer: tokio::sync::Mutex::new(write),
            waiting,
            events: weak,
            closed,
            next_id: AtomicU64::new(1),
            version,
            reader,
        }));
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// The VMM's version, from its greeting.
    #[must_use]
    pub fn version(&self) -> QemuVersion {
        self.0.version
    }

    /// Subscribes to events that happen from now on. The receiver ends when the connection does.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.0.events.upgrade().map_or_else(|| broadcast::channel(1).1, |events| events.subscribe())
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        *self.0.closed.borrow()
    }

    /// Waits for the end of the connection.
    pub async fn closed(&self) {
        let mut closed = self.0.closed.clone();
        // An error means the reader is gone, which is the same thing.
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// Runs a command with [`DEFAULT_TIMEOUT`] and returns its `return` value.
    ///
    /// # Errors
    ///
    /// [`QmpError::Command`] with QEMU's class and description, or what became of the connection.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, DEFAULT_TIMEOUT).await
    }

    /// Runs a command with a time limit of its own.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute); [`QmpError::Timeout`] after `limit`.
    pub async fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        match tokio::time::timeout(limit, self.exchange(command, arguments)).await {
            Ok(result) => result,
            Err(_) => Err(QmpError::Timeout { command: command.to_owned(), after: limit }),
        }
    }

    /// Runs a command without arguments and reads its reply as a `T`.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute); [`QmpError::Reply`] if the reply is no `T`.
    pub async fn query<T: DeserializeOwned>(&self, command: &str) -> Result<T, QmpError> {
        let value = self.execute(command, json!({})).await?;
        serde_json::from_value(value)
            .map_err(|source| QmpError::Reply { command: command.to_owned(), source })
    }

    /// Gives the VMM a descriptor under a name (`getfd`), for a later command on this connection that takes
    /// `fd:NAME`. One that has the name already is closed.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    pub async fn give_descriptor(&self, name: &str, descriptor: OwnedFd) -> Result<(), QmpError> {
        let given = self.exchange_with("getfd", json!({ "fdname": name }), Some(descriptor));
        match tokio::time::timeout(DEFAULT_TIMEOUT, given).await {
            Ok(result) => result.map(drop),
            Err(_) => Err(QmpError::Timeout { command: "getfd".to_owned(), after: DEFAULT_TIMEOUT }),
        }
    }

    async fn exchange(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.exchange_with(command, arguments, None).await
    }

    async fn exchange_with(
        &self,
        command: &str,
        arguments: Value,
        descriptor: Option<OwnedFd>,
    ) -> Result<Value, QmpError> {
        let id = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        let (tx, rx) = oneshot::channel();
        {
            let mut waiting = lock(&self.0.waiting);
            if let Some(why) = &waiting.closed {
                return Err(QmpError::Closed(why.clone()));
            }
            waiting.pending.insert(id, tx);
        }
        let _forget = Forget { waiting: &self.0.waiting, id };
        let mut message =
            Map::from_iter([("execute".to_owned(), json!(command)), ("id".to_owned(), json!(id))]);
        if arguments.as_object().is_some_and(|arguments| !arguments.is_empty()) {
            message.insert("arguments".to_owned(), arguments);
        }
        let mut line = Value::Object(message).to_string();
        line.push('\n');
        self.send(line.into_bytes(), descriptor).await?;
        match rx.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err((class, desc))) => Err(QmpError::Command { command: command.to_owned(), class, desc }),
            Err(_) => {
                let why = lock(&self.0.waiting).closed.clone();
                Err(QmpError::Closed(why.unwrap_or_else(|| "the reader ended".into())))
            }
        }
    }

    /// Writes a whole line even if the caller's future is dropped half-way: half a line would garble the next.
    async fn send(&self, line: Vec<u8>, descriptor: Option<OwnedFd>) -> Result<(), QmpError> {
        let inner = Arc::clone(&self.0);
        let written = tokio::spawn(async move {
            let mut writer = inner.writer.lock().await;
            let sent = match descriptor {
                Some(descriptor) => send_with(&writer, &line, &descriptor).await?,
                None => 0,
            };
            writer.write_all(&line[sent..]).await
        })
        .await;
        match written {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(QmpError::Closed(error.to_string())),
            Err(error) => Err(QmpError::Closed(error.to_string())),
        }
    }
}

/// Writes the start of a line, and with it a descriptor. Returns how much of the line went.
async fn send_with(writer: &OwnedWriteHalf, line: &[u8], descriptor: &OwnedFd) -> std::io::Result<usize> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let socket: &UnixStream = writer.as_ref();
    socket
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut rights = SendAncillaryBuffer::new(&mut space);
            let descriptors = [descriptor.as_fd()];
            rights.push(SendAncillaryMessage::ScmRights(&descriptors));
            Ok(sendmsg(socket, &[IoSlice::new(line)], &mut rights, SendFlags::NOSIGNAL)?)
        })
        .await
}

/// Forgets a reply that nobody waits for any more.
struct Forget<'a> {
    waiting: &'a Mutex<Waiting>,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(self.waiting).pending.remove(&self.id);
    }
}

fn lock(waiting: &Mutex<Waiting>) -> std::sync::MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn read_loop(
    mut read: BufReader<OwnedReadHalf>,
    waiting: Arc<Mutex<Waiting>>,
    events: broadcast::Sender<Event>,
    closed: watch::Sender<bool>,
) {
    let why = loop {
        match read_message(&mut read).await {
            Ok(Some(message)) => dispatch(message, &waiting, &events),
            Ok(None) => break "the VMM closed it".to_owned(),
            Err(error) => break error.to_string(),
        }
    };
    tracing::debug!(%why, "QMP connection ended");
    let mut waiting = lock(&waiting);
    waiting.closed = Some(why);
    waiting.pending.clear();
    closed.send_replace(true);
}

/// Gives one message to whom it belongs.
fn dispatch(mut message: Value, waiting: &Mutex<Waiting>, events: &broadcast::Sender<Event>) {
    if let Some(name) = message.get("event").and_then(Value::as_str) {
        let name = name.to_owned();
        let part = |key: &str| message.pointer(key).and_then(Value::as_u64);
        let timestamp_us = match (part("/timestamp/seconds"), part("/timestamp/microseconds")) {
            (Some(seconds), Some(micros)) => seconds.saturating_mul(1_000_000).saturating_add(micros),
            _ => 0,
        };
        let data = message.get_mut("data").map_or_else(|| json!({}), Value::take);
        tracing::trace!(%name, %data, "QMP event");
        // Nobody listening is fine.
        let _ = events.send(Event { name, data, timestamp_us });
        return;
    }
    let Some(id) = message.get("id").and_then(Value::as_u64) else {
        tracing::warn!(message = %abbreviated(&message), "QMP message that answers nothing");
        return;
    };
    let Some(reply) = lock(waiting).pending.remove(&id) else { return };
    let text = |key: &str| message.pointer(key).and_then(Value::as_str).unwrap_or("unknown").to_owned();
    let result = match message.get("error") {
        Some(_) => Err((text("/error/class"), text("/error/desc"))),
        None => Ok(message.get_mut("return").map_or(Value::Null, Value::take)),
    };
    // The caller may have given up.
    let _ = reply.send(result);
}

/// Reads one line of JSON; `None` at the end of the stream.
async fn read_message(read: &mut BufReader<OwnedReadHalf>) -> Result<Option<Value>, QmpError> {
    let mut line = Vec::new();
    let taken = read
        .take(MAX_LINE_BYTES)
        .read_until(b'\n', &mut line)
        .await
        .map_err(|error| QmpError::Closed(error.to_string()))?;
    if taken == 0 {
        return Ok(None);
    }
    serde_json::from_slice(&line).map(Some).map_err(|error| {
        let start = String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned();
        QmpError::Protocol(format!("{error} in {start:?}"))
    })
}

fn abbreviated(value: &Value) -> String {
    value.to_string().chars().take(160).collect()
}
