//! What this host knows durably: each device's epoch, attachment and backing, and the VMs it started.
//!
//! One redb file. Every write is durable when it returns: the grant of a handover and the commit of an exchange are
//! such writes. A record that cannot be read is an error, never a guess.

use std::path::{Path, PathBuf};

use belay_block::BackendSpec;
use belay_wire::{DeviceIdentity, Epoch};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

const DEVICES: TableDefinition<'_, &str, &str> = TableDefinition::new("devices");
const VMS: TableDefinition<'_, &str, &str> = TableDefinition::new("vms");

/// What becomes of a device's backing after a handover.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// It follows the guest.
    #[default]
    Follow,
    /// It stays where it is.
    Stay,
}

/// Where a device's guest and backing are, as this host has agreed to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "snake_case")]
pub enum RoleRecord {
    /// Both here.
    Local {
        /// The backend.
        backend: BackendSpec,
    },
    /// The backing is here, the guest at another host.
    Lent {
        /// The backend.
        backend: BackendSpec,
        /// The host with the guest.
        to: String,
    },
    /// The guest may come here.
    Prepared {
        /// The host that has the device.
        from: String,
        /// What to do afterwards.
        mode: Mode,
        /// Held back at the new backend, in microseconds, as at the old one.
        delay_us: Option<u64>,
        /// The new backend bypasses the page cache, as the old one.
        #[serde(default)]
        direct: bool,
        /// What this host keeps of the device's earlier stay.
        #[serde(default)]
        replaces: Option<Departed>,
    },
    /// The guest is here, the backing at another host.
    Remote {
        /// The host with the backing.
        backing: String,
        /// As in [`RoleRecord::Prepared`].
        delay_us: Option<u64>,
        /// As in [`RoleRecord::Prepared`].
        #[serde(default)]
        direct: bool,
        /// The backing is to follow the guest as soon as it can.
        #[serde(default)]
        follow: bool,
        /// A file of this device that a new copy may replace: nothing else is ever removed.
        #[serde(default)]
        replaces: Option<PathBuf>,
    },
    /// The guest is here, the backing is being copied here.
    Exchanging {
        /// The host with the backing.
        backing: String,
        /// The new backend.
        backend: BackendSpec,
    },
    /// Everything is here; the other host has been, or is about to be, asked to commit.
    Cutting {
        /// The host with the backing.
        backing: String,
        /// The new backend.
        backend: BackendSpec,
    },
    /// The device has left this host.
    Tombstone {
        /// Where to.
        moved_to: String,
        /// What it was stored in here.
        backend: BackendSpec,
    },
}

impl RoleRecord {
    /// Whether the guest is here, and may be offered to another host.
    #[must_use]
    pub fn is_guest_here(&self) -> bool {
        matches!(self, Self::Local { .. } | Self::Remote { .. } | Self::Exchanging { .. })
    }

    /// Whether the guest is here.
    #[must_use]
    pub fn has_guest(&self) -> bool {
        self.is_guest_here() || matches!(self, Self::Cutting { .. })
    }

    /// The file that this host serves, or fills, for the device.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Local { backend }
            | Self::Lent { backend, .. }
            | Self::Exchanging { backend, .. }
            | Self::Cutting { backend, .. } => backend.path.as_deref(),
            Self::Prepared { .. } | Self::Remote { .. } | Self::Tombstone { .. } => None,
        }
    }
}

/// What is kept of a device that has left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Departed {
    /// Where it went.
    pub moved_to: String,
    /// The epoch in which it left.
    pub epoch: Epoch,
    /// What it was stored in here.
    pub backend: BackendSpec,
}

/// Whether a device may go from one role to another. Every other change would let two hosts, or none, have it.
#[must_use]
pub fn allowed(from: &RoleRecord, to: &RoleRecord) -> bool {
    use RoleRecord::{Cutting, Exchanging, Lent, Local, Prepared, Remote, Tombstone};
    match (from, to) {
        (Local { .. }, Lent { .. })
        | (Lent { .. }, Tombstone { .. })
        | (Tombstone { .. }, Prepared { .. })
        // The guest has gone home to its backing.
        | (Remote { .. } | Exchanging { .. }, Tombstone { .. })
        | (Prepared { .. }, Remote { .. } | Tombstone { .. })
        | (Cutting { .. }, Local { .. }) => true,
        // The guest has come home.
        (Lent { backend, .. }, Local { backend: kept }) => backend == kept,
        (Remote { backing, .. }, Remote { backing: after, .. } | Exchanging { backing: after, .. })
        | (Exchanging { backing, .. }, Remote { backing: after, .. }) => backing == after,
        (Exchanging { backing, backend }, Cutting { backing: after, backend: kept })
        | (
            Cutting { backing, backend },
            Exchanging { backing: after, backend: kept } | Cutting { backing: after, backend: kept },
        ) => backing == after && backend == kept,
        _ => false,
    }
}

