//! Serving a peer's calls.

use std::io;
use std::sync::Arc;

use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::{Semaphore, mpsc};
use tracing::{error, warn};

use super::codec::{self, Frame, Kind, RequestBody};
use super::{Heartbeat, RpcError};
use crate::connection::ControlConnection;
use crate::name::HostName;

/// Calls of one connection under way at once; more are answered with [`RpcError::BUSY`].
const MAX_CALLS_AT_ONCE: usize = 256;
/// Answers that wait for the socket.
const OUTBOX_FRAMES: usize = 64;

/// What answers the calls of peers.
pub trait ControlHandler: Send + Sync + 'static {
    /// Carries out one call. Calls run concurrently. A call that has begun runs to its end, even if its connection
    /// is lost meanwhile. Unknown methods are answered with [`RpcError::unknown_method`].
    fn handle(
        &self,
        peer: &HostName,
        method: &str,
        body: Value,
    ) -> impl Future<Output = Result<Value, RpcError>> + Send;
}

/// Serves one connection until it ends. Returns normally when the peer closed it, or was silent for too long.
///
/// # Errors
/// The connection broke, or the peer did not keep to the protocol.
pub async fn serve_control<H: ControlHandler>(
    connection: ControlConnection,
    handler: Arc<H>,
    heartbeat: Heartbeat,
) -> io::Result<()> {
    let ControlConnection { peer, stream, .. } = connection;
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (outbox, mut frames) = mpsc::channel::<Vec<u8>>(OUTBOX_FRAMES);
    let write_all = async move {
        while let Some(frame) = frames.recv().await {
            writer.write_all(&frame).await?;
            writer.flush().await?;
        }
        io::Result::Ok(())
    };
    let read_all = async move {
        let calls = Calls { peer, handler, outbox, permits: Arc::new(Semaphore::new(MAX_CALLS_AT_ONCE)) };
        loop {
            match codec::read(&mut reader, heartbeat.dead_after).await {
                Ok(Some(frame)) => calls.take(frame).await?,
                Ok(None) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    warn!(peer = %calls.peer, %error, "a control connection is dead");
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    };
    tokio::select! {
        outcome = read_all => outcome,
        outcome = write_all => outcome,
    }
}

struct Calls<H> {
    peer: HostName,
    handler: Arc<H>,
    outbox: mpsc::Sender<Vec<u8>>,
    permits: Arc<Semaphore>,
}

impl<H: ControlHandler> Calls<H> {
    async fn take(&self, frame: Frame) -> io::Result<()> {
        let id = frame.id;
        if frame.is(Kind::Ping) {
            return send(&self.outbox, codec::encode(Kind::Pong, id, &[])).await;
        }
        if frame.is(Kind::Request) {
            return match serde_json::from_slice::<RequestBody<String, Value>>(&frame.json) {
                Ok(request) => self.begin(id, request).await,
                Err(error) => self.refuse(id, RpcError::new(RpcError::BAD_REQUEST, error.to_string())).await,
            };
        }
        let reason = format!("frames of kind {} are not known to this version", frame.kind);
        self.refuse(id, RpcError::new(RpcError::BAD_REQUEST, reason)).await
    }

    async fn begin(&self, id: u64, request: RequestBody<String, Value>) -> io::Result<()> {
        let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else {
            let reason = format!("{MAX_CALLS_AT_ONCE} calls are under way already: try again later");
            return self.refuse(id, RpcError::new(RpcError::BUSY, reason)).await;
        };
        let (peer, handler, outbox) = (self.peer.clone(), Arc::clone(&self.handler), self.outbox.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let method = request.method.clone();
            let owner = peer.clone();
            // A task of its own, so that a handler that panics costs its caller this call and nothing else.
            let call =
                tokio::spawn(async move { handler.handle(&owner, &request.method, request.body).await });
            let outcome = call.await.unwrap_or_else(|failure| {
                error!(%peer, method, %failure, "a control call failed by a defect");
                Err(RpcError::new(RpcError::INTERNAL, "the agent has a defect here; its log says more"))
            });
            // Nobody waits any more if the connection is gone.
            let _ = send(&outbox, encode_outcome(id, &outcome)).await;
        });
        Ok(())
    }

    async fn refuse(&self, id: u64, error: RpcError) -> io::Result<()> {
        send(&self.outbox, encode_outcome(id, &Err(error))).await
    }
}

fn encode_outcome(id: u64, outcome: &Result<Value, RpcError>) -> Option<Vec<u8>> {
    match outcome {
        Ok(value) => serde_json::to_vec(value).ok().and_then(|json| codec::encode(Kind::Response, id, &json)),
        Err(error) => serde_json::to_vec(error).ok().and_then(|json| codec::encode(Kind::Error, id, &json)),
    }
    .or_else(|| {
        let error = RpcError::new(RpcError::TOO_LARGE, "the result is too large for one answer");
        codec::encode(Kind::Error, id, &serde_json::to_vec(&error).ok()?)
    })
}

async fn send(outbox: &mpsc::Sender<Vec<u8>>, frame: Option<Vec<u8>>) -> io::Result<()> {
    let frame = frame.ok_or(io::ErrorKind::InvalidData)?;
    outbox.send(frame).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
}
