//! Devices of this host: started, added, removed, resized.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use belay_attach::{BACKEND_OWNER, Command, DeviceConfig, DeviceHandle, LinkTimes, Notice, Role};
use belay_block::{BackendSpec, OpenError};
use belay_wire::Epoch;

use super::{Agent, LOCK_IS_USUAL, LOCK_RETRY, check_name, listen};
use crate::device::Managed;
use crate::error::AgentError;
use crate::ledger::{DeviceRecord, RoleRecord, SCHEMA};

impl Agent {
    /// Starts every device of the ledger.
    ///
    /// # Errors
    /// The ledger cannot be read, or a thread cannot be started.
    pub async fn start_devices(self: &Arc<Self>) -> Result<(), AgentError> {
        for record in self.ledger.devices()? {
            if matches!(record.role, RoleRecord::Tombstone { .. }) {
                continue;
            }
            self.events.note(
                "device",
                Some(&record.identity.name),
                None,
                format!("back after a restart, epoch {}", record.epoch),
            );
            let agent = Arc::clone(self);
            let mut start = Box::pin(async move { agent.start_or_say_why(record).await });
            // Whatever can be started at once is, before the agent says that it is ready. One that has to wait, for
            // the lock on its file or for another host, does not keep the others from their disks.
            let pending = poll_fn(|context| Poll::Ready(start.as_mut().poll(context).is_pending())).await;
            if pending {
                tokio::spawn(start);
            }
        }
        Ok(())
    }

    async fn start_or_say_why(self: Arc<Self>, record: DeviceRecord) {
        let name = record.identity.name.clone();
        let id = record.identity.id;
        if let Err(error) = self.start_device(record).await {
            self.events.note("device", Some(&name), None, format!("did not start: {error}"));
            tracing::error!(device = %name, %error, "a device did not start");
            if let Some(device) = self.device_by_id(id) {
                device.set_trouble(Some(error.message));
            }
        }
    }

    /// Starts a device's thread in the role of its record, which is in the ledger already.
    ///
    /// # Errors
    /// No thread, or no socket.
    pub async fn start_device(self: &Arc<Self>, record: DeviceRecord) -> Result<Arc<Managed>, AgentError> {
        let name = record.identity.name.clone();
        let role = match &record.role {
            RoleRecord::Local { .. } => Role::Local,
            RoleRecord::Lent { to, .. } => Role::Lent { to: to.clone() },
            RoleRecord::Prepared { from, .. } => Role::Successor { from: from.clone() },
            RoleRecord::Remote { backing, .. }
            | RoleRecord::Exchanging { backing, .. }
            | RoleRecord::Cutting { backing, .. } => Role::Remote { backing: backing.clone() },
            RoleRecord::Tombstone { moved_to, .. } => {
                return Err(AgentError::fenced(format!("device {name} has moved to {moved_to}")));
            }
        };
        let link = LinkTimes {
            heartbeat: Duration::from_millis(self.config.link.heartbeat_ms),
            dead_after: Duration::from_millis(self.config.link.dead_after_ms),
        };
        let config = DeviceConfig {
            identity: record.identity.clone(),
            epoch: record.epoch,
            role,
            link,
            spin: Duration::from_micros(self.config.data_plane.spin_us),
            memory_slots: self.config.data_plane.memory_slots,
        };
        let failed =
            |error: std::io::Error| AgentError::failed(format!("device {name} cannot be started: {error}"));
        let (handle, notices) = DeviceHandle::spawn(config).map_err(failed)?;
        let device = Arc::new(Managed::new(handle, record.clone()));
        self.devices
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .insert(name.clone(), Arc::clone(&device));
        self.listen_to(&device, notices);
        if let Some(list) = record.listed.as_deref() {
            let list = belay_wire::InflightList::decode(list).map_err(|error| {
                AgentError::failed(format!("device {name}: what was in flight cannot be read: {error}"))
            })?;
            device.set_listed(Some(list.clone()));
            device.send(Command::Remember(list));
        }
        if let Some(offer) = record.offered {
            device.send(Command::Offer { to: offer.to });
        }
        match record.role {
            RoleRecord::Local { backend } | RoleRecord::Lent { backend, .. } => {
                let path = backend.path.clone();
                let backend = open_when_free(&device, &backend, None).await?;
                let belay_wire::device::DeviceClass::Block(geometry) = &record.identity.class;
                let (wanted, there) = (geometry.size_bytes, backend.info().size_bytes);
                if there < wanted {
                    let what =
                        path.map_or_else(|| "its backend".to_owned(), |path| path.display().to_string());
                    return Err(AgentError::failed(format!(
                        "{what} has {there} bytes, the device {wanted}: the end of its data is missing"
                    )));
                }
                device.send(Command::SetBackend(backend));
            }
            RoleRecord::Exchanging { backing, backend } => {
                self.continue_exchange(&device, &backing, &backend).await?;
            }
            RoleRecord::Cutting { backing, backend } => {
                // No VMM may connect before it is known who has the device.
                self.finish_interrupted_cut(&device, backing, backend);
                return Ok(device);
            }
            RoleRecord::Remote { follow: true, .. } => self.follow_guest(&device, None),
            _ => {}
        }
        self.let_vmm_connect(&device)?;
        Ok(device)
    }