/// A device's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Version of this record.
    pub schema: u32,
    /// What the device is.
    pub identity: DeviceIdentity,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its role here.
    pub role: RoleRecord,
    /// The host that may take it; only of a device whose guest and backing are here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offered: Option<OfferRecord>,
    /// The limit that its exchange was given, in bytes per second, in place of the configured one; 0: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// What was in flight when its rings stopped, as in a LIST frame: of a device whose guest goes home with a VM whose
    /// other disks have been granted. The other host may have to be told by an agent that has forgotten it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listed: Option<Vec<u8>>,
}

/// A host may take a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferRecord {
    /// The host.
    pub to: String,
    /// What becomes of the backing afterwards.
    pub mode: Mode,
}

/// A VM's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Version of this record.
    pub schema: u32,
    /// Its name.
    pub name: String,
    /// Its specification as JSON; `None` for an adopted VM.
    pub spec: Option<serde_json::Value>,
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// Process id, and start time by which it is recognised.
    pub process: Option<serde_json::Value>,
    /// Names of its devices.
    pub devices: Vec<String>,
    /// It is on its way to another host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migrating: Option<MigratingRecord>,
    /// The host that its memory comes from, while it waits for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incoming: Option<String>,
}

/// A VM is on its way: an agent that finds this after a restart finds out how that ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigratingRecord {
    /// The other host.
    pub to: String,
    /// It ran when the migration began.
    pub ran: bool,
    /// What becomes of its disks.
    #[serde(default)]
    pub mode: Mode,
    /// The id that callers follow it by.
    #[serde(default)]
    pub operation: Option<u64>,
}

/// The version of records that this build writes.
pub const SCHEMA: u32 = 1;

/// Why the ledger cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The file cannot be opened or is damaged.
    #[error("the ledger {path} cannot be opened: {reason}. Nothing was changed. Restore it from a backup; the other hosts' ledgers tell where devices are", path = .path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A read or write failed.
    #[error("the ledger failed: {0}")]
    Storage(String),
    /// A record that this build cannot read.
    #[error("the ledger's record {key} cannot be read: {reason}")]
    Record {
        /// Which.
        key: String,
        /// Why.
        reason: String,
    },
}

fn storage(error: impl std::fmt::Display) -> LedgerError {
    LedgerError::Storage(error.to_string())
}

/// The ledger. Calls block for as long as the disk takes.
pub struct Ledger {
    database: Database,
}

impl Ledger {
    /// Opens or creates it.
    ///
    /// # Errors
    /// It is damaged, in use, or cannot be created.
    pub fn open(path: &Path) -> Result<Self, LedgerError> {
        let failed = |reason: String| LedgerError::Open { path: path.to_owned(), reason };
        let database = Database::create(path).map_err(|error| failed(error.to_string()))?;
        let transaction = database.begin_write().map_err(|error| failed(error.to_string()))?;
        transaction.open_table(DEVICES).map_err(|error| failed(error.to_string()))?;
        transaction.open_table(VMS).map_err(|error| failed(error.to_string()))?;
        transaction.commit().map_err(|error| failed(error.to_string()))?;
        Ok(Self { database })
    }

    fn write(
        &self,
        table: TableDefinition<'_, &'static str, &'static str>,
        key: &str,
        value: Option<&str>,
    ) -> Result<(), LedgerError> {
        let transaction = self.database.begin_write().map_err(storage)?;
        {
            let mut table = transaction.open_table(table).map_err(storage)?;
            match value {
                Some(value) => table.insert(key, value).map_err(storage)?,
                None => table.remove(key).map_err(storage)?,
            };
        }
        transaction.commit().map_err(storage)
    }

    fn all<T: serde::de::DeserializeOwned>(
        &self,
        table: TableDefinition<'_, &'static str, &'static str>,
    ) -> Result<Vec<T>, LedgerError> {
        let transaction = self.database.begin_read().map_err(storage)?;
        let table = transaction.open_table(table).map_err(storage)?;
        let mut records = Vec::new();
        for entry in table.iter().map_err(storage)? {
            let (key, value) = entry.map_err(storage)?;
            let record = serde_json::from_str(value.value()).map_err(|error| LedgerError::Record {
                key: key.value().to_owned(),
                reason: error.to_string(),
            })?;
            records.push(record);
        }
        Ok(records)
    }

    /// Writes a device's record, durably.
    ///
    /// # Errors
    /// The disk.
    pub fn put_device(&self, record: &DeviceRecord) -> Result<(), LedgerError> {
        self.put_devices(std::slice::from_ref(record))
    }

    /// Writes the records of several devices with one durable write: all of them, or none.
    ///
    /// # Errors
    /// The disk.
    pub fn put_devices(&self, records: &[DeviceRecord]) -> Result<(), LedgerError> {
        let transaction = self.database.begin_write().map_err(storage)?;
        {
            let mut table = transaction.open_table(DEVICES).map_err(storage)?;
            for record in records {
                let text = serde_json::to_string(record).map_err(storage)?;
                table.insert(record.identity.id.to_string().as_str(), text.as_str()).map_err(storage)?;
            }
        }
        transaction.commit().map_err(storage)
    }

    /// Forgets a device.
    ///
    /// # Errors
    /// The disk.
    pub fn remove_device(&self, id: belay_wire::DeviceId) -> Result<(), LedgerError> {
        self.write(DEVICES, &id.to_string(), None)
    }

