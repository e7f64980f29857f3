//! The devices of a VM that migrates leave together.
//!
//! The grant of a device is a write in the ledger. Were each disk of a VM granted by a write of its own, a fault
//! between two of them would leave the VM's disks on two hosts. So the claims are kept until every disk has been
//! claimed, and one write grants them all:
//!
//! ```text
//!          claims come in                  the last one: one write, then every grant
//!   Open ─────────────────▶ Open ────────────────────────────────────────────────────▶ over: the VM is there
//!     └──────────────────────┴──▶ Off: claims are refused; once all offers are withdrawn, over: the VM is here
//! ```
//! If other disks of the VM go home, whose return the destination's ledger decides, or if this agent was restarted and
//! has forgotten what was in flight, a departure is held: it is released when the VM has arrived and the destination
//! has everything that it needs for the other disks.
//!
//! A disk that its guest does not use is never claimed: the conductor gives it away (`Command::GiveAway`) when
//! the VM has arrived.

use std::sync::{Arc, PoisonError};

use belay_attach::Command;
use belay_wire::{DeviceId, Epoch};

use crate::agent::Agent;
use crate::claims::{Claims, TAKEN_BACK};
use crate::device::Managed;
use crate::error::AgentError;
use crate::ledger::RoleRecord;

/// A device that another host has asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    device: DeviceId,
    epoch: Epoch,
    in_flight: u64,
}

#[derive(Debug)]
struct State {
    claims: Claims<Claim>,
    /// While it is, nothing is granted, whatever is claimed.
    held: bool,
}

/// Devices of one VM that go to one host, all or none.
pub(crate) struct Departure {
    to: String,
    devices: Vec<DeviceId>,
    /// Disks of the VM that go home, whose lists of requests in flight are kept with the grants.
    home: std::sync::Mutex<Vec<Arc<Managed>>>,
    /// Held while the ledger is written: a withdrawal waits for the outcome.
    state: tokio::sync::Mutex<State>,
}

impl Departure {
    fn has(&self, device: DeviceId) -> bool {
        self.devices.contains(&device)
    }

    /// Whether it waits for [`Agent::release`].
    pub(crate) async fn is_held(&self) -> bool {
        matches!(*self.state.lock().await, State { claims: Claims::Open(_), held: true })
    }

    /// Whether every device has been granted.
    pub(crate) async fn is_committed(&self) -> bool {
        matches!(self.state.lock().await.claims, Claims::Committed)
    }
}

