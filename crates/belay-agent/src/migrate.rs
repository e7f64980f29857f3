//! A VM's migration, as the source's agent conducts it.
//!
//! ```text
//!   precheck ─▶ prepare ─▶ memory ─▶ switchover ─▶ finish
//!       └───────────┴─────────┴───────────┴── failure or abort: the VM goes on here
//! ```
//! Whether the devices have moved is not decided here, but in their handovers: the destination's rings start, it
//! claims, this host's ledger grants. This conducts QEMU, and cleans up on whichever side is left over.

use std::sync::Arc;
use std::time::{Duration, Instant};

use belay_vmm::{Capability, Qmp};
use belay_wire::DeviceId;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::adopt::{VmCheck, VmChecked};
use crate::agent::Agent;
use crate::device::Managed;
use crate::error::AgentError;
use crate::ledger::Mode;
use crate::operation::{
    Check, HandoverReport, MigrationFigures, Operation, OperationDevice, RamView, Report,
};
use crate::peer::{DeviceQuery, DeviceState, Done, HelloAnswer, Incoming, StartIncoming, VmQuery};
use crate::vm::Vm;

/// Limit of a VM's memory transfer where the configuration has none, in bytes per second.
const MEMORY_BANDWIDTH: u64 = 4 << 30;
/// How often QEMU is asked for its progress.
const POLL: Duration = Duration::from_millis(20);
/// How often the destination is asked for the exchange's progress.
const FOLLOW_POLL: Duration = Duration::from_millis(300);

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
    agent: Arc<Agent>,
    operation: Arc<Operation>,
    request: Request,
    vm: Arc<Vm>,
    devices: Vec<Arc<Managed>>,
    began: Instant,
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
        let migration = Migration {
            agent: Arc::clone(self),
            operation: Arc::clone(&operation),
            request,
            vm,
            devices,
            began: Instant::now(),
        };
        // In a task of its own: it comes to an end also if the caller goes away meanwhile.
        let checked = tokio::spawn(migration.check_then_conduct(dry_run)).await;
        checked.map_err(|error| AgentError::failed(error.to_string()))?;
        Ok(operation)
    }
}

impl Migration {
    async fn call<Q: Serialize + Sync, A: DeserializeOwned>(
        &self,
        limit_s: u64,
        method: &str,
        request: &Q,
    ) -> Result<A, AgentError> {
        self.agent.call_host(&self.request.to, Duration::from_secs(limit_s), method, request).await
    }