    /// All devices.
    ///
    /// # Errors
    /// The disk, or a record that cannot be read.
    pub fn devices(&self) -> Result<Vec<DeviceRecord>, LedgerError> {
        self.all(DEVICES)
    }

    /// Writes a VM's record, durably.
    ///
    /// # Errors
    /// The disk.
    pub fn put_vm(&self, record: &VmRecord) -> Result<(), LedgerError> {
        let text = serde_json::to_string(record).map_err(storage)?;
        self.write(VMS, &record.name, Some(&text))
    }

    /// Forgets a VM.
    ///
    /// # Errors
    /// The disk.
    pub fn remove_vm(&self, name: &str) -> Result<(), LedgerError> {
        self.write(VMS, name, None)
    }

    /// All VMs.
    ///
    /// # Errors
    /// The disk, or a record that cannot be read.
    pub fn vms(&self) -> Result<Vec<VmRecord>, LedgerError> {
        self.all(VMS)
    }
}

#[cfg(test)]
mod tests {
    use belay_wire::DeviceId;
    use belay_wire::device::{BlockGeometry, DeviceClass};

    use super::*;

    fn record() -> DeviceRecord {
        DeviceRecord {
            schema: SCHEMA,
            identity: DeviceIdentity {
                id: DeviceId::random(),
                name: "disk0".into(),
                vm: None,
                class: DeviceClass::Block(BlockGeometry {
                    size_bytes: 512,
                    block_bytes: 512,
                    queues: 1,
                    queue_entries: 128,
                    read_only: false,
                    serial: String::new(),
                }),
            },
            epoch: Epoch(3),
            role: RoleRecord::Lent { backend: BackendSpec::file("/a".into()), to: "b".into() },
            offered: None,
            bandwidth: None,
            listed: None,
        }
    }

    #[test]
    fn record_is_there_after_the_ledger_was_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.redb");
        let record = record();
        Ledger::open(&path).unwrap().put_device(&record).unwrap();
        let ledger = Ledger::open(&path).unwrap();
        assert_eq!(ledger.devices().unwrap(), std::slice::from_ref(&record));
        ledger.remove_device(record.identity.id).unwrap();
        assert!(ledger.devices().unwrap().is_empty());
    }

    #[test]
    fn only_the_changes_of_a_handover_and_an_exchange_are_allowed() {
        let backend = BackendSpec::file("/a".into());
        let (host, other) = ("b".to_owned(), "c".to_owned());
        let remote = |backing: &String| RoleRecord::Remote {
            backing: backing.clone(),
            delay_us: None,
            direct: false,
            follow: false,
            replaces: None,
        };
        let prepared = RoleRecord::Prepared {
            from: host.clone(),
            mode: Mode::Follow,
            delay_us: None,
            direct: false,
            replaces: None,
        };
        let all = [
            RoleRecord::Local { backend: backend.clone() },
            RoleRecord::Lent { backend: backend.clone(), to: host.clone() },
            prepared,
            remote(&host),
            RoleRecord::Exchanging { backing: host.clone(), backend: backend.clone() },
            RoleRecord::Cutting { backing: host.clone(), backend: backend.clone() },
            RoleRecord::Tombstone { moved_to: host.clone(), backend },
        ];
        let mut found = Vec::new();
        for (from, before) in all.iter().enumerate() {
            for (to, after) in all.iter().enumerate() {
                if allowed(before, after) {
                    found.push((from, to));
                }
            }
        }
        let wanted = [
            (0, 1),
            (1, 0),
            (1, 6),
            (2, 3),
            (2, 6),
            (3, 3),
            (3, 4),
            (3, 6),
            (4, 3),
            (4, 5),
            (4, 6),
            (5, 0),
            (5, 4),
            (5, 5),
            (6, 2),
        ];
        assert_eq!(found, wanted);
        assert!(!allowed(&remote(&host), &remote(&other)));
    }

    #[test]
    fn record_of_an_earlier_build_can_be_read() {
        let role: RoleRecord =
            serde_json::from_str(r#"{"role":"remote","backing":"b","delay_us":null}"#).unwrap();
        assert!(matches!(role, RoleRecord::Remote { follow: false, direct: false, replaces: None, .. }));
        let before = record();
        let text = serde_json::to_string(&before).unwrap();
        assert!(!text.contains("offered") && !text.contains("bandwidth"), "{text}");
        assert_eq!(serde_json::from_str::<DeviceRecord>(&text).unwrap(), before);
        let vm = r#"{"schema":1,"name":"vm","spec":null,"qmp":"/q","process":null,"devices":["disk0"]}"#;
        let read: VmRecord = serde_json::from_str(vm).unwrap();
        assert!(read.migrating.is_none() && read.incoming.is_none());
        assert_eq!(serde_json::to_string(&read).unwrap(), vm);
    }

    #[test]
    fn damaged_ledger_is_refused_with_the_way_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.redb");
        std::fs::write(&path, vec![0x5a; 8192]).unwrap();
        let error = Ledger::open(&path).err().unwrap().to_string();
        assert!(error.contains("backup"), "{error}");
    }
}
