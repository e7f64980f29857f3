//! `belay status`.

use std::io::IsTerminal;
use std::time::Duration;

use super::Context;
use super::device::state_text;
use crate::client::understood;
use crate::error::Failure;
use crate::model::{Device, OperationState, Status};
use crate::output::{self, Table};

const WATCH_INTERVAL: Duration = Duration::from_secs(1);
const CLEAR: &str = "\x1b[2J\x1b[H";

pub(super) async fn run(context: &Context, watch: bool) -> Result<(), Failure> {
    loop {
        let value = context.client.get("/v1/status").await?;
        match (context.json, watch) {
            (true, true) => output::print(&value.to_string())?,
            (true, false) => output::print_json(&value)?,
            (false, _) => {
                let clear = if watch && std::io::stdout().is_terminal() { CLEAR } else { "" };
                output::print(&format!("{clear}{}", text(&understood(value)?)))?;
            }
        }
        if !watch {
            return Ok(());
        }
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

fn text(status: &Status) -> String {
    let mut parts =
        vec![format!("host {}, belay {}", output::plain(&status.host), output::plain(&status.version))];
    parts.push(if status.devices.is_empty() {
        "no devices; `belay device add --help` tells how to add one".into()
    } else {
        devices(&status.devices)
    });
    if !status.vms.is_empty() {
        let mut table = Table::new(&["VM", "STATE", "PID"]);
        for vm in &status.vms {
            table.row([&vm.name, &vm.state, &vm.pid.map(|pid| pid.to_string()).unwrap_or_default()]);
        }
        parts.push(table.text());
    }
    if !status.hosts.is_empty() {
        let mut table = Table::new(&["HOST", "ADDRESSES"]);
        for host in &status.hosts {
            table.row([&host.name, &host.addresses.join(", ")]);
        }
        parts.push(table.text());
    }
    if !status.operations.is_empty() {
        let mut table = Table::new(&["OPERATION", "KIND", "VM", "TO", "STATE"]);
        for operation in &status.operations {
            let state = match (&operation.phase, operation.state) {
                (Some(phase), OperationState::Running) => format!("running: {phase}"),
                (_, state) => state.name().to_owned(),
            };
            let (vm, to) = (operation.vm.as_deref(), operation.to.as_deref());
            table.row([&operation.id, &operation.kind, vm.unwrap_or(""), to.unwrap_or(""), &state]);
        }
        parts.push(table.text());
    }
    parts.join("\n\n")
}

/// The table of devices.
pub(super) fn devices(devices: &[Device]) -> String {
    let mut table = Table::new(&["DEVICE", "KIND", "VM", "ATTACHED-TO", "BACKED-BY", "STATE"]);
    for device in devices {
        table.row([
            &device.name,
            &device.class,
            device.vm.as_deref().unwrap_or(""),
            device.attached_to.as_deref().unwrap_or(""),
            device.backed_by.as_deref().unwrap_or(""),
            &state_text(device),
        ]);
    }
    table.text()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_table_tells_where_a_device_is_and_how_much_was_copied() {
        let status: Status = serde_json::from_value(json!({
            "host": "host-b", "version": "0.1.0",
            "devices": [{"name": "data", "id": "x", "class": "block", "vm": "web", "size_bytes": 1000,
                "attached_to": "host-b", "backed_by": "host-a", "state": "remote", "latency": null,
                "exchange": {"total_bytes": 1000, "local_bytes": 419, "copied_bytes": 400,
                    "echoed_bytes": 19, "skipped_bytes": 0}},
                {"name": "logs", "class": "block", "vm": "web", "attached_to": "host-b", "backed_by": "host-a",
                 "state": "remote", "exchange": null, "exchange_stopped": "No space left on device"},
                {"name": "spare", "class": "block", "vm": null, "attached_to": "host-b", "backed_by": "host-b",
                 "state": "local", "exchange": null}],
            "vms": [{"name": "web", "state": "running", "pid": 7, "qmp": "/run/q"}],
            "hosts": [{"name": "host-a", "addresses": ["192.0.2.10:7411"]}],
            "operations": [{"id": "5f1c", "kind": "migrate", "vm": "web", "to": "host-c", "mode": "stay",
                "state": "running", "phase": "memory", "abortable": true, "checks": [], "devices": []}],
        }))
        .unwrap();
        let expected = "\
host host-b, belay 0.1.0

DEVICE  KIND   VM   ATTACHED-TO  BACKED-BY  STATE
data    block  web  host-b       host-a     remote, 41 % copied
logs    block  web  host-b       host-a     remote, copy stopped: No space left on device
spare   block  -    host-b       host-b     local

VM   STATE    PID
web  running  7

HOST    ADDRESSES
host-a  192.0.2.10:7411

OPERATION  KIND     VM   TO      STATE
5f1c       migrate  web  host-c  running: memory";
        assert_eq!(text(&status), expected);
    }

    #[test]
    fn without_devices_it_tells_how_to_add_one() {
        let status: Status = serde_json::from_value(json!({"host": "a", "version": "1"})).unwrap();
        assert!(text(&status).contains("belay device add"));
    }
}
