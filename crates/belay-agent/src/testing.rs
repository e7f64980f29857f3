//! What unit tests of the agent begin with.

use std::sync::Arc;

use belay_block::{BackendSpec, Driver};
use belay_wire::device::{BlockGeometry, DeviceClass};
use belay_wire::{DeviceId, DeviceIdentity, Epoch};

use crate::agent::Agent;
use crate::config::Config;
use crate::ledger::{DeviceRecord, Ledger, RoleRecord, SCHEMA};

/// An agent without devices that belongs to no cluster, and the folder that it lives in.
pub(crate) fn agent() -> (tempfile::TempDir, Arc<Agent>) {
    let folder = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(&folder.path().join("ledger.redb")).unwrap();
    let config = Config {
        runtime_dir: folder.path().to_owned(),
        state_dir: folder.path().join("state"),
        ..Config::default()
    };
    let agent = Agent::new(config, None, ledger);
    (folder, agent)
}

/// A disk of 1 MiB.
pub(crate) fn identity(name: &str) -> DeviceIdentity {
    let class = DeviceClass::Block(BlockGeometry {
        size_bytes: 1 << 20,
        block_bytes: 512,
        queues: 1,
        queue_entries: 128,
        read_only: false,
        serial: String::new(),
    });
    DeviceIdentity { id: DeviceId::random(), name: name.into(), vm: None, class }
}

/// Its content, in memory.
pub(crate) fn memory() -> BackendSpec {
    BackendSpec {
        driver: Driver::Memory,
        path: None,
        size_bytes: Some(1 << 20),
        ..BackendSpec::file("/none".into())
    }
}

/// Such a disk's record.
pub(crate) fn record(name: &str, epoch: Epoch, role: RoleRecord) -> DeviceRecord {
    DeviceRecord {
        schema: SCHEMA,
        identity: identity(name),
        epoch,
        role,
        offered: None,
        bandwidth: None,
        listed: None,
    }
}
