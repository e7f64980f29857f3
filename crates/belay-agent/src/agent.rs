//! The agent: what it owns, and how its devices start and change.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use belay_attach::{BACKEND_OWNER, Command, DeviceConfig, DeviceHandle, LinkTimes, Notice, PeerSocket, Role};
use belay_block::{BackendSpec, OpenError};
use belay_link::{
    Backoff, ControlClient, ControlClientOptions, DataConnection, HostName, Identity, dial_data, known_hosts,
};
use belay_wire::control::Channel;
use belay_wire::{DeviceId, Epoch};

use crate::config::Config;
use crate::departure::Departure;
use crate::device::{HandoverFigures, Managed};
use crate::error::AgentError;
use crate::events::Events;
use crate::ledger::{DeviceRecord, Ledger, Mode, RoleRecord, SCHEMA, allowed};
use crate::metrics::Counts;
use crate::operation::Operations;
use crate::vm::Vms;

/// How long one attempt to connect may take.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a backend that another process holds is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(50);
/// How long a predecessor's last writes may hold the lock before the device is said to be in trouble.
pub(crate) const LOCK_IS_USUAL: Duration = Duration::from_secs(5);

/// This host's agent.
pub struct Agent {
    /// Its configuration.
    pub config: Config,
    /// Who it is to others; without one it serves its own host only.
    pub identity: Option<Arc<Identity>>,
    /// What it knows durably.
    pub ledger: Arc<Ledger>,
    /// What has happened.
    pub events: Events,
    /// What is under way.
    pub operations: Operations,
    /// Its VMs.
    pub vms: Vms,
    /// The user that QEMU runs as, if it is not the agent's.
    pub(crate) vmm_uid: std::sync::OnceLock<u32>,
    /// Everything of the ledger is there.
    pub(crate) started: std::sync::atomic::AtomicBool,
    /// What it counts for its metrics.
    pub counts: Counts,
    /// Held while a device is prepared for a peer: the same call twice may not start it twice.
    pub(crate) preparing: tokio::sync::Mutex<()>,
    /// Devices that leave together.
    pub(crate) departures: Mutex<Vec<Arc<Departure>>>,
    /// VMs that wait for their memory.
    pub(crate) expected_memory: crate::ram::Expected,
    devices: Mutex<BTreeMap<String, Arc<Managed>>>,
    clients: Mutex<BTreeMap<String, ControlClient>>,
}

impl Agent {
    /// An agent that has not started its devices.
    #[must_use]
    pub fn new(config: Config, identity: Option<Arc<Identity>>, ledger: Ledger) -> Arc<Self> {
        Arc::new(Self {
            config,
            identity,
            ledger: Arc::new(ledger),
            events: Events::default(),
            operations: Operations::default(),
            vms: Vms::default(),
            vmm_uid: std::sync::OnceLock::new(),
            started: std::sync::atomic::AtomicBool::new(false),
            counts: Counts::default(),
            preparing: tokio::sync::Mutex::default(),
            departures: Mutex::default(),
            expected_memory: crate::ram::Expected::default(),
            devices: Mutex::default(),
            clients: Mutex::default(),
        })
    }

    /// This host's name.
    #[must_use]
    pub fn host(&self) -> String {
        let named = self.config.host_name.clone();
        named
            .or_else(|| self.identity.as_ref().map(|identity| identity.host().to_string()))
            .unwrap_or_else(|| "localhost".to_owned())
    }

    /// All devices.
    #[must_use]
    pub fn devices(&self) -> Vec<Arc<Managed>> {
        self.devices.lock().unwrap_or_else(std::sync::PoisonError::into_inner).values().cloned().collect()
    }

    /// A device by its name.
    ///
    /// # Errors
    /// There is none.
    pub fn device(&self, name: &str) -> Result<Arc<Managed>, AgentError> {
        let devices = self.devices.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        devices.get(name).cloned().ok_or_else(|| {
            AgentError::not_found(format!("there is no device {name} on this host"))
                .hint("`belay device list` shows those that are")
        })
    }

