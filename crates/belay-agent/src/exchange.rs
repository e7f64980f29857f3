//! Exchanges: where the new backend comes from, and the commit on both hosts.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use belay_attach::{Command, ExchangeOptions, Notice};
use belay_block::BackendSpec;
use belay_link::{Backoff, CallError};

use crate::agent::devices::open_when_free;
use crate::agent::{Agent, LOCK_IS_USUAL, map_path};
use crate::device::Managed;
use crate::error::AgentError;
use crate::ledger::{DeviceRecord, RoleRecord};
use crate::peer::{CommitCut, DeviceInfo, DeviceQuery, Done};

/// How long the record of a handover may take to be written once the guest is here.
const ATTACHED_WITHIN: Duration = Duration::from_secs(2);

impl Agent {
    /// Begins to bring a device's backing here.
    ///
    /// # Errors
    /// It is not remote, or there is no room for it.
    pub async fn begin_exchange(
        self: &Arc<Self>,
        device: &Arc<Managed>,
        path: Option<PathBuf>,
        bandwidth: Option<u64>,
    ) -> Result<(), AgentError> {
        let name = device.name();
        let _beginning = device.beginning.lock().await;
        attached(device).await;
        let (backing, delay_us, direct, replaces) = match device.role() {
            RoleRecord::Remote { backing, delay_us, direct, replaces, .. } => {
                (backing, delay_us, direct, replaces)
            }
            // The same again: it goes on.
            RoleRecord::Exchanging { backend, .. } | RoleRecord::Cutting { backend, .. }
                if path.is_none() || path == backend.path =>
            {
                return match bandwidth {
                    Some(_) => self.limit_exchange(device, bandwidth).await,
                    None => Ok(()),
                };
            }
            RoleRecord::Exchanging { backend, .. } | RoleRecord::Cutting { backend, .. } => {
                let path = backend.path.unwrap_or_default();
                return Err(AgentError::precheck(format!(
                    "device {name} is being brought here already, to {}",
                    path.display()
                ))
                .hint(format!("`belay exchange {name} --cancel` ends that")));
            }
            // Nothing is left to do; a caller may not have seen that yet.
            RoleRecord::Local { .. } if path.is_none() => return Ok(()),
            RoleRecord::Local { .. } => {
                return Err(AgentError::precheck(format!("the data of device {name} is here already")));
            }
            RoleRecord::Prepared { from, .. } => {
                return Err(AgentError::precheck(format!("device {name} is still at {from}")));
            }
            RoleRecord::Lent { to, .. } | RoleRecord::Tombstone { moved_to: to, .. } => {
                return Err(AgentError::precheck(format!("the guest of device {name} is at {to}"))
                    .hint(format!("run the command on {to}")));
            }
        };
        let info: DeviceInfo = self
            .client(&backing)?
            .call("device_info", &DeviceQuery { id: device.identity().id })
            .await
            .map_err(|error| AgentError::unreachable(error.to_string()))?;
        let path = path.unwrap_or_else(|| self.config.images_dir().join(format!("{name}.img")));
        let mut others = self.ledger.devices()?.into_iter().filter(|record| {
            record.identity.id != device.identity().id && record.role.path() == Some(path.as_path())
        });
        if let Some(other) = others.next_back() {
            return Err(AgentError::precheck(format!(
                "device {name} cannot come to {}: device {} is kept there",
                path.display(),
                other.identity.name
            ))
            .hint("name another file with `belay exchange --path`"));
        }
        make_room(&name, &path, needed(&info, device.was_full() > 0))?;
        // What it says of an earlier copy would be believed.
        forget_map(&name, &map_path(&self.config, &name))?;
        create_image(&name, &path, info.size_bytes, replaces.as_deref())?;
        let backend = BackendSpec { delay_us, direct, ..BackendSpec::file(path.clone()) };
        let begins = async {
            // Before it is said that the data is on its way here: it may be that this cannot be the device's disk.
            let local = open_when_free(device, &backend, Some(Duration::ZERO)).await?;
            self.make_map_folder(&name)?;
            let role = RoleRecord::Exchanging { backing: backing.clone(), backend: backend.clone() };
            self.record_with(device, device.epoch(), role, bandwidth).await?;
            self.events.note("exchange", Some(&name), None, format!("begins, from {backing}"));
            device.set_exchange_waits(None);
            self.start_copy(device, local);
            Ok(())
        };
        let begun: Result<(), AgentError> = begins.await;
        if begun.is_err() {
            // It was made just now, and holds nothing.
            let _ = std::fs::remove_file(&path);
        }
        begun
    }

