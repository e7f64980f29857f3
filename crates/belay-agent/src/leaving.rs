//! A VM on its way to another host, and how that ends: it is here, or it is there, never both.
//!
//! ```text
//!                        QEMU lets go only when this agent says so (pause-before-switchover)
//!   memory ─▶ pre-switchover ─▶ device ─▶ completed ─▶ every disk granted ─▶ ended here
//!      └────────────┴──────────────┴──────────┴─▶ taken back: nothing more is granted (or it is too late),
//!                                                 QEMU's migration is cancelled, every offer withdrawn, the VM ended
//!                                                 there if it may have arrived, and only then it goes on here
//! ```
//! All that decides is durable or asked for, so that an agent that was killed goes on here as well.

use std::sync::Arc;
use std::time::{Duration, Instant};

use belay_attach::Command;
use belay_link::{Backoff, RpcError};
use belay_vmm::{Capability, Qmp, QmpError};
use belay_wire::DeviceId;

use crate::agent::Agent;
use crate::departure::Departure;
use crate::device::Managed;
use crate::error::AgentError;
use crate::ledger::RoleRecord;
use crate::peer::{DeviceQuery, DeviceState, Done, IncomingState, VmQuery};
use crate::vm::Vm;

/// How often QEMU is asked for its progress.
pub(crate) const POLL: Duration = Duration::from_millis(20);
/// How often it is looked whether the devices have moved.
const LOOK: Duration = Duration::from_millis(2);
/// How often the destination is asked whether they still can.
const ASK: Duration = Duration::from_millis(300);
/// After so long without them it is said what is waited for.
const SAY_AFTER: Duration = Duration::from_secs(5);
/// How long it is tried to reach the other host if nothing depends on it.
const REACH: Duration = Duration::from_secs(2);
/// How long a call may take.
const CALL: Duration = Duration::from_secs(30);

/// A VM on its way.
pub(crate) struct Leaving {
    pub(crate) agent: Arc<Agent>,
    pub(crate) vm: Arc<Vm>,
    pub(crate) to: String,
    pub(crate) devices: Vec<Arc<Managed>>,
    /// Its devices that are backed here; none if there are none, or if the VM did not run.
    pub(crate) departure: Option<Arc<Departure>>,
    /// It ran when the migration began.
    pub(crate) ran: bool,
}

/// Where QEMU's migration has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrival {
    /// Here: QEMU had not let the VM go.
    No,
    /// Here, says this QEMU; but it had let the VM go, and may have lost the other's word.
    Maybe,
    /// There.
    Yes,
}

/// It was too late: the VM's devices belong to the other host, and the VM goes on there.
#[derive(Debug)]
pub(crate) struct TooLate;

fn failed(error: QmpError) -> AgentError {
    AgentError::failed(error.to_string())
}

/// Whether a device is at the other host.
fn has_moved(device: &Managed) -> bool {
    matches!(device.role(), RoleRecord::Lent { .. } | RoleRecord::Tombstone { .. })
}

/// Whether the device's backing is at the other host already: that host's ledger decides when the guest is there.
fn goes_home(device: &Managed) -> bool {
    matches!(device.role(), RoleRecord::Remote { .. } | RoleRecord::Exchanging { .. })
}

impl Leaving {
    pub(crate) fn note(&self, message: impl Into<String>) {
        self.agent.events.note("migration", None, Some(&self.vm.record.name), message);
    }

    pub(crate) fn query(&self) -> VmQuery {
        VmQuery::new(&self.vm, &self.devices)
    }

    /// Whether the devices have been granted.
    pub(crate) async fn is_committed(&self) -> bool {
        match &self.departure {
            Some(departure) => departure.is_committed().await,
            None => self.devices.iter().any(|device| has_moved(device)),
        }
    }

    /// Whether the VM arrives at the other host without anybody doing anything. `false`: QEMU has not let go of it,
    /// cannot be asked, or does not get there `within`.
    pub(crate) async fn arrives(&self, within: Duration) -> bool {
        let began = Instant::now();
        while began.elapsed() < within {
            let Ok(qmp) = self.vm.qmp().await else { return false };
            let Ok(info) = qmp.query_migrate().await else { return false };
            match info.status.as_deref() {
                Some("completed") => return true,
                Some("device") => {}
                _ => return false,
            }
            tokio::time::sleep(POLL).await;
        }
        false
    }

