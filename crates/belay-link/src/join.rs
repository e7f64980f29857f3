//! Enrolling a host, over a connection of kind [`ConnectionKind::Join`](belay_wire::ConnectionKind::Join).
//!
//! ```text
//!   joining host                                   inviting host
//!     TLS: checks the server's chain against the fingerprint of the token; shows no certificate
//!     hello ──────────────────────────────────────▶
//!     u32 length │ JSON: secret, name, addresses, request ▶  checks, marks the token used, signs
//!     ◀────── u32 length │ JSON: certificate, authority, hosts; or the refusal
//! ```
//! The secret travels only after the server has proved that it belongs to the cluster of the token, and is the host
//! that the token names. The key of the joining host never leaves it.

use std::io;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use belay_wire::{ConnectionKind, Hello};
use rcgen::KeyPair;
use rustls::CertificateError;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{Instant, timeout_at};

use crate::authority::Authority;
use crate::dial::{Missed, Target, tls_error};
use crate::files::{self, CA_CERTIFICATE, CA_KEY, DirectoryLock, HOST_CERTIFICATE, HOST_KEY};
use crate::greeting::{GreetingError, greet};
use crate::hosts::{self, KnownHost};
use crate::identity::{Identity, PkiError, certificate_request};
use crate::invite::{self, Token, TokenError};
use crate::name::HostName;
use crate::tls;

/// The longest message, in bytes: a certificate, an authority, and some thousand hosts.
const MAX_MESSAGE_BYTES: u32 = 256 * 1024;
/// How long joining may take.
const TIMEOUT: Duration = Duration::from_secs(15);

#[derive(Serialize, Deserialize)]
struct Request {
    secret: String,
    host: HostName,
    addresses: Vec<String>,
    certificate_request: String,
}

#[derive(Serialize, Deserialize)]
struct Enrolment {
    certificate: String,
    authority: String,
    hosts: Vec<KnownHost>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Enrolled(Enrolment),
    Refused(JoinRefusal),
}

/// Why the inviting host refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case", tag = "code", content = "detail")]
pub enum JoinRefusal {
    /// The token's time is over.
    #[error("the token has expired: make a new one with `belay host invite`")]
    ExpiredToken,
    /// A host has joined with it.
    #[error("the token was used already: make a new one with `belay host invite`")]
    UsedToken,
    /// No such token was made there.
    #[error("the token is not known there: make a new one with `belay host invite`")]
    UnknownToken,
    /// A host of this name is in the cluster.
    #[error(
        "a host of the name {0} is enrolled already: choose another name, or run `belay host remove {0}` first"
    )]
    NameTaken(HostName),
    /// That host can not sign.
    #[error("that host does not hold the cluster's key: join at the host that ran `belay host init`")]
    NotAuthority,
    /// The request was not understood.
    #[error("the request was not understood: {0}")]
    Malformed(String),
    /// Something failed over there.
    #[error("the inviting host could not do it: {0}")]
    Failed(String),
}

/// Why this host did not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The token is none.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The inviting host refused.
    #[error("{host} refused: {refusal}")]
    Refused {
        /// The inviting host.
        host: HostName,
        /// Its reason.
        refusal: JoinRefusal,
    },
    /// Whoever answers is not of the cluster that the token names. The secret was not sent.
    #[error(
        "at {addresses} answers something that is not {host} of the token's cluster: {reason}; nothing was sent to it"
    )]
    WrongCluster {
        /// The inviting host.
        host: HostName,
        /// The addresses tried.
        addresses: String,
        /// What did not fit.
        reason: String,
    },
    /// The inviting host can not be reached.
    #[error("{host} can not be reached at {addresses}: {reason}; is its agent running, and the port open?")]
    Unreachable {
        /// The inviting host.
        host: HostName,
        /// The addresses tried.
        addresses: String,
        /// The last failure.
        reason: String,
    },
    /// It speaks another version.
    #[error("{host} refused the connection: {reason}")]
    NoCommonVersion {
        /// The inviting host.
        host: HostName,
        /// Its reason.
        reason: String,
    },
    /// This host's PKI directory.
    #[error(transparent)]
    Pki(#[from] PkiError),
}

/// What joining brought.
#[derive(Debug)]
pub struct Joined {
    /// This host's new identity, written to its PKI directory.
    pub identity: Identity,
    /// The other hosts of the cluster.
    pub hosts: Vec<KnownHost>,
}

