//! The agent: owns the devices of a host, carries out decisions, serves the API, keeps the ledger.

pub mod adopt;
pub mod agent;
pub mod api;
mod awaited;
mod claims;
pub mod config;
mod departure;
pub mod device;
pub mod error;
pub mod events;
mod exchange;
mod follow;
mod hand_over;
mod home;
mod incoming;
mod leaving;
pub mod ledger;
mod limits;
mod memory;
pub mod metrics;
pub mod migrate;
pub mod new_device;
pub mod offer;
pub mod operation;
pub mod peer;
mod ram;
mod recover;
mod returns;
#[cfg(test)]
mod testing;
pub mod view;
pub mod vm;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use belay_link::{Heartbeat, Identity, Incoming, Listener, ListenerOptions, PkiError, serve_control};
use tokio::signal::unix::{SignalKind, signal};

use crate::agent::Agent;
use crate::config::Config;
use crate::ledger::Ledger;
use crate::limits::Limits;
use crate::peer::Peers;

/// How long a peer may take to say which device it wants.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// Runs the agent until it is told to end.
///
/// # Errors
/// It cannot start, or something that it cannot do without fails.
pub fn run(config_path: &Path) -> anyhow::Result<()> {
    memory::keep_freed();
    let config = Config::load(config_path)?;
    let filter = tracing_subscriber::EnvFilter::try_from_env("BELAY_LOG").unwrap_or_else(|_| "info".into());
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let _ = log.with_ansi(colours).try_init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> anyhow::Result<()> {
    for folder in [&config.state_dir, &config.runtime_dir] {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let _lock = only_one(&config.state_dir)?;
    let identity = match Identity::load(&config.pki_dir()) {
        Ok(identity) => Some(Arc::new(identity)),
        Err(PkiError::NotEnrolled { .. }) => {
            tracing::warn!(
                "this host belongs to no cluster: `belay host init` or `belay host join` changes that"
            );
            None
        }
        Err(error) => return Err(error).context("this host's certificate cannot be used"),
    };
    if let (Some(identity), Some(name)) = (&identity, &config.host_name) {
        let certified = identity.host().as_str();
        anyhow::ensure!(
            certified == name,
            "host_name is {name}, but this host's certificate is for {certified}"
        );
    }
    let vmm_uid = config.vmm.user.as_deref().map(uid_of).transpose()?;
    let ledger = Ledger::open(&config.state_dir.join("ledger.redb"))?;
    let agent = Agent::new(config, identity.clone(), ledger);
    if let Some(uid) = vmm_uid {
        let _ = agent.vmm_uid.set(uid);
    }
    agent.reopen_departures()?;
    // Before another host asks: a VM that is not known yet would be one that is gone.
    agent.find_vms()?;
    if let Some(identity) = identity {
        listen_to_peers(&agent, identity).await?;
    }
    agent.start_devices().await?;
    agent.add_configured_devices().await?;
    agent.settle_migrations();
    let socket = agent.config.api_socket();
    let listener =
        agent::listen(&socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(host = %agent.host(), socket = %socket.display(), "ready");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        served = axum::serve(listener, api::router(Arc::clone(&agent))) => served?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("ending; VMs go on, and wait for the agent to come back");
    for device in agent.devices() {
        device.send(belay_attach::Command::Shutdown);
        let _ = device.stopped().await;
    }
    let _ = std::fs::remove_file(socket);
    Ok(())
}

/// One agent per state directory.
fn only_one(folder: &Path) -> anyhow::Result<File> {
    let path = folder.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(_) => anyhow::bail!("another agent uses {}", folder.display()),
    }
}

/// The number of the user that QEMU runs as.
fn uid_of(user: &str) -> anyhow::Result<u32> {
    let output =
        std::process::Command::new("id").args(["-u", "--", user]).output().context("cannot run `id`")?;
    let number = String::from_utf8_lossy(&output.stdout).trim().parse();
    number.map_err(|_| {
        anyhow::anyhow!("vmm.user = {user:?}: there is no such user; `useradd --system {user}` makes one")
    })
}

async fn listen_to_peers(agent: &Arc<Agent>, identity: Arc<Identity>) -> anyhow::Result<()> {
    let address = agent
        .config
        .link
        .listen
        .parse()
        .with_context(|| format!("link.listen = {:?}", agent.config.link.listen))?;
    let mut listener = Listener::bind(address, identity, ListenerOptions::default())
        .await
        .with_context(|| format!("cannot listen on {address}"))?;
    let agent = Arc::clone(agent);
    let limits = Arc::new(Limits::default());
    tokio::spawn(async move {
        while let Some(incoming) = listener.next().await {
            match incoming {
                Incoming::Control(connection) => {
                    let Some(place) = limits.control(connection.peer.as_str()) else {
                        tracing::warn!(peer = %connection.peer, "a peer has too many connections for calls: one more was closed");
                        continue;
                    };
                    let handler = Arc::new(Peers(Arc::clone(&agent)));
                    tokio::spawn(async move {
                        let _place = place;
                        if let Err(error) = serve_control(connection, handler, Heartbeat::default()).await {
                            tracing::debug!(%error, "a peer's control connection ended");
                        }
                    });
                }
                Incoming::Data(connection) => {
                    let (agent, limits) = (Arc::clone(&agent), Arc::clone(&limits));
                    tokio::spawn(async move {
                        let Some(place) = limits.opening(connection.peer.as_str()).await else {
                            tracing::warn!(peer = %connection.peer, "a peer has too many data connections that say nothing: one more was closed");
                            return;
                        };
                        tokio::task::spawn_blocking(move || {
                            hand_over(&agent, *connection);
                            drop(place);
                        });
                    });
                }
                Incoming::Memory(call) => {
                    tokio::spawn(Arc::clone(&agent).take_memory(call));
                }
                Incoming::Joined(host) => {
                    agent.events.note("link", None, None, format!("host {} was enrolled", host.name))
                }
            }
        }
    });
    Ok(())
}

/// Gives a peer's data connection to the thread of the device that it asks for.
fn hand_over(agent: &Agent, connection: belay_link::DataConnection) {
    let peer = connection.peer.to_string();
    match belay_attach::read_open(agent::ways::peer_socket(connection), OPEN_LIMIT) {
        Ok((socket, open, epoch)) => match agent.device_by_id(open.device) {
            Some(device) => device.send(belay_attach::Command::Accept { socket, open, epoch }),
            None => tracing::warn!(%peer, device = %open.device, "a peer asks for a device that is not here"),
        },
        Err(error) => tracing::warn!(%peer, %error, "a peer's data connection was closed"),
    }
}
