//! TLS: version 1.3 only, certificates of both sides, no early data, no resumption.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    Resumption, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor, verify_server_name,
};
use rustls::crypto::{CryptoProvider, ring as provider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore, ServerConfig,
    SignatureScheme, version,
};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::certificate::Facts;
use crate::hosts;
use crate::identity::Identity;
use crate::name::HostName;

/// Why a peer's certificate names no host of ours, although our authority signed it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// It sent none.
    #[error("it has no certificate: enrol it with `belay host join`")]
    NoCertificate,
    /// The certificate says nothing usable.
    #[error("its certificate can not be used: {0}")]
    Unusable(&'static str),
    /// This host has removed that one.
    #[error("host {0} was removed here with `belay host remove`: enrol it again")]
    Removed(HostName),
    /// The list of removed hosts cannot be read: nobody is let in.
    #[error("the list of removed hosts can not be read: {0}")]
    ListUnusable(String),
    /// The certificate is of another cluster.
    #[error("it belongs to another cluster ({0})")]
    OtherCluster(Uuid),
}

/// How this host answers: clients show a certificate of our authority, or none at all (they may only join).
#[must_use]
pub fn server_config(identity: &Identity) -> Arc<ServerConfig> {
    Arc::clone(&identity.server)
}

/// How this host calls others. The server name given with a connection is the name of the host expected.
#[must_use]
pub fn client_config(identity: &Identity) -> Arc<ClientConfig> {
    Arc::clone(&identity.client)
}

/// Which host is at the other end, after the handshake.
///
/// # Errors
/// It showed no certificate, or one that names no host of our cluster.
pub fn peer_name(
    certificates: Option<&[CertificateDer<'_>]>,
    identity: &Identity,
) -> Result<HostName, PeerError> {
    let certificate = certificates.and_then(<[_]>::first).ok_or(PeerError::NoCertificate)?;
    let facts = Facts::of(certificate).map_err(PeerError::Unusable)?;
    if facts.cluster != identity.cluster() {
        return Err(PeerError::OtherCluster(facts.cluster));
    }
    match hosts::removed_at(identity.directory(), &facts.host) {
        Ok(Some(at)) if facts.issued() <= at => Err(PeerError::Removed(facts.host)),
        Ok(_) => Ok(facts.host),
        Err(error) => Err(PeerError::ListUnusable(error.to_string())),
    }
}

/// ring's algorithms, AES-128 before AES-256: as strong as our P-256 keys, and a third less work per byte.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = provider::default_provider();
    provider.cipher_suites = vec![
        provider::cipher_suite::TLS13_AES_128_GCM_SHA256,
        provider::cipher_suite::TLS13_AES_256_GCM_SHA384,
        provider::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(provider)
}

fn roots(ca: &CertificateDer<'_>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone().into_owned())?;
    Ok(Arc::new(roots))
}

fn setup(error: impl std::fmt::Display) -> Error {
    Error::General(error.to_string())
}

/// The authority's certificate is sent, too: a host that joins compares it with its token.
pub(crate) fn build_server_config(
    certificate: &CertificateDer<'static>,
    key: &PrivateKeyDer<'static>,
    ca: &CertificateDer<'static>,
) -> Result<Arc<ServerConfig>, Error> {
    let provider = provider();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(ca)?, Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(setup)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate.clone(), ca.clone()], key.clone_key())?;
    config.max_early_data_size = 0;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

pub(crate) fn build_client_config(
    certificate: &CertificateDer<'static>,
    key: &PrivateKeyDer<'static>,
    ca: &CertificateDer<'static>,
) -> Result<Arc<ClientConfig>, Error> {
    let provider = provider();
    let verifier = WebPkiServerVerifier::builder_with_provider(roots(ca)?, Arc::clone(&provider))
        .build()
        .map_err(setup)?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])?
        .with_webpki_verifier(verifier)
        .with_client_auth_cert(vec![certificate.clone()], key.clone_key())?;
    config.enable_early_data = false;
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// Whether the authority issued a certificate that is valid now.
pub(crate) fn check_issued(
    certificate: &CertificateDer<'_>,
    ca: &CertificateDer<'_>,
    now: OffsetDateTime,
) -> Result<(), Error> {
    let since_epoch = std::time::Duration::from_secs(now.unix_timestamp().max(0).unsigned_abs());
    verify_server_cert_signed_by_trust_anchor(
        &ParsedCertificate::try_from(certificate)?,
        &*roots(ca)?,
        &[],
        UnixTime::since_unix_epoch(since_epoch),
        provider().signature_verification_algorithms.all,
    )
}

/// SHA-256 of a certificate.
pub(crate) fn fingerprint(certificate: &CertificateDer<'_>) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, certificate).as_ref());
    out
}

/// How a host that joins calls: without a certificate, trusting the one authority that its token names.
pub(crate) fn join_config(ca_fingerprint: [u8; 32]) -> Result<Arc<ClientConfig>, Error> {
    let provider = provider();
    let verifier = PinnedAuthority { ca_fingerprint, provider: Arc::clone(&provider) };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.enable_early_data = false;
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// The server's authority is not the one that the token names.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the server's authority is not the one that the token names")]
pub(crate) struct WrongAuthority;

/// Trusts the authority with this fingerprint, which the server sends along, and everything else as usual.
#[derive(Debug)]
struct PinnedAuthority {
    ca_fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let ca = intermediates
            .iter()
            .find(|certificate| fingerprint(certificate) == self.ca_fingerprint)
            .ok_or_else(|| CertificateError::Other(OtherError(Arc::new(WrongAuthority))))?;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &*roots(ca)?, &[], now, algorithms)?;
        verify_server_name(&parsed, server_name)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not used".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
