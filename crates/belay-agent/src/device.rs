//! A device as the control plane holds it: its thread, its record, and what it has said.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use belay_attach::{Command, DeviceHandle, Notice, Snapshot};
use belay_wire::{DeviceIdentity, Epoch, InflightList};
use tokio::sync::watch;

use crate::error::AgentError;
use crate::ledger::{DeviceRecord, RoleRecord};

/// Notices kept for those who wait for one.
const KEPT: usize = 256;

/// What a device's handover measured, on the side that has it now.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct HandoverFigures {
    /// Requests in flight at the switchover.
    pub requests_in_flight: u64,
    /// From the claim to the grant, in milliseconds.
    pub grant_ms: f64,
}

/// A device of this host.
pub struct Managed {
    /// Its thread.
    pub handle: DeviceHandle,
    record: Mutex<DeviceRecord>,
    said: Mutex<(u64, VecDeque<(u64, Notice)>)>,
    changed: watch::Sender<u64>,
    /// What the last handover to this host measured.
    pub figures: Mutex<HandoverFigures>,
    /// Held while an exchange begins: two may not make the same file.
    pub(crate) beginning: tokio::sync::Mutex<()>,
    /// Held while an offer is made or taken back.
    pub(crate) moving: tokio::sync::Mutex<()>,
    /// Held from reading the record until its successor is in the ledger.
    pub(crate) writing: tokio::sync::Mutex<()>,
    /// Whether a VMM is connected, by what the thread has said.
    vmm: AtomicBool,
    /// The host that it came from since the agent started; it may see how the device fares here.
    came_from: Mutex<Option<String>>,
    /// Why it cannot be served.
    trouble: Mutex<Option<String>>,
    /// Why its last copy ended before its time.
    copy_stopped: Mutex<Option<String>>,
    /// Why its exchange cannot begin yet; it is tried again.
    exchange_waits: Mutex<Option<String>>,
    /// How often in a row the disk here was full before it was copied.
    full: AtomicU32,
    /// What is in flight, while its rings have stopped and its guest may go home.
    listed: Mutex<Option<InflightList>>,
    /// Held while an exchange is committed: a call that is repeated waits for the first one's outcome.
    pub(crate) committing: tokio::sync::Mutex<()>,
}

impl Managed {
    /// A device whose thread runs.
    #[must_use]
    pub fn new(handle: DeviceHandle, record: DeviceRecord) -> Self {
        Self {
            handle,
            record: Mutex::new(record),
            said: Mutex::default(),
            changed: watch::channel(0).0,
            figures: Mutex::default(),
            beginning: tokio::sync::Mutex::default(),
            moving: tokio::sync::Mutex::default(),
            writing: tokio::sync::Mutex::default(),
            vmm: AtomicBool::new(false),
            came_from: Mutex::default(),
            trouble: Mutex::default(),
            copy_stopped: Mutex::default(),
            exchange_waits: Mutex::default(),
            full: AtomicU32::new(0),
            listed: Mutex::default(),
            committing: tokio::sync::Mutex::default(),
        }
    }

    /// Its record.
    #[must_use]
    pub fn record(&self) -> DeviceRecord {
        self.record.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    pub(crate) fn set_record(&self, record: DeviceRecord) {
        *self.record.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = record;
    }

    /// What it is.
    #[must_use]
    pub fn identity(&self) -> DeviceIdentity {
        self.record().identity
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        self.record().identity.name
    }

    /// Its epoch.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.record().epoch
    }

    /// Its role.
    #[must_use]
    pub fn role(&self) -> RoleRecord {
        self.record().role
    }

