//! Two hosts in miniature: devices' threads, real connections between them, and a control plane that says yes.
#![allow(
    unsafe_code,
    dead_code,
    unreachable_pub,
    reason = "a guest's memory; every test file uses its own part"
)]

pub use belay_synthetic as guest;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use belay_attach::{
    BACKEND_OWNER, Command, DeviceConfig, DeviceHandle, LinkTimes, Notice, PeerSocket, Role, Snapshot,
    read_open,
};
use belay_block::BackendSpec;
use belay_link::{HostName, Identity, Incoming, Listener, ListenerOptions, dial_data};
use belay_wire::device::{BlockGeometry, DeviceClass};
use belay_wire::{DeviceId, DeviceIdentity, Epoch};
use tokio::runtime::Runtime;

const PATIENCE: Duration = Duration::from_secs(30);

pub fn identity(queues: u16, size_bytes: u64) -> DeviceIdentity {
    DeviceIdentity {
        id: DeviceId::random(),
        name: "disk0".to_owned(),
        vm: None,
        class: DeviceClass::Block(BlockGeometry {
            size_bytes,
            block_bytes: 512,
            queues,
            queue_entries: 256,
            read_only: false,
            serial: "belay-test".to_owned(),
        }),
    }
}

/// A network with certificates: one host name, reached at its listener. The tests are about what comes behind.
pub struct Net {
    pub runtime: Runtime,
    identity: Arc<Identity>,
    folder: tempfile::TempDir,
}

impl Net {
    pub fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let name = HostName::new("peer").unwrap();
        let identity = Arc::new(belay_link::init(&folder.path().join("pki"), &name).unwrap());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        Self { runtime, identity, folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn image(&self, name: &str, size_bytes: u64) -> BackendSpec {
        let path = self.path(name);
        std::fs::File::create(&path).unwrap().set_len(size_bytes).unwrap();
        BackendSpec::file(path)
    }
}

/// A device's thread with a control plane around it.
pub struct Host {
    pub handle: DeviceHandle,
    notices: Receiver<Notice>,
    seen: Vec<String>,
    address: SocketAddr,
    peer_address: Arc<Mutex<Option<SocketAddr>>>,
    identity: Arc<Identity>,
    runtime: tokio::runtime::Handle,
    pub auto_grant: bool,
    /// The last list that was sent to the host of the backing.
    pub listed: Option<belay_wire::InflightList>,
}

impl Host {
    pub fn new(net: &Net, identity: &DeviceIdentity, epoch: u64, role: Role) -> Self {
        let config = DeviceConfig {
            identity: identity.clone(),
            epoch: Epoch(epoch),
            role,
            link: LinkTimes::default(),
            spin: Duration::from_micros(20),
            memory_slots: false,
        };
        let (handle, notices) = DeviceHandle::spawn(config).unwrap();
        let listener = net.runtime.block_on(Listener::bind(
            "127.0.0.1:0".parse().unwrap(),
            Arc::clone(&net.identity),
            ListenerOptions::default(),
        ));
        let mut listener = listener.unwrap();
        let address = listener.local_address();
        let accepting = handle.clone();
        net.runtime.spawn(async move {
            while let Some(incoming) = listener.next().await {
                let Incoming::Data(data) = incoming else { continue };
                let accepting = accepting.clone();
                tokio::task::spawn_blocking(move || {
                    let socket = PeerSocket {
                        peer: data.peer.to_string(),
                        socket: data.socket,
                        tls: data.tls,
                        early: data.early,
                    };
                    if let Ok((socket, open, epoch)) = read_open(socket, PATIENCE) {
                        accepting.send(Command::Accept { socket, open, epoch });
                    }
                });
            }
        });
        Self {
            handle,
            notices,
            seen: Vec::new(),
            address,
            peer_address: Arc::default(),
            identity: Arc::clone(&net.identity),
            runtime: net.runtime.handle().clone(),
            auto_grant: true,
            listed: None,
        }
    }

    /// A host with a disk and its guest's socket.
    pub fn local(net: &Net, identity: &DeviceIdentity, disk: &BackendSpec, socket: &Path) -> Self {
        let host = Self::new(net, identity, 1, Role::Local);
        host.backend(disk);
        host.listen(socket);
        host
    }

    /// A host that the guest of `from` may come to, once it is offered.
    pub fn successor(net: &Net, identity: &DeviceIdentity, epoch: u64, from: &Self) -> Self {
        let host = Self::new(net, identity, epoch, Role::Successor { from: "peer".into() });
        host.peer(from);
        host
    }