    /// Lets a VMM connect to a device.
    pub(crate) fn let_vmm_connect(&self, device: &Managed) -> Result<(), AgentError> {
        let socket = self.config.device_socket(&device.name());
        let listener =
            listen(&socket).map_err(|error| AgentError::failed(format!("{}: {error}", socket.display())))?;
        if let Some(uid) = self.vmm_uid.get() {
            // QEMU connects as root, but reconnects as this user.
            std::os::unix::fs::chown(&socket, Some(*uid), None).map_err(|error| {
                AgentError::failed(format!("{} cannot be given to the VMs' user: {error}", socket.display()))
            })?;
        }
        device.send(Command::Listen(listener));
        Ok(())
    }

    /// Adds a device, both attached to and backed by this host.
    ///
    /// # Errors
    /// The name is taken, or the backend cannot be opened.
    pub async fn add_device(
        self: &Arc<Self>,
        mut identity: belay_wire::DeviceIdentity,
        backend: BackendSpec,
    ) -> Result<Arc<Managed>, AgentError> {
        check_name(&identity.name)?;
        if self.device(&identity.name).is_ok() {
            return Err(AgentError::usage(format!("there is a device {} already", identity.name)));
        }
        let opened =
            backend.build(BACKEND_OWNER).map_err(|error| self.why_not_opened(&identity.name, &error))?;
        let belay_wire::device::DeviceClass::Block(geometry) = &mut identity.class;
        geometry.size_bytes = opened.info().size_bytes;
        opened
            .info()
            .check_blocks(geometry.block_bytes)
            .map_err(|error| AgentError::usage(format!("device {}: {error}", identity.name)))?;
        drop(opened);
        if !geometry.size_bytes.is_multiple_of(u64::from(geometry.block_bytes)) {
            let (size, block) = (geometry.size_bytes, geometry.block_bytes);
            let what =
                format!("device {}: {size} bytes are no whole number of blocks of {block}", identity.name);
            return Err(AgentError::usage(what));
        }
        let name = identity.name.clone();
        let record = DeviceRecord {
            schema: SCHEMA,
            identity,
            epoch: Epoch(1),
            role: RoleRecord::Local { backend },
            offered: None,
            bandwidth: None,
            listed: None,
        };
        self.write_record(record.clone()).await?;
        let device = self.start_device(record).await?;
        self.events.note("device", Some(&name), None, "added");
        Ok(device)
    }

    /// What is wrong with a backend, and what to do about it.
    fn why_not_opened(&self, name: &str, error: &OpenError) -> AgentError {
        let failed = AgentError::failed(format!("device {name}: {error}"));
        match error {
            OpenError::Locked { path } => {
                let has = |device: &Arc<Managed>| device.role().path() == Some(path);
                match self.devices().into_iter().find(has) {
                    Some(other) => AgentError::precheck(format!(
                        "device {name}: {} is device {} already",
                        path.display(),
                        other.name()
                    ))
                    .hint("one file is one device; give another path"),
                    None => {
                        failed.hint(format!("`fuser -v {}` shows by whom; end that first", path.display()))
                    }
                }
            }
            OpenError::Size { path, size_bytes: 0 } => {
                failed.hint(format!("remove {}, and say a size: `--size 10G`", path.display()))
            }
            OpenError::Size { path, .. } => {
                failed.hint(format!("`truncate --size %512 {}` makes it a little longer", path.display()))
            }
            OpenError::NotADisk { .. } => failed.hint("give the path of an image, or of a block device"),
            _ => failed,
        }
    }

    /// Forgets a device. Its backend's file is left alone.
    ///
    /// # Errors
    /// It is in use.
    pub async fn remove_device(&self, name: &str) -> Result<(), AgentError> {
        let device = match self.device(name) {
            Ok(device) => device,
            Err(missing) => return self.forget_departed(name, missing).await,
        };
        let role = device.role();
        if device.snapshot().vmm_connected {
            return Err(
                AgentError::precheck(format!("device {name} is used by a VM")).hint("stop the VM first")
            );
        }
        if !matches!(role, RoleRecord::Local { .. } | RoleRecord::Prepared { .. }) {
            let why = match role {
                RoleRecord::Lent { to, .. } => {
                    format!("the guest of device {name} is at {to}, and its data here")
                }
                RoleRecord::Tombstone { moved_to, .. } => {
                    format!("device {name} is about to leave for {moved_to}")
                }
                _ => format!("the data of device {name} is at another host"),
            };
            return Err(AgentError::precheck(why).hint("it can be removed where its guest and its data are"));
        }
        not_offered(&device)?;
        self.drop_device(&device).await
    }

