//! A VM's migration, as the source's agent conducts it.
//!
//! ```text
//!   precheck ─▶ prepare ─▶ memory ─▶ switchover ─▶ finish
//!       └───────────┴─────────┴───────────┴── failure or abort: the VM goes on here
//! ```
//! Whether the devices have moved is not decided here, but in their handovers: the destination's rings start, it
//! claims, this host's ledger grants. This conducts QEMU; `Leaving` brings it to an end at one of the hosts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use belay_attach::Notice;
use belay_vmm::{Capability, MigrationInfo, Qmp, QmpError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::broadcast;

use crate::adopt::{VmCheck, VmChecked};
use crate::agent::Agent;
use crate::device::Managed;
use crate::error::AgentError;
use crate::leaving::{Leaving, POLL};
use crate::ledger::{MigratingRecord, Mode, RoleRecord};
use crate::operation::{
    Check, HandoverReport, MigrationFigures, Operation, OperationDevice, RamView, Report,
};
use crate::peer::{DeviceQuery, DeviceState, Done, HelloAnswer, StartIncoming};

/// Limit of a VM's memory transfer where the configuration has none, in bytes per second.
const MEMORY_BANDWIDTH: u64 = 4 << 30;
/// How long a migration waits for the end of what an earlier agent has begun.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);
/// How often the destination is asked for the exchange's progress.
const FOLLOW_POLL: Duration = Duration::from_millis(300);

/// From here on QEMU's TCG loses no write of the guest in a pass over the memory, whoever has started it. VMs that Belay
/// starts have memory of a size that earlier versions handle as well ([`belay_vmm::QemuCommand`]); for others each
/// further pass would be a danger.
const PASSES_ARE_SAFE: (u32, u32) = (9, 0);
/// The longest standstill that a migration tries for at first, and the longest that it comes to (QEMU's default).
const DOWNTIME_AT_FIRST: Duration = Duration::from_millis(30);
const DOWNTIME_AT_MOST: Duration = Duration::from_millis(300);
/// Passes over the memory before it gives in, and between two doublings.
const SHORT_PASSES: u64 = 4;
const PASSES_PER_DOUBLING: u64 = 2;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// The VM.
    pub vm: String,
    /// The destination.
    pub to: String,
    /// What becomes of the disks.
    pub mode: Mode,
    /// Limit of the memory transfer, in bytes per second.
    pub bandwidth: Option<u64>,
}

struct Migration {
    leaving: Leaving,
    operation: Arc<Operation>,
    request: Request,
    began: Instant,
    /// How many notices each device had given when it had been offered.
    marks: Vec<u64>,
}

/// What QEMU measured.
struct Moved {
    total_ms: u64,
    downtime_ms: u64,
    running_ms: f64,
}

impl Agent {
    /// Checks, and unless `dry_run` migrates in the background.
    ///
    /// # Errors
    /// There is no such VM, or the destination is not known.
    pub async fn migrate(
        self: &Arc<Self>,
        request: Request,
        dry_run: bool,
    ) -> Result<Arc<Operation>, AgentError> {
        self.settled(&request.vm).await?;
        let vm = match self.vms.get(&request.vm) {
            Ok(vm) => vm,
            // The same command again, after the VM has left: its disks may still be on their way.
            Err(error) => {
                return self.operations.last_done(&request.vm, &request.to).filter(|_| !dry_run).ok_or(error);
            }
        };
        if let Some(running) = self.operations.running(&request.vm) {
            // The same command again: follow the one that runs.
            if running.view().to == request.to && !dry_run {
                return Ok(running);
            }
            let message = format!("VM {} is being migrated to {}", request.vm, running.view().to);
            return Err(AgentError::precheck(message)
                .hint(format!("`belay operation {}` tells how it goes", running.view().id)));
        }
        if request.to == self.host() {
            return Err(AgentError::precheck(format!("VM {} is on host {} already", request.vm, request.to)));
        }
        self.client(&request.to)?;
        let devices =
            vm.record.devices.iter().map(|name| self.device(name)).collect::<Result<Vec<_>, _>>()?;
        let kind = if dry_run { "check" } else { "migrate" };
        let operation = self.operations.begin(kind, &request.vm, &request.to, request.mode.name());
        let (agent, to) = (Arc::clone(self), request.to.clone());
        let migration = Migration {
            leaving: Leaving { agent, vm, to, devices, departure: None, ran: false },
            operation: Arc::clone(&operation),
            request,
            began: Instant::now(),
            marks: Vec::new(),
        };
        // In a task of its own: it comes to an end also if the caller goes away meanwhile.
        let checked = tokio::spawn(migration.check_then_conduct(dry_run)).await;
        checked.map_err(|error| AgentError::failed(error.to_string()))?;
        Ok(operation)
    }

