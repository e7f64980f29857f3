//! VMs of this host: started from a specification, or adopted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use belay_vmm::{Accel, AccelChoice, DiskPlug, ProcessId, Qemu, QemuCommand, Qmp, VmSpec, VmmProcess};
use serde::Serialize;

use crate::agent::Agent;
use crate::device::Managed;
use crate::error::AgentError;
use crate::ledger::{MigratingRecord, SCHEMA, VmRecord};
use crate::returns::Returns;

/// How long a QEMU that was started may take to serve QMP.
const QMP_WITHIN: Duration = Duration::from_secs(20);

/// A VM.
pub struct Vm {
    /// Its record.
    pub record: VmRecord,
    /// Its QMP connection, opened when first needed.
    qmp: tokio::sync::Mutex<Option<Qmp>>,
    /// What has changed of its record since.
    way: Mutex<Way>,
    /// Held while its record is written, or removed.
    writing: tokio::sync::Mutex<()>,
    /// What comes home with it, while it comes here.
    pub(crate) returns: Returns,
    /// Held while it is found out how a migration ended that an earlier agent had begun.
    pub(crate) settling: Arc<tokio::sync::Mutex<()>>,
}

/// A VM's way between hosts, as in its record.
#[derive(Clone, Debug, Default)]
struct Way {
    migrating: Option<MigratingRecord>,
    incoming: Option<String>,
}

/// A QEMU, a kernel, and whether KVM works with them.
type KvmTrial = ((Qemu, Option<PathBuf>), Result<(), String>);

/// All VMs.
#[derive(Default)]
pub struct Vms {
    /// Whether KVM works, by what it was tried with.
    kvm_trials: tokio::sync::Mutex<Vec<KvmTrial>>,
    all: Mutex<BTreeMap<String, Arc<Vm>>>,
    /// Names of VMs that are being started.
    starting: Mutex<BTreeSet<String>>,
    /// Names of those that have ended here, until there is one of that name again. One that has left has not ended.
    ended: Mutex<BTreeSet<String>>,
}

/// The name of a VM that is being started.
struct Reserved<'a> {
    vms: &'a Vms,
    name: String,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let mut starting = self.vms.starting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        starting.remove(&self.name);
    }
}

/// A VM as callers see it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// QEMU's run state, or `gone`.
    pub state: String,
    /// QEMU's process id.
    pub pid: Option<u32>,
    /// Its QMP socket.
    pub qmp: String,
    /// Its devices.
    pub devices: Vec<String>,
}

impl Vm {
    /// The host that it comes from, as long as that has not said that it is done.
    pub(crate) fn incoming(&self) -> Option<String> {
        self.way().incoming
    }

    /// Whether it comes from this host.
    pub(crate) fn comes_from(&self, peer: &str) -> bool {
        self.incoming().as_deref() == Some(peer)
    }

