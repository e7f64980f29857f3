//! Calling another agent.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use belay_wire::{ConnectionKind, Hello, Version};
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::{TlsConnector, TlsStream};

use crate::connection::{ControlConnection, DataConnection};
use crate::greeting::{GreetingError, greet};
use crate::identity::Identity;
use crate::memory::{self, MemoryStream};
use crate::name::HostName;
use crate::tls;

/// While an attempt has not succeeded, another is begun this often.
const NEXT_ATTEMPT: Duration = Duration::from_millis(250);
/// Attempts under way at once; a peer that answers none of these answers no more of them either.
const MAX_ATTEMPTS_AT_ONCE: usize = 8;

/// Why there is no connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// Nothing answers there, or it broke off.
    #[error("{host} can not be reached at {addresses}: {reason}; is its agent running, and the port open?")]
    Unreachable {
        /// The host wanted.
        host: HostName,
        /// The addresses tried.
        addresses: String,
        /// The last failure.
        reason: String,
    },
    /// Another host of the cluster answers at this address.
    #[error("at {address} another host than {expected} answers: correct the address of {expected}")]
    WrongHost {
        /// The host wanted.
        expected: HostName,
        /// Where another one answered.
        address: SocketAddr,
    },
    /// One side does not accept the other's certificate.
    #[error(
        "the certificates of this host and {host} do not fit: {reason}; are both hosts of one cluster, and their clocks right?"
    )]
    CertificateRejected {
        /// The host wanted.
        host: HostName,
        /// What was wrong.
        reason: String,
    },
    /// The peer refused: it does not speak our version, does not know this kind of connection, or does not want it.
    #[error("{host} refused the connection: {reason}")]
    Refused {
        /// The host wanted.
        host: HostName,
        /// Its reason.
        reason: String,
    },
}

/// Opens a connection for control calls; most callers want a [`ControlClient`](crate::ControlClient).
///
/// Addresses are `host:port` (names are resolved), and raced: see [`DialError`] for what can go wrong. `timeout`
/// bounds everything together.
///
/// # Errors
/// There is no connection.
pub async fn dial_control(
    addresses: &[String],
    expected: &HostName,
    identity: &Identity,
    timeout: Duration,
) -> Result<ControlConnection, DialError> {
    let target = Target { addresses, expected };
    let (stream, address, version) = target.dial(ConnectionKind::Control, identity, timeout).await?;
    Ok(ControlConnection { peer: expected.clone(), address, version, stream: Box::new(stream) })
}

/// Opens a connection for a device's data, like [`dial_control`].
///
/// # Errors
/// There is no connection.
pub async fn dial_data(
    addresses: &[String],
    expected: &HostName,
    identity: &Identity,
    timeout: Duration,
) -> Result<DataConnection, DialError> {
    let target = Target { addresses, expected };
    let (stream, address, version) = target.dial(ConnectionKind::Data, identity, timeout).await?;
    DataConnection::detach(stream, expected.clone(), address, version)
        .map_err(|error| target.unreachable(&error.to_string()))
}

/// Opens a connection for a VM's memory, like [`dial_control`], and asks the peer to take it for its VM `vm`.
///
/// # Errors
/// There is no connection, or the peer does not expect that VM from this host.
pub async fn dial_memory(
    addresses: &[String],
    expected: &HostName,
    identity: &Identity,
    vm: &str,
    timeout: Duration,
) -> Result<MemoryStream, DialError> {
    let target = Target { addresses, expected };
    let deadline = Instant::now() + timeout;
    let (stream, ..) = target.dial(ConnectionKind::Memory, identity, timeout).await?;
    match timeout_at(deadline, memory::call(stream, vm)).await {
        Ok(Ok(Ok(stream))) => Ok(stream),
        Ok(Ok(Err(reason))) => Err(DialError::Refused { host: expected.clone(), reason }),
        Ok(Err(error)) => Err(target.unreachable(&error.to_string())),
        Err(_) => Err(target.unreachable("it did not answer in time")),
    }
}

/// Whom we call, and where.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) addresses: &'a [String],
    pub(crate) expected: &'a HostName,
}

/// A TLS connection, and where to.
pub(crate) type Reached = (TlsStream<TcpStream>, SocketAddr);

/// A failed attempt: the address, and why.
pub(crate) struct Missed {
    pub(crate) address: SocketAddr,
    pub(crate) error: io::Error,
}

