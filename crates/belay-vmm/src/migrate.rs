//! A live migration: typed commands, and [`Tracker`], which tells from events and queries where it stands.
//!
//! The order (QEMU's, see `docs/devel/migration` there):
//!
//! ```text
//! source       Setup ─▶ Active ─▶ SourceStopped ─▶ [PreSwitchover] ────────────────▶ Completed
//!                 └────────┴────────────┴──────────────┴──────▶ Cancelled | Failed
//! destination  Setup ─▶ Active ───────────────────────────────▶ Resumed ───────────▶ Completed
//! ```

use crate::qmp::{Event, Qmp, QmpError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::time::Duration;

/// A migration capability that Belay sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Capability {
    /// `MIGRATION` events on every change. Wanted on both sides.
    Events,
    /// The destination answers: `completed` on the source then means that the destination runs. On both sides.
    ReturnPath,
    /// The source waits in `pre-switchover` for `migrate-continue`. On the source.
    PauseBeforeSwitchover,
    /// Skip zero pages' transfer of shared RAM: RAM in a file that both ends map. Only on one machine.
    IgnoreShared,
    /// Slow the guest down when it dirties memory faster than the link carries it. On the source.
    AutoConverge,
}

impl Capability {
    /// QEMU's name of it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::ReturnPath => "return-path",
            Self::PauseBeforeSwitchover => "pause-before-switchover",
            Self::IgnoreShared => "x-ignore-shared",
            Self::AutoConverge => "auto-converge",
        }
    }
}

/// What `query-status` says.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct RunState {
    /// Whether the guest's CPUs run.
    pub running: bool,
    /// `running`, `paused`, `inmigrate`, `postmigrate`, `prelaunch`, `shutdown`, …
    pub status: String,
}

/// A machine type of a QEMU.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct MachineInfo {
    /// Versioned name, such as `pc-q35-7.2`.
    pub name: String,
    /// What it is also called, such as `q35`.
    #[serde(default)]
    pub alias: Option<String>,
}

/// How far the memory is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RamProgress {
    /// Guest memory, bytes.
    pub total: u64,
    /// Bytes still to send; grows again when the guest writes.
    pub remaining: u64,
    /// Bytes sent.
    pub transferred: u64,
    /// Current rate, megabits per second.
    pub mbps: f64,
    /// How fast the guest dirties memory, pages per second.
    #[serde(rename = "dirty-pages-rate")]
    pub dirty_pages_rate: u64,
    /// Which pass over the memory this is.
    #[serde(rename = "dirty-sync-count")]
    pub dirty_sync_count: u64,
}

/// What `query-migrate` says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationInfo {
    /// QEMU's `MigrationStatus`; absent before the first migration.
    pub status: Option<String>,
    /// Progress of the memory; absent before it starts and on the destination.
    pub ram: Option<RamProgress>,
    /// Time since the start, or the whole time of a completed migration, ms.
    pub total_time: Option<u64>,
    /// How long the guest stood still, as the source sees it, ms; once completed.
    pub downtime: Option<u64>,
    /// How long it would stand still if stopped now, ms.
    pub expected_downtime: Option<u64>,
    /// Time the set-up took, ms.
    pub setup_time: Option<u64>,
    /// Why it failed.
    pub error_desc: Option<String>,
}

impl Qmp {
    /// Sets migration capabilities; those not named keep their value.
    ///
    /// # Errors
    ///
    /// QEMU's refusal (a migration is active, the capability is unknown), or the connection's end.
    pub async fn set_capabilities(&self, capabilities: &[(Capability, bool)]) -> Result<(), QmpError> {
        let list: Vec<Value> = capabilities
            .iter()
            .map(|(capability, state)| json!({ "capability": capability.name(), "state": state }))
            .collect();
        self.execute("migrate-set-capabilities", json!({ "capabilities": list })).await.map(drop)
    }

    /// Whether a migration capability is on.
    ///
    /// # Errors
    ///
    /// The connection's end.
    pub async fn has_capability(&self, capability: Capability) -> Result<bool, QmpError> {
        let all: Vec<Value> = self.query("query-migrate-capabilities").await?;
        Ok(all.iter().any(|entry| entry["capability"] == capability.name() && entry["state"] == true))
    }

