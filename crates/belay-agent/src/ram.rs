//! The way of a VM's memory: QEMU ─ socket pair ─ agent ═ mutual TLS ═ agent ─ socket pair ─ QEMU.
//!
//! QEMU so needs no port, no key and no trust in the network. `docs/decisions/0010-memory-over-the-agents-link.md`
//! says why, and what it costs.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use belay_link::{DialError, MemoryCall, MemoryStream, dial_memory};
use belay_vmm::Qmp;

use crate::agent::Agent;
use crate::error::AgentError;

/// The descriptor's name in QEMU.
const NAME: &str = "belay-memory";
/// What QEMU calls it.
pub(crate) const URI: &str = "fd:belay-memory";
/// How long a connection for it may take.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// The ends of VMs that wait for their memory, by VM, with the host it may come from.
#[derive(Debug, Default)]
pub(crate) struct Expected(Mutex<HashMap<String, (String, OwnedFd)>>);

impl Expected {
    fn all(&self) -> std::sync::MutexGuard<'_, HashMap<String, (String, OwnedFd)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A VM does not wait any more.
    pub(crate) fn forget(&self, vm: &str) {
        self.all().remove(vm);
    }

    fn take(&self, vm: &str, peer: &str) -> Option<OwnedFd> {
        let mut all = self.all();
        if all.get(vm)?.0 != peer {
            return None;
        }
        all.remove(vm).map(|(_, end)| end)
    }
}

impl Agent {
    /// As a destination: gives QEMU the end from which to take the memory, and waits for the peer to bring it.
    pub(crate) async fn expect_memory(&self, qmp: &Qmp, vm: &str, peer: &str) -> Result<(), AgentError> {
        let failed = |error: &dyn std::fmt::Display| AgentError::failed(format!("VM {vm}: {error}"));
        let (ours, theirs) = UnixStream::pair().map_err(|error| failed(&error))?;
        qmp.give_descriptor(NAME, theirs.into()).await.map_err(|error| failed(&error))?;
        self.expected_memory.all().insert(vm.to_owned(), (peer.to_owned(), ours.into()));
        qmp.migrate_incoming(URI).await.map_err(|error| {
            self.expected_memory.forget(vm);
            failed(&error)
        })
    }

    /// A peer brings a VM's memory.
    pub(crate) async fn take_memory(self: Arc<Self>, call: MemoryCall) {
        let (peer, vm) = (call.peer.to_string(), call.vm.clone());
        let Some(end) = self.expected_memory.take(&vm, &peer) else {
            tracing::warn!(%peer, %vm, "a peer brings the memory of a VM that does not wait for it");
            let _ = call.refuse("no VM of this name waits here for memory from your host").await;
            return;
        };
        match call.accept().await {
            Ok(stream) => carry(stream, end, vm, peer).await,
            Err(error) => tracing::warn!(%peer, %vm, %error, "the connection for a VM's memory was lost"),
        }
    }

    /// As a source: opens the way to a host where the VM waits for its memory, and lets QEMU migrate over it.
    pub(crate) async fn send_memory(&self, qmp: &Qmp, vm: &str, to: &str) -> Result<(), AgentError> {
        let failed = |error: &dyn std::fmt::Display| AgentError::failed(format!("VM {vm}: {error}"));
        let (host, identity, addresses) = self.way_to(to)?;
        let stream =
            dial_memory(&addresses, &host, &identity, vm, DIAL_TIMEOUT).await.map_err(
                |error| match error {
                    DialError::Unreachable { .. } => AgentError::unreachable(error.to_string()),
                    error => failed(&error),
                },
            )?;
        let (ours, theirs) = UnixStream::pair().map_err(|error| failed(&error))?;
        qmp.give_descriptor(NAME, theirs.into()).await.map_err(|error| failed(&error))?;
        tokio::spawn(carry(stream, ours.into(), vm.to_owned(), to.to_owned()));
        qmp.migrate(URI).await.map_err(|error| failed(&error))
    }
}

async fn carry(stream: MemoryStream, end: OwnedFd, vm: String, peer: String) {
    match stream.carry(end).await {
        Ok((sent, received)) => tracing::debug!(%vm, %peer, sent, received, "a VM's memory was carried"),
        // QEMU is told by the end of its socket, and tells what becomes of the migration.
        Err(error) => tracing::warn!(%vm, %peer, %error, "the way of a VM's memory was lost"),
    }
}
