//! The devices of a VM that come home are taken together.
//!
//! As with devices that leave ([`crate::agent::Agent`] grants them with one write), a fault between two of them would
//! leave a VM's disks on two hosts. Here the host with the backings decides: what its VMM's rings have asked for is
//! kept until every disk of the VM that is lent to the same host has come, or is not used by the guest; then one
//! write takes them all. If the VM brings other disks along, these come first: the host that it comes from decides
//! about them, and about the VM.

use std::sync::Arc;

use belay_attach::Command;
use belay_wire::{DeviceId, Epoch};

use crate::agent::Agent;
use crate::claims::{Claims, TAKEN_BACK};
use crate::device::Managed;
use crate::error::AgentError;
use crate::ledger::RoleRecord;
use crate::peer::{Done, VmQuery};
use crate::vm::Vm;

/// The returning devices of a VM that comes here.
#[derive(Debug, Default)]
pub(crate) struct Returns(tokio::sync::Mutex<State>);

#[derive(Debug, Default)]
struct State {
    claims: Claims<(DeviceId, Epoch)>,
    /// Devices that its guest does not use.
    unused: Vec<DeviceId>,
}

impl Agent {
    /// The VM of a device that comes from there.
    fn vm_from(&self, peer: &str, device: &str) -> Option<Arc<Vm>> {
        let mut all = self.vms.all().into_iter();
        all.find(|vm| vm.comes_from(peer) && vm.record.devices.iter().any(|name| name == device))
    }

    /// As the host with the backing: the rings of a device are here. The commit point of the way home is in here.
    pub(crate) async fn take_return(&self, device: &Managed, from: &str, epoch: Epoch) {
        let claim = (device.identity().id, epoch);
        let Some(vm) = self.vm_from(from, &device.name()) else {
            return self.take_alone(claim, from).await;
        };
        let mut state = vm.returns.0.lock().await;
        match &mut state.claims {
            Claims::Off => self.refuse_return(claim, TAKEN_BACK),
            // One that its guest had not used before.
            Claims::Committed => self.take_alone(claim, from).await,
            Claims::Open(claims) => {
                claims.retain(|(present, _)| *present != claim.0);
                claims.push(claim);
                self.try_returns(&vm, from, &mut state).await;
            }
        }
    }

    async fn take_alone(&self, claim: (DeviceId, Epoch), from: &str) {
        if let Err(error) = self.take_all(&[claim], from).await {
            self.refuse_return(claim, &error.message);
        }
    }

    fn refuse_return(&self, (id, epoch): (DeviceId, Epoch), reason: &str) {
        if let Some(device) = self.device_by_id(id) {
            device.send(Command::ReturnFailed { epoch, reason: reason.to_owned() });
        }
    }

    /// A device that the VM has brought along is here: the others may have waited for it.
    pub(crate) async fn brought_along(&self, device: &Managed, from: &str) {
        if let Some(vm) = self.vm_from(from, &device.name()) {
            let mut state = vm.returns.0.lock().await;
            self.try_returns(&vm, from, &mut state).await;
        }
    }

    /// The VM has arrived, says the host that it comes from; its guest does not use these devices.
    pub(crate) async fn arrived(&self, peer: &str, request: VmQuery) -> Result<Done, AgentError> {
        let vm = self.vms.get(&request.vm).ok().filter(|vm| vm.comes_from(peer));
        let vm =
            vm.ok_or_else(|| AgentError::fenced(format!("VM {} does not come from {peer}", request.vm)))?;
        let mut state = vm.returns.0.lock().await;
        state.unused = request.devices;
        self.try_returns(&vm, peer, &mut state).await;
        Ok(Done {})
    }

    /// From now on nothing of this VM comes home. `false`: it has.
    pub(crate) async fn call_off_returns(&self, vm: &Vm) -> bool {
        let Some(claims) = vm.returns.0.lock().await.claims.call_off() else { return false };
        for claim in claims {
            self.refuse_return(claim, TAKEN_BACK);
        }
        true
    }

    /// Whether every device of a VM that comes home has come, or is not used.
    pub(crate) async fn are_returns_ready(&self, vm: &Vm, from: &str) -> bool {
        let state = vm.returns.0.lock().await;
        !vm.record.devices.iter().any(|name| self.is_missing(name, from, &state))
    }

    fn is_missing(&self, name: &str, from: &str, state: &State) -> bool {
        let State { claims: Claims::Open(claims), unused } = state else { return false };
        let Ok(device) = self.device(name) else { return false };
        let id = device.identity().id;
        let lent = matches!(device.role(), RoleRecord::Lent { to, .. } if to == from);
        lent && !unused.contains(&id) && !claims.iter().any(|(claimed, _)| *claimed == id)
    }