    /// A device by its name; one that has left says where it went.
    ///
    /// # Errors
    /// There is none.
    pub fn device_or_gone(&self, name: &str) -> Result<Arc<Managed>, AgentError> {
        let missing = match self.device(name) {
            Ok(device) => return Ok(device),
            Err(missing) => missing,
        };
        let records = self.ledger.devices()?;
        let gone = records.into_iter().find_map(|record| match record.role {
            RoleRecord::Tombstone { moved_to, .. } if record.identity.name == name => Some(moved_to),
            _ => None,
        });
        Err(gone.map_or(missing, |to| AgentError::fenced(format!("device {name} has moved to {to}"))))
    }

    /// A device by its id.
    #[must_use]
    pub fn device_by_id(&self, id: DeviceId) -> Option<Arc<Managed>> {
        self.devices().into_iter().find(|device| device.identity().id == id)
    }

    /// Writes a record durably, then remembers it.
    ///
    /// # Errors
    /// The disk, or the device cannot go from its role to this one.
    pub async fn record(&self, device: &Managed, epoch: Epoch, role: RoleRecord) -> Result<(), AgentError> {
        // The limit belongs to one exchange.
        let copying = matches!(role, RoleRecord::Exchanging { .. } | RoleRecord::Cutting { .. });
        let bandwidth = if copying { device.record().bandwidth } else { None };
        self.record_with(device, epoch, role, bandwidth).await
    }

    /// As [`Agent::record`], with this limit of the device's exchange.
    pub(crate) async fn record_with(
        &self,
        device: &Managed,
        epoch: Epoch,
        role: RoleRecord,
        bandwidth: Option<u64>,
    ) -> Result<(), AgentError> {
        let _writing = device.writing.lock().await;
        let present = device.record();
        if epoch < present.epoch || !allowed(&present.role, &role) {
            return Err(AgentError::fenced(format!(
                "device {} is {:?} in epoch {}: it cannot become {role:?} in epoch {epoch}",
                present.identity.name, present.role, present.epoch
            )));
        }
        let record = DeviceRecord { epoch, role, offered: None, bandwidth, listed: None, ..present };
        self.write_record(record.clone()).await?;
        device.set_record(record);
        Ok(())
    }

    /// Writes a record durably.
    ///
    /// # Errors
    /// The disk.
    pub async fn write_record(&self, record: DeviceRecord) -> Result<(), AgentError> {
        self.write_records(vec![record]).await
    }

    /// Writes the records of several devices durably: all of them, or none.
    ///
    /// # Errors
    /// The disk.
    pub(crate) async fn write_records(&self, records: Vec<DeviceRecord>) -> Result<(), AgentError> {
        let ledger = Arc::clone(&self.ledger);
        tokio::task::spawn_blocking(move || ledger.put_devices(&records))
            .await
            .map_err(|error| AgentError::failed(error.to_string()))?
            .map_err(Into::into)
    }

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

    /// Handles a thread's notices for as long as it lives.
    fn listen_to(self: &Arc<Self>, device: &Arc<Managed>, notices: std::sync::mpsc::Receiver<Notice>) {
        let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
        let name: String = format!("n-{}", device.name()).chars().take(15).collect();
        let spawned = std::thread::Builder::new().name(name).spawn(move || {
            while let Ok(notice) = notices.recv() {
                if sender.send(notice).is_err() {
                    return;
                }
            }
        });
        if let Err(error) = spawned {
            tracing::error!(%error, "a device's notices cannot be heard");
        }
        let (agent, device) = (Arc::clone(self), Arc::clone(device));
        tokio::spawn(async move {
            while let Some(notice) = receiver.recv().await {
                agent.on_notice(&device, &notice).await;
                device.heard(&notice);
            }
        });
    }