    /// Waits until it is known how a migration has ended that an earlier agent had begun.
    async fn settled(&self, vm: &str) -> Result<(), AgentError> {
        let Ok(vm) = self.vms.get(vm) else { return Ok(()) };
        let settled = tokio::time::timeout(SETTLED_WITHIN, vm.settling.lock()).await;
        settled.map(drop).map_err(|_| {
            let message =
                format!("a migration of VM {} that was interrupted has not ended yet", vm.record.name);
            AgentError::precheck(message).hint("`belay events` tells what it waits for")
        })
    }
}

impl Migration {
    async fn call<Q: Serialize + Sync, A: DeserializeOwned>(
        &self,
        limit_s: u64,
        method: &str,
        request: &Q,
    ) -> Result<A, AgentError> {
        self.leaving.agent.call_host(&self.request.to, Duration::from_secs(limit_s), method, request).await
    }

    fn check(&self, name: &str, outcome: Result<String, AgentError>) -> Result<(), AgentError> {
        let (ok, message) = match &outcome {
            Ok(message) => (true, message.clone()),
            Err(error) => (false, error.message.clone()),
        };
        self.operation.update(|view| view.checks.push(Check { name: name.to_owned(), ok, message }));
        outcome.map(drop)
    }

    /// Returns when the checks are over; the migration itself goes on in the background.
    async fn check_then_conduct(self, dry_run: bool) {
        let checked = match self.precheck().await {
            Ok(()) => self.abort_point(),
            refused => refused,
        };
        if !dry_run && checked.is_ok() {
            tokio::spawn(self.conduct());
            return;
        }
        self.operation.update(|view| {
            view.abortable = false;
            view.state = match &checked {
                Ok(()) => "done".to_owned(),
                Err(error) if error.code == "cancelled" => "cancelled".to_owned(),
                Err(_) => "failed".to_owned(),
            };
            view.error = checked.err();
        });
    }

    /// Everything that can be known before; nothing is changed. All is looked at, and the first refusal returned.
    async fn precheck(&self) -> Result<(), AgentError> {
        let hello: Result<HelloAnswer, AgentError> = self.call(10, "hello", &Done {}).await;
        let reached = hello.as_ref().map(|hello| format!("{} answers, belay {}", hello.host, hello.version));
        self.check("destination", reached.map_err(Clone::clone))?;
        let mut refusal = None;
        let mut keep = |outcome: Result<(), AgentError>| refusal = refusal.take().or(outcome.err());
        let spec = self.leaving.vm.spec();
        keep(self.check(
            "vm",
            spec.as_ref().map(|spec| format!("machine {}", spec.machine)).map_err(Clone::clone),
        ));
        if spec.is_ok() {
            for check in self.checked_there().await? {
                let outcome =
                    if check.ok { Ok(check.message) } else { Err(AgentError::precheck(check.message)) };
                keep(self.check(&check.name, outcome));
            }
        }
        for device in &self.leaving.devices {
            let name = device.name();
            let offer =
                self.leaving.agent.offer_device(device, &self.request.to, self.request.mode, true).await;
            let fits = offer.map(|_| format!("{name} is here, host {} has room for it", self.request.to));
            let fits = fits.map_err(|error| match error.code.as_str() {
                "failed" => AgentError { code: "precheck".to_owned(), ..error },
                _ => error,
            });
            keep(self.check(&format!("device {name}"), fits));
        }
        refusal.map_or(Ok(()), Err)
    }

    /// What the destination says about the VM.
    async fn checked_there(&self) -> Result<Vec<Check>, AgentError> {
        let qemu = self.leaving.vm.qmp().await?.version().to_string();
        let spec = self.leaving.vm.record.spec.clone().unwrap_or_default();
        // Long enough for a trial of KVM there.
        let checked: VmChecked = self.call(40, "check_vm", &VmCheck { spec, qemu }).await?;
        Ok(checked.checks)
    }

