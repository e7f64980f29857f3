//! The agent: what it owns, and how its devices start and change.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use belay_link::{ControlClient, Identity};
use belay_wire::{DeviceId, Epoch};

use crate::config::Config;
use crate::departure::Departure;
use crate::device::Managed;
use crate::error::AgentError;
use crate::events::Events;
use crate::ledger::{DeviceRecord, Ledger, RoleRecord, allowed};
use crate::metrics::Counts;
use crate::operation::Operations;
use crate::vm::Vms;

pub(crate) mod devices;
mod notices;
pub(crate) mod ways;

/// How long one attempt to connect may take.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a backend that another process holds is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(50);
/// How long a predecessor's last writes may hold the lock before the device is said to be in trouble.
pub(crate) const LOCK_IS_USUAL: Duration = Duration::from_secs(5);

/// This host's agent.
pub struct Agent {
    /// Its configuration.
    pub config: Config,
    /// Who it is to others; without one it serves its own host only.
    pub identity: Option<Arc<Identity>>,
    /// What it knows durably.
    pub ledger: Arc<Ledger>,
    /// What has happened.
    pub events: Events,
    /// What is under way.
    pub operations: Operations,
    /// Its VMs.
    pub vms: Vms,
    /// The user that QEMU runs as, if it is not the agent's.
    pub(crate) vmm_uid: std::sync::OnceLock<u32>,
    /// Everything of the ledger is there.
    pub(crate) started: std::sync::atomic::AtomicBool,
    /// What it counts for its metrics.
    pub counts: Counts,
    /// Held while a device is prepared for a peer: the same call twice may not start it twice.
    pub(crate) preparing: tokio::sync::Mutex<()>,
    /// Devices that leave together.
    pub(crate) departures: Mutex<Vec<Arc<Departure>>>,
    /// VMs that wait for their memory.
    pub(crate) expected_memory: crate::ram::Expected,
    devices: Mutex<BTreeMap<String, Arc<Managed>>>,
    clients: Mutex<BTreeMap<String, ControlClient>>,
}

impl Agent {
    /// An agent that has not started its devices.
    #[must_use]
    pub fn new(config: Config, identity: Option<Arc<Identity>>, ledger: Ledger) -> Arc<Self> {
        Arc::new(Self {
            config,
            identity,
            ledger: Arc::new(ledger),
            events: Events::default(),
            operations: Operations::default(),
            vms: Vms::default(),
            vmm_uid: std::sync::OnceLock::new(),
            started: std::sync::atomic::AtomicBool::new(false),
            counts: Counts::default(),
            preparing: tokio::sync::Mutex::default(),
            departures: Mutex::default(),
            expected_memory: crate::ram::Expected::default(),
            devices: Mutex::default(),
            clients: Mutex::default(),
        })
    }

    /// This host's name.
    #[must_use]
    pub fn host(&self) -> String {
        let named = self.config.host_name.clone();
        named
            .or_else(|| self.identity.as_ref().map(|identity| identity.host().to_string()))
            .unwrap_or_else(|| "localhost".to_owned())
    }

    /// All devices.
    #[must_use]
    pub fn devices(&self) -> Vec<Arc<Managed>> {
        self.devices.lock().unwrap_or_else(std::sync::PoisonError::into_inner).values().cloned().collect()
    }

    /// Whether this device, and no other of its name that was started since, is one of this host.
    pub(crate) fn has_device(&self, device: &Managed) -> bool {
        self.device(&device.name()).is_ok_and(|present| std::ptr::eq(Arc::as_ptr(&present), device))
    }

    /// A device by its name.
    ///
    /// # Errors
    /// There is none.
    pub fn device(&self, name: &str) -> Result<Arc<Managed>, AgentError> {
        let devices = self.devices.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        devices.get(name).cloned().ok_or_else(|| {
            AgentError::not_found(format!("there is no device {name} on this host"))
                .hint("`belay device list` shows those that are")
        })
    }

    /// A device by its name; one that has left says where it went.
    ///
    /// # Errors
    /// There is none.
    pub fn device_or_gone(&self, name: &str) -> Result<Arc<Managed>, AgentError> {
        let missing = match self.device(name) {
            Ok(device) => return Ok(device),
            Err(missing) => missing,
        };
        let records = self.ledger.devices()?;
        let gone = records.into_iter().find_map(|record| match record.role {
            RoleRecord::Tombstone { moved_to, .. } if record.identity.name == name => Some(moved_to),
            _ => None,
        });
        Err(gone.map_or(missing, |to| AgentError::fenced(format!("device {name} has moved to {to}"))))
    }

    /// A device by its id.
    #[must_use]
    pub fn device_by_id(&self, id: DeviceId) -> Option<Arc<Managed>> {
        self.devices().into_iter().find(|device| device.identity().id == id)
    }

    /// Writes a record durably, then remembers it.
    ///
    /// # Errors
    /// The disk, or the device cannot go from its role to this one.
    pub async fn record(&self, device: &Managed, epoch: Epoch, role: RoleRecord) -> Result<(), AgentError> {
        // The limit belongs to one exchange.
        let copying = matches!(role, RoleRecord::Exchanging { .. } | RoleRecord::Cutting { .. });
        let bandwidth = if copying { device.record().bandwidth } else { None };
        self.record_with(device, epoch, role, bandwidth).await
    }

