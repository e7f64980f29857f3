//! The agent's API: HTTP/1.1 over its Unix socket, one connection per request.

use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::error::Failure;

/// The longest line of a stream that is read; an event is far shorter.
const MAX_LINE_BYTES: usize = 1 << 20;
const NOT_RUNNING: &str = "is `belay agent` running?";

/// A client of one agent.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    pub(crate) async fn get(&self, path: &str) -> Result<Value, Failure> {
        self.call(Method::GET, path, None).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        self.call(Method::POST, path, Some(body)).await
    }

    pub(crate) async fn patch(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        self.call(Method::PATCH, path, Some(body)).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<Value, Failure> {
        self.call(Method::DELETE, path, None).await
    }

    /// The answer as it is.
    pub(crate) async fn get_text(&self, path: &str) -> Result<String, Failure> {
        let bytes = self.bytes(Method::GET, path, None).await?;
        String::from_utf8(bytes.into()).map_err(|_| Failure::failed("the agent's answer is no UTF-8"))
    }

    /// A stream of JSON lines.
    pub(crate) async fn follow(&self, path: &str) -> Result<Lines, Failure> {
        let body = self.send(Method::GET, path, None).await?.into_body();
        Ok(Lines { body, pending: Vec::new() })
    }

    async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, Failure> {
        let bytes = self.bytes(method, path, body).await?;
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes).map_err(|error| not_understood(&error))
    }

    async fn bytes(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Bytes, Failure> {
        let answer = self.send(method, path, body).await?;
        Ok(answer.into_body().collect().await.map_err(|error| self.broke_off(&error))?.to_bytes())
    }

    /// Sends a request; an answer that is no success is the error that it tells of.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Response<Incoming>, Failure> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.not_connected(&error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broke_off(&error))?;
        // The connection ends with the body; its errors appear in the answer.
        tokio::spawn(connection);
        let bytes = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "belay")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(bytes))
            .map_err(|error| Failure::failed(format!("`{path}` can not be asked for: {error}")))?;
        let answer = sender.send_request(request).await.map_err(|error| self.broke_off(&error))?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status: StatusCode = answer.status();
        let body = answer.into_body().collect().await.map_err(|error| self.broke_off(&error))?.to_bytes();
        Err(Failure::of_answer(status.as_u16(), &body))
    }

    fn not_connected(&self, error: &std::io::Error) -> Failure {
        let message = format!("the agent can not be reached at {}: {error}", self.socket.display());
        let hint = match error.kind() {
            std::io::ErrorKind::PermissionDenied => {
                "run the command as root, or as a user who may use the socket"
            }
            _ => NOT_RUNNING,
        };
        Failure::agent_absent(message).hint(hint)
    }

    fn broke_off(&self, error: &hyper::Error) -> Failure {
        Failure::agent_absent(format!("the agent at {} broke off: {error}", self.socket.display()))
            .hint(NOT_RUNNING)
    }
}

/// The lines of a stream.
#[derive(Debug)]
pub(crate) struct Lines {
    body: Incoming,
    pending: Vec<u8>,
}

impl Lines {
    /// The next line that is not empty; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<String>, Failure> {
        loop {
            while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                if let Some(line) = readable(&line)? {
                    return Ok(Some(line));
                }
            }
            if self.pending.len() > MAX_LINE_BYTES {
                return Err(Failure::failed("the agent sent a line that is too long"));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.pending.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => {
                    return Err(
                        Failure::agent_absent(format!("the agent broke off: {error}")).hint(NOT_RUNNING)
                    );
                }
                None => return readable(&std::mem::take(&mut self.pending)),
            }
        }
    }
}

fn readable(line: &[u8]) -> Result<Option<String>, Failure> {
    let line =
        std::str::from_utf8(line).map_err(|_| Failure::failed("the agent sent a line that is no UTF-8"))?;
    let line = line.trim();
    Ok((!line.is_empty()).then(|| line.to_owned()))
}

/// Reads an answer as the type that it should be.
pub(crate) fn understood<T: DeserializeOwned>(value: Value) -> Result<T, Failure> {
    serde_json::from_value(value).map_err(|error| not_understood(&error))
}

fn not_understood(error: &serde_json::Error) -> Failure {
    Failure::failed(format!("the agent's answer is not understood: {error}"))
        .hint("are this command and the agent of the same version? `belay status --json` shows the agent's")
}

/// A name as one segment of a path.
pub(crate) fn segment(name: &str) -> String {
    use std::fmt::Write;
    name.bytes().fold(String::with_capacity(name.len()), |mut text, byte| {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(text, "%{byte:02X}");
        }
        text
    })
}
