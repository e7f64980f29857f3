//! A device to be added, as the API and the configuration describe it.

use std::path::PathBuf;
use std::sync::Arc;

use belay_block::{BackendSpec, Driver, FaultRule, ThrottleSpec};
use belay_wire::device::{BlockGeometry, DeviceClass};
use belay_wire::{DeviceId, DeviceIdentity};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::agent::Agent;
use crate::device::Managed;
use crate::error::AgentError;
use crate::ledger::{DeviceRecord, RoleRecord};

/// Entries of each queue.
const QUEUE_ENTRIES: u16 = 256;
/// A file that is made for a disk has a multiple of so many bytes.
const MADE_IN_BYTES: u64 = 4096;

/// A device to be added.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewDevice {
    /// Its name.
    pub name: String,
    /// `file` (default): a regular file or a block device; `memory`: lost with the agent; `null`: keeps nothing.
    #[serde(default)]
    #[schema(value_type = String)]
    pub driver: Driver,
    /// The regular file or block device.
    #[schema(value_type = Option<String>)]
    pub path: Option<PathBuf>,
    /// Create the file with this size in bytes if it is missing; the size of `memory` and `null`.
    pub size_bytes: Option<u64>,
    /// Queues, 1 to 64.
    #[serde(default = "one")]
    pub queues: u16,
    /// Size of a block, 512 or 4096.
    #[serde(default = "sector")]
    pub block_bytes: u32,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// Serial number; default: the beginning of the name.
    pub serial: Option<String>,
    /// Its VM.
    pub vm: Option<String>,
    /// Past the page cache.
    #[serde(default = "yes")]
    pub direct: bool,
    /// Hold every operation so long, in microseconds (for tests and demonstrations).
    pub delay_us: Option<u64>,
    /// Limits: `iops` and `bytes_per_s`.
    #[schema(value_type = Option<Object>)]
    pub throttle: Option<ThrottleSpec>,
    /// Operations that fail (for tests), each rule with `errno` and any of `kind` (`read`, `write`, `flush`,
    /// `discard`, `write_zeroes`), `offset`, `len`, `every` and `first`.
    #[serde(default)]
    #[schema(value_type = Vec<Object>)]
    pub fault: Vec<FaultRule>,
}

fn one() -> u16 {
    1
}

fn sector() -> u32 {
    512
}

fn yes() -> bool {
    true
}