    /// Changes the limit of a device's exchange, in bytes per second; `None`: no limit. It outlives this agent.
    ///
    /// # Errors
    /// The device is not being copied here, or the disk fails.
    pub(crate) async fn limit_exchange(
        &self,
        device: &Managed,
        bandwidth: Option<u64>,
    ) -> Result<(), AgentError> {
        let _writing = device.writing.lock().await;
        let record = device.record();
        if !matches!(record.role, RoleRecord::Exchanging { .. } | RoleRecord::Cutting { .. }) {
            return Err(AgentError::precheck(format!("device {} is not being copied", device.name())));
        }
        let record = DeviceRecord { bandwidth: Some(bandwidth.unwrap_or(0)), ..record };
        self.write_record(record.clone()).await?;
        device.set_record(record);
        device.send(Command::SetBandwidth(bandwidth.filter(|limit| *limit > 0)));
        Ok(())
    }

    /// After a restart: goes on with what the map says is here, or begins anew if that cannot be. No VMM may be connected.
    pub(crate) async fn continue_exchange(
        self: &Arc<Self>,
        device: &Arc<Managed>,
        backing: &str,
        backend: &BackendSpec,
    ) -> Result<(), AgentError> {
        let opened = async {
            let local = open_when_free(device, backend, Some(LOCK_IS_USUAL)).await?;
            let belay_wire::device::DeviceClass::Block(geometry) = device.identity().class;
            let (wanted, there) = (geometry.size_bytes, local.info().size_bytes);
            if there != wanted {
                let what = backend.path.as_deref().unwrap_or(Path::new("its new backend")).display();
                return Err(AgentError::failed(format!("{what} has {there} bytes, the device {wanted}")));
            }
            self.make_map_folder(&device.name())?;
            Ok(local)
        };
        match opened.await {
            Ok(local) => {
                let message = format!("goes on, from {backing}");
                self.events.note("exchange", Some(&device.name()), None, message);
                self.start_copy(device, local);
                Ok(())
            }
            Err(error) => self.copy_anew(device, backing, backend, error).await,
        }
    }

    fn make_map_folder(&self, name: &str) -> Result<(), AgentError> {
        let map = map_path(&self.config, name);
        let Some(folder) = map.parent() else { return Ok(()) };
        std::fs::create_dir_all(folder).map_err(|error| image_error(name, folder, &error))
    }

    fn start_copy(&self, device: &Managed, local: Box<dyn belay_block::Backend>) {
        let limit = device.record().bandwidth.unwrap_or(self.config.exchange.bandwidth_bytes_per_s);
        let options = ExchangeOptions {
            map_path: map_path(&self.config, &device.name()),
            bandwidth: (limit > 0).then_some(limit),
            in_flight_bytes: self.config.exchange.in_flight_bytes,
            echo: true,
        };
        device.set_copy_stopped(None);
        device.send(Command::StartExchange { local, options });
    }