    async fn try_returns(&self, vm: &Vm, from: &str, state: &mut State) {
        let comes = |name: &String| {
            let role = self.device(name).map(|device| device.role());
            matches!(role, Ok(RoleRecord::Prepared { .. })) || self.is_missing(name, from, state)
        };
        if vm.record.devices.iter().any(comes) {
            return;
        }
        let Claims::Open(claims) = &mut state.claims else { return };
        if claims.is_empty() {
            return;
        }
        let claims = std::mem::take(claims);
        let outcome = self.take_all(&claims, from).await;
        if let Some((claims, error)) = state.claims.written(claims, outcome) {
            claims.into_iter().for_each(|claim| self.refuse_return(claim, &error.message));
        }
    }

    /// Takes devices back with one write.
    async fn take_all(&self, claims: &[(DeviceId, Epoch)], from: &str) -> Result<(), AgentError> {
        let local = |role: &RoleRecord| match role {
            RoleRecord::Lent { backend, to } if to == from => {
                Some(RoleRecord::Local { backend: backend.clone() })
            }
            _ => None,
        };
        let came = |_, device: &Managed| device.set_came_from(from);
        let devices =
            self.hand_over(claims, &[], local, came, |epoch| Command::ReturnDurable { epoch }).await?;
        for device in &devices {
            let message = format!("its guest has come home from {from}");
            self.events.note("handover", Some(&device.name()), None, message);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{DeviceRecord, Mode, SCHEMA, VmRecord};
    use crate::testing::{self, memory};

    const FROM: &str = "host-x";

    fn record(name: &str, lent: bool) -> DeviceRecord {
        let role = if lent {
            RoleRecord::Lent { backend: memory(), to: FROM.into() }
        } else {
            RoleRecord::Prepared {
                from: FROM.into(),
                mode: Mode::Stay,
                delay_us: None,
                direct: false,
                replaces: None,
            }
        };
        testing::record(name, Epoch(2), role)
    }

    /// A VM comes here with two devices that are lent, and one that it brings along or not.
    async fn agent(brings: bool) -> (tempfile::TempDir, Arc<Agent>, Vec<Arc<Managed>>, Arc<Vm>) {
        let (folder, agent) = testing::agent();
        let mut devices = Vec::new();
        for (name, lent) in [("disk0", true), ("disk1", true), ("disk2", false)] {
            if lent || brings {
                let record = record(name, lent);
                agent.write_record(record.clone()).await.unwrap();
                devices.push(agent.start_device(record).await.unwrap());
            }
        }
        let vm = VmRecord {
            schema: SCHEMA,
            name: "vm".into(),
            spec: None,
            qmp: "/none".into(),
            process: None,
            devices: devices.iter().map(|device| device.name()).collect(),
            migrating: None,
            incoming: Some(FROM.into()),
        };
        let vm = agent.vms.insert(vm, None);
        (folder, agent, devices, vm)
    }

    fn home(agent: &Agent) -> usize {
        let records = agent.ledger.devices().unwrap();
        records.iter().filter(|record| matches!(record.role, RoleRecord::Local { .. })).count()
    }

    #[tokio::test]
    async fn devices_come_home_when_the_last_one_has_come() {
        let (_folder, agent, devices, vm) = agent(false).await;
        agent.take_return(&devices[0], FROM, Epoch(3)).await;
        assert_eq!(home(&agent), 0);
        agent.take_return(&devices[1], FROM, Epoch(3)).await;
        assert_eq!(home(&agent), 2);
        assert!(!agent.call_off_returns(&vm).await, "it was too late");
    }

    #[tokio::test]
    async fn device_that_the_guest_does_not_use_is_not_waited_for_once_the_vm_has_arrived() {
        let (_folder, agent, devices, _vm) = agent(false).await;
        agent.take_return(&devices[0], FROM, Epoch(3)).await;
        let unused = VmQuery { vm: "vm".into(), devices: vec![devices[1].identity().id] };
        assert!(agent.arrived("host-y", unused.clone()).await.is_err());
        assert_eq!(home(&agent), 0);
        agent.arrived(FROM, unused).await.unwrap();
        assert_eq!(home(&agent), 1);
        agent.take_return(&devices[1], FROM, Epoch(3)).await;
        assert_eq!(home(&agent), 2);
    }

    #[tokio::test]
    async fn nothing_comes_home_before_what_the_vm_brings_along_or_after_it_was_called_off() {
        let (_folder, agent, devices, vm) = agent(true).await;
        agent.take_return(&devices[0], FROM, Epoch(3)).await;
        agent.take_return(&devices[1], FROM, Epoch(3)).await;
        assert_eq!(home(&agent), 0);
        let remote = RoleRecord::Remote {
            backing: FROM.into(),
            delay_us: None,
            direct: false,
            follow: false,
            replaces: None,
        };
        assert!(agent.call_off_returns(&vm).await);
        agent.record(&devices[2], Epoch(3), remote).await.unwrap();
        agent.brought_along(&devices[2], FROM).await;
        assert_eq!(home(&agent), 0);
        agent.take_return(&devices[0], FROM, Epoch(3)).await;
        assert_eq!(home(&agent), 0);
    }
}