impl Target<'_> {
    async fn dial(
        self,
        kind: ConnectionKind,
        identity: &Identity,
        timeout: Duration,
    ) -> Result<(TlsStream<TcpStream>, SocketAddr, Version), DialError> {
        let deadline = Instant::now() + timeout;
        let (mut stream, address) =
            self.race(tls::client_config(identity), deadline).await.map_err(|missed| self.explain(missed))?;
        let name = tls::peer_name(stream.get_ref().1.peer_certificates(), identity);
        if name.map_err(|error| self.rejected(error.to_string()))? != *self.expected {
            return Err(DialError::WrongHost { expected: self.expected.clone(), address });
        }
        let greeting = timeout_at(deadline, greet(&mut stream, &Hello::of(kind))).await;
        match greeting {
            Ok(Ok(version)) => Ok((stream, address, version)),
            Ok(Err(GreetingError::Refused(reason))) => {
                Err(DialError::Refused { host: self.expected.clone(), reason })
            }
            Ok(Err(GreetingError::Foreign(error))) => Err(self.unreachable(&error.to_string())),
            Ok(Err(GreetingError::Io(error))) => Err(self.explain(Some(Missed { address, error }))),
            Err(_) => Err(self.unreachable("it accepted the connection, but did not answer in time")),
        }
    }

    /// Races TCP connections and TLS handshakes; the first complete one wins, and the others are closed before they
    /// said anything, so that the peer never sees two connections where one was wanted.
    pub(crate) async fn race(
        self,
        config: Arc<rustls::ClientConfig>,
        deadline: Instant,
    ) -> Result<Reached, Option<Missed>> {
        let addresses = self.resolve(deadline).await;
        let connector = TlsConnector::from(config);
        let mut usable = addresses.clone();
        let mut attempts = JoinSet::new();
        let mut next = 0;
        let mut worst: Option<Missed> = None;
        loop {
            if usable.is_empty() && attempts.is_empty() {
                return Err(worst);
            }
            if !usable.is_empty() && attempts.len() < MAX_ATTEMPTS_AT_ONCE {
                let address = usable[next % usable.len()];
                next += 1;
                attempts.spawn(attempt(connector.clone(), address, self.expected.clone()));
            }
            let pause = (Instant::now() + NEXT_ATTEMPT).min(deadline);
            match timeout_at(pause, attempts.join_next()).await {
                Ok(Some(Ok(Ok(reached)))) => return Ok(reached),
                Ok(Some(Ok(Err(missed)))) => {
                    usable.retain(|address| *address != missed.address);
                    worst = Some(more_telling(worst, missed));
                }
                Ok(_) => {}
                Err(_) if Instant::now() >= deadline => return Err(worst.or_else(|| timed_out(&addresses))),
                Err(_) => {}
            }
        }
    }

    async fn resolve(self, deadline: Instant) -> Vec<SocketAddr> {
        let mut resolved: Vec<SocketAddr> = Vec::new();
        for address in self.addresses {
            if let Ok(Ok(found)) = timeout_at(deadline, lookup_host(address.as_str())).await {
                for address in found {
                    if !resolved.contains(&address) {
                        resolved.push(address);
                    }
                }
            }
        }
        resolved
    }

    fn unreachable(self, reason: &str) -> DialError {
        DialError::Unreachable {
            host: self.expected.clone(),
            addresses: self.addresses.join(", "),
            reason: reason.to_owned(),
        }
    }

    fn rejected(self, reason: String) -> DialError {
        DialError::CertificateRejected { host: self.expected.clone(), reason }
    }

    fn explain(self, missed: Option<Missed>) -> DialError {
        let Some(Missed { address, error }) = missed else {
            return self.unreachable(match self.addresses {
                [] => "no address of it is known",
                _ => "no address could be resolved",
            });
        };
        match tls_error(&error) {
            Some(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => DialError::WrongHost { expected: self.expected.clone(), address },
            Some(rustls::Error::InvalidCertificate(reason)) => {
                self.rejected(format!("its certificate was not accepted here: {reason}"))
            }
            Some(rustls::Error::NoCertificatesPresented) => {
                self.rejected("it showed no certificate".to_owned())
            }
            Some(rustls::Error::AlertReceived(alert)) if is_about_certificates(*alert) => {
                self.rejected(format!("our certificate was not accepted there: {alert:?}"))
            }
            _ => self.unreachable(&error.to_string()),
        }
    }
}

pub(crate) fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

fn is_about_certificates(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::NoCertificate
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError
            | AlertDescription::CertificateRequired
    )
}

/// Of two failures the one that says more: what TLS says is about the peer, the rest about the way there.
fn more_telling(old: Option<Missed>, new: Missed) -> Missed {
    match old {
        Some(old) if tls_error(&old.error).is_some() => old,
        _ => new,
    }
}

fn timed_out(addresses: &[SocketAddr]) -> Option<Missed> {
    let address = *addresses.first()?;
    Some(Missed { address, error: io::Error::new(io::ErrorKind::TimedOut, "no answer in time") })
}

async fn attempt(
    connector: TlsConnector,
    address: SocketAddr,
    expected: HostName,
) -> Result<Reached, Missed> {
    let connect = async {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        let name = ServerName::try_from(expected.as_str().to_owned())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        connector.connect(name, socket).await
    };
    match connect.await {
        Ok(stream) => Ok((TlsStream::Client(stream), address)),
        Err(error) => Err(Missed { address, error }),
    }
}
