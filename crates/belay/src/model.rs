//! The agent's answers. Fields that this command does not know are ignored, so an agent may be newer.

use serde::Deserialize;

use crate::error::ErrorBody;

/// `GET /v1/status`.
#[derive(Debug, Deserialize)]
pub(crate) struct Status {
    pub(crate) host: String,
    pub(crate) version: String,
    #[serde(default)]
    pub(crate) devices: Vec<Device>,
    #[serde(default)]
    pub(crate) vms: Vec<Vm>,
    #[serde(default)]
    pub(crate) hosts: Vec<Host>,
    #[serde(default)]
    pub(crate) operations: Vec<Operation>,
}

/// A device.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Device {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) id: String,
    #[serde(default)]
    pub(crate) class: String,
    #[serde(default)]
    pub(crate) vm: Option<String>,
    #[serde(default)]
    pub(crate) size_bytes: u64,
    #[serde(default)]
    pub(crate) attached_to: Option<String>,
    #[serde(default)]
    pub(crate) backed_by: Option<String>,
    pub(crate) state: String,
    /// Why it cannot be served.
    #[serde(default)]
    pub(crate) trouble: Option<String>,
    #[serde(default)]
    pub(crate) offered_to: Option<String>,
    #[serde(default)]
    pub(crate) epoch: u64,
    #[serde(default)]
    pub(crate) socket: Option<String>,
    #[serde(default)]
    pub(crate) vmm_connected: bool,
    #[serde(default)]
    pub(crate) in_flight: u64,
    #[serde(default)]
    pub(crate) requests: u64,
    #[serde(default)]
    pub(crate) errors: u64,
    #[serde(default)]
    pub(crate) read_bytes: u64,
    #[serde(default)]
    pub(crate) written_bytes: u64,
    #[serde(default)]
    pub(crate) latency: Option<Latency>,
    /// Whether the connection to the backing host is up; none if no other host is involved.
    #[serde(default)]
    pub(crate) link_up: Option<bool>,
    #[serde(default)]
    pub(crate) exchange: Option<Exchange>,
    /// Why the last one stopped.
    #[serde(default)]
    pub(crate) exchange_stopped: Option<String>,
    /// Why its exchange cannot begin yet.
    #[serde(default)]
    pub(crate) exchange_waits: Option<String>,
}

/// How long requests took.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Latency {
    pub(crate) p50_us: u64,
    pub(crate) p99_us: u64,
    pub(crate) max_us: u64,
}

/// How far an exchange is.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Exchange {
    pub(crate) total_bytes: u64,
    pub(crate) local_bytes: u64,
    #[serde(default)]
    pub(crate) copied_bytes: u64,
    #[serde(default)]
    pub(crate) echoed_bytes: u64,
    #[serde(default)]
    pub(crate) skipped_bytes: u64,
}

/// A VM.
#[derive(Debug, Deserialize)]
pub(crate) struct Vm {
    pub(crate) name: String,
    pub(crate) state: String,
    #[serde(default)]
    pub(crate) pid: Option<u64>,
    #[serde(default)]
    pub(crate) qmp: Option<String>,
    #[serde(default)]
    pub(crate) devices: Vec<String>,
}

/// Another host.
#[derive(Debug, Deserialize)]
pub(crate) struct Host {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) addresses: Vec<String>,
}

/// A migration, or another operation that takes its time.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Operation {
    pub(crate) id: String,
    #[serde(default)]
    pub(crate) kind: String,
    #[serde(default)]
    pub(crate) vm: Option<String>,
    #[serde(default)]
    pub(crate) to: Option<String>,
    #[serde(default)]
    pub(crate) mode: Option<String>,
    pub(crate) state: OperationState,
    #[serde(default)]
    pub(crate) phase: Option<String>,
    #[serde(default)]
    pub(crate) abortable: bool,
    #[serde(default)]
    pub(crate) error: Option<ErrorBody>,
    #[serde(default)]
    pub(crate) checks: Vec<Check>,
    #[serde(default)]
    pub(crate) ram: Option<Ram>,
    #[serde(default)]
    pub(crate) devices: Vec<OperationDevice>,
    #[serde(default)]
    pub(crate) report: Option<Report>,
}

/// Where an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OperationState {
    Running,
    Done,
    Failed,
    Cancelled,
}

impl OperationState {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A check before a migration.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Check {
    pub(crate) name: String,
    pub(crate) ok: bool,
    #[serde(default)]
    pub(crate) message: String,
}

/// The VM's memory on its way, in bytes.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Ram {
    pub(crate) total: u64,
    #[serde(default)]
    pub(crate) transferred: u64,
    #[serde(default)]
    pub(crate) remaining: u64,
}

/// A device of the VM that migrates.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct OperationDevice {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) state: String,
    #[serde(default)]
    pub(crate) exchange: Option<Exchange>,
}

/// What a migration took.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Report {
    #[serde(default)]
    pub(crate) migration: Option<MigrationReport>,
    #[serde(default)]
    pub(crate) handover: Option<HandoverReport>,
}

/// The hypervisor's part of it, in milliseconds.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct MigrationReport {
    #[serde(default)]
    pub(crate) total_ms: Option<f64>,
    #[serde(default)]
    pub(crate) downtime_ms: Option<f64>,
    #[serde(default)]
    pub(crate) running_at_destination_ms: Option<f64>,
}

/// The devices' part of it.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct HandoverReport {
    #[serde(default)]
    pub(crate) requests_in_flight: Option<u64>,
    #[serde(default)]
    pub(crate) grant_ms: Option<f64>,
    #[serde(default)]
    pub(crate) gap_ms: Option<f64>,
}

/// A line of `GET /v1/events`.
#[derive(Debug, Deserialize)]
pub(crate) struct Event {
    #[serde(default)]
    pub(crate) time: serde_json::Value,
    #[serde(default)]
    pub(crate) kind: String,
    #[serde(default)]
    pub(crate) device: Option<String>,
    #[serde(default)]
    pub(crate) vm: Option<String>,
    #[serde(default)]
    pub(crate) phase: Option<String>,
    #[serde(default)]
    pub(crate) edge: Option<String>,
    #[serde(default)]
    pub(crate) duration_ms: Option<f64>,
    #[serde(default)]
    pub(crate) message: String,
}