/// Joins the cluster of a token, under a name. `addresses` (`host:port`) are where this host's agent will be
/// reached; they are told to the inviting host.
///
/// # Errors
/// This host has an identity already, or the inviting host could not be reached, was not the right one, or refused.
/// After an error nothing has changed here, except for a key that is replaced with the next attempt.
pub async fn join(
    token: &str,
    directory: &Path,
    host: &HostName,
    addresses: &[String],
) -> Result<Joined, JoinError> {
    let token = Token::decode(token)?;
    files::make_directory(directory)?;
    refuse_to_overwrite(directory)?;
    let key = KeyPair::generate().map_err(PkiError::from)?;
    let request = Request {
        secret: URL_SAFE_NO_PAD.encode(token.secret),
        host: host.clone(),
        addresses: addresses.to_vec(),
        certificate_request: certificate_request(&key)?,
    };
    // Before the request, because the token is used up with it.
    let key_path = files::path(directory, HOST_KEY);
    files::write(&key_path, &key.serialize_pem())?;
    let enrolment = ask(&token, &request).await?;
    check_authority(&token, &enrolment)?;
    let _lock = DirectoryLock::acquire(directory)?;
    refuse_to_overwrite(directory)?;
    files::write(&key_path, &key.serialize_pem())?;
    files::write(&files::path(directory, CA_CERTIFICATE), &enrolment.authority)?;
    let mut known = enrolment.hosts.clone();
    known.push(KnownHost { name: host.clone(), addresses: addresses.to_vec() });
    hosts::write_first(directory, known)?;
    files::write(&files::path(directory, HOST_CERTIFICATE), &enrolment.certificate)?;
    Ok(Joined { identity: Identity::load(directory)?, hosts: enrolment.hosts })
}

fn refuse_to_overwrite(directory: &Path) -> Result<(), PkiError> {
    for name in [HOST_CERTIFICATE, CA_KEY] {
        let path = files::path(directory, name);
        if files::exists(&path)? {
            return Err(PkiError::AlreadyEnrolled { path });
        }
    }
    Ok(())
}

/// The authority that comes with the answer must be the one of the token, as the server's was.
fn check_authority(token: &Token, enrolment: &Enrolment) -> Result<(), JoinError> {
    match CertificateDer::from_pem_slice(enrolment.authority.as_bytes()) {
        Ok(ca) if tls::fingerprint(&ca) == token.ca_fingerprint => Ok(()),
        _ => Err(token.wrong_cluster("it sent another authority")),
    }
}

impl Token {
    fn unreachable(&self, reason: &str) -> JoinError {
        JoinError::Unreachable {
            host: self.host.clone(),
            addresses: self.addresses.join(", "),
            reason: reason.to_owned(),
        }
    }

    fn wrong_cluster(&self, reason: &str) -> JoinError {
        JoinError::WrongCluster {
            host: self.host.clone(),
            addresses: self.addresses.join(", "),
            reason: reason.to_owned(),
        }
    }

    fn explain(&self, missed: Option<Missed>) -> JoinError {
        let Some(Missed { error, .. }) = missed else {
            return self.unreachable("no address could be resolved");
        };
        match tls_error(&error) {
            Some(rustls::Error::InvalidCertificate(CertificateError::Other(other))) => {
                self.wrong_cluster(&other.0.to_string())
            }
            Some(rustls::Error::InvalidCertificate(reason)) => self.wrong_cluster(&reason.to_string()),
            _ => self.unreachable(&error.to_string()),
        }
    }
}

async fn ask(token: &Token, request: &Request) -> Result<Enrolment, JoinError> {
    let deadline = Instant::now() + TIMEOUT;
    let config =
        tls::join_config(token.ca_fingerprint).map_err(|error| PkiError::Cryptography(error.to_string()))?;
    let target = Target { addresses: &token.addresses, expected: &token.host };
    let (mut stream, _) = target.race(config, deadline).await.map_err(|missed| token.explain(missed))?;
    let exchange = async {
        greet(&mut stream, &Hello::of(ConnectionKind::Join)).await?;
        send(&mut stream, request).await?;
        Ok(receive::<_, Answer>(&mut stream).await?)
    };
    match timeout_at(deadline, exchange).await {
        Ok(Ok(Ok(Answer::Enrolled(enrolment)))) => Ok(enrolment),
        Ok(Ok(Ok(Answer::Refused(refusal)))) => Err(JoinError::Refused { host: token.host.clone(), refusal }),
        Ok(Ok(Err(reason))) => Err(token.unreachable(&format!("its answer was not understood: {reason}"))),
        Ok(Err(GreetingError::Refused(reason))) => {
            Err(JoinError::NoCommonVersion { host: token.host.clone(), reason })
        }
        Ok(Err(error)) => Err(token.unreachable(&error.to_string())),
        Err(_) => Err(token.unreachable("no answer in time")),
    }
}

