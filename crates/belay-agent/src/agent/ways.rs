//! Ways to other hosts.

use std::sync::Arc;

use belay_attach::{Command, PeerSocket};
use belay_link::{
    Backoff, ControlClient, ControlClientOptions, DataConnection, HostName, Identity, dial_data, known_hosts,
};
use belay_wire::control::Channel;

use super::{Agent, DIAL_TIMEOUT};
use crate::device::Managed;
use crate::error::AgentError;

impl Agent {
    /// Addresses of a host.
    ///
    /// # Errors
    /// It is not known.
    pub fn addresses(&self, host: &str) -> Result<Vec<String>, AgentError> {
        if let Some(addresses) = self.config.peers.get(host) {
            return Ok(addresses.clone());
        }
        let known = known_hosts(&self.config.pki_dir()).unwrap_or_default();
        known
            .into_iter()
            .find(|known| known.name.to_string() == host && !known.addresses.is_empty())
            .map(|known| known.addresses)
            .ok_or_else(|| {
                AgentError::precheck(format!("host {host} is not known here"))
                    .hint("enrol it with `belay host invite` and `belay host join`, or name it under [peers] in the configuration")
            })
    }

    /// Connects a device's channel to a peer, however long it takes.
    pub(super) fn dial(self: &Arc<Self>, device: &Arc<Managed>, peer: String, channel: Channel) {
        let (agent, device) = (Arc::clone(self), Arc::clone(device));
        tokio::spawn(async move {
            let mut backoff = Backoff::default();
            loop {
                match agent.dial_once(&peer).await {
                    Ok(connection) => {
                        device.send(Command::Connected { channel, socket: peer_socket(connection) });
                        return;
                    }
                    Err(error) => tracing::debug!(device = %device.name(), %peer, %error, "dialling again"),
                }
                tokio::time::sleep(backoff.next_delay(rand::random())).await;
                if agent.device_by_id(device.identity().id).is_none() {
                    return;
                }
            }
        });
    }

    async fn dial_once(&self, peer: &str) -> Result<DataConnection, AgentError> {
        let (host, identity, addresses) = self.way_to(peer)?;
        dial_data(&addresses, &host, &identity, DIAL_TIMEOUT)
            .await
            .map_err(|error| AgentError::unreachable(error.to_string()))
    }

    /// What a connection to another host takes: its name, who this host is, and where the other one is reached.
    pub(crate) fn way_to(&self, host: &str) -> Result<(HostName, Arc<Identity>, Vec<String>), AgentError> {
        let identity = self.identity.clone().ok_or_else(|| {
            AgentError::precheck("this host belongs to no cluster")
                .hint("run `belay host init` or `belay host join`, then restart the agent")
        })?;
        let addresses = self.addresses(host)?;
        let name = HostName::new(host).map_err(|error| AgentError::usage(error.to_string()))?;
        Ok((name, identity, addresses))
    }

    /// Calls to another host's agent.
    ///
    /// # Errors
    /// The host is not known, or this one is not enrolled.
    pub fn client(&self, host: &str) -> Result<ControlClient, AgentError> {
        let (name, identity, addresses) = self.way_to(host)?;
        let mut clients = self.clients.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let client = clients.entry(host.to_owned()).or_insert_with(|| {
            ControlClient::new(name, addresses, identity, ControlClientOptions::default())
        });
        Ok(client.clone())
    }
}

/// What the data plane takes of a connection.
pub(crate) fn peer_socket(connection: DataConnection) -> PeerSocket {
    PeerSocket {
        peer: connection.peer.to_string(),
        socket: connection.socket,
        tls: connection.tls,
        early: connection.early,
    }
}
