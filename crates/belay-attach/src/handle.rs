//! How the control plane talks to a device's thread: commands in, notices out, no lock between.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use belay_block::Backend;
use belay_reactor::Waker;
use belay_wire::control::{Channel, Open};
use belay_wire::{DeviceIdentity, Epoch, Refusal};

use crate::conn::PeerSocket;
use crate::stats::Snapshot;

/// Where a device's guest and its backing are, as this host's thread is told when it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// The guest is here; requests go to a backend of this host.
    Local,
    /// The backend is here, the guest is at another host: its requests are executed here.
    Lent {
        /// The host with the attachment.
        to: String,
    },
    /// The guest may come here: learn the device from the host that has it, and claim it when the rings start.
    Successor {
        /// The host that has it now.
        from: String,
    },
    /// The guest is here; requests go to the host that has the backend.
    Remote {
        /// The host with the backing.
        backing: String,
    },
}

/// Times that govern a data connection.
#[derive(Clone, Copy, Debug)]
pub struct LinkTimes {
    /// A ping goes out when nothing was sent for so long.
    pub heartbeat: Duration,
    /// The connection is given up when nothing was heard for so long.
    pub dead_after: Duration,
}

impl Default for LinkTimes {
    fn default() -> Self {
        Self { heartbeat: Duration::from_millis(500), dead_after: Duration::from_secs(3) }
    }
}

/// What a device's thread needs to start.
pub struct DeviceConfig {
    /// What the device is.
    pub identity: DeviceIdentity,
    /// Its epoch, from the ledger.
    pub epoch: Epoch,
    /// Its role, from the ledger.
    pub role: Role,
    /// Times of its data connections.
    pub link: LinkTimes,
    /// How long the thread looks for work without sleeping after it had some. 0: it never spins.
    pub spin: Duration,
    /// Whether VMMs are offered CONFIGURE_MEM_SLOTS.
    pub memory_slots: bool,
}

/// How an exchange is done.
#[derive(Clone, Debug)]
pub struct ExchangeOptions {
    /// The file that remembers, across a crash, which blocks are here.
    pub map_path: PathBuf,
    /// The copier's limit in bytes per second; `None`: none.
    pub bandwidth: Option<u64>,
    /// Bytes that the copier asks for at a time.
    pub in_flight_bytes: u64,
    /// Whether guest writes also go to the old backing until cut-over.
    pub echo: bool,
}

/// What the control plane tells a device's thread.
pub enum Command {
    /// The backend of this host, opened and locked. Requests that waited for it go on.
    SetBackend(Box<dyn Backend>),
    /// Where VMMs connect.
    Listen(UnixListener),
    /// This host may take the device over. From now on its connections are accepted. If the backing is there
    /// already, the guest may go home to it.
    Offer {
        /// The host.
        to: String,
    },
    /// These requests were in flight in a device whose guest goes home when its rings stopped, before this process: an
    /// offer that follows sends them. Unless that is withdrawn, no ring of it runs here again.
    Remember(belay_wire::InflightList),
    /// The offer is withdrawn. Refused by [`Notice::WithdrawTooLate`] after the claim.
    Withdraw,
    /// The guest has left, and does not use this device: its rings do not run, nothing is in flight, so nobody will
    /// claim it. The host that it is offered to has it, as if it had ([`Notice::Claimed`]). Otherwise ignored.
    GiveAway,
    /// A peer's data connection whose OPEN has been read.
    Accept {
        /// The connection.
        socket: PeerSocket,
        /// The OPEN's payload.
        open: Open,
        /// The OPEN's epoch.
        epoch: Epoch,
    },
    /// A data connection that [`Notice::NeedConnection`] asked for.
    Connected {
        /// For which channel.
        channel: Channel,
        /// The connection; its hello is done, its OPEN is sent by the thread.
        socket: PeerSocket,
    },
    /// The grant of this epoch is in the ledger.
    GrantDurable {
        /// The epoch.
        epoch: Epoch,
    },
    /// The grant could not be written.
    GrantFailed {
        /// The epoch.
        epoch: Epoch,
        /// Why.
        reason: String,
    },
    /// The return of this epoch is in the ledger: the guest is here again.
    ReturnDurable {
        /// The epoch.
        epoch: Epoch,
    },
    /// The return could not be written.
    ReturnFailed {
        /// The epoch.
        epoch: Epoch,
        /// Why.
        reason: String,
    },
    /// Begin (or, with a map file that is there, go on with) an exchange to this backend.
    StartExchange {
        /// The new backend of this host.
        local: Box<dyn Backend>,
        /// How.
        options: ExchangeOptions,
    },
    /// Change the copier's limit, in bytes per second.
    SetBandwidth(Option<u64>),
    /// Give up the exchange and stay remote. Ignored once [`Notice::ReadyToCut`] was answered.
    CancelExchange,
    /// The old backing has committed: everything is local from now on.
    CutCommitted,
    /// The old backing could not be asked, or refused: go on as before.
    CutAborted,
    /// The device's backing has left this host: refuse everything, let the backend go.
    Retire,
    /// The backend shall grow to so many bytes. The guest does not know yet.
    Resize(u64),
    /// The device has so many bytes from now on, and the guest is told: its backend has them, and the ledger says so.
    SetSize(u64),
    /// Stop, leaving everything such that a restarted agent finds it.
    Shutdown,
}

