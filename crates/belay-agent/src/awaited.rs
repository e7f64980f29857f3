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
use crate::peer::{DeviceQuery, Leaves, Offered, VmQuery};
use crate::vm::Vm;

/// How often the other host is asked.
const ASK: Duration = Duration::from_secs(3);
/// How long a call may take.
const CALL: Duration = Duration::from_secs(10);
/// What the other host does not know, and still waits here after so many answers, has been lost there.
const UNKNOWN: u32 = 3;

impl Agent {
    /// Until a VM has come, or does not come: sees to it that it does not wait in vain. In the background.
    pub(crate) fn watch_incoming(self: &Arc<Self>, vm: &Arc<Vm>) {
        let (agent, vm) = (Arc::clone(self), Arc::clone(vm));
        tokio::spawn(async move {
            let mut unknown = 0;
            loop {
                tokio::time::sleep(ASK).await;
                let Some(from) = vm.incoming().filter(|_| agent.vms.has(&vm)) else { return };
                unknown = match agent.ask_for_vm(&from, &vm).await {
                    Ok(false) => unknown + 1,
                    Ok(true) | Err(_) => 0,
                };
                if unknown >= UNKNOWN {
                    agent.settle_incoming(&from, &vm).await;
                }
            }
        });
    }

    async fn ask_for_vm(&self, from: &str, vm: &Vm) -> Result<bool, AgentError> {
        let told: Leaves = self.call_host(from, CALL, "is_leaving", &self.query_of(vm)).await?;
        Ok(told.leaves)
    }

    async fn ask_for_device(&self, from: &str, id: DeviceId) -> Result<bool, AgentError> {
        let told: Offered = self.call_host(from, CALL, "is_offered", &DeviceQuery { id }).await?;
        Ok(told.offered)
    }

    /// The other host does not have the VM on its way here: it has arrived, or does not come.
    async fn settle_incoming(&self, from: &str, vm: &Arc<Vm>) {
        // Neither is anything prepared here meanwhile, nor is the answer that counts older than that.
        let _preparing = self.preparing.lock().await;
        if !matches!(self.ask_for_vm(from, vm).await, Ok(false)) || !self.vms.has(vm) {
            return;
        }
        if self.has_arrived(vm) {
            if self.mark_arrived(vm).await.is_ok() {
                self.events.note("migration", None, Some(&vm.record.name), "runs here");
            }
            return;
        }
        // Of a VM that was granted its devices the other host may know nothing any more: it goes on.
        if !self.none_is_offered(from, vm).await {
            return;
        }
        match self.abort_incoming(from, self.query_of(vm)).await {
            Ok(_) => {
                let message = format!("does not come from {from} after all: is not waited for any more");
                self.events.note("migration", None, Some(&vm.record.name), message);
            }
            Err(error) => tracing::debug!(vm = %vm.record.name, %error, "goes on waiting"),
        }
    }

    /// Whether the other host has said of each of the VM's devices that it is neither offered nor granted to this one.
    async fn none_is_offered(&self, from: &str, vm: &Vm) -> bool {
        for id in self.query_of(vm).devices {
            if !matches!(self.ask_for_device(from, id).await, Ok(false)) {
                return false;
            }
        }
        true
    }

    /// Until a device has come, or does not come: sees to it that it does not wait in vain. In the background.
    pub(crate) fn watch_prepared(self: &Arc<Self>, device: &Arc<Managed>) {
        let (agent, device) = (Arc::clone(self), Arc::clone(device));
        tokio::spawn(async move {
            let (id, name) = (device.identity().id, device.name());
            let is_waited_for = || match device.role() {
                RoleRecord::Prepared { from, .. } => agent.has_device(&device).then_some(from),
                _ => None,
            };
            let mut unknown = 0;
            loop {
                tokio::time::sleep(ASK).await;
                let Some(from) = is_waited_for() else { return };
                if agent.vms.user_of(&name).is_some() {
                    // It goes with its VM.
                    continue;
                }
                unknown = match agent.ask_for_device(&from, id).await {
                    Ok(false) => unknown + 1,
                    Ok(true) | Err(_) => 0,
                };
                if unknown < UNKNOWN {
                    continue;
                }
                let _preparing = agent.preparing.lock().await;
                let still = is_waited_for().is_some() && agent.vms.user_of(&name).is_none();
                if still
                    && matches!(agent.ask_for_device(&from, id).await, Ok(false))
                    && agent.abort_prepared(&from, &[id]).await.is_ok()
                {
                    let message = format!("is not offered by {from} any more: is not waited for");
                    agent.events.note("handover", Some(&name), None, message);
                }
            }
        });
    }

