//! Calls between agents.

use std::sync::Arc;
use std::time::Duration;

use belay_attach::{Command, Notice};
use belay_link::{ControlHandler, HostName, RpcError};
use belay_wire::{DeviceId, DeviceIdentity, Epoch};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::agent::Agent;
use crate::device::{HandoverFigures, Managed};
use crate::error::AgentError;
use crate::ledger::{Departed, DeviceRecord, Mode, RoleRecord, SCHEMA};
use crate::view::{DeviceView, device_view};
use crate::vm::Vm;

/// Devices that one peer may have offered to this host at a time.
const MAX_OFFERS: usize = 256;
/// How long a device that was prepared may take to reach where it is.
const CONNECTED_WITHIN: Duration = Duration::from_secs(15);

/// Calls that need nothing but the ledger, which other agents may be waiting for to start themselves. For all others an
/// agent that has not started all its devices is one that cannot be reached: what it does not know yet is not gone.
const ANSWERED_AT_ONCE: [&str; 2] = ["hello", "commit_cut"];

/// A call that returns nothing.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Done {}

/// `hello`: who are you?
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HelloAnswer {
    /// The host's name.
    pub host: String,
    /// The agent's version.
    pub version: String,
    /// QEMU's version there, as text.
    pub qemu: Option<String>,
}

/// Asks about a device.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct DeviceQuery {
    /// Which.
    pub id: DeviceId,
}

/// `device_info`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Capacity in bytes.
    pub size_bytes: u64,
    /// Bytes that its backend occupies.
    pub allocated_bytes: u64,
}

/// `device_state`: the device as it is there, and what its handover measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceState {
    /// As the API shows it.
    pub view: DeviceView,
    /// Its handover to that host.
    pub figures: HandoverFigures,
}

/// `prepare`: this device may come to you.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Prepare {
    /// What it is.
    pub identity: DeviceIdentity,
    /// Its epoch.
    pub epoch: Epoch,
    /// What becomes of its backing.
    pub mode: Mode,
    /// Bytes that following needs.
    pub needed_bytes: u64,
    /// As in the ledger.
    pub delay_us: Option<u64>,
    /// As in the ledger.
    #[serde(default)]
    pub direct: bool,
    /// It has been offered before, like this: what is there may be kept.
    #[serde(default)]
    pub again: bool,
    /// Only look whether it could be.
    pub dry_run: bool,
}

/// The answer to `prepare`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Prepared {
    /// Where a VMM there connects.
    #[serde(default)]
    pub socket: String,
    /// It was there already, and connected.
    #[serde(default)]
    pub kept: bool,
    /// A VMM there may have its memory in more than eight pieces. An older agent does not say so.
    #[serde(default)]
    pub memory_slots: bool,
}

/// `withdraw`: these devices do not come after all.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceList {
    /// Which.
    pub devices: Vec<DeviceId>,
}

/// `start_incoming`: start this VM, and wait for its memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StartIncoming {
    /// Its specification, resolved.
    pub spec: Value,
}

/// Names a VM and its devices.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmQuery {
    /// The VM.
    pub vm: String,
    /// Its devices.
    pub devices: Vec<DeviceId>,
}

impl VmQuery {
    /// A question about this VM with these devices.
    pub(crate) fn new(vm: &Vm, devices: &[Arc<Managed>]) -> Self {
        let devices = devices.iter().map(|device| device.identity().id).collect();
        Self { vm: vm.record.name.clone(), devices }
    }
}

/// `incoming_state`: how is the VM that comes from here?
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IncomingState {
    /// QEMU's run state, or `gone`.
    pub state: String,
    /// Every disk that comes home with it has come, or is not used by the guest.
    #[serde(default)]
    pub home_ready: bool,
}

/// `is_offered`: may this device come here?
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Offered {
    /// It may, or it has been granted.
    pub offered: bool,
}

/// `is_leaving`: is this VM on its way here?
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Leaves {
    /// It is, or it is not decided yet where it is.
    pub leaves: bool,
}

impl IncomingState {
    /// Whether its memory is there: it runs, or could.
    #[must_use]
    pub fn has_arrived(&self) -> bool {
        !matches!(self.state.as_str(), "gone" | "inmigrate" | "prelaunch")
    }
}

