//! Offers: another host may take a device over, whoever migrates the VM.
//!
//! ```text
//!   offer ─▶ the destination prepares, connects, and serves a socket there ─▶ the VMM migrates the VM: handover
//!     └───── withdraw: nothing has changed
//! ```
//! An offer is in the ledger before the destination hears of it, so that a restart of this agent in the middle of a
//! migration, which it may know nothing of, does not end it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use belay_attach::{Command, Notice};
use belay_link::CallError;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::agent::Agent;
use crate::device::Managed;
use crate::error::AgentError;
use crate::ledger::{DeviceRecord, Mode, OfferRecord, RoleRecord};
use crate::peer::{DeviceList, Done, Prepare, Prepared};

/// How long it may take to connect to the destination.
const REACH_WITHIN: Duration = Duration::from_secs(5);
/// How long the destination may take to prepare: it opens files and connects back.
const PREPARE_WITHIN: Duration = Duration::from_secs(30);
/// How long its connection may take to be seen here, once it says that it is connected.
const READY_WITHIN: Duration = Duration::from_secs(15);
/// How long a short call may take.
const CALL_WITHIN: Duration = Duration::from_secs(10);
/// Pieces of memory that a VMM tells of without CONFIGURE_MEM_SLOTS: the most of SET_MEM_TABLE (QEMU's vhost-user
/// specification).
const MOST_PIECES_AT_ONCE: u64 = 8;
/// How often it is looked whether the other host has connected.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// An offer, as callers see it.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct OfferView {
    /// The device.
    pub device: String,
    /// The host that may take it.
    pub to: String,
    /// `follow` or `stay`.
    pub mode: String,
    /// Where the VMM at that host connects.
    pub socket: String,
    /// Only checked.
    pub dry_run: bool,
}

/// The outcome of a withdrawal.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct WithdrawView {
    /// The device.
    pub device: String,
    /// The host that it was offered to; none: it was not offered.
    pub was_offered_to: Option<String>,
    /// Why that host could not be told; it learns it when it asks for the device.
    pub not_told: Option<String>,
}

/// Whether the VMM of a guest with so many pieces of memory can tell the agent there of all of them.
fn takes_memory(name: &str, pieces: u64, to: &str, there: &Prepared) -> Result<(), AgentError> {
    if pieces <= MOST_PIECES_AT_ONCE || there.memory_slots {
        return Ok(());
    }
    let message = format!(
        "device {name} is used by a VM with {pieces} pieces of memory, and host {to} takes {MOST_PIECES_AT_ONCE}: it \
         does not offer memory slots"
    );
    Err(AgentError::precheck(message)
        .hint("set `memory_slots = true` below `[data_plane]` there, and restart its agent"))
}

impl Mode {
    /// As in the API.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Follow => "follow",
            Self::Stay => "stay",
        }
    }
}

impl Agent {
    /// Calls a method of another host's agent.
    pub(crate) async fn call_host<Q: Serialize + Sync, A: DeserializeOwned>(
        &self,
        host: &str,
        within: Duration,
        method: &str,
        request: &Q,
    ) -> Result<A, AgentError> {
        self.client(host)?.call_within(within, method, request).await.map_err(|error| match error {
            CallError::Refused { error, .. } => {
                AgentError { code: error.code, message: error.message, hint: None }
            }
            other => AgentError::unreachable(other.to_string()),
        })
    }

    /// Offers a device to a host: when this returns, a VMM there may connect to the socket it names. The same offer
    /// again changes nothing and says the same.
    ///
    /// # Errors
    /// The device is not here, is offered to another host, or the host cannot take it.
    pub async fn offer_device(
        self: &Arc<Self>,
        device: &Managed,
        to: &str,
        mode: Mode,
        dry_run: bool,
    ) -> Result<OfferView, AgentError> {
        let _moving = device.moving.lock().await;
        let name = device.name();
        let offer = OfferRecord { to: to.to_owned(), mode };
        let again = self.may_offer(device, &offer)?;
        // Nobody who sits in front of this wants to wait as long as a preparation may take.
        let reached = self.client(to)?.reach(REACH_WITHIN).await;
        reached.map_err(|error| AgentError::unreachable(format!("device {name}: {error}")))?;
        let mut request = self.preparation(device, mode)?;
        request.again = again;
        request.dry_run = dry_run;
        if dry_run {
            let there: Prepared = self.call_host(to, CALL_WITHIN, "prepare", &request).await?;
            takes_memory(&name, device.snapshot().memory_pieces, to, &there)?;
            return Ok(offer_view(name, &offer, there, true));
        }
        if !again {
            self.record_offer(device, Some(offer.clone())).await?;
        }
        match self.prepare_there(device, &offer, &request).await {
            Ok(there) => {
                if !again {
                    let message = format!("offered to {to}, mode {}", mode.name());
                    self.events.note("handover", Some(&name), None, message);
                }
                Ok(offer_view(name, &offer, there, false))
            }
            Err(error) => {
                if !again {
                    self.withdraw_here(device).await?;
                    let list = DeviceList { devices: vec![device.identity().id] };
                    let _: Result<Done, AgentError> =
                        self.call_host(to, CALL_WITHIN, "withdraw", &list).await;
                }
                Err(error)
            }
        }
    }