    async fn conduct(mut self) {
        self.leaving.note(format!("to {} begins", self.request.to));
        let error = match self.attempt().await {
            Ok(moved) => {
                self.operation.phase("finish", false);
                return self.done(moved).await;
            }
            Err(error) => error,
        };
        self.operation.phase("finish", false);
        self.leaving.note(format!("is being taken back: {error}"));
        if !self.leaving.end().await {
            let running_ms = self.began.elapsed().as_secs_f64() * 1e3;
            self.leaving.note(format!("was too late to be taken back: runs at {}", self.request.to));
            return self.ended(Moved { total_ms: 0, downtime_ms: 0, running_ms }).await;
        }
        self.leaving.note(format!("is off: {error}"));
        self.operation.update(|view| {
            view.state = if error.code == "cancelled" { "cancelled".to_owned() } else { "failed".to_owned() };
            view.error = Some(error);
        });
    }

    /// The VM and its devices are there.
    async fn done(&self, moved: Moved) {
        let handover = self.figures().await;
        self.leaving.finish().await;
        self.report(moved, handover).await;
    }

    /// As [`Migration::done`], if it has been finished already.
    async fn ended(&self, moved: Moved) {
        let handover = self.figures().await;
        self.report(moved, handover).await;
    }

    async fn report(&self, moved: Moved, handover: HandoverReport) {
        self.leaving.note(format!(
            "runs at {} after {:.0} ms, downtime {} ms, {} requests in flight",
            self.request.to, moved.running_ms, moved.downtime_ms, handover.requests_in_flight
        ));
        let migration = MigrationFigures {
            total_ms: moved.total_ms,
            downtime_ms: moved.downtime_ms,
            running_at_destination_ms: moved.running_ms,
        };
        self.operation.update(|view| {
            view.report = Some(Report { migration, handover });
            view.state = "done".to_owned();
            view.phase = "done".to_owned();
            view.abortable = false;
        });
        self.follow().await;
    }

    async fn attempt(&mut self) -> Result<Moved, AgentError> {
        self.operation.phase("prepare", true);
        let qmp = self.leaving.vm.qmp().await?;
        let ran = qmp.query_status().await.map_err(|error| self.failed(&error))?.running;
        self.leaving.ran = ran;
        // First of all: an agent that finds one of the offers after a restart shall know what it is for.
        let (to, mode) = (self.request.to.clone(), self.request.mode);
        let way = MigratingRecord { to, ran, mode, operation: self.operation.view().id.parse().ok() };
        self.leaving.agent.mark_migrating(&self.leaving.vm, Some(way)).await?;
        if ran {
            self.leave_together();
        }
        for device in &self.leaving.devices {
            self.leaving.agent.offer_device(device, &self.request.to, self.request.mode, false).await?;
            self.abort_point()?;
        }
        self.marks = self.leaving.devices.iter().map(|device| device.mark()).collect();
        let spec = self.leaving.vm.record.spec.clone().unwrap_or_default();
        let _: Done = self.call(60, "start_incoming", &StartIncoming { spec }).await?;
        self.abort_point()?;
        self.operation.phase("memory", true);
        let moved = self.move_memory(&qmp).await?;
        if ran {
            self.leaving.give_unused();
            self.leaving.wait_moved(None, true).await?;
        }
        Ok(moved)
    }

    /// Its disks that are backed here are granted by one write. A VM that stands still claims nothing until it runs
    /// again, which may be long after; its disks follow one by one.
    fn leave_together(&mut self) {
        let own =
            self.leaving.devices.iter().filter(|device| matches!(device.role(), RoleRecord::Local { .. }));
        let own: Vec<_> = own.map(|device| device.identity().id).collect();
        if !own.is_empty() {
            let held = own.len() < self.leaving.devices.len();
            self.leaving.departure = Some(self.leaving.agent.open_departure(&self.request.to, own, held));
        }
    }

    fn abort_point(&self) -> Result<(), AgentError> {
        if self.operation.wants_abort() {
            Err(AgentError::cancelled("the migration was taken back"))
        } else {
            Ok(())
        }
    }