    /// Sets the most that the migration may send, bytes per second (QEMU's default is only 128 MiB/s), and the
    /// longest standstill at which it switches over. Works while it runs. `None` leaves a value as it is.
    ///
    /// # Errors
    ///
    /// QEMU's refusal or the connection's end.
    pub async fn set_migration_limits(
        &self,
        max_bandwidth_bytes_s: Option<u64>,
        downtime: Option<Duration>,
    ) -> Result<(), QmpError> {
        let mut parameters = serde_json::Map::new();
        if let Some(bandwidth) = max_bandwidth_bytes_s {
            parameters.insert("max-bandwidth".into(), json!(bandwidth));
        }
        if let Some(downtime) = downtime {
            parameters.insert("downtime-limit".into(), json!(downtime.as_millis().min(2_000_000) as u64));
        }
        self.execute("migrate-set-parameters", Value::Object(parameters)).await.map(drop)
    }

    /// Destination: take the migration from `uri`, such as `tcp:10.0.0.2:49152` (listens there) or `fd:NAME` (see
    /// [`Qmp::give_descriptor`]). A VMM that
    /// knows how (QEMU ≥ 9.1) stays alive if the migration fails, so that its error can be asked for.
    ///
    /// # Errors
    ///
    /// QEMU's refusal (not started with `-incoming defer`, address in use), or the connection's end.
    pub async fn migrate_incoming(&self, uri: &str) -> Result<(), QmpError> {
        let version = self.version();
        let arguments = if (version.major, version.minor) >= (9, 1) {
            json!({ "uri": uri, "exit-on-error": false })
        } else {
            json!({ "uri": uri })
        };
        self.execute("migrate-incoming", arguments).await.map(drop)
    }

    /// Source: start the migration to `uri`. Returns when it has begun.
    ///
    /// # Errors
    ///
    /// QEMU's refusal (something in the VM cannot migrate), or the connection's end.
    pub async fn migrate(&self, uri: &str) -> Result<(), QmpError> {
        self.execute("migrate", json!({ "uri": uri })).await.map(drop)
    }

    /// Source: end a `pre-switchover` pause.
    ///
    /// # Errors
    ///
    /// QEMU's refusal (it is not in that state), or the connection's end.
    pub async fn migrate_continue(&self) -> Result<(), QmpError> {
        self.execute("migrate-continue", json!({ "state": "pre-switchover" })).await.map(drop)
    }