    /// Whether this device may be offered like this; `true` if it is already.
    fn may_offer(&self, device: &Managed, offer: &OfferRecord) -> Result<bool, AgentError> {
        let name = device.name();
        if offer.to == self.host() {
            return Err(AgentError::precheck(format!("device {name} is at host {} already", offer.to)));
        }
        device.usable()?;
        let record = device.record();
        match record.role {
            RoleRecord::Local { .. } => {}
            // Its guest goes home.
            RoleRecord::Remote { backing, .. } | RoleRecord::Exchanging { backing, .. }
                if backing == offer.to => {}
            RoleRecord::Lent { to, .. } | RoleRecord::Tombstone { moved_to: to, .. } => {
                return Err(AgentError::fenced(format!("device {name} belongs to {to} already"))
                    .hint(format!("offer it there: its guest is at {to}")));
            }
            RoleRecord::Prepared { from, .. } => {
                return Err(AgentError::precheck(format!("device {name} is still at {from}"))
                    .hint(format!("it can be offered here as soon as {from} has given it away")));
            }
            RoleRecord::Remote { backing, .. } => {
                return Err(AgentError::precheck(format!("device {name} is backed by {backing}"))
                    .hint(format!("bring it here first: `belay exchange {name} --wait`")));
            }
            RoleRecord::Exchanging { backing, .. } | RoleRecord::Cutting { backing, .. } => {
                return Err(AgentError::precheck(format!("device {name} is being copied from {backing}"))
                    .hint("wait until `belay status` shows it local"));
            }
        }
        match record.offered {
            Some(present) if present == *offer => Ok(true),
            Some(present) => Err(AgentError::precheck(format!(
                "device {name} is offered to {} already, mode {}",
                present.to,
                present.mode.name()
            ))
            .hint(format!("take that back first: `belay device withdraw {name}`"))),
            None => Ok(false),
        }
    }

    fn preparation(&self, device: &Managed, mode: Mode) -> Result<Prepare, AgentError> {
        let (needed_bytes, delay_us, direct, mode) = match device.role() {
            RoleRecord::Local { backend } => {
                (self.info_of(device)?.allocated_bytes, backend.delay_us, backend.direct, mode)
            }
            // Its guest goes home, where its backing is: nothing follows it.
            RoleRecord::Remote { .. } | RoleRecord::Exchanging { .. } => (0, None, false, Mode::Stay),
            _ => return Err(AgentError::precheck(format!("device {} is not local", device.name()))),
        };
        let (identity, epoch) = (device.identity(), device.epoch());
        Ok(Prepare { identity, epoch, mode, needed_bytes, delay_us, direct, again: false, dry_run: false })
    }