    async fn on_notice(self: &Arc<Self>, device: &Arc<Managed>, notice: &Notice) {
        let name = device.name();
        let note = |kind: &str, message: String| self.events.note(kind, Some(&name), None, message);
        match notice {
            Notice::NeedConnection { peer, channel } => self.dial(device, peer.clone(), *channel),
            Notice::Claimed { by, epoch, in_flight } => self.grant(device, by, *epoch, *in_flight).await,
            Notice::Granted { epoch } => {
                Counts::add(&self.counts.handovers_out);
                note("handover", format!("granted, epoch {epoch}"));
            }
            Notice::Attached { epoch, in_flight, grant_ms } => {
                Counts::add(&self.counts.handovers_in);
                note(
                    "handover",
                    format!(
                        "attached, epoch {epoch}, {in_flight} requests in flight, grant after {grant_ms:.2} ms"
                    ),
                );
                *device.figures.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
                    HandoverFigures { requests_in_flight: *in_flight, grant_ms: *grant_ms };
                self.attached(device, *epoch).await;
            }
            Notice::Listed { list } => device.set_listed(Some(list.clone())),
            Notice::RingsStarted => self.forget_listed(device).await,
            Notice::Returning { from, epoch } => self.take_return(device, from, *epoch).await,
            Notice::Returned { epoch, in_flight, grant_ms } => {
                note("handover", format!("came home, epoch {epoch}, {in_flight} requests in flight"));
                *device.figures.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
                    HandoverFigures { requests_in_flight: *in_flight, grant_ms: *grant_ms };
            }
            Notice::Taken { epoch } => self.gone_home(device, *epoch).await,
            Notice::HandoverFailed { reason } => note("handover", format!("failed: {reason}")),
            Notice::ReadyToCut => {
                note("exchange", "everything is here: cutting over".to_owned());
                let (agent, device) = (Arc::clone(self), Arc::clone(device));
                tokio::spawn(async move { agent.cut_over(&device).await });
            }
            Notice::ExchangePaused { reason } => {
                note("exchange", format!("stopped, the device stays remote: {reason}"));
                device.set_copy_stopped(Some(reason.clone()));
                self.back_to_remote(device).await;
            }
            Notice::ExchangeCancelled => {
                note("exchange", "cancelled, the device stays remote".to_owned());
                self.back_to_remote(device).await;
            }
            Notice::ExchangeDone => {
                Counts::add(&self.counts.exchanges);
                note("exchange", "done: the device is local".to_owned());
            }
            Notice::Link { peer, up: true, .. } => note("link", format!("connected to {peer}")),
            Notice::Link { peer, up: false, reason } => {
                note("link", format!("lost {peer}: {}", reason.as_deref().unwrap_or("no reason given")));
            }
            Notice::PeerRefused { peer, reason, .. } => note("link", format!("{peer} refused: {reason}")),
            Notice::Vmm { connected: true, .. } => {
                device.set_vmm_connected(true);
                note("device", "a VMM connected".to_owned());
            }
            Notice::Vmm { connected: false, reason } => {
                note("device", format!("the VMM's connection ended: {}", reason.as_deref().unwrap_or("")));
                device.set_vmm_connected(false);
                self.forget_if_gone(device);
            }
            Notice::Stopped(Some(reason)) => note("device", format!("its thread failed: {reason}")),
            _ => {}
        }
    }

    async fn attached(self: &Arc<Self>, device: &Arc<Managed>, epoch: Epoch) {
        let RoleRecord::Prepared { from, mode, delay_us, direct, replaces } = device.role() else { return };
        let role = RoleRecord::Remote {
            backing: from.clone(),
            delay_us,
            direct,
            follow: mode == Mode::Follow,
            replaces: replaces.and_then(|departed| departed.backend.path),
        };
        if let Err(error) = self.record(device, epoch, role).await {
            // The source's ledger has the grant; after a restart it is asked.
            self.events.note("handover", Some(&device.name()), None, error.message);
        }
        self.brought_along(device, &from).await;
        if mode == Mode::Follow {
            self.follow_guest(device, None);
        }
    }