    fn way(&self) -> Way {
        self.way.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// The migration that it is on.
    pub(crate) fn migrating(&self) -> Option<MigratingRecord> {
        self.way().migrating
    }

    /// Whether its process lives.
    pub(crate) fn is_alive(&self) -> bool {
        self.process().is_none_or(ProcessId::is_alive)
    }

    pub(crate) fn process(&self) -> Option<ProcessId> {
        self.record.process.clone().and_then(|process| serde_json::from_value(process).ok())
    }

    /// As callers see it.
    pub async fn view(&self) -> VmView {
        let state = match self.qmp().await {
            Ok(qmp) => qmp.query_status().await.map_or_else(|_| "gone".to_owned(), |state| state.status),
            Err(_) => "gone".to_owned(),
        };
        VmView {
            name: self.record.name.clone(),
            state,
            pid: self.process().map(|process| process.pid),
            qmp: self.record.qmp.display().to_string(),
            devices: self.record.devices.clone(),
        }
    }

    /// Its specification.
    ///
    /// # Errors
    /// It was adopted, or cannot be read.
    pub fn spec(&self) -> Result<VmSpec, AgentError> {
        let spec = self.record.spec.clone().ok_or_else(|| {
            AgentError::precheck(format!(
                "VM {} was adopted by an older Belay: how to start it at another host is not known",
                self.record.name
            ))
            .hint("adopt it again with `belay vm adopt`")
        })?;
        serde_json::from_value(spec).map_err(|error| AgentError::failed(error.to_string()))
    }

    /// Its QMP connection.
    ///
    /// # Errors
    /// QEMU is gone.
    pub async fn qmp(&self) -> Result<Qmp, AgentError> {
        let mut qmp = self.qmp.lock().await;
        if let Some(open) = qmp.as_ref().filter(|qmp| !qmp.is_closed()) {
            return Ok(open.clone());
        }
        let fresh = Qmp::connect(&self.record.qmp, Duration::from_secs(5))
            .await
            .map_err(|error| AgentError::failed(format!("VM {}: {error}", self.record.name)))?;
        *qmp = Some(fresh.clone());
        Ok(fresh)
    }
}

impl Vms {
    /// A VM by its name.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, name: &str) -> Result<Arc<Vm>, AgentError> {
        let all = self.all.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        all.get(name).cloned().ok_or_else(|| {
            AgentError::not_found(format!("there is no VM {name} on this host"))
                .hint("`belay vm list` shows those that are")
        })
    }

    /// The VM that has this device.
    pub(crate) fn user_of(&self, device: &str) -> Option<String> {
        let has = |vm: &Arc<Vm>| vm.record.devices.iter().any(|name| name == device);
        self.all().into_iter().find(has).map(|vm| vm.record.name.clone())
    }

    pub(crate) fn all(&self) -> Vec<Arc<Vm>> {
        self.all.lock().unwrap_or_else(std::sync::PoisonError::into_inner).values().cloned().collect()
    }

    fn has_ended(&self, name: &str) -> bool {
        self.ended.lock().unwrap_or_else(std::sync::PoisonError::into_inner).contains(name)
    }

    fn set_ended(&self, name: &str, ended: bool) {
        let mut all = self.ended.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if ended {
            all.insert(name.to_owned());
        } else {
            all.remove(name);
        }
    }

    pub(crate) fn insert(&self, record: VmRecord, qmp: Option<Qmp>) -> Arc<Vm> {
        let name = record.name.clone();
        self.set_ended(&name, false);
        let way = Way { migrating: record.migrating.clone(), incoming: record.incoming.clone() };
        let vm = Arc::new(Vm {
            record,
            qmp: tokio::sync::Mutex::new(qmp),
            way: Mutex::new(way),
            writing: tokio::sync::Mutex::default(),
            returns: Returns::default(),
            settling: Arc::default(),
        });
        self.all.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(name, Arc::clone(&vm));
        vm
    }

    /// Whether this VM, and no other of its name, is one of this host.
    pub(crate) fn has(&self, vm: &Vm) -> bool {
        self.get(&vm.record.name).is_ok_and(|present| std::ptr::eq(Arc::as_ptr(&present), vm))
    }

    /// Keeps a name, and what comes with it, for a VM that is being started.
    fn reserve(&self, name: &str) -> Result<Reserved<'_>, AgentError> {
        let mut starting = self.starting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !starting.insert(name.to_owned()) {
            return Err(AgentError::precheck(format!("a VM {name} is being started already")));
        }
        Ok(Reserved { vms: self, name: name.to_owned() })
    }

    fn remove(&self, name: &str) {
        self.all.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(name);
    }
}

pub(crate) fn failed(error: impl std::fmt::Display) -> AgentError {
    AgentError::failed(error.to_string())
}