    /// The commit on both sides: this host prepares, the old one commits, this one confirms.
    pub(crate) async fn cut_over(&self, device: &Arc<Managed>) {
        let (backing, backend) = match device.role() {
            RoleRecord::Exchanging { backing, backend } | RoleRecord::Cutting { backing, backend } => {
                (backing, backend)
            }
            _ => return,
        };
        let cutting = RoleRecord::Cutting { backing: backing.clone(), backend: backend.clone() };
        if let Err(error) = self.record(device, device.epoch(), cutting).await {
            self.events.note("exchange", Some(&device.name()), None, error.message);
            device.send(Command::CutAborted);
            return;
        }
        match self.ask_to_commit(device, &backing).await {
            Ok(()) => {
                // Before it is local: whoever follows it from there may ask at any moment.
                device.set_came_from(&backing);
                let outcome = self.record(device, device.epoch(), RoleRecord::Local { backend }).await;
                if let Err(error) = outcome {
                    // The record still says "cutting": after a restart the old host is asked, and says yes again.
                    self.events.note("exchange", Some(&device.name()), None, error.message);
                }
                device.send(Command::CutCommitted);
            }
            Err(reason) => {
                self.events.note(
                    "exchange",
                    Some(&device.name()),
                    None,
                    format!("{backing} did not commit: {reason}"),
                );
                let back = RoleRecord::Exchanging { backing, backend };
                let _ = self.record(device, device.epoch(), back).await;
                device.send(Command::CutAborted);
            }
        }
    }

    /// Asks until it is known whether the old host has committed.
    async fn ask_to_commit(&self, device: &Managed, backing: &str) -> Result<(), String> {
        let mut backoff = Backoff::default();
        let request = CommitCut { id: device.identity().id, epoch: device.epoch() };
        loop {
            let client = self.client(backing).map_err(|error| error.message)?;
            match client.call::<_, Done>("commit_cut", &request).await {
                Ok(_) => return Ok(()),
                Err(CallError::Refused { error, .. }) if error.code == "fenced" => return Err(error.message),
                Err(error) => {
                    tracing::warn!(device = %device.name(), %error, "asking again whether the exchange is committed");
                    tokio::time::sleep(backoff.next_delay(rand::random()).max(Duration::from_millis(50)))
                        .await;
                }
            }
        }
    }

    /// This agent died between asking and knowing: ask again before anything is served.
    pub(crate) fn finish_interrupted_cut(
        self: &Arc<Self>,
        device: &Arc<Managed>,
        backing: String,
        backend: BackendSpec,
    ) {
        let (agent, device) = (Arc::clone(self), Arc::clone(device));
        tokio::spawn(async move {
            match agent.ask_to_commit(&device, &backing).await {
                Ok(()) => {
                    if let Err(error) =
                        agent.record(&device, device.epoch(), RoleRecord::Local { backend }).await
                    {
                        agent.events.note("exchange", Some(&device.name()), None, error.message);
                        return;
                    }
                    // A thread of the new role, from the record.
                    let record = device.record();
                    agent.stop_device(&device).await;
                    match agent.start_device(record).await {
                        Ok(device) => device.set_came_from(&backing),
                        Err(error) => agent.events.note("device", Some(&device.name()), None, error.message),
                    }
                }
                Err(reason) => {
                    agent.events.note(
                        "exchange",
                        Some(&device.name()),
                        None,
                        format!("{backing} had not committed: {reason}"),
                    );
                    let role = RoleRecord::Exchanging { backing: backing.clone(), backend: backend.clone() };
                    let goes_on = async {
                        agent.record(&device, device.epoch(), role).await?;
                        agent.continue_exchange(&device, &backing, &backend).await?;
                        agent.let_vmm_connect(&device)
                    };
                    if let Err(error) = goes_on.await {
                        agent.events.note("exchange", Some(&device.name()), None, error.message);
                    }
                }
            }
        });
    }