    /// Forgets that a device has left, unless the host that it went to may still have to ask about it.
    async fn forget_departed(&self, name: &str, missing: AgentError) -> Result<(), AgentError> {
        let departed = self.ledger.devices()?.into_iter().find_map(|record| match &record.role {
            RoleRecord::Tombstone { moved_to, .. } if record.identity.name == name => {
                Some((record.identity.id, moved_to.clone()))
            }
            _ => None,
        });
        let Some((id, moved_to)) = departed else { return Err(missing) };
        let query = crate::peer::DeviceQuery { id };
        let asked: Result<crate::peer::DeviceState, AgentError> =
            self.call_host(&moved_to, Duration::from_secs(5), "device_state", &query).await;
        match asked {
            Ok(state) if state.view.backed_by != moved_to => {
                return Err(AgentError::precheck(format!(
                    "device {name} is still on its way to {moved_to}: it is {} there",
                    state.view.state
                )));
            }
            Err(error) if error.code != "not_found" => return Err(error),
            _ => {}
        }
        let ledger = Arc::clone(&self.ledger);
        tokio::task::spawn_blocking(move || ledger.remove_device(id))
            .await
            .map_err(|error| AgentError::failed(error.to_string()))??;
        self.events.note("device", Some(name), None, format!("forgotten: it had moved to {moved_to}"));
        Ok(())
    }

    /// Stops a device's thread and forgets the record, except that the device has been here before.
    pub(crate) async fn drop_device(&self, device: &Managed) -> Result<(), AgentError> {
        let name = device.name();
        self.drop_record(device.record()).await?;
        self.stop_device(device).await;
        self.events.note("device", Some(&name), None, "removed");
        Ok(())
    }

    /// Forgets a record, or puts back what was known of the device's earlier stay.
    pub(crate) async fn drop_record(&self, record: DeviceRecord) -> Result<(), AgentError> {
        if let RoleRecord::Prepared { replaces: Some(departed), .. } = record.role {
            let role = RoleRecord::Tombstone { moved_to: departed.moved_to, backend: departed.backend };
            return self.write_record(DeviceRecord { epoch: departed.epoch, role, ..record }).await;
        }
        let (ledger, id) = (Arc::clone(&self.ledger), record.identity.id);
        tokio::task::spawn_blocking(move || ledger.remove_device(id))
            .await
            .map_err(|error| AgentError::failed(error.to_string()))??;
        Ok(())
    }

    /// Stops a device's thread; the record stays.
    pub(crate) async fn stop_device(&self, device: &Managed) {
        let name = device.name();
        device.send(Command::Shutdown);
        let _ = device.stopped().await;
        let mut devices = self.devices.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // It may have been started anew meanwhile.
        if devices.get(&name).is_some_and(|present| std::ptr::eq(Arc::as_ptr(present), device)) {
            devices.remove(&name);
            let _ = std::fs::remove_file(self.config.device_socket(&name));
        }
    }

    /// Grows a device: its backend first, then the record, then the guest's view. An agent that dies in between leaves
    /// a device that is smaller than its file, never a guest that knows of more than is there; the same call again
    /// goes on.
    ///
    /// # Errors
    /// It is not local, or its backend cannot grow.
    pub async fn resize_device(&self, name: &str, size_bytes: u64) -> Result<(), AgentError> {
        let device = self.device(name)?;
        // What an offer says of the device must be so when it arrives.
        let _moving = device.moving.lock().await;
        if !matches!(device.role(), RoleRecord::Local { .. }) {
            return Err(AgentError::precheck(format!(
                "device {name} can be resized only while guest and backing are on the same host"
            )));
        }
        not_offered(&device)?;
        device.usable()?;
        let belay_wire::device::DeviceClass::Block(geometry) = device.identity().class;
        if size_bytes == geometry.size_bytes {
            // A VMM that was connected when an earlier agent died in between may not know.
            device.send(Command::SetSize(size_bytes));
            return Ok(());
        }
        if size_bytes < geometry.size_bytes {
            return Err(AgentError::precheck(format!(
                "device {name} has {} bytes: it can become larger than that, not smaller",
                geometry.size_bytes
            )));
        }
        if !size_bytes.is_multiple_of(512) {
            return Err(AgentError::usage(format!("{size_bytes} bytes: a disk has a multiple of 512")));
        }
        let mark = device.mark();
        device.send(Command::Resize(size_bytes));
        let resized = |notice: &Notice| match notice {
            Notice::Resized(outcome) => Some(outcome.clone()),
            _ => None,
        };
        device
            .wait_for(mark, "its resize", Duration::from_secs(10), resized)
            .await?
            .map_err(|reason| AgentError::failed(format!("device {name} was not resized: {reason}")))?;
        let _writing = device.writing.lock().await;
        let mut record = device.record();
        let belay_wire::device::DeviceClass::Block(geometry) = &mut record.identity.class;
        geometry.size_bytes = size_bytes;
        if let RoleRecord::Local { backend } = &mut record.role
            && backend.size_bytes.is_some()
        {
            // One without a file is made anew, in this size, when the agent starts.
            backend.size_bytes = Some(size_bytes);
        }
        self.write_record(record.clone()).await?;
        device.set_record(record);
        device.send(Command::SetSize(size_bytes));
        self.events.note("device", Some(name), None, format!("has {size_bytes} bytes now"));
        Ok(())
    }
}

