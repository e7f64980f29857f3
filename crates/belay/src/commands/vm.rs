//! `belay vm`.

use serde_json::{Value, json};

use super::{Context, absolute};
use crate::args::VmCommand;
use crate::client::{segment, understood};
use crate::error::{Failure, Outcome};
use crate::model::Vm;
use crate::output::{self, Table};

pub(super) async fn run(context: &Context, command: VmCommand) -> Result<(), Failure> {
    let client = &context.client;
    let (value, done) = match command {
        VmCommand::Run { spec } => {
            let text = std::fs::read_to_string(&spec).map_err(|error| {
                Failure::new(Outcome::Usage, format!("{} can not be read: {error}", spec.display()))
            })?;
            let folder = absolute(&spec)?.parent().map(std::path::Path::to_owned);
            let started = client.post("/v1/vms", &json!({"spec_toml": text, "folder": folder})).await?;
            let name = started.get("name").and_then(Value::as_str).unwrap_or_default();
            let already = started.get("already") == Some(&Value::Bool(true));
            let message = format!("vm {name} {}", if already { "runs already" } else { "started" });
            (started, message)
        }
        VmCommand::Adopt { name, qmp, devices } => {
            let body = json!({"name": name, "qmp": absolute(&qmp)?, "devices": devices});
            let adopted = client.post("/v1/vms/adopt", &body).await?;
            let vm: Vm = understood(adopted.clone())?;
            let message = format!("vm {name} adopted, with {}; it can be migrated", vm.devices.join(", "));
            for warning in adopted["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                if !context.json {
                    eprintln!("warning: {}", output::plain(warning));
                }
            }
            (adopted, message)
        }
        VmCommand::List => {
            let value = client.get("/v1/vms").await?;
            if context.json {
                return output::print_json(&value);
            }
            return output::print(&list(&understood::<Vec<Vm>>(value)?));
        }
        VmCommand::Stop { name } => {
            (client.delete(&format!("/v1/vms/{}", segment(&name))).await?, format!("vm {name} stopped"))
        }
    };
    if context.json { output::print_json(&value) } else { output::print(&output::plain(&done)) }
}

fn list(vms: &[Vm]) -> String {
    let mut table = Table::new(&["VM", "STATE", "PID", "QMP"]);
    for vm in vms {
        let pid = vm.pid.map(|pid| pid.to_string()).unwrap_or_default();
        table.row([&vm.name, &vm.state, &pid, vm.qmp.as_deref().unwrap_or("")]);
    }
    table.text()
}