    fn note(&self, message: impl Into<String>) {
        self.agent.events.note("migration", None, Some(&self.request.vm), message);
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
        let spec = self.vm.spec();
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
        for device in &self.devices {
            let name = device.name();
            let offer = self.agent.offer_device(device, &self.request.to, self.request.mode, true).await;
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
        let qemu = self.vm.qmp().await?.version().to_string();
        let spec = self.vm.record.spec.clone().unwrap_or_default();
        // Long enough for a trial of KVM there.
        let checked: VmChecked = self.call(40, "check_vm", &VmCheck { spec, qemu }).await?;
        Ok(checked.checks)
    }

    fn ids(&self) -> Vec<DeviceId> {
        self.devices.iter().map(|device| device.identity().id).collect()
    }

    async fn conduct(self) {
        self.note(format!("to {} begins", self.request.to));
        match self.attempt().await {
            Ok(report) => {
                self.note(format!(
                    "runs at {} after {:.0} ms, downtime {} ms, {} requests in flight",
                    self.request.to,
                    report.migration.running_at_destination_ms,
                    report.migration.downtime_ms,
                    report.handover.requests_in_flight
                ));
                self.operation.update(|view| {
                    view.report = Some(report);
                    view.state = "done".to_owned();
                    view.phase = "done".to_owned();
                    view.abortable = false;
                });
                self.follow().await;
            }
            Err(error) => self.take_back(error).await,
        }
    }

    async fn attempt(&self) -> Result<Report, AgentError> {
        self.operation.phase("prepare", true);
        for device in &self.devices {
            self.agent.offer_device(device, &self.request.to, self.request.mode, false).await?;
            self.abort_point()?;
        }
        let spec = self.vm.record.spec.clone().unwrap_or_default();
        let incoming: Incoming = self.call(60, "start_incoming", &StartIncoming { spec }).await?;
        self.abort_point()?;
        self.operation.phase("memory", true);
        let qmp = self.vm.qmp().await?;
        let total_ms = self.move_memory(&qmp, &incoming.uri).await?;
        let downtime_ms = total_ms.1;
        let running = self.began.elapsed().as_secs_f64() * 1e3;
        self.operation.phase("finish", false);
        let handover = self.figures().await;
        let query = VmQuery { vm: self.request.vm.clone(), devices: self.ids() };
        let told: Result<Done, AgentError> = self.call(30, "incoming_done", &query).await;
        if let Err(error) = told {
            self.note(format!("the destination could not be told that it is done: {error}"));
        }
        // Everything that was in flight has its memory here until its completion has been sent.
        self.agent.stop_vm(&self.request.vm).await?;
        let migration =
            MigrationFigures { total_ms: total_ms.0, downtime_ms, running_at_destination_ms: running };
        Ok(Report { migration, handover })
    }

    fn abort_point(&self) -> Result<(), AgentError> {
        if self.operation.wants_abort() {
            Err(AgentError::cancelled("the migration was taken back"))
        } else {
            Ok(())
        }
    }

    /// QEMU's part; total time and downtime in milliseconds.
    async fn move_memory(&self, qmp: &Qmp, uri: &str) -> Result<(u64, u64), AgentError> {
        let failed =
            |error: belay_vmm::QmpError| AgentError::failed(format!("VM {}: {error}", self.request.vm));
        let configured = self.agent.config.vmm.migration_bandwidth_bytes_per_s;
        let bandwidth =
            self.request.bandwidth.unwrap_or(if configured > 0 { configured } else { MEMORY_BANDWIDTH });
        qmp.set_capabilities(&[(Capability::Events, true), (Capability::ReturnPath, true)])
            .await
            .map_err(failed)?;
        qmp.set_migration_limits(Some(bandwidth), None).await.map_err(failed)?;
        qmp.migrate(uri).await.map_err(failed)?;
        loop {
            let info = qmp.query_migrate().await.map_err(failed)?;
            if let Some(ram) = info.ram {
                let ram =
                    RamView { total: ram.total, transferred: ram.transferred, remaining: ram.remaining };
                self.operation.update(|view| view.ram = Some(ram));
            }
            match info.status.as_deref().unwrap_or_default() {
                "completed" => return Ok((info.total_time.unwrap_or(0), info.downtime.unwrap_or(0))),
                "failed" => {
                    let reason = info.error_desc.unwrap_or_else(|| "QEMU gives no reason".to_owned());
                    return Err(AgentError::failed(format!(
                        "VM {}: the migration failed: {reason}",
                        self.request.vm
                    )));
                }
                "cancelled" => return Err(AgentError::cancelled("the migration was cancelled")),
                "device" | "pre-switchover" => self.operation.phase("switchover", true),
                _ => {}
            }
            if self.operation.wants_abort() {
                qmp.migrate_cancel().await.map_err(failed)?;
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// What the destination measured; the gap is that of hosts that share a clock, as in a demonstration.
    async fn figures(&self) -> HandoverReport {
        let mut report = HandoverReport::default();
        for device in &self.devices {
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
        let deadline = Instant::now() + Duration::from_secs(3);
        loop {
            let state: Option<DeviceState> = self.call(5, "device_state", &query).await.ok();
            let there = state.as_ref().is_some_and(|state| state.view.first_completion_ns > 0);
            if there || Instant::now() > deadline {
                return state;
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The VM goes on here, unless its devices have moved.
    async fn take_back(&self, error: AgentError) {
        self.operation.phase("finish", false);
        let mut gone = Vec::new();
        for device in &self.devices {
            let _moving = device.moving.lock().await;
            if self.agent.withdraw_here(device).await.is_err() {
                gone.push(device.name());
            }
        }
        let error = if gone.is_empty() {
            let query = VmQuery { vm: self.request.vm.clone(), devices: self.ids() };
            let told: Result<Done, AgentError> = self.call(30, "abort_incoming", &query).await;
            if let Err(told) = told {
                self.note(format!("the destination could not be told: {told}"));
            }
            if let Ok(qmp) = self.vm.qmp().await
                && qmp.query_status().await.is_ok_and(|state| state.status != "running")
            {
                let _ = qmp.cont().await;
            }
            error
        } else {
            AgentError::fenced(format!(
                "{}; but {} belongs to {} already",
                error.message,
                gone.join(", "),
                self.request.to
            ))
            .hint(format!("the VM goes on at {}: look there with `belay status`", self.request.to))
        };
        self.note(format!("is off: {error}"));
        self.operation.update(|view| {
            view.state = if error.code == "cancelled" { "cancelled".to_owned() } else { "failed".to_owned() };
            view.error = Some(error);
        });
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
            for device in &self.devices {
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