/// `commit_cut`: everything is here, let go.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct CommitCut {
    /// Which.
    pub id: DeviceId,
    /// The epoch in which it was copied.
    pub epoch: Epoch,
}

/// Answers other agents' calls.
pub struct Peers(pub Arc<Agent>);

fn parse<T: serde::de::DeserializeOwned>(body: Value) -> Result<T, AgentError> {
    serde_json::from_value(body)
        .map_err(|error| AgentError::usage(format!("the request is not understood: {error}")))
}

fn answer<T: Serialize>(value: T) -> Result<Value, AgentError> {
    serde_json::to_value(value).map_err(|error| AgentError::failed(error.to_string()))
}

impl ControlHandler for Peers {
    async fn handle(&self, peer: &HostName, method: &str, body: Value) -> Result<Value, RpcError> {
        let peer = peer.to_string();
        if !ANSWERED_AT_ONCE.contains(&method) {
            self.0.check_started().map_err(rpc)?;
        }
        let outcome = match method {
            "hello" => answer(self.0.hello().await),
            "device_info" => self.0.device_info(&peer, parse(body).map_err(rpc)?).and_then(answer),
            "device_state" => self.0.device_state(&peer, parse(body).map_err(rpc)?).and_then(answer),
            "prepare" => self.0.prepare(&peer, parse(body).map_err(rpc)?).await.and_then(answer),
            "withdraw" => {
                let request: DeviceList = parse(body).map_err(rpc)?;
                self.0.abort_prepared(&peer, &request.devices).await.map(|()| Done {}).and_then(answer)
            }
            "check_vm" => self.0.check_vm(&peer, parse(body).map_err(rpc)?).await.and_then(answer),
            "start_incoming" => {
                self.0.start_incoming(&peer, parse(body).map_err(rpc)?).await.and_then(answer)
            }
            "incoming_state" => {
                self.0.incoming_state(&peer, parse(body).map_err(rpc)?).await.and_then(answer)
            }
            "is_leaving" => answer(self.0.is_leaving(&peer, &parse(body).map_err(rpc)?)),
            "is_offered" => answer(self.0.is_offered(&peer, parse(body).map_err(rpc)?)),
            "arrived" => self.0.arrived(&peer, parse(body).map_err(rpc)?).await.and_then(answer),
            "incoming_done" => self.0.incoming_done(&peer, parse(body).map_err(rpc)?).await.and_then(answer),
            "abort_incoming" => {
                self.0.abort_incoming(&peer, parse(body).map_err(rpc)?).await.and_then(answer)
            }
            "commit_cut" => {
                let request = parse(body).map_err(rpc)?;
                self.0.commit_cut(&peer, &request).await.and_then(answer)
            }
            _ => return Err(RpcError::unknown_method(method)),
        };
        outcome.map_err(rpc)
    }
}

fn rpc(error: AgentError) -> RpcError {
    RpcError::new(&error.code, error.message)
}

/// Whether a device waits here as this request wants it, with its connection: a VMM may use it already.
fn still_prepared(device: &Managed, request: &Prepare) -> bool {
    let record = device.record();
    let snapshot = device.snapshot();
    let like = matches!(record.role, RoleRecord::Prepared { mode, .. } if mode == request.mode);
    like && record.epoch == request.epoch
        && record.identity == request.identity
        && snapshot.state == "prepared"
        && snapshot.link_up
}