/// The inviting host's part, after the hello: reads the request, enrols the host or refuses it, and answers.
pub(crate) async fn answer<S>(stream: &mut S, directory: &Path) -> io::Result<Result<KnownHost, JoinRefusal>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let outcome = match receive::<_, Request>(stream).await? {
        Ok(request) => {
            let directory = directory.to_owned();
            // Writes files and waits for a lock: not for tokio's threads.
            tokio::task::spawn_blocking(move || enrol(&directory, &request))
                .await
                .unwrap_or_else(|error| Err(JoinRefusal::Failed(error.to_string())))
        }
        Err(reason) => Err(JoinRefusal::Malformed(reason)),
    };
    match outcome {
        Ok((host, enrolment)) => {
            send(stream, &Answer::Enrolled(enrolment)).await?;
            Ok(Ok(host))
        }
        Err(refusal) => {
            send(stream, &Answer::Refused(refusal.clone())).await?;
            Ok(Err(refusal))
        }
    }
}

fn enrol(directory: &Path, request: &Request) -> Result<(KnownHost, Enrolment), JoinRefusal> {
    let failed = |error: PkiError| match error {
        PkiError::NotAuthority { .. } => JoinRefusal::NotAuthority,
        other => JoinRefusal::Failed(other.to_string()),
    };
    let now = OffsetDateTime::now_utc();
    let authority = Authority::open(directory).map_err(failed)?;
    let secret = URL_SAFE_NO_PAD
        .decode(&request.secret)
        .map_err(|_| JoinRefusal::Malformed("the secret is not base64url".to_owned()))?;
    let _lock = DirectoryLock::acquire(directory).map_err(failed)?;
    // First of all the token: without it a caller learns nothing about the cluster.
    invite::check(directory, &secret, now)?;
    let others = hosts::known_hosts(directory).map_err(failed)?;
    if others.iter().any(|known| known.name == request.host) {
        return Err(JoinRefusal::NameTaken(request.host.clone()));
    }
    // Of a host that was removed: newer than that, whatever the clock says.
    let removed = hosts::removed_at(directory, &request.host).map_err(failed)?;
    let issued = removed.map_or(now, |at| now.max(at + time::Duration::seconds(1)));
    let certificate = authority
        .sign_at(&request.host, &request.certificate_request, issued)
        .map_err(|error| JoinRefusal::Malformed(error.to_string()))?;
    invite::consume(directory, &secret, &request.host, now).map_err(failed)?;
    hosts::record(directory, &request.host, &request.addresses).map_err(failed)?;
    let host = KnownHost { name: request.host.clone(), addresses: request.addresses.clone() };
    Ok((host, Enrolment { certificate, authority: authority.ca_pem().to_owned(), hosts: others }))
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, message: &impl Serialize) -> io::Result<()> {
    let json = serde_json::to_vec(message)?;
    let length = u32::try_from(json.len())
        .ok()
        .filter(|length| *length <= MAX_MESSAGE_BYTES)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the message is too long"))?;
    stream.write_all(&length.to_le_bytes()).await?;
    stream.write_all(&json).await?;
    stream.flush().await
}

/// Reads a message; the inner error says why it was not understood.
async fn receive<S, T>(stream: &mut S) -> io::Result<Result<T, String>>
where
    S: AsyncRead + Unpin,
    T: for<'de> Deserialize<'de>,
{
    let length = stream.read_u32_le().await?;
    if length > MAX_MESSAGE_BYTES {
        return Ok(Err(format!("{length} bytes are more than the limit of {MAX_MESSAGE_BYTES}")));
    }
    let mut json = vec![0; length as usize];
    stream.read_exact(&mut json).await?;
    Ok(serde_json::from_slice(&json).map_err(|error| error.to_string()))
}
