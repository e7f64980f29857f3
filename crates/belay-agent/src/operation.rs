//! Long work that callers follow: migrations.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::error::AgentError;
use crate::view::ExchangeView;

/// The phase of a migration that an earlier agent had begun.
pub(crate) const RECOVER: &str = "recover";

/// One check before the work.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Check {
    /// What was checked.
    pub name: String,
    /// Whether it allows the migration.
    pub ok: bool,
    /// What was found.
    pub message: String,
}

/// Progress of a VM's memory, in bytes.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RamView {
    /// In all.
    pub total: u64,
    /// Sent.
    pub transferred: u64,
    /// Still to send.
    pub remaining: u64,
}

/// A device of the operation.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct OperationDevice {
    /// Its name.
    pub name: String,
    /// Its state at the destination.
    pub state: String,
    /// Its exchange, while it is copied.
    pub exchange: Option<ExchangeView>,
}

/// What a migration measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Report {
    /// The VM's.
    pub migration: MigrationFigures,
    /// The devices': the worst of them.
    pub handover: HandoverReport,
}

/// Times of a VM's migration, in milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MigrationFigures {
    /// QEMU's total time.
    pub total_ms: u64,
    /// How long the guest stood still, as QEMU's source sees it.
    pub downtime_ms: u64,
    /// From the command to the guest running at the destination.
    pub running_at_destination_ms: f64,
}

/// Figures of a device's handover.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HandoverReport {
    /// Requests in flight at the switchover.
    pub requests_in_flight: u64,
    /// From the claim to the grant.
    pub grant_ms: f64,
    /// Last completion given to the guest by the source's agent to the first by the destination's; `null` if the
    /// hosts do not share a clock, or the guest had none.
    pub gap_ms: Option<f64>,
}

/// An operation as callers see it.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct OperationView {
    /// Its id.
    pub id: String,
    /// `migrate`, or `check`: a migration that was only checked.
    pub kind: String,
    /// The VM.
    pub vm: String,
    /// The destination.
    pub to: String,
    /// `follow` or `stay`.
    pub mode: String,
    /// `running`, `done`, `failed` or `cancelled`.
    pub state: String,
    /// Where it is: `precheck`, `prepare`, `memory`, `switchover`, `finish`; `recover`: the agent was restarted, and
    /// finds out where the VM is.
    pub phase: String,
    /// Whether it can still be taken back.
    pub abortable: bool,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<AgentError>,
    /// Checks before it began.
    pub checks: Vec<Check>,
    /// Its memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<RamView>,
    /// Its devices.
    pub devices: Vec<OperationDevice>,
    /// What was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<Report>,
}

/// A running or finished operation.
pub struct Operation {
    view: Mutex<OperationView>,
    abort: AtomicBool,
    pub(crate) abort_asked: Notify,
}

