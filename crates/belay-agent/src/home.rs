//! Devices whose backing stayed behind: their guest comes home to it.

use std::path::PathBuf;
use std::sync::Arc;

use belay_block::BackendSpec;
use belay_wire::Epoch;

use crate::agent::{Agent, map_path};
use crate::device::Managed;
use crate::error::AgentError;
use crate::ledger::RoleRecord;
use crate::peer::Prepare;

impl Agent {
    /// As the host with the backing: whether the guest of a device that is lent may come here.
    pub(crate) fn expect_home(
        &self,
        device: &Managed,
        peer: &str,
        request: &Prepare,
    ) -> Result<(), AgentError> {
        let name = device.name();
        match device.role() {
            RoleRecord::Lent { to, .. } if to == peer && device.epoch() == request.epoch => Ok(()),
            role => Err(AgentError::fenced(format!(
                "device {name} is {role:?} in epoch {} at host {}: it cannot come home from {peer} in epoch {}",
                device.epoch(),
                self.host(),
                request.epoch
            ))),
        }
    }

    /// As the host that the guest has left: nothing of the device is here any more, but the memory of it.
    pub(crate) async fn gone_home(self: &Arc<Self>, device: &Arc<Managed>, epoch: Epoch) {
        let name = device.name();
        let (backing, backend, copy) = match device.role() {
            RoleRecord::Remote { backing, delay_us, direct, replaces, .. } => {
                let backend =
                    BackendSpec { path: replaces, delay_us, direct, ..BackendSpec::file(PathBuf::new()) };
                (backing, backend, None)
            }
            RoleRecord::Exchanging { backing, backend } => {
                let copy = backend.path.clone();
                (backing, backend, copy)
            }
            _ => return,
        };
        let message = format!("its guest has gone home to {backing}, epoch {epoch}");
        self.events.note("handover", Some(&name), None, message);
        let left = RoleRecord::Tombstone { moved_to: backing, backend };
        if let Err(error) = self.record(device, device.epoch(), left).await {
            // After a restart the other host is asked, and says it again.
            self.events.note("handover", Some(&name), None, error.message);
            return;
        }
        if let Some(path) = copy {
            // A copy that was not cut over is worth nothing.
            let _ = tokio::fs::remove_file(path).await;
            let _ = tokio::fs::remove_file(map_path(&self.config, &name)).await;
        }
        self.forget_if_gone(device);
    }

    /// Stops the thread of a device that has left, as soon as no VMM is connected to it.
    pub(crate) fn forget_if_gone(self: &Arc<Self>, device: &Arc<Managed>) {
        let gone = matches!(device.role(), RoleRecord::Tombstone { .. });
        if gone && !device.vmm_connected() {
            let (agent, device) = (Arc::clone(self), Arc::clone(device));
            tokio::spawn(async move { agent.stop_device(&device).await });
        }
    }
}