    async fn back_to_remote(&self, device: &Managed) {
        // Not from a cut: the other host may have committed, and then the only copy is here.
        if let RoleRecord::Exchanging { backing, backend } = device.role() {
            let role = RoleRecord::Remote {
                backing,
                delay_us: backend.delay_us,
                direct: backend.direct,
                follow: false,
                replaces: backend.path.clone(),
            };
            if self.record(device, device.epoch(), role).await.is_ok()
                && let Some(path) = backend.path
            {
                let _ = tokio::fs::remove_file(path).await;
            }
        }
    }

    /// Addresses of a host.
    ///
    /// # Errors
    /// It is not known.
    pub fn addresses(&self, host: &str) -> Result<Vec<String>, AgentError> {
        if let Some(addresses) = self.config.peers.get(host) {
            return Ok(addresses.clone());
        }
        let known = known_hosts(&self.config.pki_dir()).unwrap_or_default();
        known
            .into_iter()
            .find(|known| known.name.to_string() == host && !known.addresses.is_empty())
            .map(|known| known.addresses)
            .ok_or_else(|| {
                AgentError::precheck(format!("host {host} is not known here"))
                    .hint("enrol it with `belay host invite` and `belay host join`, or name it under [peers] in the configuration")
            })
    }

    /// Connects a device's channel to a peer, however long it takes.
    fn dial(self: &Arc<Self>, device: &Arc<Managed>, peer: String, channel: Channel) {
        let (agent, device) = (Arc::clone(self), Arc::clone(device));
        tokio::spawn(async move {
            let mut backoff = Backoff::default();
            loop {
                match agent.dial_once(&peer).await {
                    Ok(connection) => {
                        device.send(Command::Connected { channel, socket: peer_socket(connection) });
                        return;
                    }
                    Err(error) => tracing::debug!(device = %device.name(), %peer, %error, "dialling again"),
                }
                tokio::time::sleep(backoff.next_delay(rand::random())).await;
                if agent.device_by_id(device.identity().id).is_none() {
                    return;
                }
            }
        });
    }

    async fn dial_once(&self, peer: &str) -> Result<DataConnection, AgentError> {
        let (host, identity, addresses) = self.way_to(peer)?;
        dial_data(&addresses, &host, &identity, DIAL_TIMEOUT)
            .await
            .map_err(|error| AgentError::unreachable(error.to_string()))
    }

    /// What a connection to another host takes: its name, who this host is, and where the other one is reached.
    pub(crate) fn way_to(&self, host: &str) -> Result<(HostName, Arc<Identity>, Vec<String>), AgentError> {
        let identity = self.identity.clone().ok_or_else(|| {
            AgentError::precheck("this host belongs to no cluster")
                .hint("run `belay host init` or `belay host join`, then restart the agent")
        })?;
        let addresses = self.addresses(host)?;
        let name = HostName::new(host).map_err(|error| AgentError::usage(error.to_string()))?;
        Ok((name, identity, addresses))
    }