impl Agent {
    /// Finds the VMs of the ledger that still run.
    ///
    /// # Errors
    /// The ledger cannot be read.
    pub fn find_vms(&self) -> Result<(), AgentError> {
        for record in self.ledger.vms()? {
            let alive = record
                .process
                .clone()
                .and_then(|p| serde_json::from_value::<ProcessId>(p).ok())
                .is_none_or(ProcessId::is_alive);
            if let Some(way) = &record.migrating {
                self.operations.resume(way.operation, &record.name, &way.to, way.mode.name());
            }
            if alive || record.migrating.is_some() {
                self.vms.insert(record, None);
            } else {
                self.events.note("vm", None, Some(&record.name), "ended while the agent was away");
                self.vms.set_ended(&record.name, true);
                self.ledger.remove_vm(&record.name)?;
            }
        }
        Ok(())
    }

    /// All VMs, described.
    pub async fn vm_views(&self) -> Vec<VmView> {
        let mut views = Vec::new();
        for vm in self.vms.all() {
            views.push(vm.view().await);
        }
        views
    }

    fn qmp_path(&self, name: &str) -> PathBuf {
        self.config.runtime_dir.join("vms").join(format!("{name}.qmp"))
    }

    /// Starts a VM from the text of its specification, whose relative paths start at `folder`. `false`: it runs already,
    /// with this specification.
    ///
    /// # Errors
    /// The specification is wrong, or not that of the VM of this name; a disk is missing, or QEMU does not start.
    pub async fn run_vm(&self, text: &str, folder: Option<&Path>) -> Result<(Arc<Vm>, bool), AgentError> {
        let mut spec = VmSpec::from_toml(text).map_err(|error| AgentError::usage(error.to_string()))?;
        if let Some(folder) = folder {
            spec.start_paths_at(folder);
        }
        let qemu =
            Qemu::find(spec.qemu.as_deref().or(self.config.vmm.qemu.as_deref())).await.map_err(failed)?;
        spec.resolve_machine(&qemu.machines().await.map_err(failed)?).map_err(failed)?;
        if let Ok(vm) = self.vms.get(&spec.name) {
            runs_like_this(&vm, spec)?;
            return Ok((vm, false));
        }
        // Chosen once: a guest does not change its accelerator on the way.
        spec.accel = match self.choose_accel(&qemu, spec.accel, spec.kernel.as_deref()).await? {
            Accel::Kvm => AccelChoice::Kvm,
            Accel::Tcg => AccelChoice::Tcg,
        };
        self.start_vm(spec, &qemu, None).await.map(|vm| (vm, true))
    }

    /// The accelerator for a VM here. Whether KVM works is tried once for each QEMU and kernel: the trial takes
    /// seconds, in which a migration would wait.
    pub(crate) async fn choose_accel(
        &self,
        qemu: &Qemu,
        choice: AccelChoice,
        kernel: Option<&Path>,
    ) -> Result<Accel, AgentError> {
        if choice == AccelChoice::Tcg {
            return Ok(Accel::Tcg);
        }
        let mut trials = self.vms.kvm_trials.lock().await;
        let with = (qemu.clone(), kernel.map(Path::to_owned));
        let known = trials.iter().find(|(tried, _)| *tried == with).map(|(_, outcome)| outcome.clone());
        let outcome = match known {
            Some(outcome) => outcome,
            None => {
                let outcome = qemu.try_kvm(kernel).await;
                if let Err(why) = &outcome {
                    tracing::info!(%why, "no KVM");
                }
                trials.push((with, outcome.clone()));
                outcome
            }
        };
        Accel::choose(choice, outcome).map_err(failed)
    }