impl Agent {
    /// From now on these devices, all of them backed by this host, are granted to `to` together; if they are `held`,
    /// not before they are released.
    pub(crate) fn open_departure(&self, to: &str, devices: Vec<DeviceId>, held: bool) -> Arc<Departure> {
        let state = tokio::sync::Mutex::new(State { claims: Claims::default(), held });
        let departure = Departure { to: to.to_owned(), devices, home: std::sync::Mutex::default(), state };
        let departure = Arc::new(departure);
        let mut all = self.departures.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|present| !present.devices.iter().any(|device| departure.has(*device)));
        all.push(Arc::clone(&departure));
        departure
    }

    /// It is over: what is offered from now on is offered by itself.
    pub(crate) fn close_departure(&self, departure: &Arc<Departure>) {
        let mut all = self.departures.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|present| !Arc::ptr_eq(present, departure));
    }

    /// The departure that a device belongs to.
    pub(crate) fn departure_of(&self, device: DeviceId) -> Option<Arc<Departure>> {
        let all = self.departures.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().find(|departure| departure.has(device)).cloned()
    }

    /// From now on nothing is granted, and what has been claimed is refused. `false`: all of it has been granted.
    pub(crate) async fn call_off(&self, departure: &Departure) -> bool {
        let Some(claims) = departure.state.lock().await.claims.call_off() else { return false };
        for claim in claims {
            self.refuse(claim, TAKEN_BACK);
        }
        true
    }

    fn refuse(&self, claim: Claim, reason: &str) {
        if let Some(device) = self.device_by_id(claim.device) {
            device.send(Command::GrantFailed { epoch: claim.epoch, reason: reason.to_owned() });
        }
    }

    /// A device was claimed. The commit point of a handover is in here: the grant becomes durable.
    pub(crate) async fn grant(&self, device: &Managed, by: &str, epoch: Epoch, in_flight: u64) {
        let claim = Claim { device: device.identity().id, epoch, in_flight };
        let departure = self.departure_of(claim.device).filter(|departure| departure.to == by);
        let Some(departure) = departure else {
            if let Err(error) = self.grant_all(&[claim], &[], by).await {
                self.refuse(claim, &error.message);
            }
            return;
        };
        let mut state = departure.state.lock().await;
        let Claims::Open(claims) = &mut state.claims else {
            self.refuse(claim, TAKEN_BACK);
            return;
        };
        claims.retain(|present| present.device != claim.device);
        claims.push(claim);
        self.try_grant(&departure, &mut state).await;
    }

    /// From now on devices of a departure that was held are granted; with the grants it is written what is in flight in
    /// those that go `home`.
    pub(crate) async fn release(&self, departure: &Arc<Departure>, home: Vec<Arc<Managed>>) {
        *departure.home.lock().unwrap_or_else(PoisonError::into_inner) = home;
        let mut state = departure.state.lock().await;
        state.held = false;
        self.try_grant(departure, &mut state).await;
    }

    async fn try_grant(&self, departure: &Arc<Departure>, state: &mut State) {
        let State { claims: Claims::Open(claims), held: false } = state else { return };
        if claims.len() < departure.devices.len() {
            tracing::debug!(to = %departure.to, "claimed; the VM's other devices are not yet");
            return;
        }
        let claims = std::mem::take(claims);
        let home = departure.home.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let outcome = self.grant_all(&claims, &home, &departure.to).await;
        match state.claims.written(claims, outcome) {
            None => self.close_departure(departure),
            Some((claims, error)) => claims.into_iter().for_each(|claim| self.refuse(claim, &error.message)),
        }
    }

    /// Writes the grants of these claims with one write, then lets the devices go.
    async fn grant_all(&self, claims: &[Claim], home: &[Arc<Managed>], to: &str) -> Result<(), AgentError> {
        let moves: Vec<_> = claims.iter().map(|claim| (claim.device, claim.epoch)).collect();
        let lent = |role: &RoleRecord| match role {
            RoleRecord::Local { backend } => {
                Some(RoleRecord::Lent { backend: backend.clone(), to: to.to_owned() })
            }
            _ => None,
        };
        // The destination's word may come after the report is made.
        let count = |index: usize, device: &Managed| {
            device.figures.lock().unwrap_or_else(PoisonError::into_inner).requests_in_flight =
                claims[index].in_flight;
        };
        let devices =
            self.hand_over(&moves, home, lent, count, |epoch| Command::GrantDurable { epoch }).await?;
        for (device, claim) in devices.iter().zip(claims) {
            let message = format!("{to} claimed it with {} requests in flight", claim.in_flight);
            self.events.note("handover", Some(&device.name()), None, message);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, identity, memory};

    /// An agent with two devices, and the folder that it lives in.
    async fn agent() -> (tempfile::TempDir, Arc<Agent>, [Arc<Managed>; 2]) {
        let (folder, agent) = testing::agent();
        let mut devices = Vec::new();
        for name in ["disk0", "disk1"] {
            devices.push(agent.add_device(identity(name), memory()).await.unwrap());
        }
        let devices = devices.try_into().unwrap_or_else(|_| unreachable!());
        (folder, agent, devices)
    }

    fn lent(agent: &Agent) -> usize {
        let records = agent.ledger.devices().unwrap();
        records.iter().filter(|record| matches!(record.role, RoleRecord::Lent { .. })).count()
    }

    fn open(agent: &Agent, devices: &[Arc<Managed>]) -> Arc<Departure> {
        agent.open_departure("host-x", devices.iter().map(|device| device.identity().id).collect(), false)
    }

    #[tokio::test]
    async fn devices_that_leave_together_are_granted_when_the_last_one_is_claimed() {
        let (_folder, agent, devices) = agent().await;
        let departure = open(&agent, &devices);
        agent.grant(&devices[1], "host-x", Epoch(2), 3).await;
        agent.grant(&devices[1], "host-x", Epoch(2), 3).await;
        assert_eq!(lent(&agent), 0);
        assert!(!departure.is_committed().await);
        agent.grant(&devices[0], "host-x", Epoch(2), 0).await;
        assert_eq!(lent(&agent), 2);
        assert!(departure.is_committed().await);
        assert!(!agent.call_off(&departure).await, "it was too late");
        assert!(agent.departure_of(devices[0].identity().id).is_none());
    }

    #[tokio::test]
    async fn devices_that_are_held_are_granted_when_they_are_released() {
        let (_folder, agent, devices) = agent().await;
        let ids = devices.iter().map(|device| device.identity().id).collect();
        let departure = agent.open_departure("host-x", ids, true);
        agent.grant(&devices[0], "host-x", Epoch(2), 0).await;
        agent.grant(&devices[1], "host-x", Epoch(2), 0).await;
        assert!(lent(&agent) == 0 && departure.is_held().await);
        agent.release(&departure, Vec::new()).await;
        assert_eq!(lent(&agent), 2);
        assert!(departure.is_committed().await);
    }

    /// Both agents may die right behind the grant; then only this write knows what was in flight in the other disk.
    #[tokio::test]
    async fn grant_keeps_what_is_in_flight_in_the_disks_that_go_home() {
        use belay_attach::Notice;
        use belay_wire::{InflightList, QueueBase, QueueIndex};

        let (_folder, agent, devices) = agent().await;
        let role = RoleRecord::Remote {
            backing: "host-x".into(),
            delay_us: None,
            direct: false,
            follow: false,
            replaces: None,
        };
        let mut record = testing::record("home", Epoch(2), role);
        record.offered =
            Some(crate::ledger::OfferRecord { to: "host-x".into(), mode: crate::ledger::Mode::Stay });
        agent.ledger.put_device(&record).unwrap();
        let home = agent.start_device(record).await.unwrap();
        let list =
            InflightList { queues: vec![QueueBase { queue: QueueIndex(0), base: 7 }], requests: Vec::new() };
        home.set_listed(Some(list.clone()));
        let ids = devices.iter().map(|device| device.identity().id).collect();
        let departure = agent.open_departure("host-x", ids, true);
        agent.grant(&devices[0], "host-x", Epoch(2), 0).await;
        agent.release(&departure, vec![Arc::clone(&home)]).await;
        agent.grant(&devices[1], "host-x", Epoch(2), 0).await;
        assert!(departure.is_committed().await);
        let kept = |agent: &Agent| {
            let records = agent.ledger.devices().unwrap();
            records.into_iter().find(|record| record.identity.name == "home").unwrap().listed
        };
        assert_eq!(kept(&agent), Some(list.encode()));
        // The next agent's thread is told.
        let record = home.record();
        agent.stop_device(&home).await;
        let home = agent.start_device(record).await.unwrap();
        let listed = |notice: &Notice| matches!(notice, Notice::Listed { .. }).then_some(());
        home.wait_for(0, "the list", std::time::Duration::from_secs(10), listed).await.unwrap();
        assert_eq!(home.listed(), Some(list));
        // A ring that runs makes it old.
        agent.forget_listed(&home).await;
        assert_eq!((kept(&agent), home.listed()), (None, None));
        home.heard(&Notice::Listed { list: InflightList::default() });
    }

    #[tokio::test]
    async fn nothing_is_granted_after_a_departure_was_called_off() {
        let (_folder, agent, devices) = agent().await;
        let departure = open(&agent, &devices);
        agent.grant(&devices[0], "host-x", Epoch(2), 0).await;
        assert!(agent.call_off(&departure).await);
        agent.grant(&devices[1], "host-x", Epoch(2), 0).await;
        agent.grant(&devices[0], "host-x", Epoch(2), 0).await;
        assert_eq!(lent(&agent), 0);
        // The next attempt is another one.
        agent.close_departure(&departure);
        open(&agent, &devices);
        agent.grant(&devices[0], "host-x", Epoch(2), 0).await;
        agent.grant(&devices[1], "host-x", Epoch(2), 0).await;
        assert_eq!(lent(&agent), 2);
    }

    #[tokio::test]
    async fn device_that_cannot_be_granted_keeps_the_others_here() {
        let (_folder, agent, devices) = agent().await;
        let departure = open(&agent, &devices);
        agent.grant(&devices[0], "host-x", Epoch(2), 0).await;
        // It is in this epoch already.
        agent.grant(&devices[1], "host-x", Epoch(1), 0).await;
        assert_eq!(lent(&agent), 0);
        assert!(!departure.is_committed().await);
        assert!(agent.call_off(&departure).await);
    }

    #[tokio::test]
    async fn device_of_no_departure_is_granted_by_itself() {
        let (_folder, agent, devices) = agent().await;
        agent.grant(&devices[0], "host-x", Epoch(2), 0).await;
        assert_eq!(lent(&agent), 1);
    }
}