    /// Calls to another host's agent.
    ///
    /// # Errors
    /// The host is not known, or this one is not enrolled.
    pub fn client(&self, host: &str) -> Result<ControlClient, AgentError> {
        let (name, identity, addresses) = self.way_to(host)?;
        let mut clients = self.clients.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let client = clients.entry(host.to_owned()).or_insert_with(|| {
            ControlClient::new(name, addresses, identity, ControlClientOptions::default())
        });
        Ok(client.clone())
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
        let mark = 0;
        device.send(Command::Shutdown);
        let _ = device.wait_for(mark, &["Stopped"], Duration::from_secs(5)).await;
        self.devices.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&name);
        let _ = std::fs::remove_file(self.config.device_socket(&name));
    }

    /// Grows a device.
    ///
    /// # Errors
    /// It is not local, or its backend cannot grow.
    pub async fn resize_device(&self, name: &str, size_bytes: u64) -> Result<(), AgentError> {
        let device = self.device(name)?;
        if !matches!(device.role(), RoleRecord::Local { .. }) {
            return Err(AgentError::precheck(format!(
                "device {name} can be resized only while guest and backing are on the same host"
            )));
        }
        not_offered(&device)?;
        device.usable()?;
        let belay_wire::device::DeviceClass::Block(geometry) = device.identity().class;
        if size_bytes == geometry.size_bytes {
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
        let answer = device.wait_for(mark, &["Resized"], Duration::from_secs(10)).await?;
        if let Some(reason) = answer.strip_prefix("Resized(Err(") {
            let reason = reason.trim_end_matches("))").trim_matches('"');
            return Err(AgentError::failed(format!("device {name} was not resized: {reason}")));
        }
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

/// Names are used in paths and on command lines.
pub(crate) fn check_name(name: &str) -> Result<(), AgentError> {
    let fits = !name.is_empty()
        && name.len() <= 64
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        && !name.starts_with('.');
    if fits {
        Ok(())
    } else {
        Err(AgentError::usage(format!("{name:?} is no name: letters, digits, `-`, `_` and `.`, at most 64")))
    }
}

/// What another host says of a device is checked like what a user says.
pub(crate) fn check_identity(identity: &belay_wire::DeviceIdentity) -> Result<(), AgentError> {
    check_name(&identity.name)?;
    let belay_wire::device::DeviceClass::Block(geometry) = &identity.class;
    let wrong = if geometry.size_bytes == 0 || !geometry.size_bytes.is_multiple_of(512) {
        "its size is no multiple of 512 bytes"
    } else if !(1..=64).contains(&geometry.queues) {
        "it has not 1 to 64 queues"
    } else if !geometry.queue_entries.is_power_of_two() || geometry.queue_entries > 1024 {
        "its queues' length is no power of two up to 1024"
    } else if ![512, 4096].contains(&geometry.block_bytes) {
        "its blocks have neither 512 nor 4096 bytes"
    } else if geometry.serial.len() > 20 || !geometry.serial.is_ascii() {
        "its serial number is not at most 20 ASCII characters"
    } else {
        return Ok(());
    };
    Err(AgentError::usage(format!("device {}: {wrong}", identity.name)))
}

/// What the data plane takes of a connection.
pub(crate) fn peer_socket(connection: DataConnection) -> PeerSocket {
    PeerSocket {
        peer: connection.peer.to_string(),
        socket: connection.socket,
        tls: connection.tls,
        early: connection.early,
    }
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

/// A Unix listener at `path`, in place of whatever socket an earlier process left there.
pub(crate) fn listen(path: &Path) -> std::io::Result<std::os::unix::net::UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let _ = std::fs::remove_file(path);
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// Where the map of a device's exchange is kept.
pub(crate) fn map_path(config: &Config, name: &str) -> PathBuf {
    config.state_dir.join("maps").join(format!("{name}.map"))
}

#[cfg(test)]
mod tests {
    use belay_wire::device::{BlockGeometry, DeviceClass};

    use super::*;

    fn identity(name: &str, change: impl FnOnce(&mut BlockGeometry)) -> belay_wire::DeviceIdentity {
        let mut geometry = BlockGeometry {
            size_bytes: 1 << 20,
            block_bytes: 512,
            queues: 1,
            queue_entries: 128,
            read_only: false,
            serial: "s".into(),
        };
        change(&mut geometry);
        let class = DeviceClass::Block(geometry);
        belay_wire::DeviceIdentity { id: DeviceId::random(), name: name.into(), vm: None, class }
    }

    #[test]
    fn identity_of_a_peer_that_cannot_be_is_refused() {
        check_identity(&identity("disk0", |_| {})).unwrap();
        check_identity(&identity("../../etc/passwd", |_| {})).unwrap_err();
        check_identity(&identity("", |_| {})).unwrap_err();
        let refused: [fn(&mut BlockGeometry); 7] = [
            |geometry| geometry.size_bytes = 513,
            |geometry| geometry.queues = 0,
            |geometry| geometry.queues = 65,
            |geometry| geometry.queue_entries = 100,
            |geometry| geometry.queue_entries = 2048,
            |geometry| geometry.block_bytes = 1024,
            |geometry| geometry.serial = "x".repeat(21),
        ];
        for change in refused {
            check_identity(&identity("disk0", change)).unwrap_err();
        }
    }
}