    /// Why it cannot be served.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    pub(crate) fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = trouble;
    }

    /// Why its last copy here ended before its time, since the agent started. None once another one begins.
    #[must_use]
    pub fn copy_stopped(&self) -> Option<String> {
        self.copy_stopped.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    pub(crate) fn set_copy_stopped(&self, reason: Option<String>) {
        *self.copy_stopped.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = reason;
    }

    /// Why its exchange cannot begin yet; it is tried again.
    #[must_use]
    pub fn exchange_waits(&self) -> Option<String> {
        self.exchange_waits.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    pub(crate) fn set_exchange_waits(&self, reason: Option<String>) {
        *self.exchange_waits.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = reason;
    }

    /// How often in a row the disk here was full before it was copied, since the agent started.
    pub(crate) fn was_full(&self) -> u32 {
        self.full.load(Ordering::SeqCst)
    }

    /// The disk here was full. How often it was now.
    pub(crate) fn count_full(&self) -> u32 {
        self.full.fetch_add(1, Ordering::SeqCst) + 1
    }

    pub(crate) fn forget_full(&self) {
        self.full.store(0, Ordering::SeqCst);
    }

    pub(crate) fn listed(&self) -> Option<InflightList> {
        self.listed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    pub(crate) fn set_listed(&self, list: Option<InflightList>) {
        *self.listed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = list;
    }

    /// Whether a VM can be given it.
    ///
    /// # Errors
    /// It cannot be served.
    pub(crate) fn usable(&self) -> Result<(), AgentError> {
        let Some(trouble) = self.trouble() else { return Ok(()) };
        let name = self.name();
        Err(AgentError::precheck(format!("device {name} cannot be served: {trouble}"))
            .hint(format!("mend that and restart the agent, or `belay device remove {name}`")))
    }

    /// Whether it came from this host.
    pub(crate) fn came_from(&self, host: &str) -> bool {
        self.came_from.lock().unwrap_or_else(std::sync::PoisonError::into_inner).as_deref() == Some(host)
    }

    pub(crate) fn set_came_from(&self, host: &str) {
        *self.came_from.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(host.to_owned());
    }

    /// Whether a VMM is connected.
    pub(crate) fn vmm_connected(&self) -> bool {
        self.vmm.load(Ordering::SeqCst)
    }

    pub(crate) fn set_vmm_connected(&self, connected: bool) {
        self.vmm.store(connected, Ordering::SeqCst);
    }

    /// Its thread's view.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.handle.snapshot()
    }

    pub(crate) fn heard(&self, notice: &Notice) {
        let notice = match notice {
            // Long, and kept already.
            Notice::Listed { .. } => Notice::Listed { list: InflightList::default() },
            notice => notice.clone(),
        };
        let mut said = self.said.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        said.0 += 1;
        let number = said.0;
        said.1.push_back((number, notice));
        if said.1.len() > KEPT {
            said.1.pop_front();
        }
        drop(said);
        self.changed.send_replace(number);
    }

    /// The number of the last notice: a wait from here on sees only later ones.
    #[must_use]
    pub fn mark(&self) -> u64 {
        self.said.lock().unwrap_or_else(std::sync::PoisonError::into_inner).0
    }

    /// Whether the thread has said such a thing after `mark`.
    pub(crate) fn has_said(&self, mark: u64, such: impl Fn(&Notice) -> bool) -> bool {
        self.find_said(mark, |notice| such(notice).then_some(())).is_some()
    }

    fn find_said<T>(&self, mark: u64, pick: impl Fn(&Notice) -> Option<T>) -> Option<T> {
        let said = self.said.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        said.1.iter().filter(|(number, _)| *number > mark).find_map(|(_, notice)| pick(notice))
    }

    /// Waits until the thread has said what `pick` takes, after `mark`. `what` is waited for, in the words of an error.
    ///
    /// # Errors
    /// It has not, within `limit`.
    pub async fn wait_for<T>(
        &self,
        mark: u64,
        what: &str,
        limit: Duration,
        pick: impl Fn(&Notice) -> Option<T>,
    ) -> Result<T, AgentError> {
        let mut changed = self.changed.subscribe();
        let search = async {
            loop {
                if let Some(found) = self.find_said(mark, &pick) {
                    return found;
                }
                if changed.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::time::timeout(limit, search).await.map_err(|_| {
            let seconds = limit.as_secs_f64();
            AgentError::failed(format!("device {}: waited {seconds} s in vain for {what}", self.name()))
        })
    }

    /// Waits until its thread has stopped.
    ///
    /// # Errors
    /// It has not, within five seconds.
    pub(crate) async fn stopped(&self) -> Result<(), AgentError> {
        let stopped = |notice: &Notice| matches!(notice, Notice::Stopped(_)).then_some(());
        self.wait_for(0, "the end of its thread", Duration::from_secs(5), stopped).await
    }

    /// Tells the thread.
    pub fn send(&self, command: Command) {
        self.handle.send(command);
    }
}
