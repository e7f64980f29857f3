//! Control calls between agents: requests with names and JSON bodies, many at once over one connection.
//!
//! Liveness is checked by pings of the client; the server takes silence for death as well. A call is sent at most
//! once: whether to repeat one whose outcome is not known is for the caller to decide.

mod client;
mod codec;
mod server;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use client::{CallError, ControlClient, ControlClientOptions, LinkState};
pub use codec::MAX_BODY_BYTES;
pub use server::{ControlHandler, serve_control};

/// How a silent connection is found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// The client pings this often. Default 1 s.
    pub every: Duration,
    /// Without any byte of the peer for this long, the connection is dead. Default 5 s.
    pub dead_after: Duration,
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self { every: Duration::from_secs(1), dead_after: Duration::from_secs(5) }
    }
}

/// A peer's answer that it did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message} ({code})")]
pub struct RpcError {
    /// For programs: a word that stays the same, such as `unknown_method`.
    pub code: String,
    /// For people: what happened, and what to do.
    pub message: String,
}

impl RpcError {
    /// The peer does not know this method.
    pub const UNKNOWN_METHOD: &'static str = "unknown_method";
    /// The body is not what the method takes.
    pub const BAD_REQUEST: &'static str = "bad_request";
    /// Too many calls are under way.
    pub const BUSY: &'static str = "busy";
    /// The result is too large for one frame.
    pub const TOO_LARGE: &'static str = "too_large";
    /// The peer has a defect; its log says more.
    pub const INTERNAL: &'static str = "internal";

    /// An error with a code and a message.
    #[must_use]
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into() }
    }

    /// What a handler answers to a method that it does not know.
    #[must_use]
    pub fn unknown_method(method: &str) -> Self {
        let shown: String = method.chars().take(100).flat_map(char::escape_default).collect();
        let message = format!("this agent does not know the call `{shown}`: it may be older; upgrade it");
        Self::new(Self::UNKNOWN_METHOD, message)
    }

    /// Reads a method's body.
    ///
    /// # Errors
    /// [`RpcError::BAD_REQUEST`] with the reason.
    pub fn parse<T: serde::de::DeserializeOwned>(body: serde_json::Value) -> Result<T, Self> {
        serde_json::from_value(body).map_err(|error| Self::new(Self::BAD_REQUEST, error.to_string()))
    }
}