    /// Source: cancel. The guest goes on at the source; [`Phase::Cancelled`] tells when. Without effect if no
    /// migration is active.
    ///
    /// # Errors
    ///
    /// The connection's end.
    pub async fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.execute("migrate_cancel", json!({})).await.map(drop)
    }

    /// Where the migration stands.
    ///
    /// # Errors
    ///
    /// The connection's end.
    pub async fn query_migrate(&self) -> Result<MigrationInfo, QmpError> {
        self.query("query-migrate").await
    }

    /// Whether the guest runs.
    ///
    /// # Errors
    ///
    /// The connection's end.
    pub async fn query_status(&self) -> Result<RunState, QmpError> {
        self.query("query-status").await
    }

    /// The machine types of this QEMU.
    ///
    /// # Errors
    ///
    /// The connection's end.
    pub async fn query_machines(&self) -> Result<Vec<MachineInfo>, QmpError> {
        self.query("query-machines").await
    }

    /// Lets the guest run.
    ///
    /// # Errors
    ///
    /// QEMU's refusal (for one, after a migration has completed away from here), or the connection's end.
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.execute("cont", json!({})).await.map(drop)
    }

    /// Pauses the guest. Returns when every device's backend has stopped.
    ///
    /// # Errors
    ///
    /// The connection's end, or [`QmpError::Timeout`] if a backend does not stop.
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.execute("stop", json!({})).await.map(drop)
    }

    /// Hard reset of the guest.
    ///
    /// # Errors
    ///
    /// The connection's end.
    pub async fn system_reset(&self) -> Result<(), QmpError> {
        self.execute("system_reset", json!({})).await.map(drop)
    }

    /// Presses the guest's power button.
    ///
    /// # Errors
    ///
    /// The connection's end.
    pub async fn system_powerdown(&self) -> Result<(), QmpError> {
        self.execute("system_powerdown", json!({})).await.map(drop)
    }

    /// Ends the VMM. A connection that closes before the reply counts as done.
    ///
    /// # Errors
    ///
    /// [`QmpError::Timeout`] if it does not react.
    pub async fn quit(&self) -> Result<(), QmpError> {
        match self.execute("quit", json!({})).await {
            Ok(_) | Err(QmpError::Closed(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Which end of a migration a [`Tracker`] follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The VM leaves.
    Source,
    /// The VM arrives.
    Destination,
}

/// Where a migration stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "phase")]
pub enum Phase {
    /// Connecting, preparing.
    Setup,
    /// Memory is being copied while the guest runs.
    Active {
        /// How far it is.
        ram: RamProgress,
    },
    /// Source: the guest has stopped, its rings too.
    SourceStopped,
    /// Source: stopped, and waiting for `migrate-continue`.
    PreSwitchover,
    /// Destination: the guest runs.
    Resumed,
    /// The guest runs at the destination, and both ends know.
    Completed,
    /// It did not work; the guest is where it was.
    Failed {
        /// QEMU's words, as far as it has any.
        reason: String,
    },
    /// It was cancelled; the guest is where it was.
    Cancelled,
}

impl Phase {
    /// Whether nothing can follow.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Completed | Self::Failed { .. } | Self::Cancelled)
    }

    /// Phases only go forward; news that arrive late do not set them back.
    fn rank(&self) -> u8 {
        match self {
            Self::Setup => 0,
            Self::Active { .. } => 1,
            Self::SourceStopped => 2,
            Self::PreSwitchover => 3,
            Self::Resumed => 4,
            Self::Completed | Self::Failed { .. } | Self::Cancelled => 5,
        }
    }
}

/// Tells from events and query results where one migration stands. Does no I/O.
///
/// Create it when the migration is started, feed it everything, and act on what it returns.
#[derive(Clone, Debug)]
pub struct Tracker {
    side: Side,
    phase: Phase,
}

impl Tracker {
    /// A migration that is about to start.
    #[must_use]
    pub fn new(side: Side) -> Self {
        Self { side, phase: Phase::Setup }
    }

    /// The phase it is in.
    #[must_use]
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// An event arrived. Returns the new phase if it is another one.
    ///
    /// A `failed` event carries no reason: [`wants_reason`](Self::wants_reason) then asks for a query.
    pub fn on_event(&mut self, event: &Event) -> Option<&Phase> {
        let next = match (event.name.as_str(), self.side) {
            ("MIGRATION", _) => self.of_status(event.data.get("status").and_then(Value::as_str)?, None, None),
            ("STOP", Side::Source) => Some(Phase::SourceStopped),
            ("RESUME", Side::Destination) => Some(Phase::Resumed),
            _ => None,
        };
        self.advance(next?)
    }

    /// `query-migrate` was answered. Returns the phase if it is another one, or if its progress is.
    pub fn on_query(&mut self, info: &MigrationInfo) -> Option<&Phase> {
        let reason = info.error_desc.as_deref();
        if let (Phase::Failed { reason: known }, Some(reason)) = (&mut self.phase, reason)
            && known.is_empty()
        {
            reason.clone_into(known);
            return Some(&self.phase);
        }
        let next = self.of_status(info.status.as_deref()?, info.ram, reason)?;
        self.advance(next)
    }

    /// The VMM is gone (its QMP connection closed) before the migration ended.
    pub fn on_vmm_lost(&mut self, why: &str) -> Option<&Phase> {
        self.advance(Phase::Failed { reason: format!("the VMM is gone: {why}") })
    }

    /// Whether it failed and QEMU's reason is not known yet: `query-migrate` tells it.
    #[must_use]
    pub fn wants_reason(&self) -> bool {
        matches!(&self.phase, Phase::Failed { reason } if reason.is_empty())
    }

    fn of_status(&self, status: &str, ram: Option<RamProgress>, reason: Option<&str>) -> Option<Phase> {
        Some(match status {
            "setup" | "wait-unplug" => Phase::Setup,
            "active" | "postcopy-active" | "colo" => Phase::Active {
                ram: ram.unwrap_or(match &self.phase {
                    Phase::Active { ram } => *ram,
                    _ => RamProgress::default(),
                }),
            },
            "pre-switchover" => Phase::PreSwitchover,
            "device" => match self.side {
                Side::Source => Phase::SourceStopped,
                Side::Destination => return None,
            },
            "completed" => Phase::Completed,
            "failed" => Phase::Failed { reason: reason.unwrap_or_default().to_owned() },
            "cancelled" => Phase::Cancelled,
            // `none`, `cancelling` and what later QEMUs invent: something that is known follows.
            _ => return None,
        })
    }

    fn advance(&mut self, next: Phase) -> Option<&Phase> {
        let forward = next.rank() > self.phase.rank();
        let progress = matches!((&self.phase, &next), (Phase::Active { ram: old }, Phase::Active { ram: new }) if old != new);
        if self.phase.is_final() || !(forward || progress) {
            return None;
        }
        self.phase = next;
        Some(&self.phase)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, data: Value) -> Event {
        Event { name: name.into(), data, timestamp_us: 0 }
    }

    fn status(status: &str) -> Event {
        event("MIGRATION", json!({ "status": status }))
    }

    fn info(value: Value) -> MigrationInfo {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn source_goes_through_all_phases_and_not_back() {
        let mut tracker = Tracker::new(Side::Source);
        assert_eq!(tracker.on_event(&status("setup")), None);
        assert!(matches!(tracker.on_event(&status("active")), Some(Phase::Active { .. })));
        let progress =
            info(json!({ "status": "active", "ram": { "total": 100, "remaining": 40, "transferred": 60,
            "mbps": 12.5, "dirty-pages-rate": 3, "normal": 9 }, "total-time": 5 }));
        assert!(matches!(tracker.on_query(&progress), Some(Phase::Active { ram }) if ram.remaining == 40));
        assert_eq!(tracker.on_query(&progress), None);
        assert_eq!(tracker.on_event(&event("STOP", json!({}))), Some(&Phase::SourceStopped));
        assert_eq!(tracker.on_query(&progress), None, "an older answer must not set it back");
        assert_eq!(tracker.on_event(&status("pre-switchover")), Some(&Phase::PreSwitchover));
        assert_eq!(tracker.on_event(&status("device")), None);
        assert_eq!(tracker.on_event(&status("completed")), Some(&Phase::Completed));
        assert_eq!(tracker.on_vmm_lost("quit"), None);
    }

    #[test]
    fn destination_resumes_then_completes() {
        let mut tracker = Tracker::new(Side::Destination);
        assert!(tracker.on_event(&status("active")).is_some());
        assert_eq!(tracker.on_event(&event("STOP", json!({}))), None);
        assert_eq!(tracker.on_event(&event("RESUME", json!({}))), Some(&Phase::Resumed));
        assert_eq!(tracker.on_event(&status("completed")), Some(&Phase::Completed));
    }

    #[test]
    fn cancel_after_the_stop_ends_cancelled() {
        let mut tracker = Tracker::new(Side::Source);
        tracker.on_event(&status("active"));
        tracker.on_event(&event("STOP", json!({})));
        tracker.on_event(&status("pre-switchover"));
        assert_eq!(tracker.on_event(&status("cancelling")), None);
        assert_eq!(tracker.on_event(&event("RESUME", json!({}))), None);
        assert_eq!(tracker.on_event(&status("cancelled")), Some(&Phase::Cancelled));
    }

    #[test]
    fn failure_gets_its_reason_from_the_query() {
        let mut tracker = Tracker::new(Side::Source);
        assert!(tracker.on_event(&status("failed")).is_some());
        assert!(tracker.wants_reason());
        let failed = info(json!({ "status": "failed", "error-desc": "Connection refused" }));
        let reason = Phase::Failed { reason: "Connection refused".into() };
        assert_eq!(tracker.on_query(&failed), Some(&reason));
        assert!(!tracker.wants_reason());
        assert_eq!(tracker.on_query(&failed), None);
    }

    #[test]
    fn vmm_that_vanishes_fails_the_migration() {
        let mut tracker = Tracker::new(Side::Source);
        tracker.on_event(&status("active"));
        assert!(matches!(tracker.on_vmm_lost("killed"), Some(Phase::Failed { .. })));
    }

    #[test]
    fn answer_before_any_migration_is_empty() {
        assert_eq!(info(json!({})), MigrationInfo::default());
        assert_eq!(Tracker::new(Side::Source).on_query(&MigrationInfo::default()), None);
    }
}
