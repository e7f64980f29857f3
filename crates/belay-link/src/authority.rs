//! The cluster's certificate authority. It lives on the host that ran `belay host init`, and nowhere else.

use std::path::{Path, PathBuf};

use rcgen::{CertificateSigningRequestParams, Issuer, KeyPair, PublicKeyData};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::certificate::{self, Facts};
use crate::files::{self, CA_CERTIFICATE, CA_KEY, DirectoryLock, HOST_CERTIFICATE, HOST_KEY};
use crate::hosts;
use crate::identity::{Identity, PkiError, read_certificate, unusable};
use crate::name::HostName;

/// Makes a cluster: its certificate authority, and this host's identity, in an empty PKI directory.
///
/// # Errors
/// There is an identity already, or the directory can not be written.
pub fn init(directory: &Path, host: &HostName) -> Result<Identity, PkiError> {
    init_at(directory, host, OffsetDateTime::now_utc())?;
    Identity::load(directory)
}

pub(crate) fn init_at(directory: &Path, host: &HostName, now: OffsetDateTime) -> Result<(), PkiError> {
    files::make_directory(directory)?;
    let _lock = DirectoryLock::acquire(directory)?;
    for name in [CA_KEY, CA_CERTIFICATE, HOST_KEY, HOST_CERTIFICATE] {
        let path = files::path(directory, name);
        if files::exists(&path)? {
            return Err(PkiError::AlreadyEnrolled { path });
        }
    }
    let cluster = Uuid::new_v4();
    let ca_key = KeyPair::generate()?;
    let ca_params = certificate::authority_params(cluster, now);
    let ca = ca_params.self_signed(&ca_key)?;
    let host_key = KeyPair::generate()?;
    let issuer = Issuer::from_params(&ca_params, &ca_key);
    let host_certificate = certificate::host_params(host, cluster, now)?.signed_by(&host_key, &issuer)?;
    files::write(&files::path(directory, CA_KEY), &ca_key.serialize_pem())?;
    files::write(&files::path(directory, CA_CERTIFICATE), &ca.pem())?;
    files::write(&files::path(directory, HOST_KEY), &host_key.serialize_pem())?;
    hosts::record(directory, host, &[])?;
    // Last, because with it the identity is complete.
    files::write(&files::path(directory, HOST_CERTIFICATE), &host_certificate.pem())
}

/// Renews the certificate of the host that holds the authority; its key stays. Other hosts ask for theirs with
/// [`renewal_request`](crate::renewal_request).
///
/// # Errors
/// The authority is not here, or a file can not be read or written.
pub fn renew(directory: &Path) -> Result<Identity, PkiError> {
    let authority = Authority::open(directory)?;
    let request = crate::identity::renewal_request(directory)?;
    let host = authority.host.clone();
    crate::identity::install_certificate(directory, &authority.sign_renewal(&host, &request)?)
}

/// The opened authority of a cluster.
pub struct Authority {
    directory: PathBuf,
    host: HostName,
    cluster: Uuid,
    issuer: Issuer<'static, KeyPair>,
    ca_pem: String,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("directory", &self.directory)
            .field("cluster", &self.cluster)
            .finish()
    }
}

impl Authority {
    /// Opens the authority. It may be used while this host's own certificate is expired, to renew it.
    ///
    /// # Errors
    /// [`PkiError::NotAuthority`] on every other host; or its files can not be used.
    pub fn open(directory: &Path) -> Result<Self, PkiError> {
        files::check_directory(directory)?;
        let missing = || PkiError::NotEnrolled { directory: directory.to_owned() };
        let certificate_path = files::path(directory, HOST_CERTIFICATE);
        let own = read_certificate(&certificate_path)?.ok_or_else(missing)?;
        let own = Facts::of(&own).map_err(|reason| unusable(&certificate_path, reason))?;
        let key_path = files::path(directory, CA_KEY);
        let key = files::read_secret(&key_path)?
            .ok_or_else(|| PkiError::NotAuthority { path: key_path.clone() })?;
        let key = KeyPair::from_pem(&key).map_err(|error| unusable(&key_path, &error.to_string()))?;
        let ca_path = files::path(directory, CA_CERTIFICATE);
        let ca_pem = files::read(&ca_path)?.ok_or_else(missing)?;
        let issuer =
            Issuer::from_ca_cert_pem(&ca_pem, key).map_err(|error| unusable(&ca_path, &error.to_string()))?;
        Ok(Self { directory: directory.to_owned(), host: own.host, cluster: own.cluster, issuer, ca_pem })
    }

    /// Signs a new certificate (PEM) for a host that proved its name with its old one. Of the request only the key
    /// is used.
    ///
    /// # Errors
    /// The request is not one, or its key is of a kind that we do not use.
    pub fn sign_renewal(&self, host: &HostName, request_pem: &str) -> Result<String, PkiError> {
        self.sign_at(host, request_pem, OffsetDateTime::now_utc())
    }

    pub(crate) fn sign_at(
        &self,
        host: &HostName,
        request_pem: &str,
        now: OffsetDateTime,
    ) -> Result<String, PkiError> {
        let refused = |reason: &str| unusable(Path::new("the certificate request"), reason);
        let request = CertificateSigningRequestParams::from_pem(request_pem)
            .map_err(|error| refused(&error.to_string()))?;
        if PublicKeyData::algorithm(&request.public_key) != &rcgen::PKCS_ECDSA_P256_SHA256 {
            return Err(refused("its key is not an ECDSA key on P-256"));
        }
        let params = certificate::host_params(host, self.cluster, now)?;
        Ok(params.signed_by(&request.public_key, &self.issuer)?.pem())
    }

    pub(crate) fn ca_pem(&self) -> &str {
        &self.ca_pem
    }
}
