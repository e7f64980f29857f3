//! As a destination: a VM that another host sends. It is started, waits for its memory, and runs here or is ended.

use std::path::Path;
use std::sync::Arc;

use belay_vmm::{Capability, Forbidden, Policy, Qemu, VmSpec};
use belay_wire::DeviceId;

use crate::agent::Agent;
use crate::error::AgentError;
use crate::ledger::RoleRecord;
use crate::peer::{Done, IncomingState, StartIncoming, VmQuery};
use crate::vm::{Vm, failed};

impl Agent {
    /// A peer may start a VM here only with disks that it has offered to this host, or that it gives back.
    fn check_offered(&self, peer: &str, spec: &VmSpec) -> Result<(), AgentError> {
        let offered = |name: &str| {
            self.device(name).is_ok_and(|device| match device.role() {
                RoleRecord::Prepared { from, .. } => from == peer,
                RoleRecord::Lent { to, .. } => to == peer,
                _ => false,
            })
        };
        if spec.disks.is_empty() || !spec.disks.iter().all(|disk| offered(&disk.device)) {
            return Err(AgentError::fenced(format!(
                "{peer} may start VM {} here only with disks that it has offered to host {}",
                spec.name,
                self.host()
            )));
        }
        let uses = |vm: &Arc<Vm>| spec.disks.iter().any(|disk| vm.record.devices.contains(&disk.device));
        if self.vms.all().iter().any(|vm| vm.record.name != spec.name && uses(vm)) {
            return Err(AgentError::precheck(format!(
                "VM {}: another VM of host {} has a disk of it",
                spec.name,
                self.host()
            )));
        }
        Ok(())
    }

    /// What a peer may not choose for a VM here.
    pub(crate) fn forbidden(&self, spec: &VmSpec) -> Vec<Forbidden> {
        let may_read = |file: &Path| self.peers_may_read(file);
        Policy { allow_args: &self.config.vmm.allow_args, may_read: &may_read }.forbidden(spec)
    }

    /// Whether a VM of a peer may read this file: it is, free of links, in one of the operator's folders.
    pub(crate) fn peers_may_read(&self, file: &Path) -> bool {
        let Ok(real) = file.canonicalize() else {
            // It is not there: said later, if it could be.
            let plain = !file.components().any(|part| part == std::path::Component::ParentDir);
            return plain && self.config.vmm.allow_paths.iter().any(|folder| file.starts_with(folder));
        };
        self.config
            .vmm
            .allow_paths
            .iter()
            .any(|folder| real.starts_with(folder.canonicalize().as_deref().unwrap_or(folder)))
    }

    /// As a destination: a QEMU that waits for a VM's memory.
    pub(crate) async fn start_incoming(
        self: &Arc<Self>,
        peer: &str,
        request: StartIncoming,
    ) -> Result<Done, AgentError> {
        let mut spec: VmSpec = serde_json::from_value(request.spec).map_err(failed)?;
        spec.check().map_err(failed)?;
        self.check_offered(peer, &spec)?;
        if let Some(forbidden) = self.forbidden(&spec).first() {
            return Err(AgentError::precheck(format!("VM {}, host {}: {forbidden}", spec.name, self.host())));
        }
        if let Ok(left) = self.vms.get(&spec.name)
            && left.comes_from(peer)
        {
            // Of an attempt that was given up there; its disks are not here, they have just been offered.
            self.stop_vm(&spec.name).await?;
        }
        // Which program runs here is for this host to say, not for the one that asks.
        spec.qemu = None;
        let qemu = Qemu::find(self.config.vmm.qemu.as_deref()).await.map_err(failed)?;
        let vm = self.start_vm(spec, &qemu, Some(peer)).await?;
        let qmp = vm.qmp().await?;
        let outcome = async {
            qmp.set_capabilities(&[(Capability::Events, true), (Capability::ReturnPath, true)])
                .await
                .map_err(failed)?;
            self.expect_memory(&qmp, &vm.record.name, peer).await?;
            Ok(Done {})
        }
        .await;
        if outcome.is_err() {
            let _ = self.stop_vm(&vm.record.name).await;
        } else {
            self.watch_incoming(&vm);
        }
        outcome
    }

    /// As a destination: the VM runs here.
    pub(crate) async fn incoming_done(&self, peer: &str, request: VmQuery) -> Result<Done, AgentError> {
        // The same for one that is not here: a peer knows its own.
        let vm = self
            .vms
            .get(&request.vm)
            .ok()
            .filter(|vm| vm.comes_from(peer))
            .ok_or_else(|| AgentError::fenced(format!("VM {} does not come from {peer}", request.vm)))?;
        self.mark_arrived(&vm).await?;
        self.events.note("migration", None, Some(&request.vm), "runs here");
        Ok(Done {})
    }

    /// As a destination: how the VM is that comes from there.
    pub(crate) async fn incoming_state(
        &self,
        peer: &str,
        request: VmQuery,
    ) -> Result<IncomingState, AgentError> {
        let has_come = |vm: &Vm| vm.comes_from(peer) || self.came_with(vm, peer, &request.devices);
        let comes = self.vms.get(&request.vm).ok().filter(|vm| has_come(vm) && vm.is_alive());
        // The same for one that is not here: a peer knows its own.
        let Some(vm) = comes else {
            return Ok(IncomingState { state: "gone".to_owned(), home_ready: false });
        };
        let state = vm.qmp().await?.query_status().await.map_err(failed)?.status;
        Ok(IncomingState { state, home_ready: self.are_returns_ready(&vm, peer).await })
    }

    /// Whether a VM uses these devices, all of which the peer has a part in: one that came from there, and of which that
    /// has said already that it is done.
    fn came_with(&self, vm: &Vm, peer: &str, devices: &[DeviceId]) -> bool {
        let its = |id: &DeviceId| {
            self.shared_device(peer, *id).is_ok_and(|device| vm.record.devices.contains(&device.name()))
        };
        !devices.is_empty() && devices.iter().all(its)
    }

    /// As a destination: the migration is off.
    pub(crate) async fn abort_incoming(&self, peer: &str, request: VmQuery) -> Result<Done, AgentError> {
        let here = match self.vms.get(&request.vm) {
            Err(_) => false,
            // It has come, with these very devices; of another VM of that name a peer learns nothing.
            Ok(vm) if !vm.comes_from(peer) => {
                let known = |id: &DeviceId| {
                    let device = self.device_by_id(*id);
                    device.is_some_and(|device| vm.record.devices.contains(&device.name()))
                };
                !request.devices.is_empty() && request.devices.iter().all(known)
            }
            Ok(vm) => {
                let is_here = |name: &String| self.device(name).is_ok_and(|device| device.role().has_guest());
                let here = !self.call_off_returns(&vm).await || vm.record.devices.iter().any(is_here);
                if !here {
                    self.stop_vm(&request.vm).await?;
                }
                here
            }
        };
        if here {
            return Err(AgentError::fenced(format!("VM {} is at host {}", request.vm, self.host())));
        }
        self.abort_prepared(peer, &request.devices).await?;
        Ok(Done {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn peer_starts_no_vm_without_disks_that_it_has_offered() {
        let (_folder, agent) = crate::testing::agent();
        for disks in ["", "disks = [{ device = \"disk0\" }]"] {
            let spec = VmSpec::from_toml(&format!("name = \"vm\"\nmemory_mib = 64\n{disks}\n")).unwrap();
            let spec = serde_json::to_value(&spec).unwrap();
            let refused = agent.start_incoming("host-x", StartIncoming { spec }).await.unwrap_err();
            assert_eq!(refused.code, "fenced", "{}", refused.message);
        }
    }
}