impl Operation {
    /// As callers see it.
    #[must_use]
    pub fn view(&self) -> OperationView {
        self.view.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut OperationView)) {
        change(&mut self.view.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    pub(crate) fn phase(&self, phase: &str, abortable: bool) {
        self.update(|view| {
            view.phase = phase.to_owned();
            view.abortable = abortable;
        });
    }

    pub(crate) fn wants_abort(&self) -> bool {
        self.abort.load(Ordering::SeqCst)
    }

    /// Asks for it to be taken back. `false`: too late.
    pub(crate) fn ask_abort(&self) -> bool {
        if !self.view().abortable {
            return false;
        }
        self.abort.store(true, Ordering::SeqCst);
        self.abort_asked.notify_waiters();
        true
    }
}

/// All operations since the agent started, and those that the one before it has left.
pub struct Operations {
    next: AtomicU64,
    all: Mutex<BTreeMap<u64, Arc<Operation>>>,
}

impl Default for Operations {
    /// Ids begin anywhere: whoever asks for one of an earlier agent must not get another one's.
    fn default() -> Self {
        Self { next: AtomicU64::new(u64::from(rand::random::<u32>())), all: Mutex::default() }
    }
}

impl Operations {
    /// The migration of a VM that is under way. Mere checks do not count.
    pub(crate) fn running(&self, vm: &str) -> Option<Arc<Operation>> {
        self.find(|view| view.vm == vm && view.state == "running")
    }

    /// The last migration of a VM to a host, if it was done.
    pub(crate) fn last_done(&self, vm: &str, to: &str) -> Option<Arc<Operation>> {
        let last = self.find(|view| view.vm == vm)?;
        let view = last.view();
        (view.to == to && view.state == "done").then_some(last)
    }

    fn find(&self, wanted: impl Fn(&OperationView) -> bool) -> Option<Arc<Operation>> {
        let all = self.all();
        all.into_iter().rev().find(|operation| {
            let view = operation.view();
            view.kind == "migrate" && wanted(&view)
        })
    }

    pub(crate) fn begin(&self, kind: &str, vm: &str, to: &str, mode: &str) -> Arc<Operation> {
        let number = self.next.fetch_add(1, Ordering::SeqCst) + 1;
        self.insert(number, kind, vm, to, mode)
    }

    /// A migration that an earlier agent had begun, under the id that its callers know.
    pub(crate) fn resume(&self, id: Option<u64>, vm: &str, to: &str, mode: &str) -> Arc<Operation> {
        let operation = match id {
            Some(id) => self.insert(id, "migrate", vm, to, mode),
            None => self.begin("migrate", vm, to, mode),
        };
        operation.phase(RECOVER, false);
        operation
    }

    fn insert(&self, number: u64, kind: &str, vm: &str, to: &str, mode: &str) -> Arc<Operation> {
        let view = OperationView {
            id: number.to_string(),
            kind: kind.to_owned(),
            vm: vm.to_owned(),
            to: to.to_owned(),
            mode: mode.to_owned(),
            state: "running".to_owned(),
            phase: "precheck".to_owned(),
            abortable: true,
            error: None,
            checks: Vec::new(),
            ram: None,
            devices: Vec::new(),
            report: None,
        };
        let operation = Arc::new(Operation {
            view: Mutex::new(view),
            abort: AtomicBool::new(false),
            abort_asked: Notify::new(),
        });
        self.all
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .insert(number, Arc::clone(&operation));
        operation
    }

    /// All of them, oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Operation>> {
        self.all.lock().unwrap_or_else(std::sync::PoisonError::into_inner).values().cloned().collect()
    }

    /// One of them.
    ///
    /// # Errors
    /// There is none with this id.
    pub fn get(&self, id: &str) -> Result<Arc<Operation>, AgentError> {
        let all = self.all.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        id.parse()
            .ok()
            .and_then(|number: u64| all.get(&number).cloned())
            .ok_or_else(|| AgentError::not_found(format!("there is no operation {id}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(operation: &Operation) -> u64 {
        operation.view().id.parse().unwrap()
    }

    /// They began at 1 with every agent: a caller that had waited for it followed the operation of another VM.
    #[test]
    fn ids_of_an_earlier_agent_are_not_given_again() {
        let (earlier, later) = (Operations::default(), Operations::default());
        let known = id(&earlier.begin("migrate", "vm1", "host-b", "follow"));
        let next = id(&later.begin("migrate", "vm2", "host-b", "follow"));
        assert_ne!(known, next);
        later.get(&known.to_string()).err().expect("one of an earlier agent");
        assert_eq!(id(&later.begin("check", "vm2", "host-b", "stay")), next + 1);
    }

    #[test]
    fn migration_that_an_earlier_agent_had_begun_keeps_its_id_and_cannot_be_taken_back() {
        let operations = Operations::default();
        let resumed = operations.resume(Some(7), "vm1", "host-b", "follow");
        assert_eq!(id(&resumed), 7);
        assert!(!resumed.ask_abort());
        assert_eq!(operations.running("vm1").map(|running| id(&running)), Some(7));
    }
}
