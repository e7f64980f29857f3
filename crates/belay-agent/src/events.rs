//! What has happened, for people and programs: kept in memory, followed over the API.

use std::collections::VecDeque;
use std::sync::Mutex;

use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::broadcast;

/// Events kept.
const KEPT: usize = 4096;

/// One event.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct Event {
    /// Grows by one.
    pub seq: u64,
    /// When, RFC 3339, UTC.
    pub time: String,
    /// What kind: `device`, `handover`, `exchange`, `migration`, `link`.
    pub kind: String,
    /// The device, if it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The VM, if it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// What happened.
    pub message: String,
}

/// The log of events.
pub struct Events {
    kept: Mutex<VecDeque<Event>>,
    sender: broadcast::Sender<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Self { kept: Mutex::default(), sender: broadcast::channel(1024).0 }
    }
}

impl Events {
    /// Notes an event.
    pub fn note(&self, kind: &str, device: Option<&str>, vm: Option<&str>, message: impl Into<String>) {
        let message = message.into();
        tracing::info!(kind, device, vm, "{message}");
        let mut kept = self.kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let event = Event {
            seq: kept.back().map_or(1, |last| last.seq + 1),
            time: OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default(),
            kind: kind.to_owned(),
            device: device.map(str::to_owned),
            vm: vm.map(str::to_owned),
            message,
        };
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(event.clone());
        let _ = self.sender.send(event);
    }

    /// What is kept, and what comes from now on.
    #[must_use]
    pub fn follow(&self) -> (Vec<Event>, broadcast::Receiver<Event>) {
        let kept = self.kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        (kept.iter().cloned().collect(), self.sender.subscribe())
    }
}
