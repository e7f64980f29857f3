//! Devices as callers of the API and other agents see them.

use belay_attach::Snapshot;
use serde::{Deserialize, Serialize};

use crate::agent::Agent;
use crate::device::Managed;
use crate::ledger::RoleRecord;

/// Progress of an exchange, in bytes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ExchangeView {
    /// Of the device.
    pub total_bytes: u64,
    /// Here already.
    pub local_bytes: u64,
    /// Fetched.
    pub copied_bytes: u64,
    /// Written by the guest to both sides.
    pub echoed_bytes: u64,
    /// Not sent, being holes or zeroes.
    pub skipped_bytes: u64,
}

/// Latency of guest requests, in microseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LatencyView {
    /// Median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// Longest.
    pub max_us: u64,
}

/// A device.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeviceView {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// `block`.
    pub class: String,
    /// Its VM.
    pub vm: Option<String>,
    /// Capacity in bytes.
    pub size_bytes: u64,
    /// The host with the guest.
    pub attached_to: String,
    /// The host with the backing.
    pub backed_by: String,
    /// `local`, `offered`, `parked`, `granting`, `lent`, `prepared`, `claiming`, `remote`, `failed`.
    pub state: String,
    /// Why it cannot be served; its VM's I/O waits.
    #[serde(default)]
    pub trouble: Option<String>,
    /// The host that may take it.
    pub offered_to: Option<String>,
    /// How often its attachment has moved.
    pub epoch: u64,
    /// Where its VMM connects.
    pub socket: String,
    /// Whether a VMM is connected.
    pub vmm_connected: bool,
    /// Guest requests in flight.
    pub in_flight: u64,
    /// Guest requests completed here.
    pub requests: u64,
    /// Of these, with an error.
    pub errors: u64,
    /// Bytes read by the guest.
    pub read_bytes: u64,
    /// Bytes written by the guest.
    pub written_bytes: u64,
    /// Latency since the agent has the device.
    pub latency: LatencyView,
    /// Whether the connection to the backing's host is up; none if the backing is here.
    pub link_up: Option<bool>,
    /// Requests executed for another host's guest.
    pub served: u64,
    /// Last completion given to the guest, monotonic clock of the host, ns.
    pub last_completion_ns: u64,
    /// First completion after the rings last started, same clock, ns.
    pub first_completion_ns: u64,
    /// When the rings last stopped, same clock, ns.
    pub rings_stopped_ns: u64,
    /// Its exchange, while it runs.
    pub exchange: Option<ExchangeView>,
    /// Why the last one here stopped before its end; none once another one begins.
    #[serde(default)]
    pub exchange_stopped: Option<String>,
    /// Why its exchange cannot begin yet; it is tried again.
    #[serde(default)]
    pub exchange_waits: Option<String>,
    /// The last exchange that ended here.
    pub last_exchange: Option<ExchangeView>,
}

/// The exchange of a snapshot.
#[must_use]
pub fn exchange_view(progress: belay_attach::ExchangeProgress) -> ExchangeView {
    ExchangeView {
        total_bytes: progress.total_bytes,
        local_bytes: progress.local_bytes,
        copied_bytes: progress.copied_bytes,
        echoed_bytes: progress.echoed_bytes,
        skipped_bytes: progress.skipped_bytes,
    }
}

/// A device, described.
#[must_use]
pub fn device_view(agent: &Agent, device: &Managed) -> DeviceView {
    let record = device.record();
    let snapshot: Snapshot = device.snapshot();
    let here = agent.host();
    let (attached_to, backed_by) = match &record.role {
        RoleRecord::Local { .. } => (here.clone(), here),
        RoleRecord::Lent { to, .. } => (to.clone(), here),
        RoleRecord::Prepared { from, .. } => (from.clone(), from.clone()),
        RoleRecord::Remote { backing, .. }
        | RoleRecord::Exchanging { backing, .. }
        | RoleRecord::Cutting { backing, .. } => (here, backing.clone()),
        RoleRecord::Tombstone { moved_to, .. } => (moved_to.clone(), moved_to.clone()),
    };
    let belay_wire::device::DeviceClass::Block(geometry) = &record.identity.class;
    let state = match snapshot.state {
        // Its thread has said nothing yet.
        "" => match &record.role {
            RoleRecord::Local { .. } if record.offered.is_some() => "offered",
            RoleRecord::Local { .. } => "local",
            RoleRecord::Lent { .. } => "lent",
            RoleRecord::Prepared { .. } => "prepared",
            RoleRecord::Remote { .. } | RoleRecord::Exchanging { .. } | RoleRecord::Cutting { .. } => {
                "remote"
            }
            RoleRecord::Tombstone { .. } => "gone",
        },
        "copying" | "cutting" => "remote",
        state => state,
    };
    let trouble = device.trouble();
    let link_up = (backed_by != agent.host()).then_some(snapshot.link_up);
    DeviceView {
        id: record.identity.id.to_string(),
        class: "block".to_owned(),
        vm: record.identity.vm.clone().or_else(|| agent.vms.user_of(&record.identity.name)),
        size_bytes: geometry.size_bytes,
        attached_to,
        backed_by,
        state: if trouble.is_some() { "failed".to_owned() } else { state.to_owned() },
        trouble,
        offered_to: record.offered.map(|offer| offer.to),
        epoch: record.epoch.0,
        socket: agent.config.device_socket(&record.identity.name).display().to_string(),
        vmm_connected: snapshot.vmm_connected,
        in_flight: snapshot.in_flight,
        requests: snapshot.requests,
        errors: snapshot.errors,
        read_bytes: snapshot.read_bytes,
        written_bytes: snapshot.written_bytes,
        latency: LatencyView {
            p50_us: snapshot.latency.p50_us,
            p99_us: snapshot.latency.p99_us,
            max_us: snapshot.latency.max_us,
        },
        link_up,
        served: snapshot.served,
        last_completion_ns: snapshot.last_completion_ns,
        first_completion_ns: snapshot.first_completion_ns,
        rings_stopped_ns: snapshot.rings_stopped_ns,
        exchange: snapshot.exchange.map(exchange_view),
        exchange_stopped: device.copy_stopped(),
        exchange_waits: device.exchange_waits(),
        last_exchange: snapshot.last_exchange.map(exchange_view),
        name: record.identity.name,
    }
}
