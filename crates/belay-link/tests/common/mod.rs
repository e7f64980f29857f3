//! A cluster of agents in one process, over 127.0.0.1.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its own part")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use belay_link::{
    ControlClient, ControlClientOptions, ControlHandler, DataConnection, Heartbeat, HostName, Identity,
    Incoming, KnownHost, Listener, ListenerOptions, MemoryCall, RpcError, serve_control,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

/// Far longer than anything here takes; only so that a defect ends a test.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

pub fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// A host that made a cluster of its own.
pub struct Cluster {
    pub directory: TempDir,
    pub identity: Arc<Identity>,
}

impl Cluster {
    pub fn new(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let identity = Arc::new(belay_link::init(directory.path(), &host(name)).unwrap());
        Self { directory, identity }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// What an agent answers to calls.
pub struct Echo {
    /// Told when a call that never ends has begun.
    pub hanging: mpsc::UnboundedSender<()>,
}

impl ControlHandler for Echo {
    async fn handle(&self, peer: &HostName, method: &str, body: Value) -> Result<Value, RpcError> {
        match method {
            "echo" => Ok(body),
            "who" => Ok(json!(peer)),
            "double" => Ok(json!(RpcError::parse::<u64>(body)? * 2)),
            "large" => Ok(json!("x".repeat(2 << 20))),
            "panic" => panic!("as the test wants"),
            "hang" => {
                let _ = self.hanging.send(());
                std::future::pending().await
            }
            _ => Err(RpcError::unknown_method(method)),
        }
    }
}

/// An agent that serves until it is dropped.
pub struct Agent {
    pub address: SocketAddr,
    pub data: mpsc::UnboundedReceiver<DataConnection>,
    pub memory: mpsc::UnboundedReceiver<MemoryCall>,
    pub joined: mpsc::UnboundedReceiver<KnownHost>,
    pub hanging: mpsc::UnboundedReceiver<()>,
    task: JoinHandle<()>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Agent {
    pub async fn start(identity: &Arc<Identity>) -> Self {
        Self::start_with(identity, any_port(), ListenerOptions::default()).await
    }

    pub async fn start_with(identity: &Arc<Identity>, address: SocketAddr, options: ListenerOptions) -> Self {
        let mut listener = Listener::bind(address, Arc::clone(identity), options).await.unwrap();
        let address = listener.local_address();
        let (data_sender, data) = mpsc::unbounded_channel();
        let (memory_sender, memory) = mpsc::unbounded_channel();
        let (joined_sender, joined) = mpsc::unbounded_channel();
        let (hanging_sender, hanging) = mpsc::unbounded_channel();
        let handler = Arc::new(Echo { hanging: hanging_sender });
        let task = tokio::spawn(async move {
            let mut served = JoinSet::new();
            while let Some(incoming) = listener.next().await {
                match incoming {
                    Incoming::Control(connection) => {
                        served.spawn(serve_control(connection, Arc::clone(&handler), Heartbeat::default()));
                    }
                    Incoming::Data(connection) => drop(data_sender.send(*connection)),
                    Incoming::Memory(call) => drop(memory_sender.send(call)),
                    Incoming::Joined(host) => drop(joined_sender.send(host)),
                }
            }
        });
        Self { address, data, memory, joined, hanging, task }
    }

    /// Ends it as a crash does, and waits until its port is free.
    pub async fn stop(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }

    pub fn addresses(&self) -> Vec<String> {
        vec![self.address.to_string()]
    }

    pub fn client(&self, name: &str, identity: &Arc<Identity>) -> ControlClient {
        let options = ControlClientOptions { call_timeout: PATIENCE, ..ControlClientOptions::default() };
        ControlClient::new(host(name), self.addresses(), Arc::clone(identity), options)
    }

    /// Whether it still serves its own cluster.
    pub async fn assert_well(&self, cluster: &Cluster) {
        let client = self.client(cluster.identity.host().as_str(), &cluster.identity);
        let answer: u64 = client.call("double", &21).await.unwrap();
        assert_eq!(answer, 42);
    }
}