    fn failed(&self, error: &QmpError) -> AgentError {
        AgentError::failed(format!("VM {}: {error}", self.request.vm))
    }

    /// QEMU's part. QEMU stops before the switchover and lets go of the VM when this agent says so: until then
    /// nothing can run at the destination. (If that capability is on already, somebody else will say so.)
    async fn move_memory(&self, qmp: &Qmp) -> Result<Moved, AgentError> {
        let failed = |error| self.failed(&error);
        let configured = self.leaving.agent.config.vmm.migration_bandwidth_bytes_per_s;
        let bandwidth =
            self.request.bandwidth.unwrap_or(if configured > 0 { configured } else { MEMORY_BANDWIDTH });
        let pause = Capability::PauseBeforeSwitchover;
        let others = qmp.has_capability(pause).await.map_err(failed)?;
        let wanted = [(Capability::Events, true), (Capability::ReturnPath, true), (pause, true)];
        qmp.set_capabilities(&wanted).await.map_err(failed)?;
        let version = qmp.version();
        let own = self.leaving.vm.spec().is_ok_and(|spec| spec.adopted.is_none());
        let safe = own || (version.major, version.minor) >= PASSES_ARE_SAFE;
        let limit = |passes| if safe { downtime_limit(passes) } else { DOWNTIME_AT_MOST };
        let mut downtime = limit(0);
        qmp.set_migration_limits(Some(bandwidth), Some(downtime)).await.map_err(failed)?;
        let mut events = qmp.events();
        self.leaving.agent.send_memory(qmp, &self.request.vm, &self.request.to).await?;
        let mut let_go = false;
        loop {
            let info = qmp.query_migrate().await.map_err(failed)?;
            if let Some(ram) = info.ram {
                let wanted = limit(ram.dirty_sync_count);
                if wanted > downtime {
                    downtime = wanted;
                    qmp.set_migration_limits(None, Some(downtime)).await.map_err(failed)?;
                }
                let ram =
                    RamView { total: ram.total, transferred: ram.transferred, remaining: ram.remaining };
                self.operation.update(|view| view.ram = Some(ram));
            }
            match info.status.as_deref().unwrap_or_default() {
                "completed" => {
                    let running_ms = self.began.elapsed().as_secs_f64() * 1e3;
                    let info = measured(qmp, info).await;
                    return Ok(Moved {
                        total_ms: info.total_time.unwrap_or(0),
                        downtime_ms: info.downtime.unwrap_or(0),
                        running_ms,
                    });
                }
                "failed" => {
                    let reason = info.error_desc.unwrap_or_else(|| "QEMU gives no reason".to_owned());
                    return Err(AgentError::failed(format!(
                        "VM {}: the migration failed: {reason}",
                        self.request.vm
                    )));
                }
                "cancelled" => return Err(AgentError::cancelled("the migration was cancelled")),
                "pre-switchover" if !let_go => {
                    self.may_go_on()?;
                    self.operation.phase("switchover", others);
                    if !others {
                        // An abort that was asked for meanwhile comes too late: see `ask_abort`.
                        self.abort_point()?;
                        let_go = true;
                        qmp.migrate_continue().await.map_err(failed)?;
                    }
                }
                "device" => self.operation.phase("switchover", false),
                _ if !let_go => self.may_go_on()?,
                _ => {}
            }
            changed(&mut events).await;
        }
    }

    /// Before QEMU lets go of the VM: whether the migration may go on.
    fn may_go_on(&self) -> Result<(), AgentError> {
        self.abort_point()?;
        for (device, mark) in self.leaving.devices.iter().zip(&self.marks) {
            let name = device.name();
            let to = &self.request.to;
            if device.has_said(
                *mark,
                |notice| matches!(notice, Notice::Link { peer, up: false, .. } if peer == to),
            ) {
                return Err(AgentError::unreachable(format!(
                    "device {name}: the connection to {to} was lost"
                )));
            }
            if device.has_said(*mark, |notice| matches!(notice, Notice::Vmm { connected: false, .. })) {
                return Err(AgentError::failed(format!("device {name}: the VM's connection to it was lost")));
            }
        }
        Ok(())
    }

