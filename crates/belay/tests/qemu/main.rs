//! End to end: two real agents, real VMs, the real command. Every request of the guests is checked by the guests.
//!
//! Needs QEMU (`BELAY_QEMU`, else the installed one), some tests the guest of `scripts/guest-image`; what is missing
//! is told, and its tests are skipped.

mod adopt;
mod agents;
mod arguments;
mod boot;
mod disks;
mod home;
mod linux;
mod stops;
mod third;

use std::path::Path;

use anyhow::{Result, ensure};
use belay_e2e::{Background, Bed, Host, Qmp};
use serde_json::Value;

/// Runs a test on two hosts, and tells what the agents say if it fails. Skipped, with the reason, without QEMU.
fn with_bed(test: impl FnOnce(&mut Bed) -> Result<()>) {
    if let Some(reason) = belay_e2e::no_qemu() {
        belay_e2e::skip(reason);
        return;
    }
    let mut bed = Bed::start(Path::new(env!("CARGO_BIN_EXE_belay"))).expect("two hosts");
    if let Err(error) = test(&mut bed) {
        panic!("{error:#}\n{}", bed.logs());
    }
}

/// Migrates with `belay migrate`, which waits for the disk, and returns the operation.
fn migrate(from: &Host, to: &Host, vm: &str, more: &[&str]) -> Result<Value> {
    let operation = from.json(&[&["migrate", vm, to.name], more].concat())?;
    ensure!(operation["state"] == "done", "the migration ended as {operation}");
    from.wait_vm_gone(vm)?;
    Ok(operation)
}

/// Begins a migration that waits right before the switchover: the rings have stopped, nobody lets go of the VM but who has
/// this QMP connection.
fn hold_before_switchover(from: &Host, to: &Host, vm: &str, more: &[&str]) -> Result<(Qmp, Background)> {
    let mut qmp = from.qmp(vm)?;
    qmp.pause_before_switchover(true)?;
    let command = from.spawn(&[&["migrate", vm, to.name], more].concat())?;
    qmp.wait_pre_switchover()?;
    Ok((qmp, command))
}

fn in_flight(operation: &Value) -> u64 {
    operation["report"]["handover"]["requests_in_flight"].as_u64().unwrap_or(0)
}