    /// Opens the backend; waits for the lock of a process that died, as the agent does.
    pub fn backend(&self, spec: &BackendSpec) {
        let deadline = Instant::now() + PATIENCE;
        let backend = loop {
            match spec.build(BACKEND_OWNER) {
                Err(belay_block::OpenError::Locked { .. }) if Instant::now() < deadline => {
                    std::thread::yield_now();
                }
                opened => break opened.unwrap(),
            }
        };
        self.handle.send(Command::SetBackend(backend));
    }

    pub fn listen(&self, path: &Path) {
        let _ = std::fs::remove_file(path);
        self.handle.send(Command::Listen(std::os::unix::net::UnixListener::bind(path).unwrap()));
    }

    pub fn peer(&self, other: &Self) {
        *self.peer_address.lock().unwrap() = Some(other.address);
    }

    fn dial(&self, channel: belay_wire::control::Channel) {
        let (identity, peer, handle) =
            (Arc::clone(&self.identity), Arc::clone(&self.peer_address), self.handle.clone());
        self.runtime.spawn(async move {
            loop {
                let address = *peer.lock().unwrap();
                if let Some(address) = address {
                    let name = HostName::new("peer").unwrap();
                    let dialled =
                        dial_data(&[address.to_string()], &name, &identity, Duration::from_secs(5)).await;
                    if let Ok(data) = dialled {
                        let socket = PeerSocket {
                            peer: data.peer.to_string(),
                            socket: data.socket,
                            tls: data.tls,
                            early: data.early,
                        };
                        handle.send(Command::Connected { channel, socket });
                        return;
                    }
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
    }

    fn answer(&mut self, notice: Notice) -> String {
        let text = format!("{notice:?}");
        match notice {
            Notice::NeedConnection { channel, .. } => self.dial(channel),
            Notice::Claimed { epoch, .. } if self.auto_grant => {
                self.handle.send(Command::GrantDurable { epoch })
            }
            Notice::Listed { list } => self.listed = Some(list),
            Notice::Returning { epoch, .. } if self.auto_grant => {
                self.handle.send(Command::ReturnDurable { epoch })
            }
            _ => {}
        }
        self.seen.push(text.clone());
        text
    }

    /// Handles what the thread has said, without waiting.
    pub fn pump(&mut self) {
        while let Ok(notice) = self.notices.try_recv() {
            self.answer(notice);
        }
    }

    pub fn forget(&mut self) {
        self.pump();
        self.seen.clear();
    }

    /// Ends the thread as a killed process would: nothing that is under way is finished or told.
    pub fn kill(&mut self) {
        self.handle.send(Command::Shutdown);
        let deadline = Instant::now() + PATIENCE;
        while !self.has_seen("Stopped") {
            self.pump();
            assert!(Instant::now() < deadline, "the thread does not end; it said {:?}", self.seen);
            std::thread::yield_now();
        }
    }

    /// Loses the connection of the guest's channel, with whatever is on its way, and makes another one.
    pub fn cut_link(&self) {
        self.dial(belay_wire::control::Channel::Guest);
    }

    pub fn has_seen(&self, what: &str) -> bool {
        self.seen.iter().any(|seen| seen.starts_with(what))
    }

    pub fn snapshot(&self) -> Snapshot {
        self.handle.snapshot()
    }
}

/// Handles both hosts' notices until one has said `what`.
pub fn wait_for(host: &mut Host, other: &mut Host, what: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        other.pump();
        if host.has_seen(what) {
            return;
        }
        match host.notices.recv_timeout(Duration::from_millis(1)) {
            Ok(notice) => {
                host.answer(notice);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => panic!("the thread is gone; it said {:?}", host.seen),
        }
        assert!(Instant::now() < deadline, "no {what}; seen {:?} and {:?}", host.seen, other.seen);
    }
}

/// Offers a device to a host, and waits until that is prepared.
pub fn offer(from: &mut Host, to: &mut Host) {
    from.handle.send(Command::Offer { to: "peer".into() });
    wait_for(to, from, "Prepared");
}

/// Bytes, and blocks of 4096 bytes, of the disk of [`start`].
pub const SIZE: u64 = 8 << 20;
pub const BLOCKS: u64 = SIZE / 4096;

/// A guest at a host with a disk of so many microseconds' delay; the disk's file is `a.img`, the socket `vmm-0.sock`.
pub fn start(net: &Net, queues: u16, delay_us: u64, seed: u64) -> (DeviceIdentity, Host, guest::Guest) {
    let id = identity(queues, SIZE);
    let mut disk = net.image("a.img", SIZE);
    disk.delay_us = (delay_us > 0).then_some(delay_us);
    let socket = net.path("vmm-0.sock");
    let host = Host::local(net, &id, &disk, &socket);
    let mut guest = guest::Guest::new(usize::from(queues), BLOCKS, seed);
    guest.plug_in(&socket);
    (id, host, guest)
}

/// Waits until something is so.
pub fn until(mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "waited in vain");
        std::thread::yield_now();
    }
}