/// What a device's thread tells the control plane.
#[derive(Clone, Debug)]
pub enum Notice {
    /// A VMM has connected, or its connection ended (with the reason).
    Vmm {
        /// Whether one is connected.
        connected: bool,
        /// Why it ended.
        reason: Option<String>,
    },
    /// Rings have started.
    RingsStarted,
    /// All rings have stopped with so many requests in flight.
    RingsStopped {
        /// Requests in flight.
        in_flight: u64,
    },
    /// The rings of a device whose guest goes home have stopped: this is the list that its backing's host is sent.
    Listed {
        /// What is in flight.
        list: belay_wire::InflightList,
    },
    /// The device needs a data connection to this peer for this channel.
    NeedConnection {
        /// The host.
        peer: String,
        /// What for.
        channel: Channel,
    },
    /// A peer's successor connection is ready: the list will go there.
    SuccessorReady {
        /// The host.
        peer: String,
    },
    /// As a successor: the source has accepted our connection.
    Prepared {
        /// The device's size at the source, in bytes.
        size_bytes: u64,
    },
    /// A successor claims the device: write the grant to the ledger, then answer `GrantDurable`.
    Claimed {
        /// The host.
        by: String,
        /// The epoch it will have.
        epoch: Epoch,
        /// Requests in flight that it takes over.
        in_flight: u64,
    },
    /// The grant was sent; this host serves the device's guest no more.
    Granted {
        /// The epoch.
        epoch: Epoch,
    },
    /// The guest of a device that is lent has come here: write its return to the ledger, then answer
    /// `ReturnDurable`.
    Returning {
        /// The host that it was lent to.
        from: String,
        /// The epoch it will have.
        epoch: Epoch,
    },
    /// The guest is here again.
    Returned {
        /// The epoch.
        epoch: Epoch,
        /// Requests that were in flight when it left the other host.
        in_flight: u64,
        /// From the first ring's start to the ledger's word.
        grant_ms: f64,
    },
    /// The device is in this later epoch, and not at this host: nothing is served here any more.
    Taken {
        /// The epoch.
        epoch: Epoch,
    },
    /// As a successor: the device is ours.
    Attached {
        /// The epoch.
        epoch: Epoch,
        /// Requests that were in flight at the switchover.
        in_flight: u64,
        /// From the claim to the grant.
        grant_ms: f64,
    },
    /// The handover failed on this side; nothing was claimed.
    HandoverFailed {
        /// Why.
        reason: String,
    },
    /// A withdrawal came after the claim: the handover goes on.
    WithdrawTooLate,
    /// The offer has been withdrawn.
    Withdrawn,
    /// The peer refused this connection for good.
    PeerRefused {
        /// The host.
        peer: String,
        /// Its code.
        refusal: Refusal,
        /// Its words.
        reason: String,
    },
    /// The data connection is up, or was lost.
    Link {
        /// The host.
        peer: String,
        /// Whether it is up.
        up: bool,
        /// Why it was lost.
        reason: Option<String>,
    },
    /// The exchange has everything here, flushed on both sides, and holds guest writes: commit it.
    ReadyToCut,
    /// The local side of the exchange failed; the copy is paused and the device stays remote.
    ExchangePaused {
        /// Why.
        reason: String,
        /// There was no room, or no quota, for more: it may go on when there is.
        full: bool,
    },
    /// The exchange was given up; the new backend is closed.
    ExchangeCancelled,
    /// The device is local now.
    ExchangeDone,
    /// The backend was let go.
    Retired,
    /// The backend has grown, or could not.
    Resized(Result<u64, String>),
    /// The thread has stopped; with the reason if it is a failure.
    Stopped(Option<String>),
}

/// A device's thread, as the control plane holds it. Clones talk to the same thread.
#[derive(Clone)]
pub struct DeviceHandle {
    pub(crate) commands: Sender<Command>,
    pub(crate) waker: Arc<Waker>,
    pub(crate) snapshot: Arc<std::sync::Mutex<Snapshot>>,
}

impl DeviceHandle {
    /// Starts the thread of a device. Its notices come through the receiver, until [`Notice::Stopped`].
    ///
    /// # Errors
    /// No io_uring, no thread, or no descriptors.
    pub fn spawn(config: DeviceConfig) -> std::io::Result<(Self, Receiver<Notice>)> {
        crate::thread::spawn(config)
    }

    /// Gives the thread a command. A thread that has stopped ignores it.
    pub fn send(&self, command: Command) {
        let _ = self.commands.send(command);
        self.waker.wake();
    }

    /// The device's state and counters, at most some 50 ms old.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}