    /// What the destination measured; the gap is that of hosts that share a clock, as in a demonstration.
    async fn figures(&self) -> HandoverReport {
        let mut report = HandoverReport::default();
        for device in &self.leaving.devices {
            let state = self.first_completion(device).await;
            let Some(state) = state else { continue };
            let here = *device.figures.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            report.requests_in_flight += here.requests_in_flight;
            report.grant_ms = report.grant_ms.max(state.figures.grant_ms);
            let (last, first) = (device.snapshot().last_completion_ns, state.view.first_completion_ns);
            if last > 0 && first > last {
                let gap = (first - last) as f64 / 1e6;
                report.gap_ms = Some(report.gap_ms.map_or(gap, |present: f64| present.max(gap)));
            }
        }
        report
    }

    /// The device's state at the destination once its guest has had a completion there (or has none to wait for).
    async fn first_completion(&self, device: &Managed) -> Option<DeviceState> {
        let query = DeviceQuery { id: device.identity().id };
        // A disk that its guest has not used here is not waited for.
        let used = device.snapshot().last_completion_ns > 0;
        let deadline = Instant::now() + Duration::from_secs(if used { 3 } else { 0 });
        loop {
            let state: Option<DeviceState> = self.call(5, "device_state", &query).await.ok();
            let there = state.as_ref().is_some_and(|state| state.view.first_completion_ns > 0);
            if there || Instant::now() > deadline {
                return state;
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Shows the exchange at the destination for as long as it runs.
    async fn follow(&self) {
        if self.request.mode != Mode::Follow {
            return;
        }
        let mut silent = 0;
        while silent < 100 {
            let mut running = false;
            let mut devices = Vec::new();
            for device in &self.leaving.devices {
                let query = DeviceQuery { id: device.identity().id };
                let state: Result<DeviceState, AgentError> = self.call(5, "device_state", &query).await;
                match state {
                    Ok(state) => {
                        silent = 0;
                        running |= state.view.state == "remote";
                        let exchange = state.view.exchange.or(state.view.last_exchange);
                        devices.push(OperationDevice {
                            name: state.view.name,
                            state: state.view.state,
                            exchange,
                        });
                    }
                    Err(_) => {
                        silent += 1;
                        running = true;
                    }
                }
            }
            if !devices.is_empty() {
                self.operation.update(|view| view.devices = devices);
            }
            if !running {
                return;
            }
            tokio::time::sleep(FOLLOW_POLL).await;
        }
    }
}

/// A completed migration, with its times: for a moment QEMU says that it has completed and that it took no time.
async fn measured(qmp: &Qmp, mut info: MigrationInfo) -> MigrationInfo {
    for _ in 0..20 {
        if info.total_time.unwrap_or(0) > 0 {
            break;
        }
        tokio::time::sleep(POLL / 10).await;
        match qmp.query_migrate().await {
            Ok(later) => info = later,
            Err(_) => break,
        }
    }
    info
}

/// Waits until QEMU says that the migration has got further, or for a while.
async fn changed(events: &mut broadcast::Receiver<belay_vmm::Event>) {
    let further = async {
        loop {
            match events.recv().await {
                Ok(event) if event.name == "MIGRATION" => return,
                Ok(_) => {}
                Err(broadcast::error::RecvError::Lagged(_)) => return,
                Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            }
        }
    };
    let _ = tokio::time::timeout(POLL, further).await;
}

/// How long the VM may stand still for the rest of its memory, after so many passes over it. QEMU's own limit would be
/// used up at once: it switches over as soon as the rest fits. Most guests fit a tenth of it after a pass or two.
fn downtime_limit(passes: u64) -> Duration {
    let doublings = (passes.saturating_sub(SHORT_PASSES) / PASSES_PER_DOUBLING).min(8) as u32;
    (DOWNTIME_AT_FIRST * 2_u32.pow(doublings)).min(DOWNTIME_AT_MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_that_dirties_its_memory_fast_may_stand_still_longer_but_not_for_ever() {
        assert_eq!(downtime_limit(0), DOWNTIME_AT_FIRST);
        assert_eq!(downtime_limit(SHORT_PASSES + PASSES_PER_DOUBLING), DOWNTIME_AT_FIRST * 2);
        assert_eq!(downtime_limit(u64::MAX), DOWNTIME_AT_MOST);
        assert!((1..100).all(|passes| downtime_limit(passes - 1) <= downtime_limit(passes)));
    }
}