    /// As the old host: everything is at the new one. From here on this host refuses the device.
    pub(crate) async fn commit_cut(&self, peer: &str, request: &CommitCut) -> Result<Done, AgentError> {
        // The same for all who have nothing to do with it, whatever it is.
        let unknown = || AgentError::fenced("there is no such device here, or it is not lent to you");
        let Some(device) = self.device_by_id(request.id) else {
            let gone = self.ledger.devices()?.into_iter().find(|record| record.identity.id == request.id);
            return match gone.map(|record| record.role) {
                Some(RoleRecord::Tombstone { moved_to, .. }) if moved_to == peer => Ok(Done {}),
                _ => Err(unknown()),
            };
        };
        let _committing = device.committing.lock().await;
        if matches!(device.role(), RoleRecord::Tombstone { moved_to, .. } if moved_to == peer) {
            // Asked again while the first call was at work.
            return Ok(Done {});
        }
        let backend = match device.role() {
            RoleRecord::Lent { backend, to } if to == peer => backend,
            _ => return Err(unknown()),
        };
        if device.epoch() != request.epoch {
            return Err(AgentError::fenced(format!(
                "device {} is lent to {peer} in epoch {}",
                device.name(),
                device.epoch()
            )));
        }
        let mark = device.mark();
        device.send(Command::Retire);
        let retired = |notice: &Notice| matches!(notice, Notice::Retired).then_some(());
        device.wait_for(mark, "the disk being let go", Duration::from_secs(10), retired).await?;
        self.record(&device, request.epoch, RoleRecord::Tombstone { moved_to: peer.to_owned(), backend })
            .await?;
        self.events.note(
            "exchange",
            Some(&device.name()),
            None,
            format!("everything is at {peer}: this host lets it go"),
        );
        self.stop_device(&device).await;
        Ok(Done {})
    }
}

/// A device whose thread has just taken it over is not in the ledger yet: its record comes first.
async fn attached(device: &Managed) {
    if matches!(device.role(), RoleRecord::Prepared { .. }) {
        // What is not on its way here at all is refused a little later for it.
        let attached = |notice: &Notice| matches!(notice, Notice::Attached { .. }).then_some(());
        let _ = device.wait_for(0, "its handover", ATTACHED_WITHIN, attached).await;
    }
}

/// Removes the map of an earlier exchange.
pub(crate) fn forget_map(name: &str, path: &Path) -> Result<(), AgentError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(image_error(name, path, &error)),
        _ => Ok(()),
    }
}

fn sync_folder(folder: &Path) -> std::io::Result<()> {
    std::fs::File::open(folder)?.sync_all()
}