impl NewDevice {
    fn check(&self) -> Result<(), AgentError> {
        crate::agent::check_name(&self.name)?;
        let usage = |what: String| Err(AgentError::usage(format!("device {}: {what}", self.name)));
        if !(1..=64).contains(&self.queues) {
            return usage(format!("{} queues: a disk has 1 to 64", self.queues));
        }
        if self.block_bytes != 512 && self.block_bytes != 4096 {
            return usage(format!("a block size of {}: 512 or 4096", self.block_bytes));
        }
        if let Some(serial) = self.serial.as_ref().filter(|serial| serial.len() > 20 || !serial.is_ascii()) {
            return usage(format!("serial {serial:?}: at most 20 bytes of ASCII"));
        }
        match (self.driver, &self.path) {
            (Driver::File, None) => usage("it needs the path of a file or block device".to_owned()),
            (Driver::Null | Driver::Memory, None) if self.size_bytes.is_none() => {
                usage("it has no file, so it needs a size".to_owned())
                    .map_err(|error| error.hint("`--size 1G`"))
            }
            (Driver::Null | Driver::Memory, Some(path)) => {
                usage(format!("{} is not used: only a device with driver `file` has a path", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Whether this record is what would be made of it: then it was added before.
    fn is(&self, record: &DeviceRecord) -> bool {
        let RoleRecord::Local { backend } = &record.role else { return false };
        let wanted = self.identity();
        let (DeviceClass::Block(mut wanted), DeviceClass::Block(there)) =
            (wanted.class, &record.identity.class);
        wanted.size_bytes = there.size_bytes;
        let size = self.size_bytes.is_none_or(|size| size == there.size_bytes);
        let mut like = self.backend();
        like.size_bytes = backend.size_bytes;
        size && wanted == *there && self.vm == record.identity.vm && like == *backend
    }

    fn identity(&self) -> DeviceIdentity {
        let default = || self.name.chars().filter(char::is_ascii).take(20).collect();
        DeviceIdentity {
            id: DeviceId::random(),
            name: self.name.clone(),
            vm: self.vm.clone(),
            class: DeviceClass::Block(BlockGeometry {
                size_bytes: 0,
                block_bytes: self.block_bytes,
                queues: self.queues,
                queue_entries: QUEUE_ENTRIES,
                read_only: self.read_only,
                serial: self.serial.clone().unwrap_or_else(default),
            }),
        }
    }

    fn backend(&self) -> BackendSpec {
        let path = self.path.as_ref().map(|path| std::path::absolute(path).unwrap_or_else(|_| path.clone()));
        BackendSpec {
            driver: self.driver,
            path,
            size_bytes: self.size_bytes.filter(|_| self.driver != Driver::File),
            direct: self.direct,
            read_only: self.read_only,
            delay_us: self.delay_us,
            fault: self.fault.clone(),
            throttle: self.throttle,
        }
    }

    /// Makes its file if it is missing; the path that was made.
    fn make_file(&self) -> Result<Option<&PathBuf>, AgentError> {
        let (Driver::File, Some(path)) = (self.driver, &self.path) else { return Ok(None) };
        match (std::fs::metadata(path), self.size_bytes) {
            (Ok(present), Some(size)) if present.is_file() && present.len() != size => {
                Err(AgentError::usage(format!(
                    "device {}: {} is there already and has {} bytes, not {size}",
                    self.name,
                    path.display(),
                    present.len()
                ))
                .hint("leave the size out to use the file as it is; `belay device resize` makes it larger"))
            }
            (Err(error), None) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(AgentError::failed(format!("device {}: {} does not exist", self.name, path.display()))
                    .hint("with a size it is created: `--size 10G`"))
            }
            (Err(error), Some(size)) if error.kind() == std::io::ErrorKind::NotFound => {
                if size == 0 || !size.is_multiple_of(MADE_IN_BYTES) {
                    let what = format!(
                        "device {}: a size of {size} bytes: a disk has a multiple of 4096",
                        self.name
                    );
                    return Err(AgentError::usage(what));
                }
                let made = std::fs::File::create_new(path).and_then(|file| {
                    file.set_len(size)?;
                    crate::exchange::sync_new(&file, path)
                });
                made.map_err(|error| {
                    AgentError::failed(format!(
                        "device {}: cannot create {}: {error}",
                        self.name,
                        path.display()
                    ))
                })?;
                Ok(Some(path))
            }
            _ => Ok(None),
        }
    }
}

impl Agent {
    /// Adds a device that is described like this; its file is made if it is missing and a size is given.
    ///
    /// # Errors
    /// The description is wrong, the name is taken, or the backend cannot be opened.
    pub async fn add_new_device(self: &Arc<Self>, new: &NewDevice) -> Result<Arc<Managed>, AgentError> {
        new.check()?;
        if let Ok(present) = self.device(&new.name) {
            if new.is(&present.record()) {
                return Ok(present);
            }
            return Err(AgentError::usage(format!("there is a device {} already", new.name))
                .hint(format!("`belay device show {}` shows it; choose another name", new.name)));
        }
        self.check_not_departed(new)?;
        let made = new.make_file()?;
        let added = self.add_device(new.identity(), new.backend()).await;
        if let (Err(_), Some(path)) = (&added, made) {
            let _ = std::fs::remove_file(path);
        }
        added
    }

    /// What a device has left here when it moved is an old copy: nobody shall take it for the device by mistake.
    fn check_not_departed(&self, new: &NewDevice) -> Result<(), AgentError> {
        let path = new.backend().path;
        for record in self.ledger.devices()? {
            let RoleRecord::Tombstone { moved_to, backend } = &record.role else { continue };
            let name = &record.identity.name;
            let left = path.is_some() && backend.path == path;
            if !left && *name != new.name {
                continue;
            }
            let what = match path.as_ref().filter(|_| left) {
                Some(path) => format!("{} is what device {name} has left here, an old copy", path.display()),
                None => "this host has had a device of that name".to_owned(),
            };
            return Err(AgentError::precheck(format!(
                "device {}: {what}: it has moved to {moved_to}",
                new.name
            ))
            .hint(format!("`belay device remove {name}` lets this host forget that")));
        }
        Ok(())
    }

    /// Adds the devices of the configuration that this host has never had.
    ///
    /// # Errors
    /// The ledger cannot be read.
    pub async fn add_configured_devices(self: &Arc<Self>) -> Result<(), AgentError> {
        let known = self.ledger.devices()?;
        for new in &self.config.device {
            // One that has left, too: it must not come back as another device of the same name.
            if known.iter().any(|record| record.identity.name == new.name) {
                continue;
            }
            if let Err(error) = self.add_new_device(new).await {
                self.events.note("device", Some(&new.name), None, format!("cannot be added: {error}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: serde_json::Value) -> NewDevice {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn descriptions_that_cannot_be_are_refused_by_what_is_wrong() {
        for (json, what) in [
            (serde_json::json!({"name": "../d", "path": "/d"}), "is no name"),
            (serde_json::json!({"name": "d"}), "needs the path"),
            (serde_json::json!({"name": "d", "path": "/d", "queues": 0}), "0 queues"),
            (serde_json::json!({"name": "d", "path": "/d", "block_bytes": 1024}), "block size"),
            (serde_json::json!({"name": "d", "path": "/d", "serial": "ä"}), "serial"),
            (serde_json::json!({"name": "d", "driver": "null", "path": "/d"}), "not used"),
            (serde_json::json!({"name": "d", "driver": "memory"}), "needs a size"),
        ] {
            let error = parse(json).check().unwrap_err();
            assert!(error.code == "usage" && error.message.contains(what), "{error}");
        }
    }

    #[test]
    fn decorators_are_in_the_backend() {
        let new =
            parse(serde_json::json!({"name": "d", "path": "/d", "delay_us": 5, "throttle": {"iops": 9},
            "fault": [{"kind": "write", "errno": 5, "every": 3}]}));
        let backend = new.backend();
        assert_eq!((backend.delay_us, backend.throttle.unwrap().iops), (Some(5), Some(9)));
        assert_eq!(backend.fault[0].every, Some(3));
    }

    #[test]
    fn file_is_made_once_and_never_taken_for_one_of_another_size() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.img");
        let new = |size| parse(serde_json::json!({"name": "d", "path": path, "size_bytes": size}));
        assert!(new(None::<u64>).make_file().unwrap_err().hint.unwrap().contains("--size"));
        new(Some(1000)).make_file().unwrap_err();
        assert!(!path.exists());
        assert!(new(Some(8192)).make_file().unwrap().is_some());
        assert!(new(Some(8192)).make_file().unwrap().is_none());
        assert!(new(Some(4096)).make_file().unwrap_err().message.contains("has 8192 bytes"));
        assert!(new(None).make_file().unwrap().is_none());
    }
}
