//! Devices that change hands together: one write for all of them.

use std::sync::Arc;

use belay_attach::Command;
use belay_wire::{DeviceId, Epoch};

use crate::agent::Agent;
use crate::device::Managed;
use crate::error::AgentError;
use crate::ledger::{DeviceRecord, RoleRecord, allowed};

impl Agent {
    /// Gives each device its new epoch, and the role that `role` makes of the present one; `None`: it cannot be. One
    /// write for all, or none. Then each, `ready` first, is seen with its new record, and its thread is told by
    /// `command`. The same write keeps what is in flight in those that go `home` with them: whoever has forgotten it is
    /// told from there.
    ///
    /// # Errors
    /// A device is not here, or cannot change so, or is in that epoch already; the disk. Nothing has been changed then.
    pub(crate) async fn hand_over(
        &self,
        claims: &[(DeviceId, Epoch)],
        home: &[Arc<Managed>],
        role: impl Fn(&RoleRecord) -> Option<RoleRecord>,
        ready: impl Fn(usize, &Managed),
        command: impl Fn(Epoch) -> Command,
    ) -> Result<Vec<Arc<Managed>>, AgentError> {
        let mut devices = Vec::new();
        for (id, _) in claims {
            let device = self.device_by_id(*id);
            devices.push(device.ok_or_else(|| AgentError::failed("the device is not here any more"))?);
        }
        let mut locks = Vec::new();
        let mut records = Vec::new();
        for (device, (_, epoch)) in devices.iter().zip(claims) {
            locks.push(device.writing.lock().await);
            records.push(changed(device.record(), *epoch, &role)?);
        }
        let mut kept = Vec::new();
        for device in home {
            let Some(list) = device.listed() else { continue };
            locks.push(device.writing.lock().await);
            let record = device.record();
            if record.offered.is_some() {
                kept.push((device, DeviceRecord { listed: Some(list.encode()), ..record }));
            }
        }
        let all = records.iter().chain(kept.iter().map(|(_, record)| record)).cloned();
        self.write_records(all.collect()).await?;
        kept.into_iter().for_each(|(device, record)| device.set_record(record));
        for (index, ((device, (_, epoch)), record)) in devices.iter().zip(claims).zip(records).enumerate() {
            ready(index, device);
            device.set_record(record);
            device.send(command(*epoch));
        }
        drop(locks);
        Ok(devices)
    }
}

impl Agent {
    /// A ring runs again: what was in flight is not what will be.
    pub(crate) async fn forget_listed(&self, device: &Managed) {
        device.set_listed(None);
        let _writing = device.writing.lock().await;
        let record = device.record();
        if record.listed.is_none() {
            return;
        }
        let record = DeviceRecord { listed: None, ..record };
        match self.write_record(record.clone()).await {
            Ok(()) => device.set_record(record),
            Err(error) => tracing::error!(device = %device.name(), %error, "an old list stays in the ledger"),
        }
    }
}

/// The record of a device that changes hands, unless it cannot.
fn changed(
    record: DeviceRecord,
    epoch: Epoch,
    role: impl Fn(&RoleRecord) -> Option<RoleRecord>,
) -> Result<DeviceRecord, AgentError> {
    let Some(role) = role(&record.role) else {
        return Err(AgentError::failed(format!("the ledger says {:?}", record.role)));
    };
    if epoch <= record.epoch || !allowed(&record.role, &role) {
        return Err(AgentError::fenced(format!("it is in epoch {} already, not {epoch}", record.epoch)));
    }
    Ok(DeviceRecord { epoch, role, offered: None, bandwidth: None, listed: None, ..record })
}
