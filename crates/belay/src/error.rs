//! How a command ends when it does not end well: an exit code that scripts can rely on, a message, a hint.

use std::io;
use std::process::ExitCode;

use belay_link::{HostNameError, JoinError, PkiError};
use serde::Deserialize;
use serde_json::{Value, json};

/// What a command's failure means to a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was tried and failed.
    Failed = 1,
    /// It was asked wrongly.
    Usage = 2,
    /// A check before the start said no; nothing was changed.
    Precheck = 3,
    /// It was cancelled.
    Cancelled = 4,
    /// Another host owns the device by now.
    Fenced = 5,
    /// Another host can not be reached.
    Unreachable = 6,
}

impl Outcome {
    /// The outcome of an error code of the API; codes of newer agents are plain failures.
    pub(crate) fn of_code(code: &str) -> Self {
        match code {
            "usage" => Self::Usage,
            "precheck" => Self::Precheck,
            "cancelled" => Self::Cancelled,
            "fenced" => Self::Fenced,
            "unreachable" => Self::Unreachable,
            _ => Self::Failed,
        }
    }

    fn code(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Usage => "usage",
            Self::Precheck => "precheck",
            Self::Cancelled => "cancelled",
            Self::Fenced => "fenced",
            Self::Unreachable => "unreachable",
        }
    }
}

/// A command that did not succeed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) outcome: Outcome,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
    /// The agent's own words, for `--json`.
    body: Option<Value>,
    /// The agent did not answer at all: trying again may help.
    pub(crate) agent_absent: bool,
}

/// The body of an error answer, and the error of an operation.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ErrorBody {
    pub(crate) code: String,
    pub(crate) message: String,
    #[serde(default)]
    pub(crate) device: Option<String>,
    #[serde(default)]
    pub(crate) hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(outcome: Outcome, message: impl Into<String>) -> Self {
        Self { outcome, message: message.into(), hint: None, body: None, agent_absent: false }
    }

    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(Outcome::Failed, message)
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The agent can not be reached over its socket.
    pub(crate) fn agent_absent(message: impl Into<String>) -> Self {
        Self { agent_absent: true, ..Self::failed(message) }
    }

    /// The agent knows of no such thing.
    pub(crate) fn is_not_found(&self) -> bool {
        self.body.as_ref().is_some_and(|body| body["code"] == "not_found")
    }

    /// What the agent answered with an HTTP status that is no success.
    pub(crate) fn of_answer(status: u16, body: &[u8]) -> Self {
        let value: Option<Value> = serde_json::from_slice(body).ok();
        match value.as_ref().and_then(|value| serde_json::from_value::<ErrorBody>(value.clone()).ok()) {
            Some(error) => Self { body: value, ..Self::from(error) },
            None => {
                let text = String::from_utf8_lossy(body);
                Self::failed(format!("the agent answered with status {status}: {}", text.trim()))
            }
        }
    }

    /// Tells of it on standard error; the exit code.
    pub(crate) fn report(&self, json: bool) -> ExitCode {
        eprintln!("{}", self.text(json));
        ExitCode::from(self.outcome as u8)
    }

    fn text(&self, json: bool) -> String {
        if json {
            let own = || json!({"code": self.outcome.code(), "message": self.message, "hint": self.hint});
            return self.body.clone().unwrap_or_else(own).to_string();
        }
        match &self.hint {
            Some(hint) => format!("error: {}\nhint: {hint}", self.message),
            None => format!("error: {}", self.message),
        }
    }
}

impl From<ErrorBody> for Failure {
    fn from(error: ErrorBody) -> Self {
        let message = match &error.device {
            Some(device) if !error.message.contains(device.as_str()) => {
                format!("{device}: {}", error.message)
            }
            _ => error.message,
        };
        let outcome = Outcome::of_code(&error.code);
        Self { outcome, message, hint: error.hint, body: None, agent_absent: false }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::failed(error.to_string())
    }
}

impl From<HostNameError> for Failure {
    fn from(error: HostNameError) -> Self {
        Self::new(Outcome::Usage, error.to_string())
    }
}

impl From<PkiError> for Failure {
    fn from(error: PkiError) -> Self {
        Self::failed(error.to_string())
    }
}

impl From<JoinError> for Failure {
    fn from(error: JoinError) -> Self {
        let outcome = match &error {
            JoinError::Token(_) => Outcome::Usage,
            JoinError::Unreachable { .. } => Outcome::Unreachable,
            _ => Outcome::Failed,
        };
        Self::new(outcome, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_of_the_api_has_its_exit_code() {
        for (code, exit) in [
            ("failed", 1),
            ("not_found", 1),
            ("of a newer agent", 1),
            ("usage", 2),
            ("precheck", 3),
            ("cancelled", 4),
            ("fenced", 5),
            ("unreachable", 6),
        ] {
            assert_eq!(Outcome::of_code(code) as u8, exit, "{code}");
        }
    }

    #[test]
    fn an_error_answer_becomes_message_and_hint() {
        let body = br#"{"code":"fenced","message":"epoch 3 is over","device":"db","hint":"ask host-b"}"#;
        let failure = Failure::of_answer(409, body);
        assert_eq!(failure.outcome, Outcome::Fenced);
        assert_eq!(failure.text(false), "error: db: epoch 3 is over\nhint: ask host-b");
        assert_eq!(
            serde_json::from_str::<Value>(&failure.text(true)).unwrap(),
            serde_json::from_slice::<Value>(body).unwrap()
        );
    }

    #[test]
    fn an_answer_that_is_no_error_body_is_shown_with_its_status() {
        let failure = Failure::of_answer(404, b"no such page\n");
        assert_eq!(failure.text(false), "error: the agent answered with status 404: no such page");
        let own: Value = serde_json::from_str(&failure.text(true)).unwrap();
        assert_eq!(own["code"], "failed");
    }
}
