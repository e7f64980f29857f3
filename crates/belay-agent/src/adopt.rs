//! Taking a VM that runs already with this agent's sockets, and checking whether a VM could start here.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use belay_vmm::adopt::{Running, not_reconnecting, specification};
use belay_vmm::{DiskPlug, ProcessId, Qemu, QemuVersion, Qmp, VmSpec};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::UnixStream;

use crate::agent::Agent;
use crate::error::AgentError;
use crate::ledger::{SCHEMA, VmRecord};
use crate::operation::Check;
use crate::vm::VmView;

/// How long QEMU may take to greet.
const GREETING: Duration = Duration::from_secs(5);

/// `check_vm`: could this VM start at your host?
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmCheck {
    /// Its specification, resolved.
    pub spec: Value,
    /// The QEMU that it runs on, as text.
    pub qemu: String,
}

/// What was found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmChecked {
    /// Each thing that was looked at.
    pub checks: Vec<Check>,
}

/// A VM that was adopted.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct AdoptedView {
    /// The VM.
    #[serde(flatten)]
    pub vm: VmView,
    /// What to be careful about.
    pub warnings: Vec<String>,
}

/// A QEMU that runs, as the kernel and QMP describe it.
struct Found {
    process: ProcessId,
    arguments: Vec<String>,
    directory: PathBuf,
    machine: String,
    kvm: bool,
    memory_mib: u64,
    cpus: u16,
    plugged: BTreeSet<String>,
}

fn refused(error: impl std::fmt::Display) -> AgentError {
    AgentError::precheck(error.to_string())
}

impl Agent {
    /// Takes a VM that runs already with this agent's sockets. Its devices are those that its command line names;
    /// `named` ones are recognised by the file name of their socket alone.
    ///
    /// # Errors
    /// There is no QMP at this socket, or the VM could not be started at another host: the message says why.
    pub async fn adopt_vm(
        &self,
        name: &str,
        qmp_socket: &Path,
        named: Vec<String>,
    ) -> Result<AdoptedView, AgentError> {
        crate::agent::check_name(name)?;
        if let Ok(vm) = self.vms.get(name) {
            // The same again. QEMU serves one QMP client, which is this agent: it is not asked anything.
            let adopted = vm.spec().is_ok_and(|spec| spec.adopted.is_some());
            let same =
                vm.record.qmp == qmp_socket && named.iter().all(|device| vm.record.devices.contains(device));
            if adopted && same && vm.is_alive() && vm.incoming().is_none() {
                return Ok(AdoptedView { vm: vm.view().await, warnings: Vec::new() });
            }
            return Err(AgentError::usage(format!("there is a VM {name} already"))
                .hint("`belay vm list` shows it; choose another name"));
        }
        for device in &named {
            self.device(device)?;
        }
        let (found, qmp) = inspect(name, qmp_socket).await?;
        if let Some(known) = self.vms.all().into_iter().find(|vm| vm.process() == Some(found.process)) {
            let name = &known.record.name;
            return Err(AgentError::usage(format!("this QEMU is the VM {name} already")));
        }
        let (spec, not_reconnecting) = self.specification_of(name, qmp_socket, &named, &found)?;
        let devices: Vec<String> = spec.disks.iter().map(|disk| disk.device.clone()).collect();
        for device in named.iter().chain(&devices) {
            if !devices.contains(device) {
                return Err(refused(format!("VM {name} does not use device {device}")));
            }
            if let Some(other) = self.vms.all().into_iter().find(|vm| vm.record.devices.contains(device)) {
                return Err(refused(format!("device {device} belongs to VM {}", other.record.name)));
            }
        }
        let message = format!("adopted: process {}, {}, {}", found.process, spec.machine, devices.join(", "));
        let record = VmRecord {
            schema: SCHEMA,
            name: name.to_owned(),
            spec: Some(serde_json::to_value(&spec).map_err(refused)?),
            qmp: qmp_socket.to_owned(),
            process: Some(serde_json::to_value(found.process).map_err(refused)?),
            devices,
            migrating: None,
            incoming: None,
        };
        self.ledger.put_vm(&record)?;
        self.events.note("vm", None, Some(name), message);
        let vm = self.vms.insert(record, Some(qmp));
        let warning = |device: &String| {
            format!(
                "QEMU was not told to reconnect to device {device}: until the VM has migrated, a restart of this \
                 agent takes its disk away (`reconnect=1` at the chardev changes that)"
            )
        };
        Ok(AdoptedView { vm: vm.view().await, warnings: not_reconnecting.iter().map(warning).collect() })
    }