    /// The VM has arrived: waits until its devices are there, too. Devices that go home are not waited for if their
    /// guest does not use them; whether it does is not `known` to an agent that was restarted.
    ///
    /// # Errors
    /// They cannot get there, or did not `within`.
    pub(crate) async fn wait_moved(&self, within: Option<Duration>, known: bool) -> Result<(), AgentError> {
        let began = Instant::now();
        let mut asked = began;
        let mut said = false;
        if known {
            self.say_arrived().await;
        }
        loop {
            self.release_when_ready().await;
            let missing: Vec<String> = self
                .devices
                .iter()
                .filter(|device| !has_moved(device))
                // One that its guest does not use goes home when it does.
                .filter(|device| !known || !goes_home(device) || device.snapshot().in_flight > 0)
                .map(|device| device.name())
                .collect();
            if missing.is_empty() {
                return Ok(());
            }
            if within.is_some_and(|within| began.elapsed() > within) {
                return Err(AgentError::failed(format!("{} did not take {}", self.to, missing.join(", "))));
            }
            if !said && began.elapsed() > SAY_AFTER {
                said = true;
                self.note(format!("has arrived; waits for {} to take {}", self.to, missing.join(", ")));
            }
            if asked.elapsed() > ASK {
                asked = Instant::now();
                if known {
                    self.say_arrived().await;
                }
                self.can_still_move().await?;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Releases a departure that is held, as soon as the destination has all that it needs for the other disks.
    async fn release_when_ready(&self) {
        let Some(departure) = &self.departure else { return };
        if !departure.is_held().await {
            return;
        }
        let ready = match self.incoming_state().await {
            Ok(state) => state.has_arrived() && state.home_ready,
            // An agent of before takes the disks one by one: more cannot be known.
            Err(error) => error.code == RpcError::UNKNOWN_METHOD,
        };
        let home: Vec<_> = self.devices.iter().filter(|device| goes_home(device)).cloned().collect();
        // What is in flight in them is written with the grants; their threads may not have been heard yet.
        let listed = home.iter().all(|device| device.listed().is_some() || device.snapshot().in_flight == 0);
        if ready && listed {
            self.agent.release(departure, home).await;
        }
    }

    /// Devices that go home are taken together there, but for those that the guest does not use.
    async fn say_arrived(&self) {
        let home = self.devices.iter().filter(|device| goes_home(device));
        let unused: Vec<DeviceId> = home
            .filter(|device| device.snapshot().in_flight == 0)
            .map(|device| device.identity().id)
            .collect();
        if !unused.is_empty() {
            let query = VmQuery { devices: unused, ..self.query() };
            let told: Result<Done, AgentError> =
                self.agent.call_host(&self.to, CALL, "arrived", &query).await;
            if let Err(error) = told {
                tracing::warn!(vm = %self.vm.record.name, %error, "the destination was not told of unused disks");
            }
        }
    }

    /// How the VM is at the other host.
    async fn incoming_state(&self) -> Result<IncomingState, AgentError> {
        self.agent.call_host(&self.to, CALL, "incoming_state", &self.query()).await
    }

    /// What the destination says about the VM and its devices. If it cannot be asked, nothing is known.
    async fn can_still_move(&self) -> Result<(), AgentError> {
        if self.incoming_state().await.is_ok_and(|state| state.state == "gone") {
            return Err(AgentError::failed(format!("the VM has ended at {}", self.to)));
        }
        for device in self.devices.iter().filter(|device| !has_moved(device)) {
            let query = DeviceQuery { id: device.identity().id };
            let state: Result<DeviceState, AgentError> =
                self.agent.call_host(&self.to, CALL, "device_state", &query).await;
            if state.is_ok_and(|state| state.view.state == "failed") && !has_moved(device) {
                let name = device.name();
                return Err(AgentError::failed(format!("{} could not take device {name}", self.to)));
            }
        }
        Ok(())
    }

    /// The devices that the guest does not use are never asked for: they are given away.
    pub(crate) fn give_unused(&self) {
        if self.departure.is_some() {
            for device in self.devices.iter().filter(|device| !goes_home(device)) {
                device.send(Command::GiveAway);
            }
        }
    }

    /// The devices are there: the other host is told, and the VM is ended here, whatever it does.
    pub(crate) async fn finish(&self) {
        let told: Result<Done, AgentError> =
            self.agent.call_host(&self.to, CALL, "incoming_done", &self.query()).await;
        if let Err(error) = told {
            self.note(format!("the destination could not be told that it is done: {error}"));
        }
        if let Some(departure) = &self.departure {
            self.agent.close_departure(departure);
        }
        // Everything that was in flight has its memory here until its completion has been sent.
        if let Err(error) = self.agent.stop_vm(&self.vm.record.name).await {
            self.note(format!("does not end here: {error}"));
        }
    }

    /// The VM goes on here.
    ///
    /// # Errors
    /// Too late. Nothing has been changed then.
    pub(crate) async fn take_back(&self) -> Result<(), TooLate> {
        let (home, own): (Vec<_>, Vec<_>) = self.devices.iter().partition(|device| goes_home(device));
        if self.departure.is_none() && own.iter().any(|device| has_moved(device)) {
            return Err(TooLate);
        }
        if let Some(departure) = &self.departure
            && !self.agent.call_off(departure).await
        {
            return Err(TooLate);
        }
        let arrival = self.stop_qemu().await;
        for device in own {
            if !self.withdraw(device).await {
                // Not of a departure, which grants nothing any more: its VM did not run.
                self.note(format!("device {} belongs to {} already", device.name(), self.to));
                return Err(TooLate);
            }
        }
        if let Some(departure) = &self.departure {
            self.agent.close_departure(departure);
        }
        if arrival == Arrival::No && home.is_empty() {
            // It cannot be there: the guest does not stand still for the other host's answer.
            self.go_on().await;
            self.tell_it_is_off().await;
            return Ok(());
        }
        self.end_there(arrival, !home.is_empty()).await?;
        for device in home {
            if !self.withdraw(device).await {
                return Err(TooLate);
            }
        }
        self.go_on().await;
        Ok(())
    }

    /// After an error, an abort, or a restart: the VM ends up at one host. `true`: it goes on here.
    pub(crate) async fn end(&self) -> bool {
        let here = if self.lives_here().await || !self.runs_there().await {
            self.take_back().await.is_ok()
        } else {
            // Nobody but the other host has it.
            false
        };
        if !here {
            self.give_unused();
            // A VM that stands still takes its devices when it runs again.
            while self.ran
                && let Err(error) = self.wait_moved(None, true).await
            {
                self.note(format!("its devices belong to {}, but {error}", self.to));
                if !self.runs_there().await {
                    break;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            self.finish().await;
        }
        here
    }

    /// Whether the VM's QEMU is alive here. One that was killed is not gone at once: it is, or it answers.
    async fn lives_here(&self) -> bool {
        while self.vm.is_alive() {
            if self.vm.qmp().await.is_ok() {
                return true;
            }
            tokio::time::sleep(POLL).await;
        }
        false
    }

    /// Whether the VM runs at the other host. Asks until that is known.
    async fn runs_there(&self) -> bool {
        let mut backoff = Backoff::default();
        loop {
            match self.incoming_state().await {
                Ok(state) => return state.has_arrived(),
                // An agent of before, which cannot say.
                Err(error) if error.code == RpcError::UNKNOWN_METHOD => return false,
                // The host is away, starting, or its QEMU is slow: none of this says that the VM is not there.
                Err(error) => {
                    tracing::warn!(vm = %self.vm.record.name, %error, "asking again whether it has arrived");
                }
            }
            tokio::time::sleep(backoff.next_delay(rand::random()).max(ASK)).await;
        }
    }

    /// Ends QEMU's migration.
    async fn stop_qemu(&self) -> Arrival {
        loop {
            match self.vm.qmp().await {
                Ok(qmp) => match stop_migrating(&qmp).await {
                    Ok(arrival) => return arrival,
                    Err(error) => tracing::warn!(vm = %self.vm.record.name, %error, "asking again"),
                },
                Err(_) if !self.vm.is_alive() => return Arrival::Maybe,
                Err(error) => tracing::warn!(vm = %self.vm.record.name, %error, "asking again"),
            }
            tokio::time::sleep(10 * POLL).await;
        }
    }

    /// Whether this device is not granted any more: it leaves with others, has not left, and this is taken back.
    fn is_called_off(&self, device: &Managed) -> bool {
        self.departure.is_some() && !goes_home(device) && !has_moved(device)
    }

    /// Withdraws an offer. `false`: too late. Until the other host has said which, it is neither.
    async fn withdraw(&self, device: &Arc<Managed>) -> bool {
        loop {
            let outcome = {
                let _moving = device.moving.lock().await;
                self.agent.withdraw_here(device).await
            };
            match outcome {
                Ok(()) => return true,
                // Of a departure that was called off nothing is granted: the other host is just being refused.
                Err(error) if error.code == "fenced" && self.is_called_off(device) => {
                    tokio::time::sleep(POLL).await;
                }
                Err(error) if error.code == "fenced" => return false,
                Err(error) => {
                    tracing::warn!(device = %device.name(), %error, "withdrawing again");
                    if self.agent.device_by_id(device.identity().id).is_none() {
                        return !has_moved(device);
                    }
                }
            }
        }
    }

    /// Tells the other host not to wait for the VM. One that cannot be reached asks when it is back.
    async fn tell_it_is_off(&self) {
        let told = async {
            let reached = self.agent.client(&self.to)?.reach(REACH).await;
            reached.map_err(|error| AgentError::unreachable(error.to_string()))?;
            let _: Done = self.agent.call_host(&self.to, CALL, "abort_incoming", &self.query()).await?;
            Ok::<(), AgentError>(())
        };
        if let Err(error) = told.await {
            self.note(format!("the destination could not be told: {error}"));
        }
    }

    /// Ends the VM at the other host. If it may run there, not before that has been done may it go on here.
    ///
    /// # Errors
    /// Too late: devices that go home (`deciding`) have come home with it, says the ledger of that host.
    async fn end_there(&self, arrival: Arrival, deciding: bool) -> Result<(), TooLate> {
        let mut backoff = Backoff::default();
        let began = Instant::now();
        loop {
            let told: Result<Done, AgentError> =
                self.agent.call_host(&self.to, CALL, "abort_incoming", &self.query()).await;
            match told {
                Ok(_) => return Ok(()),
                Err(error) if error.code == "fenced" && deciding && arrival != Arrival::No => {
                    return Err(TooLate);
                }
                Err(error) if Self::needs_no_answer(arrival, deciding, began) => {
                    self.note(format!("the destination could not be told: {error}"));
                    return Ok(());
                }
                Err(error) => {
                    self.note(format!("may be at {}, and has to end there first: {error}", self.to));
                }
            }
            tokio::time::sleep(backoff.next_delay(rand::random()).max(Duration::from_secs(1))).await;
        }
    }

    /// Whether the VM may go on here although the other host has not answered.
    fn needs_no_answer(arrival: Arrival, deciding: bool, began: Instant) -> bool {
        match arrival {
            Arrival::No => true,
            Arrival::Maybe => !deciding && began.elapsed() > CALL,
            Arrival::Yes => false,
        }
    }

    async fn go_on(&self) {
        if let Ok(qmp) = self.vm.qmp().await {
            // Else the next attempt would wait before the switchover for somebody else.
            let mut attempts = 0;
            while let Err(error) = qmp.set_capabilities(&[(Capability::PauseBeforeSwitchover, false)]).await {
                attempts += 1;
                if attempts == 10 {
                    self.note(format!("pause-before-switchover stays on: {error}"));
                    break;
                }
                tokio::time::sleep(5 * POLL).await;
            }
            if qmp.query_status().await.is_ok_and(|state| state.status != "running")
                && self.ran
                && let Err(error) = qmp.cont().await
            {
                self.note(format!("does not go on: {error}"));
            }
        }
        if let Err(error) = self.agent.mark_migrating(&self.vm, None).await {
            tracing::warn!(%error, "the ledger still says that the VM is on its way");
        }
    }
}

/// Ends a migration away from here, if it is under way.
async fn stop_migrating(qmp: &Qmp) -> Result<Arrival, AgentError> {
    let mut here = Arrival::Maybe;
    loop {
        let info = qmp.query_migrate().await.map_err(failed)?;
        match info.status.as_deref() {
            Some("completed") => return Ok(Arrival::Yes),
            None | Some("none") => return Ok(Arrival::No),
            Some("failed" | "cancelled") => return Ok(here),
            Some("cancelling") => {}
            Some("setup" | "wait-unplug" | "active" | "pre-switchover") => {
                here = Arrival::No;
                qmp.migrate_cancel().await.map_err(failed)?;
            }
            _ => {
                here = Arrival::Maybe;
                qmp.migrate_cancel().await.map_err(failed)?;
            }
        }
        tokio::time::sleep(POLL).await;
    }
}
