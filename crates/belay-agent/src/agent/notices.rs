//! What devices tell of, and what the agent does about it.

use std::path::PathBuf;
use std::sync::Arc;

use belay_attach::Notice;
use belay_wire::Epoch;

use super::Agent;
use crate::device::{HandoverFigures, Managed};
use crate::ledger::{Mode, RoleRecord};
use crate::metrics::Counts;

impl Agent {
    /// Handles a thread's notices for as long as it lives.
    pub(super) fn listen_to(
        self: &Arc<Self>,
        device: &Arc<Managed>,
        notices: std::sync::mpsc::Receiver<Notice>,
    ) {
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
            Notice::ExchangePaused { reason, full: true } => {
                let what = "stopped, the device stays remote, and is copied when there is room";
                note("exchange", format!("{what}: {reason}"));
                device.set_exchange_waits(Some(reason.clone()));
                let path = self.back_to_remote(device, true).await;
                self.follow_when_there_is_room(device, path);
            }
            Notice::ExchangePaused { reason, full: false } => {
                note("exchange", format!("stopped, the device stays remote: {reason}"));
                device.set_copy_stopped(Some(reason.clone()));
                self.back_to_remote(device, false).await;
            }
            Notice::ExchangeCancelled => {
                note("exchange", "cancelled, the device stays remote".to_owned());
                device.forget_full();
                self.back_to_remote(device, false).await;
            }
            Notice::ExchangeDone => {
                device.forget_full();
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

    /// Where it was copied to, if it was.
    async fn back_to_remote(&self, device: &Managed, follow: bool) -> Option<PathBuf> {
        // An exchange that is begun right now would lose its new file to this.
        let _beginning = device.beginning.lock().await;
        // Not from a cut: the other host may have committed, and then the only copy is here.
        if let RoleRecord::Exchanging { backing, backend } = device.role() {
            let role = RoleRecord::Remote {
                backing,
                delay_us: backend.delay_us,
                direct: backend.direct,
                follow,
                replaces: backend.path.clone(),
            };
            let remove = async || {
                if let Some(path) = &backend.path {
                    let _ = tokio::fs::remove_file(path).await;
                }
            };
            if follow {
                // First of all: the ledger may need the room. Without its file a copy begins anew in any case.
                remove().await;
            }
            let bandwidth = device.record().bandwidth.filter(|_| follow);
            match self.record_with(device, device.epoch(), role, bandwidth).await {
                Ok(()) => remove().await,
                // The record says that it is being copied; after a restart it is.
                Err(error) => self.events.note("exchange", Some(&device.name()), None, error.message),
            }
            return backend.path;
        }
        None
    }
}