    fn specification_of(
        &self,
        name: &str,
        qmp: &Path,
        named: &[String],
        found: &Found,
    ) -> Result<(VmSpec, Vec<String>), AgentError> {
        let sockets: Vec<DiskPlug> = self
            .devices()
            .iter()
            .map(|device| DiskPlug {
                device: device.name(),
                socket: self.config.device_socket(&device.name()),
            })
            .collect();
        let resolve = |path: &Path| real_path(&found.directory.join(path));
        let running = Running {
            name,
            arguments: &found.arguments,
            machine: &found.machine,
            kvm: found.kvm,
            memory_mib: found.memory_mib,
            cpus: found.cpus,
            plugged: &found.plugged,
            qmp,
            runtime_dir: &self.config.runtime_dir,
            sockets: &sockets,
            by_name: named,
            resolve: &resolve,
        };
        let spec = specification(&running).map_err(|refusal| {
            refused(format!("VM {name} (process {}) cannot be adopted: {refusal}", found.process))
        })?;
        Ok((spec, not_reconnecting(&running)))
    }

    /// As a destination: whether a VM could start here. Nothing is changed.
    pub(crate) async fn check_vm(&self, peer: &str, request: VmCheck) -> Result<VmChecked, AgentError> {
        let spec: VmSpec = serde_json::from_value(request.spec).map_err(refused)?;
        spec.check().map_err(refused)?;
        let here = self.host();
        let mut checks = Vec::new();
        let mut check = |name: &str, outcome: Result<String, String>| {
            let ok = outcome.is_ok();
            checks.push(Check { name: name.to_owned(), ok, message: outcome.unwrap_or_else(|error| error) });
        };
        let free = match self.vms.get(&spec.name) {
            Err(_) => Ok(format!("host {here} has no VM {}", spec.name)),
            Ok(left) if left.comes_from(peer) => {
                Ok(format!("host {here} has what an earlier attempt has left of VM {}", spec.name))
            }
            Ok(_) => Err(format!("host {here} has a VM {} already", spec.name)),
        };
        check("name", free);
        // Before anything is done with what it names: QEMU is tried with the kernel, and files are opened.
        let forbidden = self.forbidden(&spec);
        for forbidden in &forbidden {
            check("argument", Err(format!("host {here}: {forbidden}")));
        }
        let needs = spec.adopted.iter().flat_map(|adopted| &adopted.needs);
        let mut complete = forbidden.is_empty();
        for path in
            spec.kernel.iter().chain(&spec.initrd).chain(needs).filter(|path| self.peers_may_read(path))
        {
            let there = std::fs::File::open(path).map(|_| format!("host {here} has it"));
            let copy = |error| {
                format!("{}, which the VM is started with: {error}; copy it to host {here}", path.display())
            };
            complete &= there.is_ok();
            check(&format!("file {}", path.display()), there.map_err(copy));
        }
        match Qemu::find(self.config.vmm.qemu.as_deref()).await {
            Err(error) => check("qemu", Err(format!("host {here}: {error}"))),
            Ok(qemu) => {
                check("qemu", not_older(&here, &request.qemu, qemu.version));
                check("machine", has_machine(&here, &qemu, &spec).await);
                if complete {
                    let accel = self.choose_accel(&qemu, spec.accel, spec.kernel.as_deref()).await;
                    let accel = accel.map(|accel| format!("host {here} runs it with {}", accel.name()));
                    check("accelerator", accel.map_err(|error| format!("host {here}: {error}")));
                }
            }
        }
        Ok(VmChecked { checks })
    }
}

/// A newer QEMU loads what an older one sends, not the other way round.
fn not_older(here: &str, source: &str, there: QemuVersion) -> Result<String, String> {
    let banner = QemuVersion::from_banner(&format!("QEMU emulator version {source}"));
    let older = banner.is_some_and(|source| (there.major, there.minor) < (source.major, source.minor));
    if older {
        return Err(format!(
            "host {here} has QEMU {there}, the VM runs on {source}: install {source} or later there"
        ));
    }
    Ok(format!("QEMU {source} here, {there} at {here}"))
}

async fn has_machine(here: &str, qemu: &Qemu, spec: &VmSpec) -> Result<String, String> {
    let machines = qemu.machines().await.map_err(|error| format!("host {here}: {error}"))?;
    if machines.iter().any(|machine| machine.name == spec.machine) {
        return Ok(format!("host {here} has machine type {}", spec.machine));
    }
    Err(format!(
        "QEMU {} of host {here} has no machine type {}: install a QEMU there that has it",
        qemu.version, spec.machine
    ))
}