impl Agent {
    async fn hello(&self) -> HelloAnswer {
        let qemu = belay_vmm::Qemu::find(self.config.vmm.qemu.as_deref()).await.ok();
        HelloAnswer {
            host: self.host(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            qemu: qemu.map(|qemu| qemu.version.to_string()),
        }
    }

    /// A peer may ask only about devices that it shares with this host.
    pub(crate) fn shared_device(&self, peer: &str, id: DeviceId) -> Result<Arc<Managed>, AgentError> {
        let unknown = || AgentError::not_found("there is no such device here, or it is not shared with you");
        let device = self.device_by_id(id).ok_or_else(unknown)?;
        let shared = match device.role() {
            RoleRecord::Lent { to, .. } => to == peer,
            RoleRecord::Prepared { from, .. } => from == peer,
            RoleRecord::Remote { backing, .. }
            | RoleRecord::Exchanging { backing, .. }
            | RoleRecord::Cutting { backing, .. } => backing == peer,
            // It came from that peer, which follows its exchange to the end; or may go there.
            RoleRecord::Local { .. } => {
                device.came_from(peer) || device.record().offered.is_some_and(|offer| offer.to == peer)
            }
            RoleRecord::Tombstone { .. } => false,
        };
        if shared { Ok(device) } else { Err(unknown()) }
    }

    fn device_info(&self, peer: &str, query: DeviceQuery) -> Result<DeviceInfo, AgentError> {
        let device = self.shared_device(peer, query.id)?;
        self.info_of(&device)
    }

    /// Size and allocation of a device that is backed here.
    pub(crate) fn info_of(&self, device: &Managed) -> Result<DeviceInfo, AgentError> {
        use std::os::unix::fs::MetadataExt;
        let belay_wire::device::DeviceClass::Block(geometry) = device.identity().class;
        let path = match device.role() {
            RoleRecord::Local { backend } | RoleRecord::Lent { backend, .. } => backend.path,
            _ => None,
        };
        let allocated_bytes = path
            .and_then(|path| std::fs::metadata(path).ok())
            .filter(std::fs::Metadata::is_file)
            .map_or(geometry.size_bytes, |metadata| metadata.blocks() * 512);
        Ok(DeviceInfo { size_bytes: geometry.size_bytes, allocated_bytes })
    }

    fn device_state(&self, peer: &str, query: DeviceQuery) -> Result<DeviceState, AgentError> {
        let device = self.shared_device(peer, query.id)?;
        let figures = *device.figures.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(DeviceState { view: device_view(self, &device), figures })
    }

    /// A device may come here: learn it, and connect to where it is.
    async fn prepare(self: &Arc<Self>, peer: &str, request: Prepare) -> Result<Prepared, AgentError> {
        crate::agent::check_identity(&request.identity)?;
        let name = request.identity.name.clone();
        let _preparing = self.preparing.lock().await;
        let answer = |kept| Prepared {
            socket: self.config.device_socket(&name).display().to_string(),
            kept,
            memory_slots: self.config.data_plane.memory_slots,
        };
        let mut present = self.device(&name).ok();
        if let Some(gone) = present.take_if(|device| matches!(device.role(), RoleRecord::Tombstone { .. }))
            && !request.dry_run
        {
            // It has left; its VMM's connection has not ended yet.
            self.stop_device(&gone).await;
        }
        if let Some(present) = present {
            if present.identity().id == request.identity.id
                && matches!(present.role(), RoleRecord::Lent { .. })
            {
                self.expect_home(&present, peer, &request)?;
                return Ok(answer(true));
            }
            let prepared = present.identity().id == request.identity.id
                && matches!(present.role(), RoleRecord::Prepared { from, .. } if from == peer);
            if !prepared {
                return Err(AgentError::precheck(format!(
                    "host {} has a device {name} already",
                    self.host()
                ))
                .hint("names are given once for all hosts that a device may come to"));
            }
            if request.dry_run || request.again && still_prepared(&present, &request) {
                return Ok(answer(true));
            }
            self.drop_device(&present).await?;
        }
        self.departed(peer, &request)?;
        self.check_room_for_offers(peer)?;
        if request.mode == Mode::Follow {
            let folder = self.config.images_dir();
            std::fs::create_dir_all(&folder).map_err(|error| AgentError::failed(error.to_string()))?;
            let free =
                belay_block::free_space(&folder).map_err(|error| AgentError::failed(error.to_string()))?;
            if free < request.needed_bytes {
                return Err(AgentError::precheck(format!(
                    "device {name} needs {} bytes in {} of host {}, {free} are free",
                    request.needed_bytes,
                    folder.display(),
                    self.host()
                )));
            }
            self.fits_blocks(&request, &folder)?;
        }
        if request.dry_run {
            return Ok(answer(false));
        }
        let role = RoleRecord::Prepared {
            from: peer.to_owned(),
            mode: request.mode,
            delay_us: request.delay_us,
            direct: request.direct,
            replaces: self.departed(peer, &request)?,
        };
        let record = DeviceRecord {
            schema: SCHEMA,
            identity: request.identity,
            epoch: request.epoch,
            role,
            offered: None,
            bandwidth: None,
            listed: None,
        };
        self.write_record(record.clone()).await?;
        let device = match self.start_device(record.clone()).await {
            Ok(device) => device,
            Err(error) => {
                // Nothing of it may stand in the way of the next attempt.
                match self.device_by_id(record.identity.id) {
                    Some(device) => self.drop_device(&device).await?,
                    None => self.drop_record(record).await?,
                }
                return Err(error);
            }
        };
        let prepared = device
            .wait_for(0, "a connection to where it is", CONNECTED_WITHIN, |notice| match notice {
                Notice::Prepared { .. } => Some(Ok(())),
                Notice::PeerRefused { reason, .. } => Some(Err(reason.clone())),
                _ => None,
            })
            .await;
        match prepared {
            Ok(Ok(())) => {
                self.watch_prepared(&device);
                Ok(answer(false))
            }
            Ok(Err(reason)) => {
                self.drop_device(&device).await?;
                Err(AgentError::failed(format!("device {name}: {peer} refused the connection: {reason}")))
            }
            Err(error) => {
                self.drop_device(&device).await?;
                Err(error)
            }
        }
    }

    /// A disk that comes here must take the blocks that its guest was told.
    fn fits_blocks(&self, request: &Prepare, folder: &std::path::Path) -> Result<(), AgentError> {
        let belay_wire::device::DeviceClass::Block(geometry) = &request.identity.class;
        if !request.direct {
            return Ok(());
        }
        let needs = belay_block::direct_block_bytes(folder).map_err(|error| {
            let (name, folder) = (&request.identity.name, folder.display());
            let host = self.host();
            AgentError::precheck(format!("device {name} cannot come to {folder} of host {host}: {error}"))
        })?;
        if geometry.block_bytes >= needs {
            return Ok(());
        }
        // The words go to the other host without a hint.
        Err(AgentError::precheck(format!(
            "device {} has blocks of {} bytes, and files in {} of host {} take blocks of {needs} past the page cache: name \
             another `images_dir` there, or leave the data where it is with `--mode stay`",
            request.identity.name,
            geometry.block_bytes,
            folder.display(),
            self.host()
        )))
    }

    /// One peer may not fill this host with threads and records.
    fn check_room_for_offers(&self, peer: &str) -> Result<(), AgentError> {
        let theirs = |role: RoleRecord| matches!(role, RoleRecord::Prepared { from, .. } if from == peer);
        let count = self.devices().iter().filter(|device| theirs(device.role())).count();
        if count >= MAX_OFFERS {
            return Err(AgentError::precheck(format!(
                "host {} has {count} devices that {peer} has offered and not brought yet: no more at a time",
                self.host()
            )));
        }
        Ok(())
    }

    /// What is left of an earlier stay of this device.
    fn departed(&self, peer: &str, request: &Prepare) -> Result<Option<Departed>, AgentError> {
        let id = request.identity.id;
        let Some(record) = self.ledger.devices()?.into_iter().find(|record| record.identity.id == id) else {
            return Ok(None);
        };
        match record.role {
            RoleRecord::Tombstone { moved_to, backend } if record.epoch <= request.epoch => {
                Ok(Some(Departed { moved_to, epoch: record.epoch, backend }))
            }
            role => {
                tracing::warn!(%peer, device = %record.identity.name, ?role, epoch = %record.epoch, offered = %request.epoch, "refused an offer of a device that this host knows otherwise");
                Err(AgentError::fenced(format!(
                    "host {} knows device {} otherwise than as one that may come from {peer} in epoch {}",
                    self.host(),
                    request.identity.name,
                    request.epoch
                )))
            }
        }
    }

    /// The migration is over without us: forget what was prepared.
    pub(crate) async fn abort_prepared(&self, peer: &str, devices: &[DeviceId]) -> Result<(), AgentError> {
        for id in devices {
            if let Some(device) = self.device_by_id(*id)
                && matches!(device.role(), RoleRecord::Prepared { from, .. } if from == peer)
            {
                device.send(Command::Shutdown);
                self.drop_device(&device).await?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agent, identity};

    /// A file system on a disk of 4096-byte sectors, while it lives.
    struct LargeSectors {
        folder: tempfile::TempDir,
        device: String,
    }

    impl LargeSectors {
        /// `None`: this needs root, loop devices and ext4.
        fn mount() -> Option<Self> {
            let run = |program: &str, arguments: &[&str]| {
                let output = std::process::Command::new(program).args(arguments).output().ok()?;
                output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
            };
            let folder = tempfile::tempdir().unwrap();
            let (image, mount) = (folder.path().join("image"), folder.path().join("mount"));
            std::fs::create_dir(&mount).unwrap();
            std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
            let device = run("losetup", &["-f", "--show", "-b", "4096", image.to_str()?])?;
            let made = Self { folder, device };
            run("mkfs.ext4", &["-q", "-b", "4096", &made.device])?;
            run("mount", &[&made.device, mount.to_str()?])?;
            Some(made)
        }

        fn path(&self) -> std::path::PathBuf {
            self.folder.path().join("mount")
        }
    }

    impl Drop for LargeSectors {
        fn drop(&mut self) {
            let _ = std::process::Command::new("umount").arg("-q").arg(self.path()).status();
            let _ = std::process::Command::new("losetup").arg("-d").arg(&self.device).status();
        }
    }

    #[tokio::test]
    async fn disk_that_could_not_come_for_its_small_blocks_is_refused_before() {
        let Some(disk) = LargeSectors::mount() else {
            belay_e2e::skip("no disk of large sectors can be made here");
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let config = crate::config::Config {
            runtime_dir: folder.path().to_owned(),
            state_dir: folder.path().join("state"),
            images_dir: Some(disk.path().join("images")),
            ..Default::default()
        };
        let ledger = crate::ledger::Ledger::open(&folder.path().join("ledger.redb")).unwrap();
        let agent = Agent::new(config, None, ledger);
        let mut prepare = Prepare {
            identity: identity("disk0"),
            epoch: Epoch(1),
            mode: Mode::Follow,
            needed_bytes: 0,
            delay_us: None,
            direct: true,
            again: false,
            dry_run: true,
        };
        let error = agent.prepare("host-x", prepare.clone()).await.unwrap_err();
        assert_eq!(error.code, "precheck");
        assert!(error.message.contains("512") && error.message.contains("4096"), "{error}");
        let fits: [fn(&mut Prepare); 3] = [
            |prepare| prepare.direct = false,
            |prepare| prepare.mode = Mode::Stay,
            |prepare| {
                let belay_wire::device::DeviceClass::Block(geometry) = &mut prepare.identity.class;
                geometry.block_bytes = 4096;
            },
        ];
        for change in fits {
            prepare.direct = true;
            prepare.mode = Mode::Follow;
            change(&mut prepare);
            agent.prepare("host-x", prepare.clone()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn device_that_cannot_be_served_here_leaves_no_record_of_its_preparation() {
        let (folder, agent) = agent();
        // Where the folder of the sockets would be made there is a file.
        std::fs::write(folder.path().join("devices"), "").unwrap();
        let prepare = Prepare {
            identity: identity("disk0"),
            epoch: Epoch(1),
            mode: Mode::Stay,
            needed_bytes: 0,
            delay_us: None,
            direct: false,
            again: false,
            dry_run: false,
        };
        agent.prepare("host-x", prepare.clone()).await.unwrap_err();
        assert!(agent.ledger.devices().unwrap().is_empty());
        assert!(agent.devices().is_empty());
        // What was left here of an earlier stay is still known.
        let role = RoleRecord::Tombstone {
            moved_to: "host-x".into(),
            backend: belay_block::BackendSpec::file("/a".into()),
        };
        let left = DeviceRecord {
            schema: SCHEMA,
            identity: prepare.identity.clone(),
            epoch: Epoch(1),
            role,
            offered: None,
            bandwidth: None,
            listed: None,
        };
        agent.ledger.put_device(&left).unwrap();
        agent.prepare("host-x", prepare).await.unwrap_err();
        assert_eq!(agent.ledger.devices().unwrap(), [left]);
    }
}