    /// As [`Agent::record`], with this limit of the device's exchange.
    pub(crate) async fn record_with(
        &self,
        device: &Managed,
        epoch: Epoch,
        role: RoleRecord,
        bandwidth: Option<u64>,
    ) -> Result<(), AgentError> {
        let _writing = device.writing.lock().await;
        let present = device.record();
        if epoch < present.epoch || !allowed(&present.role, &role) {
            return Err(AgentError::fenced(format!(
                "device {} is {:?} in epoch {}: it cannot become {role:?} in epoch {epoch}",
                present.identity.name, present.role, present.epoch
            )));
        }
        let record = DeviceRecord { epoch, role, offered: None, bandwidth, listed: None, ..present };
        self.write_record(record.clone()).await?;
        device.set_record(record);
        Ok(())
    }

    /// Writes a record durably.
    ///
    /// # Errors
    /// The disk.
    pub async fn write_record(&self, record: DeviceRecord) -> Result<(), AgentError> {
        self.write_records(vec![record]).await
    }

    /// Writes the records of several devices durably: all of them, or none.
    ///
    /// # Errors
    /// The disk.
    pub(crate) async fn write_records(&self, records: Vec<DeviceRecord>) -> Result<(), AgentError> {
        let ledger = Arc::clone(&self.ledger);
        tokio::task::spawn_blocking(move || ledger.put_devices(&records))
            .await
            .map_err(|error| AgentError::failed(error.to_string()))?
            .map_err(Into::into)
    }
}

/// Names are used in paths and on command lines.
pub(crate) fn check_name(name: &str) -> Result<(), AgentError> {
    let fits = !name.is_empty()
        && name.len() <= 64
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        && !name.starts_with('.');
    if fits {
        Ok(())
    } else {
        Err(AgentError::usage(format!("{name:?} is no name: letters, digits, `-`, `_` and `.`, at most 64")))
    }
}

/// What another host says of a device is checked like what a user says.
pub(crate) fn check_identity(identity: &belay_wire::DeviceIdentity) -> Result<(), AgentError> {
    check_name(&identity.name)?;
    let belay_wire::device::DeviceClass::Block(geometry) = &identity.class;
    let wrong = if geometry.size_bytes == 0 || !geometry.size_bytes.is_multiple_of(512) {
        "its size is no multiple of 512 bytes"
    } else if !(1..=64).contains(&geometry.queues) {
        "it has not 1 to 64 queues"
    } else if !geometry.queue_entries.is_power_of_two() || geometry.queue_entries > 1024 {
        "its queues' length is no power of two up to 1024"
    } else if ![512, 4096].contains(&geometry.block_bytes) {
        "its blocks have neither 512 nor 4096 bytes"
    } else if geometry.serial.len() > 20 || !geometry.serial.is_ascii() {
        "its serial number is not at most 20 ASCII characters"
    } else {
        return Ok(());
    };
    Err(AgentError::usage(format!("device {}: {wrong}", identity.name)))
}

/// A Unix listener at `path`, in place of whatever socket an earlier process left there.
pub(crate) fn listen(path: &Path) -> std::io::Result<std::os::unix::net::UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let _ = std::fs::remove_file(path);
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// Where the map of a device's exchange is kept.
pub(crate) fn map_path(config: &Config, name: &str) -> PathBuf {
    config.state_dir.join("maps").join(format!("{name}.map"))
}

#[cfg(test)]
mod tests {
    use belay_wire::device::{BlockGeometry, DeviceClass};

    use super::*;

    fn identity(name: &str, change: impl FnOnce(&mut BlockGeometry)) -> belay_wire::DeviceIdentity {
        let mut geometry = BlockGeometry {
            size_bytes: 1 << 20,
            block_bytes: 512,
            queues: 1,
            queue_entries: 128,
            read_only: false,
            serial: "s".into(),
        };
        change(&mut geometry);
        let class = DeviceClass::Block(geometry);
        belay_wire::DeviceIdentity { id: DeviceId::random(), name: name.into(), vm: None, class }
    }

    #[test]
    fn identity_of_a_peer_that_cannot_be_is_refused() {
        check_identity(&identity("disk0", |_| {})).unwrap();
        check_identity(&identity("../../etc/passwd", |_| {})).unwrap_err();
        check_identity(&identity("", |_| {})).unwrap_err();
        let refused: [fn(&mut BlockGeometry); 7] = [
            |geometry| geometry.size_bytes = 513,
            |geometry| geometry.queues = 0,
            |geometry| geometry.queues = 65,
            |geometry| geometry.queue_entries = 100,
            |geometry| geometry.queue_entries = 2048,
            |geometry| geometry.block_bytes = 1024,
            |geometry| geometry.serial = "x".repeat(21),
        ];
        for change in refused {
            check_identity(&identity("disk0", change)).unwrap_err();
        }
    }
}