    pub(crate) async fn start_vm(
        &self,
        spec: VmSpec,
        qemu: &Qemu,
        from: Option<&str>,
    ) -> Result<Arc<Vm>, AgentError> {
        let incoming = from.is_some();
        let name = spec.name.clone();
        let _reserved = self.vms.reserve(&name)?;
        if self.vms.get(&name).is_ok() {
            return Err(AgentError::precheck(format!("host {} has a VM {name} already", self.host())));
        }
        let mut disks = Vec::new();
        for disk in &spec.disks {
            self.device(&disk.device)?.usable()?;
            if let Some(other) = self.vms.all().iter().find(|vm| vm.record.devices.contains(&disk.device)) {
                return Err(AgentError::precheck(format!(
                    "device {} is used by VM {}",
                    disk.device, other.record.name
                ))
                .hint(format!("`belay vm stop {}` ends that VM", other.record.name)));
            }
            disks.push(DiskPlug {
                device: disk.device.clone(),
                socket: self.config.device_socket(&disk.device),
            });
        }
        let qmp_socket = self.qmp_path(&name);
        if let Some(folder) = qmp_socket.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let _ = std::fs::remove_file(&qmp_socket);
        let accel = self.choose_accel(qemu, spec.accel, spec.kernel.as_deref()).await?;
        // The same specification on two hosts, but sockets and logs of their own.
        let mut here = spec.clone();
        let runtime_dir = self.config.runtime_dir.display().to_string();
        let adopted = here.adopted.iter_mut().flat_map(|adopted| &mut adopted.arguments);
        for argument in here.args.iter_mut().chain(adopted) {
            *argument = argument.replace("{runtime_dir}", &runtime_dir);
        }
        if here.adopted.is_some() {
            let folder = self.config.runtime_dir.join(belay_vmm::adopt::files_folder(&name));
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let command = QemuCommand {
            spec: &here,
            version: qemu.version,
            accel,
            disks: &disks,
            qmp_socket: &qmp_socket,
            incoming,
            user: self.config.vmm.user.as_deref(),
        };
        let arguments = command.arguments().map_err(failed)?;
        let log = self.config.runtime_dir.join("vms").join(format!("{name}.log"));
        let process = VmmProcess::start(&qemu.path, &arguments, &log).map_err(failed)?;
        let record = VmRecord {
            schema: SCHEMA,
            name: name.clone(),
            spec: Some(serde_json::to_value(&spec).map_err(failed)?),
            qmp: qmp_socket.clone(),
            process: Some(serde_json::to_value(process.id()).map_err(failed)?),
            devices: spec.disks.iter().map(|disk| disk.device.clone()).collect(),
            migrating: None,
            incoming: from.map(str::to_owned),
        };
        self.ledger.put_vm(&record)?;
        let vm = self.vms.insert(record, None);
        let connected = tokio::select! {
            connected = Qmp::connect(&qmp_socket, QMP_WITHIN) => connected.map_err(failed),
            _ = process.exited() => Err(failed("QEMU ended at once")),
        };
        match connected {
            Ok(qmp) => *vm.qmp.lock().await = Some(qmp),
            Err(error) => {
                self.forget_vm(&vm).await;
                let _ = process.kill();
                return Err(AgentError::failed(format!("VM {name}: {error}")).hint(last_lines(&log)));
            }
        }
        self.events.note(
            "vm",
            None,
            Some(&name),
            format!(
                "started, {}, {}",
                accel.name(),
                if incoming { "waiting for its memory" } else { "running" }
            ),
        );
        Ok(vm)
    }

    pub(crate) async fn forget_vm(&self, vm: &Vm) {
        let _writing = vm.writing.lock().await;
        if !self.vms.has(vm) {
            return;
        }
        if let Err(error) = self.ledger.remove_vm(&vm.record.name) {
            tracing::warn!(%error, "the ledger keeps a VM that is gone");
        }
        self.vms.remove(&vm.record.name);
    }

    /// Ends a VM.
    ///
    /// # Errors
    /// There is none, and none has ended here since the agent started; or it does not end.
    pub async fn stop_vm(&self, name: &str) -> Result<(), AgentError> {
        let vm = match self.vms.get(name) {
            Err(_) if self.vms.has_ended(name) => return Ok(()),
            vm => vm?,
        };
        self.expected_memory.forget(name);
        // One that has ended does not answer: that would be waited for.
        if vm.is_alive()
            && let Ok(qmp) = vm.qmp().await
        {
            let _ = qmp.quit().await;
        }
        if let Some(id) = vm.process().filter(|id| id.is_alive())
            && let Ok(process) = VmmProcess::find(id)
            && tokio::time::timeout(Duration::from_secs(10), process.exited()).await.is_err()
        {
            process.kill().map_err(failed)?;
        }
        self.forget_vm(&vm).await;
        self.vms.set_ended(name, true);
        self.events.note("vm", None, Some(name), "ended");
        Ok(())
    }

    /// Those of a VM's devices that this host knows.
    pub(crate) fn devices_of(&self, vm: &Vm) -> Vec<Arc<Managed>> {
        vm.record.devices.iter().filter_map(|name| self.device(name).ok()).collect()
    }

    /// Changes where a VM is on its way, durably.
    async fn set_way(&self, vm: &Vm, change: impl FnOnce(&mut Way)) -> Result<(), AgentError> {
        let _writing = vm.writing.lock().await;
        if !self.vms.has(vm) {
            return Err(AgentError::not_found(format!("VM {} has ended", vm.record.name)));
        }
        let mut way = vm.way();
        change(&mut way);
        let Way { migrating, incoming } = way.clone();
        let record = VmRecord { migrating, incoming, ..vm.record.clone() };
        let ledger = Arc::clone(&self.ledger);
        tokio::task::spawn_blocking(move || ledger.put_vm(&record)).await.map_err(failed)??;
        *vm.way.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = way;
        Ok(())
    }

    /// Writes down that a VM waits for nothing any more: it is here.
    pub(crate) async fn mark_arrived(&self, vm: &Vm) -> Result<(), AgentError> {
        self.set_way(vm, |way| way.incoming = None).await
    }

    /// Writes down that a VM is on its way; `None`: it is not.
    pub(crate) async fn mark_migrating(
        &self,
        vm: &Vm,
        migrating: Option<MigratingRecord>,
    ) -> Result<(), AgentError> {
        self.set_way(vm, |way| way.migrating = migrating).await
    }
}

/// Whether a VM runs that was started from this specification, whose machine type is resolved.
fn runs_like_this(vm: &Vm, mut wanted: VmSpec) -> Result<(), AgentError> {
    let name = &vm.record.name;
    if !vm.is_alive() {
        return Err(AgentError::precheck(format!("VM {name} is here, and its QEMU has ended"))
            .hint(format!("`belay vm stop {name}`, then run it again")));
    }
    if let Some(from) = vm.incoming() {
        return Err(AgentError::precheck(format!("VM {name} is on its way here, from {from}")));
    }
    let present = vm.spec()?;
    if wanted.accel == AccelChoice::Auto {
        wanted.accel = present.accel;
    }
    let keys = differences(&present, &wanted).map_err(failed)?;
    if keys.is_empty() {
        return Ok(());
    }
    let message = format!("VM {name} runs already, with another specification: {} differ", keys.join(", "));
    Err(AgentError::precheck(message).hint(format!("`belay vm stop {name}` ends it; or choose another name")))
}

/// The keys in which two specifications differ.
fn differences(one: &VmSpec, other: &VmSpec) -> Result<Vec<String>, serde_json::Error> {
    let (one, other) = (serde_json::to_value(one)?, serde_json::to_value(other)?);
    let keys: BTreeSet<&String> =
        one.as_object().into_iter().chain(other.as_object()).flat_map(serde_json::Map::keys).collect();
    Ok(keys.into_iter().filter(|key| one.get(key) != other.get(key)).cloned().collect())
}

fn last_lines(log: &Path) -> String {
    let text = belay_vmm::process::log_tail(log);
    if text.is_empty() { format!("see {}", log.display()) } else { text }
}