/// The host that a device is offered to has learnt what it is: it must stay like that.
fn not_offered(device: &Managed) -> Result<(), AgentError> {
    let Some(offer) = device.record().offered else { return Ok(()) };
    let name = device.name();
    Err(AgentError::precheck(format!("device {name} is offered to {}", offer.to))
        .hint(format!("take that back first: `belay device withdraw {name}`")))
}

/// Opens a backend, waiting for a predecessor's lock: writes of a killed agent may still be on their way. It waits so
/// long, or for ever.
pub(crate) async fn open_when_free(
    device: &Managed,
    spec: &BackendSpec,
    patience: Option<Duration>,
) -> Result<Box<dyn belay_block::Backend>, AgentError> {
    let belay_wire::device::DeviceClass::Block(belay_wire::device::BlockGeometry { block_bytes, .. }) =
        device.identity().class;
    let began = std::time::Instant::now();
    loop {
        match spec.build(BACKEND_OWNER) {
            Err(error @ OpenError::Locked { .. }) if patience.is_none_or(|limit| began.elapsed() < limit) => {
                if began.elapsed() > LOCK_IS_USUAL && device.trouble().is_none() {
                    tracing::warn!(device = %device.name(), %error, "waiting for the lock");
                    device.set_trouble(Some(format!("{error}; it is served as soon as that ends")));
                }
                tokio::time::sleep(LOCK_RETRY).await;
            }
            Err(error) => return Err(AgentError::failed(error.to_string())),
            Ok(backend) => {
                let checked = backend.info().check_blocks(block_bytes);
                checked.map_err(|error| AgentError::failed(error.to_string()))?;
                device.set_trouble(None);
                return Ok(backend);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Mode, OfferRecord};
    use crate::testing::{agent, memory, record};

    /// The offer carried the old size, and the guest came to a disk that ended early.
    #[tokio::test]
    async fn resize_waits_for_an_offer_that_is_being_made_and_is_refused_then() {
        let (_folder, agent) = agent();
        let record = record("disk0", Epoch(1), RoleRecord::Local { backend: memory() });
        let device = agent.start_device(record).await.unwrap();
        let offering = device.moving.lock().await;
        let resized = tokio::spawn({
            let agent = Arc::clone(&agent);
            async move { agent.resize_device("disk0", 2 << 20).await }
        });
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        let offer = OfferRecord { to: "host-x".into(), mode: Mode::Stay };
        device.set_record(DeviceRecord { offered: Some(offer), ..device.record() });
        drop(offering);
        let error = resized.await.unwrap().unwrap_err();
        assert!(error.message.contains("offered to host-x"), "{error}");
        let belay_wire::device::DeviceClass::Block(geometry) = device.identity().class;
        assert_eq!(geometry.size_bytes, 1 << 20);
    }

    /// As an agent leaves it that dies when the file has grown and the record has not.
    #[tokio::test]
    async fn file_that_is_larger_than_its_record_is_served_and_the_resize_can_be_repeated() {
        let (folder, agent) = agent();
        let path = folder.path().join("disk0.img");
        std::fs::File::create(&path).unwrap().set_len(2 << 20).unwrap();
        let mut backend = BackendSpec::file(path.clone());
        backend.direct = false;
        let device =
            agent.start_device(record("disk0", Epoch(1), RoleRecord::Local { backend })).await.unwrap();
        assert_eq!(device.trouble(), None);
        let size = || {
            let belay_wire::device::DeviceClass::Block(geometry) = device.identity().class;
            geometry.size_bytes
        };
        assert_eq!(size(), 1 << 20);
        agent.resize_device("disk0", 2 << 20).await.unwrap();
        assert_eq!(size(), 2 << 20);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 2 << 20);
    }
}
