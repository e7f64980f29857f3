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
        let vm = self.vms.get(&request.vm)?;
        if let Some(running) = self.operations.all().into_iter().find(|operation| {
            let view = operation.view();
            view.vm == request.vm && view.state == "running"
        }) {
            // The same command again: follow the one that runs.
            if running.view().to == request.to && !dry_run {
                return Ok(running);
            }
            return Err(AgentError::precheck(format!(
                "VM {} is being migrated to {}",
                request.vm,
                running.view().to
            )));
        }
        if request.to == self.host() {
            return Err(AgentError::precheck(format!("VM {} is on host {} already", request.vm, request.to)));
        }
        self.client(&request.to)?;
        let devices =
            vm.record.devices.iter().map(|name| self.device(name)).collect::<Result<Vec<_>, _>>()?;
        let operation = self.operations.begin(&request.vm, &request.to, request.mode.name());
        let migration = Migration {
            agent: Arc::clone(self),
            operation: Arc::clone(&operation),
            request,
            vm,
            devices,
            began: Instant::now(),
        };
        let checked = migration.precheck().await;
        if dry_run || checked.is_err() {
            operation.update(|view| {
                view.abortable = false;
                view.state = if checked.is_ok() { "done".to_owned() } else { "failed".to_owned() };
                view.error = checked.err();
            });
            return Ok(operation);
        }
        tokio::spawn(migration.conduct());
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

    /// Everything that can be known before; nothing is changed.
    async fn precheck(&self) -> Result<(), AgentError> {
        let hello: Result<HelloAnswer, AgentError> = self.call(10, "hello", &Done {}).await;
        let reached = hello.as_ref().map(|hello| format!("{} answers, belay {}", hello.host, hello.version));
        self.check("destination", reached.map_err(Clone::clone))?;
        let hello = hello?;
        let qmp = self.vm.qmp().await?;
        let here = qmp.version().to_string();
        let qemu = match hello.qemu {
            Some(there) => Ok(format!("QEMU {here} here, {there} there")),
            None => Err(AgentError::precheck(format!("host {} has no QEMU", self.request.to))),
        };
        self.check("qemu", qemu)?;
        self.check("vm", self.vm.spec().map(|spec| format!("machine {}", spec.machine)))?;
        for device in &self.devices {
            let name = device.name();
            let offer = self.agent.offer_device(device, &self.request.to, self.request.mode, true).await;
            let fits = offer.map(|_| format!("{name} is here, host {} has room for it", self.request.to));
            let fits = fits.map_err(|error| match error.code.as_str() {
                "failed" => AgentError { code: "precheck".to_owned(), ..error },
                _ => error,
            });
            self.check(&format!("device {name}"), fits)?;
        }
        Ok(())
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
            report.requests_in_flight += state.figures.requests_in_flight;
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