    /// As a source: whether a device may go to `peer`, or has gone there.
    pub(crate) fn is_offered(&self, peer: &str, query: DeviceQuery) -> Offered {
        let goes = |device: Arc<Managed>| match device.role() {
            RoleRecord::Lent { to, .. } | RoleRecord::Tombstone { moved_to: to, .. } => to == peer,
            RoleRecord::Prepared { .. } => false,
            RoleRecord::Local { .. }
            | RoleRecord::Remote { .. }
            | RoleRecord::Exchanging { .. }
            | RoleRecord::Cutting { .. } => device.record().offered.is_some_and(|offer| offer.to == peer),
        };
        Offered { offered: self.device_by_id(query.id).is_some_and(goes) }
    }

    /// Before everything of the ledger is there, nothing is known to be missing.
    pub(crate) fn check_started(&self) -> Result<(), AgentError> {
        if self.started.load(Ordering::Acquire) {
            Ok(())
        } else {
            Err(AgentError::unreachable(format!("host {} is starting", self.host())))
        }
    }

    fn query_of(&self, vm: &Vm) -> VmQuery {
        VmQuery::new(vm, &self.devices_of(vm))
    }

    /// Whether all its devices are here.
    fn has_arrived(&self, vm: &Vm) -> bool {
        let here = |name: &String| self.device(name).is_ok_and(|device| device.role().has_guest());
        vm.record.devices.iter().all(here)
    }

    /// As a source: whether a VM is on its way to `peer`, or it is not decided yet where it is.
    pub(crate) fn is_leaving(&self, peer: &str, query: &VmQuery) -> Leaves {
        let way = self.vms.get(&query.vm).ok().and_then(|vm| vm.migrating());
        Leaves { leaves: way.is_some_and(|MigratingRecord { to, .. }| to == peer) }
    }
}

#[cfg(test)]
mod tests {
    use belay_block::BackendSpec;
    use belay_link::{ControlHandler, HostName};
    use belay_wire::Epoch;
    use serde_json::json;

    use super::*;
    use crate::ledger::{Mode, OfferRecord};
    use crate::peer::Peers;
    use crate::testing::{self, identity, memory};

    #[tokio::test]
    async fn agent_that_is_starting_says_of_nothing_that_it_is_gone() {
        let (_folder, agent) = testing::agent();
        let peers = Peers(Arc::clone(&agent));
        let peer = HostName::new("host-x").unwrap();
        let body = json!({"vm": "vm", "devices": []});
        for method in ["incoming_state", "abort_incoming", "is_leaving", "incoming_done"] {
            let refused = peers.handle(&peer, method, body.clone()).await.unwrap_err();
            assert_eq!(refused.code, "unreachable", "{method}");
        }
        agent.started.store(true, Ordering::Release);
        assert_eq!(peers.handle(&peer, "incoming_state", body).await.unwrap()["state"], "gone");
    }

    #[tokio::test]
    async fn device_is_offered_to_the_host_that_it_may_go_to_or_has_gone_to_and_to_no_other() {
        let (_folder, agent) = testing::agent();
        let device = agent.add_device(identity("disk0"), memory()).await.unwrap();
        let query = || DeviceQuery { id: device.identity().id };
        let offered = |peer: &str| agent.is_offered(peer, query()).offered;
        assert!(!offered("host-x"));
        let offer = OfferRecord { to: "host-x".into(), mode: Mode::Follow };
        device.set_record(crate::ledger::DeviceRecord { offered: Some(offer), ..device.record() });
        assert!(offered("host-x") && !offered("host-y"));
        let backend = BackendSpec::file("/none".into());
        let roles = [
            RoleRecord::Lent { backend: backend.clone(), to: "host-x".into() },
            RoleRecord::Tombstone { backend, moved_to: "host-x".into() },
        ];
        for role in roles {
            agent.record(&device, Epoch(2), role).await.unwrap();
            assert!(offered("host-x") && !offered("host-y"));
        }
        assert!(!agent.is_offered("host-x", DeviceQuery { id: DeviceId::random() }).offered);
    }
}
