//! VMs and devices that are waited for here: the word that one does not come may be lost, or this agent be away when it
//! is said.
//!
//! So the host that it comes from is asked now and then. Only its word ends what waits here.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use belay_wire::DeviceId;

use crate::agent::Agent;
use crate::device::Managed;
use crate::error::AgentError;
use crate::ledger::{MigratingRecord, RoleRecord};
use crate::peer::{DeviceQuery, Offered, OutgoingState, VmQuery};
use crate::vm::Vm;

/// How often the other host is asked.
const ASK: Duration = Duration::from_secs(3);
/// How long a call may take.
const CALL: Duration = Duration::from_secs(10);
/// What the other host does not know, and still waits here after so many answers, has been lost there.
const UNKNOWN: u32 = 5;

impl Agent {
    /// Until a VM has come, or does not come: sees to it that it does not wait in vain. In the background.
    pub(crate) fn watch_incoming(self: &Arc<Self>, vm: &Arc<Vm>) {
        let (agent, vm) = (Arc::clone(self), Arc::clone(vm));
        tokio::spawn(async move {
            let mut unknown = 0;
            loop {
                tokio::time::sleep(ASK).await;
                let Some(from) = vm.incoming().filter(|_| agent.is_present(&vm)) else { return };
                let query = agent.query_of(&vm);
                let told: Result<OutgoingState, AgentError> =
                    agent.call_host(&from, CALL, "outgoing_state", &query).await;
                unknown = match told {
                    Ok(OutgoingState::Unknown) => unknown + 1,
                    Ok(OutgoingState::Here) => UNKNOWN,
                    Ok(OutgoingState::Leaving) | Err(_) => 0,
                };
                if unknown < UNKNOWN || !agent.is_present(&vm) {
                    continue;
                }
                if agent.waits_for_memory(&vm).await {
                    agent.give_up_incoming(&from, query).await;
                } else if agent.has_arrived(&vm) && agent.mark_arrived(&vm).await.is_ok() {
                    agent.events.note("migration", None, Some(&vm.record.name), "runs here");
                }
            }
        });
    }

    /// Until a device has come, or does not come: sees to it that it does not wait in vain. In the background.
    pub(crate) fn watch_prepared(self: &Arc<Self>, device: &Arc<Managed>) {
        let (agent, device) = (Arc::clone(self), Arc::clone(device));
        tokio::spawn(async move {
            let id = device.identity().id;
            let mut unknown = 0;
            loop {
                tokio::time::sleep(ASK).await;
                let present = agent.device_by_id(id).is_some_and(|present| Arc::ptr_eq(&present, &device));
                let RoleRecord::Prepared { from, .. } = device.role() else { return };
                if !present {
                    return;
                }
                let name = device.name();
                if agent.vms.all().iter().any(|vm| vm.record.devices.contains(&name)) {
                    // It goes with its VM.
                    continue;
                }
                let told: Result<Offered, AgentError> =
                    agent.call_host(&from, CALL, "is_offered", &DeviceQuery { id }).await;
                unknown = match told {
                    Ok(Offered { offered: false }) => unknown + 1,
                    Ok(_) | Err(_) => 0,
                };
                if unknown >= UNKNOWN && agent.abort_prepared(&from, &[id]).await.is_ok() {
                    let message = format!("is not offered by {from} any more: is not waited for");
                    agent.events.note("handover", Some(&name), None, message);
                }
            }
        });
    }

    /// As a source: whether a device may go to `peer`, or has gone there.
    pub(crate) fn is_offered(&self, peer: &str, query: DeviceQuery) -> Result<Offered, AgentError> {
        self.check_started()?;
        Ok(Offered { offered: self.shared_device(peer, query.id).is_ok() })
    }

    /// Before everything of the ledger is there, nothing is known to be missing.
    fn check_started(&self) -> Result<(), AgentError> {
        if self.started.load(Ordering::Acquire) {
            Ok(())
        } else {
            Err(AgentError::failed(format!("the agent of {} is starting", self.host())))
        }
    }

    /// Whether this VM, and no other of its name, is one of this host.
    fn is_present(&self, vm: &Arc<Vm>) -> bool {
        self.vms.get(&vm.record.name).is_ok_and(|present| Arc::ptr_eq(&present, vm))
    }

    fn query_of(&self, vm: &Vm) -> VmQuery {
        let devices = vm.record.devices.iter().filter_map(|name| self.device(name).ok());
        VmQuery { vm: vm.record.name.clone(), devices: devices.map(|device| device.identity().id).collect() }
    }

    /// Whether a VM has nothing yet: its QEMU says so, or has ended.
    async fn waits_for_memory(&self, vm: &Vm) -> bool {
        let Ok(qmp) = vm.qmp().await else { return !vm.is_alive() };
        qmp.query_status().await.is_ok_and(|state| state.status == "inmigrate")
    }

    /// Whether its devices are here.
    fn has_arrived(&self, vm: &Vm) -> bool {
        let here = |name: &String| self.device(name).is_ok_and(|device| device.role().is_guest_here());
        vm.record.devices.iter().all(here)
    }

    async fn give_up_incoming(&self, from: &str, query: VmQuery) {
        let name = query.vm.clone();
        match self.abort_incoming(from, query).await {
            Ok(_) => {
                let message = format!("does not come from {from} after all: is not waited for any more");
                self.events.note("migration", None, Some(&name), message);
            }
            Err(error) => tracing::debug!(vm = %name, %error, "goes on waiting"),
        }
    }

    /// As a source: where a VM is that was to go to `peer`. Who does not name its devices learns nothing of it.
    pub(crate) fn outgoing_state(&self, peer: &str, query: &VmQuery) -> Result<OutgoingState, AgentError> {
        self.check_started()?;
        let Ok(vm) = self.vms.get(&query.vm) else { return Ok(OutgoingState::Unknown) };
        let its = |id: &DeviceId| {
            self.device_by_id(*id).is_some_and(|device| vm.record.devices.contains(&device.name()))
        };
        Ok(match vm.migrating() {
            Some(MigratingRecord { to, .. }) if to == peer => OutgoingState::Leaving,
            _ if query.devices.is_empty() || !query.devices.iter().all(its) => OutgoingState::Unknown,
            // What came here from there has not begun to leave again.
            _ if vm.incoming().is_some() => OutgoingState::Unknown,
            _ => OutgoingState::Here,
        })
    }
}
