//! Why something was not done, as callers of the API see it.

use serde::{Deserialize, Serialize};

/// An error with a code that programs can tell apart; the command turns it into its exit code.
#[derive(Clone, Debug, Serialize, Deserialize, thiserror::Error, utoipa::ToSchema)]
#[error("{message}")]
pub struct AgentError {
    /// `usage`, `precheck`, `cancelled`, `fenced`, `unreachable`, `failed` or `not_found`.
    pub code: String,
    /// What happened, to which device, in one sentence.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl AgentError {
    fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into(), hint: None }
    }

    /// The caller asked for something that cannot be asked for.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new("usage", message)
    }

    /// A check before the work said no; nothing was changed.
    pub fn precheck(message: impl Into<String>) -> Self {
        Self::new("precheck", message)
    }

    /// It was tried, and failed.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new("failed", message)
    }

    /// There is no such thing.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new("not_found", message)
    }

    /// The device has moved on.
    pub fn fenced(message: impl Into<String>) -> Self {
        Self::new("fenced", message)
    }

    /// The other host could not be asked.
    pub fn unreachable(message: impl Into<String>) -> Self {
        Self::new("unreachable", message)
    }

    /// It was cancelled.
    pub fn cancelled(message: impl Into<String>) -> Self {
        Self::new("cancelled", message)
    }

    /// With what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl From<crate::ledger::LedgerError> for AgentError {
    fn from(error: crate::ledger::LedgerError) -> Self {
        Self::failed(error.to_string())
    }
}
