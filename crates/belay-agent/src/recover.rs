//! Migrations whose agent has died on the way.
//!
//! What is to be done is in the ledger and in QEMU: a device that was granted has moved, and the VM with it; a VM that
//! QEMU has not let go of is here. QEMU does not let go by itself, so what an agent that was killed has left is
//! nearly always taken back.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use belay_wire::DeviceId;
use tokio::sync::OwnedMutexGuard;

use crate::agent::Agent;
use crate::device::Managed;
use crate::error::AgentError;
use crate::leaving::{Leaving, POLL};
use crate::ledger::{MigratingRecord, RoleRecord};
use crate::vm::Vm;

/// How long a VMM may take to come back to its agent. QEMU tries every second.
const BACK_WITHIN: Duration = Duration::from_secs(5);
/// How long a VMM that came back may take to greet.
const GREETED_WITHIN: Duration = Duration::from_secs(2);
/// How long QEMU may need for the rest of a VM that it has let go of.
const ARRIVED_WITHIN: Duration = Duration::from_secs(30);
/// How long the destination may take to claim the devices of a VM that has arrived. Their lists of requests in
/// flight are forgotten here: without one, it claims at once, or never.
const MOVED_WITHIN: Duration = Duration::from_secs(5);

impl Agent {
    /// Before any device starts: disks that were to leave together still do.
    ///
    /// # Errors
    /// The ledger cannot be read.
    pub(crate) fn reopen_departures(&self) -> Result<(), AgentError> {
        let devices = self.ledger.devices()?;
        for vm in self.ledger.vms()? {
            let Some(MigratingRecord { to, ran: true, .. }) = vm.migrating else { continue };
            let own: Vec<DeviceId> = devices
                .iter()
                .filter(|device| {
                    let offered = device.offered.as_ref().is_some_and(|offer| offer.to == to);
                    let local = matches!(device.role, RoleRecord::Local { .. });
                    local && offered && vm.devices.contains(&device.identity.name)
                })
                .map(|device| device.identity.id)
                .collect();
            if !own.is_empty() {
                self.open_departure(&to, own, true);
            }
        }
        Ok(())
    }

    /// Brings what an earlier agent here has begun to an end, in the background: until then those VMs do not migrate.
    /// And sees to it that the disks of the others have come back.
    pub(crate) fn settle_migrations(self: &Arc<Self>) {
        self.started.store(true, Ordering::Release);
        for device in self.devices() {
            if matches!(device.role(), RoleRecord::Prepared { .. }) {
                self.watch_prepared(&device);
            }
        }
        for vm in self.vms.all() {
            let agent = Arc::clone(self);
            if vm.incoming().is_some() {
                self.watch_incoming(&vm);
            }
            if let Some(way) = vm.migrating() {
                let Ok(settling) = Arc::clone(&vm.settling).try_lock_owned() else { continue };
                tokio::spawn(async move { agent.settle(vm, way, settling).await });
            } else {
                tokio::spawn(async move {
                    if let Err(error) = agent.start_disks_of(&vm).await {
                        agent.events.note("vm", None, Some(&vm.record.name), error.message);
                    }
                });
            }
        }
    }

    async fn settle(self: Arc<Self>, vm: Arc<Vm>, way: MigratingRecord, _settling: OwnedMutexGuard<()>) {
        let name = vm.record.name.clone();
        let operation = self.operations.running(&name);
        let ended = |state: &str, error: Option<AgentError>| {
            let Some(operation) = &operation else { return };
            operation.update(|view| {
                view.state = state.to_owned();
                view.error = error;
            });
        };
        let taken_back = |what: &str| {
            let error =
                AgentError::failed(format!("the agent was restarted during the migration of {name}: {what}"));
            ended("failed", Some(error));
        };
        let note = |message: String| self.events.note("migration", None, Some(&name), message);
        note(format!("was on its way to {} when the agent ended", way.to));
        let devices = self.devices_of(&vm);
        let departure = devices.iter().find_map(|device| self.departure_of(device.identity().id));
        let leaving = Leaving {
            agent: Arc::clone(&self),
            vm: Arc::clone(&vm),
            to: way.to.clone(),
            devices,
            departure,
            ran: way.ran,
        };
        if leaving.is_committed().await {
            note(format!("runs at {}: its devices had been granted", way.to));
            leaving.finish().await;
            ended("done", None);
            return;
        }
        // QEMU starts the rings of a disk only if it is connected.
        wait_connected(&leaving.devices).await;
        // The devices of a VM that stands still follow when it runs again.
        if leaving.arrives(ARRIVED_WITHIN).await
            && (!way.ran || leaving.wait_moved(Some(MOVED_WITHIN), false).await.is_ok())
        {
            note(format!("runs at {}", way.to));
            leaving.finish().await;
            ended("done", None);
            return;
        }
        if !leaving.end().await {
            note(format!("runs at {}", way.to));
            ended("done", None);
            return;
        }
        if !vm.is_alive() {
            note("its process has ended; its devices stay here".to_owned());
            self.forget_vm(&vm).await;
            taken_back("its process has ended; its devices stay here");
            return;
        }
        if let Err(error) = self.start_disks_of(&vm).await {
            note(error.message);
        }
        note("is off: the VM goes on here".to_owned());
        taken_back("it is off, the VM goes on here");
    }

    /// QEMU 7.2 does not start a disk whose agent was away when the guest began to run, and is silent on its next
    /// connection: a short pause makes it try again.
    async fn start_disks_of(&self, vm: &Vm) -> Result<(), AgentError> {
        let failed = |error: belay_vmm::QmpError| AgentError::failed(error.to_string());
        let devices = self.devices_of(vm);
        wait_connected(&devices).await;
        let silent = || devices.iter().any(|device| device.snapshot().vmm_silent);
        let deadline = Instant::now() + GREETED_WITHIN;
        while silent() {
            if Instant::now() > deadline {
                let qmp = vm.qmp().await?;
                if qmp.query_status().await.map_err(failed)?.status == "running" {
                    tracing::info!(vm = %vm.record.name, "its disks are not started: a short pause");
                    qmp.stop().await.map_err(failed)?;
                    qmp.cont().await.map_err(failed)?;
                }
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }
}

/// Waits until the VMM has come back to these devices, or does not.
async fn wait_connected(devices: &[Arc<Managed>]) {
    let deadline = Instant::now() + BACK_WITHIN;
    while Instant::now() < deadline && !devices.iter().all(|device| device.snapshot().vmm_connected) {
        tokio::time::sleep(POLL).await;
    }
}