/// Makes a new file outlive a power loss, with its name: without its folder, a synced file may lack one.
pub(crate) fn sync_new(file: &std::fs::File, path: &Path) -> std::io::Result<()> {
    file.sync_all()?;
    sync_folder(path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

fn image_error(name: &str, path: &Path, error: &std::io::Error) -> AgentError {
    AgentError::failed(format!("device {name}: {}: {error}", path.display()))
}

/// How much room a copy needs. A guest makes it larger while it is copied; once it did not fit for that reason, or
/// because others took the room, it begins again only if there is some to spare.
fn needed(info: &DeviceInfo, was_full: bool) -> u64 {
    let spare = if was_full { info.allocated_bytes / 8 } else { 0 };
    (info.allocated_bytes + spare).min(info.size_bytes.max(info.allocated_bytes))
}

/// The folder that a disk comes to, and room in it.
fn make_room(name: &str, path: &Path, needed_bytes: u64) -> Result<(), AgentError> {
    let Some(folder) = path.parent() else { return Ok(()) };
    std::fs::create_dir_all(folder).map_err(|error| image_error(name, folder, &error))?;
    if let Some(above) = folder.parent().filter(|above| !above.as_os_str().is_empty()) {
        sync_folder(above).map_err(|error| image_error(name, above, &error))?;
    }
    let free = belay_block::free_space(folder).map_err(|error| image_error(name, folder, &error))?;
    if free < needed_bytes {
        return Err(AgentError::precheck(format!(
            "device {name} needs {needed_bytes} bytes in {}, {free} are free",
            folder.display()
        ))
        .hint("free some space, then run `belay exchange`"));
    }
    Ok(())
}

/// Makes the file that a disk comes to. A file that is there already is only removed if it is `replaces`: what an
/// earlier stay of the same device, or a copy that was given up, has left.
fn create_image(name: &str, path: &Path, size_bytes: u64, replaces: Option<&Path>) -> Result<(), AgentError> {
    let failed = |error: std::io::Error| image_error(name, path, &error);
    let old = replaces == Some(path)
        && std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_file());
    if old {
        std::fs::remove_file(path).map_err(failed)?;
    }
    let file = match std::fs::OpenOptions::new().write(true).create_new(true).open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(AgentError::precheck(format!(
                "device {name} cannot come to {}: there is something already, and it is not this device's",
                path.display()
            ))
            .hint("move it away, or name another file with `belay exchange --path`"));
        }
        opened => opened.map_err(failed)?,
    };
    let made = file.set_len(size_bytes).and_then(|()| sync_new(&file, path));
    made.map_err(|error| {
        let _ = std::fs::remove_file(path);
        failed(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_of_something_else_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk0.img");
        std::fs::write(&path, b"precious").unwrap();
        assert_eq!(create_image("disk0", &path, 4096, None).unwrap_err().code, "precheck");
        let other = folder.path().join("other.img");
        create_image("disk0", &path, 4096, Some(&other)).unwrap_err();
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn copy_that_did_not_fit_begins_again_with_some_room_to_spare() {
        let info = |allocated_bytes| DeviceInfo { size_bytes: 1000, allocated_bytes };
        assert_eq!((needed(&info(800), false), needed(&info(800), true)), (800, 900));
        assert_eq!(needed(&info(960), true), 1000, "it does not become larger than the device");
    }

    #[test]
    fn file_of_an_earlier_stay_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk0.img");
        std::fs::write(&path, b"old").unwrap();
        create_image("disk0", &path, 4096, Some(&path)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), [0; 4096]);
    }

    #[test]
    fn map_of_an_earlier_copy_that_cannot_be_removed_ends_the_attempt() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk0.map");
        forget_map("disk0", &path).unwrap();
        std::fs::write(&path, b"old").unwrap();
        forget_map("disk0", &path).unwrap();
        assert!(!path.exists());
        std::fs::create_dir(&path).unwrap();
        forget_map("disk0", &path).unwrap_err();
    }

    #[test]
    fn symlink_in_place_of_an_earlier_stay_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (target, path) = (folder.path().join("target"), folder.path().join("disk0.img"));
        std::fs::write(&target, b"precious").unwrap();
        std::os::unix::fs::symlink(&target, &path).unwrap();
        create_image("disk0", &path, 4096, Some(&path)).unwrap_err();
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn exchange_that_is_asked_for_right_after_the_handover_waits_for_its_record() {
        use belay_wire::Epoch;

        use crate::ledger::Mode;

        let (_folder, agent) = crate::testing::agent();
        let from = "host-x".to_owned();
        let role = RoleRecord::Prepared {
            from: from.clone(),
            mode: Mode::Stay,
            delay_us: None,
            direct: false,
            replaces: None,
        };
        let record = crate::testing::record("disk0", Epoch(1), role);
        let device = agent.start_device(record).await.unwrap();
        let asked = tokio::spawn({
            let (agent, device) = (Arc::clone(&agent), Arc::clone(&device));
            async move { agent.begin_exchange(&device, None, None).await }
        });
        tokio::task::yield_now().await;
        assert!(!asked.is_finished(), "it did not wait");
        let remote = RoleRecord::Remote {
            backing: from,
            delay_us: None,
            direct: false,
            follow: false,
            replaces: None,
        };
        agent.record(&device, Epoch(2), remote).await.unwrap();
        device.heard(&Notice::Attached { epoch: Epoch(2), in_flight: 0, grant_ms: 0.0 });
        // It gets as far as asking the other host, which this one is not enrolled for.
        let error = asked.await.unwrap().unwrap_err();
        assert!(error.message.contains("belongs to no cluster"), "{error}");
    }
}