/// Absolute and free of links, also if the file itself is gone.
fn real_path(path: &Path) -> PathBuf {
    if let Ok(real) = path.canonicalize() {
        return real;
    }
    match (path.parent().and_then(|parent| parent.canonicalize().ok()), path.file_name()) {
        (Some(parent), Some(file)) => parent.join(file),
        _ => path.to_owned(),
    }
}

async fn inspect(name: &str, socket: &Path) -> Result<(Found, Qmp), AgentError> {
    let stream = UnixStream::connect(socket).await.map_err(|error| {
        refused(format!("VM {name}: cannot connect to QMP at {}: {error}", socket.display()))
            .hint("is QEMU running with `-qmp unix:PATH,server=on,wait=off`?")
    })?;
    let pid = stream.peer_cred().ok().and_then(|credentials| credentials.pid());
    let pid = pid.and_then(|pid| u32::try_from(pid).ok()).unwrap_or_default();
    let qmp = tokio::time::timeout(GREETING, Qmp::over(stream)).await.map_err(|_| {
        refused(format!("VM {name}: no QMP greeting at {}", socket.display()))
            .hint("QMP serves one client at a time: give QEMU a QMP socket of its own for Belay")
    })?;
    let qmp = qmp.map_err(refused)?;
    let process = ProcessId::of_pid(pid).ok_or_else(|| refused(format!("process {pid} has ended")))?;
    let arguments = arguments_of(pid)?;
    let directory = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_else(|_| "/".into());
    let found = ask(&qmp, process, arguments, directory)
        .await
        .map_err(|error| refused(format!("VM {name}: {error}")))?;
    Ok((found, qmp))
}

/// The arguments of QEMU, without its own name.
fn arguments_of(pid: u32) -> Result<Vec<String>, AgentError> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline"))
        .map_err(|error| refused(format!("the command line of process {pid} cannot be read: {error}")))?;
    let mut arguments: Vec<String> = line
        .split(|byte| *byte == 0)
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect();
    // The last one ends with a zero, too.
    arguments.pop();
    let program = std::fs::read_link(format!("/proc/{pid}/exe"))
        .unwrap_or_else(|_| arguments.first().map(PathBuf::from).unwrap_or_default());
    if !program.file_name().is_some_and(|file| file.to_string_lossy().contains("qemu")) {
        return Err(refused(format!(
            "process {pid}, which listens there, is {}, not QEMU",
            program.display()
        ))
        .hint("a QEMU that inherited its QMP socket (libvirt's does) cannot be adopted"));
    }
    Ok(arguments.split_off(1.min(arguments.len())))
}

async fn ask(
    qmp: &Qmp,
    process: ProcessId,
    arguments: Vec<String>,
    directory: PathBuf,
) -> Result<Found, belay_vmm::QmpError> {
    let machine = qmp.execute("qom-get", json!({ "path": "/machine", "property": "type" })).await?;
    let machine = machine.as_str().unwrap_or_default();
    let kvm = qmp.execute("query-kvm", json!({})).await?;
    let memory = qmp.execute("query-memory-size-summary", json!({})).await?;
    let cpus = qmp.execute("query-cpus-fast", json!({})).await?;
    let devices = qmp.execute("qom-list", json!({ "path": "/machine/peripheral" })).await?;
    let child = |entry: &Value| {
        let is_child = entry["type"].as_str().is_some_and(|kind| kind.starts_with("child<"));
        entry["name"].as_str().filter(|_| is_child).map(str::to_owned)
    };
    Ok(Found {
        process,
        arguments,
        directory,
        machine: machine.strip_suffix("-machine").unwrap_or(machine).to_owned(),
        kvm: kvm["enabled"] == true,
        memory_mib: memory["base-memory"].as_u64().unwrap_or(0) >> 20,
        cpus: cpus.as_array().and_then(|cpus| u16::try_from(cpus.len()).ok()).unwrap_or(1),
        plugged: devices.as_array().into_iter().flatten().filter_map(child).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_qemu_is_refused_and_a_newer_one_is_not() {
        let version = |major, minor| QemuVersion { major, minor, micro: 0 };
        assert!(not_older("b", "7.2.22", version(7, 2)).is_ok());
        assert!(not_older("b", "7.2.22", version(10, 0)).is_ok());
        let error = not_older("b", "10.0.2", version(7, 2)).unwrap_err();
        assert!(error.contains("host b has QEMU 7.2.0") && error.contains("install 10.0.2"), "{error}");
    }
}