    async fn prepare_there(
        &self,
        device: &Managed,
        offer: &OfferRecord,
        request: &Prepare,
    ) -> Result<Prepared, AgentError> {
        let mark = device.mark();
        // Before the destination hears of it: it connects at once.
        device.send(Command::Offer { to: offer.to.clone() });
        let there: Prepared = self.call_host(&offer.to, PREPARE_WITHIN, "prepare", request).await?;
        takes_memory(&device.name(), device.snapshot().memory_pieces, &offer.to, &there)?;
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let kept = there.kept && device.snapshot().successor_ready;
            let heard = device
                .wait_for(mark, "the other host's connection", LOOK_EVERY, |notice| match notice {
                    Notice::SuccessorReady { .. } => Some(Ok(())),
                    Notice::HandoverFailed { reason } => Some(Err(reason.clone())),
                    _ => None,
                })
                .await;
            match heard {
                Ok(Err(reason)) => {
                    let name = device.name();
                    return Err(AgentError::precheck(format!("device {name} cannot move now: {reason}")));
                }
                Ok(Ok(())) => return Ok(there),
                Err(_) if kept => return Ok(there),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => {}
            }
        }
    }

    /// Takes an offer back, here and at the host that it was made to. Without an offer nothing is done.
    ///
    /// # Errors
    /// Too late: the device belongs to the other host, or is about to.
    pub async fn withdraw_device(&self, device: &Managed) -> Result<WithdrawView, AgentError> {
        let _moving = device.moving.lock().await;
        let name = device.name();
        match device.role() {
            RoleRecord::Local { .. } | RoleRecord::Remote { .. } | RoleRecord::Exchanging { .. } => {}
            RoleRecord::Lent { to, .. } | RoleRecord::Tombstone { moved_to: to, .. } => {
                return Err(AgentError::fenced(format!(
                    "too late: device {name} belongs to {to}, its guest is there"
                )));
            }
            RoleRecord::Prepared { from, .. } => {
                return Err(AgentError::usage(format!("device {name} was offered by {from}, not here"))
                    .hint(format!("withdraw it at {from}")));
            }
            // It came here: there is no offer of this host.
            _ => return Ok(WithdrawView { device: name, was_offered_to: None, not_told: None }),
        }
        let Some(offer) = device.record().offered else {
            return Ok(WithdrawView { device: name, was_offered_to: None, not_told: None });
        };
        if self.departure_of(device.identity().id).is_some() {
            return Err(AgentError::precheck(format!(
                "device {name} is migrating with its VM to {}",
                offer.to
            ))
            .hint("end `belay migrate` with Ctrl-C: that takes the whole VM back"));
        }
        self.withdraw_here(device).await?;
        self.events.note("handover", Some(&name), None, format!("the offer to {} is withdrawn", offer.to));
        let list = DeviceList { devices: vec![device.identity().id] };
        let told: Result<Done, AgentError> = self.call_host(&offer.to, CALL_WITHIN, "withdraw", &list).await;
        Ok(WithdrawView {
            device: name,
            was_offered_to: Some(offer.to),
            not_told: told.err().map(|error| error.message),
        })
    }

    /// Takes an offer back at this host only. The caller has [`Managed::moving`], or is the only one.
    pub(crate) async fn withdraw_here(&self, device: &Managed) -> Result<(), AgentError> {
        let mark = device.mark();
        device.send(Command::Withdraw);
        let withdrawn = device
            .wait_for(mark, "the offer being taken back", CALL_WITHIN, |notice| match notice {
                Notice::Withdrawn => Some(true),
                Notice::WithdrawTooLate => Some(false),
                _ => None,
            })
            .await?;
        if !withdrawn {
            let to = device.record().offered.map_or_else(|| "another host".to_owned(), |offer| offer.to);
            return Err(AgentError::fenced(format!(
                "too late: {to} has asked for device {} already",
                device.name()
            )));
        }
        self.record_offer(device, None).await
    }

    async fn record_offer(&self, device: &Managed, offered: Option<OfferRecord>) -> Result<(), AgentError> {
        let _writing = device.writing.lock().await;
        let record = device.record();
        // An offer is of a device whose guest is here, and ends with the change of its role.
        let here = record.role.is_guest_here();
        if !here {
            return Ok(());
        }
        let record = DeviceRecord { offered, listed: None, ..record };
        self.write_record(record.clone()).await?;
        device.set_record(record);
        Ok(())
    }
}

fn offer_view(device: String, offer: &OfferRecord, there: Prepared, dry_run: bool) -> OfferView {
    OfferView {
        device,
        to: offer.to.clone(),
        mode: offer.mode.name().to_owned(),
        socket: there.socket,
        dry_run,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It was found out when the VM had stopped: QEMU could not start its disk there.
    #[test]
    fn host_without_memory_slots_is_refused_a_vm_that_needs_them() {
        let with = Prepared { memory_slots: true, ..Prepared::default() };
        let older: Prepared = serde_json::from_str(r#"{"socket": "/x.sock", "kept": false}"#).unwrap();
        assert!(takes_memory("disk0", 8, "host-b", &older).is_ok());
        assert!(takes_memory("disk0", 9, "host-b", &with).is_ok());
        let error = takes_memory("disk0", 9, "host-b", &older).unwrap_err();
        assert_eq!(error.code, "precheck");
        assert!(error.message.contains("disk0") && error.message.contains("host-b"), "{error}");
        assert!(error.hint.unwrap().contains("memory_slots = true"));
    }
}
